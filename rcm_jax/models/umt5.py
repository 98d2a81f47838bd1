"""The text encoders umT5-xxl of Wan (arXiv 2304.09151) and T5-11B of Cosmos-Predict2 (arXiv 1910.10683), in Flax NNX.

umT5 has a table of position biases in every layer and a gated feed-forward layer; T5-11B shares one table and has a
plain one. Neither scales attention's logits by the head's width.

Precision: norms, attention's logits and softmax are float32; matrix products are in `dtype`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rcm_jax.models.layers import MLP, gelu_tanh, linear, rms_norm, stack_blocks

TEXT_LENGTH = 512  # tokens of a caption in every model that reads these encoders


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5 encoder. Positions further apart than `max_distance` share a bias."""

    vocabulary: int
    dim: int
    ffn_dim: int
    heads: int
    head_dim: int
    layers: int
    gated: bool
    shared_bias: bool
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6


PRESETS = {
    "umt5-xxl": T5Config(
        vocabulary=256_384,
        dim=4096,
        ffn_dim=10_240,
        heads=64,
        head_dim=64,
        layers=24,
        gated=True,
        shared_bias=False,
    ),
    "t5-11b": T5Config(
        vocabulary=32_128,
        dim=1024,
        ffn_dim=65_536,
        heads=128,
        head_dim=128,
        layers=24,
        gated=False,
        shared_bias=True,
    ),
}


class T5Encoder(nnx.Module):
    """Turns token ids into one vector a token."""

    def __init__(self, config: T5Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        c = config
        self.config, self.dtype = config, dtype
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (c.vocabulary, c.dim)))
        tables = (1 if c.shared_bias else c.layers, c.buckets, c.heads)
        self.position_bias = nnx.Param(jax.random.normal(rngs.params(), tables) / math.sqrt(c.buckets))
        self.blocks = stack_blocks(lambda rngs: Block(config, dtype, rngs), c.layers, rngs)
        self.norm_out = rms_norm(c.dim, c.norm_eps, rngs)

    def __call__(self, ids_BS: Int[Array, "b s"], mask_BS: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        """Embeddings, float32, of the tokens that the mask marks; zeros elsewhere, as the diffusion models expect."""
        graph, params = nnx.split(self.blocks)
        bucket_SS = position_buckets(ids_BS.shape[1], self.config)
        table_shape = (self.config.layers, *self.position_bias.shape[1:])

        def step(x_BSD: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            params, table_RN = layer
            bias_NSS = rearrange(table_RN[bucket_SS], "q k n -> n q k")
            return nnx.merge(graph, params)(x_BSD, mask_BS, bias_NSS), None

        x_BSD = self.embedding[...][ids_BS].astype(self.dtype)
        x_BSD, _ = lax.scan(step, x_BSD, (params, jnp.broadcast_to(self.position_bias[...], table_shape)))
        return jnp.where(mask_BS[..., None], self.norm_out(x_BSD), 0)


class Block(nnx.Module):
    """Self-attention and a feed-forward layer, each normalised before."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        c = config
        self.norm1, self.norm2 = (rms_norm(c.dim, c.norm_eps, rngs) for _ in range(2))
        self.attention = Attention(config, dtype, rngs)
        self.ffn = (
            GatedMLP(c.dim, c.ffn_dim, dtype, rngs)
            if c.gated
            else MLP(c.dim, c.ffn_dim, c.dim, dtype, rngs, activation=jax.nn.relu, use_bias=False)
        )
        self.dtype = dtype

    def __call__(self, x_BSD: jax.Array, mask_BS: jax.Array, bias_NSS: jax.Array) -> jax.Array:
        x_BSD = x_BSD + self.attention(self.norm1(x_BSD).astype(self.dtype), mask_BS, bias_NSS)
        return x_BSD + self.ffn(self.norm2(x_BSD).astype(self.dtype))


class Attention(nnx.Module):
    """Multi-head self-attention with a bias for each pair of positions."""

    def __init__(self, config: T5Config, dtype: Any, rngs: nnx.Rngs):
        width = config.heads * config.head_dim
        self.q, self.k, self.v = (linear(config.dim, width, dtype, rngs, use_bias=False) for _ in range(3))
        self.o = linear(width, config.dim, dtype, rngs, use_bias=False)
        self.heads = config.heads

    def __call__(self, x_BSD: jax.Array, mask_BS: jax.Array, bias_NSS: jax.Array) -> jax.Array:
        q, k, v = (rearrange(f(x_BSD), "b s (n h) -> b n s h", n=self.heads) for f in (self.q, self.k, self.v))
        logits = jnp.einsum("bnqh,bnkh->bnqk", q, k, preferred_element_type=jnp.float32) + bias_NSS[None]
        weights = jax.nn.softmax(jnp.where(mask_BS[:, None, None], logits, -jnp.inf), axis=-1)
        return self.o(rearrange(jnp.einsum("bnqk,bnkh->bnqh", weights.astype(v.dtype), v), "b n s h -> b s (n h)"))


class GatedMLP(nnx.Module):
    """The product of two linear layers, one of them through GELU, then a third."""

    def __init__(self, dim: int, hidden_dim: int, dtype: Any, rngs: nnx.Rngs):
        self.gate, self.up = (linear(dim, hidden_dim, dtype, rngs, use_bias=False) for _ in range(2))
        self.down = linear(hidden_dim, dim, dtype, rngs, use_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(gelu_tanh(self.gate(x)) * self.up(x))


def position_buckets(length: int, config: T5Config) -> np.ndarray:
    """Row of the bias table for each (query, key), (length, length) int32.

    Half the rows are for keys after the query. Of a half, half are for single distances, the rest for ranges that
    grow geometrically up to `max_distance` (arXiv 1910.10683, section 2.1).
    """
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    half, single = config.buckets // 2, config.buckets // 4
    growth = np.log(np.maximum(distance, single) / single) / math.log(config.max_distance / single)
    ranges = np.minimum(single + (growth * (half - single)).astype(np.int32), half - 1)
    return (np.where(distance < single, distance, ranges) + half * (offset > 0)).astype(np.int32)
