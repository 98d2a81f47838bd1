"""TrigFlow times, their distributions, and the change of variables from rectified flow.

TrigFlow mixes data and noise as x_t = cos(t) x0 + sin(t) eps with t in [0, pi/2]; its velocity is
F = cos(t) eps - sin(t) x0 (sCM, arXiv 2410.11081, section 3). The networks predict the rectified-flow
(RF) velocity v = eps - x0 at x_s = (1 - s) x0 + s eps. The two describe the same path:
s = sin t / (sin t + cos t), sigma = tan t = s / (1 - s), and x_s = x_t / (sin t + cos t).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

NET_TIME_SCALE = 1000.0  # the networks are fed 1000 s

Range = tuple[float, float]  # the lowest and the highest RF time that a network is for
WHOLE_RANGE = (0.0, 1.0)

# (x_BTHWC, t_B) -> an array like x: the velocity (F or v) of a network whose conditioning is closed over.
Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def rf_from_trig(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """RF time s of TrigFlow time t."""
    return jnp.sin(t) / (jnp.sin(t) + jnp.cos(t))


def trig_from_rf(s: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """TrigFlow time t of RF time s; exact at s = 1."""
    return jnp.arctan2(s, 1.0 - s)


def shift_rf(s: Float[Array, "*n"], shift: float) -> Float[Array, "*n"]:
    """Moves RF times towards noise: shift * s / (1 + (shift - 1) s)."""
    return shift * s / (1.0 + (shift - 1.0) * s)


def draw_lognormal(
    key: Key[Array, ""], shape: tuple[int, ...], mean: float, std: float, rf_range: Range = WHOLE_RANGE
) -> Float[Array, "..."]:
    """TrigFlow times whose noise level sigma = tan t is log-normal (p_G, rCM section 4), within a range of RF times."""
    lowest, highest = (math.log(s / (1.0 - s)) if 0 < s < 1 else math.copysign(math.inf, s - 0.5) for s in rf_range)
    normal = jax.random.truncated_normal(key, (lowest - mean) / std, (highest - mean) / std, shape)
    return jnp.arctan(jnp.exp(mean + std * normal))


def draw_shifted_uniform(
    key: Key[Array, ""], shape: tuple[int, ...], shift: float, rf_range: Range = WHOLE_RANGE
) -> Float[Array, "..."]:
    """TrigFlow times whose RF time is uniform, then shifted (p_D, rCM section 4), within a range of RF times."""
    lowest, highest = (s / (shift - (shift - 1.0) * s) for s in rf_range)  # the inverse of shift_rf
    return trig_from_rf(shift_rf(jax.random.uniform(key, shape, minval=lowest, maxval=highest), shift))


def cos_sin(t_B: Float[Array, "b"], x: Float[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """cos t and sin t in float32 or better, shaped to broadcast against x."""
    t = t_B.reshape(t_B.shape + (1,) * (x.ndim - 1))
    return jnp.cos(t), jnp.sin(t)


def mix(x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], t_B: Float[Array, "b"]) -> Float[Array, "b ..."]:
    """x_t = cos(t) x0 + sin(t) noise."""
    cos, sin = cos_sin(t_B, x0)
    return cos * x0 + sin * noise


def denoise(velocity: Velocity, x: Float[Array, "b ..."], t_B: Float[Array, "b"]) -> Float[Array, "b ..."]:
    """The data estimate x0 = cos(t) x_t - sin(t) F(x_t, t)."""
    cos, sin = cos_sin(t_B, x)
    return cos * x - sin * velocity(x, t_B)


def trig_velocity(net: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """The TrigFlow velocity F of a network net(x_s, 1000 s) that predicts the RF velocity.

    F = ((cos t - sin t) x_t + v) / (cos t + sin t) divides by neither sin t nor cos t, so float32 is enough.
    With `has_aux` the network returns (v, aux), and the velocity (F, aux).
    """

    def velocity(x: jax.Array, t_B: jax.Array) -> Any:
        cos, sin = cos_sin(t_B, x)
        out = net(x / (cos + sin), NET_TIME_SCALE * rf_from_trig(t_B))
        v, aux = out if has_aux else (out, None)
        F = ((cos - sin) * x + v) / (cos + sin)
        return (F, aux) if has_aux else F

    return velocity


def rf_velocity(net: Velocity) -> Velocity:
    """The RF velocity v(x_s, s) of the same network, on RF times: what the samplers step with."""

    def velocity(x: jax.Array, s_B: jax.Array) -> jax.Array:
        return net(x, NET_TIME_SCALE * s_B)

    return velocity
