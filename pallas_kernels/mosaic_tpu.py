"""Attention for TPUs: three flash kernels in Pallas."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

TILE = 1024
CHUNK = 512
LANES = 128
VMEM_LIMIT = 56 * 2**20
DQ_LIMIT = 38 * 2**20

LOG2_E = math.log2(math.e)


def forward(
    q_BLNH: Float[Array, "b l n h"], k_BSNH: Float[Array, "b s n h"], v_BSNH: Float[Array, "b s n h"], *, scale: float
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    q, k, v = (_heads_outside(x) for x in (q_BLNH, k_BSNH, v_BSNH))
    out, lse, _, _ = _attend(q, k, v, None, None, None, scale=scale, with_tangent=False)
    return _heads_inside(out, q_BLNH), lse[:, :, 0]


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
    q, k, v, tq, tk, tv = (None if x is None else _heads_outside(x) for x in operands)
    out, lse, t_out, t_lse = _attend(q, k, v, tq, tk, tv, scale=scale, with_tangent=True)
    return _heads_inside(out, q_BLNH), lse[:, :, 0], _heads_inside(t_out, q_BLNH), t_lse[:, :, 0]


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

    FlashAttention-2 (Dao 2023), algorithm 2. The gradient of lse with respect to logits is p: dlse shifts delta.
    """
    q, k, v, out, dout = (_heads_outside(x) for x in (q_BLNH, k_BSNH, v_BSNH, out_BLNH, dout_BLNH))
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1) - dlse_BNL
    length, head_dim = q.shape[2:]
    parts = pl.cdiv(4 * length * max(head_dim, LANES), DQ_LIMIT)
    rows = pl.cdiv(length, parts)
    dtype = q.dtype if parts == 1 else jnp.float32
    by_part = [
        _pull_back(
            q[:, :, part], k, v, dout[:, :, part], lse_BNL[:, :, part], delta[:, :, part], scale=scale, dtype=dtype
        )
        for part in (slice(start, start + rows) for start in range(0, length, rows))
    ]
    dq, dk, dv = zip(*by_part, strict=True)
    return _heads_inside(jnp.concatenate(dq, 2), q_BLNH), _heads_inside(sum(dk), k_BSNH), _heads_inside(sum(dv), v_BSNH)


def _attend(q, k, v, tq, tk, tv, *, scale: float, with_tangent: bool):
    """(out, lse, t_out, t_lse) of arrays (B, N, L, H), row statistics (B, N, 1, L); the last two None or tangents."""
    batch, heads, length, head_dim = q.shape
    keys = k.shape[2]
    query_tile, key_tile = _tile(length), _tile(keys)
    tiles = pl.cdiv(keys, key_tile)

    def only_with_tangent(x):
        return x if with_tangent else None

    by_query = pl.BlockSpec((None, None, query_tile, head_dim), lambda b, n, i, j: (b, n, i, 0))
    by_key = pl.BlockSpec((None, None, key_tile, head_dim), lambda b, n, i, j: (b, n, j, 0))
    by_row = pl.BlockSpec((None, None, 1, query_tile), lambda b, n, i, j: (b, n, 0, i))
    out, lse = _result(q, q.shape, q.dtype), _result(q, (batch, heads, 1, length), jnp.float32)
    sums, statistics = _sums(query_tile, head_dim), _sums(query_tile, LANES)
    return pl.pallas_call(
        functools.partial(_attend_kernel, scale=scale, keys=keys, tiles=tiles),
        grid=(batch, heads, pl.cdiv(length, query_tile), tiles),
        in_specs=[
            *(by_query, by_key, by_key),
            *(None if t is None else spec for t, spec in ((tq, by_query), (tk, by_key), (tv, by_key))),
        ],
        out_specs=[by_query, by_row, only_with_tangent(by_query), only_with_tangent(by_row)],
        out_shape=[out, lse, only_with_tangent(out), only_with_tangent(lse)],
        scratch_shapes=[statistics, statistics, sums, only_with_tangent(statistics), only_with_tangent(sums)],
        compiler_params=_compiler_params("parallel", "parallel", "parallel", "arbitrary"),
        name="attention_tangent" if with_tangent else "attention",
    )(q, k, v, tq, tk, tv)


def _attend_kernel(
    *refs,
    scale: float,
    keys: int,
    tiles: int,
):
    q_ref, k_ref, v_ref, tq_ref, tk_ref, tv_ref, out_ref, lse_ref, t_out_ref, t_lse_ref, *scratch = refs
    m_ref, l_ref, o_ref, c_ref, to_ref = scratch
    query_tile, head_dim = q_ref.shape
    key_tile = k_ref.shape[0]
    tile = pl.program_id(3)

    @pl.when(tile == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        for ref in (l_ref, o_ref, c_ref, to_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    def attend(is_edge: bool):
        present = keys - tile * key_tile if is_edge else None
        k, tk = _read(k_ref), _read(tk_ref)
        v, tv = _read(v_ref, present=present), _read(tv_ref, present=present)
        for start in range(0, query_tile, CHUNK):
            rows = slice(start, min(start + CHUNK, query_tile))
            q, tq = _read(q_ref, rows), _read(tq_ref, rows)

            s = _where_present(scale * LOG2_E * _dot_nt(q, k), present, 1, -jnp.inf)
            m = jnp.maximum(m_ref[rows], s.max(1, keepdims=True))
            p = jnp.exp2(s - _to_width(m, key_tile))
            total = p.sum(1, keepdims=True)
            fade = jnp.exp2(m_ref[rows] - m)
            l = fade * l_ref[rows] + total
            m_ref[rows], l_ref[rows] = m, l

            pv = _dot(p, _side_by_side(v, tv))
            fade = _to_width(fade, head_dim)
            old = fade * o_ref[rows]
            o_ref[rows] = old + pv[:, :head_dim]
            if to_ref is None:
                continue

            to = fade * to_ref[rows]
            if tv is not None:
                to += pv[:, head_dim:]
            if tq is not None or tk is not None:
                ts = _dot_nt(
                    _side_by_side(tq, q if tk is not None else None), _side_by_side(k if tq is not None else None, tk)
                )
                ts = _where_present(ts, present, 1, 0)
                c_old = c_ref[rows]
                c = c_old + ((p * ts).sum(1, keepdims=True) - total * c_old) / l
                c_ref[rows] = c
                h = p * (ts - _to_width(c, key_tile))
                to += scale * (_dot(h, v) + _to_width(c_old - c, head_dim) * old)
            to_ref[rows] = to

    _run(attend, _edge(tile, tiles, keys % key_tile > 0))

    @pl.when(tile == tiles - 1)
    def _():
        l = l_ref[...]
        weight = _to_width(1 / l, head_dim)
        out_ref[...] = (weight * o_ref[...]).astype(out_ref.dtype)
        lse_ref[...] = ((m_ref[...] + jnp.log2(l)) / LOG2_E).T[:1]
        if to_ref is not None:
            t_out_ref[...] = (weight * to_ref[...]).astype(t_out_ref.dtype)
            t_lse_ref[...] = (scale * c_ref[...]).T[:1]


def _pull_back(q, k, v, dout, lse, delta, *, scale, dtype):
    """(dq, dk, dv) in `dtype`, of arrays (B, N, L, H) and row statistics (B, N, L)."""
    batch, heads, length, head_dim = q.shape
    keys = k.shape[2]
    query_tile, key_tile = _tile(length), _tile(keys)
    query_tiles, key_tiles = pl.cdiv(length, query_tile), pl.cdiv(keys, key_tile)

    by_query = pl.BlockSpec((None, None, query_tile, head_dim), lambda b, n, j, i: (b, n, i, 0))
    by_key = pl.BlockSpec((None, None, key_tile, head_dim), lambda b, n, j, i: (b, n, j, 0))
    by_row = pl.BlockSpec((None, None, 1, query_tile), lambda b, n, j, i: (b, n, 0, i))
    # dq is complete in the last round over the queries only: its block stays the first one until then.
    by_query_at_last = pl.BlockSpec(
        (None, None, query_tile, head_dim), lambda b, n, j, i: (b, n, jnp.where(j == key_tiles - 1, i, 0), 0)
    )
    return pl.pallas_call(
        functools.partial(
            _pull_back_kernel, scale=scale, length=length, keys=keys, query_tiles=query_tiles, key_tiles=key_tiles
        ),
        grid=(batch, heads, key_tiles, query_tiles),
        in_specs=[by_query, by_key, by_key, by_query, by_row, by_row],
        out_specs=[by_query_at_last, by_key, by_key],
        out_shape=[_result(q, x.shape, dtype) for x in (q, k, v)],
        scratch_shapes=[_sums(query_tiles * query_tile, head_dim), *2 * [_sums(key_tile, head_dim)]],
        compiler_params=_compiler_params("parallel", "parallel", "arbitrary", "arbitrary"),
        name="attention_gradient",
    )(q, k, v, dout, lse[:, :, None], delta[:, :, None])


def _pull_back_kernel(*refs, scale: float, length: int, keys: int, query_tiles: int, key_tiles: int):
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref, *scratch = refs
    dq_sum_ref, dk_sum_ref, dv_sum_ref = scratch
    query_tile, key_tile = q_ref.shape[0], k_ref.shape[0]
    j, i = pl.program_id(2), pl.program_id(3)
    rows = pl.ds(pl.multiple_of(i * query_tile, query_tile), query_tile)

    @pl.when(i == 0)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.when(j == 0)
    def _():
        dq_sum_ref[rows] = jnp.zeros_like(q_ref, jnp.float32)

    def pull_back(is_edge: bool):
        queries_here = length - i * query_tile if is_edge else None
        keys_here = keys - j * key_tile if is_edge else None
        q, dout = _read(q_ref, present=queries_here), _read(dout_ref, present=queries_here)
        k, v = _read(k_ref, present=keys_here), _read(v_ref, present=keys_here)
        lse = _where_present(lse_ref[...], queries_here, 1, jnp.inf)
        delta = _where_present(delta_ref[...], queries_here, 1, 0)

        s = _where_present(scale * LOG2_E * _dot_nt(k, q), keys_here, 0, -jnp.inf)
        p = jnp.exp2(s - LOG2_E * lse)
        ds = p * (_dot_nt(v, dout) - delta)
        dv_sum_ref[...] += _dot(p, dout)
        dk_sum_ref[...] += _dot(ds, q)
        dq_sum_ref[rows] += _dot(ds, k, contract=(0, 0))

    _run(pull_back, _edge(i, query_tiles, length % query_tile > 0) | _edge(j, key_tiles, keys % key_tile > 0))

    @pl.when(i == query_tiles - 1)
    def _():
        dk_ref[...] = (scale * dk_sum_ref[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)

    @pl.when(j == key_tiles - 1)
    def _():
        dq_ref[...] = (scale * dq_sum_ref[rows]).astype(dq_ref.dtype)


def _edge(tile, tiles, is_ragged):
    """Whether rows of this tile are beyond the array: True or False where all tiles agree, else a traced boolean."""
    return is_ragged and (tiles == 1 or tile == tiles - 1)


def _run(step, is_edge):
    """`step(is_edge)`, so that only tiles at the edge pay for its masks."""
    if isinstance(is_edge, bool):
        step(is_edge)
    else:
        pl.when(is_edge)(lambda: step(True))
        pl.when(jnp.logical_not(is_edge))(lambda: step(False))


def _read(ref, rows=slice(None), present=None):
    """Rows of a tile, zero where they are beyond the array: what memory holds there may be NaN."""
    return None if ref is None else _where_present(ref[rows], present, 0, 0)


def _where_present(x, present, axis, other):
    if present is None:
        return x
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, axis) < present, x, jnp.asarray(other, x.dtype))


def _dot(x, y, contract=(1, 0)):
    """Operands in the dtype of y, sums in float32."""
    precision = None if y.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x.astype(y.dtype), y, dimensions, precision, preferred_element_type=jnp.float32)


_dot_nt = functools.partial(_dot, contract=(1, 1))


def _side_by_side(*arrays):
    arrays = [x for x in arrays if x is not None]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)


def _to_width(x, width):
    """A row statistic, the same in all its LANES, in `width` lanes."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def _tile(length: int) -> int:
    """Rows in a tile: as even as whole registers of LANES rows allow, so that few are beyond the array."""
    return _round_up(pl.cdiv(length, pl.cdiv(length, TILE)), LANES)


def _round_up(x: int, multiple: int) -> int:
    return pl.cdiv(x, multiple) * multiple


def _sums(rows, width):
    return pltpu.VMEM((rows, width), jnp.float32)


def _result(q, shape, dtype):
    """A result that differs between devices of a `shard_map` as q does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(q).manual_axis_type)


def _compiler_params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def _heads_outside(x_BLNH):
    x_BNLH = jnp.swapaxes(x_BLNH, 1, 2)
    return x_BNLH.astype(jnp.float32) if x_BNLH.dtype == jnp.float16 else x_BNLH


def _heads_inside(x_BNLH, like):
    return jnp.swapaxes(x_BNLH, 1, 2).astype(like.dtype)
