"""Every kind of network in both modes: against a plain loop over its blocks, in bfloat16, and with wrong inputs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from rcm_jax.models import blocks, cosmos, layers, wan
from rcm_jax.models.cosmos import CosmosConfig
from rcm_jax.models.presets import create_network
from rcm_jax.models.wan import WanConfig

# These programs run for milliseconds and compile for seconds.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Case(NamedTuple):
    config: Any
    latent: tuple[int, ...]
    time: jax.Array
    inputs: dict[str, jax.Array]

    def apply(self, params, x, time, *, mode="reverse", dtype=jnp.float32, remat="none"):
        text = normal(1, len(x), 5, self.config.text_dim)
        network = create_network(self.config, dtype=dtype, remat=remat)
        return network.apply(params, x, time, text, mode=mode, **self.inputs)

    @property
    def x(self):
        return normal(0, 2, *self.latent)


WAN = WanConfig(dim=48, ffn_dim=64, heads=2, layers=2, in_channels=3, out_channels=3, text_dim=10, time_dim=16)
COSMOS = CosmosConfig(
    dim=48, heads=2, layers=2, in_channels=5, out_channels=3, text_dim=10, lora_dim=4, rope_scale=(5 / 6, 2.0, 2.0)
)
ONE_TIME = jnp.array([130.25, 971.5])
FRAME_TIMES = jnp.array([[0.0, 130.25], [0.0, 971.5]])
CASES = {
    "wan with an image": Case(
        WanConfig(**vars(WAN) | {"in_channels": 5, "image_tokens": 4, "image_dim": 12}),
        (2, 4, 4, 3),
        ONE_TIME,
        {"image_BND": normal(2, 2, 4, 12), "condition_BTHWC": normal(3, 2, 2, 4, 4, 2)},
    ),
    "wan with a time for each frame": Case(WAN, (2, 4, 4, 3), FRAME_TIMES, {}),
    "cosmos of a video": Case(
        COSMOS,
        (2, 4, 4, 3),
        FRAME_TIMES,
        {"condition_BTHWC": normal(4, 2, 2, 4, 4, 1), "padding_BHW": normal(5, 2, 4, 4)},
    ),
}


@functools.cache
def random_params(config):
    """No bias is zero and no scale one."""
    leaves, structure = jax.tree.flatten(create_network(config).abstract_params())
    return structure.unflatten([0.3 * normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def params(case):
    return random_params(case.config)


def assert_close(ours, theirs, tolerance):
    """Leaf by leaf relative to its norm, or to a thousandth of all norms for leaves that are smaller."""
    ours, theirs = (jax.tree.leaves(jax.tree.map(lambda x: np.asarray(x, np.float64), tree)) for tree in (ours, theirs))
    floor = 1e-3 * np.sqrt(sum(np.linalg.norm(leaf) ** 2 for leaf in theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), floor)


def value_and_tangent(case, params, *, mode):
    """Along tangents of the latent and the time."""
    x_tangent, time_tangent = normal(7, *case.x.shape), normal(8, *case.time.shape)
    apply = lambda x, time: case.apply(params, x, time, mode=mode)  # noqa: E731
    return jax.jvp(apply, (case.x, case.time), (x_tangent, time_tangent))


def plain_blocks(block, params, x, time, text, *, mode, remat, ops):
    """blocks.run_blocks without its scan and derivative rules: a loop, and attention as its formula reads."""
    del mode, remat, ops
    attend = lambda q, k, v, keys: reference.forward(q, k, v, scale=q.shape[-1] ** -0.5)[0]  # noqa: E731
    inside = blocks.Inside(attend, keep=lambda y: y, tokens=x.shape[1])
    for layer in range(len(jax.tree.leaves(params)[0])):
        x = block(jax.tree.map(lambda leaf: leaf[layer], params), x, time, text, inside)  # noqa: B023
    return x


def test_forward_mode_gives_the_value_the_tangent_and_the_gradient(case, params, monkeypatch):
    """Of one forward pass; value and tangent are those of a plain loop, the gradient is that of the reverse mode."""

    def loss(params):
        value, tangent = value_and_tangent(case, params, mode="forward")
        return (value**2).sum(), (value, tangent)

    gradient, found = fast_jit(jax.grad(loss, has_aux=True))(params)
    plain = lambda params: (case.apply(params, case.x, case.time) ** 2).sum()  # noqa: E731
    assert_close(gradient, fast_jit(jax.grad(plain))(params), 1e-5)
    monkeypatch.setattr(wan, "run_blocks", plain_blocks)
    monkeypatch.setattr(cosmos, "run_blocks", plain_blocks)
    assert_close(found, fast_jit(lambda params: value_and_tangent(case, params, mode="reverse"))(params), 3e-6)


def test_bfloat16_is_close_to_float32(case, params):
    """Within a few of its round-offs (4e-3), and further away than float32's: the matrix products are bfloat16."""
    exact = fast_jit(case.apply)(params, case.x, case.time)
    rounded = fast_jit(functools.partial(case.apply, dtype=jnp.bfloat16))(params, case.x, case.time)
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 2e-2


@pytest.mark.parametrize("name", ["wan with a time for each frame", "cosmos of a video"])
def test_the_time_of_a_frame_is_the_time_of_each_of_its_tokens(name):
    case = CASES[name]
    params, apply = random_params(case.config), fast_jit(case.apply)
    frames = apply(params, case.x, case.time)
    np.testing.assert_allclose(apply(params, case.x, jnp.repeat(case.time, 4, axis=1)), frames, rtol=1e-5, atol=1e-5)
    same = jnp.repeat(ONE_TIME[:, None], 2, axis=1)
    np.testing.assert_allclose(apply(params, case.x, same), apply(params, case.x, ONE_TIME), rtol=1e-5, atol=1e-5)
    assert np.abs(frames - apply(params, case.x, same)).max() > 0.1


def test_cosmos_is_not_padded_by_default():
    case, zeros = CASES["cosmos of a video"], jnp.zeros((2, 4, 4))
    params = random_params(case.config)

    @fast_jit
    def apply(padding):
        return case._replace(inputs=case.inputs | {"padding_BHW": padding}).apply(params, case.x, case.time)

    default = apply(None)
    np.testing.assert_allclose(apply(zeros), default, rtol=1e-5, atol=1e-5)
    assert np.abs(apply(zeros + 1.0) - default).max() > 0.1


@pytest.mark.parametrize("axis", range(3))
def test_a_rope_scale_slows_the_slowest_pair_of_its_axis_by_that_factor(axis):
    """NTK scaling: frequencies b^(-2k / width) keep k = 0, and the last one is divided by the scale."""
    scale = [1.0, 1.0, 1.0]
    scale[axis] = 4.0
    plain, scaled = (
        CosmosConfig(dim=128, heads=1, layers=1, in_channels=4, rope_scale=tuple(each)) for each in ([1.0] * 3, scale)
    )
    width = layers.rotary_widths(128)[axis]
    slowest = lambda config: config.rotary_bases[axis] ** (-(width - 2) / width)  # noqa: E731
    assert slowest(plain) / slowest(scaled) == pytest.approx(4.0)
    assert slowest(plain) == pytest.approx(10000.0 ** (-(width - 2) / width))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("wan with an image", {"image_BND": None}, "image_BND has 0 tokens, the network takes 4"),
        ("wan with an image", {"image_BND": normal(0, 2, 3, 12)}, "image_BND has 3 tokens, the network takes 4"),
        ("wan with a time for each frame", {"image_BND": normal(0, 2, 4, 12)}, "the network takes 0: check the model"),
        ("cosmos of a video", {"condition_BTHWC": None}, "latent has 4 channels, the network takes 5"),
    ],
)
def test_a_missing_or_unwanted_input_is_an_error(name, changes, message):
    case = CASES[name]
    case = case._replace(inputs=case.inputs | changes)
    params = create_network(case.config).abstract_params()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: case.apply(params, case.x, case.time), params)


@pytest.mark.parametrize("name", ["wan with a time for each frame", "cosmos of a video"])
def test_times_that_do_not_divide_the_tokens_are_an_error(name):
    case = CASES[name]
    params = create_network(case.config).abstract_params()
    with pytest.raises(ValueError, match="3 times a sample must divide its 8 tokens: give one, or one a frame"):
        jax.eval_shape(lambda params: case.apply(params, case.x, jnp.zeros((2, 3))), params)


def test_cosmos_heads_must_hold_two_rotary_pairs_an_axis():
    with pytest.raises(ValueError, match="dim=20, heads=2 must give heads of an even width of 12 or more"):
        CosmosConfig(dim=20, heads=2, layers=1, in_channels=4, rope_scale=(1.0, 1.0, 1.0))
