"""The autoencoders: chunks and tiles do not change the result, memory does not grow with length, sizes are Wan's.

That they are Wan's networks is shown in tests/parity.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from naming import published_tensors

from rcm_jax.config import UserError
from rcm_jax.convert.names import flat
from rcm_jax.convert.places import params_from_published
from rcm_jax.convert.vae import vae_table
from rcm_jax.models import vae
from rcm_jax.models.functional import functional
from rcm_jax.models.vae import PRESETS, VAE, Decoder, Encoder, Tiling

# Two levels: a latent frame is two frames, a latent row two rows of patches.
SMALL = dict(encoder_dim=4, decoder_dim=6, multipliers=(1, 1), halve_time=(True,), blocks=1)
CONFIGS = {preset: dataclasses.replace(PRESETS[preset], **SMALL) for preset in ("wan2.1", "wan2.2")}

# These programs run for milliseconds and compile for seconds.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def build(part, name, dtype=jnp.float32):
    return functional(lambda rngs: part(CONFIGS[name], dtype=dtype, rngs=rngs))


@functools.cache
def params(part, name):
    """Random parameters of the size that initialisation gives, no scale one and no bias zero."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = math.prod(leaf.shape[:-1])
        return jnp.asarray(rng.standard_normal(leaf.shape) / math.sqrt(fan_in) * 0.5 ** (leaf.ndim == 1), jnp.float32)

    return jax.tree.map(draw, build(part, name).abstract_params())


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def video(name, frames):
    side = 8 * CONFIGS[name].patch
    return jnp.tanh(normal(1, frames, side, side, 3))


def latent(name, frames):
    return normal(1, frames, 4, 4, CONFIGS[name].latent_channels)


# The network, its input, and four chunks after the first frame.
CLIPS = {"encoder": (Encoder, video, 9), "decoder": (Decoder, latent, 5)}


@functools.cache
def whole_clip(half, name):
    """(network, parameters, clip, result)."""
    part, make, frames = CLIPS[half]
    x = make(name, frames)
    return build(part, name), params(part, name), x, fast_jit(build(part, name).apply)(params(part, name), x)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("half", CLIPS)
def test_later_frames_change_nothing_before_them(half, name):
    """So the latent of a video begins with that of its first image."""
    network, params, x, whole = whole_clip(half, name)
    image = fast_jit(network.apply)(params, x[:, :1])
    assert relative(image, whole[:, :1]) < 1e-5  # float32, other order of sums


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("half", "frames_in", "frames_out"), [("encoder", 4, 2), ("decoder", 2, 4)])
def test_two_chunks_equal_one_of_twice_the_length(half, frames_in, frames_out, name, monkeypatch):
    network, params, x, whole = whole_clip(half, name)
    longer = functools.partial(vae.run_by_chunks, frames_in=frames_in, frames_out=frames_out)
    monkeypatch.setattr(vae, "run_by_chunks", lambda network, x, **_: longer(network, x))
    apply = lambda params, x: network.apply(params, x)  # noqa: E731 - a new function is traced anew
    assert relative(fast_jit(apply)(params, x), whole) < 1e-5


@pytest.mark.parametrize(("part", "make", "lengths"), [(Encoder, video, (5, 65)), (Decoder, latent, (3, 33))])
def test_a_longer_video_takes_the_same_program_and_memory(part, make, lengths):
    """One body for all chunks: as many convolutions and as much scratch memory, apart from a few kilobytes."""
    convolutions, memory = set(), []
    for length in lengths:
        lowered = fast_jit(build(part, "wan2.1").apply).lower(params(part, "wan2.1"), make("wan2.1", length))
        convolutions.add(lowered.as_text().count("stablehlo.convolution"))
        memory.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert len(convolutions) == 1
    assert memory[1] < 1.05 * memory[0]


@pytest.mark.parametrize("time_stride", [1, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_convolution_over_frames(window, time_stride):
    x, kernel = normal(2, 7, 5, 4, 3), normal(3, window, window, 3, 6)
    expected = lax.conv_general_dilated(
        x,
        kernel,
        (time_stride, 1, 1),
        [(0, 0), (window // 2,) * 2, (window // 2,) * 2],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    np.testing.assert_allclose(vae.convolve(x, kernel, time_stride), expected, rtol=1e-5, atol=1e-5)


def enlarge(x):
    """Stands in for a decoder: three pixels from one, along rows and columns."""
    return jnp.repeat(jnp.repeat(x, 3, axis=2), 3, axis=3)


@pytest.mark.parametrize("tiling", [(4, 3), (4, 4), (16, 9)], ids=str)
def test_tiles_of_a_network_that_sees_single_pixels_leave_no_seam(tiling):
    x = normal(1, 2, 11, 14, 2)
    size, stride = tiling
    found = fast_jit(functools.partial(vae.run_by_tiles, enlarge, size=size, stride=stride))(x)
    np.testing.assert_allclose(found, enlarge(x), atol=1e-6)


def test_overlaps_go_linearly_from_one_tile_to_the_next():
    tiles = iter([0.0, 1.0, 2.0])
    found = vae.run_by_tiles(lambda x: jnp.full_like(x, next(tiles)), normal(1, 1, 3, 10, 1), size=6, stride=4)
    np.testing.assert_allclose(found[0, 0, 1, :, 0], [0, 0, 0, 0, 0, 0.5, 1, 1, 1, 1.5], atol=1e-6)


def test_each_shape_of_tile_compiles_once(monkeypatch):
    x = normal(1, 1, 1, 16, CONFIGS["wan2.1"].latent_channels)  # five tiles of 4 columns, then one of 1
    traced = []
    run_chunk = Decoder.run_chunk
    monkeypatch.setattr(
        Decoder, "run_chunk", lambda self, x, past: (traced.append(x.shape), run_chunk(self, x, past))[1]
    )
    build(Decoder, "wan2.1").apply(params(Decoder, "wan2.1"), x, tiling=Tiling(size=4, stride=3))
    assert [shape[3] for shape in traced] == [4, 1]


def test_tiles_must_not_leave_gaps():
    with pytest.raises(ValueError, match="stride=5 must be from 1 to size=4"):
        vae.run_by_tiles(enlarge, normal(1, 1, 8, 8, 1), size=4, stride=5)


@pytest.mark.parametrize("half", CLIPS)
def test_bfloat16_is_close_to_float32(half):
    """Within a few of its round-offs (4e-3), and further away than float32's."""
    _, params, x, exact = whole_clip(half, "wan2.1")
    rounded = fast_jit(build(CLIPS[half][0], "wan2.1", jnp.bfloat16).apply)(params, x)
    assert rounded.dtype == jnp.float32
    assert 1e-3 < relative(rounded, exact) < 5e-2


def test_bfloat16_keeps_parameters_in_float32():
    leaves = jax.tree.leaves(build(VAE, "wan2.2", jnp.bfloat16).abstract_params())
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def full_size(preset, part):
    network = functional(lambda rngs: part(PRESETS[preset], dtype=jnp.bfloat16, rngs=rngs))
    return lambda shape: (
        jax.eval_shape(network.apply, network.abstract_params(), jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    )


@pytest.mark.parametrize(
    ("preset", "pixels", "latents"),
    [
        ("wan2.1", (1, 81, 480, 832, 3), (1, 21, 60, 104, 16)),
        ("wan2.2", (1, 121, 704, 1280, 3), (1, 31, 44, 80, 48)),
    ],
)
def test_shapes_of_the_published_resolutions(preset, pixels, latents):
    assert full_size(preset, Encoder)(pixels) == latents
    assert full_size(preset, Decoder)(latents) == pixels


@pytest.mark.parametrize(
    ("part", "shape", "message"),
    [
        (Encoder, (1, 4, 16, 16, 3), r"video of 4 frames must have 1 \+ 2 k of them"),
        (Encoder, (1, 5, 15, 16, 3), "video of 15 x 16 pixels must have multiples of 2"),
        (Decoder, (1, 2, 2, 2, 48), "latent has 48 channels, the decoder takes 16: check the preset"),
    ],
)
def test_what_does_not_fit_is_an_error(part, shape, message):
    network = build(part, "wan2.1")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.apply, network.abstract_params(), jnp.zeros(shape))


def convolution(name, out_dim, in_dim, *window):
    return {f"{name}.weight": (out_dim, in_dim, *window), f"{name}.bias": (out_dim,)}


def residual_block(name, in_dim, out_dim):
    shapes = {f"{name}.residual.0.gamma": (in_dim, 1, 1, 1), f"{name}.residual.3.gamma": (out_dim, 1, 1, 1)}
    shapes |= convolution(f"{name}.residual.2", out_dim, in_dim, 3, 3, 3)
    shapes |= convolution(f"{name}.residual.6", out_dim, out_dim, 3, 3, 3)
    return shapes | (convolution(f"{name}.shortcut", out_dim, in_dim, 1, 1, 1) if in_dim != out_dim else {})


def half(name, in_dim, out_dim, ends, middle):
    """What encoder and decoder have in common: first and last layer, and the middle."""
    shapes = convolution(f"{name}.conv1", ends[0], in_dim, 3, 3, 3)
    shapes |= {f"{name}.head.0.gamma": (ends[1], 1, 1, 1)}
    shapes |= convolution(f"{name}.head.2", out_dim, ends[1], 3, 3, 3)
    shapes |= residual_block(f"{name}.middle.0", middle, middle) | residual_block(f"{name}.middle.2", middle, middle)
    shapes |= {f"{name}.middle.1.norm.gamma": (middle, 1, 1)}
    shapes |= convolution(f"{name}.middle.1.to_qkv", 3 * middle, middle, 1, 1)
    return shapes | convolution(f"{name}.middle.1.proj", middle, middle, 1, 1)


def published_wan21():
    """The tensors of Wan2.1_VAE.pth: blocks are counted through the levels."""
    shapes = convolution("conv1", 32, 32, 1, 1, 1) | convolution("conv2", 16, 16, 1, 1, 1)
    shapes |= half("encoder", 3, 32, (96, 384), 384) | half("decoder", 16, 3, (384, 96), 384)
    down = [(96, 96), (96, 96), None, (96, 192), (192, 192), None, (192, 384), (384, 384), None, *[(384, 384)] * 2]
    for number, dims in enumerate(down):
        if dims:
            shapes |= residual_block(f"encoder.downsamples.{number}", *dims)
    for number, dim in ((2, 96), (5, 192), (8, 384)):
        shapes |= convolution(f"encoder.downsamples.{number}.resample.1", dim, dim, 3, 3)
    for number, dim in ((5, 192), (8, 384)):
        shapes |= convolution(f"encoder.downsamples.{number}.time_conv", dim, dim, 3, 1, 1)
    up = [*[(384, 384)] * 3, None, (192, 384), *[(384, 384)] * 2, None, *[(192, 192)] * 3, None, *[(96, 96)] * 3]
    for number, dims in enumerate(up):
        if dims:
            shapes |= residual_block(f"decoder.upsamples.{number}", *dims)
    for number, dim in ((3, 384), (7, 384), (11, 192)):
        shapes |= convolution(f"decoder.upsamples.{number}.resample.1", dim // 2, dim, 3, 3)
    for number in (3, 7):
        shapes |= convolution(f"decoder.upsamples.{number}.time_conv", 768, 384, 3, 1, 1)
    return shapes


def published_wan22():
    """The tensors of Wan2.2_VAE.pth: levels hold their blocks."""
    shapes = convolution("conv1", 96, 96, 1, 1, 1) | convolution("conv2", 48, 48, 1, 1, 1)
    shapes |= half("encoder", 12, 96, (160, 640), 640) | half("decoder", 48, 12, (1024, 256), 1024)
    for level, (in_dim, dim) in enumerate([(160, 160), (160, 320), (320, 640), (640, 640)]):
        name = f"encoder.downsamples.{level}.downsamples"
        shapes |= residual_block(f"{name}.0", in_dim, dim) | residual_block(f"{name}.1", dim, dim)
        if level < 3:
            shapes |= convolution(f"{name}.2.resample.1", dim, dim, 3, 3)
        if level in (1, 2):
            shapes |= convolution(f"{name}.2.time_conv", dim, dim, 3, 1, 1)
    for level, (in_dim, dim) in enumerate([(1024, 1024), (1024, 1024), (1024, 512), (512, 256)]):
        name = f"decoder.upsamples.{level}.upsamples"
        shapes |= residual_block(f"{name}.0", in_dim, dim)
        shapes |= residual_block(f"{name}.1", dim, dim) | residual_block(f"{name}.2", dim, dim)
        if level < 3:
            shapes |= convolution(f"{name}.3.resample.1", dim, dim, 3, 3)
        if level in (0, 1):
            shapes |= convolution(f"{name}.3.time_conv", 2 * dim, dim, 3, 1, 1)
    return shapes


@pytest.mark.parametrize(
    ("preset", "published", "total"),
    [("wan2.1", published_wan21(), 126_892_531), ("wan2.2", published_wan22(), 704_688_668)],
)
def test_a_preset_has_the_tensors_of_the_published_file(preset, published, total):
    """Published as 127M and 705M parameters."""
    leaves = flat(functional(lambda rngs: VAE(PRESETS[preset], rngs=rngs)).abstract_params())
    tables = {layout: vae_table(PRESETS[preset], layout) for layout in ("wan", "diffusers")}
    places = {key: dict(table(path, leaf.shape) for path, leaf in leaves.items()) for key, table in tables.items()}
    assert places["wan"] == published
    for shapes in places.values():
        assert sum(math.prod(shape) for shape in shapes.values()) == total


@pytest.fixture
def tensors():
    return published_tensors({"decoder": params(Decoder, "wan2.1")}, vae_table(CONFIGS["wan2.1"], "wan"))


def collect(tensors):
    abstract = {"decoder": build(Decoder, "wan2.1").abstract_params()}
    return params_from_published(tensors, abstract, vae_table(CONFIGS["wan2.1"], "wan"), source="some.pth")


def test_parameters_come_back_bit_for_bit(tensors):
    jax.tree.map(np.testing.assert_array_equal, collect(tensors), {"decoder": params(Decoder, "wan2.1")})


def test_every_tensor_that_does_not_fit_is_named(tensors):
    del tensors["conv2.bias"]
    tensors["conv3.bias"] = np.zeros(3)
    tensors["decoder.conv1.bias"] = np.zeros(3)
    with pytest.raises(UserError, match=r"some\.pth does not fit the network, nothing was loaded: ") as error:
        collect(tensors)
    faults = str(error.value).partition("loaded: ")[2].split("; ")
    assert faults == [
        "missing conv2.bias",
        "decoder.conv1.bias has shape (3,), the network takes (6,)",
        "unexpected conv3.bias",
    ]
