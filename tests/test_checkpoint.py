"""A resumed run goes on exactly as if it had not stopped, whatever the mesh, and no file is lost on the way."""

import functools
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rcm_jax import checkpoint
from rcm_jax.checkpoint import Checkpoints, export_safetensors, load_safetensors
from rcm_jax.config import UserError


@flax.struct.dataclass
class State:
    """One leaf of each kind that a run may carry."""

    iteration: jax.Array
    params: dict[str, jax.Array]
    optimizer: Any
    network: nnx.State
    key: jax.Array
    absent: None = None


def create_state(sharding: jax.sharding.Sharding | None = None) -> State:
    params = {
        "w": jnp.arange(64, dtype=jnp.float32).reshape(8, 8) / 7,
        "half": jnp.linspace(-1, 1, 8, dtype=jnp.bfloat16),
    }
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 8)
    if sharding is not None:
        params, keys = jax.device_put((params, keys), sharding)
    network = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    return State(jnp.int32(5), params, optax.adamw(1e-3).init(params), network, keys)


def abstract(state: State) -> State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def batches(records: int = 12) -> grain.DatasetIterator:
    data = grain.MapDataset.range(records).seed(0).shuffle().repeat().batch(5)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def mesh_sharding(devices: int) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("x"))


def assert_same(actual: State, expected: State):
    def check(a: jax.Array, b: jax.Array):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(check, actual, expected)


@pytest.fixture
def checkpoints(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2, every=10)
    yield checkpoints
    checkpoints.close()


def reopened(checkpoints: Checkpoints) -> Checkpoints:
    checkpoints.wait()
    return Checkpoints(checkpoints.directory, keep=2, every=10)


def test_a_resumed_run_has_the_same_state_and_sees_the_same_batches(checkpoints: Checkpoints):
    state, data = create_state(), batches()
    for _ in range(7):
        next(data)
    checkpoints.save(10, state, data)
    expected = [next(data) for _ in range(9)]

    resumed = batches()
    iteration, restored = reopened(checkpoints).restore(abstract(state), resumed)

    assert iteration == 10
    assert_same(restored, state)
    np.testing.assert_array_equal([next(resumed) for _ in range(9)], expected)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 8), (8, 1), (8, 2)])
def test_a_checkpoint_is_restored_onto_another_mesh(checkpoints: Checkpoints, saved_on: int, restored_on: int):
    checkpoints.save(10, create_state(mesh_sharding(saved_on)), None)
    wanted = create_state(mesh_sharding(restored_on))

    _, restored = reopened(checkpoints).restore(abstract(wanted), None)

    assert_same(restored, wanted)
    for name in ("w", "half"):
        assert restored.params[name].sharding == wanted.params[name].sharding
        assert len(restored.params[name].addressable_shards) == restored_on
    assert restored.key.sharding.device_set == wanted.key.sharding.device_set


def test_a_leaf_without_a_sharding_goes_to_the_first_device(checkpoints: Checkpoints):
    state = create_state(mesh_sharding(8))
    checkpoints.save(10, state, None)
    nowhere = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    _, restored = checkpoints.restore(nowhere, None)
    assert_same(restored, state)
    assert restored.params["w"].devices() == {jax.devices()[0]}


def test_a_state_may_be_donated_while_it_is_written(checkpoints: Checkpoints):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = step({"w": jnp.zeros((1000, 4000))})
    checkpoints.save(10, state, None)
    for _ in range(3):
        state = step(state)
    _, restored = checkpoints.restore(state, None)
    np.testing.assert_array_equal(restored["w"], np.ones((1000, 4000)))
    np.testing.assert_array_equal(step(restored)["w"], np.full((1000, 4000), 2))
    np.testing.assert_array_equal(state["w"], np.full((1000, 4000), 4))


def test_saves_come_at_multiples_and_when_forced(checkpoints: Checkpoints):
    state = create_state()
    assert checkpoints.latest() is None
    assert not checkpoints.save(9, state, None)
    assert checkpoints.save(10, state, None)
    assert not checkpoints.save(10, state, None, force=True)
    assert not checkpoints.save(13, state, None)
    assert checkpoints.save(13, state, None, force=True)
    assert checkpoints.save(20, state, None)
    checkpoints.wait()
    assert checkpoints.latest() == reopened(checkpoints).latest() == 20
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["13", "20"]


@pytest.mark.parametrize(("sound", "kept"), [(None, [31]), (31, [31]), (30, [30, 31]), (29, [20, 31]), (3, [10, 31])])
def test_the_newest_checkpoint_of_a_sound_state_is_kept(tmp_path: Path, sound: int | None, kept: list[int]):
    everything = Checkpoints(tmp_path, every=10, keep=3)
    for iteration in (10, 20, 30):
        everything.save(iteration, {"w": jnp.zeros(3)}, None)
    everything.close()
    checkpoints = Checkpoints(tmp_path, every=10, keep=1)
    checkpoints.save_and_wait(31, {"w": jnp.zeros(3)}, None, sound=sound)
    assert checkpoints.iterations() == kept
    checkpoints.close()


def test_the_checkpoint_to_go_back_to_outlives_the_one_being_written(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, every=10, keep=1)
    for iteration in (10, 20):
        checkpoints.save(iteration, {"w": jnp.full(3, iteration)}, None)
    restored = checkpoints.roll_back(19, {"w": jnp.zeros(3, int)}, "the loss exploded")
    assert restored is not None
    assert restored[0] == restored[1]["w"][0] == 10
    checkpoints.close()


def test_an_unknown_metric_to_keep_the_best_by_is_said(tmp_path: Path, capfd: pytest.CaptureFixture):
    checkpoints = Checkpoints(tmp_path, every=1, keep=1, best="loss_smc")
    for iteration in (1, 2, 3):
        checkpoints.save(iteration, {"w": jnp.zeros(3)}, None, lambda: {"metrics": {"loss_scm": 1.0, "loss": 2.0}})
    checkpoints.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "no checkpoint has the metric checkpoint.best=loss_smc: known are loss, loss_scm"


def test_a_run_can_go_back_to_an_older_checkpoint_but_not_overtake_it(
    checkpoints: Checkpoints, capfd: pytest.CaptureFixture
):
    for iteration in (10, 20):
        checkpoints.save(iteration, create_state().replace(iteration=jnp.int32(iteration)), None)
    with pytest.raises(UserError, match=r"holds checkpoint 20, later than iteration=11"):
        checkpoints.save(11, create_state(), None, force=True)
    restored = checkpoints.roll_back(19, create_state(), "the loss exploded")
    assert restored is not None
    assert restored[0] == restored[1].iteration == 10
    assert "checkpoint 20 is set aside as" in capfd.readouterr().err
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["10", "20.rolled_back"]
    assert checkpoints.save(11, create_state(), None, force=True)


def test_metadata_comes_back(checkpoints: Checkpoints):
    checkpoints.save(10, create_state(), None, lambda: {"preset": "digits", "losses": ["scm"]})
    assert reopened(checkpoints).metadata(10) == {"preset": "digits", "losses": ["scm"]}


@pytest.mark.parametrize(
    ("change", "leaf", "saved", "wanted"),
    [
        ({"iteration": jnp.float32(0)}, "iteration", "int32[]", "float32[]"),
        ({"absent": jnp.zeros(3)}, "absent", "absent", "float32[3]"),
        ({"network": nnx.State({})}, "network/bias/value", "float32[3]", "absent"),
        (
            {"params": {"w": jnp.zeros((8, 9)), "half": jnp.zeros(8, jnp.bfloat16)}},
            "params/w",
            "float32[8, 8]",
            "float32[8, 9]",
        ),
        ({"params": {"w": jnp.zeros((8, 8)), "half": jnp.zeros(8)}}, "params/half", "bfloat16[8]", "float32[8]"),
        ({"key": jax.random.split(jax.random.key(0), 8)}, "key", "key<rbg>[8]", "key<fry>[8]"),
    ],
)
def test_a_state_that_differs_is_refused_by_leaf(
    checkpoints: Checkpoints, change: dict[str, Any], leaf: str, saved: str, wanted: str
):
    checkpoints.save(10, create_state(), None)
    with pytest.raises(UserError) as error:
        checkpoints.restore(create_state().replace(**change), None)
    message = str(error.value)
    assert (
        f"checkpoint 10 in {checkpoints.directory} does not fit: {leaf} is {saved} there and {wanted} in this"
        in message
    )
    assert "\n" not in message


def test_where_nothing_was_saved_nothing_is_restored_and_nothing_is_made(checkpoints: Checkpoints):
    assert checkpoints.restore(create_state(), None) is None
    assert not checkpoints.directory.exists()


def test_a_position_in_the_data_is_restored_only_if_it_was_saved(checkpoints: Checkpoints):
    checkpoints.save(10, create_state(), None)
    with pytest.raises(UserError, match="holds no position in the data"):
        checkpoints.restore(create_state(), batches())


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep": 1}, [60]),
        ({"keep": 2, "keep_every": 30}, [30, 50, 60]),
        ({"keep": 1, "best": "score"}, [40, 60]),
        ({"keep": 1, "best": "unknown"}, [10, 60]),
    ],
)
def test_the_newest_the_regular_and_the_best_are_kept(tmp_path: Path, policy: dict[str, Any], kept: list[int]):
    scores = {10: 5.0, 20: float("nan"), 30: 4.0, 40: 1.0, 50: 2.0, 60: 3.0}
    checkpoints = Checkpoints(tmp_path, every=10, **policy)
    for iteration, score in scores.items():
        checkpoints.save(iteration, {"w": jnp.zeros(3)}, None, functools.partial(dict, metrics={"score": score}))
    checkpoints.wait()
    assert checkpoints.iterations() == kept
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == kept
    checkpoints.close()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": np.zeros(3)}, "leaf a of the state is of type ndarray"),
        ({"a": {"b": 3}}, "leaf a/b of the state is of type int"),
    ],
)
def test_a_state_holds_jax_arrays_alone(checkpoints: Checkpoints, state: Any, message: str):
    with pytest.raises(TypeError, match=message):
        checkpoints.save(10, state, None)


def test_metadata_that_is_not_json_is_refused_at_once(checkpoints: Checkpoints):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(10, create_state(), None, lambda: {"path": Path("x")})
    assert checkpoints.latest() is None


def test_two_leaves_of_one_path_are_refused(checkpoints: Checkpoints):
    with pytest.raises(ValueError, match="keys must not contain '/'"):
        checkpoints.save(10, {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)}, None)


def test_a_write_that_fails_is_reported_and_tried_again(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    state = create_state()
    checkpoints.save(10, state, None)
    checkpoints.wait()

    def full_disk(*args: object, **kwargs: object):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(checkpoint.os, name, full_disk)
        assert checkpoints.save(20, state, None)
        checkpoints.wait()
        assert "checkpoint 20 could not be written" in capfd.readouterr().err
        with pytest.raises(UserError, match=r"checkpoint 20 cannot be written .* continues from iteration 10"):
            checkpoints.save_and_wait(20, state, None)
        assert capfd.readouterr().err.count("checkpoint 20 could not be written") == checkpoint.ATTEMPTS
    assert checkpoints.iterations() == [10]
    assert checkpoints.save(21, state, None)  # at once, not at 30
    assert not checkpoints.save(22, state, None)
    checkpoints.wait()
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["10", "21"]


KILLED_WHILE_SAVING = """
import os, signal, sys
import jax.numpy as jnp
import orbax.checkpoint as ocp
from rcm_jax.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep=1, every=1)
checkpoints.save(1, {"w": jnp.full((8, 8), 1.0)}, None)
checkpoints.wait()
rename = os.rename
os.rename = os.replace = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(2, {"w": jnp.full((8, 8), 2.0)}, None)
checkpoints.wait()
"""


def test_a_run_killed_while_it_saves_resumes_from_its_last_complete_checkpoint(tmp_path: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name.partition(".")[0] for path in tmp_path.iterdir()) == ["1", "2"]

    checkpoints = Checkpoints(tmp_path, keep=1, every=1)
    iteration, state = checkpoints.restore({"w": jnp.zeros((8, 8))}, None)
    assert iteration == 1
    np.testing.assert_array_equal(state["w"], np.ones((8, 8)))

    checkpoints.save(2, {"w": jnp.full((8, 8), 2.0)}, None)
    checkpoints.wait()
    assert checkpoints.latest() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    checkpoints.close()


TENSORS = {
    "half": jnp.linspace(-1, 1, 6, dtype=jnp.bfloat16).reshape(2, 3),
    "scalar": np.array(3.5, np.float32),
    "transposed": np.arange(6, dtype=np.int64).reshape(2, 3).T,
    "empty": np.zeros((0, 3), np.float16),
}


def test_exported_tensors_are_read_back_exactly_by_us_and_by_others(tmp_path: Path):
    path = tmp_path / "new" / "weights.safetensors"
    export_safetensors(path, TENSORS, {"model": "digits"})
    tensors, metadata = load_safetensors(path)
    assert metadata == {"model": "digits"}
    for read in (tensors, safetensors.numpy.load_file(path)):
        assert read.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype
            np.testing.assert_array_equal(read[name], np.asarray(tensor))
    assert tensors["half"].dtype == ml_dtypes.bfloat16


def test_a_sharded_array_is_exported_whole(tmp_path: Path):
    w = jnp.arange(16.0).reshape(8, 2)
    export_safetensors(tmp_path / "w.safetensors", {"w": jax.device_put(w, mesh_sharding(8))}, {})
    np.testing.assert_array_equal(load_safetensors(tmp_path / "w.safetensors")[0]["w"], w)


def test_an_export_that_breaks_off_leaves_the_older_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "w.safetensors"
    export_safetensors(path, {"w": np.zeros(3)}, {})

    def full_disk(descriptor: int):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_safetensors(path, {"w": np.ones(3)}, {})
    np.testing.assert_array_equal(load_safetensors(path)[0]["w"], np.zeros(3))
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_replaces_an_older_file_and_others_may_read_it(tmp_path: Path):
    path = tmp_path / "w.safetensors"
    export_safetensors(path, {"w": np.zeros(3)}, {})
    export_safetensors(path, {"w": np.ones(3)}, {})
    np.testing.assert_array_equal(load_safetensors(path)[0]["w"], np.ones(3))
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kept", [0, 4, -1])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, kept: int):
    path = tmp_path / "w.safetensors"
    export_safetensors(path, {"w": np.zeros(3)}, {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        load_safetensors(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_file_that_is_not_there_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="is not a file"):
        load_safetensors(tmp_path / name)
