"""The samplers where the answer is known: data N(0, STD^2), whose velocity and flow have closed forms."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rcm_jax import sampling

STD = 0.5
SHAPE = (2, 3, 3, 2)
SEEDS = jnp.array([7, 0, 123_456])


def variance(s):
    """Of x_s = (1 - s) x0 + s eps."""
    return (1 - s) ** 2 * STD**2 + s**2


def gaussian(x, s_B):
    """E[eps - x0 | x_s]."""
    s = s_B.reshape(-1, 1, 1, 1, 1)
    return (s - (1 - s) * STD**2) / variance(s) * x


def consistency(x, s_B):
    """The velocity of a perfect student: x - s v is where the flow through (x, s) began."""
    s = s_B.reshape(-1, 1, 1, 1, 1)
    return (1 - STD / jnp.sqrt(variance(s))) / s * x


def few_times(steps):
    return sampling.few_step_times(steps, sigma_max=80.0).tolist()


def noise(step, seeds=SEEDS):
    return np.asarray(sampling.sample_noise(seeds, SHAPE, step), np.float64)


# tan t / (1 + tan t) of atan(80), 1.5, 1.4, 1.0, by hand.
@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [0.98765432, 0]),
        (2, [0.98765432, 0.93378115, 0]),
        (4, [0.98765432, 0.93378115, 0.85289578, 0.60897953, 0]),
    ],
)
def test_few_step_times_are_the_published_ones(steps, expected):
    np.testing.assert_allclose(sampling.few_step_times(steps, sigma_max=80.0), expected, atol=5e-7)


def test_few_step_times_take_other_mid_times():
    """The paper's, as RF times."""
    times = sampling.few_step_times(3, sigma_max=200.0, mid_times=(1.3, 1.0, 0.6))
    np.testing.assert_allclose(times, [200 / 201, 0.78270801, 0.60897953, 0], atol=5e-7)


@pytest.mark.parametrize("steps", [0, 5])
def test_few_step_times_refuse_steps_without_times(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must lie between 1 and 4"):
        sampling.few_step_times(steps, sigma_max=80.0)


@pytest.mark.parametrize(
    ("sigma_max", "mid_times"),
    [(5.0, (1.5,)), (80.0, (1.0, 1.4)), (80.0, (-0.1,)), (math.nan, ()), (80.0, (math.nan,)), (80.0, (1.4, math.nan))],
)
def test_few_step_times_must_fall(sigma_max, mid_times):
    with pytest.raises(ValueError, match="must fall"):
        sampling.few_step_times(len(mid_times) + 1, sigma_max=sigma_max, mid_times=mid_times)


def test_euler_times_are_equal_steps_shifted():
    np.testing.assert_allclose(sampling.euler_times(4, shift=1.0), [1, 0.75, 0.5, 0.25, 0])
    times = sampling.euler_times(50, shift=3.0)
    assert (times[0], times[-1], len(times)) == (1, 0, 51)
    np.testing.assert_allclose(times[1:-1] / (1 - times[1:-1]), 3 * np.arange(49, 0, -1) / np.arange(1, 50))


@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_one_step_is_the_data_estimate(kind):
    """x0 = x - s v of x = s eps, which for a Gaussian is (1 - s) std^2 / variance * x."""
    (s, _) = times = few_times(1)
    out = sampling.few_step(gaussian, SEEDS, SHAPE, times, kind=kind)
    np.testing.assert_allclose(out, (1 - s) * STD**2 / variance(s) * s * noise(0), rtol=1e-4)


def test_sde_renoises_the_data_estimate_with_fresh_noise():
    times = few_times(4)
    x = times[0] * noise(0)
    for step, (s, s_next) in enumerate(itertools.pairwise(times), start=1):
        x0 = (1 - s) * STD**2 / variance(s) * x
        x = (1 - s_next) * x0 + s_next * noise(step)
    assert s_next == 0
    np.testing.assert_allclose(sampling.few_step(gaussian, SEEDS, SHAPE, times, kind="sde"), x, rtol=1e-4, atol=1e-6)


def test_ode_follows_the_velocity():
    times = few_times(4)
    x = times[0] * noise(0)
    for s, s_next in itertools.pairwise(times):
        x = x * (1 - (s - s_next) * (s - (1 - s) * STD**2) / variance(s))
    np.testing.assert_allclose(sampling.few_step(gaussian, SEEDS, SHAPE, times, kind="ode"), x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_perfect_student_samples_the_data_distribution_in_any_number_of_steps(steps):
    times = few_times(steps)
    samples = sampling.few_step(consistency, jnp.arange(500), SHAPE, times)
    assert stats.kstest(np.asarray(samples).ravel(), stats.norm(0, STD).cdf).pvalue > 0.01


def test_an_euler_step_takes_the_velocity_where_it_starts():
    x = noise(0)
    for s, s_next in ((1.0, 0.4), (0.4, 0.1)):
        x = x - (s - s_next) * (s - (1 - s) * STD**2) / variance(s) * x
    np.testing.assert_allclose(sampling.euler(gaussian, SEEDS, SHAPE, [1.0, 0.4, 0.1]), x, rtol=1e-4, atol=1e-6)


def test_euler_converges_to_the_exact_flow_at_first_order():
    exact = STD * noise(0)  # x_s keeps its quantile: x_0 / STD = x_1 / 1

    def error(steps):
        out = sampling.euler(gaussian, SEEDS, SHAPE, sampling.euler_times(steps, shift=1.0).tolist())
        return np.abs(out - exact).max()

    coarse, middle, fine = error(32), error(64), error(128)
    assert fine < 0.02
    assert coarse / middle == pytest.approx(2, rel=0.1)
    assert middle / fine == pytest.approx(2, rel=0.1)


def test_unipc_converges_to_the_exact_flow_at_second_order():
    """From where its times end the flow goes on in one step, so they end late here."""
    times = lambda steps: np.append(1 / (1 + np.exp(np.linspace(-4, 6, steps))), 0.0)  # noqa: E731
    quantile = STD / math.sqrt(variance(times(2)[0])) * times(2)[0]
    exact = quantile * noise(0)

    def error(steps):
        return np.abs(sampling.unipc(gaussian, SEEDS, SHAPE, times(steps).tolist()) - exact).max()

    coarse, middle = error(16), error(32)
    assert middle < 0.01
    assert coarse / middle > 3.5


def test_karras_times_are_equal_steps_of_a_root_of_the_noise_level():
    s = sampling.karras_times(35)
    sigma = s[:-1] / (1 - s[:-1])
    assert (sigma[0], sigma[-1], s[-1]) == (pytest.approx(80), pytest.approx(0.002), 0)
    np.testing.assert_allclose(np.diff(sigma ** (1 / 7), 2), 0, atol=1e-12)


def test_noise_depends_on_the_seed_and_the_step_alone():
    """Not on the batch, nor on the order in it, nor on how it lies on devices."""
    seeds = jnp.arange(8)
    whole = sampling.sample_noise(seeds, SHAPE, 1)
    np.testing.assert_array_equal(sampling.sample_noise(seeds[::-1], SHAPE, 1)[::-1], whole)
    np.testing.assert_array_equal(sampling.sample_noise(seeds[3:4], SHAPE, 1)[0], whole[3])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(seeds, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    np.testing.assert_array_equal(jax.jit(lambda seeds: sampling.sample_noise(seeds, SHAPE, 1))(spread), whole)
    draws = np.stack([noise(step, seeds) for step in range(4)]).reshape(32, -1)
    assert np.abs(np.corrcoef(draws) - np.eye(32)).max() < 0.75  # 36 numbers each: no two draws alike
    assert stats.kstest(draws.ravel(), stats.norm.cdf).pvalue > 0.01


@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_a_sample_depends_on_its_own_seed_alone(kind):
    times = few_times(2)
    together = sampling.few_step(gaussian, SEEDS, SHAPE, times, kind=kind)
    alone = sampling.few_step(gaussian, SEEDS[1:2], SHAPE, times, kind=kind)
    np.testing.assert_array_equal(together[1:2], alone)
    assert np.abs(together[0] - together[1]).max() > 0.1 * np.abs(together).max()


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match=r"kind='heun' must be 'sde' .* or 'ode'"):
        sampling.few_step.__wrapped__(gaussian, SEEDS, SHAPE, [1.0, 0.0], kind="heun")
