"""Files that PyTorch, diffusers and rCM's way of saving write are read, and ours are opened by them."""

import copy
import dataclasses
import functools
import io
import subprocess
import sys
import types
from collections import OrderedDict

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from diffusers.loaders import lora_conversion_utils, single_file_utils
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp

from rcm_jax.checkpoint import export_safetensors
from rcm_jax.config import UserError
from rcm_jax.convert import families, torch_distributed, torch_file
from rcm_jax.convert.conversion import convert
from rcm_jax.convert.sources import open_source
from rcm_jax.convert.torch_file import Region
from rcm_jax.convert.wan import wan_tensors
from rcm_jax.models.presets import PRESETS, create_network

SMALL = {"dim": 48, "heads": 2, "layers": 2, "text_dim": 10}
KINDS = {
    "wan2.1-t2v-1.3b": SMALL | {"ffn_dim": 96},
    "wan2.1-i2v-14b": SMALL | {"ffn_dim": 96, "image_dim": 20},
    "wan2.2-ti2v-5b": SMALL | {"ffn_dim": 96},
    "cosmos-predict2-v2w-2b": SMALL | {"lora_dim": 4},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T2V = "wan2.1-t2v"


def config_of(kind):
    return dataclasses.replace(PRESETS[kind], **KINDS[kind])


def create_model(kind, seed=0, dtype=torch.float32):
    """diffusers' model, as its own configuration and initialisation make it, with no bias zero and no scale one."""
    config = config_of(kind)
    family = families.find_model(kind)[0]
    settings = family.settings["diffusers"](config)
    model = getattr(diffusers, settings["_class_name"]).from_config(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def as_array(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def assert_same(found, expected):
    """That lazy tensors are PyTorch's, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        array = as_array(tensor)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name].read(), array, err_msg=name)


# PyTorch's files

BASE = torch.arange(48, dtype=torch.float32).reshape(6, 8)
SAVED = {
    "plain dict": {"a": BASE, "b": BASE[0].clone()},
    "module": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict(),
    "parameters": OrderedDict(a=torch.nn.Parameter(BASE), b=torch.nn.Parameter(BASE[1], requires_grad=False)),
    "views of one storage": {"a": BASE[1:3], "b": BASE.t(), "c": BASE[:, ::3], "d": BASE[2, 3], "e": BASE},
    "odd shapes": {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "one": torch.ones(1, 1, 5)},
    **{str(dtype): {"a": BASE.to(dtype), "b": BASE.to(dtype)[:, 1]} for dtype in DTYPES},
    **{str(dtype): {"a": BASE.to(dtype)} for dtype in (torch.float64, torch.int64, torch.uint8, torch.bool)},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", SAVED)
def test_what_torch_saved_is_read_bit_for_bit(kind, protocol, tmp_path):
    torch.save(SAVED[kind], tmp_path / "x.pth", pickle_protocol=protocol)
    assert_same(torch_file.read_value(Region(tmp_path / "x.pth")), SAVED[kind])


@pytest.mark.parametrize("state", [io.BytesIO(b"scales"), b"scales", torch.zeros(3, dtype=torch.uint8)])
def test_an_extra_state_is_left_out_and_the_ema_is_taken(state, tmp_path):
    value = {"net.a": BASE, "net.a._extra_state": state, "net_ema.a": BASE + 1, "net_ema.a._extra_state": state}
    torch.save(value, tmp_path / "x.pth")
    assert_same(open_source(tmp_path / "x.pth").tensors, {"a": BASE + 1})
    assert_same(open_source(tmp_path / "x.pth", "student").tensors, {"a": BASE})


def test_networks_nested_in_a_training_state_are_found(tmp_path):
    torch.save({"model": {"net.a": BASE}, "ema": {"a": BASE + 1}, "step": 3, "lr": [0.1]}, tmp_path / "x.pt")
    assert_same(open_source(tmp_path / "x.pt").tensors, {"a": BASE + 1})
    assert_same(open_source(tmp_path / "x.pt", "student").tensors, {"a": BASE})


class Custom:
    pass


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": BASE, "config": types.SimpleNamespace(a=1)}, "types.SimpleNamespace"),
        ({"a": BASE, "config": Custom()}, "Custom"),
        ({"a": BASE.to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        ({"a": BASE.to(torch.float8_e4m3fn)}, "torch._utils._rebuild_tensor_v3"),
    ],
)
def test_whatever_else_torch_can_save_is_refused(value, name, tmp_path):
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x\.pth names \S*{name}, which no weights need, and is not run"):
        open_source(tmp_path / "x.pth")


def test_the_format_before_pytorch_1_6_is_refused(tmp_path):
    torch.save({"a": BASE}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"save a \.pth with PyTorch 1\.6 or newer"):
        open_source(tmp_path / "x.pth")


# Distributed checkpoints


def test_a_distributed_checkpoint_is_read_bit_for_bit(tmp_path):
    state = {f"net.{dtype}": BASE.to(dtype) for dtype in DTYPES} | {"net.scalar": torch.tensor(2.5)}
    dcp.save(state | {"net.x._extra_state": io.BytesIO(b"x")}, checkpoint_id=tmp_path / "x.dcp", no_dist=True)
    expected = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    assert_same(open_source(tmp_path / "x.dcp").tensors, expected)


def test_rcms_way_to_a_teachers_dcp_is_read(tmp_path):
    """rCM's README has a teacher's .pth converted by torch's own format_utils."""
    torch.save({"net.a": BASE, "net.b": BASE.to(torch.bfloat16)}, tmp_path / "x.pth")
    torch_save_to_dcp(tmp_path / "x.pth", tmp_path / "x.dcp")
    assert_same(open_source(tmp_path / "x.dcp").tensors, {"a": BASE, "b": BASE.to(torch.bfloat16)})


SHARDED = """
import os
import sys
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(7 * 10, dtype=torch.float32).reshape(7, 10)
state = {f"net_ema.cut{axis}": distribute_tensor(whole, mesh, [Shard(axis)]) for axis in range(2)}
dcp.save(state | {"net.whole": whole}, checkpoint_id=f"{folder}/iter_000000010/model")
torch.distributed.barrier()
os._exit(0)  # gloo's own farewell fails now and then where the other process is gone first
"""


def test_a_training_checkpoint_of_two_processes_is_put_together(tmp_path):
    """As FSDP cuts tensors, also along an axis whose length two does not divide."""
    processes = [subprocess.Popen([sys.executable, "-c", SHARDED, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert len(list((tmp_path / "iter_000000010" / "model").glob("*.distcp"))) == 2
    whole = torch.arange(7 * 10, dtype=torch.float32).reshape(7, 10)
    assert_same(open_source(tmp_path / "iter_000000010").tensors, {"cut0": whole, "cut1": whole})
    assert_same(open_source(tmp_path / "iter_000000010", "student").tensors, {"whole": whole})


def test_a_distributed_checkpoint_with_other_classes_is_refused(tmp_path):
    dcp.save({"net.a": BASE}, checkpoint_id=tmp_path / "x.dcp", no_dist=True)
    path = tmp_path / "x.dcp" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"TensorProperties", b"TensorPropertyes"))
    with pytest.raises(UserError, match=r"\.metadata names torch\.distributed\.checkpoint\.metadata\.TensorPropertyes"):
        torch_distributed.read_folder(tmp_path / "x.dcp")


# What we write


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_our_pth_is_opened_by_torch_and_holds_the_published_names(kind, mmap, dtype, tmp_path, monkeypatch):
    """Then rCM's loader strips "net." and assigns: a Wan network's names are those of the golden files."""
    model = create_model(kind, dtype=dtype)
    model.save_pretrained(tmp_path / "theirs")
    small(monkeypatch, kind)
    convert(tmp_path / "theirs", tmp_path / "x.pth", model=f"{kind}-small", to="rcm")
    value = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
    family = families.find_model(kind)[0]
    shapes = families.tensor_shapes(family, config_of(kind))
    assert {name: tuple(tensor.shape) for name, tensor in value.items()} == {
        f"net.{name}": shape for name, shape in shapes.items()
    }
    assert {tensor.dtype for tensor in value.values()} == {dtype}
    rename = families.published_to_diffusers(family)
    expected = model.state_dict()
    for name, tensor in value.items():
        theirs = expected[rename(name.removeprefix("net."))]
        assert torch.equal(tensor.flatten(), theirs.flatten()), name


def small(monkeypatch, kind):
    monkeypatch.setitem(PRESETS, f"{kind}-small", config_of(kind))


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_diffusers_folder_goes_through_our_formats_and_comes_back(kind, shard, tmp_path, monkeypatch):
    model = create_model(kind)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    small(monkeypatch, kind)
    path = ["theirs", "our", "rcm.pth", "back"]
    for before, after, to in zip(path, path[1:], ("orbax", "rcm", "diffusers"), strict=False):
        convert(tmp_path / before, tmp_path / after, model=f"{kind}-small", to=to, shard_bytes=100_000)
    loaded, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    settings = {name: value for name, value in loaded.config.items() if not name.startswith("_")}
    assert settings == {name: value for name, value in model.config.items() if not name.startswith("_")}
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_diffusers_reads_wans_own_layout_from_us(tmp_path):
    """Its converter of Wan's single files is code that nobody here wrote."""
    model = create_model("wan2.1-t2v-1.3b")
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "wan.safetensors", model=T2V, to="wan")
    tensors = safetensors.torch.load_file(tmp_path / "wan.safetensors")
    assert tensors["patch_embedding.weight"].ndim == 5
    converted = single_file_utils.convert_wan_transformer_to_diffusers(dict(tensors))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    copied.load_state_dict(converted, strict=True)
    for name, tensor in copied.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_student_of_ours_gives_the_same_video_in_diffusers(tmp_path, monkeypatch):
    """Float32 on both sides, in another order: 1e-5 is some 150 round-offs. The time is small, since diffusers rounds
    the angles of its sinusoids to float32.
    """
    config = config_of("wan2.1-t2v-1.3b")
    network = create_network(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32), network.abstract_params()
    )
    export_safetensors(tmp_path / "ema.safetensors", wan_tensors(params, config), {})
    small(monkeypatch, "wan2.1-t2v-1.3b")
    convert(tmp_path / "ema.safetensors", tmp_path / "student", model="wan2.1-t2v-1.3b-small", to="diffusers")
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "student")
    x_BTHWC, text_BSD = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 2, 4, 6, 16), (1, 5, 10)))
    apply = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})(network.apply)
    ours = apply(params, jnp.asarray(x_BTHWC), jnp.array([3.0]), jnp.asarray(text_BSD))
    with torch.no_grad():
        x_BCTHW = torch.from_numpy(np.moveaxis(x_BTHWC, -1, 1).copy())
        theirs = model(x_BCTHW, torch.tensor([3.0]), torch.from_numpy(text_BSD)).sample
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_a_lora_in_the_original_naming_is_the_one_that_diffusers_reads(tmp_path):
    """diffusers' own converter gives the other naming; both merge to the same weights."""
    create_model("wan2.1-t2v-1.3b").save_pretrained(tmp_path / "theirs")
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for block in range(2):
        for layer in ("self_attn.q", "self_attn.o", "cross_attn.v", "ffn.0", "ffn.2"):
            name = f"diffusion_model.blocks.{block}.{layer}"
            out_dim, in_dim = {"ffn.0": (96, 48), "ffn.2": (48, 96)}.get(layer, (48, 48))
            lora[f"{name}.lora_down.weight"] = torch.randn(4, in_dim, generator=generator)
            lora[f"{name}.lora_up.weight"] = torch.randn(out_dim, 4, generator=generator)
            lora[f"{name}.alpha"] = torch.tensor(2.0)  # half the rank: the factors are powers of two and exact
    safetensors.torch.save_file(lora, tmp_path / "original.safetensors")
    converted = lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers(dict(lora))
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in converted.items()}, tmp_path / "diffusers.safetensors"
    )
    for naming in ("original", "diffusers"):
        lora_path = tmp_path / f"{naming}.safetensors"
        convert(tmp_path / "theirs", tmp_path / naming, model=T2V, to="wan", lora=lora_path)
    ours, theirs, before = (open_source(tmp_path / name).tensors for name in ("original", "diffusers", "theirs"))
    changed = 0
    rename = families.published_to_diffusers(families.WAN)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name].read())
        changed += not np.array_equal(tensor.read(), before[rename(name)].read())
    assert changed == 10
