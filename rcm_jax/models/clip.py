"""The image encoder of Wan2.1 image-to-video: CLIP's ViT-H/14 (arXiv 2103.00020, arXiv 2212.07143), in Flax NNX.

Precision: norms and softmax are float32; matrix products and attention operands are in `dtype`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

import pallas_kernels
from rcm_jax.models.layers import MLP, gelu, layer_norm, linear, stack_blocks

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Shape of a CLIP image encoder; `image` and `patch` are sides in pixels."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    image: int = 224
    patch: int = 14
    norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Patches, and one for the whole image."""
        return (self.image // self.patch) ** 2 + 1


PRESETS = {"clip-vit-h-14": CLIPConfig(dim=1280, ffn_dim=5120, heads=16, layers=32)}


class ImageFeatures(NamedTuple):
    """What the encoder says of images, float32."""

    tokens_BLD: Float[Array, "b l d"]  # before the last layer: what Wan2.1 attends to
    pooled_BD: Float[Array, "b d"]  # the whole image's token after it, normalised


class ImageEncoder(nnx.Module):
    """Turns a square image into one vector for the whole and one for each patch."""

    def __init__(self, config: CLIPConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        c = config
        init = nnx.initializers.normal(c.dim**-0.5)
        window = (c.patch, c.patch)
        self.patch_embedding = nnx.Conv(
            3, c.dim, window, strides=window, padding="VALID", use_bias=False, dtype=dtype, rngs=rngs
        )
        self.class_embedding = nnx.Param(init(rngs.params(), (c.dim,)))
        self.position_embedding = nnx.Param(init(rngs.params(), (c.tokens, c.dim)))
        self.norm_in = layer_norm(c.dim, c.norm_eps, rngs, affine=True)
        self.blocks = stack_blocks(lambda rngs: Block(config, dtype, rngs), c.layers, rngs)
        self.norm_out = layer_norm(c.dim, c.norm_eps, rngs, affine=True)
        self.config, self.dtype = config, dtype

    def __call__(self, image_BHWC: Float[Array, "b h w 3"]) -> ImageFeatures:
        """Features of images as `preprocess` makes them.

        Raises ValueError for images of another size than the config's.
        """
        side = self.config.image
        if image_BHWC.shape[1:3] != (side, side):
            raise ValueError(f"image of {image_BHWC.shape[1:3]} pixels must be {(side, side)}: preprocess it")
        patches_BLD = rearrange(self.patch_embedding(image_BHWC), "b h w d -> b (h w) d").astype(jnp.float32)
        whole_B1D = jnp.broadcast_to(self.class_embedding[...], (len(patches_BLD), 1, self.config.dim))
        x_BLD = jnp.concatenate([whole_B1D, patches_BLD], axis=1) + self.position_embedding[...][None]
        x_BLD = self.norm_in(x_BLD).astype(self.dtype)
        graph, params = nnx.split(self.blocks)

        def step(carry: tuple[jax.Array, jax.Array], params: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
            _, x_BLD = carry
            return (x_BLD, nnx.merge(graph, params)(x_BLD)), None

        (before_BLD, x_BLD), _ = lax.scan(step, (x_BLD, x_BLD), params)
        return ImageFeatures(before_BLD.astype(jnp.float32), self.norm_out(x_BLD[:, 0]))


class Block(nnx.Module):
    """Self-attention and a feed-forward layer, each normalised before."""

    def __init__(self, config: CLIPConfig, dtype: Any, rngs: nnx.Rngs):
        c = config
        self.norm1, self.norm2 = (layer_norm(c.dim, c.norm_eps, rngs, affine=True) for _ in range(2))
        self.q, self.k, self.v, self.o = (linear(c.dim, c.dim, dtype, rngs) for _ in range(4))
        self.ffn = MLP(c.dim, c.ffn_dim, c.dim, dtype, rngs, activation=gelu)
        self.heads, self.dtype = c.heads, dtype

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        y = self.norm1(x_BLD).astype(self.dtype)
        q, k, v = (rearrange(f(y), "b l (n h) -> b l n h", n=self.heads) for f in (self.q, self.k, self.v))
        out, _ = pallas_kernels.attention(q, k, v, return_lse=True)
        x_BLD = x_BLD + self.o(rearrange(out, "b l n h -> b l (n h)"))
        return x_BLD + self.ffn(self.norm2(x_BLD).astype(self.dtype))


def preprocess(image_BHWC: Float[Array, "b h w 3"], *, side: int = 224) -> Float[Array, "b s s 3"]:
    """Images of any size, float in [-1, 1], as the encoder wants them: square, bicubic, with CLIP's mean and deviation.

    The whole image is squeezed into the square, without antialiasing, as in Wan's own code. (diffusers' pipeline crops
    the middle instead.)
    """
    rows, columns = (jnp.asarray(bicubic_weights(n, side)) for n in image_BHWC.shape[1:3])
    image_BHWC = jnp.einsum(
        "yh,xw,bhwc->byxc", rows, columns, image_BHWC.astype(jnp.float32), precision="highest", optimize=True
    )
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (PIXEL_MEAN, PIXEL_STD))
    return (image_BHWC / 2 + 0.5 - mean) / std


def bicubic_weights(size: int, out_size: int) -> np.ndarray:
    """(out_size, size) float32: the weight of each pixel along an axis in each resized one.

    Keys' cubic kernel with the slope -0.75 that PyTorch uses (1981, IEEE TASSP 29); edge pixels repeat outwards.
    """
    slope = -0.75
    centre = (np.arange(out_size) + 0.5) * size / out_size - 0.5
    weights = np.zeros((out_size, size))
    for tap in range(-1, 3):
        pixel = np.floor(centre) + tap
        d = np.abs(centre - pixel)
        near = (slope + 2) * d**3 - (slope + 3) * d**2 + 1
        far = slope * (d**3 - 5 * d**2 + 8 * d - 4)
        weights[np.arange(out_size), np.clip(pixel, 0, size - 1).astype(int)] += np.where(d <= 1, near, far)
    return weights.astype(np.float32)
