"""The change of variables against its textbook formulas in float64, and the time distributions against SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from rcm_jax import trigflow

SHAPE = (9, 2, 3, 4, 2)
TIMES = np.linspace(0.0, np.pi / 2, SHAPE[0])  # both ends included


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPE), dtype)


def column(t_B):
    return np.asarray(t_B, np.float64).reshape(-1, 1, 1, 1, 1)


def wobbly(x, time_B):
    """Some network: depends on every element of its input and on its time."""
    return jnp.tanh(x) + jnp.cos(time_B / 100.0).reshape(-1, 1, 1, 1, 1) * x[..., ::-1]


@pytest.mark.usefixtures("float64")
def test_the_maps_between_times_are_inverses():
    t = jnp.linspace(0.0, jnp.pi / 2, 1001)
    s = jnp.linspace(0.0, 1.0, 1001)
    np.testing.assert_allclose(trigflow.trig_from_rf(trigflow.rf_from_trig(t)), t, atol=1e-15)
    np.testing.assert_allclose(trigflow.rf_from_trig(trigflow.trig_from_rf(s)), s, atol=1e-15)


@pytest.mark.usefixtures("float64")
def test_both_times_tell_the_same_noise_level():
    """sigma = tan t = s / (1 - s)."""
    t = jnp.linspace(0.0, 1.5, 100)
    s = trigflow.rf_from_trig(t)
    np.testing.assert_allclose(s / (1 - s), np.tan(t), rtol=1e-12)


def test_the_ends_are_exact_in_float32():
    half_pi = jnp.float32(np.pi / 2)
    assert trigflow.trig_from_rf(jnp.float32(1.0)) == half_pi
    assert trigflow.trig_from_rf(jnp.float32(0.0)) == 0
    assert trigflow.rf_from_trig(jnp.float32(0.0)) == 0
    assert abs(trigflow.rf_from_trig(half_pi) - 1) <= np.finfo(np.float32).eps


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.usefixtures("float64")
def test_a_shift_multiplies_the_noise_level(shift):
    s = jnp.linspace(0.0, 0.99, 100)
    shifted = trigflow.shift_rf(s, shift)
    np.testing.assert_allclose(shifted / (1 - shifted), shift * s / (1 - s), rtol=1e-12)
    assert trigflow.shift_rf(jnp.float64(1.0), shift) == 1


@pytest.mark.parametrize(("mean", "std"), [(0.7, 1.6), (0.0, 1.2)])
def test_lognormal_draws_have_a_normal_log_noise_level(mean, std):
    t = np.asarray(trigflow.draw_lognormal(jax.random.key(0), (20_000,), mean, std), np.float64)
    assert ((t > 0) & (t < np.pi / 2)).all()
    assert stats.kstest(np.log(np.tan(t)), stats.norm(mean, std).cdf).pvalue > 0.01
    assert stats.kstest(np.log(np.tan(t)), stats.norm(mean + 0.1, std).cdf).pvalue < 1e-6


@pytest.mark.parametrize("rf_range", [(0.875, 1.0), (0.0, 0.875), (0.2, 0.6)])
def test_draws_of_an_expert_are_those_of_its_range(rf_range):
    """As the whole distribution has them, given that they lie there."""
    mean, std, shift = 0.7, 1.6, 5.0
    t = np.asarray(trigflow.draw_lognormal(jax.random.key(0), (20_000,), mean, std, rf_range), np.float64)
    lowest, highest = (stats.norm(mean, std).cdf(special.logit(s)) for s in rf_range)
    place = (stats.norm(mean, std).cdf(np.log(np.tan(t))) - lowest) / (highest - lowest)
    assert stats.kstest(place, stats.uniform.cdf).pvalue > 0.01
    t = np.asarray(trigflow.draw_shifted_uniform(jax.random.key(1), (20_000,), shift, rf_range), np.float64)
    lowest, highest = (s / (shift - (shift - 1) * s) for s in rf_range)
    sigma = np.tan(np.minimum(t, np.pi / 2)) / shift
    assert stats.kstest((sigma / (1 + sigma) - lowest) / (highest - lowest), stats.uniform.cdf).pvalue > 0.01


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_shifted_uniform_draws_are_uniform_once_unshifted(shift):
    t = np.asarray(trigflow.draw_shifted_uniform(jax.random.key(1), (20_000,), shift), np.float64)
    assert ((t >= 0) & (t <= np.pi / 2 + 1e-7)).all()
    sigma = np.tan(np.minimum(t, np.pi / 2)) / shift  # s' / (1 - s') = shift * s / (1 - s)
    assert stats.kstest(sigma / (1 + sigma), stats.uniform.cdf).pvalue > 0.01
    assert stats.kstest(sigma / (1 + sigma), stats.uniform(0.02, 1).cdf).pvalue < 1e-6


def test_draws_depend_on_the_key_alone():
    for distribution in (trigflow.draw_lognormal, trigflow.draw_shifted_uniform):
        parameters = (0.7, 1.6) if distribution is trigflow.draw_lognormal else (5.0,)
        first, again, other = (distribution(jax.random.key(seed), (8,), *parameters) for seed in (3, 3, 4))
        assert (first == again).all()
        assert (first != other).all()


@pytest.mark.usefixtures("float64")
def test_a_mixture_goes_from_data_to_noise_and_back():
    x0, noise, t = draw(0), draw(1), jnp.asarray(TIMES)
    x_t = trigflow.mix(x0, noise, t)
    np.testing.assert_array_equal(x_t[0], x0[0])
    np.testing.assert_allclose(x_t[-1], noise[-1], atol=1e-15)
    np.testing.assert_allclose(x_t, np.cos(column(t)) * x0 + np.sin(column(t)) * noise, rtol=1e-12)
    exact = lambda x, t_B: np.cos(column(t_B)) * noise - np.sin(column(t_B)) * x0  # noqa: E731
    np.testing.assert_allclose(trigflow.denoise(exact, x_t, t), x0, atol=1e-14)


@pytest.mark.usefixtures("float64")
def test_velocity_is_the_textbook_formula():
    """x0 = x_s - s v, then F = (cos t x_t - x0) / sin t, which needs sin t > 0."""
    x, t = draw(2), jnp.asarray(TIMES + 1e-3)[:-1]
    x, s = x[:-1], np.sin(column(t)) / (np.sin(column(t)) + np.cos(column(t)))
    x_s = x / (np.sin(column(t)) + np.cos(column(t)))
    x0 = x_s - s * wobbly(x_s, 1000.0 * jnp.asarray(s.ravel()))
    expected = (np.cos(column(t)) * x - x0) / np.sin(column(t))
    np.testing.assert_allclose(trigflow.trig_velocity(wobbly)(x, t), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("t", [0.0, 1e-7, 1e-3, 1.0, np.pi / 2 - 1e-3, np.pi / 2])
def test_velocity_and_its_tangent_keep_float32_accuracy_up_to_both_ends(t):
    """A straight network v = a x + b: the formula in float64 is the reference, also where it divides by zero."""

    def straight(x, time_B):
        return 0.3 * x + 0.001 * time_B.reshape(-1, 1, 1, 1, 1)

    def evaluate(dtype):
        x, t_B = draw(3, dtype)[:1], jnp.full((1,), t, dtype)
        return jax.jvp(trigflow.trig_velocity(straight), (x, t_B), (draw(4, dtype)[:1], jnp.ones_like(t_B)))

    value, tangent = evaluate(np.float32)
    with jax.enable_x64(True):
        exact_value, exact_tangent = evaluate(np.float64)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, exact_value, atol=2e-6)
    np.testing.assert_allclose(tangent, exact_tangent, atol=5e-6)


def test_the_network_is_fed_the_rectified_flow_latent_and_a_thousand_times_its_time():
    fed = {}

    def net(x, time_B):
        fed.update(x=x, time=time_B)
        return x

    x, t = draw(5, np.float32), jnp.asarray(TIMES, jnp.float32)
    trigflow.trig_velocity(net)(x, t)
    scale = np.sin(column(t)) + np.cos(column(t))
    np.testing.assert_allclose(fed["x"], x / scale, rtol=1e-6)
    np.testing.assert_allclose(fed["time"], 1000 * (np.sin(column(t)) / scale).ravel(), rtol=1e-6)
    assert fed["time"][-1] == pytest.approx(1000, rel=1e-6)
    s = jnp.linspace(0.0, 1.0, SHAPE[0])
    np.testing.assert_array_equal(trigflow.rf_velocity(net)(x, s), x)
    np.testing.assert_allclose(fed["time"], 1000 * s)
