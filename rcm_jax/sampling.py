"""Samplers: rCM's few-step generator (SDE, ODE), and Euler and UniPC for teachers, on rectified-flow (RF) times.

A velocity here is v(x, s) = eps - x0 of a network whose conditioning is closed over (trigflow.rf_velocity).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from rcm_jax.config import UserError
from rcm_jax.mean_flow import MeanVelocity
from rcm_jax.trigflow import Velocity

Kind = Literal["sde", "ode"]
# As lax.scan: (step, carry, rows) -> (last carry, stacked results), where step(carry, row) -> (carry, result).
Loop = Callable[[Callable[[Any, Any], Any], Any, Any], tuple[Any, Any]]

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
    if not (np.diff(t) < 0).all():  # nor may one be NaN
        raise UserError(f"times {t.round(4).tolist()} must fall: lower mid_times or raise sigma_max={sigma_max}")
    return np.sin(t) / (np.sin(t) + np.cos(t))


def euler_times(steps: int, *, shift: float) -> np.ndarray:
    """The RF times of a teacher's sampler: `steps` equal steps from 1 to 0, shifted towards noise."""
    s = np.linspace(1.0, 0.0, steps + 1)
    return shift * s / (1.0 + (shift - 1.0) * s)


def unipc_times(steps: int, *, shift: float) -> np.ndarray:
    """The RF times of UniPC as Wan uses it: `steps` equal steps from 1 to 0.001, shifted towards noise, then 0.

    The last of the equal steps goes to 0 instead. The first time lies 1e-6 below 1, where the signal-to-noise ratio is
    not yet 0, and all are rounded to float32, as in diffusers' UniPCMultistepScheduler: near 1 the rounding is seen.
    """
    s = np.linspace(1.0, 1e-3, steps + 1)[:-1]
    s = np.minimum(shift * s / (1.0 + (shift - 1.0) * s), 1.0 - 1e-6)
    return np.append(s, 0.0).astype(np.float32).astype(np.float64)


def karras_times(steps: int, *, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0) -> np.ndarray:
    """The RF times of Cosmos-Predict2: noise levels sigma equally spaced in sigma^(1/rho), then 0 (EDM, eq. 5)."""
    sigma = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    return np.append(sigma / (1.0 + sigma), 0.0)


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


def mean_flow(
    mean_velocity: MeanVelocity, seeds_B: Int[Array, "b"], shape_THWC: tuple[int, ...], times: Sequence[float]
) -> Float[Array, "b t h w c"]:
    """Samples of a MeanFlow student: one jump between any two of the RF `times` (few_step_times), its section 4.1."""
    x = sample_noise(seeds_B, shape_THWC, 0) * times[0]
    for s, s_next in itertools.pairwise(times):
        s_B = jnp.full(len(seeds_B), s, x.dtype)
        x = x - (s - s_next) * mean_velocity(x, s_B, jnp.full_like(s_B, s - s_next))
    return x


def euler(
    velocity: Velocity,
    seeds_B: Int[Array, "b"],
    shape_THWC: tuple[int, ...],
    times: Sequence[float],
    *,
    loop: Loop = lax.scan,
) -> Float[Array, "b t h w c"]:
    """Samples of a teacher by Euler's method at the RF `times` (euler_times, karras_times).

    By default one step is compiled and scanned; another `loop` can show progress or change networks between steps.
    """
    s_all = jnp.asarray(times, jnp.float32)

    def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        s, s_next = pair
        return x - (s - s_next) * velocity(x, jnp.full(len(seeds_B), s)), None

    x = sample_noise(seeds_B, shape_THWC, 0) * s_all[0]
    return loop(step, x, (s_all[:-1], s_all[1:]))[0]


def unipc(
    velocity: Velocity,
    seeds_B: Int[Array, "b"],
    shape_THWC: tuple[int, ...],
    times: Sequence[float],
    *,
    loop: Loop = lax.scan,
) -> Float[Array, "b t h w c"]:
    """Samples of a teacher by UniPC of order 2 (arXiv 2302.04867, variant B2) at the RF `times` (unipc_times).

    One evaluation a step: it corrects the step before, then predicts the next. `loop` as for `euler`.
    """

    def step(carry: tuple[jax.Array, ...], row: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        x, last, x0_1, x0_2 = carry  # the prediction for now; corrected sample, data estimates of one, two steps ago
        s, keep, correct, predict = row[0], row[1], row[2:6], row[6:]
        x0 = x - s * velocity(x, jnp.full(len(seeds_B), s))
        x = keep * x + correct[0] * last + correct[1] * x0 + correct[2] * x0_1 + correct[3] * x0_2
        return (predict[0] * x + predict[1] * x0 + predict[2] * x0_1, x, x0, x0_1), None

    rows = jnp.asarray(unipc_coefficients(times), jnp.float32)
    x = sample_noise(seeds_B, shape_THWC, 0) * rows[0, 0]
    return loop(step, (x, x, x, x), rows)[0][0]


def unipc_coefficients(times: Sequence[float]) -> np.ndarray:
    """Row i, of UniPC's step at times[i], holds its time, what the corrected sample is made of, and the prediction.

    The corrected sample is a sum of the predicted one (the first step keeps it), the last corrected one and the data
    estimates of now, of one and of two steps ago; the prediction is one of the corrected sample and two estimates.
    """
    s = np.asarray(times, np.float64)
    steps = len(s) - 1
    log_snr = np.log1p(-s[:-1]) - np.log(s[:-1])
    rows = np.zeros((steps, 9))
    rows[0, 1] = 1.0
    for i in range(steps):
        rows[i, 0] = s[i]
        second_order = 0 < i < steps - 1
        slope = 0.5 * (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1]) if second_order else 0.0
        keep = s[i + 1] / s[i]
        rows[i, 6:] = keep, (1 - keep) * (1 + slope), (1 - keep) * -slope
        if i + 1 < steps:
            own, before = _corrector_weights(log_snr[max(i - 1, 0) : i + 2])
            rows[i + 1, 2:6] = keep, (1 - keep) * own, (1 - keep) * (1 - own - before), (1 - keep) * before
    return rows


def _corrector_weights(log_snr: np.ndarray) -> tuple[float, float]:
    """Weights of the new data estimate and of the one before the last, for a step between the last two log-SNRs.

    With two of them, of the first step, the second weight is 0.
    """
    if len(log_snr) == 2:
        return 0.5, 0.0
    h = log_snr[-1] - log_snr[-2]
    ratio = (log_snr[-3] - log_snr[-2]) / h
    phi_1 = np.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    before, own = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
    return own, before / ratio
