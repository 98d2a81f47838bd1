"""The recipes of moving digits that distil the shipped teacher, over seeds: trained and scored as they are.

    python -m benchmarks.digits_methods --out=benchmarks/results/digits_methods.json --workdir=runs/digits_methods \
        --figure=docs/digits_scm.png

rCM, sCM alone and DMD alone, which have the same learning rate and batch and about the same network evaluations: half
an hour on two CPU cores for three seeds. `--methods` names others. What is done already is not done again. Prints a
Markdown table of means and, behind each, half the spread between the least and the greatest seed. The figure is sCM's
loss in each run.
"""

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.arena import Curve, thin
from benchmarks.chart import Points, curve_points, draw_lines
from launch import keep_compilations
from rcm_jax import evaluation, media
from rcm_jax.config import load
from rcm_jax.data import digits, text
from rcm_jax.generation import student_sampler, teacher_sampler
from rcm_jax.train import create_network, load_params, train

COMPARED = {"rCM": "digits_rcm", "sCM alone": "digits_scm", "DMD alone": "digits_dmd"}
METHODS = COMPARED | {
    "dCM": "digits_dcm",
    "staged": "digits_staged",
    "LoRA": "digits_lora",
    "DMD2": "digits_dmd2",
    "MeanFlow": "digits_mean_flow",
}
CONFIGS = Path(__file__).parent.parent / "configs"
SHAPE = digits.DIGITS.latent_shape
WINDOWS, LOWEST = 20, 0.98  # points of a curve; where the figure's losses begin
COLUMNS = ("caption_accuracy", "frechet", "precision", "recall", "coverage", "diversity")


def main() -> None:
    """Trains and scores every method with every seed, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all scores")
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="where the runs are kept")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--per_caption", type=int, default=8, metavar="N", help="videos of each of the 80 captions")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED), help="which to run")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="a PNG of sCM's loss, alone and within rCM")
    arguments = parser.parse_args()
    keep_compilations()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}
    results["machine"] = {"cpu": platform.machine(), "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    results["command"] = shlex.join(["python", "-m", "benchmarks.digits_methods", *sys.argv[1:]])
    judge = evaluation.load_judge("data")
    if "teacher" not in results:
        results["real"] = evaluation.real_floor(judge, "data", 80 * arguments.per_caption)
        results["teacher"] = _score_teacher(judge, arguments.per_caption)
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            run = f"{method}, seed {seed}"
            if run not in results["runs"]:
                results["runs"][run] = _train_and_score(judge, METHODS[method], seed, arguments)
                media.write_file(arguments.out, media.json_text(results, indent=1).encode())
    print(table(results))
    if arguments.figure:
        media.write_file(arguments.figure, draw_figure(results))


def _score_teacher(judge: evaluation.Judge, per_caption: int) -> dict[str, Any]:
    config = load(CONFIGS / "digits_rcm.py")
    network = create_network(config)
    sampler = teacher_sampler(config, network, SHAPE, text.encode([""])[0])
    params = load_params(config.teacher.path, network)
    sampled = evaluation.sample_all(sampler, params, per_caption=per_caption, label="teacher")
    scores = judge.score(sampled.video_NTHWC, evaluation.evaluation_prompts(per_caption))
    return scores | {"seconds_per_batch": sampled.seconds_per_batch}


def _train_and_score(judge: evaluation.Judge, name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    config = load(CONFIGS / f"{name}.py", [f"seed={seed}", "log.sample_every=0"])
    workdir = arguments.workdir / f"{name}_{seed}"
    train(config, workdir)
    network = create_network(config)
    params = load_params(workdir / "ema.safetensors", network)
    prompts, scores = evaluation.evaluation_prompts(arguments.per_caption), {}
    for steps in evaluation.STUDENT_STEPS:
        sampler = student_sampler(config, network, SHAPE, steps=steps)
        sampled = evaluation.sample_all(sampler, params, per_caption=arguments.per_caption, label=f"{name}, {steps}")
        scores[str(steps)] = judge.score(sampled.video_NTHWC, prompts) | {
            "seconds_per_batch": sampled.seconds_per_batch
        }
    metrics = workdir / "metrics.jsonl"
    return {**evaluation.training_facts(metrics), "curve": read_curve(metrics), "student": scores}


def read_curve(path: Path) -> Curve:
    """The losses of metrics.jsonl and the gradient's norm, in WINDOWS equal parts of a run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return thin([{k: v for k, v in line.items() if k.startswith(("loss_", "grad_norm"))} for line in lines], WINDOWS)


def draw_figure(results: dict[str, Any]) -> bytes:
    """sCM's loss against the share of a run that is over, a line a seed."""
    panels: dict[str, dict[str, Points]] = {}
    for method in ("sCM alone", "rCM"):
        lines = panels.setdefault(f"sCM's loss, {method}", {})
        for name, run in results["runs"].items():
            if name.startswith(f"{method},"):
                lines[name] = curve_points(run["curve"]["loss_scm"])
    return draw_lines(panels, x_label="share of the run", y_label="loss", lowest_x=0.0, lowest=LOWEST)


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a results file."""
    lines = ["| | steps | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in ("real", "teacher"):
        cells = [f"{results[name][column]:.3f}" for column in COLUMNS]
        lines.append(f"| {name} | {'50, guided' if name == 'teacher' else '-'} | " + " | ".join(cells) + " |")
    for method in METHODS:
        runs = [run["student"] for name, run in results["runs"].items() if name.startswith(f"{method},")]
        for steps in map(str, evaluation.STUDENT_STEPS if runs else ()):
            values = {column: np.array([run[steps][column] for run in runs]) for column in COLUMNS}
            cells = [f"{v.mean():.3f} ± {np.ptp(v) / 2:.3f}" for v in values.values()]
            lines.append(f"| {method} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
