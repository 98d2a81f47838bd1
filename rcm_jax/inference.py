"""Samples of the published models, stage by stage: captions and given frames are encoded, a latent sampled, decoded.

Each stage takes its network's parameters as an argument, so that one network at a time need be in a device's memory.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from rcm_jax import sampling
from rcm_jax.checkpoint import load_safetensors
from rcm_jax.config import UserError
from rcm_jax.convert.loading import Autoencoder, Loadable, Params, Transformer
from rcm_jax.data.tokenizer import Tokens
from rcm_jax.methods import guided
from rcm_jax.models import clip
from rcm_jax.models.functional import Network
from rcm_jax.models.presets import Config
from rcm_jax.models.vae import Tiling
from rcm_jax.models.wan import WanConfig
from rcm_jax.published import SamplerName
from rcm_jax.sharding import place_params
from rcm_jax.trigflow import NET_TIME_SCALE, Velocity, rf_velocity

COSMOS_GIVEN_TIME = 1e-4  # RF time that Cosmos-Predict2 is told for the frames it is given


class Parts(NamedTuple):
    """The opened networks of a model, and what is to be encoded.

    `tokens` are those of the captions, and of the negative one after them if it is needed and not in `embedded`, which
    holds embeddings that were made before: "text" (N, S, D) and "negative" (S, D).
    """

    transformer: Transformer
    autoencoder: Autoencoder
    text_encoder: Loadable | None = None
    image_encoder: Loadable | None = None
    tokens: Tokens | None = None
    embedded: Mapping[str, np.ndarray] = MappingProxyType({})


class Texts(NamedTuple):
    """Embeddings of captions and of the negative caption."""

    text_NSD: Float[np.ndarray, "n s d"]
    negative_SD: Float[np.ndarray, "s d"]


class Condition(NamedTuple):
    """What given frames tell a network, for a batch of one; all None without any.

    Attributes:
        channels_BTHWC: concatenated to the latent: a mask of the given frames and, in Wan I2V, the latent of the video
            whose other frames are gray.
        tokens_BND: CLIP features of the first one.
        given_BTHWC: latent frames that take the place of the sample's first ones.
        given_time: RF time that the network is told for them.
    """

    channels_BTHWC: Float[Array, "1 t h w m"] | None = None
    tokens_BND: Float[Array, "1 n i"] | None = None
    given_BTHWC: Float[Array, "1 g h w c"] | None = None
    given_time: float = 0.0


class Settings(NamedTuple):
    """How a latent is sampled; published.Published tells what the settings mean.

    `shift` is None for the times of Cosmos-Predict2; `guidance` has a strength for each network.
    """

    sampler: SamplerName
    steps: int
    guidance: tuple[float, ...]
    shift: float | None = None
    sigma_max: float = 80.0
    mid_times: tuple[float, ...] = sampling.MID_TIMES


@contextmanager
def on_device(loadable: Loadable) -> Iterator[Params]:
    """The network's parameters on its device, where what is computed meanwhile runs, freed at the end."""
    with jax.default_device(loadable.device):
        params = jax.device_put(loadable.load())
        try:
            yield params
        finally:
            jax.tree.map(lambda leaf: leaf.delete(), params)


def read_embeddings(path: Path, config: Config) -> dict[str, np.ndarray]:
    """Embeddings from a safetensors file: "text", (S, D) or (N, S, D), and if it is there "negative", (S, D).

    Raises UserError if they do not fit the network.
    """
    tensors, _ = load_safetensors(path)
    shape = (config.text_length, config.text_dim)
    axes = {"text": (2, 3), "negative": (2,)}
    faults = [name for name, a in tensors.items() if a.ndim not in axes.get(name, ()) or a.shape[-2:] != shape]
    if "text" not in tensors or faults:
        found = ", ".join(f"{name} {tensor.shape}" for name, tensor in tensors.items())
        raise UserError(f"{path} holds {found}: it must hold `text`, and may hold `negative`, each of shape {shape}")
    embedded = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    return embedded | {"text": embedded["text"].reshape(-1, *shape)}


def embed(text_encoder: Loadable, tokens: Tokens) -> Float[np.ndarray, "n s d"]:
    """Embeddings of captions, encoded one at a time."""
    apply = jax.jit(text_encoder.network.apply)
    with on_device(text_encoder) as params:
        bar = tqdm(list(zip(*tokens, strict=True)), "captions", leave=False, disable=None)
        return np.stack([np.asarray(apply(params, ids_S[None], mask_S[None])[0]) for ids_S, mask_S in bar])


def encode_texts(parts: Parts, count: int) -> Texts:
    """Embeddings of the `count` captions, encoded one at a time, or those that were made before."""
    encoded = np.empty((0, 0, 0))
    if parts.text_encoder is not None and parts.tokens is not None:
        encoded = embed(parts.text_encoder, parts.tokens)
    text_NSD = parts.embedded["text"] if "text" in parts.embedded else encoded[:count]
    # Without guidance there is no negative caption, and what stands for it is not read.
    negative_SD = encoded[-1] if len(encoded) > count else parts.embedded.get("negative", text_NSD[0])
    return Texts(text_NSD, negative_SD)


def encode_given(
    parts: Parts, whole_THWC: UInt8[np.ndarray, "g y x 3"], given_THWC: UInt8[np.ndarray, "g h w 3"], frames: int
) -> Condition:
    """What a network is told of the first frames of a video: one, or as many as make whole latent frames.

    Cosmos-Predict2 is told of several as NVIDIA's video2world.py and diffusers' Cosmos2VideoToWorldPipeline tell it.

    Args:
        parts: the model.
        whole_THWC: the given frames, of which the image encoder sees the first.
        given_THWC: what the autoencoder sees of them, of the size of the video.
        frames: of the video.
    """
    config, encoder = parts.transformer.config, parts.autoencoder.encoder
    video_BTHWC = _floats(given_THWC)
    # Wan's image-to-video networks take the latent of a whole video, gray after its first frame; others that of what
    # is given. The autoencoder is causal: what would follow has no part in it.
    is_whole = isinstance(config, WanConfig) and config.in_channels > config.out_channels
    if is_whole:
        gray = np.zeros((1, frames - 1, *given_THWC.shape[1:]), np.float32)
        video_BTHWC = np.concatenate([video_BTHWC, gray], axis=1)
    with on_device(encoder) as params:
        latent_BTHWC = jax.jit(encoder.network.apply)(params, video_BTHWC)
    if is_whole:
        channels_BTHWC = jnp.concatenate([_first_frames(1, latent_BTHWC.shape, 4), latent_BTHWC], axis=-1)
        return Condition(channels_BTHWC, _encode_tokens(parts.image_encoder, whole_THWC[0]))
    if isinstance(config, WanConfig):
        return Condition(given_BTHWC=latent_BTHWC)
    _, rows, columns, _ = given_THWC.shape
    shape = parts.autoencoder.config.latent_shape((frames, rows, columns))
    mask_BTHW1 = _first_frames(latent_BTHWC.shape[1], (1, *shape), 1)
    return Condition(mask_BTHW1, given_BTHWC=latent_BTHWC, given_time=COSMOS_GIVEN_TIME)


def _encode_tokens(encoder: Loadable | None, image_HWC: np.ndarray) -> jax.Array | None:
    if encoder is None:
        return None
    with on_device(encoder) as params:
        return jax.jit(encoder.network.apply)(params, clip.preprocess(jnp.asarray(_floats(image_HWC)))).tokens_BLD


def _floats(pixels: np.ndarray) -> np.ndarray:
    """A batch of one image or video in [-1, 1]."""
    return pixels[None].astype(np.float32) / 127.5 - 1.0


def _first_frames(count: int, shape_BTHWC: tuple[int, ...], channels: int) -> jax.Array:
    """1 in the first `count` frames, 0 in the others."""
    return jnp.zeros((*shape_BTHWC[:-1], channels)).at[:, :count].set(1.0)


def conditioned(apply: Callable[..., jax.Array], condition: Condition) -> Callable[..., jax.Array]:
    """A network that is told of given frames, as a function of (params, x_BTHWC, network time (B,), text_BSD)."""

    def run(params: Params, x_BTHWC: jax.Array, time_B: jax.Array, text_BSD: jax.Array) -> jax.Array:
        given, time = condition.given_BTHWC, time_B
        if given is not None:
            is_given_T = jnp.arange(x_BTHWC.shape[1]) < given.shape[1]
            time = jnp.where(is_given_T[None], NET_TIME_SCALE * condition.given_time, time_B[:, None])
            x_BTHWC = put_given(x_BTHWC, given)
        extra = {"condition_BTHWC": condition.channels_BTHWC, "image_BND": condition.tokens_BND}
        extra = {name: jnp.repeat(a, len(x_BTHWC), axis=0) for name, a in extra.items() if a is not None}
        return apply(params, x_BTHWC, time, text_BSD, **extra)

    return run


def put_given(x_BTHWC: jax.Array, given_BTHWC: jax.Array) -> jax.Array:
    """x with the given frames in the place of its first ones."""
    given_BTHWC = jnp.broadcast_to(given_BTHWC, (len(x_BTHWC), *given_BTHWC.shape[1:])).astype(x_BTHWC.dtype)
    return jnp.concatenate([given_BTHWC, x_BTHWC[:, given_BTHWC.shape[1] :]], axis=1)


def sample_times(settings: Settings) -> list[float]:
    """The RF times of the steps and 0. Raises UserError for a number of steps that a distilled model does not take."""
    steps, shift = settings.steps, settings.shift
    if settings.sampler.startswith("few-step"):
        times = sampling.few_step_times(steps, sigma_max=settings.sigma_max, mid_times=settings.mid_times)
    elif shift is None:
        times = sampling.karras_times(steps)
    else:
        times = (sampling.unipc_times if settings.sampler == "unipc" else sampling.euler_times)(steps, shift=shift)
    return times.tolist()


def sample_latent(
    velocity: Velocity, seed: int, shape_THWC: tuple[int, ...], settings: Settings
) -> Float[Array, "1 t h w c"]:
    """A latent of one seed. `velocity` is called once a step, outside of any trace, with a time that has a value."""
    seeds_B, times = jnp.array([seed]), sample_times(settings)
    match settings.sampler:
        case "euler":
            return sampling.euler(velocity, seeds_B, shape_THWC, times, loop=_plain_loop)
        case "unipc":
            return sampling.unipc(velocity, seeds_B, shape_THWC, times, loop=_plain_loop)
        case "few-step-ode":
            return sampling.few_step(velocity, seeds_B, shape_THWC, times, kind="ode")
        case "few-step-sde":
            return sampling.few_step(velocity, seeds_B, shape_THWC, times, kind="sde")


def _plain_loop(step: Callable[[Any, Any], Any], carry: Any, rows: Any) -> tuple[Any, None]:
    """lax.scan as a loop of Python: a step may change the network that is in memory."""
    for row in zip(*rows, strict=True) if isinstance(rows, tuple) else rows:
        carry, _ = step(carry, row)
    return carry, None


class Experts:
    """The parameters of a model in the host's memory, of which one network's at a time are on the device."""

    def __init__(self, transformer: Transformer):
        self.boundary, self.mesh = transformer.boundary, transformer.mesh
        self.host = [load() for load in transformer.loads]
        self._current: tuple[int, Params] | None = None

    def index_at(self, s: float) -> int:
        """Which network serves an RF time."""
        return 0 if self.boundary is None or s >= self.boundary else 1

    def on_device(self, index: int) -> Params:
        """The parameters of a network on the default device or the mesh; the other's are freed there first."""
        if self._current is None or self._current[0] != index:
            self.free()
            host, mesh = self.host[index], self.mesh
            self._current = index, jax.device_put(host) if mesh is None else place_params(host, mesh)
        return self._current[1]

    def free(self) -> None:
        """Removes the parameters from the device."""
        if self._current is not None:
            jax.tree.map(lambda leaf: leaf.delete(), self._current[1])
        self._current = None


@functools.partial(jax.jit, static_argnames=("network", "guidance"))
def evaluate(
    network: Network,
    params: Params,
    x_BTHWC: jax.Array,
    s_B: jax.Array,
    text_BSD: jax.Array,
    negative_BSD: jax.Array,
    condition: Condition,
    guidance: float,
) -> jax.Array:
    """The RF velocity of a conditioned network under guidance."""
    velocity = guided(conditioned(network.apply, condition), params, text_BSD, negative_BSD, guidance)
    return rf_velocity(velocity)(x_BTHWC, s_B)


def sample_latents(
    transformer: Transformer,
    texts: Texts,
    rows: Sequence[tuple[int, int]],
    shape_THWC: tuple[int, ...],
    settings: Settings,
    condition: Condition,
) -> list[Float[np.ndarray, "t h w c"]]:
    """A latent of each (number of a text, seed), one after the other: none depends on the others. Shows progress."""
    return list(each_latent(transformer, texts, rows, shape_THWC, settings, condition))


def each_latent(
    transformer: Transformer,
    texts: Texts,
    rows: Sequence[tuple[int, int]],
    shape_THWC: tuple[int, ...],
    settings: Settings,
    condition: Condition,
) -> Iterator[Float[np.ndarray, "t h w c"]]:
    """The latents of `sample_latents`, each as soon as it is there; the network stays on the device until the end."""
    experts = Experts(transformer)
    steps = len(sample_times(settings)) - 1
    try:
        with tqdm(total=len(rows) * steps, desc="sampling", unit="step", disable=None) as bar:
            for number, seed in rows:
                text_BSD, negative_BSD = texts.text_NSD[number][None], texts.negative_SD[None]

                def velocity(
                    x: jax.Array, s_B: jax.Array, text: np.ndarray = text_BSD, negative: np.ndarray = negative_BSD
                ):
                    index = experts.index_at(float(s_B[0]))
                    params, guidance = experts.on_device(index), settings.guidance[index]
                    v = evaluate(transformer.network, params, x, s_B, text, negative, condition, guidance)
                    bar.update()
                    return jax.block_until_ready(v)

                latent_BTHWC = sample_latent(velocity, seed, shape_THWC, settings)
                if condition.given_BTHWC is not None:
                    latent_BTHWC = put_given(latent_BTHWC, condition.given_BTHWC)
                yield np.asarray(latent_BTHWC[0])
    finally:
        experts.free()


@contextmanager
def video_encoder(
    autoencoder: Autoencoder, *, tiled: bool = False
) -> Iterator[Callable[[UInt8[np.ndarray, "f y x 3"]], Float[np.ndarray, "t h w c"]]]:
    """A function from videos to their latents, with the network on the device; `tiled` as models/vae.py says."""
    apply = _in_tiles_or_whole(autoencoder.encoder.network.apply, tiled)
    with on_device(autoencoder.encoder) as params:
        yield lambda video_THWC: np.asarray(apply(params, jnp.asarray(_floats(video_THWC)))[0])


def decode(
    autoencoder: Autoencoder, latents: Sequence[Float[np.ndarray, "t h w c"]], *, tiled: bool = False
) -> Iterator[UInt8[np.ndarray, "f y x 3"]]:
    """Videos of latents, one at a time; `tiled` as models/vae.py says of its tiles."""
    apply = _in_tiles_or_whole(autoencoder.decoder.network.apply, tiled)
    with on_device(autoencoder.decoder) as params:
        for latent_THWC in tqdm(latents, "decoding", unit="video", disable=None):
            video_THWC = apply(params, jnp.asarray(latent_THWC[None]))[0]
            yield np.asarray(jnp.round((video_THWC + 1.0) * 127.5).astype(jnp.uint8))


def _in_tiles_or_whole(apply: Callable[..., jax.Array], tiled: bool) -> Callable[..., jax.Array]:
    return functools.partial(apply, tiling=Tiling()) if tiled else jax.jit(apply)
