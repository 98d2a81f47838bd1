"""The optimiser against optax's Adam and arithmetic by hand, the EMA against EDM2, and a run's first state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rcm_jax.state import create_optimizer, create_state, ema_exponent
from rcm_jax.steps import ema_decay

# Gradients keep away from 0, where Adam is discontinuous.
SHAPES = {"linear": {"kernel": (5, 3), "bias": (3,)}, "norm": {"scale": (5,)}, "modulation": (6, 5)}


def draw(seed):
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    random = np.random.default_rng(seed)
    arrays = [
        jnp.asarray(random.uniform(0.1, 2.0, shape) * random.choice([-1, 1], shape), jnp.float32) for shape in leaves
    ]
    return jax.tree.unflatten(structure, arrays)


def run(optimizer, updates):
    """Parameters after each of `updates` updates with gradients that change."""
    params, history = draw(0), []
    opt_state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(updates):
        change, opt_state = update(draw(step + 1), opt_state, params)
        params = optax.apply_updates(params, change)
        history.append(params)
    return history


def kernel_mask(params):
    return {"linear": {"kernel": True, "bias": False}, "norm": {"scale": False}, "modulation": False}


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_the_optimiser_is_adamw(b1):
    settings = {"b2": 0.95, "weight_decay": 0.1}
    ours = create_optimizer(1e-2, b1=b1, warmup=3, **settings)
    reference = optax.adamw(
        lambda count: 1e-2 * jnp.minimum((count + 1) / 3, 1.0), b1=b1, eps=1e-8, mask=kernel_mask, **settings
    )
    for step, (found, expected) in enumerate(zip(run(ours, 6), run(reference, 6), strict=True)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, err_msg=f"{step=}"), found, expected)  # noqa: B023


@pytest.mark.parametrize(("b1", "moments"), [(0.0, 1), (0.9, 2)])
def test_the_first_moment_is_stored_only_where_it_is_not_the_gradient(b1, moments):
    params = draw(0)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    opt_state = create_optimizer(1e-2, b1=b1).init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim) == moments * size


def test_weight_decay_shrinks_kernels_alone():
    params = draw(0)
    optimizer = create_optimizer(1e-2, weight_decay=0.5, warmup=1)
    change, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    decayed = jax.tree.map(lambda change, mask: bool((change != 0).any()) == mask, change, kernel_mask(params))
    assert all(jax.tree.leaves(decayed))
    np.testing.assert_allclose(change["linear"]["kernel"], -1e-2 * 0.5 * params["linear"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup": 0}, [1] * 10),
        ({"warmup": 1}, [1] * 10),
        ({"warmup": 2, "decay_from": 4, "decay_to": 8}, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ({"warmup": 0, "decay_from": 0, "decay_to": 10}, np.arange(10, 0, -1) / 10),
    ],
)
def test_the_rate_warms_up_and_decays(settings, expected):
    """Under a constant gradient Adam's step has the length of the rate."""
    optimizer = create_optimizer(1e-2, weight_decay=0.0, **settings)
    params = {"kernel": jnp.ones((2, 2))}
    opt_state, update, rates = optimizer.init(params), jax.jit(optimizer.update), []
    for _ in expected:
        change, opt_state = update({"kernel": jnp.full((2, 2), 3.0)}, opt_state, params)
        rates.append(-float(change["kernel"][0, 0]))
    np.testing.assert_allclose(rates, 1e-2 * np.asarray(expected), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("sigma_rel", "published"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_ema_exponent_gives_the_relative_width(sigma_rel, published):
    """EDM2's values, and its eq. 3: the standard deviation of the power law t^gamma on [0, 1]."""
    gamma = ema_exponent(sigma_rel)
    assert gamma == pytest.approx(published, abs=5e-3)
    assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1])
def test_the_ema_weighs_updates_by_a_power_law(sigma_rel):
    """Update k of N has the share of t^gamma that lies between k / N and (k + 1) / N."""
    gamma, total = ema_exponent(sigma_rel), 200
    with jax.enable_x64(True):
        beta = np.asarray(ema_decay(jnp.arange(total, dtype=jnp.float64), gamma))
    assert beta[0] == 0  # the first update is copied, so the start has no weight
    weights = (1 - beta) * np.append(np.cumprod(beta[:0:-1])[::-1], 1.0)
    edges = (np.arange(total + 1) / total) ** (gamma + 1)
    np.testing.assert_allclose(weights, np.diff(edges), rtol=1e-10)
    center = (np.arange(total) + 0.5) / total
    assert weights.sum() == pytest.approx(1)
    width = np.sqrt((weights * center**2).sum() - (weights * center).sum() ** 2)
    assert width == pytest.approx(sigma_rel, rel=1e-2)


def test_a_run_starts_from_copies_of_the_teacher():
    teacher, optimizer = draw(0), create_optimizer(1e-2)
    state = create_state(teacher, teacher, optimizer, optimizer)
    assert state.teacher is teacher
    for name in ("student", "ema", "fake"):
        copies = zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(teacher), strict=True)
        assert all((copy == leaf).all() for copy, leaf in copies), name
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim or leaf.dtype == jnp.int32]
    pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert len(pointers) == len(leaves)  # each may be donated
    counters = (state.iteration, state.student_updates, state.critic_updates, state.skipped)
    assert [int(counter) for counter in counters] == [0, 0, 0, 0]


def test_a_run_holds_only_the_networks_its_losses_need():
    params, optimizer = draw(0), create_optimizer(1e-2)
    alone = create_state(params, None, optimizer, None)
    assert (alone.teacher, alone.fake, alone.fake_opt) == (None, None, None)
    distilled = create_state(params, params, optimizer, None)
    assert distilled.teacher is params
    assert (distilled.fake, distilled.fake_opt) == (None, None)
