"""What the diffusion transformers share: linear layers and norms, patches, times, rotary tables, stacked blocks."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Grid = tuple[int, int, int]  # frames, rows and columns of tokens
Rotary = tuple[jax.Array, jax.Array]  # cos and sin, each (L, head_dim / 2)
Block = TypeVar("Block", bound=nnx.Module)


class MLP(nnx.Module):
    """Linear, activation, linear."""

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        dtype: Any,
        rngs: nnx.Rngs,
        *,
        activation: Callable[[jax.Array], jax.Array],
        use_bias: bool = True,
        lora_rank: int = 0,
    ):
        self.up = linear(in_dim, hidden_dim, dtype, rngs, use_bias=use_bias, lora_rank=lora_rank)
        self.down = linear(hidden_dim, out_dim, dtype, rngs, use_bias=use_bias, lora_rank=lora_rank)
        self.activation = activation

    def __call__(self, x: jax.Array, keep: Callable[[jax.Array], jax.Array] = lambda y: y) -> jax.Array:
        return keep(self.down(self.activation(keep(self.up(x)))))


def gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation, x (1 + tanh u) / 2, as x / (1 + exp(-2 u)), which accelerators compute faster."""
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


class AdaptedLinear(nnx.Linear):
    """A linear layer and its LoRA (arXiv 2106.09685): x W + (x A) B + b, where B starts at 0."""

    def __init__(self, in_dim: int, out_dim: int, lora_rank: int, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(in_dim, out_dim, rngs=rngs, **options)
        self.lora_a = nnx.Param(jax.random.normal(rngs.params(), (in_dim, lora_rank)) / math.sqrt(in_dim))
        self.lora_b = nnx.Param(jnp.zeros((lora_rank, out_dim)))

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = (matrix[...].astype(self.dtype) for matrix in (self.lora_a, self.lora_b))
        return super().__call__(x) + (x.astype(self.dtype) @ a) @ b


def linear(
    in_dim: int, out_dim: int, dtype: Any, rngs: nnx.Rngs, *, use_bias: bool = True, lora_rank: int = 0
) -> nnx.Linear:
    """A linear layer that keeps the size of its input at initialisation, with a LoRA if `lora_rank` is not 0."""
    init = nnx.initializers.truncated_normal(1.0 / math.sqrt(in_dim))
    options: dict[str, Any] = {"dtype": dtype, "kernel_init": init, "use_bias": use_bias, "rngs": rngs}
    return AdaptedLinear(in_dim, out_dim, lora_rank, **options) if lora_rank else nnx.Linear(in_dim, out_dim, **options)


def layer_norm(dim: int, eps: float, rngs: nnx.Rngs, *, affine: bool = False) -> nnx.LayerNorm:
    """Layer norm in float32, by default without parameters."""
    return nnx.LayerNorm(
        dim, epsilon=eps, dtype=jnp.float32, use_scale=affine, use_bias=affine, use_fast_variance=False, rngs=rngs
    )


def rms_norm(dim: int, eps: float, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMS norm in float32."""
    return nnx.RMSNorm(dim, epsilon=eps, dtype=jnp.float32, rngs=rngs)


def stack_blocks(create: Callable[[nnx.Rngs], Block], layers: int, rngs: nnx.Rngs) -> Block:
    """One block whose every parameter has a leading axis of `layers`."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create_all(rngs: nnx.Rngs) -> Block:
        return create(rngs)

    return create_all(rngs)


def patchify(
    x_BTHWC: Float[Array, "b t h w c"], patch: tuple[int, int, int], channels: int
) -> tuple[Float[Array, "b l p"], Grid]:
    """Cuts a latent into patches, each flattened as (c kt kh kw), and counts them along each axis.

    Raises ValueError for a latent that does not divide into patches or has other channels than `channels`.
    """
    *_, t, h, w, found = x_BTHWC.shape
    if found != channels:
        raise ValueError(f"latent has {found} channels, the network takes {channels}: check the model preset")
    if any(n % k for n, k in zip((t, h, w), patch, strict=True)):
        raise ValueError(f"latent of {(t, h, w)} frames, rows, columns must divide into patches of {patch}")
    kt, kh, kw = patch
    patches = rearrange(x_BTHWC, "b (t kt) (h kh) (w kw) c -> b (t h w) (c kt kh kw)", kt=kt, kh=kh, kw=kw)
    return patches, (t // kt, h // kh, w // kw)


def time_rows(time: Float[Array, "b"] | Float[Array, "b k"], tokens: int) -> Float[Array, "b k"]:
    """Times as K rows a sample; each row serves the next `tokens` / K tokens.

    K is 1, or the number of frames where each has its own time, or the number of tokens.
    Raises ValueError where K does not divide the tokens.
    """
    time_BK = time.reshape(len(time), -1)
    if tokens % time_BK.shape[1]:
        raise ValueError(
            f"{time_BK.shape[1]} times a sample must divide its {tokens} tokens: give one, or one a frame or a token"
        )
    return time_BK


def spread(rows_BKX: Float[Array, "b k ..."], tokens: int, length: int = 0) -> Float[Array, "b l ..."]:
    """Repeats each of K rows for its tokens, zeros behind them up to `length`; one row is left to broadcast.

    XLA repeats within the arithmetic that follows, not in memory, if that is all which is done with the result: take
    rows apart before they are spread, not after.
    """
    rows = rows_BKX.shape[1]
    return rows_BKX if rows == 1 else fill(jnp.repeat(rows_BKX, tokens // rows, axis=1), 1, length)


def fill(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Zeros behind x along an axis, up to a length; x as it is if it has that or more."""
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing > 0 else x


def sinusoids(time_BK: Float[Array, "b k"], dim: int) -> Float[Array, "b k d"]:
    """cos, then sin, of the time times dim / 2 falling frequencies, with float64's accuracy from float32 arithmetic.

    An angle near 1000 rounded to float32 is off by 3e-5. So the angle is the sum of a coarse part, whose product is
    exact (12 bits each), and a small rest, and the two meet in the addition theorem.
    """
    frequencies = 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    step = 2.0 ** np.floor(np.log2(frequencies) - 11)
    coarse = np.round(frequencies / step) * step
    rest = (frequencies - coarse).astype(np.float32)[None, None]
    coarse = coarse.astype(np.float32)[None, None]
    whole = lax.stop_gradient(jnp.round(time_BK))[..., None]
    angle, small = whole * coarse, (time_BK[..., None] - whole) * (coarse + rest) + whole * rest
    cos, sin, cos_small, sin_small = jnp.cos(angle), jnp.sin(angle), jnp.cos(small), jnp.sin(small)
    return jnp.concatenate([cos * cos_small - sin * sin_small, sin * cos_small + cos * sin_small], axis=-1)


def rotary_widths(head_dim: int) -> tuple[int, int, int]:
    """How the channels of a head are shared out: a third each to frames, rows and columns, the rest to frames."""
    space = head_dim // 6 * 2
    return head_dim - 2 * space, space, space


def rotary_table(
    grid: Grid, head_dim: int, bases: tuple[float, float, float] = (10000.0, 10000.0, 10000.0), *, length: int = 0
) -> Rotary:
    """cos and sin, each (L, head_dim / 2) float32, of the 3-D rotary embedding; at least `length` rows.

    An axis that has `width` channels and the base b turns its k-th pair by position x b^(-2 k / width).
    """
    token, (_, rows, columns) = jnp.arange(max(math.prod(grid), length)), grid
    positions = token // (rows * columns), token // columns % rows, token % columns
    angles = [
        position[:, None] * (base ** (-jnp.arange(0, width, 2) / width))[None]
        for position, width, base in zip(positions, rotary_widths(head_dim), bases, strict=True)
    ]
    angles = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)
