"""Whole runs on a few moving digits: what they write, and that a run broken off and resumed is the run undisturbed."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_rcm
from rcm_jax import sharding
from rcm_jax import train as training
from rcm_jax.checkpoint import export_safetensors, load_safetensors
from rcm_jax.config import UserError, validate
from rcm_jax.convert.wan import wan_tensors
from rcm_jax.data import digits
from rcm_jax.models.functional import Network
from rcm_jax.models.wan import PRESETS, WanConfig
from rcm_jax.schedule import Phase
from rcm_jax.train import Networks, create_network, load_params, train

TINY = WanConfig(
    dim=48, ffn_dim=96, heads=2, layers=2, patch=(4, 8, 8), in_channels=1, out_channels=1, text_dim=32, text_length=8
)
TOTAL = 6
DEVICE = jax.devices()[0].default_memory().kind
# The rCM run has every kind of update: sCM alone, then student and critic in turn.
RUNS = {"flow_matching": f"flow_matching:{TOTAL}", "rcm": f"rcm:{TOTAL}"}


def stub_apply(params, x_BTHWC, time_B, text_BSD, *, mode="reverse"):
    """Stands for Wan where three programs are compiled: depends on all that a network depends on."""
    del mode
    first, second = params["head"]["modulation"].reshape(2, 1, 1, 1, 16, 1)
    shift_B = time_B / 1000 + text_BSD.mean((1, 2)) + params["head"]["head"]["kernel"].mean()
    return jnp.sin(first * x_BTHWC + shift_B.reshape(-1, 1, 1, 1, 1)) * second


def init_stub(key):
    return {
        "head": {"modulation": jax.random.normal(key, (2, 16)), "head": {"kernel": jax.random.normal(key, (48, 4))}}
    }


STUB = Network(init=init_stub, apply=stub_apply)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds 64 videos and a teacher; while this module runs, rCM uses the stub and the rest a tiny Wan."""
    folder = tmp_path_factory.mktemp("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setattr(
            training,
            "create_network",
            lambda config, mesh=None, **extras: STUB if "rcm" in config.stages else create_network(config, **extras),
        )
        patch.setattr(digits, "build", functools.partial(digits.build, limit=2))
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is nearly all that these runs do
        export_safetensors(folder / "teacher.safetensors", wan_tensors(STUB.init(jax.random.key(1)), TINY), {})
        yield folder
        jax.config.update("jax_disable_most_optimizations", False)


def configure(folder, run):
    config = digits_rcm.get_config()
    config.stages = RUNS.get(run, run)
    config.model.preset = "tiny"
    config.teacher.path = str(folder / "teacher.safetensors")
    config.data.update({"dir": str(folder / "data"), "batch_size": 8})
    config.loss.update({"tangent_warmup": 1, "simulation_steps": 2})
    config.optimizer.warmup = 2
    config.mesh.fsdp = 2 if run == "flow_matching" else 1
    config.checkpoint.every = 3
    config.log.update({"every": 1, "sample_every": 0})
    validate(config)
    return config


def run(folder, name, workdir, *, stop_at=None, **changes):
    """Trains; with `stop_at`, breaks off before that iteration, once the last checkpoint is complete."""
    iterations, phase_at = [], training.phase_at

    def phase(stages, iteration, **settings):
        if iteration == stop_at:
            deadline = time.monotonic() + 60
            while not (workdir / "checkpoints" / "3").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            raise KeyboardInterrupt
        iterations.append(iteration)
        return phase_at(stages, iteration, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "phase_at", phase)
        config = configure(folder, name)
        config.update_from_flattened_dict(changes)
        state = train(config, workdir)
    return state, iterations


@pytest.fixture(scope="module", params=RUNS)
def undisturbed(request, folder):
    """(name, work directory, last state) of a run from beginning to end."""
    workdir = folder / f"{request.param}_undisturbed"
    state, iterations = run(folder, request.param, workdir)
    assert iterations == list(range(TOTAL))
    return request.param, workdir, jax.device_get(state)


def read_log(workdir):
    """The records of metrics.jsonl without what the clock says."""
    clock = ("time", "seconds_per_step", "tokens_per_second")
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


# The log of the broken run stays open, as a killed process leaves it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_resumed_run_is_the_undisturbed_run_bit_by_bit(undisturbed, folder):
    """Broken off after five iterations, resumed from the checkpoint at three: two are run, and logged, again."""
    name, workdir, state = undisturbed
    broken = folder / f"{name}_broken"
    with pytest.raises(KeyboardInterrupt):
        run(folder, name, broken, stop_at=5)
    assert [record["iteration"] for record in read_log(broken)] == [1, 2, 3, 4, 5]
    resumed, iterations = run(folder, name, broken)
    assert iterations == [3, 4, 5]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), state)
    assert read_log(broken) == read_log(workdir)
    for exported in ("student.safetensors", "ema.safetensors"):
        (ours, facts), (theirs, same_facts) = (load_safetensors(path / exported) for path in (broken, workdir))
        assert facts == same_facts
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("undisturbed", ["flow_matching"], indirect=True)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_resumed_run_logs_means_over_what_ran_before_it_was_broken_off(undisturbed, folder):
    """Lines after 2, 4 and 6 iterations, a checkpoint after 3."""
    name, workdir, _ = undisturbed
    every_one, broken, every = read_log(workdir), folder / "logged_broken", {"log.every": 2}
    with pytest.raises(KeyboardInterrupt):
        run(folder, name, broken, stop_at=5, **every)
    run(folder, name, broken, **every, **{"checkpoint.keep": 5})
    assert json.loads((broken / "run.json").read_text())["changes"] == [{"iteration": 3, "checkpoint.keep": [2, 5]}]
    pairs = zip(every_one[::2], every_one[1::2], strict=True)
    means = [{key: float(np.mean([first[key], second[key]])) for key in second} for first, second in pairs]
    assert read_log(broken) == [means | {"iteration": 2 * n} for n, means in enumerate(means, 1)]


def test_a_folder_of_another_run_is_not_written_to(undisturbed, folder):
    """Other losses up to where it stands, or weights without the checkpoint they came from."""
    name, workdir, _ = undisturbed
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    config = configure(folder, name)
    config.stages = {"flow_matching": "sct:8", "rcm": "rcm:3,scm:5"}[name]
    with pytest.raises(UserError, match=rf"was trained with stages={RUNS[name]} up to iteration 6, and stages="):
        train(config, workdir)
    assert all(path.read_bytes() == content for path, content in files.items() if path.name != ".lock")
    checkpoints = (workdir / "checkpoints").rename(workdir / "elsewhere")
    with pytest.raises(UserError, match=r"student\.safetensors is of another run, which left no checkpoint"):
        train(configure(folder, name), workdir)
    checkpoints.rename(workdir / "checkpoints")


@pytest.mark.parametrize("undisturbed", ["rcm"], indirect=True)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_networks_in_the_hosts_memory_change_no_bit_and_come_back_there(undisturbed, folder):
    """The same run with teacher and EMA there, broken off and resumed."""
    name, _, expected = undisturbed
    workdir, there = folder / "on_host", {"host_memory": "teacher,ema"}
    with pytest.raises(KeyboardInterrupt):
        run(folder, name, workdir, stop_at=5, **there)
    state, _ = run(folder, name, workdir, **there)
    for part, kind in {"teacher": "pinned_host", "ema": "pinned_host", "student": DEVICE, "fake": DEVICE}.items():
        head = getattr(state, part)["head"]
        assert head["head"]["kernel"].sharding.memory_kind == kind, part
        assert head["modulation"].sharding.memory_kind == DEVICE, part
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)


def test_every_update_is_logged_with_finite_metrics(undisturbed):
    name, workdir, state = undisturbed
    records = read_log(workdir)
    assert [record["iteration"] for record in records] == list(range(1, TOTAL + 1))
    assert all(np.isfinite(list(record.values())).all() for record in records)
    assert {record["skipped"] for record in records} == {0.0}
    losses = [sorted(key.removeprefix("loss_") for key in record if key.startswith("loss_")) for record in records]
    both, critic = ["dmd", "scm"], ["critic"]
    expected = {"flow_matching": [["flow_matching"]] * TOTAL, "rcm": [["scm"], both, critic, both, critic, both]}
    assert losses == expected[name]
    counters = (state.iteration, state.student_updates, state.critic_updates)
    assert counters == {"flow_matching": (6, 6, 0), "rcm": (6, 4, 2)}[name]
    assert json.loads((workdir / "run.json").read_text())["config"]["stages"] == RUNS[name]


def test_the_exported_weights_are_the_states(undisturbed, folder):
    name, workdir, state = undisturbed
    network = training.create_network(configure(folder, name))
    for parameters in ("student", "ema"):
        path = workdir / f"{parameters}.safetensors"
        jax.tree.map(np.testing.assert_array_equal, load_params(path, network), getattr(state, parameters))
        _, metadata = load_safetensors(path)
        assert metadata == {"model": "tiny", "stages": RUNS[name], "iteration": "6", "parameters": parameters}
    assert (workdir / "student.safetensors").read_bytes() != (workdir / "ema.safetensors").read_bytes()


def test_a_distilled_student_starts_from_its_teacher_and_leaves_it_alone(undisturbed, folder):
    name, _, state = undisturbed
    if name == "flow_matching":
        assert state.teacher is None
        return
    teacher = load_params(folder / "teacher.safetensors", STUB)
    jax.tree.map(np.testing.assert_array_equal, state.teacher, teacher)
    distance = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.student, teacher)
    assert 0 < max(jax.tree.leaves(distance)) < 1e-2  # six steps of at most 2e-4


def test_a_finished_run_starts_no_iteration_again(undisturbed, folder):
    name, workdir, state = undisturbed
    log = (workdir / "metrics.jsonl").read_bytes()
    again, iterations = run(folder, name, workdir)
    assert iterations == []
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), state)
    assert (workdir / "metrics.jsonl").read_bytes() == log


def test_samples_are_recorded_as_videos_of_the_captions_of_sound_records(folder, monkeypatch):
    workdir, config = folder / "samples", configure(folder, "rcm:1")
    config.log.update({"sample_every": 1, "samples": 2})
    damaged = training.pipeline.open_source(config.data.name, config.data.dir, "train")
    records = [dict(damaged[index]) for index in range(len(damaged))]
    records[1]["latent"] = np.zeros((1, 2, 3, 1), np.float32)  # left out
    monkeypatch.setattr(training.pipeline, "open_source", lambda *_: records)
    config.sampling.mid_times = (1.4,)  # two steps at most
    train(config, workdir)
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert events.count(b"GIF89a") == 2
    assert b"moving" in events


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        ("rcm", {"teacher.path": ""}, r"teacher\.path is empty: give the checkpoint of the model to distil"),
        ("flow_matching", {"log.sample_every": 1, "data.name": "wan"}, r"log\.sample_every=1 needs a decoder of 'wan'"),
        ("flow_matching", {"model.preset": "wan3"}, r"model\.preset='wan3' must be one of digits, "),
        ("flow_matching", {"mesh.fsdp": 3}, r"fsdp=3, context=1, tensor=1 does not cover 8 devices: choose sizes"),
        (
            "flow_matching",
            {"data.batch_size": 12},
            r"data\.batch_size=12 must be a multiple of mesh\.data \* mesh\.fsdp = 8: set it to 16",
        ),
        (
            "flow_matching",
            {"data.batch_size": 24, "data.accumulate": 6},
            r"data\.batch_size=24 must be a multiple of .* = 6 \* 8, .*: set data\.accumulate=3",
        ),
        (
            "flow_matching",
            {"model.preset": "wan2.1-t2v-1.3b"},
            r"latents of \(8, 16, 16, 1\) do not fit model.preset='wan",
        ),
        ("rcm", {"teacher.path": "absent.safetensors"}, r"absent\.safetensors is not a file"),
        ("flow_matching", {"teacher.negative_path": "absent.safetensors"}, r"absent\.safetensors is not a file"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(run, changes, message, folder, tmp_path):
    config = configure(folder, run)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_negative_prompt_of_another_shape_is_an_error(folder, tmp_path):
    config = configure(folder, "rcm")
    config.teacher.negative_path = str(tmp_path / "negative.safetensors")
    export_safetensors(config.teacher.negative_path, {"text": np.ones((4, 32), np.float32)}, {})
    with pytest.raises(UserError, match=r"must hold one array `text` of shape \(8, 32\)"):
        training.negative_text(config, (8, 32))
    found = training.negative_text(config, (4, 32))
    np.testing.assert_array_equal(found, np.ones((4, 32)))


def test_an_update_draws_anew_for_every_iteration_and_seed_and_follows_the_warm_up(folder):
    config = configure(folder, "rcm")
    mesh, optimizers, networks = sharding.make_mesh(), training.create_optimizers(config), Networks(STUB, STUB, STUB)
    place = jax.tree.map(lambda leaf: leaf.sharding, training.abstract_state(config, networks, optimizers, mesh))
    batch = {"latent": np.ones((8, 8, 16, 16, 1), np.float32), "text": np.ones((8, 8, 32), np.float32)}
    batch["fault"] = np.zeros(8, np.int32)

    def loss(*, seed=0, iteration=0, ratio=0.5):
        config.seed = seed
        step_of = training.jit_steps(config, networks, optimizers, (8, 16, 16, 1), jnp.zeros((8, 32)), place)
        state = training.init_state(config, networks, optimizers, mesh)
        state = state.replace(iteration=jax.device_put(np.int32(iteration), place.iteration))
        step, arguments = step_of(Phase("student", frozenset({"scm"}), ratio))
        return float(step(state, training.to_mesh(batch, mesh, 8), *arguments)[1]["loss"])

    losses = [loss(), loss(iteration=1), loss(seed=1), loss(ratio=1.0)]
    assert len(set(losses)) == 4
    assert loss() == losses[0]


def test_the_weight_of_scm_follows_from_the_size_of_a_latent(folder):
    """100 at the official 16 x 21 x 60 x 104; at a quarter of the elements, half as much."""
    config = configure(folder, "rcm")
    config.loss.scm_weight = None
    assert training.make_recipe(config, (21, 60, 104, 16)).scm_weight == pytest.approx(100.0)
    assert training.make_recipe(config, (21, 30, 52, 16)).scm_weight == pytest.approx(50.0)
    config.loss.scm_weight = 3.0
    assert training.make_recipe(config, (21, 60, 104, 16)).scm_weight == 3.0


def test_a_window_averages_what_it_has():
    window = [{"loss": 1.0, "skipped": 0}, {"loss_critic": 4.0, "skipped": 1}, {"loss": 2.0, "skipped": 1}]
    assert training.window_means(window) == {"loss": 1.5, "loss_critic": 4.0, "skipped": 1.0}
