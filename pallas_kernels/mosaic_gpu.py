"""Flash attention for NVIDIA Hopper, in Pallas' Mosaic GPU: bfloat16, head dims up to 128, any lengths.

A thread block has two warpgroups that compute, 64 rows each, and one that only fetches tiles with the tensor memory
accelerator, into `stages` slots of shared memory. Products are wgmma with float32 accumulators in registers.

Value and tangent come from one pass over the keys. With p the unnormalised probabilities of a tile and ts the tangent
of its logits, six products feed two accumulators that the registers of a warpgroup can hold:

    s = q k^T    ts = tq k^T + q tk^T    out += p v    t_out += p tv + (p * ts) v

The exponentials of s are computed while the tensor cores work on ts, and the two warpgroups take turns on the tensor
cores, so that one computes exponentials while the other multiplies. At head dim 128 the four 64 x 64 and 64 x 128
accumulators are 192 of the 240 registers of a thread; shared memory holds q and tq (64 KiB) and two stages of k, tk, v
and tv (128 KiB). The bounds: a product of 64 queries by 64 keys reads both operands from shared memory at its full
bandwidth, and wider tiles do not fit the registers; and the power the chip may draw (benchmarks/README.md).

The gradient is two kernels, one that holds rows of q and runs over keys and one that holds rows of k and v and runs
over queries, so that every sum is made in one place, in one order: results do not change from run to run.

Lengths that are no multiple of a tile cost a partial tile: of matrices, the accelerator reads zeros beyond the end and
does not write there. Its tensor maps need lengths that are multiples of 8 and head dims that are multiples of 64; other
arrays are padded first. Row statistics are copied without a map, which knows only the end of the whole array, not that
of a head: they are padded to whole blocks of rows.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

ROWS = 64  # of one warpgroup: what a wgmma instruction takes
COMPUTE = 2  # warpgroups that compute
DTYPES = ("bfloat16",)
MAX_HEAD_DIM = 128
HEAD_DIM_MULTIPLE = 1  # others than 64 and 128 are padded
MULTIPROCESSORS = 132
LOG2E = math.log2(math.e)

TILE = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = TILE.reduce(1), TILE.reduce(0)


class Tiles(NamedTuple):
    """How a pass over the keys (or, for `dk_dv`, over the queries) is cut."""

    block: int  # keys (queries) a step
    stages: int  # steps in flight
    take_turns: bool = False  # the two warpgroups alternate on the tensor cores


# By pass and padded head dim, as measured on an H200 (`python -m benchmarks.attention_tiles`); lengths matter little.
TILES = {
    ("value", 64): Tiles(128, 2, take_turns=True),
    ("value", 128): Tiles(128, 2, take_turns=True),
    ("value and tangent", 64): Tiles(128, 2, take_turns=True),
    ("value and tangent", 128): Tiles(64, 2, take_turns=True),
    ("dq", 64): Tiles(128, 2),
    ("dq", 128): Tiles(128, 2),
    ("dk_dv", 64): Tiles(64, 3),
    ("dk_dv", 128): Tiles(64, 4),
}


def forward(
    q_BLNH: BFloat16[Array, "b l n h"],
    k_BSNH: BFloat16[Array, "b s n h"],
    v_BSNH: BFloat16[Array, "b s n h"],
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[BFloat16[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    tiles = tiles or _tiles("value", q_BLNH)
    return _attend(q_BLNH, k_BSNH, v_BSNH, None, None, None, scale=scale, tiles=tiles)


def forward_with_tangent(
    q_BLNH: BFloat16[Array, "b l n h"],
    k_BSNH: BFloat16[Array, "b s n h"],
    v_BSNH: BFloat16[Array, "b s n h"],
    tq_BLNH: BFloat16[Array, "b l n h"] | None,
    tk_BSNH: BFloat16[Array, "b s n h"] | None,
    tv_BSNH: BFloat16[Array, "b s n h"] | None,
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[BFloat16[Array, "b l n h"], Float[Array, "b n l"], BFloat16[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns (out, lse) of `forward` and their tangents, from one pass over the keys.

    A tangent of None is zero and spares its products.
    """
    operands = q_BLNH, k_BSNH, v_BSNH, tq_BLNH, tk_BSNH, tv_BSNH
    if all(t is None for t in operands[3:]):
        out, lse = forward(*operands[:3], scale=scale)
        return out, lse, jnp.zeros_like(out), jnp.zeros_like(lse)
    return _attend(*operands, scale=scale, tiles=tiles or _tiles("value and tangent", q_BLNH))


def backward(
    q_BLNH: BFloat16[Array, "b l n h"],
    k_BSNH: BFloat16[Array, "b s n h"],
    v_BSNH: BFloat16[Array, "b s n h"],
    out_BLNH: BFloat16[Array, "b l n h"],
    lse_BNL: Float[Array, "b n l"],
    dout_BLNH: BFloat16[Array, "b l n h"],
    dlse_BNL: Float[Array, "b n l"] | None,
    *,
    scale: float,
    dq_tiles: Tiles | None = None,
    dk_dv_tiles: Tiles | None = None,
) -> tuple[BFloat16[Array, "b l n h"], BFloat16[Array, "b s n h"], BFloat16[Array, "b s n h"]]:
    """Returns the gradients (dq, dk, dv), given `forward`'s results and their cotangents; dlse of None is zero.

    FlashAttention-2 (Dao 2023), algorithm 2. The gradient of lse with respect to logits is p: dlse shifts delta.
    """
    delta = jnp.einsum("blnh,blnh->bnl", out_BLNH, dout_BLNH, preferred_element_type=jnp.float32)
    if dlse_BNL is not None:
        delta -= dlse_BNL
    operands = q_BLNH, k_BSNH, v_BSNH, dout_BLNH, lse_BNL, delta
    dq = _dq(*operands, scale=scale, tiles=dq_tiles or _tiles("dq", q_BLNH))
    return dq, *_dk_dv(*operands, scale=scale, tiles=dk_dv_tiles or _tiles("dk_dv", q_BLNH))


def _tiles(name, q):
    return TILES[name, pl.cdiv(q.shape[3], 64) * 64]


def _attend(q, k, v, tq, tk, tv, *, scale, tiles):
    """(out, lse) where no operand has a tangent, otherwise (out, lse, t_out, t_lse)."""
    if scale < 0:  # the running maximum is that of scaled logits
        q, tq, scale = -q, None if tq is None else -tq, -scale
    (batch, length, heads, head_dim), keys, dtype = q.shape, k.shape[1], q.dtype
    inputs = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}
    inputs = {name: _pad(x) for name, x in inputs.items() if x is not None}
    has_tangent, has_ts = len(inputs) > 3, "tq" in inputs or "tk" in inputs
    results = ("out", "lse", "t_out", "t_lse") if has_tangent else ("out", "lse")
    dim, block, ragged = inputs["q"].shape[-1], tiles.block, keys % tiles.block
    row_blocks, steps = pl.cdiv(length, COMPUTE * ROWS), pl.cdiv(keys, block)
    stages = min(tiles.stages, steps)

    def kernel(*refs, smem, full, free, turn):
        refs = dict(zip((*inputs, *results), refs, strict=True))
        warpgroup = lax.axis_index("warpgroup")
        b, n, row_block = _locate(heads, row_blocks)

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            rows = pl.ds((row_block * COMPUTE + warpgroup) * ROWS, ROWS)
            mine = {name: smem[name].at[warpgroup] for name in ("q", "tq", "lse", "t_lse") if name in smem}
            for name in [name for name in ("q", "tq") if name in inputs]:
                plgpu.copy_gmem_to_smem(refs[name].at[b, rows, n], mine[name], full["q"].at[warpgroup])
            plgpu.barrier_wait(full["q"].at[warpgroup])
            end_turn, await_turn = _turns(turn, tiles.take_turns)

            @pl.when(warpgroup == 1)
            def let_the_other_begin():
                end_turn()
                await_turn()

            def step(i, carry):
                out, m, l, t_out, r = carry
                slot = lax.rem(i, jnp.int32(stages))
                tile = {name: smem[name].at[slot] for name in inputs if name[-1] in "kv"}
                plgpu.barrier_wait(full["k"].at[slot])

                def attend_keys(s_acc, ts_acc: Any = None):
                    plgpu.wgmma(s_acc, mine["q"], tile["k"].T)
                    if "tq" in inputs:
                        plgpu.wgmma(ts_acc, mine["tq"], tile["k"].T)
                    if "tk" in inputs:
                        plgpu.barrier_wait(full["tk"].at[slot])
                        plgpu.wgmma(ts_acc, mine["q"], tile["tk"].T)
                    end_turn()
                    await_turn()
                    # The products of ts go on while the exponentials of s are computed.
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=("tq" in inputs) + ("tk" in inputs))
                    if ragged:
                        s = lax.cond(i == steps - 1, lambda s: _cut_columns(s, ragged, -jnp.inf), lambda s: s, s)
                    m_new = jnp.maximum(m, s.max(axis=1) * (scale * LOG2E))
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s * (scale * LOG2E) - _over_columns(m_new, s))
                    l_new = l * alpha + p.sum(axis=1)
                    p16 = p.astype(dtype)
                    out_new = out * _over_columns(alpha, out)
                    t_out_new = t_out * _over_columns(alpha, t_out) if has_tangent else None
                    kept = (p16, p if has_ts else None, m_new, l_new, out_new, t_out_new, r * alpha if has_ts else None)
                    p16, p, m_new, l_new, out_new, t_out_new, r_new = lax.optimization_barrier(kept)
                    end_turn()
                    # A wait for memory, beyond which the compiler does not move the next wait for the tensor cores.
                    plgpu.barrier_wait(full["v"].at[slot])
                    if "tv" in inputs:
                        plgpu.barrier_wait(full["tv"].at[slot])
                    h = None
                    if has_ts:
                        h = p * (plgpu.wgmma_accumulator_load(ts_acc, wait_n=0) * scale)
                        r_new += h.sum(axis=1)
                        h = h.astype(dtype)
                    return p16, h, m_new, l_new, out_new, t_out_new, r_new

                p, h, m, l, out, t_out, r = pl.run_scoped(attend_keys, *[_accumulator(block)] * (1 + has_ts))
                plgpu.barrier_arrive(free["k"].at[slot])
                await_turn()

                def attend_values(accumulators):
                    out_acc, t_out_acc = accumulators
                    plgpu.wgmma(out_acc, p, tile["v"])
                    if has_ts:
                        plgpu.wgmma(t_out_acc, h, tile["v"])
                    if "tv" in inputs:
                        plgpu.wgmma(t_out_acc, p, tile["tv"])

                out, t_out = _accumulate(attend_values, (out, t_out))
                plgpu.barrier_arrive(free["v"].at[slot])
                return out, m, l, t_out, r

            zeros, zero_rows = _zeros(TILE, ROWS, dim), _zeros(PER_ROW, ROWS)
            start = zeros, zero_rows - jnp.inf, zero_rows, zeros if has_tangent else None, zero_rows if has_ts else None
            out, m, l, t_out, r = lax.fori_loop(0, steps, step, start)

            @pl.when(warpgroup == 0)
            def let_the_other_end():
                end_turn()
                await_turn()

            # Queries are not needed any more: results take their place.
            out *= _over_columns(1 / l, out)
            mine["q"][...] = out.astype(dtype)
            mine["lse"][...] = (m + jnp.log2(l)) / LOG2E
            if has_tangent:
                t_lse = r / l if has_ts else zero_rows
                t_out = t_out * _over_columns(1 / l, out) - _over_columns(t_lse, out) * out
                mine["tq"][...] = t_out.astype(dtype)
                mine["t_lse"][...] = t_lse
            plgpu.commit_smem()
            for name, home in zip(results, ("q", "lse", "tq", "t_lse"), strict=False):
                at = (b, n, rows) if name.endswith("lse") else (b, rows, n)
                plgpu.copy_smem_to_gmem(mine[home], refs[name].at[at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def fetch():
            plgpu.set_max_registers(24, action="decrease")

            def fetch_step(i, slot, await_free):
                for kind in ("k", "v"):
                    await_free(free[kind].at[slot])
                    for name in [name for name in inputs if name[-1] == kind]:
                        source = refs[name].at[b, pl.ds(i * block, block), n]
                        plgpu.copy_gmem_to_smem(source, smem[name].at[slot], full[name].at[slot])

            _fetch_steps(fetch_step, steps, stages)

    rows, tiles_of_keys, statistics = _matrix(COMPUTE, ROWS, dim), _matrix(stages, block, dim), _vector(COMPUTE, ROWS)
    smem = {"q": rows, "lse": statistics} | ({"tq": rows, "t_lse": statistics} if has_tangent else {})
    full = {name: plgpu.Barrier(num_barriers=stages) for name in inputs if name[-1] in "kv"}
    per_query = jax.ShapeDtypeStruct((batch, heads, row_blocks * COMPUTE * ROWS), jnp.float32)
    out, lse, *tangents = _run(
        kernel,
        out_type=[per_query if name.endswith("lse") else _like(inputs["q"]) for name in results],
        scratch_types={
            "smem": smem | {name: tiles_of_keys for name in full},
            "full": full | {"q": plgpu.Barrier(num_arrivals=1 + ("tq" in inputs), num_barriers=COMPUTE)},
            "free": {kind: plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages) for kind in ("k", "v")},
            "turn": plgpu.Barrier(num_arrivals=COMPUTE),
        },
        blocks=batch * heads * row_blocks,
    )(*inputs.values())
    cut = [out[:, :length, :, :head_dim], lse[:, :, :length]]
    if has_tangent:
        cut += [tangents[0][:, :length, :, :head_dim], tangents[1][:, :, :length]]
    # Without the barrier XLA runs the kernel once more where a result has a second user, a scan that stacks it.
    return lax.optimization_barrier(tuple(cut))


def _dq(q, k, v, dout, lse, delta, *, scale, tiles):
    """Holds rows of q and dout, runs over keys."""
    (batch, length, heads, head_dim), keys, dtype = q.shape, k.shape[1], q.dtype
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta}
    inputs = {name: _pad(x) for name, x in inputs.items()}
    dim, block, ragged = inputs["q"].shape[-1], tiles.block, keys % tiles.block
    row_blocks, steps = pl.cdiv(length, COMPUTE * ROWS), pl.cdiv(keys, block)
    stages = min(tiles.stages, steps)

    def kernel(*refs, smem, full, free):
        refs = dict(zip((*inputs, "dq"), refs, strict=True))
        warpgroup = lax.axis_index("warpgroup")
        b, n, row_block = _locate(heads, row_blocks)

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            rows = pl.ds((row_block * COMPUTE + warpgroup) * ROWS, ROWS)
            mine = {name: smem[name].at[warpgroup] for name in ("q", "dout", "lse", "delta")}
            for name, home in mine.items():
                at = (b, rows, n) if name in ("q", "dout") else (b, n, rows)
                plgpu.copy_gmem_to_smem(refs[name].at[at], home, full["q"].at[warpgroup])
            plgpu.barrier_wait(full["q"].at[warpgroup])
            lse, delta = (plgpu.layout_cast(mine[name][...], PER_ROW) for name in ("lse", "delta"))
            plgpu.barrier_wait(full["k"].at[0])

            def step(i, dq):
                slot = lax.rem(i, jnp.int32(stages))
                k, v = smem["k"].at[slot], smem["v"].at[slot]

                def pull_back(s_acc, dp_acc):
                    plgpu.wgmma(s_acc, mine["q"], k.T)
                    plgpu.barrier_wait(full["v"].at[slot])
                    plgpu.wgmma(dp_acc, mine["dout"], v.T)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    p = jnp.exp2(s * (scale * LOG2E) - _over_columns(lse * LOG2E, s))
                    if ragged:
                        p = lax.cond(i == steps - 1, lambda p: _cut_columns(p, ragged, 0.0), lambda p: p, p)
                    p = lax.optimization_barrier(p)
                    _await_next(full["k"], i, steps, stages)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                    return (p * (dp - _over_columns(delta, p))).astype(dtype)

                ds = pl.run_scoped(pull_back, *[_accumulator(block)] * 2)
                plgpu.barrier_arrive(free["v"].at[slot])
                (dq,) = _accumulate(lambda accumulators: plgpu.wgmma(accumulators[0], ds, k), (dq,))
                plgpu.barrier_arrive(free["k"].at[slot])
                return dq

            dq = lax.fori_loop(0, steps, step, _zeros(TILE, ROWS, dim))
            mine["q"][...] = (dq * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine["q"], refs["dq"].at[b, rows, n])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def fetch():
            plgpu.set_max_registers(24, action="decrease")

            def fetch_step(i, slot, await_free):
                for name in ("k", "v"):
                    await_free(free[name].at[slot])
                    source = refs[name].at[b, pl.ds(i * block, block), n]
                    plgpu.copy_gmem_to_smem(source, smem[name].at[slot], full[name].at[slot])

            _fetch_steps(fetch_step, steps, stages)

    rows, tiles_of_keys, statistics = _matrix(COMPUTE, ROWS, dim), _matrix(stages, block, dim), _vector(COMPUTE, ROWS)
    (dq,) = _run(
        kernel,
        out_type=[_like(inputs["q"])],
        scratch_types={
            "smem": {"q": rows, "dout": rows, "lse": statistics, "delta": statistics}
            | {"k": tiles_of_keys, "v": tiles_of_keys},
            "full": {name: plgpu.Barrier(num_barriers=stages) for name in ("k", "v")}
            | {"q": plgpu.Barrier(num_arrivals=4, num_barriers=COMPUTE)},
            "free": {name: plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages) for name in ("k", "v")},
        },
        blocks=batch * heads * row_blocks,
    )(*inputs.values())
    return dq[:, :length, :, :head_dim]


def _dk_dv(q, k, v, dout, lse, delta, *, scale, tiles):
    """Holds rows of k and v, runs over queries.

    Few keys make few thread blocks: then each takes a part of the queries, and the parts are summed in float32.
    """
    (batch, length, heads, _), (keys, head_dim), dtype = q.shape, k.shape[1::2], q.dtype
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta}
    inputs = {name: _pad(x) for name, x in inputs.items()}
    dim, block = inputs["q"].shape[-1], tiles.block
    row_blocks, steps = pl.cdiv(keys, COMPUTE * ROWS), pl.cdiv(length, block)
    parts = min(steps, pl.cdiv(2 * MULTIPROCESSORS, batch * heads * row_blocks))
    steps_of_part = pl.cdiv(steps, parts)
    parts = pl.cdiv(steps, steps_of_part)
    stages = min(tiles.stages, steps_of_part)

    def kernel(*refs, smem, full, free):
        refs = dict(zip((*inputs, "dk", "dv"), refs, strict=True))
        warpgroup = lax.axis_index("warpgroup")
        b, n, row_block = _locate(heads, row_blocks * parts)
        row_block, part = lax.div(row_block, parts), lax.rem(row_block, parts)
        first = part * steps_of_part
        count = jnp.minimum(steps_of_part, steps - first)

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            rows = pl.ds((row_block * COMPUTE + warpgroup) * ROWS, ROWS)
            k, v = smem["k"].at[warpgroup], smem["v"].at[warpgroup]
            plgpu.copy_gmem_to_smem(refs["k"].at[b, rows, n], k, full["k"].at[warpgroup])
            plgpu.copy_gmem_to_smem(refs["v"].at[b, rows, n], v, full["k"].at[warpgroup])
            plgpu.barrier_wait(full["k"].at[warpgroup])
            plgpu.barrier_wait(full["q"].at[0])

            def step(i, gradients):
                slot = lax.rem(i, jnp.int32(stages))
                q, dout = smem["q"].at[slot], smem["dout"].at[slot]

                def pull_back(s_acc, dp_acc):
                    """Logits and their gradients, transposed: keys by queries."""
                    plgpu.wgmma(s_acc, k, q.T)
                    plgpu.barrier_wait(full["dout"].at[slot])
                    plgpu.wgmma(dp_acc, v, dout.T)
                    lse, delta = (plgpu.layout_cast(smem[name].at[slot][...], PER_COLUMN) for name in ("lse", "delta"))
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    p = lax.optimization_barrier(jnp.exp2(s * (scale * LOG2E) - _over_rows(lse * LOG2E, s)))
                    _await_next(full["q"], i, count, stages)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                    return p.astype(dtype), (p * (dp - _over_rows(delta, p))).astype(dtype)

                p, ds = pl.run_scoped(pull_back, *[_accumulator(block)] * 2)

                def accumulate(accumulators):
                    dk_acc, dv_acc = accumulators
                    plgpu.wgmma(dv_acc, p, dout)
                    plgpu.wgmma(dk_acc, ds, q)

                gradients = _accumulate(accumulate, gradients)
                plgpu.barrier_arrive(free.at[slot])
                return gradients

            zeros = _zeros(TILE, ROWS, dim)
            dk, dv = lax.fori_loop(0, count, step, (zeros, zeros))
            dk *= scale
            if parts > 1:
                refs["dk"].at[part, b, n, rows][...] = dk
                refs["dv"].at[part, b, n, rows][...] = dv
            else:
                k[...], v[...] = dk.astype(dtype), dv.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k, refs["dk"].at[b, rows, n])
                plgpu.copy_smem_to_gmem(v, refs["dv"].at[b, rows, n])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def fetch():
            plgpu.set_max_registers(24, action="decrease")

            def fetch_step(i, slot, await_free):
                await_free(free.at[slot])
                queries = pl.ds((first + i) * block, block)
                for name, of in (("q", "q"), ("lse", "dout"), ("delta", "dout"), ("dout", "dout")):
                    at = (b, queries, n) if name == of else (b, n, queries)
                    plgpu.copy_gmem_to_smem(refs[name].at[at], smem[name].at[slot], full[of].at[slot])

            _fetch_steps(fetch_step, count, stages)

    rows, tiles_of_queries, statistics = (
        _matrix(COMPUTE, ROWS, dim),
        _matrix(stages, block, dim),
        _vector(stages, block),
    )
    partial = jax.ShapeDtypeStruct((parts, batch, heads, row_blocks * COMPUTE * ROWS, dim), jnp.float32)
    dk, dv = _run(
        kernel,
        out_type=[partial if parts > 1 else _like(inputs["k"])] * 2,
        scratch_types={
            "smem": {"k": rows, "v": rows, "q": tiles_of_queries, "dout": tiles_of_queries}
            | {"lse": statistics, "delta": statistics},
            "full": {
                "k": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
                "q": plgpu.Barrier(num_barriers=stages),
                "dout": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            },
            "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        },
        blocks=batch * heads * row_blocks * parts,
    )(*inputs.values())
    if parts > 1:
        dk, dv = (jnp.swapaxes(x.sum(0), 1, 2).astype(dtype) for x in (dk, dv))
    return dk[:, :keys, :, :head_dim], dv[:, :keys, :, :head_dim]


def _run(kernel, *, out_type, scratch_types, blocks):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _locate(heads, per_head):
    """Batch, head and place of this thread block. Blocks that run together share a head: its keys stay in L2."""
    index = lax.axis_index("block")
    batch_and_head, place = lax.div(index, per_head), lax.rem(index, per_head)
    return lax.div(batch_and_head, heads), lax.rem(batch_and_head, heads), place


def _turns(barrier, take_turns):
    """(end_turn, await_turn): both warpgroups have to end a turn before either goes on."""
    if not take_turns:
        return (lambda: None), (lambda: None)
    return functools.partial(plgpu.barrier_arrive, barrier), functools.partial(plgpu.barrier_wait, barrier)


def _fetch_steps(fetch_step, steps, stages):
    """Runs fetch_step(i, slot, await_free) for all steps, each slot anew once it is free."""

    # A loop, since JAX refuses a slice beyond the end of an array where it knows the start.
    @pl.loop(0, stages)
    def fetch_first(i):
        pl.when(i < steps)(functools.partial(fetch_step, i, i, lambda barrier: None))

    @pl.loop(stages, steps)
    def fetch_next(i):
        fetch_step(i, lax.rem(i, jnp.int32(stages)), plgpu.barrier_wait)


def _await_next(full, i, steps, stages):
    """Waits for the first tile of the next step. The compiler moves no wait for the tensor cores to before this one."""

    @pl.when(i + 1 < steps)
    def await_next():
        plgpu.barrier_wait(full.at[lax.rem(i + 1, jnp.int32(stages))])


def _accumulate(multiply, arrays) -> Any:
    """Runs `multiply` on accumulators that start as `arrays`, and returns them; None stays None."""
    initial = tuple(None if x is None else plgpu.WGMMAAccumulatorRef.init(x) for x in arrays)
    return pl.run_state(multiply)(initial)


def _accumulator(columns):
    return plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)


def _zeros(layout, *shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _over_columns(per_row, like):
    return lax.broadcast_in_dim(per_row, like.shape, [0])


def _over_rows(per_column, like):
    return lax.broadcast_in_dim(per_column, like.shape, [1])


def _cut_columns(x, end, fill):
    columns = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=TILE)
    return jnp.where(columns < end, x, fill)


def _matrix(count, rows, columns):
    tiling = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((count, rows, columns), jnp.bfloat16, transforms=tiling)


def _vector(count, rows):
    return plgpu.SMEM((count, rows), jnp.float32)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _pad(x):
    """Zeros after the end of a matrix (B, L, N, H) or of row statistics (B, N, L) that cannot be copied as they are."""
    multiples = (1, 8, 1, 64) if x.ndim == 4 else (1, 1, COMPUTE * ROWS)
    padding = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, padding) if any(after for _, after in padding) else x
