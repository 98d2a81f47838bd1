"""The losses of rCM and its relatives: pure functions of arrays, explicit times and noises, and velocities.

Every velocity is a TrigFlow velocity F(x, t) (see trigflow.py) with its conditioning closed over. Every loss is
returned per sample, shape (B,): the step averages over the batch. Losses are *sums* over a sample's elements,
as in the official code; a mean would change the balance between them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rcm_jax.trigflow import Velocity, cos_sin, denoise, mix, shift_rf, trig_from_rf

TANGENT_NORM_OFFSET = 0.1  # c in g / (||g|| + c), sCM section 4.1
MIN_DMD_WEIGHT = 1e-5

# (student, x_t, t_B, teacher_F) -> the student's F and its tangent cos t sin t dF/dt along the teacher's flow.
Differentiate = Callable[[Velocity, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class SCMTerms(NamedTuple):
    """What the sCM loss computes on its way, for logs and tests; shapes (B, T, H, W, C)."""

    student: Float[Array, "b t h w c"]
    student_tangent: Float[Array, "b t h w c"]
    teacher: Float[Array, "b t h w c"]


def sum_elements(x: jax.Array) -> jax.Array:
    """The sum over all elements of each sample."""
    return x.sum(axis=tuple(range(1, x.ndim)))


def is_finite(x: jax.Array) -> jax.Array:
    """Whether all elements of a sample are finite, one of each axis for it."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)), keepdims=True)


def exact_tangent(
    student: Velocity, x_t: Float[Array, "b t h w c"], t_B: Float[Array, "b"], teacher_F: Float[Array, "b t h w c"]
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
    """F and cos t sin t dF/dt by one `jax.jvp`; scaled before it, so that nothing blows up at t = pi/2 (sCM 5.1)."""
    cos, sin = cos_sin(t_B, x_t)
    return jax.jvp(student, (x_t, t_B), (cos * sin * teacher_F, jnp.cos(t_B) * jnp.sin(t_B)))


def semicontinuous_tangent(
    student: Velocity,
    x_t: Float[Array, "b t h w c"],
    t_B: Float[Array, "b"],
    teacher_F: Float[Array, "b t h w c"],
    *,
    frozen_student: Velocity,
    step: float,
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
    """As `exact_tangent`, but the part along t is a backward difference over `step`; the part along x stays a jvp.

    `frozen_student` is the same network without gradient, as in `dcm`.
    """
    cos, sin = cos_sin(t_B, x_t)
    student_F, along_x = jax.jvp(lambda x: student(x, t_B), (x_t,), (cos * sin * teacher_F,))
    return student_F, along_x + cos * sin * _difference(student_F, frozen_student(x_t, t_B - step), step)


def discrete_tangent(
    student: Velocity,
    x_t: Float[Array, "b t h w c"],
    t_B: Float[Array, "b"],
    teacher_F: Float[Array, "b t h w c"],
    *,
    frozen_student: Velocity,
    step: float,
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
    """As `exact_tangent`, by a backward difference over `step` along the teacher's flow: two values and no jvp."""
    cos, sin = cos_sin(t_B, x_t)
    student_F, x_before = student(x_t, t_B), jnp.cos(step) * x_t - jnp.sin(step) * teacher_F
    return student_F, cos * sin * _difference(student_F, frozen_student(x_before, t_B - step), step)


def _difference(now: jax.Array, before: jax.Array, step: float) -> jax.Array:
    """The derivative from two values, in the official code's trigonometric form."""
    return (jnp.cos(step) * now - before) / jnp.sin(step)


def conditional_velocity(x0: Float[Array, "b t h w c"], noise: Float[Array, "b t h w c"]) -> Velocity:
    """cos t noise - sin t x0, whose mean given x_t is the true F: with it for a teacher, sCM is sCT (sCM section 2)."""

    def velocity(x_t: jax.Array, t_B: jax.Array) -> jax.Array:
        cos, sin = cos_sin(t_B, x_t)
        return cos * noise - sin * x0

    return velocity


def scm(
    student: Velocity,
    teacher: Velocity,
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    t_B: Float[Array, "b"],
    tangent_ratio: Float[Array, ""] | float,
    differentiate: Differentiate = exact_tangent,
) -> tuple[Float[Array, "b"], SCMTerms]:
    """Continuous-time consistency loss: the forward-divergence half of rCM (rCM eq. 5, sCM eq. 8).

    The student's value and its tangent along the teacher's flow come from `differentiate`; the tangent is a constant.
    `tangent_ratio` r is the warm-up, min(1, iteration / tangent_warmup); it does not scale the network's own tangent.
    A sample whose tangent or prediction is not finite has zero loss and sends no gradient.
    """
    cos, sin = cos_sin(t_B, x0)
    x_t = mix(x0, noise, t_B)
    teacher_F = lax.stop_gradient(teacher(x_t, t_B))
    student_F, student_tF = differentiate(student, x_t, t_B, teacher_F)
    frozen_F, student_tF = lax.stop_gradient((student_F, student_tF))

    r = tangent_ratio
    g = -cos * jnp.sqrt(1.0 - (r * sin) ** 2) * (frozen_F - teacher_F) - (r * cos * sin * x_t + student_tF)
    sound = is_finite(g) & is_finite(frozen_F)
    g = jnp.where(sound, g, 0.0)
    g = g / (jnp.sqrt(sum_elements(g * g)).reshape(sound.shape) + TANGENT_NORM_OFFSET)
    # student_F - frozen_F is exactly 0 in value and carries the gradient.
    residual = jnp.where(sound, student_F - frozen_F, 0.0) - g
    return sum_elements(residual**2), SCMTerms(frozen_F, student_tF, teacher_F)


def dcm_times(u_B: Float[Array, "b"], steps: int, shift: float) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Two adjacent TrigFlow times of a shifted grid of `steps` steps, from uniform draws u in [0, 1)."""
    u = u_B * (1.0 - 1.0 / steps)
    times = (trig_from_rf(shift_rf(1.0 - (u + k / steps), shift)) for k in (0, 1))
    return next(times), next(times)


def dcm(
    student: Velocity,
    frozen_student: Velocity,
    teacher: Velocity,
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    t_B: Float[Array, "b"],
    t_next_B: Float[Array, "b"],
) -> Float[Array, "b"]:
    """Discrete consistency loss: the student agrees with itself one Euler step of the teacher later (t_next < t).

    `frozen_student` is the same network without gradient. The step is taken in TrigFlow time, as in the official code.
    """
    x_t = mix(x0, noise, t_B)
    step = (t_B - t_next_B).reshape((-1,) + (1,) * (x0.ndim - 1))
    x_next = x_t - step * lax.stop_gradient(teacher(x_t, t_B))
    target = lax.stop_gradient(denoise(frozen_student, x_next, t_next_B))
    difference = denoise(student, x_t, t_B) - target
    return sum_elements(jnp.where(is_finite(difference), difference, 0.0) ** 2)


def simulate(
    student: Velocity,
    frozen_student: Velocity,
    times_KB: Float[Array, "k b"],
    noises_KBTHWC: Float[Array, "k b t h w c"],
    steps: Int[Array, ""] | int,
) -> Float[Array, "b t h w c"]:
    """Generates data with `steps` <= K student steps; only the last one carries gradient (rCM algorithm 1).

    `times_KB[0]` is pi/2 and `noises_KBTHWC[0]` the start; times_KB[k] and noises_KBTHWC[k] re-noise after step k.
    `frozen_student` is the same network without gradient. `steps` may be traced: one compilation serves every length.
    """

    def renoise(k: jax.Array, x: jax.Array) -> jax.Array:
        return mix(denoise(frozen_student, x, times_KB[k]), noises_KBTHWC[k + 1], times_KB[k + 1])

    x = lax.stop_gradient(lax.fori_loop(0, steps - 1, renoise, noises_KBTHWC[0]))
    return denoise(student, x, times_KB[steps - 1])


def simulation_times(draws_KB: Float[Array, "k b"], start: float = math.pi / 2) -> Float[Array, "k b"]:
    """Times of a backward simulation: `start`, then each no later than the one before it. draws_KB[0] is not used."""
    first = jnp.full_like(draws_KB[:1], start)
    return lax.cummin(jnp.concatenate([first, draws_KB[1:]]), axis=0)


def dmd(
    generated: Float[Array, "b t h w c"],
    fake: Velocity,
    teacher: Velocity,
    noise: Float[Array, "b t h w c"],
    t_B: Float[Array, "b"],
) -> tuple[Float[Array, "b"], Float[Array, "b t h w c"]]:
    """Distribution-matching loss on generated data: the reverse-divergence half of rCM (rCM eq. 7, DMD2 eq. 4).

    Returns the loss and the fake score's data estimate. The gradient with respect to `generated` is
    2 (x0_fake - x0_teacher) / mean|generated - x0_teacher|; a sample where that is not finite sends none.
    """
    frozen = lax.stop_gradient(generated)
    x_t = mix(frozen, noise, t_B)
    x0_fake = lax.stop_gradient(denoise(fake, x_t, t_B))
    x0_teacher = lax.stop_gradient(denoise(teacher, x_t, t_B))
    weight = jnp.abs(frozen - x0_teacher).mean(axis=tuple(range(1, frozen.ndim)), keepdims=True)
    direction = (x0_fake - x0_teacher) / jnp.maximum(weight, MIN_DMD_WEIGHT)
    sound = is_finite(direction) & is_finite(frozen)
    # generated - frozen is exactly 0 in value and carries the gradient.
    residual = jnp.where(sound, generated - frozen, 0.0) + jnp.where(sound, direction, 0.0)
    return sum_elements(residual**2), x0_fake


def critic(
    fake: Velocity,
    generated: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    t_B: Float[Array, "b"],
) -> Float[Array, "b"]:
    """The fake score learns the generated data by denoising: ||G - x0_fake||^2 / sin^2 t (rCM algorithm 1).

    Written as ||F - (cos t eps - sin t G)||^2, which is the same number without the division.
    """
    cos, sin = cos_sin(t_B, generated)
    error = fake(mix(generated, noise, t_B), t_B) - (cos * noise - sin * generated)
    return sum_elements(jnp.where(is_finite(error), error, 0.0) ** 2)


def gan_generator(logit_B: Float[Array, "b"]) -> Float[Array, "b"]:
    """The student's part of the GAN: -log sigmoid(logit), which does not saturate where the critic is sure (DMD2)."""
    return _cross_entropy(logit_B, is_finite(logit_B))


def gan_critic(real_logit_B: Float[Array, "b"], generated_logit_B: Float[Array, "b"]) -> Float[Array, "b"]:
    """The critic's part of the GAN: the cross-entropy of telling real data from generated data."""
    sound = is_finite(real_logit_B) & is_finite(generated_logit_B)
    return _cross_entropy(real_logit_B, sound) + _cross_entropy(-generated_logit_B, sound)


def _cross_entropy(logit_B: jax.Array, sound_B: jax.Array) -> jax.Array:
    """-log sigmoid(logit); 0, with no gradient, where not sound."""
    return jax.nn.softplus(jnp.where(sound_B, -logit_B, -jnp.inf))


def flow_matching(
    net: Velocity,
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    t_B: Float[Array, "b"],
) -> Float[Array, "b"]:
    """Rectified-flow regression ||v - (eps - x0)||^2, with v = (cos t + sin t) F - (cos t - sin t) x_t."""
    cos, sin = cos_sin(t_B, x0)
    error = (cos + sin) * (net(mix(x0, noise, t_B), t_B) - (cos * noise - sin * x0))
    return sum_elements(jnp.where(is_finite(error), error, 0.0) ** 2)
