"""A network keeps its numbers through every conversion; what does not fit is named, and nothing is written then."""

import dataclasses
import fcntl
import functools
import io
import itertools
import json
import math
import pickle
import shutil
import weakref
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from launch.convert import main
from rcm_jax import checkpoint
from rcm_jax.checkpoint import Checkpoints, load_safetensors
from rcm_jax.config import UserError
from rcm_jax.convert import conversion, families, tensors, writing
from rcm_jax.convert.conversion import convert
from rcm_jax.convert.sources import open_source
from rcm_jax.models.presets import PRESETS, create_network
from rcm_jax.models.wan import WanConfig
from rcm_jax.train import load_params

DIM, FFN, LAYERS, CHANNELS, TEXT = 128, 96, 2, 4, 12
CONFIG = WanConfig(DIM, FFN, 1, LAYERS, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT)
FORMATS = {"orbax": "our", "wan": "wan", "rcm": "rcm.pth", "diffusers": "diffusers"}
BF16 = np.dtype(ml_dtypes.bfloat16)


def published(dim=DIM, ffn=FFN, layers=LAYERS, channels=CHANNELS, text=TEXT):
    """The tensors of Wan's T2V release by name, and their shapes."""

    def linear(name, out_dim, in_dim):
        return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}

    shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,)}
    shapes |= linear("text_embedding.0", dim, text) | linear("text_embedding.2", dim, dim)
    shapes |= linear("time_embedding.0", dim, 256) | linear("time_embedding.2", dim, dim)
    shapes |= linear("time_projection.1", 6 * dim, dim)
    for block in (f"blocks.{layer}" for layer in range(layers)):
        shapes |= {f"{block}.modulation": (1, 6, dim), f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            for name in "qkvo":
                shapes |= linear(f"{attention}.{name}", dim, dim)
            shapes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
        shapes |= linear(f"{block}.ffn.0", ffn, dim) | linear(f"{block}.ffn.2", dim, ffn)
    return shapes | linear("head.head", 4 * channels, dim) | {"head.modulation": (1, 2, dim)}


def random_network(seed=0, dtype=np.float32, **sizes):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in published(**sizes).items()}


def write_wan(folder: Path, arrays, **settings) -> Path:
    """A folder as Wan's release has it, by the reference's writer."""
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(arrays, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 1} | settings))
    return folder


def read_wan(folder: Path):
    return safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def files(path: Path):
    """The content of every file below `path`."""
    every = [path, *path.rglob("*")]
    return {str(file.relative_to(path)): file.read_bytes() for file in every if file.is_file()}


@pytest.fixture(autouse=True, scope="module")
def hasty_disk():
    """Waiting for the disk takes most of the time, and no test pulls the plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing.os, "fsync", lambda descriptor: None)
        yield


def write_formats(folder: Path, dtype):
    """A random network and a folder with the four formats, each converted from Wan's."""
    arrays = random_network(dtype=dtype)
    source = write_wan(folder / "source", arrays)
    for to, name in FORMATS.items():
        convert(source, folder / name, model="wan2.1-t2v", to=to)
    return folder, arrays


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_formats(tmp_path_factory.mktemp("f32"), np.float32)


@pytest.fixture(scope="module", params=["f32", "bf16"])
def of_each_dtype(request, written, tmp_path_factory):
    return written if request.param == "f32" else write_formats(tmp_path_factory.mktemp("bf16"), BF16)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("from_", FORMATS)
def test_every_pair_of_formats_round_trips_bit_for_bit(from_, to, of_each_dtype, tmp_path, capsys):
    folder, _ = of_each_dtype
    convert(folder / FORMATS[from_], tmp_path / FORMATS[to], model="wan2.1-t2v", to=to)
    assert f"{from_} layout" in capsys.readouterr().out.splitlines()[0]
    assert files(tmp_path / FORMATS[to]) == files(folder / FORMATS[to])


def test_wans_own_layout_is_what_it_was(written):
    folder, arrays = written
    assert_same(read_wan(folder / "wan"), arrays)
    settings = json.loads((folder / "wan" / "config.json").read_text())
    facts = {"_class_name": "WanModel", "model_type": "t2v", "dim": DIM, "ffn_dim": FFN, "num_layers": LAYERS}
    facts |= {"num_heads": 1, "in_dim": CHANNELS, "out_dim": CHANNELS, "freq_dim": 256, "text_len": 512, "eps": 1e-6}
    assert settings.items() >= facts.items()


class Storages(pickle.Unpickler):
    """Reads the pickle of a .pth with Python's own unpickler, as arrays."""

    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        known = {"FloatStorage": np.float32, "BFloat16Storage": BF16, "OrderedDict": OrderedDict}
        return known.get(name) or (lambda storage, offset, shape, stride, *_: self.view(storage, shape, stride))

    def persistent_load(self, pid):
        kind, dtype, key, device, count = pid
        assert (kind, device) == ("storage", "cpu")
        return np.frombuffer(self.archive.read(f"{self.folder}/data/{key}"), dtype, count)

    def view(self, storage, shape, stride):
        return np.lib.stride_tricks.as_strided(storage, shape, [step * storage.itemsize for step in stride])


def test_rcms_file_is_an_archive_of_a_dict_with_the_patch_embedding_as_a_matrix(of_each_dtype):
    folder, arrays = of_each_dtype
    with zipfile.ZipFile(folder / "rcm.pth") as archive:
        assert archive.testzip() is None
        found = Storages(archive, "weights").load()
        offsets = {name: archive.getinfo(name).header_offset for name in archive.namelist()}
    expected = {f"net.{name}": array for name, array in arrays.items()}
    expected["net.patch_embedding.weight"] = arrays["patch_embedding.weight"].reshape(DIM, -1)
    assert_same(found, expected)
    assert len(offsets) == len(arrays) + 3


def test_diffusers_folder_holds_each_tensor_once_under_its_names(written):
    """That these names are diffusers' is shown in tests/parity."""
    folder, arrays = written
    found = read_wan(folder / "diffusers")
    np.testing.assert_array_equal(found["blocks.1.attn2.to_out.0.bias"], arrays["blocks.1.cross_attn.o.bias"])
    np.testing.assert_array_equal(found["blocks.0.norm2.weight"], arrays["blocks.0.norm3.weight"])
    np.testing.assert_array_equal(found["scale_shift_table"], arrays["head.modulation"])
    sizes = sorted(array.size for array in arrays.values())
    assert sorted(array.size for array in found.values()) == sizes


@functools.cache
def network():
    return create_network(CONFIG)


def test_an_orbax_checkpoint_is_opened_by_checkpoints_and_holds_the_networks_parameters(of_each_dtype):
    folder, arrays = of_each_dtype
    dtype = arrays["head.head.bias"].dtype
    params = network().abstract_params()
    state = {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)}
    checkpoints = Checkpoints(folder / "our", keep=1, every=1)
    iteration, restored = checkpoints.restore(state, None)  # which compares the fingerprints
    assert checkpoints.metadata(0)["model"] == "wan2.1-t2v"
    checkpoints.close()
    assert iteration == 0
    assert_matches(restored["params"], arrays)


def assert_matches(params, arrays):
    """That parameters of ours are Wan's tensors."""
    flat = traverse_util.flatten_dict(params, sep=".")
    q = np.stack([arrays[f"blocks.{layer}.self_attn.q.weight"].T for layer in range(LAYERS)])
    np.testing.assert_array_equal(flat["blocks.self_attn.q.kernel"], q)
    up = np.stack([arrays[f"blocks.{layer}.ffn.0.bias"] for layer in range(LAYERS)])
    np.testing.assert_array_equal(flat["blocks.ffn.up.bias"], up)
    patches = arrays["patch_embedding.weight"].reshape(DIM, -1).T
    np.testing.assert_array_equal(flat["patch_embedding.kernel"], patches)
    np.testing.assert_array_equal(flat["head.modulation"], arrays["head.modulation"][0])
    assert sum(leaf.size for leaf in flat.values()) == sum(array.size for array in arrays.values())


@pytest.mark.parametrize("name", FORMATS.values())
def test_a_run_loads_its_teacher_from_every_format(name, of_each_dtype):
    folder, arrays = of_each_dtype
    params = load_params(folder / name, network())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert_matches(params, {key: array.astype(np.float32) for key, array in arrays.items()})


def test_a_runs_checkpoint_gives_its_ema_or_another_part(tmp_path, monkeypatch):
    """As a run saves it, with an array in several chunks."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 20_000)
    monkeypatch.setitem(PRESETS, "wan2.1-t2v-small", CONFIG)
    rng = np.random.default_rng(0)
    networks = {
        part: jax.tree.map(lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape)), network().abstract_params())
        for part in ("ema", "student")
    }
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1, every=1)
    checkpoints.save(3, {**networks, "student_opt": jax.numpy.ones(2), "iteration": jax.numpy.int32(3)}, None)
    checkpoints.close()
    for part, expected in ((None, "ema"), ("student", "student"), ("ema", "ema")):
        target = tmp_path / f"{part}.safetensors"
        convert(tmp_path / "run", target, model="wan2.1-t2v-small", to="rcm", part=part)
        jax.tree.map(np.testing.assert_array_equal, load_params(target, network()), networks[expected])
    with pytest.raises(UserError, match=r"checkpoints/3 has no --part fake: choose one of ema, student"):
        convert(tmp_path / "run", tmp_path / "x.pth", model="wan2.1-t2v-small", to="rcm", part="fake")


def test_converted_weights_of_the_official_net_give_its_output(golden, tmp_path, monkeypatch):
    """By way of Orbax and diffusers' layout, and back to the official names."""
    facts, _ = golden("wan21_t2v")
    arrays = {name.removeprefix("weights/"): array for name, array in facts.items() if name.startswith("weights/")}
    config = WanConfig(48, 96, 2, 2, text_dim=24)
    monkeypatch.setitem(PRESETS, "wan2.1-t2v-golden", config)
    safetensors.numpy.save_file(arrays, tmp_path / "0.safetensors")
    path = ["0.safetensors", "1", "2", "3.safetensors"]
    for before, after, to in zip(path, path[1:], ("orbax", "diffusers", "rcm"), strict=False):
        convert(tmp_path / before, tmp_path / after, model="wan2.1-t2v-golden", to=to)
    found = safetensors.numpy.load_file(tmp_path / "3.safetensors")
    assert_same(found, {f"net.{name}": array for name, array in arrays.items()})

    net = create_network(config)
    inputs = (np.moveaxis(facts["x"], 1, -1), facts["t"][:, 0], facts["text"])
    apply = jax.jit(net.apply, compiler_options={"xla_backend_optimization_level": 0})
    out = apply(load_params(tmp_path / "2", net), *map(jax.numpy.asarray, inputs))
    out = np.moveaxis(out, -1, 1)
    # Float32 in another order: the tolerance of test_golden.py.
    assert np.linalg.norm(out - facts["out"]) <= 1e-5 * np.linalg.norm(facts["out"])


PREFIXES = {"net.": "student", "net_ema.": "ema", "net_fake_score.": "fake"}


@pytest.mark.parametrize(("part", "prefix"), [(None, "net_ema."), *((p, prefix) for prefix, p in PREFIXES.items())])
def test_of_rcms_networks_in_one_file_one_is_taken(part, prefix, tmp_path):
    networks = {prefix: random_network(seed) for seed, prefix in enumerate(PREFIXES)}
    arrays = {f"{prefix}{name}": array for prefix, network in networks.items() for name, array in network.items()}
    arrays["net.blocks.0.self_attn.attn_op._extra_state"] = np.zeros(3, np.uint8)
    safetensors.numpy.save_file(arrays, tmp_path / "rcm.safetensors")
    convert(tmp_path / "rcm.safetensors", tmp_path / "wan", model="wan2.1-t2v", to="wan", part=part)
    assert_same(read_wan(tmp_path / "wan"), networks[prefix])


def test_a_file_of_one_network_has_no_parts(tmp_path):
    write_wan(tmp_path / "wan", random_network())
    with pytest.raises(UserError, match=r"holds one network: leave --part ema out"):
        convert(tmp_path / "wan", tmp_path / "x.pth", model="wan2.1-t2v", to="rcm", part="ema")


def test_dtypes_are_kept_or_rounded_as_asked(tmp_path):
    arrays = random_network()
    write_wan(tmp_path / "f32", arrays)
    convert(tmp_path / "f32", tmp_path / "bf16", model="wan2.1-t2v", to="wan", dtype="bf16")
    assert_same(read_wan(tmp_path / "bf16"), {name: array.astype(BF16) for name, array in arrays.items()})
    convert(tmp_path / "bf16", tmp_path / "back", model="wan2.1-t2v", to="wan", dtype="f32")
    rounded = {name: array.astype(BF16).astype(np.float32) for name, array in arrays.items()}
    assert_same(read_wan(tmp_path / "back"), rounded)


def test_a_parameter_whose_layers_differ_in_dtype_is_not_stacked(tmp_path):
    arrays = random_network()
    arrays["blocks.1.ffn.0.weight"] = arrays["blocks.1.ffn.0.weight"].astype(BF16)
    write_wan(tmp_path / "wan", arrays)
    with pytest.raises(UserError, match=r"layers of blocks\.ffn\.up\.kernel differ in dtype.*give --dtype"):
        convert(tmp_path / "wan", tmp_path / "our", model="wan2.1-t2v", to="orbax")
    convert(tmp_path / "wan", tmp_path / "our", model="wan2.1-t2v", to="orbax", dtype="f32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "a width of 128 does not divide into 3 heads: name a size"),
        ({"num_heads": "many"}, "a width of 128 does not divide into many heads: name a size"),
        ([], "config.json must hold settings by name"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, tmp_path):
    source = write_wan(tmp_path / "wan", random_network())
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "x.pth", model="wan2.1-t2v", to="rcm")
    assert str(error.value).startswith(str(source))
    assert message in str(error.value)


def test_another_kind_of_network_is_refused(tmp_path):
    safetensors.numpy.save_file({"conv.weight": np.ones((2, 2), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: the checkpoint has no matrix patch_embedding\.weight"):
        convert(tmp_path / "x.safetensors", tmp_path / "x.pth", model="wan2.1-t2v", to="rcm")


def test_whole_numbers_are_no_weights(tmp_path):
    arrays = random_network()
    arrays["head.head.bias"] = arrays["head.head.bias"].astype(np.int64)
    source = write_wan(tmp_path / "wan", arrays)
    with pytest.raises(UserError, match=r"must hold float32.* numbers, save it so: head\.head\.bias is int64"):
        convert(source, tmp_path / "x.pth", model="wan2.1-t2v", to="rcm")


def test_a_folder_is_split_into_shards_with_an_index(tmp_path):
    arrays = random_network()
    write_wan(tmp_path / "one", arrays)
    convert(tmp_path / "one", tmp_path / "many", model="wan2.1-t2v", to="wan", shard_bytes=500_000)
    index = json.loads((tmp_path / "many" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    found = {}
    for shard in shards:
        part = safetensors.numpy.load_file(shard)
        assert {index["weight_map"][name] for name in part} == {shard.name}
        assert sum(array.nbytes for array in part.values()) <= 500_000
        found |= part
    assert_same(found, arrays)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    convert(tmp_path / "many", tmp_path / "back", model="wan2.1-t2v", to="wan")
    assert_same(read_wan(tmp_path / "back"), arrays)


def without(arrays, name):
    return {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize(
    ("to", "change", "faults"),
    [
        ("orbax", lambda a: without(a, "blocks.1.ffn.2.bias"), ["missing blocks.1.ffn.2.bias"]),
        (
            "wan",
            lambda a: without(without(a, "head.modulation"), "blocks.0.norm3.bias"),
            ["missing head.modulation", "missing blocks.0.norm3.bias"],
        ),
        ("rcm", lambda a: a | {"blocks.0.alpha": np.ones(3, np.float32)}, ["unexpected blocks.0.alpha"]),
        (
            "diffusers",
            lambda a: a | {"blocks.0.ffn.0.bias": np.ones(7, np.float32)},
            ["blocks.0.ffn.0.bias has shape (7,), the network takes (96,)"],
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(to, change, faults, tmp_path):
    write_wan(tmp_path / "source", change(random_network()))
    with pytest.raises(UserError, match="does not fit the model, nothing was written") as error:
        convert(tmp_path / "source", tmp_path / FORMATS[to], model="wan2.1-t2v", to=to)
    message = str(error.value)
    assert all(fault in message for fault in faults)
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("model", ["wan2.1-t2v-1.3b", "digits"])
def test_a_preset_of_another_size_does_not_fit(model, tmp_path):
    write_wan(tmp_path / "wan", random_network())
    with pytest.raises(UserError, match=r"does not fit.*; head\.head\.bias has shape \(16,\), the network takes"):
        convert(tmp_path / "wan", tmp_path / "x.pth", model=model, to="rcm")


@pytest.mark.parametrize("model", ["wan2.1-t2v", "wan2.2-t2v"])
@pytest.mark.parametrize(("settings", "heads"), [({}, 2), ({"num_heads": 4}, 4), ({"num_attention_heads": 8}, 8)])
def test_a_model_without_a_size_takes_it_from_the_tensors_and_heads_from_the_settings(
    model, settings, heads, tmp_path, capsys
):
    arrays = random_network(dim=256, ffn=40, layers=3, channels=2, text=6)
    source = write_wan(tmp_path / "wan", arrays)
    (source / "config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "x", model=model, to="wan")
    count = sum(array.size for array in arrays.values())
    assert f"width 256, 3 blocks, {heads} heads, {count:,} parameters" in capsys.readouterr().out
    found = json.loads((tmp_path / "x" / "config.json").read_text())
    expected = {"dim": 256, "ffn_dim": 40, "num_layers": 3, "num_heads": heads, "in_dim": 2, "text_dim": 6}
    assert found.items() >= expected.items()


@pytest.mark.parametrize(
    ("model", "gigabytes", "count", "to"),
    [("wan2.1-t2v-1.3b", 2.838, 825, "wan"), *(("wan2.1-t2v-14b", 28.577, 1095, to) for to in FORMATS)],
)
def test_a_full_size_network_is_planned_in_pieces_of_one_tensor(model, gigabytes, count, to):
    """As many tensors as the published checkpoints have; bfloat16."""
    family, config = families.find_model(model)
    shapes = families.tensor_shapes(family, config)
    wanted = published(config.dim, config.ffn_dim, config.layers, 16, 4096)
    assert {name: math.prod(shape) for name, shape in shapes.items()} == {
        name: math.prod(shape) for name, shape in wanted.items()
    }
    lazy = {name: tensors.LazyTensor(shape, BF16, lambda: np.empty(0)) for name, shape in shapes.items()}
    file = "x.pth" if to == "rcm" else None
    plan = conversion.plan_target(lazy, family, config, to, model=model, file=file, limit=conversion.SHARD_BYTES)
    assert len(plan.pieces) == count
    assert round(sum(piece.nbytes for piece in plan.pieces) / 1e9, 3) == gigabytes
    assert max(piece.nbytes for piece in plan.pieces) <= 5120 * 6 * 5120 * 2


def spy_on_reads(monkeypatch):
    """Weak references to all that is read from files, each noted with how many earlier arrays are still in memory."""
    seen, alive = [], []
    read_bytes = tensors.read_bytes

    def read(path, offset, count):
        array = read_bytes(path, offset, count)
        if count > 1000:
            alive.append(sum(reference() is not None for reference in seen))
            seen.append(weakref.ref(array))
        return array

    for module in ("safetensors_file", "torch_file"):
        monkeypatch.setattr(f"rcm_jax.convert.{module}.read_bytes", read)
    return alive


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("from_", ["wan", "rcm", "diffusers"])
def test_one_tensor_is_in_memory_at_a_time(from_, to, written, tmp_path, monkeypatch):
    folder, _ = written
    alive = spy_on_reads(monkeypatch)
    convert(folder / FORMATS[from_], tmp_path / FORMATS[to], model="wan2.1-t2v", to=to)
    assert len(alive) > 20
    assert max(alive) <= 1  # the last one may still be bound while the next is read


class Interruption(Exception):
    pass


def interrupt(monkeypatch, pieces, **conversion):
    """Starts a conversion that breaks off after it has noted some pieces."""
    append, noted = writing._append, []

    def failing(journal, note):
        append(journal, note)
        noted.append(note)
        if len(noted) > pieces:
            raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(writing, "SYNC_BYTES", 1)  # each piece is noted when it is written
        patch.setattr(writing, "_append", failing)
        with pytest.raises(Interruption):
            convert(**conversion)


def count_writes(monkeypatch):
    """A list that gets the name of the file of every write."""
    writes, write_piece = [], writing.write_piece

    def counting(path, offset, *parts):
        writes.append(path.name)
        write_piece(path, offset, *parts)

    for module in ("orbax", "safetensors_file", "torch_file"):
        monkeypatch.setattr(f"rcm_jax.convert.{module}.write_piece", counting)
    return writes


@pytest.mark.parametrize("to", FORMATS)
def test_an_interrupted_conversion_goes_on_where_it_stopped(to, written, tmp_path, monkeypatch, capsys):
    folder, arrays = written
    target = tmp_path / FORMATS[to]
    words = dict(source=folder / "wan", target=target, model="wan2.1-t2v", to=to)
    for pieces in (5, 20):
        interrupt(monkeypatch, pieces, **words)
        assert not target.exists()
        assert [path.name for path in tmp_path.iterdir()] == [f".{target.name}.partial"]
    journal = tmp_path / f".{target.name}.partial" / "journal.jsonl"
    done = len(journal.read_text().splitlines()) - 1
    with journal.open("a") as file:
        file.write('{"key": "torn')  # the machine went down while the line was written
    capsys.readouterr()
    writes = count_writes(monkeypatch)
    convert(**words)
    assert f"went on after the {done} tensors" in capsys.readouterr().out
    assert 20 < done < len(arrays)
    assert len(arrays) - done <= len(writes) <= len(arrays) - done + 6
    assert files(target) == files(folder / FORMATS[to])
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("from_", ["wan", "orbax"])
def test_a_conversion_into_its_sources_own_folder_goes_on_whatever_else_is_written_there(
    from_, written, tmp_path, monkeypatch, capsys
):
    source = tmp_path / "run"
    shutil.copytree(written[0] / FORMATS[from_], source)
    words = dict(source=source, target=source / "x.pth", model="wan2.1-t2v", to="rcm")
    interrupt(monkeypatch, 9, **words)
    if from_ == "orbax":
        (source / "metrics.jsonl").write_text("{}")
        (source / "tensorboard").mkdir()
        (source / "tensorboard" / "events").write_text("more")
    convert(**words)
    assert "went on after the 9 tensors" in capsys.readouterr().out
    assert files(source / "x.pth") == files(written[0] / "rcm.pth")


@pytest.mark.parametrize("change", ["source", "option", "journal", "content"])
def test_another_conversion_does_not_go_on_from_the_pieces_of_the_first(change, tmp_path, monkeypatch, capsys):
    arrays = random_network()
    source, target = write_wan(tmp_path / "wan", arrays), tmp_path / "x.pth"
    interrupt(monkeypatch, 9, source=source, target=target, model="wan2.1-t2v", to="rcm")
    partial = tmp_path / ".x.pth.partial"
    if change == "source":
        arrays = random_network(seed=1)
        safetensors.numpy.save_file(arrays, source / "diffusion_pytorch_model.safetensors")
    elif change == "journal":
        (partial / "journal.jsonl").unlink()
    elif change == "content":
        (partial / "content" / "x.pth").unlink()
        (partial / "content").rmdir()
    dtype = "bf16" if change == "option" else None
    convert(source, target, model="wan2.1-t2v", to="rcm", dtype=dtype)
    assert "went on" not in capsys.readouterr().out
    convert(target, tmp_path / "back", model="wan2.1-t2v", to="wan")
    expected = {name: array.astype(BF16 if dtype else np.float32) for name, array in arrays.items()}
    assert_same(read_wan(tmp_path / "back"), expected)


@pytest.mark.parametrize("to", FORMATS)
def test_a_target_that_exists_is_never_touched(to, tmp_path):
    source, target = write_wan(tmp_path / "source", random_network()), tmp_path / FORMATS[to]
    target.write_text("mine")
    with pytest.raises(UserError, match="exists and is never overwritten"):
        convert(source, target, model="wan2.1-t2v", to=to)
    assert target.read_text() == "mine"


def test_a_target_is_written_by_one_process(tmp_path):
    source = write_wan(tmp_path / "wan", random_network())
    partial = tmp_path / ".x.pth.partial"
    partial.mkdir()
    with (partial / "journal.jsonl").open("a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            convert(source, tmp_path / "x.pth", model="wan2.1-t2v", to="rcm")
    convert(source, tmp_path / "x.pth", model="wan2.1-t2v", to="rcm")


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    source = write_wan(tmp_path / "wan", random_network())
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: writing.shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"needs .* more bytes, its disk has 1: make room"):
        convert(source, tmp_path / "x.pth", model="wan2.1-t2v", to="rcm")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("rcm", "folder", r"cannot hold the rcm layout: name a \.pth file or a \.pt file or a \.safetensors file"),
        ("wan", "x.pth", r"cannot hold the wan layout: name a folder or a \.safetensors file"),
        ("diffusers", "x.safetensors", r"cannot hold the diffusers layout: name a folder"),
        ("orbax", "x.pt", r"cannot hold the orbax layout: name a folder"),
    ],
)
def test_a_target_must_have_a_name_of_its_kind(to, name, message, tmp_path):
    source = write_wan(tmp_path / "wan", random_network())
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / name, model="wan2.1-t2v", to=to)


def test_one_safetensors_file_says_its_model(tmp_path):
    arrays = random_network()
    source = write_wan(tmp_path / "wan", arrays)
    convert(source, tmp_path / "x.safetensors", model="wan2.1-t2v", to="wan")
    found, metadata = load_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "model": "wan2.1-t2v"}
    assert_same(found, arrays)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not a file or folder: give a checkpoint's file or folder"),
        (lambda path: path.mkdir(), "holds no safetensors"),
        (lambda path: path.write_text("a letter"), "is not a complete safetensors file, nor a zip archive"),
        (
            lambda path: [write_wan(path / name, {}) for name in ("low_noise_model", "high_noise_model")],
            r"holds 2 networks: give one of \S+/high_noise_model, \S+/low_noise_model",
        ),
        (
            lambda path: (path.mkdir(), *((path / f"{name}.safetensors").touch() for name in "ab")),
            r"holds several checkpoints \(a\.safetensors, b\.safetensors\): give one file",
        ),
    ],
)
def test_a_source_that_is_no_checkpoint_is_refused(make, message, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "x")


SMALL = {"dim": 24, "heads": 1, "layers": 2, "text_dim": 6}
KINDS = {
    "wan2.1-i2v": SMALL | {"ffn_dim": 32, "image_dim": 20},
    "wan2.2-ti2v": SMALL | {"ffn_dim": 32},
    "cosmos-predict2-t2i": SMALL | {"lora_dim": 4},
    "cosmos-predict2-v2w": SMALL | {"lora_dim": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_networks_pass_through_all_their_formats_unchanged(kind, tmp_path, monkeypatch):
    preset = next(preset for name, preset in PRESETS.items() if name.startswith(kind))
    model, config = f"{kind}-small", dataclasses.replace(preset, **KINDS[kind])
    monkeypatch.setitem(PRESETS, model, config)
    family, rng = families.find_model(model)[0], np.random.default_rng(0)
    shapes = families.tensor_shapes(family, config)
    arrays = {f"net.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "start.safetensors")
    path = [
        "start.safetensors",
        "orbax",
        *(["wan"] if "wan" in family.settings else []),
        "diffusers",
        "end.safetensors",
    ]
    for before, after in itertools.pairwise(path):
        to = "rcm" if after == path[-1] else after
        convert(tmp_path / before, tmp_path / after, model=model, to=to)
    assert_same(safetensors.numpy.load_file(tmp_path / path[-1]), arrays)


def test_cosmos_has_no_layout_of_wan(tmp_path):
    source = write_wan(tmp_path / "source", random_network())
    with pytest.raises(UserError, match="has no wan layout: write --to rcm"):
        convert(source, tmp_path / "x", model="cosmos-predict2-t2i-2b", to="wan")


def test_the_transformer_of_a_diffusers_pipeline_is_found(written, tmp_path):
    folder, arrays = written
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "transformer").symlink_to(folder / "diffusers")
    convert(tmp_path / "pipeline", tmp_path / "wan", model="wan2.1-t2v", to="wan")
    assert_same(read_wan(tmp_path / "wan"), arrays)


def run(*words):
    main([str(word) for word in words])


def test_the_command_line_converts(tmp_path, capsys):
    source = write_wan(tmp_path / "wan", random_network())
    run(source, tmp_path / "x.pth", "--model", "wan2.1-t2v", "--to", "rcm", "--dtype", "bf16")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"found {source}: folder of 1 safetensors files, wan layout, 69 tensors, float32"
    assert out[1].startswith("taken as wan2.1-t2v of its own size: width 128, 2 blocks, 1 heads")
    assert out[2].startswith(f"wrote {tmp_path / 'x.pth'}: rcm layout, ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "wan2.1-t2v", "--to", "gguf"], "argument --to: invalid choice: 'gguf'"),
        (["--model", "wan3", "--to", "rcm"], "--model wan3 is not known: choose one of cosmos-predict2-t2i, "),
        (["--model", "digits", "--to", "rcm", "--scale", "nan"], "argument --scale: nan must be a number"),
        (["--model", "digits", "--to", "rcm", "--scale", "2"], "--scale 2.0 scales nothing: give --add-delta or"),
        (
            ["--model", "digits", "--to", "rcm", "--lora", "a", "--add-delta", "b", "c"],
            "argument --add-delta: not allowed with argument --lora",
        ),
        (["--model", "digits", "--to", "rcm"], "absent is not a file or folder"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path / "absent", tmp_path / "x.pth", *words)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
