"""Flash attention for NVIDIA Hopper, in Pallas' Mosaic GPU: bfloat16, head dims up to 128, any lengths.

A thread block has two warpgroups that compute, 64 rows each, and one that only fetches tiles with the tensor memory
accelerator, into `stages` slots of shared memory. Products are wgmma with float32 accumulators in registers.

The value kernel starts the logits of the next keys in one go with the values of these, and waits for both. The two
warpgroups take turns at that, so that one computes exponentials while the other multiplies. They are not computed while
one's own values are multiplied, as FlashAttention-3 (Shah et al. 2024) does: the compiler then runs products one at a
time.

Value and tangent come from one pass over the keys. With p the unnormalised probabilities of a tile and ts the tangent
of its logits, six products feed two accumulators that the registers of a warpgroup can hold:

    s = q k^T    ts = tq k^T + q tk^T    out += p v    t_out += p tv + (p * ts) v

The exponentials of s are computed while the tensor cores work on ts, and the two warpgroups take turns here too. At
head dim 128 the four 64 x 64 and 64 x 128 accumulators are 192 of the 240 registers of a thread; shared memory holds q
and tq (64 KiB) and two stages of k, tk, v and tv (128 KiB). The bounds: a product of 64 queries by 64 keys reads both
operands from shared memory at its full bandwidth, and wider tiles do not fit the registers; and the power the chip may
draw (benchmarks/README.md).

The gradient is two kernels, one that holds rows of q and runs over keys and one that holds rows of k and v and runs
over queries, so that every sum is made in one place, in one order: results do not change from run to run.

Lengths that are no multiple of a tile cost a partial tile: of matrices, the accelerator reads zeros beyond the end and
does not write there. Its tensor maps need lengths that are multiples of 8 and head dims that are multiples of 64; other
arrays are padded first. Row statistics are read and written without a map, which knows only the end of the whole array,
not that of a head: they are padded to whole blocks of rows.
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


# By pass and padded head dim, as measured on an H200 (`python -m benchmarks.attention_tiles`); lengths matter little.
TILES = {
    ("value", 64): Tiles(128, 2),
    ("value", 128): Tiles(128, 2),
    ("value and tangent", 64): Tiles(128, 2),
    ("value and tangent", 128): Tiles(64, 2),
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
    return _attend(q_BLNH, k_BSNH, v_BSNH, scale=scale, tiles=tiles or _tiles("value", q_BLNH))


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
    return _attend_with_tangent(*operands, scale=scale, tiles=tiles or _tiles("value and tangent", q_BLNH))


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


def _attend(q, k, v, *, scale, tiles):
    """(out, lse)."""
    if scale < 0:  # the running maximum is that of scaled logits
        q, scale = -q, -scale
    (batch, length, heads, head_dim), keys, dtype = q.shape, k.shape[1], q.dtype
    inputs = {name: _pad(x) for name, x in {"q": q, "k": k, "v": v}.items()}
    dim, block, ragged = inputs["q"].shape[-1], tiles.block, keys % tiles.block
    row_blocks, steps = pl.cdiv(length, COMPUTE * ROWS), pl.cdiv(keys, block)
    stages = min(tiles.stages, steps)

    def kernel(*refs, smem, full, free, turn):
        refs = dict(zip((*inputs, "out", "lse"), refs, strict=True))
        warpgroup = lax.axis_index("warpgroup")
        b, n, row_block = _locate(heads, row_blocks)

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            rows = pl.ds((row_block * COMPUTE + warpgroup) * ROWS, ROWS)
            mine = smem["q"].at[warpgroup]
            plgpu.copy_gmem_to_smem(refs["q"].at[b, rows, n], mine, full["q"].at[warpgroup])
            plgpu.barrier_wait(full["q"].at[warpgroup])
            await_turn, end_turn = _turns(turn, warpgroup)
            pl.when(warpgroup == 1)(await_turn)

            def attend_keys(s_acc):
                plgpu.barrier_wait(full["k"].at[0])
                plgpu.wgmma(s_acc, mine, smem["k"].at[0].T)
                end_turn()
                return s_acc[...]

            s = pl.run_scoped(attend_keys, _accumulator(block))
            plgpu.barrier_arrive(free["k"].at[0])
            zeros, zero_rows = _zeros(TILE, ROWS, dim), _zeros(PER_ROW, ROWS)
            _, p, m, l, _ = _exponentials(s, zero_rows - jnp.inf, zero_rows, scale, ragged, steps == 1)

            def step(i, carry):
                out, p, m, l = carry
                slot, next_slot = lax.rem(i, jnp.int32(stages)), lax.rem(i + 1, jnp.int32(stages))
                plgpu.barrier_wait(full["v"].at[slot])
                plgpu.barrier_wait(full["k"].at[next_slot])
                await_turn()

                def attend_values_and_next_keys(accumulators):
                    out_acc, s_acc = accumulators
                    plgpu.wgmma(out_acc, p, smem["v"].at[slot])
                    plgpu.wgmma(s_acc, mine, smem["k"].at[next_slot].T)
                    end_turn()

                out, s = _accumulate(attend_values_and_next_keys, (out, _zeros(TILE, ROWS, block)))
                plgpu.barrier_arrive(free["v"].at[slot])
                plgpu.barrier_arrive(free["k"].at[next_slot])
                _, p, m, l, alpha = _exponentials(s, m, l, scale, ragged, i == steps - 2)
                return out * _over_columns(alpha, out), p, m, l

            out, p, m, l = lax.fori_loop(0, steps - 1, step, (zeros, p, m, l))
            last = (steps - 1) % stages
            plgpu.barrier_wait(full["v"].at[last])
            await_turn()
            (out,) = _accumulate(lambda accumulators: plgpu.wgmma(accumulators[0], p, smem["v"].at[last]), (out,))
            end_turn()
            # Queries are not needed any more: results take their place.
            mine[...] = (out * _over_columns(1 / l, out)).astype(dtype)
            refs["lse"].at[b, n, rows][...] = (m + jnp.log2(l)) / LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, refs["out"].at[b, rows, n])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def fetch():
            plgpu.set_max_registers(24, action="decrease")
            _fetch_keys_and_values(refs, smem, full, free, (b, n), block, steps, stages)

    tiles_of_keys = _matrix(stages, block, dim)
    out, lse = _run(
        kernel,
        out_type=[_like(inputs["q"]), _per_query(batch, heads, row_blocks)],
        scratch_types={
            "smem": {"q": _matrix(COMPUTE, ROWS, dim), "k": tiles_of_keys, "v": tiles_of_keys},
            "full": {"q": plgpu.Barrier(num_barriers=COMPUTE)}
            | {name: plgpu.Barrier(num_barriers=stages) for name in ("k", "v")},
            "free": {kind: plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages) for kind in ("k", "v")},
            "turn": plgpu.Barrier(num_barriers=COMPUTE),
        },
        blocks=batch * heads * row_blocks,
    )(*inputs.values())
    return _once(out[:, :length, :, :head_dim], lse[:, :, :length])


def _attend_with_tangent(q, k, v, tq, tk, tv, *, scale, tiles):
    """(out, lse, t_out, t_lse); some of tq, tk and tv may be None."""
    if scale < 0:
        q, tq, scale = -q, None if tq is None else -tq, -scale
    (batch, length, heads, head_dim), keys, dtype = q.shape, k.shape[1], q.dtype
    inputs = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}
    inputs = {name: _pad(x) for name, x in inputs.items() if x is not None}
    has_ts = "tq" in inputs or "tk" in inputs
    results = "out", "lse", "t_out", "t_lse"
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
            mine = {name: smem[name].at[warpgroup] for name in ("q", "tq")}
            for name in [name for name in ("q", "tq") if name in inputs]:
                plgpu.copy_gmem_to_smem(refs[name].at[b, rows, n], mine[name], full["q"].at[warpgroup])
            plgpu.barrier_wait(full["q"].at[warpgroup])
            await_turn, end_turn = _turns(turn, warpgroup)
            pl.when(warpgroup == 1)(await_turn)

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
                    # The products of ts go on while the exponentials of s are computed.
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=("tq" in inputs) + ("tk" in inputs))
                    p, p16, m_new, l_new, alpha = _exponentials(s, m, l, scale, ragged, i == steps - 1)
                    rescaled = (x * _over_columns(alpha, x) for x in (out, t_out))
                    kept = p16, p if has_ts else None, m_new, l_new, *rescaled, r * alpha
                    p16, p, m_new, l_new, out_new, t_out_new, r_new = lax.optimization_barrier(kept)
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
            out, m, l, t_out, r = lax.fori_loop(
                0, steps, step, (zeros, zero_rows - jnp.inf, zero_rows, zeros, zero_rows)
            )
            end_turn()
            # Queries are not needed any more: results take their place.
            t_lse, share = r / l, _over_columns(1 / l, out)
            out *= share
            mine["q"][...] = out.astype(dtype)
            mine["tq"][...] = (t_out * share - _over_columns(t_lse, out) * out).astype(dtype)
            refs["lse"].at[b, n, rows][...] = (m + jnp.log2(l)) / LOG2E
            refs["t_lse"].at[b, n, rows][...] = t_lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine["q"], refs["out"].at[b, rows, n])
            plgpu.copy_smem_to_gmem(mine["tq"], refs["t_out"].at[b, rows, n])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def fetch():
            plgpu.set_max_registers(24, action="decrease")
            _fetch_keys_and_values(refs, smem, full, free, (b, n), block, steps, stages)

    tiles_of_keys = {name: _matrix(stages, block, dim) for name in inputs if name[-1] in "kv"}
    out, lse, t_out, t_lse = _run(
        kernel,
        out_type=[_like(inputs["q"]), _per_query(batch, heads, row_blocks)] * 2,
        scratch_types={
            "smem": {name: _matrix(COMPUTE, ROWS, dim) for name in ("q", "tq")} | tiles_of_keys,
            "full": {"q": plgpu.Barrier(num_arrivals=1 + ("tq" in inputs), num_barriers=COMPUTE)}
            | {name: plgpu.Barrier(num_barriers=stages) for name in tiles_of_keys},
            "free": {kind: plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages) for kind in ("k", "v")},
            "turn": plgpu.Barrier(num_barriers=COMPUTE),
        },
        blocks=batch * heads * row_blocks,
    )(*inputs.values())
    out, t_out = (x[:, :length, :, :head_dim] for x in (out, t_out))
    return _once(out, lse[:, :, :length], t_out, t_lse[:, :, :length])


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


def _turns(barrier, warpgroup):
    """(await_turn, end_turn): one of two warpgroups at a time starts products; ending a turn lets the other go on."""
    await_turn = functools.partial(plgpu.barrier_wait, barrier.at[warpgroup])
    return await_turn, functools.partial(plgpu.barrier_arrive, barrier.at[1 - warpgroup])


def _exponentials(s, m, l, scale, ragged, is_last):
    """(p, p as an operand, m, l, factor of what was summed before), given logits s and the maximum m and sum l so far.

    m is that of scaled logits in bits. In the last tile only the first `ragged` columns are keys, if that is not 0.
    """
    if ragged:
        s = lax.cond(is_last, lambda s: _cut_columns(s, ragged, -jnp.inf), lambda s: s, s)
    m_new = jnp.maximum(m, s.max(axis=1) * (scale * LOG2E))
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(s * (scale * LOG2E) - _over_columns(m_new, s))
    return p, p.astype(jnp.bfloat16), m_new, l * alpha + p.sum(axis=1), alpha


def _fetch_keys_and_values(refs, smem, full, free, head, block, steps, stages):
    """Fetches tiles of all operands at keys, (t)k and (t)v, of one head = (batch, head)."""
    b, n = head

    def fetch_step(i, slot, await_free):
        for kind in ("k", "v"):
            await_free(free[kind].at[slot])
            for name in [name for name in full if name[-1] == kind]:
                source = refs[name].at[b, pl.ds(i * block, block), n]
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot], full[name].at[slot])

    _fetch_steps(fetch_step, steps, stages)


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


def _per_query(batch, heads, row_blocks):
    return jax.ShapeDtypeStruct((batch, heads, row_blocks * COMPUTE * ROWS), jnp.float32)


def _once(*results):
    """Without the barrier XLA runs the kernel once more where a result has a second user, a scan that stacks it."""
    return lax.optimization_barrier(results)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _pad(x):
    """Zeros after the end of a matrix (B, L, N, H) or of row statistics (B, N, L) that cannot be copied as they are."""
    multiples = (1, 8, 1, 64) if x.ndim == 4 else (1, 1, COMPUTE * ROWS)
    padding = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, padding) if any(after for _, after in padding) else x
