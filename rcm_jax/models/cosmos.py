"""Cosmos-Predict2: the diffusion transformer of github.com/nvidia-cosmos/cosmos-predict2, in Flax NNX.

It differs from Wan in its modulation, which is a low-rank matrix of every layer plus one matrix that all share
(AdaLN-LoRA), in norms of queries and keys over single heads, in rotary frequencies stretched along each axis, in having
no biases, and in a last input channel that marks padding.

As in NVIDIA's code the rotary embedding knows nothing of the frame rate. diffusers' video pipeline stretches time by
24 / fps, and its default fps is 16: there, pass fps=24 for the same function. Precision and the stacked blocks are as
in wan.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from rcm_jax.models.blocks import WHOLE, BlockOps, Inside, Mode, Remat, run_blocks
from rcm_jax.models.layers import (
    MLP,
    Rotary,
    gelu,
    layer_norm,
    linear,
    patchify,
    rms_norm,
    rotary_table,
    rotary_widths,
    sinusoids,
    spread,
    stack_blocks,
    time_rows,
)


@dataclasses.dataclass(frozen=True)
class CosmosConfig:
    """Shape of a Cosmos-Predict2 network. `in_channels` counts the latent, any condition and the padding mask.

    `rope_scale` stretches the rotary embedding's range over frames, rows and columns (the official extrapolation
    ratios); `lora_dim` is the rank of each layer's own modulation.
    """

    dim: int
    heads: int
    layers: int
    rope_scale: tuple[float, float, float]
    in_channels: int
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 1024
    text_length: int = 512
    lora_dim: int = 256
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.dim % (2 * self.heads) or self.head_dim < 12:
            raise ValueError(
                f"dim={self.dim}, heads={self.heads} must give heads of an even width of 12 or more: "
                "rotary pairs fill a head, two or more on each axis"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def rotary_bases(self) -> tuple[float, float, float]:
        """10000 for each axis, raised so that its slowest pair turns 1 / rope_scale times as far (NTK scaling)."""
        t, h, w = (
            10000.0 * scale ** (width / (width - 2))
            for scale, width in zip(self.rope_scale, rotary_widths(self.head_dim), strict=True)
        )
        return t, h, w

    def tokens(self, latent_shape: tuple[int, ...]) -> int:
        """Number of tokens of a latent (T, H, W, C)."""
        return math.prod(n // p for n, p in zip(latent_shape, self.patch, strict=False))


_IMAGE_CHANNELS = 16 + 1  # latent, padding mask
_VIDEO_CHANNELS = 16 + 1 + 1  # latent, mask of the given frames, padding mask
_0_6B = CosmosConfig(dim=1280, heads=20, layers=20, rope_scale=(1.0, 4.0, 4.0), in_channels=_IMAGE_CHANNELS)
_2B = dataclasses.replace(_0_6B, dim=2048, heads=16, layers=28)
_14B = dataclasses.replace(_0_6B, dim=5120, heads=40, layers=36)

PRESETS = {
    "cosmos-predict2-t2i-0.6b": _0_6B,
    "cosmos-predict2-t2i-2b": _2B,
    "cosmos-predict2-t2i-14b": _14B,
    "cosmos-predict2-v2w-2b": dataclasses.replace(_2B, in_channels=_VIDEO_CHANNELS, rope_scale=(1.0, 3.0, 3.0)),
    "cosmos-predict2-v2w-14b": dataclasses.replace(_14B, in_channels=_VIDEO_CHANNELS, rope_scale=(5 / 6, 2.0, 2.0)),
}


class Cosmos(nnx.Module):
    """Predicts the rectified-flow velocity of a latent image or video from a caption and, for videos, given frames."""

    def __init__(
        self,
        config: CosmosConfig,
        *,
        dtype: Any = jnp.float32,
        remat: Remat = "none",
        ops: BlockOps = WHOLE,
        rngs: nnx.Rngs,
    ):
        c = config
        patch_channels = math.prod(c.patch)
        self.config = config
        self.dtype = dtype
        self.remat: Remat = remat
        self.ops = ops
        self.patch_embedding = linear(c.in_channels * patch_channels, c.dim, dtype, rngs, use_bias=False)
        self.time_embedding = MLP(c.dim, c.dim, 3 * c.dim, jnp.float32, rngs, activation=jax.nn.silu, use_bias=False)
        self.time_norm = rms_norm(c.dim, c.norm_eps, rngs)
        self.blocks = stack_blocks(lambda rngs: Block(config, dtype, rngs), c.layers, rngs)
        self.head = Head(config, rngs)

    def __call__(
        self,
        x_BTHWC: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b k"],
        text_BSD: Float[Array, "b s d"],
        *,
        condition_BTHWC: Float[Array, "b t h w m"] | None = None,
        padding_BHW: Float[Array, "b h w"] | None = None,
        mode: Mode = "reverse",
    ) -> Float[Array, "b t h w o"]:
        """Velocity, float32, of the latent `x_BTHWC` at network time `time` (1000 x RF time, as for Wan).

        Where frames have times of their own (video-to-world, whose given frames are at RF time 1e-4), `time` holds one
        for every frame or every token of a sample. `condition_BTHWC` (video-to-world: 1 on given frames) is
        concatenated after x, and after it `padding_BHW`: 1 where the latent is padding, by default nowhere.
        `mode` as in blocks.run_blocks.

        Raises ValueError for a latent that does not divide into patches, has other channels than the config or other
        times than one a sample, frame or token.
        """
        if padding_BHW is None:
            padding_BHW = jnp.zeros_like(x_BTHWC[:, 0, :, :, 0])
        padding_BTHW1 = jnp.broadcast_to(padding_BHW[:, None, :, :, None], (*x_BTHWC.shape[:-1], 1))
        extra = [padding_BTHW1] if condition_BTHWC is None else [condition_BTHWC, padding_BTHW1]
        x_BTHWC = jnp.concatenate([x_BTHWC, *(a.astype(x_BTHWC.dtype) for a in extra)], axis=-1)
        patches, grid = patchify(x_BTHWC, self.config.patch, self.config.in_channels)
        x_BLD = self.patch_embedding(patches)
        time_BK = time_rows(time, math.prod(grid))
        time_BKM = self.embed_time(time_BK)
        graph, params = nnx.split(self.blocks)
        params = nnx.to_pure_dict(params)

        def block(params: Any, x: jax.Array, time_BKM: jax.Array, text: jax.Array, inside: Inside) -> jax.Array:
            # The table is made here, not closed over: a custom derivative rule must not hold another trace's arrays.
            rotary = rotary_table(grid, self.config.head_dim, self.config.rotary_bases, length=x.shape[1])
            return nnx.merge(graph, params)(x, time_BKM, text, rotary, inside)

        text_BSD = text_BSD.astype(self.dtype)
        x_BLD = run_blocks(block, params, x_BLD, time_BKM, text_BSD, mode=mode, remat=self.remat, ops=self.ops)
        (t, h, w), (kt, kh, kw) = grid, self.config.patch
        return rearrange(
            self.ops.place(self.head(x_BLD, time_BKM)),
            "b (t h w) (kh kw kt c) -> b (t kt) (h kh) (w kw) c",
            **dict(t=t, h=h, w=w, kt=kt, kh=kh, kw=kw),
        )

    def embed_time(self, time_BK: jax.Array) -> jax.Array:
        """(B, K, 4 dim): what the low-rank modulations take, dim wide, then the modulation that all layers share."""
        # NVIDIA's network takes the RF time itself.
        time_BKD = sinusoids(time_BK / 1000.0, self.config.dim)
        return jnp.concatenate([jax.nn.silu(self.time_norm(time_BKD)), self.time_embedding(time_BKD)], axis=-1)


class Block(nnx.Module):
    """Self-attention, cross-attention to the caption, and a feed-forward layer, each modulated by the time."""

    def __init__(self, config: CosmosConfig, dtype: Any, rngs: nnx.Rngs):
        c = config
        self.norm = layer_norm(c.dim, c.norm_eps, rngs)
        self.modulation_self_attn, self.modulation_cross_attn, self.modulation_ffn = (
            Modulation(c.dim, c.lora_dim, 3, rngs) for _ in range(3)
        )
        self.self_attn = Attention(config, c.dim, dtype, rngs)
        self.cross_attn = Attention(config, c.text_dim, dtype, rngs)
        self.ffn = MLP(c.dim, 4 * c.dim, c.dim, dtype, rngs, activation=gelu, use_bias=False)
        self.dtype = dtype

    def __call__(
        self, x_BLD: jax.Array, time_BKM: jax.Array, text_BSD: jax.Array, rotary: Rotary, inside: Inside
    ) -> jax.Array:
        y, gate = self.modulate(self.modulation_self_attn, x_BLD, time_BKM, inside.tokens)
        x_BLD = (x_BLD + gate * self.self_attn(y, y, inside, rotary)).astype(self.dtype)
        y, gate = self.modulate(self.modulation_cross_attn, x_BLD, time_BKM, inside.tokens)
        x_BLD = (x_BLD + gate * self.cross_attn(y, text_BSD, inside)).astype(self.dtype)
        y, gate = self.modulate(self.modulation_ffn, x_BLD, time_BKM, inside.tokens)
        return (x_BLD + gate * self.ffn(y, inside.keep)).astype(self.dtype)

    def modulate(
        self, modulation: "Modulation", x_BLD: jax.Array, time_BKM: jax.Array, tokens: int
    ) -> tuple[jax.Array, jax.Array]:
        """The normalised, scaled and shifted input of a layer, and the gate of its output."""
        shift, scale, gate = modulation(time_BKM, tokens, x_BLD.shape[1])
        return (self.norm(x_BLD) * (1 + scale) + shift).astype(self.dtype), gate


class Modulation(nnx.Module):
    """`rows` vectors of a layer from the time: a low-rank matrix of its own plus the first rows of the shared one."""

    def __init__(self, dim: int, lora_dim: int, rows: int, rngs: nnx.Rngs):
        self.down = linear(dim, lora_dim, jnp.float32, rngs, use_bias=False)
        self.up = linear(lora_dim, rows * dim, jnp.float32, rngs, use_bias=False)
        self.dim, self.rows = dim, rows

    def __call__(self, time_BKM: jax.Array, tokens: int, length: int = 0) -> list[jax.Array]:
        own, shared = self.up(self.down(time_BKM[..., : self.dim])), time_BKM[..., self.dim :]
        rows_BKD = jnp.split(own + shared[..., : own.shape[-1]], self.rows, axis=-1)
        return [spread(row, tokens, length) for row in rows_BKD]


class Attention(nnx.Module):
    """Multi-head attention whose queries and keys are RMS-normalised in each head, then rotated."""

    def __init__(self, config: CosmosConfig, source_dim: int, dtype: Any, rngs: nnx.Rngs):
        c = config
        self.q, self.o = (linear(c.dim, c.dim, dtype, rngs, use_bias=False) for _ in range(2))
        self.k, self.v = (linear(source_dim, c.dim, dtype, rngs, use_bias=False) for _ in range(2))
        self.norm_q, self.norm_k = (rms_norm(c.head_dim, c.norm_eps, rngs) for _ in range(2))
        self.heads, self.dtype = c.heads, dtype

    def __call__(
        self, x_BLD: jax.Array, source_BSD: jax.Array, inside: Inside, rotary: Rotary | None = None
    ) -> jax.Array:
        projected = map(inside.keep, (self.q(x_BLD), self.k(source_BSD), self.v(source_BSD)))
        q, k, v = (rearrange(a, "b l (n h) -> b l n h", n=self.heads) for a in projected)
        q, k = self.norm_q(q), self.norm_k(k)
        keys = None
        if rotary is not None:
            q, k, keys = rotate(q, rotary), rotate(k, rotary), inside.tokens
        out = inside.attend(q.astype(self.dtype), k.astype(self.dtype), v, keys=keys)
        return inside.keep(self.o(rearrange(out, "b l n h -> b l (n h)")))


class Head(nnx.Module):
    """Modulated norm and projection to patches, in float32."""

    def __init__(self, config: CosmosConfig, rngs: nnx.Rngs):
        c = config
        self.modulation = Modulation(c.dim, c.lora_dim, 2, rngs)
        self.norm = layer_norm(c.dim, c.norm_eps, rngs)
        self.head = linear(c.dim, c.out_channels * math.prod(c.patch), jnp.float32, rngs, use_bias=False)

    def __call__(self, x_BLD: jax.Array, time_BKM: jax.Array) -> jax.Array:
        shift, scale = self.modulation(time_BKM, x_BLD.shape[1])
        return self.head(self.norm(x_BLD) * (1 + scale) + shift)


def rotate(x_BLNH: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotates pairs that lie half a head apart by the angles of their position; float32."""
    cos, sin = (a[None, :, None, :] for a in rotary)
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
