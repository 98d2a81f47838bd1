"""Wan: the diffusion transformer of Wan2.1 and Wan2.2 (arXiv 2503.20314), in Flax NNX.

Precision: time, its embedding, modulation, norms, rotary embedding and the head are float32; matrix products and
attention operands are in `dtype`. The blocks' parameters are stacked along a leading axis and scanned (blocks.py).
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
    gelu_tanh,
    layer_norm,
    linear,
    patchify,
    rms_norm,
    rotary_table,
    sinusoids,
    spread,
    stack_blocks,
    time_rows,
)


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Shape of a Wan network. `in_channels` counts the latent and any condition concatenated to it.

    A network with `image_tokens` also attends to that many CLIP features, of width `image_dim`, of the first frame.
    A model with a `boundary` is two networks of this shape: one for RF times from there on, one for those below.

    What a method adds: `spans`, the second time of MeanFlow; `discriminator`, the head of a GAN on the features in the
    middle of the network; `lora_rank`, a LoRA of that rank beside every matrix of the blocks.
    """

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    patch: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_length: int = 512
    image_tokens: int = 0
    image_dim: int = 1280
    time_dim: int = 256
    norm_eps: float = 1e-6
    boundary: float | None = None
    spans: bool = False
    discriminator: bool = False
    lora_rank: int = 0

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


_1_3B = WanConfig(dim=1536, ffn_dim=8960, heads=12, layers=30)
_5B = WanConfig(dim=3072, ffn_dim=14336, heads=24, layers=30, in_channels=48, out_channels=48)
_14B = WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)
_IMAGE_CHANNELS = 16 + 4 + 16  # noise, mask of the given frames, their latent

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
    "digits28": WanConfig(
        dim=256,
        ffn_dim=1024,
        heads=4,
        layers=6,
        patch=(1, 4, 4),
        in_channels=1,
        out_channels=1,
        text_dim=32,
        text_length=8,
    ),
    "wan2.1-t2v-1.3b": _1_3B,
    "wan2.1-t2v-14b": _14B,
    "wan2.1-i2v-14b": dataclasses.replace(_14B, in_channels=_IMAGE_CHANNELS, image_tokens=257),
    "wan2.2-t2v-a14b": dataclasses.replace(_14B, boundary=0.875),
    "wan2.2-i2v-a14b": dataclasses.replace(_14B, in_channels=_IMAGE_CHANNELS, boundary=0.9),
    "wan2.2-ti2v-5b": _5B,
}


class Wan(nnx.Module):
    """Predicts the rectified-flow velocity of a latent video from a caption and, for some models, an image."""

    def __init__(
        self,
        config: WanConfig,
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
        self.patch_embedding = linear(c.in_channels * patch_channels, c.dim, dtype, rngs)
        self.text_embedding = MLP(c.text_dim, c.dim, c.dim, dtype, rngs, activation=gelu_tanh)
        if c.image_tokens:
            self.image_embedding = ImageEmbedding(c.image_dim, c.dim, dtype, rngs)
        self.time_embedding = MLP(c.time_dim, c.dim, c.dim, jnp.float32, rngs, activation=jax.nn.silu)
        if c.spans:
            self.span_embedding = MLP(c.time_dim, c.dim, c.dim, jnp.float32, rngs, activation=jax.nn.silu)
            self.span_embedding.down.kernel[...] *= 0.0  # a teacher's network is unchanged
        self.time_projection = linear(c.dim, 6 * c.dim, jnp.float32, rngs)
        self.blocks = stack_blocks(lambda rngs: Block(config, dtype, rngs), c.layers, rngs)
        self.head = Head(c.dim, c.out_channels * patch_channels, c.norm_eps, rngs)
        if c.discriminator:
            self.discriminator = Discriminator(c.dim, c.norm_eps, rngs)

    def __call__(
        self,
        x_BTHWC: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b k"],
        text_BSD: Float[Array, "b s d"],
        *,
        condition_BTHWC: Float[Array, "b t h w m"] | None = None,
        image_BND: Float[Array, "b n i"] | None = None,
        span_B: Float[Array, "b"] | None = None,
        discriminate: bool = False,
        mode: Mode = "reverse",
    ) -> Float[Array, "b t h w o"] | tuple[Float[Array, "b t h w o"], Float[Array, "b"]]:
        """Velocity, float32, of the latent `x_BTHWC` at network time `time` (1000 x RF time).

        Where frames have times of their own (TI2V, whose given first frame is at 0), `time` holds one for every frame
        or every token of a sample. `condition_BTHWC` (I2V: mask and latent) is concatenated after x, `image_BND` are
        the CLIP features that Wan2.1 I2V attends to. `mode` as in blocks.run_blocks.

        With `span_B`, on the scale of `time`, it is the mean velocity over that much time before `time` (MeanFlow).
        With `discriminate` it returns the velocity and the discriminator's logit (B,) for x.

        Raises ValueError for a latent that does not divide into patches, has other channels than the config or other
        times than one a sample, frame or token, and for image features that the network does not take or lacks.
        """
        if condition_BTHWC is not None:
            x_BTHWC = jnp.concatenate([x_BTHWC, condition_BTHWC.astype(x_BTHWC.dtype)], axis=-1)
        patches, grid = patchify(x_BTHWC, self.config.patch, self.config.in_channels)
        x_BLD = self.patch_embedding(patches)
        time_BK = time_rows(time, math.prod(grid))
        time_BKD = self.time_embedding(sinusoids(time_BK, self.config.time_dim))
        if span_B is not None:
            time_BKD = time_BKD + self.span_embedding(sinusoids(span_B[:, None], self.config.time_dim))
        modulation_BK6D = rearrange(self.time_projection(jax.nn.silu(time_BKD)), "b k (n d) -> b k n d", n=6)
        context_BSD = self.embed_context(text_BSD, image_BND)
        graph, params = nnx.split(self.blocks)
        params = nnx.to_pure_dict(params)

        def block(params: Any, x: jax.Array, modulation: jax.Array, context: jax.Array, inside: Inside) -> jax.Array:
            # The table is made here, not closed over: a custom derivative rule must not hold another trace's arrays.
            rotary = rotary_table(grid, self.config.head_dim, length=x.shape[1])
            return nnx.merge(graph, params)(x, modulation, context, rotary, inside)

        def run(params: Any, x_BLD: jax.Array) -> jax.Array:
            options: dict[str, Any] = {"mode": mode, "remat": self.remat, "ops": self.ops}
            return run_blocks(block, params, x_BLD, modulation_BK6D, context_BSD, **options)

        logit_B = None
        if discriminate:
            middle = self.config.layers // 2
            x_BLD = run(jax.tree.map(lambda stacked: stacked[:middle], params), x_BLD)
            params = jax.tree.map(lambda stacked: stacked[middle:], params)
            logit_B = self.discriminator(x_BLD)
        x_BLD = run(params, x_BLD)
        (t, h, w), (kt, kh, kw) = grid, self.config.patch
        velocity_BTHWC = rearrange(
            self.ops.place(self.head(x_BLD, time_BKD)),
            "b (t h w) (kt kh kw c) -> b (t kt) (h kh) (w kw) c",
            **dict(t=t, h=h, w=w, kt=kt, kh=kh, kw=kw),
        )
        return velocity_BTHWC if logit_B is None else (velocity_BTHWC, logit_B)

    def embed_context(self, text_BSD: jax.Array, image_BND: jax.Array | None) -> jax.Array:
        """What cross-attention sees, (B, S, dim): the image's tokens, if the network takes any, then the caption's."""
        tokens = 0 if image_BND is None else image_BND.shape[1]
        if tokens != self.config.image_tokens:
            raise ValueError(
                f"image_BND has {tokens} tokens, the network takes {self.config.image_tokens}: check the model preset"
            )
        text_BSD = self.text_embedding(text_BSD)
        if image_BND is None:
            return text_BSD
        return jnp.concatenate([self.image_embedding(image_BND), text_BSD], axis=1)


class Block(nnx.Module):
    """Self-attention, cross-attention to the context, and a feed-forward layer, modulated by the time."""

    def __init__(self, config: WanConfig, dtype: Any, rngs: nnx.Rngs):
        c = config
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, c.dim)) / math.sqrt(c.dim))
        self.norm1 = layer_norm(c.dim, c.norm_eps, rngs)
        self.self_attn = Attention(config, dtype, rngs)
        self.norm3 = layer_norm(c.dim, c.norm_eps, rngs, affine=True)
        self.cross_attn = ImageAttention(config, dtype, rngs) if c.image_tokens else Attention(config, dtype, rngs)
        self.norm2 = layer_norm(c.dim, c.norm_eps, rngs)
        self.ffn = MLP(c.dim, c.ffn_dim, c.dim, dtype, rngs, activation=gelu_tanh, lora_rank=c.lora_rank)
        self.dtype = dtype

    def __call__(
        self, x_BLD: jax.Array, modulation_BK6D: jax.Array, context_BSD: jax.Array, rotary: Rotary, inside: Inside
    ) -> jax.Array:
        rows_BKD = jnp.unstack(self.modulation[...][None, None] + modulation_BK6D, axis=2)
        sizes = inside.tokens, x_BLD.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2 = (spread(row, *sizes) for row in rows_BKD)
        y = (self.norm1(x_BLD) * (1 + scale1) + shift1).astype(self.dtype)
        y = self.self_attn(y, y, inside, rotary)
        x_BLD = (x_BLD + y * gate1).astype(self.dtype)
        x_BLD = x_BLD + self.cross_attn(self.norm3(x_BLD).astype(self.dtype), context_BSD, inside)
        y = self.ffn((self.norm2(x_BLD) * (1 + scale2) + shift2).astype(self.dtype), inside.keep)
        return (x_BLD + y * gate2).astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head attention whose queries and keys are RMS-normalised over the full width, then rotated."""

    def __init__(self, config: WanConfig, dtype: Any, rngs: nnx.Rngs):
        size = (config.dim, config.dim, dtype, rngs)
        self.q, self.k, self.v, self.o = (linear(*size, lora_rank=config.lora_rank) for _ in range(4))
        self.norm_q, self.norm_k = (rms_norm(config.dim, config.norm_eps, rngs) for _ in range(2))
        self.heads, self.dtype = config.heads, dtype

    def __call__(
        self, x_BLD: jax.Array, source_BSD: jax.Array, inside: Inside, rotary: Rotary | None = None
    ) -> jax.Array:
        q, k, v = map(inside.keep, (self.q(x_BLD), self.k(source_BSD), self.v(source_BSD)))
        return inside.keep(self.o(self.attend_heads(inside, self.norm_q(q), self.norm_k(k), v, rotary)))

    def attend_heads(
        self, inside: Inside, q_BLD: jax.Array, k_BSD: jax.Array, v_BSD: jax.Array, rotary: Rotary | None = None
    ) -> jax.Array:
        """Attention of each head, the heads side by side again."""
        q, k, v = (rearrange(a, "b l (n h) -> b l n h", n=self.heads) for a in (q_BLD, k_BSD, v_BSD))
        keys = None
        if rotary is not None:
            q, k, keys = rotate(q, rotary), rotate(k, rotary), inside.tokens
        out = inside.attend(q.astype(self.dtype), k.astype(self.dtype), v, keys=keys)
        return rearrange(out, "b l n h -> b l (n h)")


class ImageAttention(Attention):
    """Cross-attention to the caption plus, of the same queries, to the image tokens that lie before it."""

    def __init__(self, config: WanConfig, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        size = (config.dim, config.dim, dtype, rngs)
        self.k_img, self.v_img = (linear(*size, lora_rank=config.lora_rank) for _ in range(2))
        self.norm_k_img = rms_norm(config.dim, config.norm_eps, rngs)
        self.image_tokens = config.image_tokens

    def __call__(self, x_BLD: jax.Array, source_BSD: jax.Array, inside: Inside) -> jax.Array:
        image, text = jnp.split(source_BSD, [self.image_tokens], axis=1)
        projected = self.q(x_BLD), self.k(text), self.v(text), self.k_img(image), self.v_img(image)
        q, k, v, k_img, v_img = map(inside.keep, projected)
        q = self.norm_q(q)
        to_text = self.attend_heads(inside, q, self.norm_k(k), v)
        to_image = self.attend_heads(inside, q, self.norm_k_img(k_img), v_img)
        return inside.keep(self.o(to_text + to_image))


class ImageEmbedding(nnx.Module):
    """CLIP features to the network's width: norm, linear, GELU, linear, norm."""

    def __init__(self, image_dim: int, dim: int, dtype: Any, rngs: nnx.Rngs):
        self.norm_in = layer_norm(image_dim, 1e-5, rngs, affine=True)
        self.mlp = MLP(image_dim, image_dim, dim, dtype, rngs, activation=gelu)
        self.norm_out = layer_norm(dim, 1e-5, rngs, affine=True)
        self.dtype = dtype

    def __call__(self, image_BND: jax.Array) -> jax.Array:
        return self.norm_out(self.mlp(self.norm_in(image_BND).astype(self.dtype))).astype(self.dtype)


class Head(nnx.Module):
    """Modulated norm and projection to patches, in float32."""

    def __init__(self, dim: int, out_dim: int, eps: float, rngs: nnx.Rngs):
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, dim)) / math.sqrt(dim))
        self.norm = layer_norm(dim, eps, rngs)
        self.head = linear(dim, out_dim, jnp.float32, rngs)

    def __call__(self, x_BLD: jax.Array, time_BKD: jax.Array) -> jax.Array:
        rows_BKD = jnp.unstack(self.modulation[...][None, None] + time_BKD[:, :, None], axis=2)
        shift, scale = (spread(row, x_BLD.shape[1]) for row in rows_BKD)
        return self.head(self.norm(x_BLD) * (1 + scale) + shift)


class Discriminator(nnx.Module):
    """A logit of each sample from the features of its tokens: norm, linear, SiLU, linear, mean; float32."""

    def __init__(self, dim: int, eps: float, rngs: nnx.Rngs):
        self.norm = layer_norm(dim, eps, rngs)
        self.mlp = MLP(dim, dim, 1, jnp.float32, rngs, activation=jax.nn.silu)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return self.mlp(self.norm(x_BLD)).mean(axis=(1, 2))


def rotate(x_BLNH: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotates interleaved pairs of each head by the angles of their position; float32.

    A channel meets its partner by rolling the head: arrays of pairs, two wide, are slow on every accelerator.
    """
    cos, sin = (jnp.repeat(a, 2, axis=-1)[None, :, None, :] for a in rotary)
    x = x_BLNH.astype(jnp.float32)
    is_first = jnp.arange(x.shape[-1]) % 2 == 0
    partner = jnp.where(is_first, -jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
    return x * cos + partner * sin
