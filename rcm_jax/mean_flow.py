"""MeanFlow (arXiv 2505.13447): a network of the mean velocity over an interval of rectified-flow (RF) times.

u(x, s, span) is the velocity that carries x at RF time s to RF time s - span in one step; at span 0 it is the velocity
itself. It obeys u = v - span * du/ds along the flow of v (section 4.1, eq. 6), which is what the loss asks for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from rcm_jax.losses import is_finite, sum_elements
from rcm_jax.trigflow import WHOLE_RANGE, Range, Velocity, draw_lognormal, rf_from_trig

# (x_BTHWC, s_B, span_B) -> an array like x. A network's conditioning is closed over.
MeanVelocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

NORM_OFFSET = 1e-3  # c of the weight 1 / (||error||^2 + c)^p, section 4.3


def mean_flow_loss(
    student: MeanVelocity,
    velocity: Velocity,
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    s_B: Float[Array, "b"],
    span_B: Float[Array, "b"],
    tangent_ratio: Float[Array, ""] | float,
    power: float,
) -> Float[Array, "b"]:
    """||u - (v - span du/ds)||^2 / (||.||^2 + c)^power a sample, with du/ds by one `jax.jvp` and held constant.

    `velocity` is v(x, s) on RF times: a guided teacher's, or, without a teacher, one whose mean given x is the data's.
    `tangent_ratio` scales the derivative, as a warm-up. A sample that is not finite has zero loss and no gradient.
    """
    s, span = (each.reshape((-1,) + (1,) * (x0.ndim - 1)) for each in (s_B, span_B))
    x_s = (1.0 - s) * x0 + s * noise
    v = lax.stop_gradient(velocity(x_s, s_B))
    ones = jnp.ones_like(s_B)  # s - span stays where it is
    u, du_ds = jax.jvp(student, (x_s, s_B, span_B), (v, ones, ones))
    error = u - lax.stop_gradient(v - tangent_ratio * span * du_ds)
    square = sum_elements(jnp.where(is_finite(error), error, 0.0) ** 2)
    return square / lax.stop_gradient(square + NORM_OFFSET) ** power


def mixed_velocity(
    student: MeanVelocity,
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    guidance_B: Float[Array, "b"],
) -> Velocity:
    """The velocity for training without a teacher: w (noise - x0) + (1 - w) u(x, s, 0), section 4.2, eq. 19.

    `student` sees the negative caption and has no gradient. Where the guidance w is 1, the student plays no part.
    """
    w = guidance_B.reshape((-1,) + (1,) * (x0.ndim - 1))
    return lambda x, s_B: w * (noise - x0) + (1.0 - w) * student(x, s_B, jnp.zeros_like(s_B))


def draw_interval(
    key: Key[Array, ""], mean: float, std: float, share: float, rf_range: Range = WHOLE_RANGE
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A sample's RF time s and span; s is the later of two draws of p_G; the span is not 0 in a `share` of samples."""
    times, choice = jax.random.split(key)
    pair = rf_from_trig(draw_lognormal(times, (2,), mean, std, rf_range))
    s, r = pair.max(), pair.min()
    return s, jnp.where(jax.random.uniform(choice) < share, s - r, 0.0)
