"""Scores of a set of samples: distance from real videos, diversity within prompts, throughput.

Scores of two sets may be compared only where `conditions` agree: the network and its clips, the real videos, how many
samples there are, the devices.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rcm_jax import media, metrics
from rcm_jax.config import UserError
from rcm_jax.features import Features
from rcm_jax.sample_sets import Sample, SampleSet, read_latent

RECORD = "scores.json"
NEIGHBOURS = 5  # of a point, that coverage looks at
Encode = Callable[[Sample], Float[np.ndarray, "t h w c"]]


class Scored(NamedTuple):
    """What was measured.

    Attributes:
        scores: of the whole set.
        prompts: scores of each prompt.
        conditions: what must agree for scores to be compared.
        notes: what was left out, and why.
    """

    scores: dict[str, float]
    prompts: dict[str, dict[str, float]]
    conditions: dict[str, Any]
    notes: list[str]


def score_set(
    samples: SampleSet, features: Features | None = None, real: Features | None = None, encode: Encode | None = None
) -> Scored:
    """Scores a set.

    Args:
        samples: the set.
        features: of its videos.
        real: of real videos, by the same network.
        encode: makes the latents; None takes those that lie beside the samples.

    Returns scores:
        n: number of samples.
        frechet, precision, recall, coverage: of the features against the real ones; n_real: number of those.
        feature_diversity: mean distance between features of two samples of a prompt; the mean over prompts.
        latent_diversity: the same for latents, divided by the square root of their size.
        sampling_seconds, decoding_seconds: medians, so that the first sample's compilation does not count.
        frames_per_second: from the caption's embedding to pixels, by these medians.

    Raises:
        UserError: features and real ones are of different networks, or too few, or latents of a prompt differ in shape.
    """
    scored = Scored({"n": len(samples.samples) + len(samples.unknown)}, {}, {}, [])
    if samples.unknown:
        names = ", ".join(path.name for path in samples.unknown[:3])
        scored.notes.append(f"{len(samples.unknown)} files tell no prompt and seed, such as {names}")
    if features is not None:
        _score_features(scored, samples, features, real)
    _score_latents(scored, samples.samples, encode)
    _score_throughput(scored, samples.samples)
    return scored


def write_scores(path: Path, scored: Scored) -> None:
    """Writes what `read_scores` reads, as JSON."""
    media.write_file(path, media.json_text(scored._asdict(), indent=2).encode() + b"\n")


def read_scores(path: Path) -> Scored:
    """Scores that were written. Raises UserError for a file that holds none."""
    try:
        scored = Scored(**json.loads(path.read_text(encoding="utf-8")))
        prompts = {prompt: _plain(scores) for prompt, scores in scored.prompts.items()}
        return Scored(_plain(scored.scores), prompts, dict(scored.conditions), list(map(str, scored.notes)))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} holds no scores ({error}): run launch.evaluate score again") from None


def _plain(scores: Mapping[str, Any]) -> dict[str, int | float]:
    """The scores as numbers: JSON has NaN and infinity only as text."""
    return {name: value if isinstance(value, int) else float(value) for name, value in scores.items()}


def _score_features(scored: Scored, samples: SampleSet, features: Features, real: Features | None) -> None:
    feature_NF = features.feature_NF
    scored.conditions["network"] = dict(features.facts)
    if len(feature_NF) != scored.scores["n"]:
        scored.notes.append(f"features are of {len(feature_NF)} videos, the folder has {scored.scores['n']} samples")
    if features.paths:
        prompts = {str(sample.path.relative_to(samples.folder)): sample.prompt for sample in samples.samples}
        rows = [row for row, path in enumerate(features.paths) if path in prompts]
        spread = metrics.within_prompt_diversity(feature_NF[rows], [prompts[features.paths[row]] for row in rows])
        _add_spread(scored, "feature_diversity", spread)
    if real is None:
        return
    if features.facts and real.facts and features.facts != real.facts:
        raise UserError(
            f"features of {samples.folder} are by {dict(features.facts)}, the real ones by {dict(real.facts)}: compute"
            " both by one network"
        )
    if feature_NF.shape[1] != real.feature_NF.shape[1]:
        raise UserError(
            f"features of {samples.folder} have {feature_NF.shape[1]} numbers, the real ones"
            f" {real.feature_NF.shape[1]}: compute both by one network"
        )
    scored.scores["frechet"] = metrics.frechet_distance(real.feature_NF, feature_NF)
    scored.scores["n_real"] = len(real.feature_NF)
    scored.conditions["n"] = len(feature_NF)
    scored.conditions["real"] = hashlib.sha256(np.ascontiguousarray(real.feature_NF).tobytes()).hexdigest()
    fewest = min(len(feature_NF), len(real.feature_NF))
    if fewest <= NEIGHBOURS:
        scored.notes.append(f"precision, recall and coverage need more than {NEIGHBOURS} videos, there are {fewest}")
    else:
        precision, recall = metrics.precision_recall(real.feature_NF, feature_NF)
        scored.scores.update(precision=precision, recall=recall)
        scored.scores["coverage"] = metrics.coverage(real.feature_NF, feature_NF, k=NEIGHBOURS)
    if fewest <= feature_NF.shape[1]:
        scored.notes.append(
            f"the Fréchet distance is of {fewest} videos and {feature_NF.shape[1]} features: with fewer videos than"
            " features its covariances are singular and its bias is large"
        )


def _score_latents(scored: Scored, samples: Sequence[Sample], encode: Encode | None) -> None:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample)
    groups = {prompt: group for prompt, group in groups.items() if len(group) > 1}
    if encode is None:
        complete = {prompt: group for prompt, group in groups.items() if all(sample.latent for sample in group)}
        if len(complete) < len(groups):
            count = f"{len(groups) - len(complete)} of {len(groups)}"
            scored.notes.append(f"latent diversity leaves out {count} prompts, whose samples have no latents")
        groups = complete
    spread = {prompt: _latent_spread(prompt, group, encode) for prompt, group in groups.items()}
    if spread:
        _add_spread(scored, "latent_diversity", spread)
        scored.conditions["latents"] = "the sampler's" if encode is None else "encoded"


def _latent_spread(prompt: str, group: Sequence[Sample], encode: Encode | None) -> float:
    latents = [_latent(sample) if encode is None else encode(sample) for sample in group]
    shapes = sorted({latent.shape for latent in latents})
    if len(shapes) > 1:
        raise UserError(f"samples of {prompt!r} have latents of shapes {shapes}: give a folder for each")
    latent_ND = np.stack([latent.reshape(-1) for latent in latents])
    return metrics.within_prompt_diversity(latent_ND, [prompt] * len(group))[prompt] / latent_ND.shape[1] ** 0.5


def _latent(sample: Sample) -> np.ndarray:
    assert sample.latent is not None
    return read_latent(sample.latent)[0].astype(np.float32)


def _add_spread(scored: Scored, name: str, spread: Mapping[str, float]) -> None:
    for prompt, value in spread.items():
        scored.prompts.setdefault(prompt, {})[name] = value
    if spread:
        scored.scores[name] = float(np.mean(list(spread.values())))


def _score_throughput(scored: Scored, samples: Sequence[Sample]) -> None:
    timed = [sample.metadata for sample in samples if _tells_seconds(sample.metadata)]
    if not timed:
        return
    kinds = {json.dumps([said.get("device"), said.get("frames"), said.get("size")]) for said in timed}
    if len(kinds) > 1:
        scored.notes.append("samples are from several devices, or of several sizes: seconds are left out")
        return
    seconds = {
        name: float(np.median([said[name] for said in timed])) for name in ("sampling_seconds", "decoding_seconds")
    }
    scored.scores.update(seconds)
    scored.scores["frames_per_second"] = timed[0]["frames"] / sum(seconds.values())
    scored.conditions["device"] = timed[0]["device"]


def _tells_seconds(said: Mapping[str, Any]) -> bool:
    """Whether metadata say how long a sample took. Other programs may mean anything by one of the names."""
    numbers = [said.get(name) for name in ("sampling_seconds", "decoding_seconds", "frames")]
    return "device" in said and all(isinstance(value, int | float) and value > 0 for value in numbers)
