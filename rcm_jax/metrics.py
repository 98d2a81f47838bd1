"""Scores of generated videos, in a classifier's feature space. Float64 NumPy.

Scores of two samplers may be compared only at the same number of videos and the same real videos: the Fréchet
distance falls, and precision, recall and coverage move, as either number grows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8

from rcm_jax.config import UserError
from rcm_jax.data import digits
from rcm_jax.models.classifier import Classifier


class Judged(NamedTuple):
    """The classifier's word on n videos: features, the digit and the number of the direction in digits.DIRECTIONS."""

    feature_NF: Float[np.ndarray, "n f"]
    digit_N: Int[np.ndarray, "n"]
    direction_N: Int[np.ndarray, "n"]


def judge(classifier: Classifier, video_NTHWC: UInt8[np.ndarray, "n t h w 1"], *, batch_size: int = 250) -> Judged:
    """Runs the classifier over videos of pixels 0 to 255."""
    parts = []
    for start in range(0, len(video_NTHWC), batch_size):
        video_BTHWC = video_NTHWC[start : start + batch_size]
        # Blank videos fill the last batch: one shape compiles once.
        blank = [(0, batch_size - len(video_BTHWC))] + [(0, 0)] * 4
        said = _judge_batch(classifier, np.pad(video_BTHWC, blank))
        parts.append([np.asarray(array)[: len(video_BTHWC)] for array in said])
    feature_NF, digit_N, direction_N = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Judged(feature_NF, digit_N, direction_N)


@nnx.jit
def _judge_batch(classifier, video_BTHWC):
    said = classifier(video_BTHWC.astype(jnp.float32) / 255)
    return said.feature_BF, said.digit_BK.argmax(-1), said.direction_BK.argmax(-1)


def score(fake: Judged, prompts: Sequence[str], real: Judged, real_prompts: Sequence[str]) -> dict[str, float]:
    """Scores generated videos against their prompts and against real videos.

    Returns:
        digit_accuracy, direction_accuracy, caption_accuracy (both right): shares of the videos, 0 to 1.
        frechet: distance of Gaussians fitted to the features, 0 is best.
        precision, recall, coverage: 0 to 1.
        diversity: how far apart videos of one prompt lie, relative to real videos of that prompt; 1 is as varied as
            real ones. The mean over prompts with two videos or more, fake and real; left out if there are none.
        n: number of generated videos.

    Raises:
        UserError: a prompt is not a caption, or the counts of videos and prompts differ.
    """
    asked = np.array([_parse(prompt) for prompt in prompts])
    if len(asked) != len(fake.digit_N):
        raise UserError(f"{len(asked)} prompts for {len(fake.digit_N)} videos: give one prompt a video")
    digit_right = fake.digit_N == asked[:, 0]
    direction_right = fake.direction_N == asked[:, 1]
    precision, recall = precision_recall(real.feature_NF, fake.feature_NF)
    spread = within_prompt_diversity(fake.feature_NF, prompts)
    real_spread = within_prompt_diversity(real.feature_NF, real_prompts)
    ratios = [spread[prompt] / real_spread[prompt] for prompt in spread if prompt in real_spread]
    scores = {
        "caption_accuracy": float((digit_right & direction_right).mean()),
        "digit_accuracy": float(digit_right.mean()),
        "direction_accuracy": float(direction_right.mean()),
        "frechet": frechet_distance(real.feature_NF, fake.feature_NF),
        "precision": precision,
        "recall": recall,
        "coverage": coverage(real.feature_NF, fake.feature_NF),
        "n": len(asked),
    }
    return scores | ({"diversity": float(np.mean(ratios))} if ratios else {})


def frechet_distance(a_NF: Float[np.ndarray, "n f"], b_MF: Float[np.ndarray, "m f"]) -> float:
    """Squared 2-Wasserstein distance of Gaussians fitted to two samples (Heusel et al. 2017, equation 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), covariances over n - 1. Biased upwards, by an amount that falls
    as 1/n: compare only at equal n.

    Raises:
        UserError: a sample has fewer than two points.
    """
    if min(len(a_NF), len(b_MF)) < 2:
        raise UserError(f"a covariance needs two points, got {len(a_NF)} and {len(b_MF)}: score more videos")
    a_FF, b_FF = (np.atleast_2d(np.cov(x, rowvar=False, dtype=np.float64)) for x in (a_NF, b_MF))
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), whose argument is symmetric: no general matrix root is needed.
    value, vector = np.linalg.eigh(a_FF)
    root_FF = (vector * np.sqrt(value.clip(0))) @ vector.T
    cross = np.sqrt(np.linalg.eigvalsh(root_FF @ b_FF @ root_FF).clip(0)).sum()
    shift = a_NF.mean(0, dtype=np.float64) - b_MF.mean(0, dtype=np.float64)
    return float(max(0.0, shift @ shift + np.trace(a_FF) + np.trace(b_FF) - 2 * cross))


def precision_recall(
    real_NF: Float[np.ndarray, "n f"], fake_MF: Float[np.ndarray, "m f"], k: int = 3
) -> tuple[float, float]:
    """Precision: share of fakes within a real point's ball. Recall: share of reals within a fake point's ball.

    A point's ball reaches to its k-th nearest neighbour in its own sample (Kynkäänniemi et al. 2019, equations 1, 2).

    Raises:
        UserError: a sample has no more than k points.
    """
    distance_NM = _distances(real_NF, fake_MF)
    in_real_ball_NM = distance_NM <= _radii(real_NF, k)[:, None]
    in_fake_ball_NM = distance_NM <= _radii(fake_MF, k)[None, :]
    return float(in_real_ball_NM.any(0).mean()), float(in_fake_ball_NM.any(1).mean())


def coverage(real_NF: Float[np.ndarray, "n f"], fake_MF: Float[np.ndarray, "m f"], k: int = 5) -> float:
    """Share of real points whose ball, to the k-th nearest real neighbour, holds a fake (Naeem et al. 2020, eq. 9).

    Raises:
        UserError: there are no more than k real points.
    """
    return float((_distances(real_NF, fake_MF).min(1) <= _radii(real_NF, k)).mean())


def within_prompt_diversity(feature_NF: Float[np.ndarray, "n f"], prompts: Sequence[str]) -> dict[str, float]:
    """Mean distance between two videos of one prompt, for each prompt that has two or more.

    Raises:
        UserError: the counts of videos and prompts differ.
    """
    if len(prompts) != len(feature_NF):
        raise UserError(f"{len(prompts)} prompts for {len(feature_NF)} videos: give one prompt a video")
    label_N = np.asarray(prompts)
    spread = {}
    for prompt in dict.fromkeys(prompts):
        feature_BF = feature_NF[label_N == prompt]
        if (count := len(feature_BF)) > 1:
            spread[prompt] = float(_distances(feature_BF, feature_BF).sum() / (count * (count - 1)))
    return spread


def high_frequency_energy(video_NTHWC: UInt8[np.ndarray, "n t h w 1"]) -> float:
    """Mean square of what frames, pixels in [0, 1], hold beyond a quarter of a cycle a pixel, half of what they can.

    Blur lowers it, noise raises it: relative to real videos it says how sharp generated ones are.
    """
    _, _, height, width, _ = video_NTHWC.shape
    fast_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]) > 0.25
    total = 0.0
    for video_THWC in video_NTHWC:
        spectrum_THW = np.fft.fft2(video_THWC[..., 0] / 255, norm="ortho")
        total += float((np.abs(spectrum_THW[:, fast_HW]) ** 2).sum())
    return total / video_NTHWC.size


def stroke_error(video_NTHWC: UInt8[np.ndarray, "n t h w 1"], direction_N: Int[np.ndarray, "n"]) -> float:
    """How much strokes change from frame to frame, relative to their ink, once each video's motion is taken back.

    `direction_N` are the videos' directions, as in Judged. A digit that keeps its shape gives 0.
    """
    changed = ink = 0
    for video_THWC, (dy, dx) in zip(video_NTHWC, np.array(tuple(digits.DIRECTIONS.values()))[direction_N], strict=True):
        video_THWC = video_THWC.astype(int)
        changed += np.abs(video_THWC[1:] - np.roll(video_THWC[:-1], (dy, dx), axis=(1, 2))).sum()
        ink += video_THWC[1:].sum()
    return float(changed / max(ink, 1))


def _distances(a_NF: Float[np.ndarray, "n f"], b_MF: Float[np.ndarray, "m f"]) -> Float[np.ndarray, "n m"]:
    a_NF, b_MF = a_NF.astype(np.float64), b_MF.astype(np.float64)
    squared_NM = (a_NF**2).sum(1)[:, None] + (b_MF**2).sum(1)[None, :] - 2 * a_NF @ b_MF.T
    return np.sqrt(squared_NM.clip(0))


def _radii(x_NF: Float[np.ndarray, "n f"], k: int) -> Float[np.ndarray, "n"]:
    """Distance of each point to its k-th nearest other point."""
    if len(x_NF) <= k:
        raise UserError(f"{len(x_NF)} points have no {k}-th neighbour: score more than {k} videos")
    distance_NN = _distances(x_NF, x_NF)
    np.fill_diagonal(distance_NN, 0)  # Itself, exactly: place 0 in sorted order.
    return np.partition(distance_NN, k, axis=1)[:, k]


def _parse(prompt: str) -> tuple[int, int]:
    digit, direction = digits.parse_caption(prompt)
    return digit, tuple(digits.DIRECTIONS).index(direction)
