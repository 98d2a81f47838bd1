"""The losses against definitions: float64 finite differences, exact teachers, and broken samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax import losses
from rcm_jax.trigflow import denoise

SHAPE = (4, 2, 3, 3, 2)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(*seeds):
    return [jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPE)) for seed in seeds]


TIMES = np.array([0.3, 0.8, 1.2, 1.5])


def gaussian_velocity(std):
    """F of data N(0, std^2): the exact score of a Gaussian, for any x and t."""

    def velocity(x, t_B):
        t = t_B.reshape(-1, 1, 1, 1, 1)
        cos, sin = jnp.cos(t), jnp.sin(t)
        return (1 - std**2) * cos * sin / (std**2 * cos**2 + sin**2) * x

    return velocity


def gaussian_consistency(std):
    """The consistency function of that Gaussian's flow, x0 = std x / sqrt(std^2 cos^2 + sin^2), as a velocity."""

    def velocity(x, t_B):
        t = t_B.reshape(-1, 1, 1, 1, 1)
        cos, sin = jnp.cos(t), jnp.sin(t)
        return (cos - std / jnp.sqrt(std**2 * cos**2 + sin**2)) / sin * x

    return velocity


def wobbly(x, t_B):
    """Some smooth student."""
    t = t_B.reshape(-1, 1, 1, 1, 1)
    return jnp.sin(1.3 * x + t) + x * jnp.cos(2 * t)


def test_scm_tangent_is_the_derivative_along_the_teachers_flow():
    x0, noise = draw(1, 2)
    teacher = gaussian_velocity(0.5)
    _, terms = losses.scm(wobbly, teacher, x0, noise, jnp.asarray(TIMES), 1.0)
    t = TIMES.reshape(-1, 1, 1, 1, 1)
    x_t = np.cos(t) * x0 + np.sin(t) * noise
    h = 1e-5

    def along(step):
        return wobbly(x_t + step * terms.teacher, jnp.asarray(TIMES + step))

    derivative = (along(h) - along(-h)) / (2 * h)
    np.testing.assert_allclose(terms.student_tangent, np.cos(t) * np.sin(t) * derivative, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("difference", [losses.semicontinuous_tangent, losses.discrete_tangent])
@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_a_difference_approaches_the_exact_tangent_in_proportion_to_its_step(difference, step):
    """Between 0.1 and 10 times the step: a tenth of the step has a tenth of the error."""
    x_t, teacher_F = draw(1, 2)
    value, exact = losses.exact_tangent(wobbly, x_t, jnp.asarray(TIMES), teacher_F)
    same_value, found = difference(wobbly, x_t, jnp.asarray(TIMES), teacher_F, frozen_student=wobbly, step=step)
    np.testing.assert_array_equal(same_value, value)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0.1 * step < error < 10 * step


def test_sct_has_the_gradient_of_scm_on_average_over_what_x_t_hides():
    """For data N(0, std^2) and x_t given: x0 and noise vary, their mean velocity is the exact one (before scaling)."""
    std, t = 0.5, jnp.full(20_000, 0.9)
    cos, sin = np.cos(0.9), np.sin(0.9)
    total = std**2 * cos**2 + sin**2
    x_t, rest = 0.7, np.random.default_rng(0).standard_normal((20_000, 1, 1, 1, 1))
    x0 = std**2 * cos / total * x_t + std * sin / np.sqrt(total) * rest  # the posterior of x0 given x_t
    noise = (x_t - cos * x0) / sin
    found = losses.conditional_velocity(jnp.asarray(x0), jnp.asarray(noise))(jnp.full(x0.shape, x_t), t)
    expected = gaussian_velocity(std)(jnp.full((1, 1, 1, 1, 1), x_t), t[:1])
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(20_000)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_scm_gradient_vanishes_at_the_true_consistency_function(std):
    x0, noise = draw(1, 2)

    def loss(scale):
        student = lambda x, t: scale * gaussian_consistency(std)(x, t)  # noqa: E731
        return losses.scm(student, gaussian_velocity(std), std * x0, noise, jnp.asarray(TIMES), 1.0)[0].sum()

    assert abs(jax.grad(loss)(1.0)) < 1e-10
    assert std == 1.0 or abs(jax.grad(loss)(0.9)) > 1e-2


def test_scm_normalises_each_sample():
    x0, noise = draw(1, 2)
    loss, _ = losses.scm(wobbly, gaussian_velocity(0.5), x0, noise, jnp.asarray(TIMES), 1.0)
    assert ((loss > 0) & (loss < 1)).all()  # (|g| / (|g| + 0.1))^2


def test_scm_warm_up_does_not_scale_the_networks_tangent():
    """At r = 0 the target is cos t (F_teacher - F) less the whole student tangent (rCM section 4)."""
    x0, noise = draw(1, 2)
    t = TIMES.reshape(-1, 1, 1, 1, 1)
    loss, terms = losses.scm(wobbly, gaussian_velocity(0.5), x0, noise, jnp.asarray(TIMES), 0.0)
    g = -np.cos(t) * (terms.student - terms.teacher) - terms.student_tangent
    norm = np.sqrt((g**2).sum(axis=(1, 2, 3, 4)))
    np.testing.assert_allclose(loss, (norm / (norm + 0.1)) ** 2, rtol=1e-12)


def test_dmd_gradient_vanishes_where_student_and_data_agree():
    generated, noise = draw(3, 4)
    score = gaussian_velocity(1.0)

    def gradient(fake):
        return jax.grad(lambda g: losses.dmd(g, fake, score, noise, jnp.asarray(TIMES))[0].sum())(generated)

    assert jnp.abs(gradient(gaussian_velocity(1.0))).max() == 0
    assert jnp.abs(gradient(gaussian_velocity(0.5))).max() > 1e-2


def test_dmd_gradient_is_the_normalised_difference_of_the_scores():
    generated, noise = draw(3, 4)
    fake, teacher, t = gaussian_velocity(0.5), gaussian_velocity(1.5), jnp.asarray(TIMES)
    gradient = jax.grad(lambda g: losses.dmd(g, fake, teacher, noise, t)[0].sum())(generated)
    x_t = np.cos(TIMES)[:, None, None, None, None] * generated + np.sin(TIMES)[:, None, None, None, None] * noise
    x0_fake, x0_teacher = denoise(fake, x_t, t), denoise(teacher, x_t, t)
    weight = np.abs(generated - x0_teacher).mean(axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(gradient, 2 * (x0_fake - x0_teacher) / weight, rtol=1e-12)


def test_critic_is_the_weighted_denoising_error_and_least_at_the_exact_score():
    generated, noise = draw(3, 4)
    t = jnp.asarray(TIMES)
    sin = np.sin(TIMES).reshape(-1, 1, 1, 1, 1)
    x_t = np.cos(TIMES).reshape(-1, 1, 1, 1, 1) * generated + sin * noise
    expected = ((generated - denoise(wobbly, x_t, t)) ** 2 / sin**2).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(losses.critic(wobbly, generated, noise, t), expected, rtol=1e-12)
    many = jnp.asarray(np.random.default_rng(5).standard_normal((2, 20_000, 1, 1, 1, 1)))
    t = jnp.full(20_000, 0.9)

    def loss(scale):
        fake = lambda x, t: scale * gaussian_velocity(0.5)(x, t)  # noqa: E731
        return losses.critic(fake, 0.5 * many[0], many[1], t).mean()

    assert abs(jax.grad(loss)(1.0)) < 0.02 < abs(jax.grad(loss)(0.8))


def test_the_gan_is_the_cross_entropy_of_real_and_generated():
    real, generated = np.array([-30.0, 0.0, 2.0]), np.array([1.0, -2.0, 40.0])
    probability = lambda logit: 1 / (1 + np.exp(-logit))  # noqa: E731
    expected = -np.log(probability(real)) - np.log(probability(-generated))
    np.testing.assert_allclose(losses.gan_critic(jnp.asarray(real), jnp.asarray(generated)), expected, rtol=1e-12)
    np.testing.assert_allclose(losses.gan_generator(jnp.asarray(real)), -np.log(probability(real)), rtol=1e-12)
    slope = jax.grad(lambda logit: losses.gan_generator(logit).sum())(jnp.asarray(real))
    np.testing.assert_allclose(slope, -probability(-real), rtol=1e-12)  # near -1 where the critic is sure


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_logit_has_no_loss_and_no_gradient(value):
    logits = jnp.array([0.5, value])
    for loss in (losses.gan_generator, lambda x: losses.gan_critic(x, 0.0 * logits), lambda x: losses.gan_critic(x, x)):
        assert loss(logits)[1] == 0
        slope = jax.grad(lambda x: loss(x).sum())(logits)  # noqa: B023
        assert slope[1] == 0
        assert np.isfinite(slope[0])


def test_flow_matching_is_the_rectified_flow_regression():
    x0, noise = draw(1, 2)
    t = TIMES.reshape(-1, 1, 1, 1, 1)
    cos, sin = np.cos(t), np.sin(t)
    x_t = cos * x0 + sin * noise
    v = (cos + sin) * wobbly(x_t, jnp.asarray(TIMES)) - (cos - sin) * x_t
    expected = ((v - (noise - x0)) ** 2).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(losses.flow_matching(wobbly, x0, noise, jnp.asarray(TIMES)), expected, rtol=1e-12)


def test_dcm_is_zero_for_a_consistent_student_as_steps_shrink():
    x0, noise = draw(1, 2)
    student, teacher = gaussian_consistency(0.5), gaussian_velocity(0.5)
    t = jnp.asarray(TIMES)
    coarse, fine = (losses.dcm(student, student, teacher, 0.5 * x0, noise, t, t - h).sum() for h in (1e-2, 1e-3))
    assert fine < coarse / 1e3  # an Euler step's error is of second order, its square of fourth


def test_dcm_times_are_neighbours_on_the_shifted_grid():
    first, second = losses.dcm_times(jnp.array([0.0, 0.5, 1.0]), 48, 5.0)
    assert float(first[0]) == np.pi / 2
    assert (second < first).all()
    assert float(second[2]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_simulation_is_the_sampler_and_only_its_last_step_has_a_gradient(steps):
    times = losses.simulation_times(jnp.asarray(np.random.default_rng(0).uniform(0.3, 1.5, (3, 4))))
    assert (times[1:] <= times[:-1]).all()
    assert (times[0] == np.pi / 2).all()
    noises = jnp.stack(draw(1, 2, 3))

    def generate(scale, frozen_scale):
        net = lambda s: lambda x, t: s * wobbly(x, t)  # noqa: E731
        return losses.simulate(net(scale), net(frozen_scale), times, noises, steps)

    x = noises[0]
    for k in range(steps):
        x0 = denoise(wobbly, x, times[k])
        last = x
        if k + 1 < steps:
            t = times[k + 1].reshape(-1, 1, 1, 1, 1)
            x = jnp.cos(t) * x0 + jnp.sin(t) * noises[k + 1]
    np.testing.assert_allclose(generate(1.0, 1.0), x0, rtol=1e-12)
    gradient = jax.jacfwd(generate)(1.0, 1.0)
    sin = np.sin(times[steps - 1]).reshape(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(gradient, -sin * wobbly(last, times[steps - 1]), rtol=1e-10, atol=1e-12)


def breaking(velocity, value):
    """The velocity with one element of sample 1 broken."""
    return lambda x, t: velocity(x, t).at[1, 0, 0, 0, 0].set(value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_sample_has_no_loss_and_leaves_the_others_as_they_were(value):
    x0, noise = draw(1, 2)
    t, good = jnp.asarray(TIMES), gaussian_velocity(0.5)
    bad = breaking(good, value)
    cases = {
        "scm": lambda teacher, x: losses.scm(wobbly, teacher, x, noise, t, 1.0)[0],
        "dcm": lambda teacher, x: losses.dcm(wobbly, wobbly, teacher, x, noise, t, t - 0.1),
        "dmd": lambda teacher, x: losses.dmd(x, wobbly, teacher, noise, t)[0],
        "dmd, fake score": lambda fake, x: losses.dmd(x, fake, good, noise, t)[0],
        "critic": lambda fake, x: losses.critic(fake, x, noise, t),
    }
    others = np.array([0, 2, 3])
    for name, loss in cases.items():
        clean, broken = loss(good, x0), loss(bad, x0)
        np.testing.assert_array_equal(broken[others], clean[others], err_msg=name)
        assert np.isfinite(broken[1]), name
        clean = jax.grad(lambda x: loss(good, x).sum())(x0)  # noqa: B023
        broken = jax.grad(lambda x: loss(bad, x).sum())(x0)  # noqa: B023
        np.testing.assert_array_equal(broken[others], clean[others], err_msg=name)
        assert np.isfinite(broken[1]).all(), name
