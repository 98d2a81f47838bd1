"""The Wan network: its parts against float64 formulas, its two modes against a plain loop, its size against Wan's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import portable, reference
from rcm_jax.models import blocks, layers, wan
from rcm_jax.models.functional import functional
from rcm_jax.models.wan import Wan, WanConfig

CONFIG = WanConfig(dim=48, ffn_dim=96, heads=2, layers=2, in_channels=3, out_channels=3, text_dim=10, text_length=5)
LATENT = (2, 4, 4, 3)  # 8 tokens
ATTENTIONS = 2 * CONFIG.layers


# These programs run for milliseconds and compile for seconds.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def build(config=CONFIG, **settings):
    return functional(lambda rngs: Wan(config, rngs=rngs, **settings))


@functools.cache
def compiled(**settings):
    return fast_jit(build(**settings).apply, static_argnames="mode")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, X_TANGENT, WEIGHT = (normal(seed, 2, *LATENT) for seed in range(3))
TIME, TIME_TANGENT = jnp.array([130.25, 971.5]), jnp.array([0.7, -1.3])
TEXT = normal(3, 2, CONFIG.text_length, CONFIG.text_dim)


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params():
    """Initial parameters, moved so that no bias is zero and no scale one."""
    init = fast_jit(build().init)(jax.random.key(0))
    leaves, structure = jax.tree.flatten(init)
    return structure.unflatten([leaf + 0.1 * normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])


def weigh(out):
    """A loss that treats every element differently."""
    return (out * WEIGHT).sum() + 0.5 * (out**2).sum()


def reverse_gradient(remat):
    """(params, x) -> gradient, in reverse mode."""
    net = build(remat=remat)
    return jax.grad(lambda params, x: weigh(net.apply(params, x, TIME, TEXT)), argnums=(0, 1))


def value_and_tangent(params, x=X, remat="none"):
    """Of the forward mode, along tangents of the latent and the time."""
    apply = lambda x, time: build(remat=remat).apply(params, x, time, TEXT, mode="forward")  # noqa: E731
    return jax.jvp(apply, (x, TIME), (X_TANGENT, TIME_TANGENT))


def shared_gradient(remat):
    """(params, x) -> gradient of the primal of the jvp, and the tangent that came with it."""

    def loss(params, x):
        value, tangent = value_and_tangent(params, x, remat)
        return weigh(value), tangent

    return jax.grad(loss, argnums=(0, 1), has_aux=True)


@pytest.fixture(scope="module")
def gradient(params):
    """The plain gradient, which every other way to get it must equal."""
    with jax.default_matmul_precision("highest"):
        return fast_jit(reverse_gradient("none"))(params, X)


def assert_close(ours, theirs, tolerance):
    """Relative to the norm of the leaf, or to a thousandth of the whole for leaves that are smaller."""
    ours, theirs = (jax.tree.leaves(jax.tree.map(lambda x: np.asarray(x, np.float64), tree)) for tree in (ours, theirs))
    whole = math.sqrt(sum(np.linalg.norm(leaf) ** 2 for leaf in theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-3 * whole)


def plain_blocks(block, params, x, modulation, text, *, mode, remat, ops):
    """blocks.run_blocks without its scan and derivative rules: a loop, and attention as its formula reads."""
    del mode, remat, ops
    attend = lambda q, k, v, keys: reference.forward(q, k, v, scale=q.shape[-1] ** -0.5)[0]  # noqa: E731
    inside = blocks.Inside(attend, keep=lambda y: y, tokens=x.shape[1])
    for layer in range(CONFIG.layers):
        x = block(jax.tree.map(lambda leaf: leaf[layer], params), x, modulation, text, inside)  # noqa: B023
    return x


@pytest.fixture(scope="module")
def plain(params):
    """The value and tangent of a plain loop over the blocks."""
    apply = lambda x, time: build().apply(params, x, time, TEXT)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        patch.setattr(wan, "run_blocks", plain_blocks)
        return fast_jit(lambda *args: jax.jvp(apply, args[:2], args[2:]))(X, TIME, X_TANGENT, TIME_TANGENT)


def test_both_modes_and_the_tangent_equal_a_plain_loop_over_the_blocks(params, plain):
    value, tangent = plain
    assert_close(compiled()(params, X, TIME, TEXT, mode="reverse"), value, 1e-6)
    assert_close(compiled()(params, X, TIME, TEXT, mode="forward"), value, 1e-6)
    found = fast_jit(value_and_tangent)(params)
    assert_close(found[0], value, 1e-6)
    assert_close(found[1], tangent, 3e-6)


@pytest.fixture
def calls(monkeypatch):
    """How often compiled programs ran each function of the portable attention."""
    count = dict.fromkeys(("forward", "forward_with_tangent", "backward"), 0)

    def counted(name, function):
        def tick(x):
            count[name] += 1
            return np.zeros_like(x)

        def run(*args, **kwargs):
            results = function(*args, **kwargs)
            # Added to the results, so that it runs where one of them is needed and only there.
            zero = jax.pure_callback(tick, jax.ShapeDtypeStruct((), results[0].dtype), results[0].ravel()[0])
            return tuple(result + zero for result in results)

        return run

    for name in count:
        monkeypatch.setattr(portable, name, counted(name, getattr(portable, name)))
    return count


FORWARDS = {"none": 1, "linear": 1, "attention": 1, "block": 2, "offload": 1}  # attention's, of each policy


@pytest.mark.parametrize(("remat", "forwards"), FORWARDS.items())
def test_a_remat_policy_keeps_the_gradient_and_only_block_runs_attention_again(
    remat, forwards, params, gradient, calls
):
    found = fast_jit(reverse_gradient(remat))(params, X)
    assert_close(found, gradient, 1e-5)
    assert calls == {"forward": forwards * ATTENTIONS, "forward_with_tangent": 0, "backward": ATTENTIONS}


@pytest.mark.parametrize(("remat", "forwards"), FORWARDS.items())
def test_one_forward_pass_gives_value_tangent_and_the_plain_gradient(remat, forwards, params, gradient, plain, calls):
    found, tangent = fast_jit(shared_gradient(remat))(params, X)
    assert_close(found, gradient, 1e-5)
    assert_close(tangent, plain[1], 3e-6)
    counts = {"forward": (forwards - 1) * ATTENTIONS, "forward_with_tangent": ATTENTIONS, "backward": ATTENTIONS}
    assert calls == counts


def test_blocks_in_the_hosts_memory_change_nothing(params, gradient):
    net = build(remat="attention", ops=blocks.from_host(blocks.WHOLE))
    params = params | {"blocks": jax.device_put(params["blocks"], jax.memory.Space.Host)}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params["blocks"])} == {"pinned_host"}
    loss = lambda params, x: weigh(net.apply(params, x, TIME, TEXT))  # noqa: E731
    found = fast_jit(jax.grad(loss, argnums=(0, 1)))(params, X)
    assert_close(found, gradient, 1e-5)


def test_products_are_made_again_unless_the_policy_keeps_them(params):
    """By XLA's count of operations, which takes the body of a loop once: a block's products, rows x in x out x 2."""

    def count(remat):
        return fast_jit(shared_gradient(remat)).lower(params, X).compile().cost_analysis()["flops"]

    rows, text_rows, c = 2 * 8, 2 * CONFIG.text_length, CONFIG
    products = 2 * (rows * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim) + text_rows * 2 * c.dim**2)
    assert count("attention") - count("linear") == pytest.approx(products, rel=0.05)  # and a few elements
    assert count("none") == count("linear")


@pytest.mark.parametrize("wrt", ["parameters", "latent"])
def test_plain_grad_in_forward_mode_names_the_other_mode(wrt, params):
    loss = lambda params, x: build().apply(params, x, TIME, TEXT, mode="forward").sum()  # noqa: E731
    argument = ("parameters", "latent").index(wrt)
    with pytest.raises(TypeError, match="call the network with mode='reverse'"):
        jax.grad(loss, argnums=argument)(params, X)


def test_a_jvp_in_reverse_mode_names_the_other_mode(params):
    with pytest.raises(TypeError, match=r"for jax\.jvp call the network with mode='forward'"):
        jax.jvp(lambda x: build().apply(params, x, TIME, TEXT), (X,), (X_TANGENT,))


@pytest.mark.parametrize(
    ("mode", "remat", "setting"), [("both", "none", "mode='both'"), ("reverse", "all", "remat='all'")]
)
def test_an_unknown_mode_or_policy_is_an_error(mode, remat, setting):
    unchecked = blocks.run_blocks.__wrapped__  # without the type checker, as users run it
    with pytest.raises(ValueError, match=f"{setting} must be "):
        unchecked(plain_blocks, {}, X, X, TEXT, mode=mode, remat=remat, ops=blocks.WHOLE)


def test_bfloat16_is_close_to_float32(params):
    """Within a few of its round-offs (4e-3), and further away than float32's: the matrix products are bfloat16."""
    exact = compiled()(params, X, TIME, TEXT)
    rounded = compiled(dtype=jnp.bfloat16)(params, X, TIME, TEXT)
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 2e-2


def test_bfloat16_keeps_time_norms_and_parameters_in_float32():
    """Only the linear layers of blocks, patches and caption compute in bfloat16."""
    model = nnx.eval_shape(lambda: Wan(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear | nnx.LayerNorm | nnx.RMSNorm):
            half = isinstance(module, nnx.Linear) and path[0] in ("blocks", "patch_embedding", "text_embedding")
            assert module.dtype == (jnp.bfloat16 if half else jnp.float32), path
    assert {leaf.dtype for leaf in jax.tree.leaves(build(dtype=jnp.bfloat16).abstract_params())} == {
        jnp.dtype("float32")
    }


def test_a_sample_does_not_depend_on_the_others_of_its_batch(params):
    apply = compiled()
    changed = apply(params, X.at[0].mul(2.0), TIME.at[0].set(500.0), TEXT.at[0].add(1.0))
    whole = apply(params, X, TIME, TEXT)
    np.testing.assert_array_equal(changed[1], whole[1])
    assert np.abs(changed[0] - whole[0]).max() > 0.1


TIMES = np.concatenate([np.linspace(0, 1000, 997), [0.25, 999.999]]).astype(np.float32)


def exact_angles(dim):
    """Wan's: time x 10000^(-k / (dim / 2)), in float64; cosines first."""
    return TIMES.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))


def test_sinusoids_have_the_accuracy_of_float64():
    angles = exact_angles(256)
    found = fast_jit(layers.sinusoids, static_argnums=1)(jnp.asarray(TIMES)[:, None], 256)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[:, 0], np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=1e-6)


def test_sinusoids_have_an_accurate_derivative():
    times, angles = jnp.asarray(TIMES)[:, None], exact_angles(256)
    frequencies = 10000.0 ** (-np.arange(128) / 128)
    _, found = jax.jvp(lambda t: layers.sinusoids(t, 256), (times,), (jnp.ones_like(times),))
    exact = np.concatenate([-np.sin(angles) * frequencies, np.cos(angles) * frequencies], axis=1)
    np.testing.assert_allclose(found[:, 0], exact, atol=1e-6)


def test_the_rotary_table_is_44_42_42_over_time_rows_and_columns():
    """Of a head of 128: 22, 21 and 21 pairs, each axis with frequencies 10000^(-2 k / width)."""
    grid = (5, 30, 52)
    cos, sin = layers.rotary_table(grid, 128)
    token = np.arange(math.prod(grid))
    position = {44: token // (30 * 52), 42: token // 52 % 30}
    columns = [(44, position[44]), (42, position[42]), (42, token % 52)]
    angles = [p[:, None] * 10000.0 ** (-2.0 * np.arange(width // 2) / width) for width, p in columns]
    angles = np.concatenate(angles, axis=1)
    assert cos.shape == sin.shape == (len(token), 64)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)


def test_rotation_multiplies_interleaved_pairs_as_complex_numbers():
    x, angle = np.asarray(normal(5, 2, 6, 3, 8)), np.random.default_rng(6).uniform(0, 6, (6, 4))
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    turned = pairs * np.exp(1j * angle)[:, None]
    found = wan.rotate(jnp.asarray(x), (jnp.cos(angle.astype(np.float32)), jnp.sin(angle.astype(np.float32))))
    np.testing.assert_allclose(found[..., 0::2], turned.real, atol=1e-5)
    np.testing.assert_allclose(found[..., 1::2], turned.imag, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 4, 5), r"latent has 5 channels, the network takes 3"),
        ((2, 5, 4, 3), r"latent of \(2, 5, 4\) frames, rows, columns must divide into patches of \(1, 2, 2\)"),
    ],
)
def test_a_latent_that_does_not_fit_is_an_error(shape, message):
    net = build()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: net.apply(params, normal(0, 2, *shape), TIME, TEXT), net.abstract_params())


def test_heads_must_hold_rotary_pairs():
    with pytest.raises(ValueError, match=r"dim=50 must be a multiple of 2 \* heads=4"):
        WanConfig(dim=50, ffn_dim=96, heads=2, layers=2)
