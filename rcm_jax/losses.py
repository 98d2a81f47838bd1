"""The losses of rCM and its relatives: pure functions of arrays, explicit times and noises, and velocities.

Every velocity is a TrigFlow velocity F(x, t) (see trigflow.py) with its conditioning closed over. Every loss is
returned per sample, shape (B,): the step averages over the batch. Losses are *sums* over a sample's elements,
as in the official code; a mean would change the balance between them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rcm_jax.trigflow import Velocity, cos_sin, denoise, mix, shift_rf, trig_from_rf

TANGENT_NORM_OFFSET = 0.1  # c in g / (||g|| + c), sCM section 4.1
MIN_DMD_WEIGHT = 1e-5


class SCMTerms(NamedTuple):
    """What the sCM loss computes on its way, for logs and tests; shapes (B, T, H, W, C)."""

    student: Float[Array, "b t h w c"]
    student_tangent: Float[Array, "b t h w c"]
    teacher: Float[Array, "b t h w c"]


def _sum(x: jax.Array) -> jax.Array:
    return x.sum(axis=tuple(range(1, x.ndim)))


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)), keepdims=True)


def scm(
    student: Velocity,
    teacher: Velocity,
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    t_B: Float[Array, "b"],
    tangent_ratio: Float[Array, ""] | float,
) -> tuple[Float[Array, "b"], SCMTerms]:
    """Continuous-time consistency loss: the forward-divergence half of rCM (rCM eq. 5, sCM eq. 8).

    The student's value and its tangent along the teacher's flow come from one `jax.jvp`; the tangent is a constant.
    Both tangents are scaled by cos t sin t so that none blows up at t = pi/2 (sCM section 5.1). `tangent_ratio` r is
    the warm-up, min(1, iteration / tangent_warmup); it does not scale the network's own tangent. A sample whose
    tangent or prediction is not finite has zero loss and sends no gradient.
    """
    cos, sin = cos_sin(t_B, x0)
    x_t = mix(x0, noise, t_B)
    teacher_F = lax.stop_gradient(teacher(x_t, t_B))
    tangents = (cos * sin * teacher_F, jnp.cos(t_B) * jnp.sin(t_B))
    student_F, student_tF = jax.jvp(student, (x_t, t_B), tangents)
    frozen_F, student_tF = lax.stop_gradient((student_F, student_tF))

    r = tangent_ratio
    g = -cos * jnp.sqrt(1.0 - (r * sin) ** 2) * (frozen_F - teacher_F) - (r * cos * sin * x_t + student_tF)
    sound = _is_finite(g) & _is_finite(frozen_F)
    g = jnp.where(sound, g, 0.0)
    g = g / (jnp.sqrt(_sum(g * g)).reshape(sound.shape) + TANGENT_NORM_OFFSET)
    # student_F - frozen_F is exactly 0 in value and carries the gradient.
    residual = jnp.where(sound, student_F - frozen_F, 0.0) - g
    return _sum(residual**2), SCMTerms(frozen_F, student_tF, teacher_F)


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
    return _sum(jnp.where(_is_finite(difference), difference, 0.0) ** 2)


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


def simulation_times(draws_KB: Float[Array, "k b"]) -> Float[Array, "k b"]:
    """Times of a backward simulation: pi/2, then each no later than the one before it. draws_KB[0] is not used."""
    start = jnp.full_like(draws_KB[:1], jnp.pi / 2)
    return lax.cummin(jnp.concatenate([start, draws_KB[1:]]), axis=0)


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
    sound = _is_finite(direction) & _is_finite(frozen)
    # generated - frozen is exactly 0 in value and carries the gradient.
    residual = jnp.where(sound, generated - frozen, 0.0) + jnp.where(sound, direction, 0.0)
    return _sum(residual**2), x0_fake


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
    return _sum(jnp.where(_is_finite(error), error, 0.0) ** 2)


def flow_matching(
    net: Velocity,
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    t_B: Float[Array, "b"],
) -> Float[Array, "b"]:
    """Rectified-flow regression ||v - (eps - x0)||^2, with v = (cos t + sin t) F - (cos t - sin t) x_t."""
    cos, sin = cos_sin(t_B, x0)
    error = (cos + sin) * (net(mix(x0, noise, t_B), t_B) - (cos * noise - sin * x0))
    return _sum(jnp.where(_is_finite(error), error, 0.0) ** 2)
