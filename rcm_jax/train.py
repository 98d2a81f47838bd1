"""The story of a run, from its config to its last checkpoint."""

import contextlib
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rcm_jax import adapters, sampling, sharding
from rcm_jax.checkpoint import Checkpoints, export_safetensors, load_safetensors, on_host
from rcm_jax.config import FROM_TEACHER, MEAN_FLOW, Halted, Preempted, UserError, parse_stages
from rcm_jax.convert import families
from rcm_jax.convert.sources import open_source
from rcm_jax.convert.wan import WAN, params_from_wan, wan_tensors
from rcm_jax.data import digits, pipeline, text
from rcm_jax.generation import student_sampler
from rcm_jax.guard import Guard, Trouble
from rcm_jax.lifetime import sole_run, termination_notice, watchdog
from rcm_jax.methods import Applies, Recipe
from rcm_jax.models import presets
from rcm_jax.models.blocks import Remat, from_host
from rcm_jax.models.functional import Network
from rcm_jax.models.wan import PRESETS, WanConfig
from rcm_jax.records import RunRecords, check_unused, warn, write_run_info
from rcm_jax.schedule import Phase, needs, phase_at, total_iterations
from rcm_jax.state import Params, TrainState, create_optimizer, create_state, ema_exponent, overlay
from rcm_jax.steps import critic_step, student_step

# The official balance of the losses, 100 : 1, belongs to latents of 16 x 21 x 60 x 104 elements.
OFFICIAL_ELEMENTS = 16 * 21 * 60 * 104


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Runs, or resumes, the experiment that `config` describes; everything it writes lies in `workdir`.

    Returns the last state.

    Raises:
        UserError: the config does not fit its data, its teacher or the devices.
        Preempted: SIGTERM asked it to end.
        Halted: its numbers or its data are wrong, as config.faults defines it.
    """
    with (
        termination_notice() as must_end,
        watchdog(config.faults.hang_seconds) as progresses,
        contextlib.ExitStack() as until_the_end,
    ):
        return _train(config, Path(workdir), must_end, progresses, until_the_end)


def _train(
    config: ConfigDict,
    workdir: Path,
    must_end: Callable[[int], bool],
    progresses: Callable[[], None],
    until_the_end: contextlib.ExitStack,
) -> TrainState:
    check_show(config)
    stages = parse_stages(config.stages)
    total = total_iterations(stages)
    mesh = sharding.make_mesh(**config.mesh)
    check_batch_size(config, mesh)

    source = pipeline.open_source(config.data.name, config.data.dir, "train")
    if config.data.in_memory:
        source = pipeline.InMemory(source)
    first = pipeline.first_sound(source)
    latent_shape, text_shape = first["latent"].shape, first["text"].shape
    check_shapes(config.model.preset, latent_shape, text_shape)
    batches = pipeline.make_loader(
        source,
        batch_size=config.data.batch_size,
        seed=config.seed,
        rows=sharding.local_rows(mesh, config.data.batch_size),
    )

    networks = create_networks(config, mesh)
    optimizers = create_optimizers(config)
    abstract = abstract_state(config, networks, optimizers, mesh)
    negative = negative_text(config, text_shape)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step_of = jit_steps(config, networks, optimizers, latent_shape, negative, shardings)
    show = create_show(config, networks.student, source, first) if config.log.sample_every else None

    progresses()
    until_the_end.enter_context(sole_run(workdir))
    checkpoints = Checkpoints(workdir / "checkpoints", **config.checkpoint)
    restored = checkpoints.restore(abstract, batches)
    if restored is None:
        check_unused(workdir)
        restored = 0, init_state(config, networks, optimizers, mesh)
    (start, state), noted = restored, Notes({}, [], 0, config.stages)
    if start:
        noted = noted._replace(**checkpoints.metadata(start))
        check_stages(noted.stages, config.stages, start, workdir)
    progresses()
    write_run_info(workdir, config.to_dict(), iteration=start, process_index=jax.process_index())
    records = RunRecords(
        workdir,
        total=total,
        tokens_per_step=config.data.batch_size * PRESETS[config.model.preset].tokens(latent_shape),
        resume_at=start,
        process_index=jax.process_index(),
        wandb_project=config.log.wandb,
    )

    guard = create_guard(config, start, skipped=int(state.skipped))
    iteration, recent, window, rollbacks, bad_records = start, noted.metrics, noted.window, noted.rollbacks, set()

    def notes() -> dict[str, Any]:
        return Notes(recent, to_floats(window), rollbacks, config.stages)._asdict()

    while iteration < total:
        progresses()
        if must_end(iteration):
            checkpoints.save_and_wait(iteration, state, batches, notes, sound=guard.sound)
            raise Preempted(f"asked to end by SIGTERM: saved iteration {iteration}, the same command continues")
        phase = phase_at(
            stages,
            iteration,
            tangent_warmup=config.loss.tangent_warmup,
            student_update_freq=config.loss.student_update_freq,
        )
        batch = next(batches)
        report_bad_records(batch, bad_records)
        batch = to_mesh(batch, mesh, config.data.batch_size)
        step, arguments = step_of(phase)
        state, metrics = step(state, batch, *arguments)
        window.append(metrics)
        iteration += 1
        trouble = guard.judge(iteration, batch, metrics, last=iteration == total)
        if trouble:
            keep_batch(trouble, workdir)
            may_go_back = rollbacks < config.faults.rollbacks and not trouble.is_data
            restored = checkpoints.roll_back(trouble.sound, abstract, trouble.reason) if may_go_back else None
            if restored is None:
                checkpoints.save_and_wait(iteration, state, batches, notes, sound=trouble.sound)
                raise Halted(f"iteration {trouble.iteration}: {trouble.reason}; its batch lies in {workdir}/halted")
            (iteration, state), rollbacks = restored, rollbacks + 1
            recent, window, *_ = noted._replace(**checkpoints.metadata(iteration))
            guard.start(iteration, skipped=int(state.skipped))
            records.roll_back(iteration)
            records.say(f"rolled back to iteration {iteration}, the data go on: {trouble.reason}")
            continue
        if iteration % config.log.every == 0 or iteration == total:
            recent = window_means(to_floats(window))
            records.write(iteration, recent)
            window = []
        if show and iteration % config.log.sample_every == 0:
            with records.untimed():
                for caption, video in show(jax.device_put(overlay(state.teacher, state.ema), jax.memory.Space.Device)):
                    records.write_video(iteration, caption, video, fps=digits.FPS, scale=8)
        checkpoints.save(iteration, state, batches, notes, sound=guard.sound)
    progresses()
    checkpoints.save_and_wait(total, state, batches, notes)
    export(config, state, workdir, progresses)
    checkpoints.close()
    records.close()
    return state


class Notes(NamedTuple):
    """What a checkpoint notes beside the state, so that a resumed run logs what an uninterrupted one does.

    metrics: as last logged. window: those of each iteration since. rollbacks: made so far. stages: of the config.
    """

    metrics: dict[str, float]
    window: list[dict[str, Any]]
    rollbacks: int
    stages: str


def check_batch_size(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for a batch of which the mesh cannot share out every part that is accumulated."""
    batch_size, accumulate, parts = config.data.batch_size, config.data.accumulate, sharding.batch_parts(mesh)
    if batch_size % parts:
        raise UserError(
            f"data.{batch_size=} must be a multiple of mesh.data * mesh.fsdp = {parts}: "
            f"set it to {-(-batch_size // parts) * parts}"
        )
    if batch_size % (accumulate * parts):
        fits = next(n for n in range(accumulate, 0, -1) if batch_size % (n * parts) == 0)
        raise UserError(
            f"data.{batch_size=} must be a multiple of data.accumulate * mesh.data * mesh.fsdp = "
            f"{accumulate} * {parts}, or devices would compute the same: set data.accumulate={fits}"
        )


def check_shapes(preset: str, latent_shape: tuple[int, ...], text_shape: tuple[int, ...]) -> None:
    """Raises UserError for latents (T, H, W, C) or texts (S, D) that the network of a preset does not take."""
    network = get_preset(preset)
    *sizes, channels = latent_shape
    if len(sizes) != 3 or channels != network.in_channels or any(map(operator.mod, sizes, network.patch)):
        raise UserError(
            f"latents of {latent_shape} do not fit model.preset={preset!r}, which takes (frames, rows, columns, "
            f"{network.in_channels}) with sizes that {network.patch} divide: choose the data's preset, or other data"
        )
    if text_shape[-1] != network.text_dim:
        raise UserError(
            f"texts of width {text_shape[-1]} do not fit model.preset={preset!r}, which takes {network.text_dim}: "
            "choose the data's preset, or other data"
        )


def check_stages(before: str, now: str, iteration: int, workdir: Path) -> None:
    """Raises UserError for a run that was not trained, up to `iteration`, as its `stages` now say."""

    def losses(stages: str) -> list[frozenset[str]]:
        each = (stage.losses for stage in parse_stages(stages) for _ in range(stage.iterations))
        return list(itertools.islice(each, iteration))

    if losses(before) != losses(now):
        raise UserError(
            f"{workdir} was trained with stages={before} up to iteration {iteration}, and stages={now} begin "
            "otherwise: use another folder"
        )


def create_guard(config: ConfigDict, iteration: int, skipped: int) -> Guard:
    """The guard that config.faults describes, for a run that goes on from an iteration."""
    c = config.faults
    guard = Guard(
        max_skipped=c.max_skipped,
        max_loss_ratio=c.max_loss_ratio,
        max_bad_data=c.max_bad_data,
        batch_size=config.data.batch_size,
    )
    guard.start(iteration, skipped)
    return guard


def report_bad_records(batch: dict[str, np.ndarray], known: set[str]) -> None:
    """Says on stderr which records of this process' rows were left out and why, each once; `known` remembers them."""
    for reason in set(batch["reason"].tolist()) - known - {""}:
        warn(f"left out: {reason}")
        known.add(reason)


def keep_batch(trouble: Trouble, workdir: Path) -> None:
    """Writes the batch that shows a trouble to workdir/halted."""
    path = workdir / "halted" / f"batch_{trouble.iteration}.safetensors"
    export_safetensors(path, trouble.batch, {"iteration": str(trouble.iteration), "reason": trouble.reason})


class Networks(NamedTuple):
    """The networks of a run, of one preset."""

    student: Network
    teacher: Network
    fake: Network

    @property
    def applies(self) -> Applies:
        return Applies(*(network.apply for network in self))


def create_networks(config: ConfigDict, mesh: Mesh | None = None) -> Networks:
    """The student, the teacher and the fake score, each with what the config's methods add to it."""
    return Networks(
        student=create_network(config, mesh, lora_rank=config.model.lora_rank),
        teacher=create_network(config, mesh, spans=False),
        fake=create_network(
            config,
            mesh,
            spans=False,
            discriminator=needs(parse_stages(config.stages), "gan"),
            lora_rank=config.model.critic_lora_rank,
        ),
    )


def create_network(config: ConfigDict, mesh: Mesh | None = None, **extras: Any) -> Network:
    """The network that the config trains, as pure functions, its blocks split over the mesh, if there is one.

    `extras` change its WanConfig; without them it is the student as it is exported.

    Raises UserError for an unknown preset or remat policy, or a mesh that does not divide the heads.
    """
    if config.model.remat not in get_args(Remat):
        raise UserError(f"model.remat={config.model.remat!r} must be one of {', '.join(get_args(Remat))}")
    extras = {"spans": needs(parse_stages(config.stages), *MEAN_FLOW)} | extras
    preset, dtype = dataclasses.replace(get_preset(config.model.preset), **extras), jnp.dtype(config.model.dtype)
    kernels = "deterministic" if config.deterministic else "auto"
    ops = sharding.block_ops(mesh, preset.heads, config.model.ulysses, dtype=dtype, implementation=kernels)
    ops = from_host(ops) if "teacher" in host_parts(config) else ops
    return presets.create_network(preset, dtype=dtype, remat=config.model.remat, ops=ops)


def get_preset(name: str) -> WanConfig:
    """The network of a preset that can be trained. Raises UserError if there is none of this name."""
    if name not in PRESETS:
        raise UserError(f"model.preset={name!r} must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def load_params(path: str | Path, network: Network) -> Params:
    """A network's parameters from a checkpoint of any kind that convert/ reads: a teacher, or a student of ours.

    The second time of MeanFlow, which a teacher lacks, starts at zero.
    """
    _, tensors = families.published(open_source(Path(path)), families.WAN)
    abstract, own = network.abstract_params(), {}
    if "span_embedding" in abstract and "span_embedding.0.weight" not in tensors:
        spans = abstract.pop("span_embedding")
        own = {"span_embedding": jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spans)}
    return params_from_wan(tensors, abstract, source=str(path)) | own


def negative_text(config: ConfigDict, text_shape: tuple[int, ...]) -> jax.Array:
    """Embedding (S, D) of the negative prompt: the array "text" of a file, or that of "" by the digits' encoder."""
    path = config.teacher.negative_path
    if not path and config.data.name not in digits.VARIANTS:
        raise UserError(
            "teacher.negative_path is empty: give the negative prompt's embedding, which launch.precompute makes"
        )
    if not path:
        length, dim = text_shape
        return jnp.asarray(text.encode([""], length=length, dim=dim)[0])
    tensors, _ = load_safetensors(path)
    if "text" not in tensors or tensors["text"].shape != text_shape:
        raise UserError(
            f"teacher.negative_path={path} must hold one array `text` of shape {text_shape}, as the data has"
        )
    return jnp.asarray(tensors["text"], jnp.float32)


class Optimizers(NamedTuple):
    """The student's optimiser and the fake score's, None if no stage has a DMD loss."""

    student: optax.GradientTransformation
    critic: Any


def create_optimizers(config: ConfigDict) -> Optimizers:
    """AdamW as config.optimizer says."""
    c, stages = config.optimizer, parse_stages(config.stages)

    def create(learning_rate: float) -> optax.GradientTransformation:
        return create_optimizer(
            learning_rate,
            b1=c.b1,
            b2=c.b2,
            weight_decay=c.weight_decay,
            warmup=c.warmup,
            decay_from=c.decay_from,
            decay_to=c.decay_to,
        )

    return Optimizers(create(c.student_lr), create(c.critic_lr) if needs(stages, "dmd") else None)


def create_initial_state(
    config: ConfigDict, networks: Networks, optimizers: Optimizers, teacher: Params | None
) -> TrainState:
    """Iteration 0, traceable: every network a copy of the teacher and of what it adds, or a student at random."""
    student, fake = (
        first_params(network, jax.random.key(config.seed), teacher, rank)
        for network, rank in (
            (networks.student, config.model.lora_rank),
            (networks.fake, config.model.critic_lora_rank),
        )
    )
    return create_state(student, teacher, *optimizers, fake=fake)


def first_params(network: Network, key: jax.Array, teacher: Params | None, lora_rank: int) -> Params:
    """What a network learns: all of its parameters, a teacher's values where it has them, or only what it adds."""
    params = network.init(key)
    if teacher is None:
        return params
    return adapters.without(params, teacher) if lora_rank else overlay(params, teacher)


def abstract_state(config: ConfigDict, networks: Networks, optimizers: Optimizers, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every leaf of the run's state; allocates nothing."""
    distils = needs(parse_stages(config.stages), *FROM_TEACHER)
    teacher = networks.teacher.abstract_params() if distils else None
    init = functools.partial(create_initial_state, config, networks, optimizers)
    shapes = jax.eval_shape(init, teacher)
    place = sharding.tree_shardings(shapes, mesh)
    place = place.replace(**{name: sharding.in_host_memory(getattr(place, name)) for name in host_parts(config)})
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, place)


def host_parts(config: ConfigDict) -> list[str]:
    """The parts of the state that lie in the host's memory."""
    return [name for name in config.host_memory.split(",") if name]


def bring(state: TrainState, host: Sequence[str]) -> TrainState:
    """The state to compute with: on the device, but for a teacher's blocks, which come one by one as they are used."""

    def move(part: str, path: Any, leaf: jax.Array) -> jax.Array:
        is_later = part == "teacher" and path[0].key == "blocks"
        return leaf if is_later else jax.device_put(leaf, jax.memory.Space.Device)

    moved = {
        part: jax.tree_util.tree_map_with_path(functools.partial(move, part), getattr(state, part)) for part in host
    }
    return state.replace(**moved)


def init_state(config: ConfigDict, networks: Networks, optimizers: Optimizers, mesh: Mesh) -> TrainState:
    """Iteration 0 on the mesh. Raises UserError if the run distils and names no teacher."""
    teacher = None
    if needs(parse_stages(config.stages), *FROM_TEACHER):
        if not config.teacher.path:
            raise UserError("teacher.path is empty: give the checkpoint of the model to distil")
        teacher = sharding.place_params(load_params(config.teacher.path, networks.teacher), mesh)
    abstract = abstract_state(config, networks, optimizers, mesh)
    init = functools.partial(create_initial_state, config, networks, optimizers)
    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(teacher)


def make_recipe(config: ConfigDict, latent_shape: tuple[int, ...]) -> Recipe:
    """The numbers of a step. Without loss.scm_weight it follows from the latent's size.

    sCM's gradient has length at most 1 for any size, DMD's grows as its square root.
    """
    c = config.loss
    scm_weight = c.scm_weight
    if scm_weight is None:
        scm_weight = 100.0 * float(np.sqrt(np.prod(latent_shape) / OFFICIAL_ELEMENTS))
    return Recipe(
        guidance=config.teacher.guidance,
        scm_weight=scm_weight,
        dmd_weight=c.dmd_weight,
        gan_weight=c.gan_weight,
        gan_critic_weight=c.gan_critic_weight,
        tangent=c.tangent,
        tangent_step=c.tangent_step,
        mean_flow_share=c.mean_flow_share,
        mean_flow_power=c.mean_flow_power,
        simulation_steps=c.simulation_steps,
        simulation_times=tuple(c.simulation_times),
        p_G_mean=c.p_G_mean,
        p_G_std=c.p_G_std,
        p_D_shift=c.p_D_shift,
        rf_range=tuple(c.rf_range),
        dcm_steps=c.dcm_steps,
        dcm_shift=c.dcm_shift,
        caption_dropout=config.teacher.caption_dropout,
        ema_gamma=ema_exponent(config.ema.sigma_rel),
        accumulate=config.data.accumulate,
    )


# The jitted step of a phase, and what it takes behind a state and a batch; it returns the new state and its metrics.
StepOf = Callable[[Phase], tuple[Any, tuple[Any, ...]]]


def jit_steps(
    config: ConfigDict,
    networks: Networks,
    optimizers: Optimizers,
    latent_shape: tuple[int, ...],
    negative: jax.Array | jax.ShapeDtypeStruct,
    shardings: TrainState,
) -> StepOf:
    """The two steps of a run; each compiles when its phase first comes. The state is donated."""
    recipe, host = make_recipe(config, latent_shape), host_parts(config)

    # The seed is an argument, so that runs that differ in it alone share one compilation.
    def key(state: TrainState, seed: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), state.iteration)

    def student(state, batch, seed, tangent_ratio, negative, losses):
        new, metrics = student_step(
            bring(state, host),
            batch,
            key(state, seed),
            tangent_ratio,
            loss_names=losses,
            apply=networks.applies,
            optimizer=optimizers.student,
            recipe=recipe,
            negative_text=negative,
        )
        return new.replace(teacher=state.teacher), metrics

    def critic(state, batch, seed, losses):
        new, metrics = critic_step(
            bring(state, host),
            batch,
            key(state, seed),
            loss_names=losses,
            apply=networks.applies,
            optimizer=optimizers.critic,
            recipe=recipe,
        )
        return new.replace(teacher=state.teacher, ema=state.ema), metrics

    seed = np.uint32(config.seed)
    options = sharding.compiler_options(shardings.iteration.mesh)
    jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
    student, critic = jit(student, static_argnums=5), jit(critic, static_argnums=3)

    def step_of(phase: Phase) -> tuple[Any, tuple[Any, ...]]:
        if phase.update == "critic":
            return critic, (seed, phase.losses)
        return student, (seed, np.float32(phase.tangent_ratio), negative, phase.losses)

    return step_of


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """This process' rows of a batch of `batch_size` as global arrays; texts stay behind."""
    place = sharding.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(place, batch[name], (batch_size, *batch[name].shape[1:]))
        for name in ("latent", "text", "fault")
    }


def to_floats(window: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The metrics of several iterations, fetched; what is a float already stays."""
    return [{name: float(value) for name, value in metrics.items()} for metrics in jax.device_get(window)]


def window_means(window: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the iterations that have it; a running count keeps its last value."""
    names = dict.fromkeys(name for metrics in window for name in metrics)
    values = {name: [metrics[name] for metrics in window if name in metrics] for name in names}
    counts = {name for name in values if name == "skipped" or name.startswith("bad_data/")}
    return {name: series[-1] if name in counts else float(np.mean(series)) for name, series in values.items()}


def check_show(config: ConfigDict) -> None:
    """Raises UserError for a run that is to show videos of data that cannot be decoded."""
    if config.log.sample_every and config.data.name not in digits.VARIANTS:
        raise UserError(
            f"log.sample_every={config.log.sample_every} needs a decoder of {config.data.name!r}: set it to 0"
        )


# A student's parameters to captions and their videos (T, H, W, C), uint8.
Show = Callable[[Params], Iterable[tuple[str, np.ndarray]]]


def create_show(config: ConfigDict, network: Network, source: pipeline.Source, first: dict[str, Any]) -> Show:
    """What a run shows of itself: videos for the captions of the first `log.samples` sound records of digits."""
    variant = digits.VARIANTS[config.data.name]
    records = pipeline.read_tolerantly(source, range(min(pipeline.TRIED_FIRST, len(source))), first)
    chosen = np.flatnonzero(records["fault"] == 0)[: config.log.samples]
    steps = min(sampling.MAX_STEPS, len(config.sampling.mid_times) + 1)
    sample = student_sampler(config, network, first["latent"].shape, steps=steps)

    def show(params: Params) -> Iterable[tuple[str, np.ndarray]]:
        latents = on_host(sample(params, jnp.asarray(records["text"][chosen]), jnp.asarray(chosen)))
        return zip(map(str, records["prompt"][chosen]), digits.latent_to_video(latents, variant), strict=True)

    return show


def export(config: ConfigDict, state: TrainState, workdir: Path, progresses: Callable[[], None]) -> None:
    """Writes student.safetensors and ema.safetensors, float32, by Wan's tensor names; `progresses` before each.

    They are whole; what a LoRA adds also goes to student_lora.safetensors and ema_lora.safetensors.
    """
    metadata = {"model": config.model.preset, "stages": config.stages, "iteration": str(int(state.iteration))}
    for name, params in (("student", state.student), ("ema", state.ema)):
        progresses()
        params = jax.tree.map(on_host, overlay(state.teacher, params))
        tensors = wan_tensors(adapters.merge(params), PRESETS[config.model.preset])
        export_safetensors(workdir / f"{name}.safetensors", tensors, metadata | {"parameters": name})
        if config.model.lora_rank:
            lora = adapters.lora_tensors(params, WAN)
            export_safetensors(workdir / f"{name}_lora.safetensors", lora, metadata | {"parameters": name})
