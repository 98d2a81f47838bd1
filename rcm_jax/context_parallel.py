"""Attention over tokens that lie in equal parts on the devices of a mesh axis, inside `jax.shard_map`.

Both ways are back ends of pallas_kernels made of another back end, and nest. The derivative rules, and with them that
no forward pass or tangent runs twice, are thereby those of pallas_kernels.

Ulysses (arXiv 2309.14509) exchanges heads for tokens: a device then holds all tokens of some of the heads. It sends
least, and needs as many heads as devices. In a ring (arXiv 2310.01889) keys and values visit every device, with their
tangents or gradients; what they meet there is merged in float32. It takes any number of heads, and computes while the
next keys are on their way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import BackEnd
from pallas_kernels.portable import merge

Tokens = Float[Array, "b l n h"]
Statistics = Float[Array, "b n l"]


@dataclasses.dataclass(frozen=True)
class Ulysses:
    """`inner` on all tokens of a group and a part of the heads.

    Attributes:
        axis: the mesh axis.
        size: its number of devices.
        group: how many neighbours exchange; divides the size and the heads.
        inner: the back end that computes.
    """

    axis: str
    size: int
    group: int
    inner: BackEnd

    def forward(self, q_BLNH: Tokens, k_BLNH: Tokens, v_BLNH: Tokens, *, scale: float) -> tuple[Tokens, Statistics]:
        """As every back end's; (out, lse) of this device's queries."""
        return self._exchange(self.inner.forward, (q_BLNH, k_BLNH, v_BLNH), scale)

    def forward_with_tangent(
        self,
        q_BLNH: Tokens,
        k_BLNH: Tokens,
        v_BLNH: Tokens,
        tq_BLNH: Tokens | None,
        tk_BLNH: Tokens | None,
        tv_BLNH: Tokens | None,
        *,
        scale: float,
    ) -> tuple[Tokens, Statistics, Tokens, Statistics]:
        """As every back end's; (out, lse, t_out, t_lse) of this device's queries."""
        operands = q_BLNH, k_BLNH, v_BLNH, tq_BLNH, tk_BLNH, tv_BLNH
        return self._exchange(self.inner.forward_with_tangent, operands, scale)

    def backward(
        self,
        q_BLNH: Tokens,
        k_BLNH: Tokens,
        v_BLNH: Tokens,
        out_BLNH: Tokens,
        lse_BNL: Statistics,
        dout_BLNH: Tokens,
        dlse_BNL: Statistics | None,
        *,
        scale: float,
    ) -> tuple[Tokens, Tokens, Tokens]:
        """As every back end's; (dq, dk, dv) of this device's tokens."""
        operands = q_BLNH, k_BLNH, v_BLNH, out_BLNH, lse_BNL, dout_BLNH, dlse_BNL
        return self._exchange(self.inner.backward, operands, scale)

    def _exchange(self, function: Callable[..., Any], operands: tuple[Any, ...], scale: float) -> tuple[Any, ...]:
        """`function` of all tokens of some heads; its results as all heads of some tokens."""
        whole = (None if x is None else self._all_to_all(x, *reversed(_axes(x))) for x in operands)
        return tuple(self._all_to_all(x, *_axes(x)) for x in function(*whole, scale=scale))

    def _all_to_all(self, x: jax.Array, cut: int, join: int) -> jax.Array:
        """Each device's part along `cut` of the arrays of its group, side by side along `join`.

        Parts lie one behind the other as they are sent and as they arrive: with one sample nothing is left to move.
        """
        groups = [list(range(first, first + self.group)) for first in range(0, self.size, self.group)]
        parts = jnp.moveaxis(x.reshape(*x.shape[:cut], self.group, -1, *x.shape[cut + 1 :]), cut, 0)
        parts = lax.all_to_all(parts, self.axis, 0, 0, axis_index_groups=groups, tiled=True)
        side_by_side = jnp.moveaxis(parts, 0, join)
        return side_by_side.reshape(*side_by_side.shape[:join], -1, *side_by_side.shape[join + 2 :])


@dataclasses.dataclass(frozen=True)
class Ring:
    """`inner` on this device's queries and, one after the other, every device's keys.

    Attributes:
        axis: the mesh axis.
        size: its number of devices.
        stride: how far apart along it the neighbours of a ring are; as many rings lie side by side.
        last: tokens of the last part that are real; those behind them only make the parts equal.
        inner: the back end that computes.
    """

    axis: str
    size: int
    stride: int
    last: int
    inner: BackEnd

    @property
    def steps(self) -> int:
        return self.size // self.stride

    def forward(self, q_BLNH: Tokens, k_BLNH: Tokens, v_BLNH: Tokens, *, scale: float) -> tuple[Tokens, Statistics]:
        """As every back end's; (out, lse) of this device's queries."""

        def attend(k, v):
            return self.inner.forward(q_BLNH, k, v, scale=scale)

        return self._attend(attend, (k_BLNH, v_BLNH), q_BLNH.dtype)

    def forward_with_tangent(
        self,
        q_BLNH: Tokens,
        k_BLNH: Tokens,
        v_BLNH: Tokens,
        tq_BLNH: Tokens | None,
        tk_BLNH: Tokens | None,
        tv_BLNH: Tokens | None,
        *,
        scale: float,
    ) -> tuple[Tokens, Statistics, Tokens, Statistics]:
        """As every back end's; (out, lse, t_out, t_lse) of this device's queries."""

        def attend(k, v, tk, tv):
            return self.inner.forward_with_tangent(q_BLNH, k, v, tq_BLNH, tk, tv, scale=scale)

        return self._attend(attend, (k_BLNH, v_BLNH, tk_BLNH, tv_BLNH), q_BLNH.dtype)

    def backward(
        self,
        q_BLNH: Tokens,
        k_BLNH: Tokens,
        v_BLNH: Tokens,
        out_BLNH: Tokens,
        lse_BNL: Statistics,
        dout_BLNH: Tokens,
        dlse_BNL: Statistics | None,
        *,
        scale: float,
    ) -> tuple[Tokens, Tokens, Tokens]:
        """As every back end's; (dq, dk, dv) of this device's tokens. Sums of gradients travel with their keys."""

        kept = out_BLNH, lse_BNL, dout_BLNH, dlse_BNL

        def pull_back(k, v):
            dq, dk, dv = (_widen(x) for x in self.inner.backward(q_BLNH, k, v, *kept, scale=scale))
            absent = ((0, 0), (0, k_BLNH.shape[1] - k.shape[1]), (0, 0), (0, 0))
            return dq, jnp.pad(dk, absent), jnp.pad(dv, absent)

        keys = k_BLNH, v_BLNH
        dq, *sums = self._visit(0, pull_back, keys)
        for step in range(1, self.steps):
            keys, sums = self._pass_on(keys), self._pass_on(sums)
            dq_more, *more = self._visit(step, pull_back, keys)
            dq, sums = dq + dq_more, jax.tree.map(jnp.add, sums, more)
        dk, dv = self._pass_on(sums)
        return dq.astype(q_BLNH.dtype), dk.astype(q_BLNH.dtype), dv.astype(q_BLNH.dtype)

    def _attend(self, attend: Callable[..., Any], keys: tuple[Any, ...], dtype: Any) -> Any:
        """`attend(*keys)` merged over the keys of all devices."""
        total = _heads_first(self._visit(0, attend, keys))
        for step in range(1, self.steps):
            keys = self._pass_on(keys)
            total = merge(total, _heads_first(self._visit(step, attend, keys)))
        return tuple(x.swapaxes(1, 2).astype(dtype) if x.ndim == 4 else x for x in total)

    def _visit(self, step: int, function: Callable[..., Any], keys: tuple[Any, ...]) -> Any:
        """`function(*keys)` of the real ones among the keys that are here after so many steps."""

        def run(tokens, keys):
            return function(*(None if x is None else x[:, :tokens] for x in keys))

        full = keys[0].shape[1]
        if self.steps == 1 or self.last == full:
            return run(self.last, keys)
        home = (lax.axis_index(self.axis) // self.stride - step) % self.steps
        branches = (lambda keys: run(self.last, keys)), (lambda keys: run(full, keys))
        return lax.cond(home == self.steps - 1, *branches, keys)

    def _pass_on(self, arrays: Any) -> Any:
        """Sends arrays to the next device of the ring."""
        if self.steps == 1:
            return arrays
        pairs = [(device, (device + self.stride) % self.size) for device in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), arrays)


def _axes(x: jax.Array) -> tuple[int, int]:
    """Which are those of tokens and heads: of (B, L, N, H), or of row statistics (B, N, L)."""
    return (1, 2) if x.ndim == 4 else (2, 1)


def _heads_first(results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Results of a back end as `merge` takes them: (B, N, L, H) and, at least in float32."""
    return tuple(_widen(x.swapaxes(1, 2)) if x.ndim == 4 else x for x in results)


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
