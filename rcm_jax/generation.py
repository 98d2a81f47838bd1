"""Videos from trained networks: captions and seeds in, latents out, batch by batch."""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from rcm_jax import sampling
from rcm_jax.config import MEAN_FLOW, parse_stages
from rcm_jax.methods import guided, mean_velocity
from rcm_jax.models.functional import Network
from rcm_jax.schedule import needs
from rcm_jax.trigflow import rf_velocity

# (params, text_BSD, seeds_B) -> latents (B, T, H, W, C)
Sampler = Callable[[Any, jax.Array, jax.Array], jax.Array]


def student_sampler(
    config: ConfigDict, network: Network, latent_shape: tuple[int, ...], *, steps: int, kind: sampling.Kind = "sde"
) -> Sampler:
    """The distilled sampler at the config's times; MeanFlow has one of its own and takes no `kind`.

    Raises UserError for a number of steps that the times do not allow.
    """
    times = sampling.few_step_times(steps, sigma_max=config.sampling.sigma_max, mid_times=config.sampling.mid_times)

    def sample(params: Any, text_BSD: jax.Array, seeds_B: jax.Array) -> jax.Array:
        velocity = rf_velocity(lambda x, time: network.apply(params, x, time, text_BSD))
        return sampling.few_step(velocity, seeds_B, latent_shape, times.tolist(), kind=kind)

    def jump(params: Any, text_BSD: jax.Array, seeds_B: jax.Array) -> jax.Array:
        velocity = mean_velocity(network.apply, params, text_BSD)
        return sampling.mean_flow(velocity, seeds_B, latent_shape, times.tolist())

    return jax.jit(jump if needs(parse_stages(config.stages), *MEAN_FLOW) else sample)


def teacher_sampler(
    config: ConfigDict,
    network: Network,
    latent_shape: tuple[int, ...],
    negative: jax.Array,
    *,
    steps: int | None = None,
    method: Literal["euler", "unipc"] = "euler",
) -> Sampler:
    """Euler's method or UniPC with guidance, as the config's sampling and teacher say."""
    integrate, choose_times = {
        "euler": (sampling.euler, sampling.euler_times),
        "unipc": (sampling.unipc, sampling.unipc_times),
    }[method]
    times = choose_times(steps or config.sampling.teacher_steps, shift=config.sampling.teacher_shift)

    def sample(params: Any, text_BSD: jax.Array, seeds_B: jax.Array) -> jax.Array:
        velocity = guided(network.apply, params, text_BSD, negative, config.teacher.guidance)
        return integrate(rf_velocity(velocity), seeds_B, latent_shape, times.tolist())

    return jax.jit(sample)


class Generated(NamedTuple):
    """Latents in the order of the captions, and the seconds the quickest batch took (compilation left out)."""

    latent_NTHWC: Float[np.ndarray, "n t h w c"]
    seconds_per_batch: float


def generate(
    sample: Sampler,
    params: Any,
    text_NSD: Float[np.ndarray, "n s d"],
    seed_N: Int[np.ndarray, "n"],
    *,
    batch_size: int,
    label: str,
) -> Generated:
    """Samples every (caption, seed), `batch_size` at a time, under a progress bar named `label`.

    A video depends on its caption and seed alone: the last batch is filled up with copies of its last row.
    """
    count = len(text_NSD)
    compiled = sample.lower(params, text_NSD[:1].repeat(batch_size, 0), seed_N[:1].repeat(batch_size)).compile()
    parts, seconds = [], []
    for first in tqdm(range(0, count, batch_size), label, disable=None):
        rows = np.minimum(np.arange(first, first + batch_size), count - 1)
        start = time.perf_counter()
        parts.append(np.asarray(compiled(params, text_NSD[rows], seed_N[rows])))
        seconds.append(time.perf_counter() - start)
    return Generated(np.concatenate(parts)[:count], min(seconds))
