"""Proof that what is read is what was written: a fingerprint of every array, and a seal on JSON.

A fingerprint is computed where the array lies, in one pass, by every device for its own part. It depends on the values
and their places alone, not on the mesh, so a checkpoint may be checked on other devices than those that wrote it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Any two odd constants; each starts a lane of 32 bits.
_LANES = (0x9E3779B9, 0x7F4A7C15)

SLAB = 2**22  # elements


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """64 bits of each array as 16 hexadecimal digits. Every process of a run must call it with the same names.

    A change of one element always changes them, since each lane adds up a bijection of the element's bits; other
    accidents go unnoticed once in 2^64. They are no defence against forgery.
    """
    start = jnp.array(_LANES, jnp.uint32)
    lanes = {
        name: _sum(array, start, jnp.uint32(0)) for name, array in arrays.items()
    }  # all are under way before one is fetched
    return {name: join_lanes([pair.tolist()]) for name, pair in jax.device_get(lanes).items()}


def part_lanes(part: np.ndarray, layer: int | None) -> list[int]:
    """What an array adds to the lanes of a fingerprint: of its own, or of the array that has it as its `layer`.

    It is summed in slabs, since XLA on a CPU holds several arrays of the size of its operand.
    """
    start = jnp.array(_LANES, jnp.uint32)
    start = start if layer is None else _scramble(start ^ jnp.uint32(layer))
    if not part.ndim:
        return _sum(part, start, jnp.uint32(0)).tolist()
    rows = max(1, SLAB * len(part) // max(part.size, 1))
    slabs = [_sum(part[first : first + rows], start, jnp.uint32(first)).tolist() for first in range(0, len(part), rows)]
    return [sum(lane) % 2**32 for lane in zip((0, 0), *slabs, strict=True)]


def join_lanes(parts: Iterable[Iterable[int]]) -> str:
    """The fingerprint of an array from the lanes of its parts."""
    return "".join(f"{sum(lane) % 2**32:08x}" for lane in zip(*parts, strict=True))


@jax.jit
def _sum(array: jax.Array, start: jax.Array, first: jax.Array) -> jax.Array:
    """The lanes of `array`, or of a slab of one from row `first` on."""
    bits = _bits(jax.device_put(array, jax.memory.Space.Device))  # from the host's memory, if it lies there
    places = jnp.broadcast_to(start.reshape(2, *(1,) * bits.ndim), (2, *bits.shape))
    for axis in range(bits.ndim):  # chained, so that no array is too large for numbers of 32 bits
        index = lax.broadcasted_iota(jnp.uint32, places.shape, axis + 1)
        places = _scramble(places ^ (index if axis else index + first))
    return jnp.sum(_scramble(bits[None] ^ places), axis=range(1, places.ndim), dtype=jnp.uint32)


def _bits(array: jax.Array) -> jax.Array:
    """The array's bits as uint32; an element of 64 bits becomes two."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = min(array.dtype.itemsize, 4)
    return lax.bitcast_convert_type(array, f"uint{8 * width}").astype(jnp.uint32)


def _scramble(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: a bijection of 32 bits in which every bit moves every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def seal(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts` as JSON gives them back, with the SHA-256 of their text under "seal". Raises TypeError if it cannot."""
    facts = json.loads(json.dumps(facts))
    return {**facts, "seal": _digest(facts)}


def is_sealed(facts: Mapping[str, Any]) -> bool:
    """Whether `facts` are as `seal` left them."""
    return facts.get("seal") == _digest({name: value for name, value in facts.items() if name != "seal"})


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
