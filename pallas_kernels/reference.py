"""Attention as its formula reads, for tests: quadratic memory, derivatives by JAX, float32 at least throughout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def forward(
    q_BLNH: Float[Array, "b l n h"], k_BSNH: Float[Array, "b s n h"], v_BSNH: Float[Array, "b s n h"], *, scale: float
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    q, k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_BLNH, k_BSNH, v_BSNH))
    s_BNLS = scale * jnp.einsum("blnh,bsnh->bnls", q, k)
    out_BLNH = jnp.einsum("bnls,bsnh->blnh", jax.nn.softmax(s_BNLS), v)
    return out_BLNH.astype(q_BLNH.dtype), jax.nn.logsumexp(s_BNLS, axis=-1)


def forward_with_tangent(q_BLNH, k_BSNH, v_BSNH, tq_BLNH, tk_BSNH, tv_BSNH, *, scale):
    """Returns (out, lse, t_out, t_lse). A tangent of None is zero."""
    primals = (q_BLNH, k_BSNH, v_BSNH)
    tangents = tuple(jnp.zeros_like(x) if t is None else t for x, t in zip(primals, (tq_BLNH, tk_BSNH, tv_BSNH), strict=True))
    (out, lse), (t_out, t_lse) = jax.jvp(lambda *x: forward(*x, scale=scale), primals, tangents)
    return out, lse, t_out, t_lse


def backward(q_BLNH, k_BSNH, v_BSNH, out_BLNH, lse_BNL, dout_BLNH, dlse_BNL, *, scale):
    """Returns the gradients (dq, dk, dv); `forward`'s results are not needed."""
    _, vjp = jax.vjp(lambda *x: forward(*x, scale=scale), q_BLNH, k_BSNH, v_BSNH)
    return vjp((dout_BLNH, dlse_BNL))
