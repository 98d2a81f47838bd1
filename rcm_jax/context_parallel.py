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

from pallas_kernels import BackEnd
from pallas_kernels.portable import merge


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

    def forward(self, q, k, v, *, scale):
        """As every back end's; (out, lse) of this device's queries."""
        q, k, v = (self._gather_tokens(x) for x in (q, k, v))
        return tuple(self._gather_heads(x) for x in self.inner.forward(q, k, v, scale=scale))

    def forward_with_tangent(self, q, k, v, tq, tk, tv, *, scale):
        """As every back end's; (out, lse, t_out, t_lse) of this device's queries."""
        operands = (None if x is None else self._gather_tokens(x) for x in (q, k, v, tq, tk, tv))
        return tuple(self._gather_heads(x) for x in self.inner.forward_with_tangent(*operands, scale=scale))

    def backward(self, q, k, v, out, lse, dout, dlse, *, scale):
        """As every back end's; (dq, dk, dv) of this device's tokens."""
        operands = (None if x is None else self._gather_tokens(x) for x in (q, k, v, out, lse, dout, dlse))
        return tuple(self._gather_heads(x) for x in self.inner.backward(*operands, scale=scale))

    def _gather_tokens(self, x: jax.Array) -> jax.Array:
        tokens, heads = _axes(x)
        return self._exchange(x, cut=heads, join=tokens)

    def _gather_heads(self, x: jax.Array) -> jax.Array:
        tokens, heads = _axes(x)
        return self._exchange(x, cut=tokens, join=heads)

    def _exchange(self, x: jax.Array, *, cut: int, join: int) -> jax.Array:
        groups = [list(range(first, first + self.group)) for first in range(0, self.size, self.group)]
        return lax.all_to_all(x, self.axis, cut, join, axis_index_groups=groups, tiled=True)


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

    def forward(self, q, k, v, *, scale):
        """As every back end's; (out, lse) of this device's queries."""
        return self._attend(lambda k, v: self.inner.forward(q, k, v, scale=scale), (k, v), q.dtype)

    def forward_with_tangent(self, q, k, v, tq, tk, tv, *, scale):
        """As every back end's; (out, lse, t_out, t_lse) of this device's queries."""

        def attend(k, v, tk, tv):
            return self.inner.forward_with_tangent(q, k, v, tq, tk, tv, scale=scale)

        return self._attend(attend, (k, v, tk, tv), q.dtype)

    def backward(self, q, k, v, out, lse, dout, dlse, *, scale):
        """As every back end's; (dq, dk, dv) of this device's tokens. Sums of gradients travel with their keys."""

        def pull_back(k_part, v_part):
            dq, dk, dv = self.inner.backward(q, k_part, v_part, out, lse, dout, dlse, scale=scale)
            absent = ((0, 0), (0, k.shape[1] - k_part.shape[1]), (0, 0), (0, 0))
            return _widen(dq), jnp.pad(_widen(dk), absent), jnp.pad(_widen(dv), absent)

        keys, (dq, *sums) = (k, v), self._visit(0, pull_back, (k, v))
        for step in range(1, self.steps):
            keys, sums = self._pass_on(keys), self._pass_on(sums)
            dq_more, *more = self._visit(step, pull_back, keys)
            dq, sums = dq + dq_more, jax.tree.map(jnp.add, sums, more)
        return tuple(x.astype(q.dtype) for x in (dq, *self._pass_on(sums)))

    def _attend(self, attend: Callable[..., Any], keys: tuple[Any, ...], dtype: Any) -> tuple[jax.Array, ...]:
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
