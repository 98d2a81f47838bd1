"""What the training steps of a recipe need on given devices, which need not be there: compiled, never run."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rcm_jax import sharding, train
from rcm_jax.chips import GPU_SHARE, JAX_GPU_SHARE, Chip, chip_of
from rcm_jax.config import UserError, parse_stages
from rcm_jax.costs import pass_operations, received_bytes, step_operations
from rcm_jax.models.wan import PRESETS
from rcm_jax.schedule import Phase, phase_at, total_iterations

GIB = 2**30
PROGRESS_SECONDS = 30


def count_phases(config: ConfigDict) -> Counter[Phase]:
    """The kinds of update that a run makes, and how many of each; the warm-up of the tangent is as any other."""
    stages = parse_stages(config.stages)
    freq = {key: config.loss[key] for key in ("tangent_warmup", "student_update_freq")}
    phases = (phase_at(stages, iteration, **freq) for iteration in range(total_iterations(stages)))
    return Counter(dataclasses.replace(phase, tangent_ratio=1.0) for phase in phases)


def lower_step(config: ConfigDict, mesh: Mesh, latent_shape: tuple[int, ...], phase: Phase) -> Any:
    """The step of a phase as `launch.train` would compile it on the mesh, from shapes alone."""
    networks, optimizers = train.create_networks(config, mesh), train.create_optimizers(config)
    preset, rows = PRESETS[config.model.preset], config.data.batch_size
    state = train.abstract_state(config, networks, optimizers, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    text_shape = preset.text_length, preset.text_dim
    shapes = {"latent": (latent_shape, jnp.float32), "text": (text_shape, jnp.float32), "fault": ((), jnp.int32)}
    place = sharding.batch_sharding(mesh)
    batch = {key: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place) for key, (shape, dtype) in shapes.items()}
    negative = jax.ShapeDtypeStruct(text_shape, jnp.float32, sharding=sharding.replicated(mesh))
    step, arguments = train.jit_steps(config, networks, optimizers, latent_shape, negative, shardings)(phase)
    with jax.default_device(mesh.devices.flat[0]):  # by which attention chooses its kernels
        return step.lower(state, batch, *arguments)


def compile_steps(
    config: ConfigDict, devices: Sequence[Any], latent_size: Sequence[int], progress: Callable[[float], None]
) -> Iterator[dict[str, Any]]:
    """Compiles each kind of step of a run, all at once; yields what `measure` says of it as soon as it is known.

    `latent_size` is (T, H, W). `progress` is called with the seconds since the start, now and then.

    Raises UserError, before anything is compiled, for a config that does not fit the devices or the video, and for
    devices or losses whose rates or costs are not known.
    """
    chip, mesh = chip_of(devices[0]), sharding.make_mesh(**config.mesh, devices=devices)
    train.check_batch_size(config, mesh)
    check_host_memory(config, mesh)
    preset = train.get_preset(config.model.preset)
    latent_shape = (*latent_size, preset.in_channels)
    train.check_shapes(config.model.preset, latent_shape, (preset.text_length, preset.text_dim))
    phases, recipe = count_phases(config), train.make_recipe(config, latent_shape)
    for phase in phases:
        step_operations(pass_operations(preset, preset.tokens(latent_shape)), phase, recipe)
    start = time.monotonic()
    with ThreadPoolExecutor(len(phases)) as pool:
        pending = {pool.submit(lower_step(config, mesh, latent_shape, phase).compile): phase for phase in phases}
        while pending:
            for done in wait(pending, timeout=PROGRESS_SECONDS, return_when=FIRST_COMPLETED).done:
                phase = pending.pop(done)
                row = {"step": name_of(phase), "iterations": phases[phase]}
                row["compile_seconds"] = round(time.monotonic() - start)
                try:
                    yield row | measure(config, mesh, latent_shape, phase, chip, done.result())
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    yield row | {"fits": False, "reason": str(error).partition("\n")[0]}
            progress(time.monotonic() - start)


def check_host_memory(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError for a config that uses the host's memory, if JAX sees none, as of GPUs that are not there.

    It would put everything into the memory of the devices without a word.
    """
    if sharding.replicated(mesh).with_memory_kind("pinned_host").memory_kind:
        return
    offload = config.model.remat if config.model.remat == "offload" else ""
    for key, value in {"host_memory": config.host_memory, "model.remat": offload}.items():
        if value:
            raise UserError(
                f"{key}={value} needs the memory of hosts, which JAX does not see of GPUs that are "
                "not there: leave it out, which takes more memory, or compile where GPUs are, without --topology"
            )


def name_of(phase: Phase) -> str:
    """ "critic", or "student" and its losses."""
    return "critic" if phase.update == "critic" else f"student, {'+'.join(sorted(phase.losses))}"


def measure(
    config: ConfigDict, mesh: Mesh, latent_shape: tuple[int, ...], phase: Phase, chip: Chip, compiled: Any
) -> dict[str, Any]:
    """Memory of a device in GiB, TFLOP it carries out, GB it receives, and the least seconds each of these can take."""
    analysis = compiled.memory_analysis()
    memory = {
        "arguments": analysis.argument_size_in_bytes / GIB,
        "temporaries": analysis.temp_size_in_bytes / GIB,
        "results": (analysis.output_size_in_bytes - analysis.alias_size_in_bytes) / GIB,
        "program": analysis.generated_code_size_in_bytes / GIB,
    }
    memory["total"] = sum(memory.values())
    preset, recipe = PRESETS[config.model.preset], train.make_recipe(config, latent_shape)
    one = pass_operations(preset, preset.tokens(latent_shape))
    rows = config.data.batch_size / mesh.size
    tflop = rows * step_operations(one, phase, recipe, config.model.remat)
    received = received_bytes(compiled.as_text(), dynamic_trips=(recipe.simulation_steps - 1) / 2)
    seconds = {
        "compute": tflop / chip.flops,
        # Arguments are read, results written, temporaries both.
        "memory": (2 * (memory["arguments"] + memory["temporaries"])) * GIB / 1e9 / chip.bandwidth,
        "links": sum(received.values()) / 1e9 / chip.links,
    }
    return {
        "fits": memory["total"] <= chip.memory,
        "memory": memory,
        "tflop": tflop,
        "model_tflop": rows * step_operations(one, phase, recipe),
        "received_gb": {kind: amount / 1e9 for kind, amount in received.items()},
        "seconds": seconds | {"least": max(seconds.values())},
    }


def gpu_notes(rows: Sequence[dict[str, Any]], devices: Sequence[Any]) -> Iterator[str]:
    """What to know beside what `compile_steps` yielded, where the devices are GPUs."""
    if devices[0].platform != "gpu":
        return
    if len({device.process_index for device in devices}) > 1:
        yield "received bytes count at the rate within a host; between hosts they take longer"
    usual = chip_of(devices[0]).memory / GPU_SHARE * JAX_GPU_SHARE
    if all(row["fits"] for row in rows) and max(row["memory"]["total"] for row in rows) > usual:
        yield f"set XLA_CLIENT_MEM_FRACTION={GPU_SHARE}: by default JAX takes {usual:.1f} GiB of such a GPU"
