"""Deltas and LoRA files are added as their formulas say, checked against float64."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from launch.convert import main
from rcm_jax.config import UserError
from rcm_jax.convert import families, merging
from rcm_jax.convert.conversion import convert
from rcm_jax.convert.tensors import LazyTensor
from rcm_jax.models.wan import WanConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
EPSILON = {np.dtype(np.float32): 2.0**-23, BF16: 2.0**-7}


SHAPES = families.tensor_shapes(families.WAN, WanConfig(128, 96, 1, 2, in_channels=4, out_channels=4, text_dim=12))


def random_network(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def write(path: Path, arrays) -> Path:
    safetensors.numpy.save_file(arrays, path)
    return path


def read(path: Path):
    return {name.removeprefix("net."): array for name, array in safetensors.numpy.load_file(path).items()}


def lazy(arrays):
    return {name: LazyTensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}


def wide(array):
    return array.astype(np.float64)


def assert_rounded(found, exact, dtype, *terms):
    """One rounding to `dtype`, and those of float32 sums of terms of this size."""
    size = sum(np.abs(term) for term in terms)
    bound = EPSILON[np.dtype(dtype)] / 2 * np.abs(exact) + 4 * EPSILON[np.dtype(np.float32)] * size
    assert found.dtype == dtype
    assert (np.abs(wide(found) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.35, -2.0])
def test_a_delta_is_added_to_every_tensor(scale, dtype, tmp_path):
    base, teacher, student = (random_network(seed, dtype) for seed in range(3))
    paths = [write(tmp_path / name, a) for name, a in zip("bts", (base, teacher, student), strict=True)]
    out = tmp_path / "out.safetensors"
    words = [paths[0], out, "--model", "wan2.2-t2v", "--to", "rcm", "--add-delta", *paths[1:]]
    main([*map(str, words), "--scale", str(scale)])
    for name, found in read(out).items():
        b, t, s = (wide(network[name]) for network in (base, teacher, student))
        assert_rounded(found, b + scale * (s - t), dtype, b, scale * s, scale * t)


def test_the_three_networks_of_a_delta_may_lie_in_three_formats(tmp_path):
    base, teacher, student = (random_network(seed) for seed in range(3))
    for name, network, to in (("b", base, "orbax"), ("t", teacher, "diffusers"), ("s.pth", student, "rcm")):
        convert(write(tmp_path / f"{name}.start", network), tmp_path / name, model="wan2.1-t2v", to=to)
    out, paths = tmp_path / "out.safetensors", (tmp_path / "t", tmp_path / "s.pth")
    convert(tmp_path / "b", out, model="wan2.1-t2v", to="rcm", delta=paths, dtype="bf16")
    for name, found in read(out).items():
        b, t, s = (wide(network[name]) for network in (base, teacher, student))
        # Rounded to float32, as the base is, and then to bfloat16.
        assert_rounded(found, b + (s - t), BF16, b, s, t, b + (s - t))


def test_of_a_wider_patch_embedding_the_first_channels_change():
    """An image-to-video network has the condition's channels after the latent's."""
    name, rng = "patch_embedding.weight", np.random.default_rng(0)
    base, teacher, student = (rng.standard_normal((6, 4 * c)).astype(np.float32) for c in (9, 4, 4))
    merged = merging.add_delta(*(lazy({name: a}) for a in (base, teacher, student)), 1.0, name)
    expected = base.copy()
    expected[:, :16] += student - teacher
    np.testing.assert_array_equal(merged[name].read(), expected)


@pytest.mark.parametrize(
    ("base", "teacher", "student", "fault"),
    [
        ({"a": 3}, {"a": 3, "b": 2}, {"a": 3, "b": 2}, "b is absent, (2,), (2,)"),
        ({"a": 3, "b": 2}, {"a": 3}, {"a": 3}, "b is (2,), absent, absent"),
        ({"a": 3}, {"a": 3}, {"a": 4}, "a is (3,), (3,), (4,)"),
        ({"a": 4}, {"a": 3}, {"a": 3}, "a is (4,), (3,), (3,)"),
    ],
)
def test_networks_of_another_layout_are_refused(base, teacher, student, fault):
    networks = (lazy({name: np.zeros(n, np.float32) for name, n in each.items()}) for each in (base, teacher, student))
    with pytest.raises(UserError) as error:
        merging.add_delta(*networks, 1.0, "patch_embedding.weight")
    assert str(error.value).endswith(fault)


RANK = 3
LAYERS = {  # by Wan's name: diffusers' name
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.cross_attn.o": "blocks.1.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
}


def random_lora(arrays, seed=7):
    """down (rank, in) and up (out, rank) of each layer."""
    rng = np.random.default_rng(seed)
    matrices = {}
    for layer in LAYERS:
        out_dim, in_dim = arrays[f"{layer}.weight"].shape
        matrices[layer] = tuple(
            rng.standard_normal(shape).astype(np.float32) for shape in ((RANK, in_dim), (out_dim, RANK))
        )
    return matrices


def in_diffusers_naming(matrices):
    return {
        f"transformer.{LAYERS[layer]}.{name}.weight": matrix
        for layer, pair in matrices.items()
        for name, matrix in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def in_original_naming(matrices, alpha):
    named = {
        f"diffusion_model.{layer}.{name}.weight": matrix
        for layer, pair in matrices.items()
        for name, matrix in zip(("lora_down", "lora_up"), pair, strict=True)
    }
    return named | {f"diffusion_model.{layer}.alpha": np.array(alpha, np.float32) for layer in matrices}


NOTES = {"transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {}}


@pytest.mark.parametrize(
    ("named", "metadata", "alpha"),
    [
        (in_diffusers_naming, {}, RANK),
        (in_diffusers_naming, {"lora_adapter_metadata": json.dumps(NOTES)}, 6.0),
        (lambda matrices: in_original_naming(matrices, 8.0), {}, 8.0),
    ],
    ids=["diffusers", "diffusers with alpha", "original"],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_is_added_to_the_layers_it_names(scale, dtype, named, metadata, alpha, tmp_path):
    arrays = random_network(dtype=dtype)
    matrices = random_lora(arrays)
    safetensors.numpy.save_file(named(matrices), tmp_path / "lora.safetensors", metadata)
    source, out = write(tmp_path / "x.safetensors", arrays), tmp_path / "out.safetensors"
    words = [source, out, "--model", "wan2.1-t2v", "--to", "rcm", "--lora", tmp_path / "lora.safetensors"]
    main([*map(str, words), "--scale", str(scale)])
    merged = read(out)
    for name, array in arrays.items():
        if name.removesuffix(".weight") in LAYERS:
            down, up = map(wide, matrices[name.removesuffix(".weight")])
            factor = scale * alpha / RANK
            terms = np.abs(factor) * np.abs(up) @ np.abs(down)
            assert_rounded(merged[name], wide(array) + factor * up @ down, dtype, wide(array), terms)
        else:
            np.testing.assert_array_equal(merged[name], array)


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e+39"])
@pytest.mark.parametrize("merge", [["--lora", "a"], ["--add-delta", "a", "b"]])
def test_a_scale_that_is_no_number_of_float32_is_refused(merge, scale, tmp_path, capsys):
    words = [tmp_path / "x", tmp_path / "out.pth", "--model=wan2.1-t2v", "--to=rcm", *merge, f"--scale={scale}"]
    with pytest.raises(SystemExit):
        main([*map(str, words)])
    assert f"argument --scale: {scale} must be a number, such as 1.5" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_plain_differences_in_a_lora_file_are_added():
    arrays = {"norm3.weight": np.ones(3, np.float32), "ffn.0.bias": np.zeros(2, np.float32)}
    lora = {
        "diffusion_model.norm3.diff": np.array([1, 2, 3], np.float32),
        "diffusion_model.ffn.0.diff_b": np.array([4, 6], np.float32),
    }
    merged = merging.add_lora(lazy(arrays), lazy(lora), {}, 0.5, lambda name: name)
    np.testing.assert_array_equal(merged["norm3.weight"].read(), [1.5, 2, 2.5])
    np.testing.assert_array_equal(merged["ffn.0.bias"].read(), [2, 3])


@pytest.mark.parametrize("name", ["lora_B.bias", "lora_B.default.bias"])
@pytest.mark.parametrize(
    ("alpha", "metadata", "factor"),
    [
        ({}, {}, 1),
        ({"transformer.ffn.0.alpha": np.array(6, np.float32)}, {}, 2),
        ({}, {"transformer.lora_alpha": 12}, 4),
    ],
)
def test_a_bias_of_the_upper_matrix_is_scaled_as_the_matrix(name, alpha, metadata, factor):
    """PEFT adds lora_B(lora_A(x)) * alpha / rank, its bias included; a diff_b is added as it is."""
    base = {"ffn.0.weight": np.zeros((2, 4), np.float32), "ffn.0.bias": np.array([1, 2], np.float32)}
    down, up, bias = np.ones((3, 4), np.float32), np.ones((2, 3), np.float32), np.array([10, 20], np.float32)
    lora = {"transformer.ffn.0.lora_A.weight": down, "transformer.ffn.0.lora_B.weight": up}
    lora |= {f"transformer.ffn.0.{name}": bias, "transformer.ffn.0.diff_b": np.array([100, 200], np.float32)} | alpha
    notes = {"lora_adapter_metadata": json.dumps(metadata)}
    merged = merging.add_lora(lazy(base), lazy(lora), notes, 0.5, lambda name: name)
    x = np.array([1, 2, 3, 4], np.float32)
    np.testing.assert_array_equal(merged["ffn.0.weight"].read() @ x, 0.5 * factor * up @ (down @ x))
    np.testing.assert_array_equal(merged["ffn.0.bias"].read(), [1 + 5 * factor + 50, 2 + 10 * factor + 100])


def add(lora: dict, metadata: dict | None = None):
    rename = families.diffusers_to_published(families.WAN)
    return merging.add_lora(lazy(random_network()), lazy(lora), metadata or {}, 1.0, rename)


Q = "transformer.blocks.0.attn1.to_q"


def pair(name=Q, rank=2, in_dim=128, out_dim=128):
    return {f"{name}.lora_A.weight": np.zeros((rank, in_dim)), f"{name}.lora_B.weight": np.zeros((out_dim, rank))}


@pytest.mark.parametrize(
    ("lora", "metadata", "message"),
    [
        ({}, {}, "does not fit the model, nothing was written: empty"),
        (pair("transformer.blocks.7.attn1.to_q"), {}, "unexpected transformer.blocks.7.attn1.to_q.lora_A.weight"),
        (pair() | {f"{Q}.dora_scale": np.ones(3)}, {}, f"unexpected {Q}.dora_scale"),
        (pair() | {f"{Q}.lora_down.weight": np.ones((2, 128))}, {}, f"unexpected {Q}.lora_down.weight"),
        ({f"{Q}.lora_A.weight": np.ones((2, 128))}, {}, "missing up matrix of blocks.0.self_attn.q.weight"),
        (pair(in_dim=5), {}, "matrices of (128, 2) and (2, 5) for the shape (128, 128) of blocks.0.self_attn.q.weight"),
        (pair(rank=0), {}, "matrices of (128, 0) and (0, 128)"),
        (pair() | {f"{Q}.alpha": np.ones(2)}, {}, "more than one alpha of blocks.0.self_attn.q.weight"),
        (
            pair() | {f"{Q}.diff": np.ones((128, 128))},
            {},
            "matrices beside a difference of blocks.0.self_attn.q.weight",
        ),
        (pair() | {f"{Q}.lora_B.bias": np.ones(3)}, {}, "bias of (3,) for the bias of (128,) of blocks.0.self_attn.q"),
        ({f"{Q}.lora_B.bias": np.ones(128)}, {}, "missing down matrix of blocks.0.self_attn.q.weight"),
        (pair(), {"lora_adapter_metadata": '{"transformer.use_rslora": true}'}, "uses use_rslora, which is not supp"),
        (pair(), {"lora_adapter_metadata": "{"}, "must hold valid JSON"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_by_name(lora, metadata, message):
    with pytest.raises(UserError) as error:
        add(lora, metadata)
    assert message in str(error.value)


def test_nothing_is_written_of_a_merge_that_does_not_fit(tmp_path: Path):
    safetensors.numpy.save_file(pair("x"), tmp_path / "lora.safetensors")
    source = write(tmp_path / "x.safetensors", random_network())
    with pytest.raises(UserError, match="does not fit"):
        convert(source, tmp_path / "x.pth", model="wan2.1-t2v", to="rcm", lora=tmp_path / "lora.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "x.safetensors"]
