"""Attention in plain JAX for any device: linear memory, any lengths.

Scores exist one tile at a time, BLOCK queries by BLOCK keys of every head. The first block of a length is the ragged
one and runs as straight-line code; `lax.scan` runs the whole ones that remain. So nothing is padded or masked, and a
length of at most BLOCK has no loop at all.

Inside this file arrays are (B, N, L, H) and row statistics (B, N, L): rows are always axis 2. Matmul operands keep the
caller's dtype, except float16, whose range gradients and tangents exceed; softmax and sums are float32 at least.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

BLOCK = 512


class _Rows(NamedTuple):
    """Attention of some rows over some keys, in float32 at least; tangents are None when they are not wanted."""

    out: Array
    lse: Array
    t_out: Array | None
    t_lse: Array | None


def forward(
    q_BLNH: Float[Array, "b l n h"], k_BSNH: Float[Array, "b s n h"], v_BSNH: Float[Array, "b s n h"], *, scale: float
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    rows = _attend_blocks(q_BLNH, k_BSNH, v_BSNH, None, None, None, scale)
    return _heads_inside(rows.out, q_BLNH.dtype), rows.lse


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
    """Returns (out, lse) of `forward` and their tangents, from one pass over the keys. A tangent of None is zero, free."""
    rows = _attend_blocks(q_BLNH, k_BSNH, v_BSNH, tq_BLNH, tk_BSNH, tv_BSNH, scale)
    return _heads_inside(rows.out, q_BLNH.dtype), rows.lse, _heads_inside(rows.t_out, q_BLNH.dtype), rows.t_lse


def backward(
    q_BLNH: Float[Array, "b l n h"],
    k_BSNH: Float[Array, "b s n h"],
    v_BSNH: Float[Array, "b s n h"],
    out_BLNH: Float[Array, "b l n h"],
    lse_BNL: Float[Array, "b n l"],
    dout_BLNH: Float[Array, "b l n h"],
    dlse_BNL: Float[Array, "b n l"],
    *,
    scale: float,
) -> tuple[Float[Array, "b l n h"], Float[Array, "b s n h"], Float[Array, "b s n h"]]:
    """Returns the gradients (dq, dk, dv), given `forward`'s results and their cotangents.

    FlashAttention-2 (Dao 2023), algorithm 2. d lse / d s is p, so dlse only shifts the row term delta.
    """
    q, k, v, out, dout = (_heads_outside(x) for x in (q_BLNH, k_BSNH, v_BSNH, out_BLNH, dout_BLNH))
    delta = _dot("bnlh,bnlh->bnl", out, dout) - dlse_BNL

    def add_queries(sums, rows):
        q, dout, lse, delta = rows

        def add_keys(dq, keys):
            k, v = keys
            p = jnp.exp(scale * _dot("bnlh,bnsh->bnls", q, k) - lse[..., None])
            ds = scale * p * (_dot("bnlh,bnsh->bnls", dout, v) - delta[..., None])
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            dk, dv = _dot("bnls,bnlh->bnsh", ds, q), _dot("bnls,bnlh->bnsh", p, dout)
            return _add(dq, _dot("bnls,bnsh->bnlh", ds, k)), (dk, dv)

        dq, (dk, dv) = _scan_blocks(add_keys, (k, v))
        return (dk, dv) if sums is None else (sums[0] + dk, sums[1] + dv), dq

    (dk, dv), dq = _scan_blocks(add_queries, (q, dout, lse_BNL, delta))
    return tuple(_heads_inside(x, q_BLNH.dtype) for x in (dq, dk, dv))


def _attend_blocks(q, k, v, tq, tk, tv, scale) -> _Rows:
    q, k, v, tq, tk, tv = (None if x is None else _heads_outside(x) for x in (q, k, v, tq, tk, tv))

    def attend_queries(_, queries):
        def attend_keys(rows, keys):
            more = _attend(*queries, *keys, scale)
            return more if rows is None else _merge(rows, more), None

        rows, _ = _scan_blocks(attend_keys, (k, v, tk, tv))
        return None, rows

    return _scan_blocks(attend_queries, (q, tq))[1]


def _attend(q, tq, k, v, tk, tv, scale) -> _Rows:
    """One tile. With s = scale q k^T and ts its tangent, t_lse is the mean of ts under p.

    t_out = p tv + (p (ts - t_lse)) v. Subtracting the mean before the matmul, not after it, keeps t_out
    accurate in bfloat16 where few keys hold all of the weight.
    """
    s = scale * _dot("bnlh,bnsh->bnls", q, k)
    max_ = s.max(-1)
    p = jnp.exp(s - max_[..., None])
    total = p.sum(-1)
    out = _dot("bnls,bnsh->bnlh", p.astype(v.dtype), v) / total[..., None]
    lse = max_ + jnp.log(total)
    if tq is None and tk is None and tv is None:
        return _Rows(out, lse, None, None)

    t_out, t_lse = None, jnp.zeros_like(lse)
    if tv is not None:
        t_out = _dot("bnls,bnsh->bnlh", p.astype(v.dtype), tv)
    if tq is not None or tk is not None:
        ts = None if tq is None else _dot("bnlh,bnsh->bnls", tq, k)
        ts = scale * (ts if tk is None else _add(ts, _dot("bnlh,bnsh->bnls", q, tk)))
        t_lse = (p * ts).sum(-1) / total
        h = p * (ts - t_lse[..., None])
        t_out = _add(t_out, _dot("bnls,bnsh->bnlh", h.astype(v.dtype), v))
    return _Rows(out, lse, t_out / total[..., None], t_lse)


def _merge(a: _Rows, b: _Rows) -> _Rows:
    """Attention over the keys of both: a mixture of the two with weights that sum to one."""
    lse = jnp.logaddexp(a.lse, b.lse)
    weight_a, weight_b = jnp.exp(a.lse - lse), jnp.exp(b.lse - lse)
    out = weight_a[..., None] * a.out + weight_b[..., None] * b.out
    if a.t_out is None:
        return _Rows(out, lse, None, None)
    t_lse = weight_a * a.t_lse + weight_b * b.t_lse
    t_out = weight_a[..., None] * (a.t_out + (a.t_lse - t_lse)[..., None] * a.out)
    t_out += weight_b[..., None] * (b.t_out + (b.t_lse - t_lse)[..., None] * b.out)
    return _Rows(out, lse, t_out, t_lse)


def _scan_blocks(step, rows):
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


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _add(x: Array | None, y: Array) -> Array:
    return y if x is None else x + y


def _heads_outside(x_BLNH: Array) -> Array:
    x_BNLH = jnp.swapaxes(x_BLNH, 1, 2)
    return x_BNLH.astype(jnp.float32) if x_BNLH.dtype == jnp.float16 else x_BNLH


def _heads_inside(x_BNLH: Array, dtype) -> Array:
    return jnp.swapaxes(x_BNLH, 1, 2).astype(dtype)
