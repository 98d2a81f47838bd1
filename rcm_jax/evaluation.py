"""Scores a digits run against its teacher and real videos, and writes what a person looks at."""

import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from rcm_jax import media, metrics, report
from rcm_jax.config import UserError
from rcm_jax.data import digits, pipeline, text
from rcm_jax.generation import Generated, Sampler, generate, student_sampler, teacher_sampler
from rcm_jax.models import classifier
from rcm_jax.models.functional import Network
from rcm_jax.records import read_metrics
from rcm_jax.state import Params

STUDENT_STEPS = (1, 2, 4)
# What the demo promises: points of caption accuracy a student may fall behind the guided teacher.
ACCURACY_LOSS = {1: 0.15, 2: 0.06, 4: 0.03}
FRECHET_RATIO, DIVERSITY_RATIO = 1.3, 0.9
SHOWN = ("a three moving up and left", "an eight moving down", "a five moving right", "a zero moving up")

Scores = dict[str, float]


class Sampled(NamedTuple):
    """uint8 videos of every caption in turn, and seconds the quickest batch took."""

    video_NTHWC: np.ndarray
    seconds_per_batch: float


class Judge(NamedTuple):
    """The classifier of a variant's videos and what it says of the held-out real ones."""

    variant: digits.Variant
    network: classifier.Classifier
    real: metrics.Judged
    real_prompts: list[str]

    def score(self, video_NTHWC: np.ndarray, prompts: list[str]) -> Scores:
        """metrics.score of videos against the held-out real ones."""
        judged = metrics.judge(self.network, video_NTHWC)
        return metrics.score(judged, prompts, self.real, self.real_prompts)


def load_judge(data_dir: str | Path, variant: digits.Variant = digits.DIGITS) -> Judge:
    """The variant's trained classifier over all validation videos."""
    network, _ = classifier.load(variant=variant)
    videos, prompts = read_videos(variant, data_dir, "validation")
    return Judge(variant, network, metrics.judge(network, videos), prompts)


def read_videos(
    variant: digits.Variant, data_dir: str | Path, split: str
) -> tuple[UInt8[np.ndarray, "n t h w 1"], list[str]]:
    """All videos of a split, and their captions."""
    batches = list(pipeline.read_in_order(pipeline.open_source(variant.name, data_dir, split), batch_size=1000))
    latents = np.concatenate([batch["latent"] for batch in batches])
    return digits.latent_to_video(latents, variant), [str(prompt) for batch in batches for prompt in batch["prompt"]]


def real_floor(judge: Judge, data_dir: str | Path, count: int) -> Scores:
    """Scores of `count` real training videos: what a perfect generator would get."""
    return judge.score(*draw_real(judge.variant, data_dir, count))


def draw_real(
    variant: digits.Variant, data_dir: str | Path, count: int, seed: int = 0
) -> tuple[UInt8[np.ndarray, "n t h w 1"], list[str]]:
    """`count` real training videos, as many of each caption, and their captions."""
    source = pipeline.open_source(variant.name, data_dir, "train")
    order = np.random.RandomState(seed).permutation(len(source))
    prompts = np.array(digits.captions())
    chosen, want = [], dict.fromkeys(prompts, count // len(prompts))
    for index in order:
        prompt = str(pipeline.read(source, [index])["prompt"][0])
        if want[prompt] > 0:
            want[prompt] -= 1
            chosen.append(index)
        if len(chosen) == count:
            break
    batch = pipeline.read(source, chosen)
    return digits.latent_to_video(batch["latent"], variant), [str(prompt) for prompt in batch["prompt"]]


def sample_all(
    sampler: Sampler,
    params: Params,
    *,
    per_caption: int,
    label: str,
    batch_size: int = 80,
    variant: digits.Variant = digits.DIGITS,
    first_seed: int = 0,
) -> Sampled:
    """`per_caption` videos of each of the 80 captions, from seed `first_seed` on: the same for every sampler."""
    prompts = evaluation_prompts(per_caption)
    seed_N = first_seed + np.arange(len(prompts))
    generated: Generated = generate(sampler, params, text.encode(prompts), seed_N, batch_size=batch_size, label=label)
    return Sampled(digits.latent_to_video(generated.latent_NTHWC, variant), generated.seconds_per_batch)


def evaluation_prompts(per_caption: int) -> list[str]:
    """Every caption `per_caption` times, one after the other."""
    return [prompt for prompt in digits.captions() for _ in range(per_caption)]


def evaluate(
    config: ConfigDict,
    network: Network,
    teacher: Params,
    student: Params,
    outdir: str | Path,
    *,
    per_caption: int,
    facts: Mapping[str, Any],
    metrics_path: Path | None = None,
) -> dict[str, Any]:
    """Samples teacher and student, scores both, and writes report.json, report.html, grid.png and videos/ to `outdir`.

    `facts` (train_seconds, seeds, command...) are put into both reports. Returns report.json's content. Raises
    UserError for a recipe of other data than the digits.
    """
    if config.data.name not in digits.VARIANTS:
        names = " and ".join(map(repr, digits.VARIANTS))
        raise UserError(f"data.name={config.data.name!r} cannot be scored here: only {names} have a judge")
    variant = digits.VARIANTS[config.data.name]
    outdir, shape = Path(outdir), variant.latent_shape
    judge, prompts = load_judge(config.data.dir, variant), evaluation_prompts(per_caption)
    negative = jax.numpy.asarray(text.encode([""])[0])
    sample = functools.partial(sample_all, per_caption=per_caption, variant=variant)

    teacher_name = f"teacher, {config.sampling.teacher_steps} guided steps"
    sampled = {teacher_name: sample(teacher_sampler(config, network, shape, negative), teacher, label="teacher")}
    for steps in STUDENT_STEPS:
        name = _student_name(steps)
        sampler = student_sampler(config, network, shape, steps=steps)
        sampled[name] = sample(sampler, student, label=name)

    scores = {name: judge.score(each.video_NTHWC, prompts) for name, each in sampled.items()}
    fastest = sampled[_student_name(max(STUDENT_STEPS))].seconds_per_batch
    summary = {
        "scores": {
            "real": real_floor(judge, config.data.dir, len(prompts)),
            "teacher": scores[teacher_name],
            "student": {str(steps): scores[_student_name(steps)] for steps in STUDENT_STEPS},
        },
        "sampling_speedup": sampled[teacher_name].seconds_per_batch / fastest,
        **facts,
    }
    write_samples(outdir, {name: each.video_NTHWC for name, each in sampled.items()}, per_caption)
    write_reports(outdir, summary, teacher_name, list(sampled), metrics_path)
    return summary


def targets(teacher: Scores) -> dict[int, dict[str, tuple[str, float]]]:
    """What each number of student steps should reach, given the teacher's scores."""
    bounds = {
        steps: {"caption_accuracy": (">=", teacher["caption_accuracy"] - loss)} for steps, loss in ACCURACY_LOSS.items()
    }
    bounds[4]["frechet"] = ("<=", FRECHET_RATIO * teacher["frechet"])
    bounds[4]["diversity"] = (">=", DIVERSITY_RATIO * teacher["diversity"])
    return bounds


def write_samples(outdir: Path, videos: Mapping[str, np.ndarray], per_caption: int) -> None:
    """The videos of a few captions as MP4s, and a grid of them with one row a sampler."""
    first = [digits.captions().index(prompt) * per_caption for prompt in SHOWN]
    media.write_grid(outdir / "grid.png", {name: [v[i] for i in first] for name, v in videos.items()}, SHOWN)
    for name, each in videos.items():
        for prompt, index in zip(SHOWN, first, strict=True):
            path = _video_path(outdir, name, prompt)
            path.parent.mkdir(parents=True, exist_ok=True)
            settings = {"prompt": prompt, "seed": index, "sampler": name}
            media.write_video(path, each[index], fps=digits.FPS, scale=8, metadata=settings)


def write_reports(
    outdir: Path, summary: dict[str, Any], teacher_name: str, samplers: list[str], metrics_path: Path | None
) -> None:
    """report.json and report.html."""
    scores = summary["scores"]
    student = {_student_name(int(steps)): value for steps, value in scores["student"].items()}
    bounds = {_student_name(steps): bound for steps, bound in targets(scores["teacher"]).items()}
    facts = {name: value for name, value in summary.items() if name != "scores"}
    curves = read_metrics(metrics_path) if metrics_path is not None else {}
    report.write_report(
        outdir / "report.html",
        title="Moving digits: a few-step student beside its teacher",
        facts=facts | {"python": platform.python_version(), "jax": jax.__version__},
        scores={"real videos": scores["real"], teacher_name: scores["teacher"], **student},
        targets=bounds,
        curves={name: curve for name, curve in curves.items() if name.startswith(("loss", "grad_norm"))},
        videos={name: [(prompt, _video_path(outdir, name, prompt)) for prompt in SHOWN] for name in samplers},
        grid_png=outdir / "grid.png",
    )
    media.write_file(outdir / "report.json", media.json_text(summary, indent=2).encode() + b"\n")


def training_facts(metrics_path: Path) -> dict[str, float]:
    """train_seconds, if a run's log tells it: what its steps took, over all its starts.

    Compilation is included, sampling and saving are left out.
    """
    curves = read_metrics(metrics_path) if metrics_path.exists() else {}
    if "seconds_per_step" not in curves:
        return {}
    iterations, seconds = curves["seconds_per_step"]
    return {"train_seconds": float(np.dot(np.diff([0, *iterations]), seconds))}


def _student_name(steps: int) -> str:
    return f"student, {steps} step{'s' if steps > 1 else ''}"


def _video_path(outdir: Path, sampler: str, prompt: str) -> Path:
    return outdir / "videos" / f"{sampler} - {prompt}.mp4".replace(",", "").replace(" ", "_")
