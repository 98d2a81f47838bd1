"""MeanFlow against a Gaussian whose flow, and so whose mean velocity over any interval, is known; float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax import sampling
from rcm_jax.mean_flow import draw_interval, mean_flow_loss, mixed_velocity

SHAPE = (4, 2, 3, 3, 2)
S, SPAN = np.array([0.3, 0.7, 0.9, 1.0]), np.array([0.0, 0.2, 0.9, 1.0])
STD = 0.5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPE))


def spread(s):
    """Standard deviation of x_s for data N(0, STD^2)."""
    return jnp.sqrt(((1 - s) * STD) ** 2 + s**2)


def velocity(x, s_B):
    """Its RF velocity, d log(spread) / ds times x."""
    s = s_B.reshape(-1, 1, 1, 1, 1)
    return (s - (1 - s) * STD**2) / spread(s) ** 2 * x


def mean_velocity(x, s_B, span_B):
    """(x_s - x_(s - span)) / span, where the flow keeps x_s / spread(s); its limit at span 0."""
    s, span = (each.reshape(-1, 1, 1, 1, 1) for each in (s_B, span_B))
    safe = jnp.where(span == 0, 1.0, span)
    return jnp.where(span == 0, velocity(x, s_B), (1 - spread(s - safe) / spread(s)) / safe * x)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_gradient_vanishes_at_the_true_mean_velocity(power):
    def loss(scale):
        student = lambda x, s, span: scale * mean_velocity(x, s, span)  # noqa: E731
        arrays = STD * normal(1), normal(2), jnp.asarray(S), jnp.asarray(SPAN)
        return mean_flow_loss(student, velocity, *arrays, 1.0, power)

    np.testing.assert_allclose(loss(1.0), 0, atol=1e-20)
    np.testing.assert_allclose(jax.jacfwd(loss)(1.0), 0, atol=1e-9)
    assert (loss(0.9) > 1e-6).all()


def test_at_span_zero_it_is_flow_matching():
    """The weighted square of u - v, whatever the derivative."""
    student = lambda x, s, span: jnp.sin(x) + (s + span).reshape(-1, 1, 1, 1, 1)  # noqa: E731
    x0, noise, s_B = normal(1), normal(2), jnp.asarray(S)
    loss = mean_flow_loss(student, lambda x, s: noise - x0, x0, noise, s_B, jnp.zeros(4), 1.0, 0.5)
    s = S.reshape(-1, 1, 1, 1, 1)
    square = ((student((1 - s) * x0 + s * noise, s_B, jnp.zeros(4)) - (noise - x0)) ** 2).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(loss, square / np.sqrt(square + 1e-3), rtol=1e-12)


def test_a_broken_sample_has_no_loss_and_leaves_the_others_as_they_were():
    arrays = normal(2), jnp.asarray(S), jnp.asarray(SPAN), 1.0, 1.0
    student = lambda x, s, span: 0.5 * mean_velocity(x, s, span)  # noqa: E731
    broken = lambda x, s: velocity(x, s).at[1, 0, 0, 0, 0].set(jnp.nan)  # noqa: E731
    found, expected = (mean_flow_loss(student, v, normal(1), *arrays) for v in (broken, velocity))
    np.testing.assert_array_equal(found, expected.at[1].set(0.0))


def test_the_velocity_without_a_teacher_is_guided_where_asked():
    """Equation 19: w (noise - x0) + (1 - w) u(x, s, 0)."""
    x0, noise, x = normal(1), normal(2), normal(3)
    found = mixed_velocity(mean_velocity, x0, noise, jnp.array([1.0, 1.0, 3.0, 3.0]))(x, jnp.asarray(S))
    np.testing.assert_allclose(found[:2], (noise - x0)[:2], rtol=1e-12)
    np.testing.assert_allclose(found[2:], (3 * (noise - x0) - 2 * velocity(x, jnp.asarray(S)))[2:], rtol=1e-12)


@pytest.mark.parametrize("times", [(1.0, 0.0), (1.0, 0.6, 0.2, 0.0)])
def test_any_number_of_jumps_of_the_true_mean_velocity_is_the_flow(times):
    x = sampling.mean_flow(mean_velocity, jnp.arange(3), SHAPE[1:], times)
    noise = sampling.sample_noise(jnp.arange(3), SHAPE[1:], 0)
    np.testing.assert_allclose(x, STD * noise, rtol=1e-12)


def test_an_interval_lies_between_two_times_of_p_g_in_its_share_of_samples():
    keys = jax.random.split(jax.random.key(0), 20_000)
    s, span = jax.vmap(lambda key: draw_interval(key, 0.5, 1.2, 0.3))(keys)
    assert ((span >= 0) & (span <= s)).all()
    assert abs((span > 0).mean() - 0.3) < 0.015  # four standard deviations
    later = np.random.default_rng(0).normal(0.5, 1.2, (2, 20_000)).max(axis=0)  # log sigma = logit(s)
    assert abs(np.log(s / (1 - s)).mean() - later.mean()) < 0.05
