"""What is restored is what was saved: a checkpoint that time or an accident changed is set aside, and said so."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rcm_jax import checkpoint, integrity
from rcm_jax.checkpoint import Checkpoints
from rcm_jax.config import UserError

# Reads that TensorStore gave up complain when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def files_of_arrays(step: Path) -> list[Path]:
    return [path for path in step.rglob("*") if path.parent.name == "d"]


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def truncate(step: Path) -> None:
    for path in files_of_arrays(step):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_the_arrays(step: Path) -> None:
    for path in files_of_arrays(step):
        path.unlink()


def flip_bits(step: Path) -> None:
    """Many, since not every byte of a file is read again."""
    for path in files_of_arrays(step):
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[::50] ^= 1
        path.write_bytes(data.tobytes())


def edit_the_description(step: Path) -> None:
    path = step / "description" / "metadata"
    description = json.loads(path.read_text())
    description["position"]["next_index"] += 1
    path.write_text(json.dumps(description))


def store_again(step: Path, change) -> None:
    """Writes the arrays anew, by Orbax's rules a sound checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = change(checkpointer.restore(step / "state"))
        checkpointer.save(step / "state", arrays, force=True)


def store_as_bfloat16(step: Path) -> None:
    store_again(step, lambda arrays: jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, arrays))


def store_one_leaf_less(step: Path) -> None:
    store_again(step, lambda arrays: {name: x for name, x in arrays.items() if name != "iteration"})


DAMAGES = {
    40: (empty, "FileNotFoundError"),
    35: (truncate, ""),  # TensorStore finds it, in words that depend on where the cut falls
    30: (delete_the_arrays, ""),
    25: (flip_bits, ""),
    20: (edit_the_description, "its description is not the one that was written"),
    15: (store_as_bfloat16, "is bfloat16[2, 48], saved was float32[2, 48]"),
    10: (store_one_leaf_less, "iteration is absent, saved was int32[]"),
}


def test_a_run_goes_on_from_its_newest_sound_checkpoint(undisturbed, make_run):
    """Seven checkpoints, each damaged in another way, and one sound one, in one start."""
    run = make_run("damaged")
    shutil.copytree(undisturbed.workdir, run.workdir)
    for iteration, (damage, _) in DAMAGES.items():
        damage(run.checkpoints / str(iteration))

    output = run.finish()

    lines = [line for line in output.splitlines() if " is set aside as " in line]
    assert len(lines) == len(DAMAGES)
    for line, (iteration, (_, reason)) in zip(lines, DAMAGES.items(), strict=True):
        assert f"checkpoint {iteration} is set aside as {run.checkpoints / f'{iteration}.damaged'}: " in line
        assert reason in line
        assert (run.checkpoints / f"{iteration}.damaged").is_dir()
    assert "iter  6/40" in output
    assert "iter  5/40" not in output
    run.assert_ends_as(undisturbed)


@pytest.fixture
def state():
    keys = jax.random.split(jax.random.key(0), 3)
    return {"w": jax.random.normal(keys[0], (40, 50)), "half": jnp.ones((7, 3), jnp.bfloat16), "count": jnp.int32(7)}


@pytest.fixture
def checkpoints(tmp_path: Path, state):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3, every=1)
    checkpoints.save(1, state, None)
    checkpoints.save(2, jax.tree.map(lambda x: x + 1, state), None)
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def test_wherever_a_bit_flips_the_state_is_whole(checkpoints: Checkpoints, state, tmp_path: Path):
    """A flipped bit in any file of a checkpoint is found, or it did not matter."""
    random = np.random.default_rng(0)
    newest, pristine = checkpoints.directory / "2", tmp_path / "pristine"
    shutil.copytree(newest, pristine)
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    found = 0
    for file in [file for file in files for _ in range(4)]:
        data = bytearray((newest / file).read_bytes())
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        (newest / file).write_bytes(data)

        restored = checkpoints.restore(state, None)

        assert restored is not None
        iteration, restored = restored
        expected = jax.tree.map(lambda x, more=iteration - 1: x + more, state)
        jax.tree.map(np.testing.assert_array_equal, restored, expected)
        found += iteration == 1
        for path in checkpoints.directory.glob("2*"):
            shutil.rmtree(path)
        shutil.copytree(pristine, newest)
    assert found > len(files)


def test_where_every_checkpoint_is_damaged_a_run_does_not_start_anew(checkpoints: Checkpoints, state):
    for iteration in (1, 2):
        truncate(checkpoints.directory / str(iteration))
    for _ in range(2):
        with pytest.raises(UserError, match="holds damaged checkpoints and no sound one: use another directory"):
            checkpoints.restore(state, None)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1.damaged", "2.damaged"]


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), MemoryError(), PermissionError(13, "no")]
)
def test_devices_too_small_or_a_missing_right_are_no_damage(checkpoints: Checkpoints, state, error, monkeypatch):
    def fail(*args: object):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_read_arrays", fail)
        with pytest.raises(type(error)):
            checkpoints.restore(state, None)
    restored = checkpoints.restore(state, None)
    assert restored is not None
    assert restored[0] == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn"])
def test_every_bit_of_every_element_counts(dtype: str):
    """One changed bit, or two elements that changed places, change the fingerprint."""
    bits = np.random.default_rng(0).integers(0, 256, (3, 5, jnp.dtype(dtype).itemsize), np.uint8)
    bits = bits % 2 if dtype == "bool" else bits
    seen = set()

    def fingerprint(bits: np.ndarray) -> str:
        return integrity.fingerprints({"x": jnp.asarray(bits.copy().view(dtype)[..., 0])})["x"]

    changes = [bits, bits[::-1], bits[:, ::-1]]
    for bit in range(1 if dtype == "bool" else 8 * bits.shape[-1]):
        changed = bits.copy()
        changed[1, 2, bit // 8] ^= 1 << bit % 8
        changes.append(changed)
    seen = {fingerprint(change) for change in changes}
    assert len(seen) == len(changes)


def test_a_fingerprint_does_not_depend_on_the_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 24))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b", "a")))
    assert integrity.fingerprints({"x": spread}) == integrity.fingerprints({"x": x})
