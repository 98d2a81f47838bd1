"""The video autoencoders of Wan2.1, which Cosmos-Predict2 uses too, and of Wan2.2 (arXiv 2503.20314), in Flax NNX.

Time is causal: the first frame is a latent frame of its own, every four frames after it are another. So a video runs
through the network in chunks, the first frame alone and then four frames (one latent frame) at a time, and each causal
layer is handed the last frames it saw before: any length takes the memory of one chunk and gives what the whole would.

Precision: norms, SiLU, attention's softmax and what is done to latents alone are float32; the rest is in `dtype`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of an autoencoder, and the mean and standard deviation of its latents' channels.

    A level is a few residual blocks at one resolution; all but the coarsest halve rows and columns, those flagged in
    `halve_time` frames too. Levels are counted from the pixels down. `shortcuts` adds, around each level, its input
    resampled without weights. `patch` x `patch` pixels are stacked into channels before the first level.
    """

    encoder_dim: int
    decoder_dim: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    halve_time: tuple[bool, ...] = (False, True, True)
    blocks: int = 2
    patch: int = 1
    shortcuts: bool = False

    @property
    def latent_channels(self) -> int:
        return len(self.latent_mean)

    @property
    def pixel_channels(self) -> int:
        return 3 * self.patch**2

    @property
    def frame_factor(self) -> int:
        """Frames of one latent frame, the first excepted."""
        return 2 ** sum(self.halve_time)

    @property
    def space_factor(self) -> int:
        """Rows, and columns, of patches for one of the latent."""
        return 2 ** (len(self.multipliers) - 1)

    def latent_shape(self, video_THW: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """(frames, rows, columns, channels) of the latent of a video of (frames, rows, columns).

        Raises ValueError for a video that does not divide so.
        """
        frames, *sides = video_THW
        block = self.patch * self.space_factor
        if (frames - 1) % self.frame_factor:
            raise ValueError(f"video of {frames} frames must have 1 + {self.frame_factor} k of them: leave some out")
        if any(side % block for side in sides):
            raise ValueError(
                f"video of {sides[0]} x {sides[1]} pixels must have multiples of {block}: resize or crop it"
            )
        rows, columns = (side // block for side in sides)
        return 1 + (frames - 1) // self.frame_factor, rows, columns, self.latent_channels


FRAMES = 3  # under the window of every convolution over time


class Tiling(NamedTuple):
    """Runs the network on overlapping squares of `size` latent rows and columns, `stride` apart, and blends them."""

    size: int = 32
    stride: int = 24


# The statistics are those in the published configs of the two models.
# fmt: off
PRESETS = {
    "wan2.1": VAEConfig(
        encoder_dim=96,
        decoder_dim=96,
        latent_mean=(
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ),
        latent_std=(
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ),
    ),
    "wan2.2": VAEConfig(
        encoder_dim=160,
        decoder_dim=256,
        patch=2,
        shortcuts=True,
        latent_mean=(
            -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
            0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
            -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
            -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
        ),
        latent_std=(
            0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
            0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
            0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
            0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
        ),
    ),
}
# fmt: on


class VAE(nnx.Module):
    """An encoder and a decoder; each also stands alone, for a job that needs only one of them."""

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)


class Encoder(nnx.Module):
    """Turns a video into the mean of its latent, normalised per channel."""

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        c = config
        dims = [c.encoder_dim * multiplier for multiplier in (1, *c.multipliers)]
        self.config, self.dtype = config, dtype
        self.conv_in = CausalConv(c.pixel_channels, dims[0], 3, dtype, rngs)
        self.levels = nnx.List(
            [
                DownLevel(in_dim, out_dim, factors, config, dtype, rngs)
                for in_dim, out_dim, factors in zip(dims, dims[1:], _factors(config), strict=False)
            ]
        )
        self.middle = Middle(dims[-1], dtype, rngs)
        self.norm_out = RMSNorm(dims[-1], rngs)
        self.conv_out = CausalConv(dims[-1], 2 * c.latent_channels, 3, dtype, rngs)
        self.quant = nnx.Linear(2 * c.latent_channels, 2 * c.latent_channels, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, video_BTHWC: Float[Array, "b t h w 3"], *, tiling: Tiling | None = None
    ) -> Float[Array, "b s y x c"]:
        """Latent, float32, of pixels in [-1, 1]: 1 + (t - 1) / 4 frames, an eighth (Wan2.2: 16th) of rows and columns.

        With `tiling`, call it outside `jax.jit`: each shape of tile is compiled once.
        Raises ValueError for a video that does not divide so.
        """
        c = self.config
        _, frames, rows, columns, _ = video_BTHWC.shape
        c.latent_shape((frames, rows, columns))  # raises for what does not divide
        x = rearrange(video_BTHWC, "b t (h q) (w r) c -> b t h w (c r q)", q=c.patch, r=c.patch)
        run = functools.partial(run_by_chunks, self, frames_in=c.frame_factor, frames_out=1)
        if tiling is None:
            return run(x)
        return run_by_tiles(run, x, size=tiling.size * c.space_factor, stride=tiling.stride * c.space_factor)

    def run_chunk(self, x_BTHWC: jax.Array, past: "Past") -> jax.Array:
        """One latent frame, of patches of the first frame or of the next four."""
        x = self.conv_in(x_BTHWC.astype(self.dtype), past)
        for level in self.levels:
            x = level(x, past)
        x = self.middle(x, past)
        x = self.conv_out(jax.nn.silu(self.norm_out(x)).astype(self.dtype), past)
        mean = self.quant(x)[..., : self.config.latent_channels]
        return (mean - _channels(self.config.latent_mean)) / _channels(self.config.latent_std)


class Decoder(nnx.Module):
    """Turns a normalised latent into a video."""

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        c = config
        out_dims = [c.decoder_dim * multiplier for multiplier in reversed(c.multipliers)]
        # With no shortcut to match, upsampling also halves the channels.
        in_dims = [out_dims[0]] + [dim if c.shortcuts else dim // 2 for dim in out_dims[:-1]]
        factors = reversed(_factors(config)[:-1])
        self.config, self.dtype = config, dtype
        self.quant = nnx.Linear(c.latent_channels, c.latent_channels, dtype=jnp.float32, rngs=rngs)
        self.conv_in = CausalConv(c.latent_channels, out_dims[0], 3, dtype, rngs)
        self.middle = Middle(out_dims[0], dtype, rngs)
        self.levels = nnx.List(
            [
                UpLevel(in_dim, out_dim, factor, config, dtype, rngs)
                for in_dim, out_dim, factor in zip(in_dims, out_dims, (*factors, (1, 1)), strict=True)
            ]
        )
        self.norm_out = RMSNorm(out_dims[-1], rngs)
        self.conv_out = CausalConv(out_dims[-1], c.pixel_channels, 3, dtype, rngs)

    def __call__(
        self, latent_BTHWC: Float[Array, "b s y x c"], *, tiling: Tiling | None = None
    ) -> Float[Array, "b t h w 3"]:
        """Pixels, float32 in [-1, 1]: 1 + 4 (s - 1) frames, 8 (Wan2.2: 16) times the rows and columns.

        With `tiling`, call it outside `jax.jit`: each shape of tile is compiled once.
        Raises ValueError for a latent with other channels than the config.
        """
        c = self.config
        if latent_BTHWC.shape[-1] != c.latent_channels:
            raise ValueError(
                f"latent has {latent_BTHWC.shape[-1]} channels, the decoder takes {c.latent_channels}: check the preset"
            )
        run = functools.partial(run_by_chunks, self, frames_in=1, frames_out=c.frame_factor)
        if tiling is None:
            x = run(latent_BTHWC)
        else:
            x = run_by_tiles(run, latent_BTHWC, size=tiling.size, stride=tiling.stride)
        video = rearrange(x, "b t h w (c r q) -> b t (h q) (w r) c", q=c.patch, r=c.patch)
        return jnp.clip(video, -1, 1)

    def run_chunk(self, x_BTHWC: jax.Array, past: "Past") -> jax.Array:
        """Patches of pixels, float32, of one latent frame: one frame of them for the first, four for every other."""
        c = self.config
        x = self.quant(x_BTHWC * _channels(c.latent_std) + _channels(c.latent_mean))
        x = self.conv_in(x.astype(self.dtype), past)
        x = self.middle(x, past)
        for level in self.levels:
            x = level(x, past)
        x = self.conv_out(jax.nn.silu(self.norm_out(x)).astype(self.dtype), past)
        return x.astype(jnp.float32)


class Past:
    """The frames before a chunk that each causal layer needs, given and replaced in the order of the layers' calls.

    Before the first chunk there is nothing, and zeros stand in. Made anew for every chunk; `kept` is for the next.
    """

    def __init__(self, given: Sequence[jax.Array] | None = None):
        self.is_first = given is None
        self.kept: list[jax.Array] = []
        self._given = iter(given or ())

    def prepend(self, x_BTHWC: jax.Array, count: int) -> jax.Array:
        """x after the `count` frames before it."""
        before = blank_frames(x_BTHWC, count) if self.is_first else next(self._given)
        x_BTHWC = jnp.concatenate([before, x_BTHWC], axis=1)
        self.keep(x_BTHWC[:, -count:])
        return x_BTHWC

    def keep(self, frames_BTHWC: jax.Array) -> None:
        """Hands frames to the next chunk's call of the same layer."""
        self.kept.append(frames_BTHWC)


def blank_frames(like_BTHWC: jax.Array, count: int) -> jax.Array:
    """`count` frames of zeros."""
    return jnp.zeros((like_BTHWC.shape[0], count, *like_BTHWC.shape[2:]), like_BTHWC.dtype)


class CausalConv(nnx.Module):
    """Convolution over three frames, of which the output's frame is the last, and a window of rows and columns."""

    def __init__(self, in_dim: int, out_dim: int, window: int, dtype: Any, rngs: nnx.Rngs, *, time_stride: int = 1):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (FRAMES, window, window, in_dim, out_dim)))
        self.bias = nnx.Param(jnp.zeros(out_dim))
        self.dtype, self.time_stride = dtype, time_stride

    def __call__(self, x_BTHWC: jax.Array, past: Past) -> jax.Array:
        x_BTHWC = past.prepend(x_BTHWC, FRAMES - self.time_stride)
        y_BTHWC = convolve(x_BTHWC, self.kernel[...].astype(self.dtype), self.time_stride)
        return y_BTHWC + self.bias[...].astype(self.dtype).reshape(1, 1, 1, 1, -1)


def convolve(x_BTHWC: jax.Array, kernel_THWIO: jax.Array, time_stride: int) -> jax.Array:
    """Convolution without padding of frames, and with "same" padding of rows and columns.

    Done as a convolution of images whose channels are those of all frames under the window: the same products and
    sums as a convolution over frames, for which compilers have slower kernels.
    """
    window = len(kernel_THWIO)
    ends = x_BTHWC.shape[1] - window + 1
    x = jnp.concatenate([x_BTHWC[:, k : k + ends : time_stride] for k in range(window)], axis=-1)
    y = lax.conv_general_dilated(
        rearrange(x, "b t h w c -> (b t) h w c"),
        rearrange(kernel_THWIO, "t h w i o -> h w (t i) o"),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return rearrange(y, "(b t) h w c -> b t h w c", b=len(x))


class RMSNorm(nnx.RMSNorm):
    """x / |x| times sqrt(channels) and a scale, float32. The epsilon only keeps zero at zero."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        super().__init__(dim, epsilon=1e-24, dtype=jnp.float32, rngs=rngs)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int, dtype: Any, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(in_dim, rngs), RMSNorm(out_dim, rngs)
        self.conv1 = CausalConv(in_dim, out_dim, 3, dtype, rngs)
        self.conv2 = CausalConv(out_dim, out_dim, 3, dtype, rngs)
        self.shortcut = None if in_dim == out_dim else nnx.Linear(in_dim, out_dim, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x_BTHWC: jax.Array, past: Past) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x_BTHWC)).astype(self.dtype), past)
        y = self.conv2(jax.nn.silu(self.norm2(y)).astype(self.dtype), past)
        return y + (x_BTHWC if self.shortcut is None else self.shortcut(x_BTHWC))


class FrameAttention(nnx.Module):
    """Self-attention with one head over the positions of each frame."""

    def __init__(self, dim: int, dtype: Any, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim, rngs)
        self.qkv = nnx.Linear(dim, 3 * dim, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
        _, t, h, w, _ = x_BTHWC.shape
        qkv = self.qkv(self.norm(x_BTHWC).astype(self.dtype))
        q, k, v = rearrange(qkv, "b t h w (n c) -> n (b t) (h w) 1 c", n=3)
        # A head as wide as the network is more than flash kernels take, and the logits of one frame are small beside
        # the activations of finer levels.
        y = jax.nn.dot_product_attention(q, k, v)
        return x_BTHWC + self.out(rearrange(y, "(b t) (h w) 1 c -> b t h w c", t=t, h=h, w=w))


class Middle(nnx.Module):
    """Residual block, attention, residual block, at the coarsest resolution."""

    def __init__(self, dim: int, dtype: Any, rngs: nnx.Rngs):
        self.before = ResidualBlock(dim, dim, dtype, rngs)
        self.attention = FrameAttention(dim, dtype, rngs)
        self.after = ResidualBlock(dim, dim, dtype, rngs)

    def __call__(self, x_BTHWC: jax.Array, past: Past) -> jax.Array:
        return self.after(self.attention(self.before(x_BTHWC, past)), past)


class DownLevel(nnx.Module):
    """Residual blocks, then a reduction by `factors` of (frames, rows and columns)."""

    def __init__(
        self, in_dim: int, out_dim: int, factors: tuple[int, int], config: VAEConfig, dtype: Any, rngs: nnx.Rngs
    ):
        self.blocks = nnx.List(
            [ResidualBlock(out_dim if i else in_dim, out_dim, dtype, rngs) for i in range(config.blocks)]
        )
        self.resample = None if factors == (1, 1) else Downsample(out_dim, factors[0], dtype, rngs)
        self.out_dim, self.factors, self.has_shortcut = out_dim, factors, config.shortcuts

    def __call__(self, x_BTHWC: jax.Array, past: Past) -> jax.Array:
        y = x_BTHWC
        for block in self.blocks:
            y = block(y, past)
        if self.resample is not None:
            y = self.resample(y, past)
        if not self.has_shortcut:
            return y
        return y + average_down(x_BTHWC, self.out_dim, self.factors)


class UpLevel(nnx.Module):
    """Residual blocks, then an enlargement by `factors` of (frames, rows and columns)."""

    def __init__(
        self, in_dim: int, out_dim: int, factors: tuple[int, int], config: VAEConfig, dtype: Any, rngs: nnx.Rngs
    ):
        self.blocks = nnx.List(
            [ResidualBlock(out_dim if i else in_dim, out_dim, dtype, rngs) for i in range(config.blocks + 1)]
        )
        up_dim = out_dim if config.shortcuts else out_dim // 2
        self.resample = None if factors == (1, 1) else Upsample(out_dim, up_dim, factors[0], dtype, rngs)
        self.out_dim, self.factors = out_dim, factors
        self.has_shortcut = config.shortcuts and factors != (1, 1)

    def __call__(self, x_BTHWC: jax.Array, past: Past) -> jax.Array:
        y = x_BTHWC
        for block in self.blocks:
            y = block(y, past)
        if self.resample is not None:
            y = self.resample(y, past)
        if not self.has_shortcut:
            return y
        # Of the first frame's copies only the last exists.
        return y + repeat_up(x_BTHWC, self.out_dim, self.factors)[:, -y.shape[1] :]


class Downsample(nnx.Module):
    """A strided convolution of each frame, then, if `time_factor` is 2, one over frames; the first stays alone."""

    def __init__(self, dim: int, time_factor: int, dtype: Any, rngs: nnx.Rngs):
        self.conv = nnx.Conv(dim, dim, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)
        self.time_conv = CausalConv(dim, dim, 1, dtype, rngs, time_stride=2) if time_factor == 2 else None

    def __call__(self, x_BTHWC: jax.Array, past: Past) -> jax.Array:
        x_BTHWC = self.conv(x_BTHWC)
        if self.time_conv is None:
            return x_BTHWC
        if past.is_first:
            past.keep(x_BTHWC)
            return x_BTHWC
        return self.time_conv(x_BTHWC, past)


class Upsample(nnx.Module):
    """If `time_factor` is 2, two frames from each but the first; then every pixel four times, and a convolution."""

    def __init__(self, dim: int, out_dim: int, time_factor: int, dtype: Any, rngs: nnx.Rngs):
        self.time_conv = CausalConv(dim, 2 * dim, 1, dtype, rngs) if time_factor == 2 else None
        self.conv = nnx.Conv(dim, out_dim, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x_BTHWC: jax.Array, past: Past) -> jax.Array:
        if self.time_conv is not None and past.is_first:
            past.keep(blank_frames(x_BTHWC, FRAMES - 1))  # to what follows, the first frame is as if it had not been
        elif self.time_conv is not None:
            x_BTHWC = rearrange(self.time_conv(x_BTHWC, past), "b t h w (n c) -> b (t n) h w c", n=2)
        return self.conv(jnp.repeat(jnp.repeat(x_BTHWC, 2, axis=2), 2, axis=3))


def average_down(x_BTHWC: jax.Array, out_dim: int, factors: tuple[int, int]) -> jax.Array:
    """Stacks `factors` of (frames, rows and columns) into channels, and averages these in groups down to `out_dim`."""
    time, space = factors
    x_BTHWC = jnp.concatenate([blank_frames(x_BTHWC, -x_BTHWC.shape[1] % time), x_BTHWC], axis=1)
    x = rearrange(x_BTHWC, "b (t k) (h q) (w r) c -> b t h w (c k q r)", k=time, q=space, r=space)
    return rearrange(x, "b t h w (c g) -> b t h w c g", c=out_dim).mean(-1)


def repeat_up(x_BTHWC: jax.Array, out_dim: int, factors: tuple[int, int]) -> jax.Array:
    """Repeats channels, and unstacks them into `factors` of (frames, rows and columns) and `out_dim` channels."""
    time, space = factors
    x = jnp.repeat(x_BTHWC, out_dim * time * space**2 // x_BTHWC.shape[-1], axis=-1)
    return rearrange(x, "b t h w (c k q r) -> b (t k) (h q) (w r) c", k=time, q=space, r=space)


def run_by_chunks(network: Encoder | Decoder, x_BTHWC: jax.Array, *, frames_in: int, frames_out: int) -> jax.Array:
    """Runs over the first frame, which gives one, then over chunks of `frames_in`, which give `frames_out` each."""
    return _run_by_chunks(*nnx.split(network), x_BTHWC, frames_in, frames_out)


@functools.partial(jax.jit, static_argnames=("graph", "frames_in", "frames_out"))
def _run_by_chunks(graph: Any, state: Any, x_BTHWC: jax.Array, frames_in: int, frames_out: int) -> jax.Array:
    network = nnx.merge(graph, state)
    past = Past()
    first = network.run_chunk(x_BTHWC[:, :1], past)
    chunks = (x_BTHWC.shape[1] - 1) // frames_in
    if not chunks:
        return first

    def step(carry, i):
        kept, out = carry
        past = Past(kept)
        y = network.run_chunk(lax.dynamic_slice_in_dim(x_BTHWC, 1 + i * frames_in, frames_in, axis=1), past)
        return (past.kept, lax.dynamic_update_slice_in_dim(out, y, 1 + i * frames_out, axis=1)), None

    # Results are written into one array that the scan carries, since stacking and joining them would copy the video.
    out = jnp.concatenate([first, blank_frames(first, chunks * frames_out)], axis=1)
    (_, out), _ = lax.scan(step, (past.kept, out), jnp.arange(chunks))
    return out


def run_by_tiles(run: Callable[[jax.Array], jax.Array], x_BTHWC: jax.Array, *, size: int, stride: int) -> jax.Array:
    """Runs over squares of `size` rows and columns, `stride` apart; the overlaps go from one to the next linearly.

    Each tile is blended with the one above, as that was blended, then with the one to the left: diffusers' order.
    Raises ValueError if the tiles would leave gaps.
    """
    if not 0 < stride <= size:
        raise ValueError(f"{stride=} must be from 1 to {size=}: tiles must not leave gaps")
    height, width = x_BTHWC.shape[2:4]
    rows: list[list[jax.Array]] = []
    for top in range(0, height, stride):
        row: list[jax.Array] = []
        for left in range(0, width, stride):
            y = run(x_BTHWC[:, :, top : top + size, left : left + size])
            overlap = (size - stride) * y.shape[2] // min(size, height - top)
            if rows:
                y = _blend(rows[-1][len(row)], y, overlap, axis=2)
            if row:
                y = _blend(row[-1], y, overlap, axis=3)
            row.append(y)
        rows.append(row)
    kept = stride * rows[0][0].shape[2] // min(size, height)
    return jnp.concatenate(
        [jnp.concatenate([tile[:, :, :kept, :kept] for tile in row], axis=3) for row in rows], axis=2
    )


def _blend(before: jax.Array, tile: jax.Array, overlap: int, axis: int) -> jax.Array:
    """The tile, its first `overlap` rows or columns faded in over the last of the tile before it."""
    overlap = min(before.shape[axis], tile.shape[axis], overlap)
    weight = jnp.expand_dims(jnp.arange(overlap) / overlap, [other for other in range(tile.ndim) if other != axis])
    old = lax.slice_in_dim(before, before.shape[axis] - overlap, None, axis=axis)
    new = lax.slice_in_dim(tile, 0, overlap, axis=axis)
    rest = lax.slice_in_dim(tile, overlap, None, axis=axis)
    return jnp.concatenate([old * (1 - weight) + new * weight, rest], axis=axis)


def _factors(config: VAEConfig) -> list[tuple[int, int]]:
    """By how much each level, from the pixels down, divides (frames, rows and columns)."""
    return [(2 if halve else 1, 2) for halve in config.halve_time] + [(1, 1)]


def _channels(values: tuple[float, ...]) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 1, -1)
