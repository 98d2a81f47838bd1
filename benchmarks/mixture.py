"""A mixture of Gaussians with captions whose velocity is exact, and scores that know where its modes lie.

25 modes on a grid of 5 x 5 in a plane, which is rotated into D dimensions. Each of five captions has five modes of
unequal weights, no two of them in one row or column of the grid.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from rcm_jax import metrics, sampling
from rcm_jax.methods import guided
from rcm_jax.trigflow import NET_TIME_SCALE, rf_velocity

CAPTIONS = 5
SPACING, STD = 2.0, 0.2  # of the grid and of every mode
WEIGHTS = np.array([0.35, 0.25, 0.2, 0.12, 0.08])  # of a caption's modes
TEACHER_STEPS = 400
PROJECTIONS = 128
NEIGHBOURS_OF = 2000  # points of which neighbours are looked for


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Means, weights that sum to 1, and captions of the 25 modes."""

    mean_KD: Float[np.ndarray, "k d"]
    weight_K: Float[np.ndarray, "k"]
    caption_K: Int[np.ndarray, "k"]

    @property
    def dim(self) -> int:
        return self.mean_KD.shape[1]

    def sample(self, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Latents (N, 1, 1, 1, D) and captions (N, 1, 5), one-hot."""
        choose, spread = jax.random.split(key)
        mode_N = jax.random.choice(choose, len(self.weight_K), (count,), p=jnp.asarray(self.weight_K))
        x_ND = jnp.asarray(self.mean_KD)[mode_N] + STD * jax.random.normal(spread, (count, self.dim))
        return x_ND[:, None, None, None], jax.nn.one_hot(jnp.asarray(self.caption_K)[mode_N], CAPTIONS)[:, None]

    def velocity(
        self, params: dict, x_BTHWC: jax.Array, time_B: jax.Array, text_BSD: jax.Array, *, mode: str = "reverse"
    ) -> jax.Array:
        """The exact RF velocity E[noise - x0 | x, caption], called as a network's apply; caption 0 stands for any."""
        del params, mode
        x_BD, s_B1 = x_BTHWC[:, 0, 0, 0], (time_B / NET_TIME_SCALE)[:, None]
        has_mode_BK = text_BSD[:, 0] @ jax.nn.one_hot(jnp.asarray(self.caption_K), CAPTIONS).T
        allowed_BK = jnp.where(text_BSD[:, 0].any(axis=1, keepdims=True), has_mode_BK, 1.0)
        mean_KD = jnp.asarray(self.mean_KD)
        variance_B1 = ((1 - s_B1) * STD) ** 2 + s_B1**2
        offset_BKD = x_BD[:, None] - (1 - s_B1)[..., None] * mean_KD[None]
        log_BK = jnp.log(jnp.asarray(self.weight_K)[None] * allowed_BK) - (offset_BKD**2).sum(-1) / (2 * variance_B1)
        share_BK = jax.nn.softmax(log_BK)
        rate_B1 = (s_B1 - (1 - s_B1) * STD**2) / variance_B1
        v_BD = rate_B1 * jnp.einsum("bk,bkd->bd", share_BK, offset_BKD) - share_BK @ mean_KD
        return v_BD[:, None, None, None]


def create_mixture(dim: int) -> Mixture:
    """The mixture in `dim` dimensions; its plane lies at random, the same for every seed of a run."""
    random = np.random.default_rng(dim)
    plane_2D = np.linalg.qr(random.standard_normal((dim, 2)))[0].T
    row_K, column_K = np.divmod(np.arange(CAPTIONS**2), CAPTIONS)
    grid_K2 = SPACING * (np.stack([row_K, column_K], axis=1) - (CAPTIONS - 1) / 2)
    caption_K = (row_K + 2 * column_K) % CAPTIONS
    weight_K = np.empty(CAPTIONS**2)
    for caption in range(CAPTIONS):
        weight_K[caption_K == caption] = random.permutation(WEIGHTS) / CAPTIONS
    return Mixture((grid_K2 @ plane_2D).astype(np.float32), weight_K.astype(np.float32), caption_K)


def sample_teacher(mixture: Mixture, text_NSD: jax.Array, guidance: float, *, first_seed: int = 0) -> np.ndarray:
    """Samples (N, D) of the guided flow of the exact velocity by Euler's method, with seeds from `first_seed` on."""
    negative, seeds = jnp.zeros(text_NSD.shape[1:]), first_seed + jnp.arange(len(text_NSD))
    velocity = rf_velocity(guided(mixture.velocity, {}, text_NSD, negative, guidance))
    times = sampling.euler_times(TEACHER_STEPS, shift=1.0).tolist()
    x = jax.jit(lambda seeds: sampling.euler(velocity, seeds, (1, 1, 1, mixture.dim), times))(seeds)
    return np.asarray(x)[:, 0, 0, 0]


def score(
    mixture: Mixture,
    x_ND: Float[np.ndarray, "n d"],
    caption_N: Int[np.ndarray, "n"],
    reference_ND: Float[np.ndarray, "n d"],
) -> dict[str, float]:
    """Scores samples against as many of the reference, for the same captions in the same order.

    precision: share within the radius that holds 99.9 % of a mode, of a mode of the caption. recall: share of the
    reference within reach of the samples (metrics.precision_recall). spread: standard deviation inside modes over the
    true one, 0 where no mode has more than ten samples. weights_tv: total variation between the modes' weights and the
    reference's. wasserstein: sliced, order 1.
    """
    distance_NK = np.linalg.norm(x_ND[:, None] - mixture.mean_KD[None], axis=-1)
    own_NK = caption_N[:, None] == mixture.caption_K[None]
    mode_N = np.where(own_NK, distance_NK, np.inf).argmin(axis=1)
    radius = STD * np.sqrt(scipy.stats.chi2.ppf(0.999, mixture.dim))
    precise_N = distance_NK[np.arange(len(x_ND)), mode_N] <= radius
    inside = [x_ND[precise_N & (mode_N == mode)] for mode in range(len(mixture.weight_K))]
    variances = [points.var(axis=0).mean() for points in inside if len(points) > 10]
    off_K = _weights(mixture, x_ND, own_NK) - _weights(mixture, reference_ND, own_NK)
    return {
        "precision": float(precise_N.mean()),
        "recall": metrics.precision_recall(reference_ND[:NEIGHBOURS_OF], x_ND[:NEIGHBOURS_OF])[1],
        "spread": float(np.sqrt(np.mean(variances)) / STD) if variances else 0.0,
        "weights_tv": float(np.abs(off_K).sum() / 2),
        "wasserstein": sliced_wasserstein(x_ND, reference_ND),
    }


def _weights(mixture: Mixture, x_ND: np.ndarray, own_NK: np.ndarray) -> np.ndarray:
    """Share of the samples whose nearest mode, among those of their caption, is each of the modes."""
    distance_NK = np.linalg.norm(x_ND[:, None] - mixture.mean_KD[None], axis=-1)
    return np.bincount(np.where(own_NK, distance_NK, np.inf).argmin(axis=1), minlength=own_NK.shape[1]) / len(x_ND)


def sliced_wasserstein(x_ND: Float[np.ndarray, "n d"], y_ND: Float[np.ndarray, "n d"]) -> float:
    """Mean over fixed random directions of the Wasserstein-1 distance of the projections of two samples of one size."""
    directions_DP = np.random.default_rng(0).standard_normal((x_ND.shape[1], PROJECTIONS))
    directions_DP /= np.linalg.norm(directions_DP, axis=0)
    return float(np.abs(np.sort(x_ND @ directions_DP, axis=0) - np.sort(y_ND @ directions_DP, axis=0)).mean())
