"""Attention for TPUs: three flash kernels in Pallas (Mosaic TPU).

Each works on a tile of 1024 queries by 1024 keys (512 in float32) of one head. Rows of a tile that are beyond the
array are masked, and only tiles at the edge pay for it. Nothing is padded in HBM, where beyond inputs and results lie
two float32 numbers for each row. Under a mesh, call attention inside `jax.shard_map`: XLA cannot split a kernel.

Tangent. One pass over the keys cannot know t_lse, the mean of the logits' tangents ts under p, before the last key. The
kernel keeps c, the mean over the keys so far, those of this tile included, and the sum of p tv + p (ts - c) v; where
a tile moves c, the sum gains (c_old - c) times the sum of p v, in float32. So what a matmul rounds to bfloat16 is never
ts but its distance from a mean it takes part in: a key with all the weight sets c to its own ts, and its product
is 0 however large ts is. At the end c is t_lse.

Gradient. FlashAttention-2 needs dq for each query and dk, dv for each key, so one of them is added to in every
iteration of the outer loop. Here that is dq, which stays in VMEM for all queries of a head: 5 matmuls instead of 7 in
two kernels, and no partial sums in HBM. Where dq exceeds DQ_BYTES, queries go in parts.

Arithmetic, head dim 128 in bfloat16, one TensorCore (rates as in `pltpu.get_tpu_info`):

                                            v5e        v5p        v6e        v7x
    peak, TFLOP/s                           197        230        920       1155
    HBM, GB/s; needed flops per byte    820; 240  1230; 187  1640; 561  3700; 312
    VMEM, MiB; matrix units            128; 4x128²  64; 4x128²  128; 2x256²  64; 2x256²

  - Flops per byte. Keys are read once for each tile of queries, or the reverse: 4 x 1024 / 4 = 1024 in the value,
    12 x 1024 / 8 = 1536 with the tangent, 10 x 1024 / 4 = 2560 in the gradient. HBM is never the bound.
  - VMEM. Value and tangent: 8 double-buffered tiles of 256 KiB, sums and statistics of 2.5 MiB, 512 rows of s, ts
    (2 MiB each), p and h (1 MiB each): 12.5 MiB. Gradient: 7 tiles, sums of 1 MiB, s and dp (4 MiB each), p and ds
    (2 MiB each): 16.5 MiB, and dq, 512 bytes a row: 16 MiB for 32,760 queries, 37 MiB for 75,600.
  - Matrix unit. One 256 wide is half idle in q k^T, 128 deep, and in p v, 128 wide: at most 50% of the peak. With the
    tangent, [tq, q] [k, tk]^T is 256 deep and p [v, tv] 256 wide: 6 of 8 parts, 75%. Head dim 64 gains likewise.
  - Schedule. `python -m benchmarks.attention_tpu` reads from libtpu how many instruction bundles a tile takes, and what
    share of them its matrix instructions fill. No other unit is as full in any of them. Each tile costs another 150
    to 250 bundles, the reason for 1024 rows rather than 512.

                       v5e          v5p          v6e          v7x
    value           4369 84%     4437 84%     2953 66%     3065 64%
    with tangent   12204 92%    11942 91%     5378 74%     5714 69%
    gradient        9140 97%     9000 97%     5335 94%     5370 93%

The splash kernel that comes with JAX computes value and gradient only, for lengths that its blocks divide. Which of the
two is faster can only be measured on a TPU; with one set of kernels there is one numerical scheme to trust.

Inside this file arrays are (B, N, L, H) and row statistics (B, N, L).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.operands import heads_inside, heads_outside

DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 256  # at 512 the tiles exceed TILES_BYTES
HEAD_DIM_MULTIPLE = 1
ROW_BYTES = 2048  # of a tile's rows, one element each: 1024 rows in bfloat16, 512 in float32
CHUNK = 512  # queries whose logits are in flight at a time
LANES = 128
TILES_BYTES = 22 * 2**20  # VMEM for all but dq
DQ_BYTES = 38 * 2**20  # VMEM for dq: a TensorCore of v5p or v7x has 64 MiB
LOG2_E = math.log2(math.e)


def forward(
    q_BLNH: Float[Array, "b l n h"], k_BSNH: Float[Array, "b s n h"], v_BSNH: Float[Array, "b s n h"], *, scale: float
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    q, k, v = (heads_outside(x) for x in (q_BLNH, k_BSNH, v_BSNH))
    out, lse, _, _ = _attend(q, k, v, None, None, None, scale=scale, with_tangent=False)
    return heads_inside(out, q_BLNH), lse[:, :, 0]


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
    out, lse, t_out, t_lse = _attend(q, k, v, tq, tk, tv, scale=scale, with_tangent=True)
    return heads_inside(out, q_BLNH), lse[:, :, 0], heads_inside(t_out, q_BLNH), t_lse[:, :, 0]


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
    delta_BNL = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
    if dlse_BNL is not None:
        delta_BNL -= dlse_BNL

    length, head_dim = q.shape[2:]
    parts = pl.cdiv(_vmem_bytes(length, head_dim), DQ_BYTES)
    dtype = q.dtype if parts == 1 else jnp.float32
    rows = pl.cdiv(length, parts)
    gradients = []
    for start in range(0, length, rows):
        part = [x[:, :, start : start + rows] for x in (q, dout, lse_BNL, delta_BNL)]
        gradients.append(_pull_back(part, k, v, scale=scale, dtype=dtype))
    dqs, dks, dvs = zip(*gradients, strict=True)
    dq, dk, dv = jnp.concatenate(dqs, axis=2), functools.reduce(jnp.add, dks), functools.reduce(jnp.add, dvs)
    return heads_inside(dq, q_BLNH), heads_inside(dk, k_BSNH), heads_inside(dv, v_BSNH)


def _attend(q, k, v, tq, tk, tv, *, scale, with_tangent):
    """(out, lse, t_out, t_lse), row statistics as (B, N, 1, L); without tangent the last two are None."""
    batch, heads, length, head_dim = q.shape
    keys = k.shape[2]
    query_tile, key_tile = _tile(length, q.dtype), _tile(keys, q.dtype)
    query_tiles, key_tiles = pl.cdiv(length, query_tile), pl.cdiv(keys, key_tile)

    def tangent(*x):
        return x if with_tangent else len(x) * (None,)

    by_query = pl.BlockSpec((None, None, query_tile, head_dim), lambda b, n, i, j: (b, n, i, 0))
    by_key = pl.BlockSpec((None, None, key_tile, head_dim), lambda b, n, i, j: (b, n, j, 0))
    by_row = pl.BlockSpec((None, None, 1, query_tile), lambda b, n, i, j: (b, n, 0, i))
    specs = (by_query, by_key, by_key)
    out, lse = _result(q, q.shape, q.dtype), _result(q, (batch, heads, 1, length), jnp.float32)
    sums, statistic = pltpu.VMEM((query_tile, head_dim), jnp.float32), pltpu.VMEM((query_tile, LANES), jnp.float32)
    moving = [x is not None for x in (tq, tk, tv)]
    return pl.pallas_call(
        functools.partial(_attend_kernel, scale=scale, keys=keys, key_tiles=key_tiles),
        grid=(batch, heads, query_tiles, key_tiles),
        in_specs=[*specs, *(spec if moves else None for spec, moves in zip(specs, moving, strict=True))],
        out_specs=[by_query, by_row, *tangent(by_query, by_row)],
        out_shape=[out, lse, *tangent(out, lse)],
        scratch_shapes=[statistic, statistic, sums, *tangent(statistic, sums)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=TILES_BYTES
        ),
        cost_estimate=_cost(
            q, k, 2 + sum(moving) + any(moving[:2]), (q, tq, out, *tangent(out)), (k, v, tk, tv), query_tiles
        ),
        name="attention_with_tangent" if with_tangent else "attention",
    )(q, k, v, tq, tk, tv)


def _attend_kernel(*refs, scale, keys, key_tiles):
    """m: maximum of the logits, base 2; l: sum of p; o: sum of p v; c: mean of ts / scale; to: sum for t_out."""
    q_ref, k_ref, v_ref, tq_ref, tk_ref, tv_ref, out_ref, lse_ref, t_out_ref, t_lse_ref, *sums = refs
    m_ref, l_ref, o_ref, c_ref, to_ref = sums
    query_tile, head_dim = q_ref.shape
    key_tile = k_ref.shape[0]
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        for ref in (l_ref, o_ref, c_ref, to_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    def attend(is_edge):
        present = keys - j * key_tile if is_edge else None
        k, v, tk, tv = (_read(ref, present=present) for ref in (k_ref, v_ref, tk_ref, tv_ref))
        for start in range(0, query_tile, CHUNK):
            rows = slice(start, min(start + CHUNK, query_tile))
            q, tq = _read(q_ref, rows), _read(tq_ref, rows)
            s = _where_present(scale * LOG2_E * _dot_nt(q, k), present, 1, -jnp.inf)
            ts = _logit_tangents(q, k, tq, tk)

            m = jnp.maximum(m_ref[rows], s.max(1, keepdims=True))
            fade = jnp.exp2(m_ref[rows] - m)
            p = jnp.exp2(s - _widen(m, key_tile))
            l_old = fade * l_ref[rows]
            l = l_old + p.sum(1, keepdims=True)
            m_ref[rows], l_ref[rows] = m, l

            pv = _dot(p, _side_by_side(v, tv))
            o_old = _widen(fade, head_dim) * o_ref[rows]
            o_ref[rows] = o_old + pv[:, :head_dim]
            if to_ref is None:
                continue
            to = _widen(fade, head_dim) * to_ref[rows]
            if tv is not None:
                to += pv[:, head_dim:]
            if ts is not None:
                c = (l_old * c_ref[rows] + (p * ts).sum(1, keepdims=True)) / l
                h = p * (ts - _widen(c, key_tile))
                to += scale * (_dot(h, v) + _widen(c_ref[rows] - c, head_dim) * o_old)
                c_ref[rows] = c
            to_ref[rows] = to

    _run(attend, _is_edge(j, key_tiles, keys % key_tile))

    @pl.when(j == key_tiles - 1)
    def _():
        l = l_ref[...]
        weight = _widen(1 / l, head_dim)
        out_ref[...] = (weight * o_ref[...]).astype(out_ref.dtype)
        lse_ref[...] = ((m_ref[...] + jnp.log2(l)) / LOG2_E).T[:1]
        if to_ref is not None:
            t_out_ref[...] = (weight * to_ref[...]).astype(t_out_ref.dtype)
            t_lse_ref[...] = (scale * c_ref[...]).T[:1]


def _logit_tangents(q, k, tq, tk):
    """tq k^T + q tk^T as one matmul, twice as deep; None where both tangents are."""
    if tq is None and tk is None:
        return None
    queries = _side_by_side(tq, None if tk is None else q)
    return _dot_nt(queries, _side_by_side(None if tq is None else k, tk))


def _pull_back(queries, k, v, *, scale, dtype):
    """(dq, dk, dv) in dtype, of queries (q, dout, lse, delta)."""
    q, dout, lse_BNL, delta_BNL = queries
    batch, heads, length, head_dim = q.shape
    keys = k.shape[2]
    query_tile, key_tile = _tile(length, q.dtype), _tile(keys, q.dtype)
    query_tiles, key_tiles = pl.cdiv(length, query_tile), pl.cdiv(keys, key_tile)

    by_query = pl.BlockSpec((None, None, query_tile, head_dim), lambda b, n, j, i: (b, n, i, 0))
    by_key = pl.BlockSpec((None, None, key_tile, head_dim), lambda b, n, j, i: (b, n, j, 0))
    by_row = pl.BlockSpec((None, None, 1, query_tile), lambda b, n, j, i: (b, n, 0, i))
    # dq is complete in the last round over the queries. Until then its block does not move, so nothing is written.
    dq_spec = pl.BlockSpec(by_query.block_shape, lambda b, n, j, i: (b, n, jnp.where(j == key_tiles - 1, i, 0), 0))
    results = [_result(q, x.shape, dtype) for x in (q, k, v)]
    rows = query_tiles * query_tile
    return pl.pallas_call(
        functools.partial(
            _pull_back_kernel, scale=scale, length=length, keys=keys, query_tiles=query_tiles, key_tiles=key_tiles
        ),
        grid=(batch, heads, key_tiles, query_tiles),
        in_specs=[by_query, by_query, by_row, by_row, by_key, by_key],
        out_specs=[dq_spec, by_key, by_key],
        out_shape=results,
        scratch_shapes=[pltpu.VMEM((n, head_dim), jnp.float32) for n in (rows, key_tile, key_tile)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=TILES_BYTES + _vmem_bytes(rows, head_dim),
        ),
        cost_estimate=_cost(q, k, 5, (k, v, *results), (q, dout), key_tiles),
        name="attention_gradient",
    )(q, dout, lse_BNL[:, :, None], delta_BNL[:, :, None], k, v)


def _pull_back_kernel(*refs, scale, length, keys, query_tiles, key_tiles):
    """Keys are the rows of its logits: row statistics of queries then lie along lanes, as they come from HBM."""
    q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref, *sums = refs
    dq_sum_ref, dk_sum_ref, dv_sum_ref = sums
    query_tile, key_tile = q_ref.shape[0], k_ref.shape[0]
    j, i = pl.program_id(2), pl.program_id(3)
    rows = pl.ds(pl.multiple_of(i * query_tile, query_tile), query_tile)

    @pl.when(i == 0)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.when(j == 0)
    def _():
        dq_sum_ref[rows] = jnp.zeros(q_ref.shape, jnp.float32)

    def pull_back(is_edge):
        queries_present = length - i * query_tile if is_edge else None
        keys_present = keys - j * key_tile if is_edge else None
        q, dout = _read(q_ref, present=queries_present), _read(dout_ref, present=queries_present)
        k, v = _read(k_ref, present=keys_present), _read(v_ref, present=keys_present)
        lse = _where_present(lse_ref[...], queries_present, 1, jnp.inf)
        delta = _where_present(delta_ref[...], queries_present, 1, 0)

        s = _where_present(scale * LOG2_E * _dot_nt(k, q), keys_present, 0, -jnp.inf)
        p = jnp.exp2(s - LOG2_E * lse)
        ds = p * (_dot_nt(v, dout) - delta)
        dv_sum_ref[...] += _dot(p, dout)
        dk_sum_ref[...] += _dot(ds, q)
        dq_sum_ref[rows] += _dot(ds, k, contract=(0, 0))

    _run(pull_back, _is_edge(i, query_tiles, length % query_tile) | _is_edge(j, key_tiles, keys % key_tile))

    @pl.when(i == query_tiles - 1)
    def _():
        dk_ref[...] = (scale * dk_sum_ref[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)

    @pl.when(j == key_tiles - 1)
    def _():
        dq_ref[...] = (scale * dq_sum_ref[rows]).astype(dq_ref.dtype)


def _is_edge(tile, tiles, rest):
    """Whether rows of this tile are beyond the array: a bool where it is the same for all tiles."""
    if rest == 0:
        return False
    return True if tiles == 1 else tile == tiles - 1


def _run(step, is_edge):
    """step(is_edge), where only the tiles at the edge pay for masks."""
    if isinstance(is_edge, bool):
        step(is_edge)
    else:
        pl.when(is_edge)(lambda: step(True))
        pl.when(jnp.logical_not(is_edge))(lambda: step(False))


def _read(ref, rows=slice(None), present=None):
    """Rows of a tile, zero beyond the array: what is in memory there can be NaN."""
    return None if ref is None else _where_present(ref[rows], present, 0, 0)


def _where_present(x, present, axis, other):
    """x, and `other` from index `present` on; a `present` of None is all of it."""
    if present is None:
        return x
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, axis) < present, x, jnp.asarray(other, x.dtype))


def _dot(x, y, contract=(1, 0)):
    """Operands in the dtype of y, sums in float32."""
    precision = None if y.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x.astype(y.dtype), y, dimensions, precision, preferred_element_type=jnp.float32)


def _dot_nt(x, y):
    return _dot(x, y, contract=(1, 1))


def _side_by_side(*arrays):
    return jnp.concatenate([x for x in arrays if x is not None], axis=1)


def _widen(x, width):
    """A row statistic, which is the same in all its LANES, in `width` lanes."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def _tile(length, dtype):
    """Rows of a tile: tiles of one size, whole registers, and few rows beyond the array."""
    tiles = pl.cdiv(length, ROW_BYTES // dtype.itemsize)
    return _round_up(pl.cdiv(length, tiles), LANES)


def _vmem_bytes(rows, width):
    return 4 * rows * _round_up(width, LANES)


def _round_up(x, multiple):
    return pl.cdiv(x, multiple) * multiple


def _result(q, shape, dtype):
    """What a kernel returns; inside `jax.shard_map` it differs between devices where q does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(q).manual_axis_type)


def _cost(q, k, matmuls, once, repeated, repeats):
    """For XLA's scheduler. Arrays in `repeated` are read `repeats` times; row statistics are left out."""
    batch, heads, length, head_dim = q.shape
    logits = batch * heads * length * k.shape[2]
    once, repeated = (sum(x.size * x.dtype.itemsize for x in group if x is not None) for group in (once, repeated))
    return pl.CostEstimate(
        flops=2 * matmuls * logits * head_dim, transcendentals=logits, bytes_accessed=once + repeats * repeated
    )
