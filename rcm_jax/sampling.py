"""Samplers: rCM's few-step generator (SDE, ODE) and Euler for the teacher, on rectified-flow (RF) times.

A velocity here is v(x, s) = eps - x0 of a network whose conditioning is closed over (trigflow.rf_velocity).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from rcm_jax.config import UserError
from rcm_jax.trigflow import Velocity

Kind = Literal["sde", "ode"]

MAX_STEPS = 4
# Official TrigFlow times between the first step and the last; the paper's are 1.3, 1.0, 0.6.
MID_TIMES = (1.5, 1.4, 1.0)


def few_step_times(steps: int, *, sigma_max: float, mid_times: Sequence[float] = MID_TIMES) -> np.ndarray:
    """The RF times s_0 > ... > s_steps = 0 of a distilled sampler, from sigma_max and TrigFlow mid times.

    Raises UserError if there are fewer mid times than steps need, or the times do not fall.
    """
    if not 1 <= steps <= len(mid_times) + 1:
        raise UserError(f"{steps=} must lie between 1 and {len(mid_times) + 1}: give more mid_times for more steps")
    t = np.array([math.atan(sigma_max), *mid_times[: steps - 1], 0.0])
    if (np.diff(t) >= 0).any():
        raise UserError(f"times {t.round(4).tolist()} must fall: lower mid_times or raise sigma_max={sigma_max}")
    return np.sin(t) / (np.sin(t) + np.cos(t))


def euler_times(steps: int, *, shift: float) -> np.ndarray:
    """The RF times of a teacher's sampler: `steps` equal steps from 1 to 0, shifted towards noise."""
    s = np.linspace(1.0, 0.0, steps + 1)
    return shift * s / (1.0 + (shift - 1.0) * s)


def sample_noise(seeds_B: Int[Array, "b"], shape_THWC: tuple[int, ...], step: int) -> Float[Array, "b t h w c"]:
    """Normal noise that depends on each sample's own seed and the step alone: not on the batch, not on the mesh."""
    draw = lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(seed), step), shape_THWC)  # noqa: E731
    return jax.vmap(draw)(seeds_B)


def few_step(
    velocity: Velocity,
    seeds_B: Int[Array, "b"],
    shape_THWC: tuple[int, ...],
    times: Sequence[float],
    *,
    kind: Kind = "sde",
) -> Float[Array, "b t h w c"]:
    """Samples of a distilled student at the RF `times` (few_step_times), rCM section 4.

    sde: predict the data, add fresh noise for the next time. ode: follow the predicted velocity.
    """
    if kind not in ("sde", "ode"):
        raise ValueError(f"{kind=} must be 'sde' (renoise at every step) or 'ode' (follow the velocity)")
    x = sample_noise(seeds_B, shape_THWC, 0) * times[0]
    for step, (s, s_next) in enumerate(itertools.pairwise(times), start=1):
        v = velocity(x, jnp.full(len(seeds_B), s, x.dtype))
        if kind == "ode" or s_next == 0:
            x = x - (s - s_next) * v
        else:
            x = (1 - s_next) * (x - s * v) + s_next * sample_noise(seeds_B, shape_THWC, step)
    return x


def euler(
    velocity: Velocity, seeds_B: Int[Array, "b"], shape_THWC: tuple[int, ...], times: Sequence[float]
) -> Float[Array, "b t h w c"]:
    """Samples of a teacher by Euler's method at the RF `times` (euler_times); one compiled step, scanned."""
    s_all = jnp.asarray(times, jnp.float32)

    def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        s, s_next = pair
        return x - (s - s_next) * velocity(x, jnp.full(len(seeds_B), s)), None

    return lax.scan(step, sample_noise(seeds_B, shape_THWC, 0), (s_all[:-1], s_all[1:]))[0]
