"""Attention as its formulas read, for tests: quadratic memory, float32 at least throughout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def forward(
    q_BLNH: Float[Array, "b l n h"], k_BSNH: Float[Array, "b s n h"], v_BSNH: Float[Array, "b s n h"], *, scale: float
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    q, k, v = (_widen(x) for x in (q_BLNH, k_BSNH, v_BSNH))
    s_BNLS = scale * jnp.einsum("blnh,bsnh->bnls", q, k)
    out = jnp.einsum("bnls,bsnh->blnh", jax.nn.softmax(s_BNLS), v)
    return out.astype(q_BLNH.dtype), jax.nn.logsumexp(s_BNLS, axis=-1)


def forward_with_tangent(
    q_BLNH: Float[Array, "b l n h"],
    k_BSNH: Float[Array, "b s n h"],
    v_BSNH: Float[Array, "b s n h"],
    tq_BLNH: Float[Array, "b l n h"] | None,
    tk_BSNH: Float[Array, "b s n h"] | None,
    tv_BSNH: Float[Array, "b s n h"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"], Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns (out, lse) of `forward` and their tangents. A tangent of None is zero."""
    primals = q_BLNH, k_BSNH, v_BSNH
    tangents = tq_BLNH, tk_BSNH, tv_BSNH
    tangents = tuple(jnp.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True))
    (out, lse), (t_out, t_lse) = jax.jvp(lambda *x: forward(*x, scale=scale), primals, tangents)
    return out, lse, t_out, t_lse


def backward(
    q_BLNH: Float[Array, "b l n h"],
    k_BSNH: Float[Array, "b s n h"],
    v_BSNH: Float[Array, "b s n h"],
    out_BLNH: Float[Array, "b l n h"],
    lse_BNL: Float[Array, "b n l"],
    dout_BLNH: Float[Array, "b l n h"],
    dlse_BNL: Float[Array, "b n l"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "b l n h"], Float[Array, "b s n h"], Float[Array, "b s n h"]]:
    """Returns the gradients (dq, dk, dv), given `forward`'s results and their cotangents; a dlse of None is zero."""
    q, k, v, out, dout = (_widen(x) for x in (q_BLNH, k_BSNH, v_BSNH, out_BLNH, dout_BLNH))
    p_BNLS = jnp.exp(scale * jnp.einsum("blnh,bsnh->bnls", q, k) - lse_BNL[..., None])
    dp_BNLS = jnp.einsum("blnh,bsnh->bnls", dout, v)
    delta_BNL = jnp.einsum("blnh,blnh->bnl", dout, out) - (0 if dlse_BNL is None else dlse_BNL)
    ds_BNLS = scale * p_BNLS * (dp_BNLS - delta_BNL[..., None])
    dq = jnp.einsum("bnls,bsnh->blnh", ds_BNLS, k)
    dk = jnp.einsum("bnls,blnh->bsnh", ds_BNLS, q)
    dv = jnp.einsum("bnls,blnh->bsnh", p_BNLS, dout)
    return dq.astype(q_BLNH.dtype), dk.astype(k_BSNH.dtype), dv.astype(v_BSNH.dtype)


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
