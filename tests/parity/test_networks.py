"""The diffusion transformers against diffusers' models that hold the same weights: values, tangents, names and sizes.

Tolerance: both sides compute in float32 (unit round-off 6e-8), in different orders, through two blocks: 1e-5 is some
150 round-offs, and an error in any formula is larger by orders of magnitude.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.models.transformers import transformer_cosmos
from naming import wan_of_diffusers
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm_jax.convert import cosmos as cosmos_names
from rcm_jax.convert import wan as wan_names
from rcm_jax.convert.names import collect_params, rename_params
from rcm_jax.models.cosmos import CosmosConfig
from rcm_jax.models.presets import PRESETS, create_network

# These programs run for milliseconds and compile for seconds.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

TOLERANCE = 1e-5

SMALL = {"dim": 48, "heads": 2, "layers": 2, "text_dim": 10}
SMALL_WAN = SMALL | {"ffn_dim": 96}
CONFIGS = {
    "wan2.1-t2v-1.3b": SMALL_WAN,
    "wan2.1-i2v-14b": SMALL_WAN | {"image_tokens": 5, "image_dim": 20},
    "wan2.2-i2v-a14b": SMALL_WAN,
    "wan2.2-ti2v-5b": SMALL_WAN,
    "cosmos-predict2-t2i-0.6b": SMALL | {"lora_dim": 4},
    "cosmos-predict2-v2w-14b": SMALL | {"lora_dim": 4},
}
CONFIGS = {name: dataclasses.replace(PRESETS[name], **changes) for name, changes in CONFIGS.items()}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_params(config):
    """No bias is zero and no scale one."""
    leaves, structure = jax.tree.flatten(create_network(config).abstract_params())
    return structure.unflatten([0.3 * normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])


def create_model(config):
    """diffusers' model of a config."""
    return create_cosmos(config) if isinstance(config, CosmosConfig) else create_wan(config)


def create_cosmos(config):
    model = diffusers.CosmosTransformer3DModel.from_config(cosmos_names.diffusers_settings(config))
    for block in model.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            # NVIDIA's epsilon. diffusers does not set it and gets the default of its attention, 1e-5.
            attention.norm_q.eps = attention.norm_k.eps = 1e-6
    return model


def create_wan(config):
    model = diffusers.WanTransformer3DModel.from_config(wan_names.diffusers_settings(config))
    model.condition_embedder.timesteps_proj = Sinusoids(config.time_dim // 2)
    return model


class Sinusoids(torch.nn.Module):
    """Wan's, in float64 as in its own code. diffusers rounds angles of up to 1000 to float32, which is off by 3e-5."""

    def __init__(self, frequencies):
        super().__init__()
        self.frequencies = frequencies

    def forward(self, time):
        exponents = torch.arange(self.frequencies, dtype=torch.float64) / self.frequencies
        angles = time.double()[:, None] * 10000.0**-exponents
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def to_torch(array):
    return torch.from_numpy(np.array(array))


def to_video(array_BTHWC):
    """As (B, C, T, H, W)."""
    return to_torch(np.moveaxis(array_BTHWC, -1, 1))


def from_video(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    """What diffusers' Cosmos needs of torchvision, which is not installed: resizing to the nearest neighbour."""
    resize = lambda x, size, interpolation: torch.nn.functional.interpolate(x, size, mode=interpolation)  # noqa: E731
    stub = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_cosmos, "transforms", stub, raising=False)
        yield


class Pair(NamedTuple):
    """A network, diffusers' model of the same weights, both as functions of a latent and its time, and such inputs.

    Ours takes (x_BTHWC, time, mode), theirs torch's (x_BCTHW, time).
    """

    config: Any
    params: Any
    model: torch.nn.Module
    ours: Callable
    theirs: Callable
    x_BTHWC: jax.Array
    time: jax.Array


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    name = request.param
    config = CONFIGS[name]
    params, model = random_params(config), create_model(config)
    if isinstance(config, CosmosConfig):
        tensors, build = rename_params(params, cosmos_names.DIFFUSERS), cosmos_functions
    else:
        tensors, build = wan_of_diffusers(params, config), wan_functions
    model.load_state_dict({key: to_torch(tensor) for key, tensor in tensors.items()}, strict=True)
    frames = 1 if "t2i" in name else 3
    x, text = normal(1, 2, frames, 4, 8, config.out_channels), normal(2, 2, config.text_length, config.text_dim)
    time = jnp.array([130.25, 971.5])
    if "ti2v" in name or "v2w" in name:
        time = time[:, None] * jnp.array([[0.1, 1.0, 1.0]])  # the first frame is given
    return Pair(config, params, model, *build(config, params, model, x.shape, text), x, time)


def wan_functions(config, params, model, shape, text):
    condition = normal(3, *shape[:-1], config.in_channels - config.out_channels)
    image = normal(4, 2, config.image_tokens, config.image_dim) if config.image_tokens else None
    tokens_per_frame = shape[2] * shape[3] // 4

    def ours(x, time, mode):
        return create_network(config).apply(
            params, x, time, text, condition_BTHWC=condition, image_BND=image, mode=mode
        )

    def theirs(x, time):
        if time.ndim == 2:
            time = time.repeat_interleave(tokens_per_frame, dim=1)
        x = torch.cat([x, to_video(condition)], dim=1)
        return model(x, time, to_torch(text), None if image is None else to_torch(image)).sample

    return ours, theirs


def cosmos_functions(config, params, model, shape, text):
    condition = (normal(3, *shape[:-1], config.in_channels - config.out_channels - 1) > 0).astype(jnp.float32)
    padding = (normal(4, 1, *shape[2:4]) > 0).astype(jnp.float32)

    def ours(x, time, mode):
        repeated = jnp.repeat(padding, 2, axis=0)
        return create_network(config).apply(
            params, x, time, text, condition_BTHWC=condition, padding_BHW=repeated, mode=mode
        )

    def theirs(x, time):
        if time.ndim == 2:
            time = time[:, None, :, None, None]
        return model(
            x,
            time / 1000,
            to_torch(text),
            fps=24 if condition.size else None,  # at which diffusers leaves the rotary embedding of videos alone
            condition_mask=to_video(condition) if condition.size else None,
            padding_mask=to_torch(padding[:, None]),
        ).sample

    return ours, theirs


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_the_value_is_that_of_diffusers(pair):
    found = fast_jit(functools.partial(pair.ours, mode="reverse"))(pair.x_BTHWC, pair.time)
    with torch.no_grad():
        expected = pair.theirs(to_video(pair.x_BTHWC), to_torch(pair.time))
    assert relative_error(found, from_video(expected)) <= TOLERANCE


def test_the_tangent_is_that_of_diffusers(pair):
    """Along tangents of the latent and the time, by PyTorch's forward-mode differentiation."""
    primals = pair.x_BTHWC, pair.time
    tangents = normal(5, *pair.x_BTHWC.shape), normal(6, *pair.time.shape)
    forward = functools.partial(pair.ours, mode="forward")
    _, found = fast_jit(lambda primals, tangents: jax.jvp(forward, primals, tangents))(primals, tangents)
    with sdpa_kernel(SDPBackend.MATH):  # the only attention of PyTorch's that has a tangent
        _, expected = torch.func.jvp(pair.theirs, *((to_video(x), to_torch(time)) for x, time in (primals, tangents)))
    assert relative_error(found, from_video(expected)) <= TOLERANCE


def test_weights_come_back_from_diffusers_bit_by_bit(pair):
    table = (cosmos_names if isinstance(pair.config, CosmosConfig) else wan_names).DIFFUSERS
    tensors = {name: tensor.numpy() for name, tensor in pair.model.state_dict().items()}
    again = collect_params(tensors, create_network(pair.config).abstract_params(), table)
    assert jax.tree.structure(again) == jax.tree.structure(pair.params)
    jax.tree.map(np.testing.assert_array_equal, again, pair.params)


def test_diffusers_reads_our_files_in_the_original_layout(pair):
    """By its own converter of the published files, which is told what else NVIDIA's hold."""
    if isinstance(pair.config, CosmosConfig):
        tensors = rename_params(pair.params, cosmos_names.COSMOS)
        tensors = {f"net.{name}": tensor for name, tensor in tensors.items()}
        others = ("accum_iteration", "pos_embedder.seq", "blocks.0.self_attn.q_norm._extra_state")
        tensors |= {f"net.{name}": np.zeros(1) for name in others}
        converted = single_file_utils.convert_cosmos_transformer_checkpoint_to_diffusers(tensors)
    else:
        tensors = wan_names.wan_tensors(pair.params, pair.config, patch_layout="conv3d")
        converted = single_file_utils.convert_wan_transformer_to_diffusers(tensors)
    expected = pair.model.state_dict()
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(converted[name], tensor.numpy())


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"digits", "digits28"}))
def test_a_preset_has_as_many_parameters_as_diffusers_model(name):
    with torch.device("meta"):
        expected = sum(weight.numel() for weight in create_model(PRESETS[name]).parameters())
    params = create_network(PRESETS[name]).abstract_params()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == expected
