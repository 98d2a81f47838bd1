"""Wan: the diffusion transformer of Wan2.1 and Wan2.2 (arXiv 2503.20314), in Flax NNX.

Precision: time, its embedding, modulation, norms, rotary embedding and the head are float32; matrix products and
attention operands are in `dtype`. The blocks' parameters are stacked along a leading axis and scanned (blocks.py).
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
from jaxtyping import Array, Float

from rcm_jax.models.blocks import Attend, Mode, Remat, run_blocks


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Shape of a Wan network. `in_channels` counts the latent and any condition concatenated to it."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    patch: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = 512
    time_dim: int = 256
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim={self.dim} must be a multiple of 2 * heads={2 * self.heads}: rotary pairs fill a head"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def tokens(self, latent_shape: tuple[int, ...]) -> int:
        """Number of tokens of a latent (T, H, W, C)."""
        return math.prod(n // p for n, p in zip(latent_shape, self.patch, strict=False))


PRESETS = {
    "digits": WanConfig(
        dim=128,
        ffn_dim=512,
        heads=4,
        layers=4,
        patch=(2, 4, 4),
        in_channels=1,
        out_channels=1,
        text_dim=32,
        text_length=8,
    ),
    "wan2.1-t2v-1.3b": WanConfig(dim=1536, ffn_dim=8960, heads=12, layers=30),
    "wan2.1-t2v-14b": WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40),
}


class Wan(nnx.Module):
    """Predicts the rectified-flow velocity of a latent video from a caption."""

    def __init__(self, config: WanConfig, *, dtype: Any = jnp.float32, remat: Remat = "none", rngs: nnx.Rngs):
        c = config
        patch_channels = math.prod(c.patch)
        self.config = config
        self.dtype = dtype
        self.remat: Remat = remat
        self.patch_embedding = _linear(c.in_channels * patch_channels, c.dim, dtype, rngs)
        self.text_embedding = MLP(c.text_dim, c.dim, c.dim, dtype, rngs)
        self.time_embedding = TimeEmbedding(c.time_dim, c.dim, rngs)
        self.time_projection = _linear(c.dim, 6 * c.dim, jnp.float32, rngs)
        self.blocks = _stack_blocks(config, dtype, rngs)
        self.head = Head(c.dim, c.out_channels * patch_channels, c.norm_eps, rngs)

    def __call__(
        self,
        x_BTHWC: Float[Array, "b t h w c"],
        time_B: Float[Array, "b"],
        text_BSD: Float[Array, "b s d"],
        *,
        condition_BTHWC: Float[Array, "b t h w k"] | None = None,
        mode: Mode = "reverse",
    ) -> Float[Array, "b t h w o"]:
        """Velocity, float32, of the latent `x_BTHWC` at network time `time_B` (1000 x RF time).

        `condition_BTHWC` (image-to-video: mask and latent) is concatenated after x. `mode` as in blocks.run_blocks.
        Raises ValueError for a latent that does not divide into patches or has other channels than the config.
        """
        if condition_BTHWC is not None:
            x_BTHWC = jnp.concatenate([x_BTHWC, condition_BTHWC.astype(x_BTHWC.dtype)], axis=-1)
        _check_latent(x_BTHWC.shape, self.config)
        kt, kh, kw = self.config.patch
        t, h, w = (n // k for n, k in zip(x_BTHWC.shape[1:4], self.config.patch, strict=True))

        patches = rearrange(x_BTHWC, "b (t kt) (h kh) (w kw) c -> b (t h w) (c kt kh kw)", kt=kt, kh=kh, kw=kw)
        x_BLD = self.patch_embedding(patches)
        time_BD = self.time_embedding(time_B)
        modulation_B6D = rearrange(self.time_projection(jax.nn.silu(time_BD)), "b (n d) -> b n d", n=6)
        text_BSD = self.text_embedding(text_BSD)
        graph, params = nnx.split(self.blocks)
        params = nnx.to_pure_dict(params)

        def block(params: Any, x: jax.Array, modulation: jax.Array, text: jax.Array, attend: Attend) -> jax.Array:
            # The table is made here, not closed over: a custom derivative rule must not hold another trace's arrays.
            rotary = rotary_table((t, h, w), self.config.head_dim)
            return nnx.merge(graph, params)(x, modulation, text, rotary, attend)

        x_BLD = run_blocks(block, params, x_BLD, modulation_B6D, text_BSD, mode=mode, remat=self.remat)
        return rearrange(
            self.head(x_BLD, time_BD),
            "b (t h w) (kt kh kw c) -> b (t kt) (h kh) (w kw) c",
            **dict(t=t, h=h, w=w, kt=kt, kh=kh, kw=kw),
        )


class Block(nnx.Module):
    """Self-attention, cross-attention to the caption, and a feed-forward layer, modulated by the time."""

    def __init__(self, config: WanConfig, dtype: Any, rngs: nnx.Rngs):
        c = config
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, c.dim)) / math.sqrt(c.dim))
        self.norm1 = _layer_norm(c.dim, c.norm_eps, rngs)
        self.self_attn = Attention(config, dtype, rngs)
        self.norm3 = _layer_norm(c.dim, c.norm_eps, rngs, affine=True)
        self.cross_attn = Attention(config, dtype, rngs)
        self.norm2 = _layer_norm(c.dim, c.norm_eps, rngs)
        self.ffn = MLP(c.dim, c.ffn_dim, c.dim, dtype, rngs)
        self.dtype = dtype

    def __call__(
        self, x_BLD: jax.Array, modulation_B6D: jax.Array, text_BSD: jax.Array, rotary: "Rotary", attend: Attend
    ) -> jax.Array:
        modulation_B6D = self.modulation[...][None] + modulation_B6D
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation_B6D, 6, axis=1)
        y = (self.norm1(x_BLD) * (1 + scale1) + shift1).astype(self.dtype)
        y = self.self_attn(y, y, attend, rotary)
        x_BLD = (x_BLD + y * gate1).astype(self.dtype)
        x_BLD = x_BLD + self.cross_attn(self.norm3(x_BLD).astype(self.dtype), text_BSD, attend)
        y = self.ffn((self.norm2(x_BLD) * (1 + scale2) + shift2).astype(self.dtype))
        return (x_BLD + y * gate2).astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head attention whose queries and keys are RMS-normalised over the full width, then rotated."""

    def __init__(self, config: WanConfig, dtype: Any, rngs: nnx.Rngs):
        self.q, self.k, self.v, self.o = (_linear(config.dim, config.dim, dtype, rngs) for _ in range(4))
        self.norm_q, self.norm_k = (
            nnx.RMSNorm(config.dim, epsilon=config.norm_eps, dtype=jnp.float32, rngs=rngs) for _ in range(2)
        )
        self.heads, self.dtype = config.heads, dtype

    def __call__(
        self, x_BLD: jax.Array, source_BSD: jax.Array, attend: Attend, rotary: "Rotary | None" = None
    ) -> jax.Array:
        q, k = self.norm_q(self.q(x_BLD)), self.norm_k(self.k(source_BSD))
        q, k, v = (rearrange(a, "b l (n h) -> b l n h", n=self.heads) for a in (q, k, self.v(source_BSD)))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        out = attend(q.astype(self.dtype), k.astype(self.dtype), v)
        return self.o(rearrange(out, "b l n h -> b l (n h)"))


class Head(nnx.Module):
    """Modulated norm and projection to patches, in float32."""

    def __init__(self, dim: int, out_dim: int, eps: float, rngs: nnx.Rngs):
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, dim)) / math.sqrt(dim))
        self.norm = _layer_norm(dim, eps, rngs)
        self.head = _linear(dim, out_dim, jnp.float32, rngs)

    def __call__(self, x_BLD: jax.Array, time_BD: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.modulation[...][None] + time_BD[:, None], 2, axis=1)
        return self.head(self.norm(x_BLD) * (1 + scale) + shift)


class MLP(nnx.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, dtype: Any, rngs: nnx.Rngs):
        self.up = _linear(in_dim, hidden_dim, dtype, rngs)
        self.down = _linear(hidden_dim, out_dim, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class TimeEmbedding(nnx.Module):
    """Sinusoids of the network time, then linear, SiLU, linear; float32 throughout."""

    def __init__(self, time_dim: int, dim: int, rngs: nnx.Rngs):
        self.up = _linear(time_dim, dim, jnp.float32, rngs)
        self.down = _linear(dim, dim, jnp.float32, rngs)
        self.time_dim = time_dim

    def __call__(self, time_B: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.up(sinusoids(time_B, self.time_dim))))


def sinusoids(time_B: jax.Array, dim: int) -> jax.Array:
    """cos, then sin, of time_B times dim / 2 falling frequencies, with float64's accuracy from float32 arithmetic.

    An angle near 1000 rounded to float32 is off by 3e-5. So the angle is the sum of a coarse part, whose product is
    exact (12 bits each), and a small rest, and the two meet in the addition theorem.
    """
    frequencies = 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    step = 2.0 ** np.floor(np.log2(frequencies) - 11)
    coarse = np.round(frequencies / step) * step
    rest = (frequencies - coarse).astype(np.float32)[None]
    coarse = coarse.astype(np.float32)[None]
    whole = lax.stop_gradient(jnp.round(time_B))[:, None]
    angle, small = whole * coarse, (time_B[:, None] - whole) * (coarse + rest) + whole * rest
    cos, sin, cos_small, sin_small = jnp.cos(angle), jnp.sin(angle), jnp.cos(small), jnp.sin(small)
    return jnp.concatenate([cos * cos_small - sin * sin_small, sin * cos_small + cos * sin_small], axis=-1)


Rotary = tuple[jax.Array, jax.Array]


def rotary_table(grid_THW: tuple[int, int, int], head_dim: int) -> Rotary:
    """cos and sin, each (L, head_dim / 2) float32, of the 3-D rotary embedding: a third of a head per axis."""
    space = head_dim // 6 * 2
    widths = (head_dim - 2 * space, space, space)
    positions = jnp.meshgrid(*map(jnp.arange, grid_THW), indexing="ij")
    angles = [
        position.reshape(-1, 1) * (10000.0 ** (-jnp.arange(0, width, 2) / width))[None]
        for position, width in zip(positions, widths, strict=True)
    ]
    angles = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLNH: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotates interleaved pairs of each head by the angles of their position; float32."""
    cos, sin = (a[None, :, None, :] for a in rotary)
    pairs = x_BLNH.astype(jnp.float32).reshape(*x_BLNH.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x_BLNH.shape)


def _linear(in_dim: int, out_dim: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.truncated_normal(1.0 / math.sqrt(in_dim))
    return nnx.Linear(in_dim, out_dim, dtype=dtype, kernel_init=init, rngs=rngs)


def _layer_norm(dim: int, eps: float, rngs: nnx.Rngs, *, affine: bool = False) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        dim, epsilon=eps, dtype=jnp.float32, use_scale=affine, use_bias=affine, use_fast_variance=False, rngs=rngs
    )


def _stack_blocks(config: WanConfig, dtype: Any, rngs: nnx.Rngs) -> Block:
    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(config, dtype, rngs)

    return create(rngs)


def _check_latent(shape: tuple[int, ...], config: WanConfig) -> None:
    *_, t, h, w, channels = shape
    if channels != config.in_channels:
        raise ValueError(
            f"latent has {channels} channels, the network takes {config.in_channels}: check the model preset"
        )
    if any(n % k for n, k in zip((t, h, w), config.patch, strict=True)):
        raise ValueError(f"latent of {(t, h, w)} frames, rows, columns must divide into patches of {config.patch}")
