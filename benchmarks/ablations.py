"""The rCM paper's ablations in the arena: one change at a time, the rest as the arena's search left it.

    nice -n 10 python -m benchmarks.ablations --arena=benchmarks/results/arena.json \
        --out=benchmarks/results/ablations.json --figure=docs/ablations.png

Networks, start, CPU time and scores are the arena's (benchmarks/arena.py), in its first setting. An arm makes as many
updates as its method made there; one that differentiates in another way makes more or fewer, by what an update costs
beside the exact one when both are measured in turns. Arms in bfloat16 make the updates of float32: what bfloat16 costs
a CPU says nothing about accelerators. A seed takes about nine minutes of CPU time; what is done already is not done
again. Prints a Markdown table and draws the losses: sCM's lies between 0 and 1, DMD's is divided by 20.
"""

import argparse
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benchmarks.arena import (
    COLUMNS,
    METHODS,
    MID_TIMES,
    SECONDS,
    SETTINGS,
    STEPS,
    Arm,
    Method,
    best_trial,
    create_setting,
    describe_machine,
    measure_cost,
    run_arm,
    train_start,
)
from benchmarks.chart import Points, curve_points, draw_lines
from launch import keep_compilations
from rcm_jax.media import json_text, write_file
from rcm_jax.state import Params

COMMAND = (
    "python -m benchmarks.ablations --arena=benchmarks/results/arena.json"
    " --out=benchmarks/results/ablations.json --figure=docs/ablations.png"
)
# What 1 : 100 is for the 2.1 million elements of the paper's latents, by the root of the number of elements.
OFFICIAL = MappingProxyType({"scm_weight": (16 / 2.1e6) ** 0.5})


class Ablation(NamedTuple):
    """A method of the arena and what is changed of it: numbers of its recipe, fields of Method, its learning rate."""

    base: str
    recipe: Mapping[str, Any] = MappingProxyType({})
    fields: Mapping[str, Any] = MappingProxyType({})
    faster: float = 1.0  # times the learning rate that the search found

    @property
    def method(self) -> Method:
        base = METHODS[self.base]
        return base._replace(recipe=dict(base.recipe) | dict(self.recipe), **self.fields)

    @property
    def tangent(self) -> str:
        return self.recipe.get("tangent", "exact")


BFLOAT16, BFLOAT16_TIME = {"dtype": "bfloat16"}, {"time_dtype": "bfloat16"}
ABLATIONS = {
    "rCM": Ablation("rCM"),
    "rCM, DMD weight 0.1": Ablation("rCM", {"dmd_weight": 0.1}),
    "rCM, DMD weight 0.01": Ablation("rCM", {"dmd_weight": 0.01}),
    "rCM, DMD weight 0.001": Ablation("rCM", {"dmd_weight": 0.001}),
    "rCM, official balance, DMD weight 1": Ablation("rCM", OFFICIAL),
    "rCM, official balance, DMD weight 0.1": Ablation("rCM", {**OFFICIAL, "dmd_weight": 0.1}),
    "rCM, official balance, DMD weight 0.01": Ablation("rCM", {**OFFICIAL, "dmd_weight": 0.01}),
    "rCM, no warm-up": Ablation("rCM", fields={"warmup": 0.0}),
    "rCM, fixed times": Ablation("rCM", {"simulation_times": MID_TIMES}),
    "rCM, semicontinuous tangent": Ablation("rCM", {"tangent": "semicontinuous"}),
    "rCM, discrete tangent": Ablation("rCM", {"tangent": "discrete"}),
    "DMD": Ablation("DMD"),
    "DMD, fixed times": Ablation("DMD", {"simulation_times": MID_TIMES}),
    "sCM": Ablation("sCM"),
    "sCM, no warm-up": Ablation("sCM", fields={"warmup": 0.0}),
    "sCM, 5 x the rate": Ablation("sCM", faster=5.0),
    "sCM, 5 x the rate, no warm-up": Ablation("sCM", fields={"warmup": 0.0}, faster=5.0),
    "sCM, semicontinuous tangent": Ablation("sCM", {"tangent": "semicontinuous"}),
    "sCM, discrete tangent": Ablation("sCM", {"tangent": "discrete"}),
    "sCM, bfloat16": Ablation("sCM", fields=BFLOAT16),
    "sCM, bfloat16, semicontinuous tangent": Ablation("sCM", {"tangent": "semicontinuous"}, BFLOAT16),
    "sCM, bfloat16, discrete tangent": Ablation("sCM", {"tangent": "discrete"}, BFLOAT16),
    "sCM, bfloat16 time": Ablation("sCM", fields=BFLOAT16_TIME),
    "sCM, bfloat16 time, semicontinuous tangent": Ablation("sCM", {"tangent": "semicontinuous"}, BFLOAT16_TIME),
    "sCM, bfloat16 time, discrete tangent": Ablation("sCM", {"tangent": "discrete"}, BFLOAT16_TIME),
}
BALANCES = tuple(name for name in ABLATIONS if "DMD weight" in name)
# Of the figure, by title: a metric, what it is divided by, and the arms.
PANELS = {
    "sCM's loss: balances of rCM": ("loss_scm", 1.0, ("rCM", *BALANCES)),
    "DMD's loss / 20: balances of rCM": ("loss_dmd", 20.0, ("rCM", *BALANCES)),
    "sCM's loss: rCM, apart from the balance": (
        "loss_scm",
        1.0,
        tuple(name for name in ABLATIONS if name.startswith("rCM") and name not in BALANCES),
    ),
    "DMD's loss / 20: simulation times": ("loss_dmd", 20.0, ("rCM", "rCM, fixed times", "DMD", "DMD, fixed times")),
    "sCM's loss: sCM in float32": (
        "loss_scm",
        1.0,
        tuple(name for name in ABLATIONS if name.startswith("sCM") and "bfloat16" not in name),
    ),
    "sCM's loss: sCM with bfloat16": (
        "loss_scm",
        1.0,
        ("sCM", *(name for name in ABLATIONS if name.startswith("sCM, bfloat16"))),
    ),
}


def main() -> None:
    """Trains and scores what the file of results lacks, seed by seed, then draws the figure and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arena", type=Path, required=True, metavar="FILE", help="the arena's JSON: search and costs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all scores and curves")
    parser.add_argument("--figure", type=Path, required=True, metavar="FILE", help="the PNG of the losses")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    arguments = parser.parse_args()
    keep_compilations()
    arena = json.loads(arguments.arena.read_text())
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    else:
        results = {"command": COMMAND, "seconds": SECONDS, "machine": describe_machine(), "runs": {}}
    setting = create_setting(*SETTINGS[0])
    start_of = functools.cache(functools.partial(train_start, setting.mixture))
    arms = {}
    for name, ablation in ABLATIONS.items():
        rate, value = best_trial(arena["search"], ablation.base)
        arms[name] = Arm(setting.mixture, setting.guidance, ablation.method, ablation.faster * rate, value)
    if "relative_cost" not in results:
        results["relative_cost"] = measure_tangents(arms, start_of(0))
    for seed in range(arguments.seeds):
        for name, arm in arms.items():
            if (key := f"{name}, seed {seed}") in results["runs"]:
                continue
            cost = arena["cost"][str(setting.mixture.dim)][arm.method.losses]
            student = cost["student"] * results["relative_cost"][arm.method.losses].get(ABLATIONS[name].tangent, 1.0)
            results["runs"][key] = run_arm(arm, setting, start_of(seed), cost | {"student": student}, seed)
            print(
                key, *(f"{scores['wasserstein']:.4f}" for scores in results["runs"][key]["steps"].values()), flush=True
            )
            write_file(arguments.out, json_text(results, indent=1).encode())
    write_file(arguments.figure, draw_figure(results))
    print(table(results))


def measure_tangents(arms: Mapping[str, Arm], start: Params, rounds: int = 4) -> dict[str, dict[str, float]]:
    """What a student's update costs beside the one with the exact tangent, by losses and tangent, in float32.

    All are measured in turns, so that what else the machine does meets them alike; the least of the rounds counts.
    """
    plain = {name: arm for name, arm in arms.items() if {arm.method.dtype, arm.method.time_dtype} == {"float32"}}
    measured = {(arm.method.losses, ABLATIONS[name].tangent): arm for name, arm in plain.items()}
    seconds = [{key: measure_cost(arm, start)["student"] for key, arm in measured.items()} for _ in range(rounds)]
    least = {key: min(each[key] for each in seconds) for key in measured}
    relative: dict[str, dict[str, float]] = {}
    for (losses, tangent), cost in least.items():
        relative.setdefault(losses, {})[tangent] = cost / least[losses, "exact"]
    return relative


def runs_of(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The runs of an arm, one a seed."""
    return [run for key, run in results["runs"].items() if key.rpartition(", seed ")[0] == name]


def scores_of(results: Mapping[str, Any], name: str, column: str) -> np.ndarray:
    """A column of an arm's scores, (seeds, steps)."""
    return np.array([[run["steps"][str(steps)][column] for steps in STEPS] for run in runs_of(results, name)])


def table(results: Mapping[str, Any]) -> str:
    """The Markdown table of a results file: means over seeds with 1, 2 and 4 steps, and half the largest range."""
    head = ("", "seeds", "updates", *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in ABLATIONS:
        cells = []
        for column in COLUMNS:
            scores = scores_of(results, name, column)
            means = " / ".join(f"{mean:.3f}" for mean in scores.mean(axis=0))
            cells.append(f"{means} ± {np.ptp(scores, axis=0).max() / 2:.3f}")
        updates = runs_of(results, name)[0]["iterations"]
        lines.append("| " + " | ".join((name, str(len(scores)), str(updates), *cells)) + " |")
    return "\n".join(lines)


def draw_figure(results: Mapping[str, Any]) -> bytes:
    """The losses of PANELS against the share of a training that is over, means over seeds."""
    panels = {}
    for title, (metric, scale, names) in PANELS.items():
        panels[title] = {name: curve_of(results, name, metric, scale) for name in names}
    return draw_lines(panels, x_label="training", y_label="loss")


def curve_of(results: Mapping[str, Any], name: str, metric: str, scale: float) -> Points:
    """A line of the chart: a metric of an arm, divided by `scale`, where any seed has it."""
    curve_RW = np.array([run["curve"][metric] for run in runs_of(results, name)], float)
    return curve_points([None if np.isnan(x_R).all() else float(np.nanmean(x_R)) / scale for x_R in curve_RW.T])


if __name__ == "__main__":
    main()
