"""An Orbax checkpoint is what was saved, or it is refused: by the seal, by shapes and dtypes, by the fingerprints."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import tensorstore

from rcm_jax import integrity
from rcm_jax.checkpoint import Checkpoints
from rcm_jax.config import UserError
from rcm_jax.convert import families, writing
from rcm_jax.convert.conversion import convert
from rcm_jax.convert.sources import open_source
from rcm_jax.convert.tensors import BFLOAT16
from rcm_jax.models.presets import PRESETS, create_network
from rcm_jax.models.wan import WanConfig
from rcm_jax.train import load_params

MODEL = "wan2.1-t2v-small"
CONFIG = WanConfig(dim=24, ffn_dim=32, heads=1, layers=2, in_channels=4, out_channels=4, text_dim=6)


@pytest.fixture(autouse=True)
def preset(monkeypatch):
    monkeypatch.setitem(PRESETS, MODEL, CONFIG)


@pytest.fixture
def folder(tmp_path):
    """A network as start.safetensors and, converted from it, as the checkpoint our/0."""
    rng = np.random.default_rng(0)
    shapes = families.tensor_shapes(families.WAN, CONFIG)
    arrays = {f"net.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "start.safetensors")
    convert(tmp_path / "start.safetensors", tmp_path / "our", model=MODEL, to="orbax")
    return tmp_path


def back(folder: Path) -> Path:
    convert(folder / "our", folder / "back.safetensors", model=MODEL, to="rcm")
    return folder / "back.safetensors"


def rewrite(path: Path, change):
    """As a failing disk does: the file's time remains."""
    times = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


CHUNK = "0/state/params/blocks/ffn/up/kernel/1.0.0"
DAMAGES = {
    "missing": lambda folder: (folder / CHUNK).unlink(),
    "one bit": lambda folder: rewrite(folder / CHUNK, flip),
    "cut": lambda folder: rewrite(folder / CHUNK, lambda data: data[:-1]),
    "swapped": lambda folder: shutil.copy((folder / CHUNK).with_name("0.0.0"), folder / CHUNK),
    "shape": lambda folder: rewrite((folder / CHUNK).with_name(".zarray"), lambda data: data.replace(b"2,", b"3,", 1)),
    "dtype": lambda folder: rewrite((folder / CHUNK).with_name(".zarray"), lambda data: data.replace(b"<f4", b"<i4")),
    "no array": lambda folder: shutil.rmtree((folder / CHUNK).parent),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_read_by_nobody(damage, folder):
    """What misses would be zeros, by the rules of zarr."""
    DAMAGES[damage](folder / "our")
    message = rf"{folder}/our/0/state has an array params/blocks/ffn/up/kernel that is not what was saved, .*: restore"
    with pytest.raises(UserError, match=message):
        back(folder)
    assert not (folder / "back.safetensors").exists()
    with pytest.raises(UserError, match=message):
        load_params(folder / "our", create_network(CONFIG))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts | {"fingerprints": {}}, "description is not the one that was written: restore it"),
        (lambda facts: integrity.seal({"leaves": facts["leaves"]}), "is no complete checkpoint"),
        (lambda facts: list(facts), "is no complete checkpoint"),
    ],
)
def test_another_description_is_refused(change, message, folder):
    rewrite(folder / "our/0/description/metadata", lambda data: json.dumps(change(json.loads(data))).encode())
    with pytest.raises(UserError, match=message):
        open_source(folder / "our")


def test_a_runs_checkpoint_with_a_changed_element_is_refused(tmp_path):
    params = jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape), create_network(CONFIG).abstract_params())
    checkpoints = Checkpoints(tmp_path / "our", keep=1, every=1)
    checkpoints.save(3, {"student": params}, None)
    checkpoints.close()
    leaf = open_source(tmp_path / "our").leaves["blocks.norm3.scale"]
    tensorstore.open({"driver": "zarr", "kvstore": dict(leaf.store)}).result()[1, 5].write(2).result()
    with pytest.raises(UserError, match=r"our/3/state has an array student/blocks/norm3/scale that is not what was"):
        back(tmp_path)


def test_what_an_interrupted_run_had_read_is_checked_as_well(folder, monkeypatch, capsys):
    """The first run has written one damaged layer of two before it finds the damage; the second reads the other."""
    monkeypatch.setattr(writing, "SYNC_BYTES", 1)
    shutil.copytree(folder / "our", folder / "copy")
    rewrite((folder / "our" / CHUNK).with_name("0.0.0"), flip)
    for _ in range(2):
        with pytest.raises(UserError, match="is not what was saved"):
            back(folder)
        assert not (folder / "back.safetensors").exists()
    shutil.rmtree(folder / "our")
    shutil.copytree(folder / "copy", folder / "our")  # with the times that the files had
    found = safetensors.numpy.load_file(back(folder))
    assert "went on" not in capsys.readouterr().out
    expected = safetensors.numpy.load_file(folder / "start.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_fingerprint_of_a_stacked_array_is_that_of_its_layers_in_slabs(monkeypatch):
    monkeypatch.setattr(integrity, "SLAB", 10)
    for dtype in (np.float32, BFLOAT16):
        array = np.random.default_rng(0).standard_normal((3, 7, 4)).astype(dtype)
        whole = integrity.fingerprints({"x": jax.numpy.asarray(array), "y": jax.numpy.asarray(array[0, :, 0])})
        assert integrity.join_lanes(integrity.part_lanes(layer, n) for n, layer in enumerate(array)) == whole["x"]
        assert integrity.join_lanes([integrity.part_lanes(array[0, :, 0], None)]) == whole["y"]


@pytest.mark.parametrize("layers", [(), (3,)])
def test_a_number_has_a_fingerprint(layers):
    array = np.random.default_rng(0).standard_normal(layers, np.float32)
    parts = [(array, None)] if not layers else [(layer, n) for n, layer in enumerate(array)]
    lanes = [integrity.part_lanes(np.asarray(part), layer) for part, layer in parts]
    assert integrity.join_lanes(lanes) == integrity.fingerprints({"x": jax.numpy.asarray(array)})["x"]
