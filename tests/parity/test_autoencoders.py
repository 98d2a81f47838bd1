"""The autoencoders against diffusers' AutoencoderKLWan, with random weights, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from naming import published_tensors
from theirs import create_autoencoder, create_random

from rcm_jax.convert.places import params_from_published
from rcm_jax.convert.vae import vae_table
from rcm_jax.models.functional import functional
from rcm_jax.models.vae import PRESETS, VAE, Decoder, Encoder, Tiling

# Relative to the norm of the whole result: float32's round-off through thirty layers is about 1e-6.
TOLERANCE = 1e-5
CONFIGS = {
    "wan2.1": dataclasses.replace(PRESETS["wan2.1"], encoder_dim=8, decoder_dim=8),
    "wan2.2": dataclasses.replace(PRESETS["wan2.2"], encoder_dim=8, decoder_dim=12),
}


@functools.cache
def theirs(name):
    """diffusers' network, its norms and biases moved away from one and zero."""
    return create_random(lambda: create_autoencoder(CONFIGS[name]))


def tensors(name):
    return {key: tensor.numpy() for key, tensor in theirs(name).state_dict().items()}


def abstract_params(name):
    return functional(lambda rngs: VAE(CONFIGS[name], rngs=rngs)).abstract_params()


@functools.cache
def params(name):
    return params_from_published(tensors(name), abstract_params(name), vae_table(CONFIGS[name], "diffusers"))


def run(name, part, x, tiling=None):
    """Our encoder or decoder with diffusers' weights."""
    cls = {"encoder": Encoder, "decoder": Decoder}[part]
    apply = functional(lambda rngs: cls(CONFIGS[name], rngs=rngs)).apply
    # The program runs for milliseconds and compiles for seconds.
    fast = jax.jit(functools.partial(apply, tiling=tiling), compiler_options={"xla_backend_optimization_level": 0})
    return fast(params(name)[part], jnp.asarray(x))


def video(frames, rows, columns):
    return np.random.default_rng(0).uniform(-1, 1, (2, frames, rows, columns, 3)).astype(np.float32)


def latent(name, frames, rows, columns):
    shape = (2, frames, rows, columns, CONFIGS[name].latent_channels)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def channels_last(x):
    return x.permute(0, 2, 3, 4, 1).numpy()


def channels_first(x):
    return torch.from_numpy(np.asarray(x)).permute(0, 4, 1, 2, 3)


def encode_theirs(name, x):
    with torch.no_grad():
        mean = channels_last(theirs(name).encode(channels_first(x)).latent_dist.mean)
    return (mean - np.array(CONFIGS[name].latent_mean)) / np.array(CONFIGS[name].latent_std)


def decode_theirs(name, z):
    z = z * np.array(CONFIGS[name].latent_std, np.float32) + np.array(CONFIGS[name].latent_mean, np.float32)
    with torch.no_grad():
        return channels_last(theirs(name).decode(channels_first(z)).sample)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("name", CONFIGS)
def test_encode(name, frames):
    x = video(frames, 32, 48)
    assert_close(run(name, "encoder", x), encode_theirs(name, x))


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_decode(name, frames):
    z = latent(name, frames, 3, 4)
    expected = decode_theirs(name, z)
    assert (np.abs(expected) < 1).mean() > 0.5  # the clip to [-1, 1] hides little
    assert_close(run(name, "decoder", z), expected)


@pytest.fixture
def their_tiles(monkeypatch):
    """Makes diffusers tile: squares of `size` pixels, `stride` apart."""

    def tile(name, size, stride):
        monkeypatch.setattr(theirs(name), "use_tiling", True)
        for axis in ("height", "width"):
            monkeypatch.setattr(theirs(name), f"tile_sample_min_{axis}", size)
            monkeypatch.setattr(theirs(name), f"tile_sample_stride_{axis}", stride)

    return tile


@pytest.mark.parametrize("name", CONFIGS)
def test_tiled_encode(name, their_tiles):
    """Two rows of two tiles, cut at the edges. diffusers counts the tile in patches here."""
    their_tiles(name, size=32, stride=24)
    x = video(1, 40 * CONFIGS[name].patch, 48 * CONFIGS[name].patch)
    assert_close(run(name, "encoder", x, Tiling(size=4, stride=3)), encode_theirs(name, x))


@pytest.mark.parametrize("name", CONFIGS)
def test_tiled_decode(name, their_tiles):
    """diffusers counts the tile in pixels here."""
    block = 8 * CONFIGS[name].patch
    their_tiles(name, size=4 * block, stride=3 * block)
    z = latent(name, 1, 5, 6)
    assert_close(run(name, "decoder", z, Tiling(size=4, stride=3)), decode_theirs(name, z))


def test_wan_names_are_those_that_diffusers_converts():
    """From Wan2.1_VAE.pth's names, diffusers' own converter arrives at diffusers'."""
    converted = convert_wan_vae_to_diffusers(published_tensors(params("wan2.1"), vae_table(CONFIGS["wan2.1"], "wan")))
    assert converted.keys() == tensors("wan2.1").keys()
    for key, tensor in tensors("wan2.1").items():
        np.testing.assert_array_equal(converted[key], tensor)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_weights_are_diffusers_bit_for_bit(name):
    published = published_tensors(params(name), vae_table(CONFIGS[name], "diffusers"))
    assert published.keys() == tensors(name).keys()
    for key, tensor in tensors(name).items():
        np.testing.assert_array_equal(published[key], tensor)
