"""Attention in plain JAX for any device: linear memory, any lengths.

Scores exist one tile at a time, BLOCK queries by BLOCK keys of every head. The first block of a length is the ragged
one and runs as straight-line code; `lax.scan` runs the whole ones that remain. So nothing is padded or masked, and a
length of at most BLOCK has no loop at all.

Inside this file arrays are (B, N, L, H) and row statistics (B, N, L): rows are always axis 2. Matmul operands keep the
caller's dtype, except float16, whose range gradients and tangents exceed; softmax and sums are float32 at least.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.operands import heads_inside, heads_outside

BLOCK = 512


def forward(
    q_BLNH: Float[Array, "b l n h"], k_BSNH: Float[Array, "b s n h"], v_BSNH: Float[Array, "b s n h"], *, scale: float
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    q, k, v = (heads_outside(x) for x in (q_BLNH, k_BSNH, v_BSNH))
    out, lse = _attend_blocks(functools.partial(_value, scale=scale), (q,), (k, v))
    return heads_inside(out, q_BLNH), lse


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
    """Returns (out, lse) of `forward` and their tangents, from one pass over the keys.

    A tangent of None is zero and spares its matmuls.
    """
    operands = (q_BLNH, k_BSNH, v_BSNH, tq_BLNH, tk_BSNH, tv_BSNH)
    q, k, v, tq, tk, tv = (None if x is None else heads_outside(x) for x in operands)
    attend = functools.partial(_value_and_tangent, scale=scale)
    out, lse, t_out, t_lse = _attend_blocks(attend, (q, tq), (k, v, tk, tv))
    return heads_inside(out, q_BLNH), lse, heads_inside(t_out, q_BLNH), t_lse


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
    """Returns the gradients (dq, dk, dv), given `forward`'s results and their cotangents; a dlse of None is zero.

    FlashAttention-2 (Dao 2023), algorithm 2. The gradient of lse with respect to logits is p: dlse shifts delta.
    """
    q, k, v, out, dout = (heads_outside(x) for x in (q_BLNH, k_BSNH, v_BSNH, out_BLNH, dout_BLNH))
    delta = _dot("bnlh,bnlh->bnl", out, dout)
    if dlse_BNL is not None:
        delta -= dlse_BNL

    def pull_back_queries(sums, rows):
        q, dout, lse, delta = rows

        def pull_back_keys(dq, keys):
            k, v = keys
            p = jnp.exp(scale * _dot("bnlh,bnsh->bnls", q, k) - lse[..., None])
            ds = scale * p * (_dot("bnlh,bnsh->bnls", dout, v) - delta[..., None])
            more, dk, dv = (
                _dot("bnls,bnsh->bnlh", ds, k),
                _dot("bnls,bnlh->bnsh", ds, q),
                _dot("bnls,bnlh->bnsh", p, dout),
            )
            return more if dq is None else dq + more, (dk, dv)

        dq, more = _scan_blocks(pull_back_keys, (k, v))
        return more if sums is None else jax.tree.map(jnp.add, sums, more), dq

    (dk, dv), dq = _scan_blocks(pull_back_queries, (q, dout, lse_BNL, delta))
    return heads_inside(dq, q_BLNH), heads_inside(dk, k_BSNH), heads_inside(dv, v_BSNH)


def _attend_blocks(attend, queries, keys) -> tuple[Array, ...]:
    """`attend(*queries, *keys)`, by tiles, merged over the keys and joined over the queries."""

    def attend_queries(_, queries):
        def attend_keys(rows, keys):
            more = attend(*queries, *keys)
            return more if rows is None else merge(rows, more), None

        rows, _ = _scan_blocks(attend_keys, keys)
        return None, rows

    return _scan_blocks(attend_queries, queries)[1]


def _value(q, k, v, scale):
    p, total, lse = _softmax(scale * _dot("bnlh,bnsh->bnls", q, k))
    return _dot("bnls,bnsh->bnlh", p, v) / total[..., None], lse


def _value_and_tangent(q, tq, k, v, tk, tv, scale):
    """With ts the tangent of the logits: t_lse is the mean of ts, and t_out that of tv + (ts - t_lse) v, both under p.

    Subtracting t_lse before the matmul, not t_lse * out after it, keeps t_out accurate in bfloat16 where few keys have
    all of the weight.
    """
    p, total, lse = _softmax(scale * _dot("bnlh,bnsh->bnls", q, k))
    out = _dot("bnls,bnsh->bnlh", p, v) / total[..., None]
    t_out, t_lse = jnp.zeros_like(out), jnp.zeros_like(lse)
    if tv is not None:
        t_out += _dot("bnls,bnsh->bnlh", p, tv) / total[..., None]
    if tq is not None or tk is not None:
        ts = jnp.zeros_like(p)
        if tq is not None:
            ts += scale * _dot("bnlh,bnsh->bnls", tq, k)
        if tk is not None:
            ts += scale * _dot("bnlh,bnsh->bnls", q, tk)
        t_lse += (p * ts).sum(-1) / total
        t_out += _dot("bnls,bnsh->bnlh", p * (ts - t_lse[..., None]), v) / total[..., None]
    return out, lse, t_out, t_lse


def _softmax(s):
    """Returns unnormalised probabilities, their sum and its logarithm before the maximum was taken off."""
    maximum = s.max(-1)
    p = jnp.exp(s - maximum[..., None])
    total = p.sum(-1)
    return p, total, maximum + jnp.log(total)


def merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    """Attention over the keys of both: a mean of the two, with the tangent of its weights.

    Each is (out, lse) or (out, lse, t_out, t_lse) of the same queries, heads before rows.
    """
    (out_a, lse_a, *tangents_a), (out_b, lse_b, *tangents_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    weight_a, weight_b = jnp.exp(lse_a - lse), jnp.exp(lse_b - lse)
    out = weight_a[..., None] * out_a + weight_b[..., None] * out_b
    if not tangents_a:
        return out, lse
    (t_out_a, t_lse_a), (t_out_b, t_lse_b) = tangents_a, tangents_b
    t_lse = weight_a * t_lse_a + weight_b * t_lse_b
    t_out = weight_a[..., None] * (t_out_a + (t_lse_a - t_lse)[..., None] * out_a)
    t_out += weight_b[..., None] * (t_out_b + (t_lse_b - t_lse)[..., None] * out_b)
    return out, lse, t_out, t_lse


def _scan_blocks(step, rows) -> tuple[Any, Any]:
    """`lax.scan` over blocks of axis 2; the first step's carry is None; per-block results are joined along axis 2."""
    length = jax.tree.leaves(rows)[0].shape[2]
    first = (length - 1) % BLOCK + 1
    carry, results = step(None, jax.tree.map(lambda x: x[:, :, :first], rows))
    if first == length:
        return carry, results

    def scan_step(carry, start):
        return step(carry, jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, BLOCK, axis=2), rows))

    def join(first, rest):
        rest = jnp.moveaxis(rest, 0, 2)
        return jnp.concatenate([first, rest.reshape(*rest.shape[:2], -1, *rest.shape[4:])], axis=2)

    carry, rest = lax.scan(scan_step, carry, jnp.arange(first, length, BLOCK))
    return carry, jax.tree.map(join, results, rest)


def _dot(equation, x, y):
    """Operands in the dtype of y, sums in float32 at least."""
    return jnp.einsum(equation, x.astype(y.dtype), y, preferred_element_type=jnp.promote_types(y.dtype, jnp.float32))
