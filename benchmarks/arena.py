"""Every method on a mixture of Gaussians whose score is exact: the same networks, start, CPU time, search and scores.

    nice -n 10 python -m benchmarks.arena --out=benchmarks/results/arena.json --figure=docs/arena.png

A seed of all methods takes about two minutes of CPU time, the search ten; what is done already is not done again.
Student and fake score are MLPs that start from one regression on the exact velocity. An arm trains for SECONDS of CPU
time (of the process, all threads), counted as updates times the cost of an update, which is measured once; `sCM,
longer` for three times as long. Each method has the same search: six trials, of two learning rates and three values of
the knob that it is known to be most sensitive to, in the first of SETTINGS and on a seed of its own; the trial with the
least sliced Wasserstein distance, averaged over 1, 2 and 4 steps, wins. Prints a Markdown table of means over seeds,
and behind each, half the range.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.chart import draw_lines
from benchmarks.mixture import CAPTIONS, TEACHER_STEPS, Mixture, create_mixture, sample_teacher, score
from launch import keep_compilations
from rcm_jax import sampling
from rcm_jax.config import Stage, parse_stages
from rcm_jax.media import json_text, write_file
from rcm_jax.methods import Applies, Apply, Recipe, mean_velocity
from rcm_jax.schedule import Phase, phase_at
from rcm_jax.state import Params, TrainState, create_optimizer, create_state, ema_exponent
from rcm_jax.steps import Metrics, critic_step, student_step
from rcm_jax.trigflow import NET_TIME_SCALE, rf_velocity

COMMAND = "python -m benchmarks.arena --out=benchmarks/results/arena.json --figure=docs/arena.png"
SECONDS = 10.0
BATCH, WIDTH, LAYERS, FREQUENCIES = 512, 192, 3, 4
START_UPDATES = 3000  # of the regression that every network starts from
SAMPLES = 10_000
STEPS = (1, 2, 4)
MID_TIMES = (1.3, 1.0, 0.6)  # the paper's
SETTINGS = ((16, 1.0), (16, 2.0), (64, 1.0))  # dimensions and guidance; the first is searched
SEARCH_SEED = 100
RATES = (3e-4, 1e-3)
EVERYONE = Recipe(p_G_mean=0.0, p_G_std=1.6, p_D_shift=1.0, dcm_shift=1.0, ema_gamma=ema_exponent(0.1))
WINDOWS = 25  # of a training, whose mean losses are kept
COLUMNS = ("precision", "recall", "spread", "weights_tv", "wasserstein")


class Method(NamedTuple):
    """A method's losses, the knob that is searched, and what else it needs of a recipe and the schedule."""

    losses: str
    knob: str
    values: tuple[float, ...]
    recipe: Mapping[str, Any] = MappingProxyType({})
    longer: int = 1
    warmup: float = 0.1  # of the tangent, as a share of the student's updates
    dtype: str = "float32"  # of the network's inner layers
    time_dtype: str = "float32"  # of its embedding of time


METHODS = {
    "rCM": Method("rcm", "scm_weight", (0.1, 0.5, 2.5)),
    "sCM": Method("scm", "p_G_mean", (-0.8, 0.0, 0.8)),
    "sCM, longer": Method("scm", "p_G_mean", (-0.8, 0.0, 0.8), longer=3),
    "dCM": Method("dcm", "dcm_steps", (18, 48, 128)),
    "DMD": Method("dmd", "student_update_freq", (2, 3, 5)),
    "DMD2": Method("dmd2", "gan_weight", (0.03, 0.3, 3.0), {"simulation_times": MID_TIMES}),
    "MeanFlow": Method("mean_flow", "mean_flow_share", (0.25, 0.5, 1.0)),
    "sCT": Method("sct", "p_G_mean", (-0.8, 0.0, 0.8)),
}
SEARCHED = {"sCM, longer": "sCM"}  # whose search it shares


def init_mlp(key: jax.Array, dim: int, extra: Sequence[str] = ()) -> Params:
    """Parameters of apply_mlp; `extra` may name "span", for MeanFlow, and "discriminator"."""
    shapes = {"x": (dim, WIDTH), "time": (2 * FREQUENCIES + 1, WIDTH), "text": (CAPTIONS, WIDTH), "out": (WIDTH, dim)}
    shapes |= {f"hidden_{layer}": (WIDTH, WIDTH) for layer in range(LAYERS)}
    more = {"span": {"span": (2 * FREQUENCIES + 1, WIDTH)}}
    more |= {"discriminator": {"judge_in": (WIDTH, WIDTH), "judge_out": (WIDTH, 1)}}
    for name in extra:
        shapes |= more[name]
    keys = jax.random.split(key, len(shapes))
    params = {
        name: {"kernel": jax.random.normal(k, shape) / np.sqrt(shape[0]), "bias": jnp.zeros(shape[1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    for name in {"span", "judge_out"} & params.keys():
        params[name] = jax.tree.map(jnp.zeros_like, params[name])
    return params


def apply_mlp(
    params: Params,
    x_BTHWC: jax.Array,
    time_B: jax.Array,
    text_BSD: jax.Array,
    *,
    span_B: jax.Array | None = None,
    mode: str = "reverse",
    discriminate: bool = False,
    dtype: str = "float32",
    time_dtype: str = "float32",
) -> Any:
    """A residual MLP over the last axis, as steps.py calls a network.

    Inner layers compute in `dtype`, the embedding of time in `time_dtype`, the output layer in float32, as Wan's.
    """
    del mode

    def linear(name: str, x: jax.Array, dtype: str) -> jax.Array:
        return x.astype(dtype) @ params[name]["kernel"].astype(dtype) + params[name]["bias"].astype(dtype)[None]

    def embed(name: str, time_B: jax.Array) -> jax.Array:
        s_B1 = time_B.astype(time_dtype)[:, None] / NET_TIME_SCALE
        angle_BF = (jnp.pi * jnp.arange(1, FREQUENCIES + 1)).astype(time_dtype)[None] * s_B1
        fourier_BF = jnp.concatenate([s_B1, jnp.sin(angle_BF), jnp.cos(angle_BF)], axis=1)
        return linear(name, fourier_BF, time_dtype).astype(dtype)

    hidden = linear("x", x_BTHWC[:, 0, 0, 0], dtype) + embed("time", time_B) + linear("text", text_BSD[:, 0], dtype)
    if span_B is not None:
        hidden += embed("span", span_B)
    features = [hidden]
    for layer in range(LAYERS):
        features.append(features[-1] + linear(f"hidden_{layer}", jax.nn.gelu(features[-1]), dtype))
    out = linear("out", jax.nn.gelu(features[-1]), "float32")[:, None, None, None]
    if not discriminate:
        return out
    judged = linear("judge_in", jax.nn.gelu(features[LAYERS // 2 + 1]), "float32")
    return out, linear("judge_out", jax.nn.silu(judged), "float32")[:, 0]


def train_start(mixture: Mixture, seed: int) -> Params:
    """A network that imitates the exact velocity, one caption in ten left out: what a trained teacher is elsewhere."""
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, START_UPDATES))

    @jax.jit
    def update(params: Params, opt_state: optax.OptState, key: jax.Array) -> tuple[Any, optax.OptState]:
        data, times, noises, drop = jax.random.split(key, 4)
        x0, text = mixture.sample(data, BATCH)
        text = jnp.where(jax.random.uniform(drop, (BATCH, 1, 1)) < 0.1, 0.0, text)
        s_B = jax.random.uniform(times, (BATCH,))
        s = s_B.reshape(-1, 1, 1, 1, 1)
        x = (1 - s) * x0 + s * jax.random.normal(noises, x0.shape)
        v = mixture.velocity({}, x, NET_TIME_SCALE * s_B, text)
        loss = lambda params: ((apply_mlp(params, x, NET_TIME_SCALE * s_B, text) - v) ** 2).mean()  # noqa: E731
        change, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, change), opt_state

    init, steps = jax.random.split(jax.random.key(seed))
    params = init_mlp(init, mixture.dim)
    opt_state = optimizer.init(params)
    for key in jax.random.split(steps, START_UPDATES):
        params, opt_state = update(params, opt_state, key)
    return params


class Arm(NamedTuple):
    """One run of a method: what the search chooses, and what it is given."""

    mixture: Mixture
    guidance: float
    method: Method
    rate: float
    value: float

    @property
    def apply(self) -> Apply:
        return functools.partial(apply_mlp, dtype=self.method.dtype, time_dtype=self.method.time_dtype)

    @property
    def stage(self) -> Stage:
        return parse_stages(f"{self.method.losses}:1")[0]

    @property
    def update_freq(self) -> int:
        return int(self.value) if self.method.knob == "student_update_freq" else 5 if "gan" in self.stage.losses else 2

    @property
    def recipe(self) -> Recipe:
        searched = {} if self.method.knob == "student_update_freq" else {self.method.knob: self.value}
        return dataclasses.replace(EVERYONE, guidance=self.guidance, **searched | dict(self.method.recipe))


TakeStep = Callable[[TrainState, jax.Array, Phase], tuple[TrainState, Metrics]]
Curve = dict[str, list[float | None]]


def compile_arm(arm: Arm, start: Params, student_updates: int) -> tuple[TrainState, TakeStep]:
    """The first state, and (state, key of the run, phase) -> the state and the metrics of one update."""
    losses, mixture, recipe = arm.stage.losses, arm.mixture, arm.recipe

    def optimize(updates: int) -> optax.GradientTransformation:
        settings = {"decay_from": updates // 2, "decay_to": updates, "warmup": 100}
        return create_optimizer(arm.rate, b2=0.99, weight_decay=0.0, **settings)

    optimizer, critic_optimizer = optimize(student_updates), optimize(student_updates * (arm.update_freq - 1))
    key, dim = jax.random.key(1), mixture.dim
    student = init_mlp(key, dim, ["span"] if "mean_flow" in losses else []) | start
    fake = init_mlp(key, dim, ["discriminator"] if "gan" in losses else []) | start
    state = create_state(student, {}, optimizer, critic_optimizer if "dmd" in losses else None, fake)
    shared = {"apply": Applies(arm.apply, mixture.velocity, arm.apply), "recipe": recipe}

    @functools.partial(jax.jit, static_argnames=("update", "losses"), donate_argnums=0)
    def take_step(state, run_key, ratio, update, losses):
        data, draws = jax.random.split(jax.random.fold_in(run_key, state.iteration))
        latent, text = mixture.sample(data, BATCH)
        batch = {"latent": latent, "text": text}
        if update == "critic":
            return critic_step(state, batch, draws, loss_names=losses, optimizer=critic_optimizer, **shared)
        options = {"loss_names": losses, "optimizer": optimizer, "negative_text": jnp.zeros((1, CAPTIONS))}
        return student_step(state, batch, draws, ratio, **options, **shared)

    return state, lambda state, key, phase: take_step(
        state, key, jnp.float32(phase.tangent_ratio), phase.update, phase.losses
    )


def measure_cost(arm: Arm, start: Params, updates: int = 100) -> dict[str, float]:
    """CPU seconds of one update of each kind that the arm has."""
    state, take_step = compile_arm(arm, start, updates)
    seconds, stages = {}, [Stage(arm.stage.losses, 2)]
    for index in range(2 if "dmd" in arm.stage.losses else 1):
        phase = phase_at(stages, index, tangent_warmup=0, student_update_freq=2)
        state, _ = jax.block_until_ready(take_step(state, jax.random.key(0), phase))
        begin = time.process_time()
        for _ in range(updates):
            state, _ = take_step(state, jax.random.key(0), phase)
        jax.block_until_ready(state)
        seconds[phase.update] = (time.process_time() - begin) / updates
    return seconds


def iterations_of(arm: Arm, cost: dict[str, float]) -> tuple[int, int]:
    """Iterations, and student updates among them, that the arm's time pays for."""
    critics = arm.update_freq - 1 if "critic" in cost else 0
    rounds = int(SECONDS * arm.method.longer / (cost["student"] + critics * cost.get("critic", 0.0)))
    return rounds * (1 + critics), rounds


def train_arm(arm: Arm, start: Params, cost: dict[str, float], seed: int) -> tuple[Params, Curve]:
    """The EMA of a student that has had its time, and the losses and norms of gradients on the way."""
    iterations, student_updates = iterations_of(arm, cost)
    state, take_step = compile_arm(arm, start, student_updates)
    stage, warmup, metrics = Stage(arm.stage.losses, iterations), int(student_updates * arm.method.warmup), []
    for iteration in range(iterations):
        phase = phase_at([stage], iteration, tangent_warmup=warmup, student_update_freq=arm.update_freq)
        state, found = take_step(state, jax.random.key(seed), phase)
        metrics.append({name: value for name, value in found.items() if name.startswith(("loss_", "grad_norm"))})
    return state.ema, thin(jax.device_get(metrics), WINDOWS)


def thin(metrics: Sequence[Mapping[str, float]], windows: int) -> Curve:
    """The mean of each metric over each of `windows` equal parts of a training; None where no update had it."""
    parts = np.array_split(np.arange(len(metrics)), windows)
    curve: Curve = {name: [] for name in sorted({name for each in metrics for name in each})}
    for part, (name, means) in itertools.product(parts, curve.items()):
        values = [metrics[index][name] for index in part if name in metrics[index]]
        means.append(float(f"{np.mean(values):.4g}") if values else None)
    return curve


def sample_student(arm: Arm, params: Params, text_NSD: jax.Array, steps: int) -> np.ndarray:
    """Samples (N, D) with other noises than the reference's."""
    times = sampling.few_step_times(steps, sigma_max=80.0, mid_times=MID_TIMES).tolist()
    shape, seeds = (1, 1, 1, arm.mixture.dim), jnp.arange(len(text_NSD)) + len(text_NSD)

    if "mean_flow" in arm.stage.losses:
        x = jax.jit(lambda: sampling.mean_flow(mean_velocity(arm.apply, params, text_NSD), seeds, shape, times))()
    else:
        velocity = rf_velocity(functools.partial(arm.apply, params, text_BSD=text_NSD))
        x = jax.jit(lambda: sampling.few_step(velocity, seeds, shape, times))()
    return np.asarray(x)[:, 0, 0, 0]


class Setting(NamedTuple):
    """A mixture under a guidance: the captions to sample and, for them, samples of the exact flow."""

    mixture: Mixture
    guidance: float
    text_NSD: jax.Array
    reference_ND: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.mixture.dim} dimensions, guidance {self.guidance:g}"

    def score(self, x_ND: np.ndarray) -> dict[str, float]:
        return score(self.mixture, x_ND, np.asarray(self.text_NSD)[:, 0].argmax(axis=1), self.reference_ND)


def create_setting(dim: int, guidance: float) -> Setting:
    """The setting, its captions as frequent as the data's."""
    mixture = create_mixture(dim)
    _, text_NSD = mixture.sample(jax.random.key(SEARCH_SEED), SAMPLES)
    return Setting(mixture, guidance, text_NSD, sample_teacher(mixture, text_NSD, guidance))


def run_arm(arm: Arm, setting: Setting, start: Params, cost: dict[str, float], seed: int) -> dict[str, Any]:
    """Trains and scores one arm, whose updates cost `cost`."""
    begin = time.process_time()
    params, curve = train_arm(arm, start, cost, seed)
    seconds = time.process_time() - begin
    scores = {str(steps): setting.score(sample_student(arm, params, setting.text_NSD, steps)) for steps in STEPS}
    return {
        "rate": arm.rate,
        arm.method.knob: arm.value,
        "iterations": iterations_of(arm, cost)[0],
        "cpu_seconds_with_compilation": seconds,
        "steps": scores,
        "curve": curve,
    }


def mean_wasserstein(run: dict[str, Any]) -> float:
    """What the search minimises; a run that diverged is the worst."""
    mean = float(np.mean([scores["wasserstein"] for scores in run["steps"].values()]))
    return mean if np.isfinite(mean) else np.inf


def main() -> None:
    """Searches, trains and scores what the file of results lacks, then draws the figure and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all scores")
    parser.add_argument("--figure", type=Path, required=True, metavar="FILE", help="the PNG of precision and recall")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    arguments = parser.parse_args()
    keep_compilations()
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    else:
        results = {"command": COMMAND, "seconds": SECONDS, "machine": describe_machine()}
    for dim, guidance in SETTINGS:
        fill_setting(results, create_setting(dim, guidance), arguments)
    write_file(arguments.figure, draw_figure(results))
    print(table(results))


def describe_machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def fill_setting(results: dict[str, Any], setting: Setting, arguments: argparse.Namespace) -> None:
    """Runs what is missing in one setting, seed by seed; the first setting is searched before."""
    costs = results.setdefault("cost", {}).setdefault(str(setting.mixture.dim), {})
    search, runs = results.setdefault("search", {}), results.setdefault("runs", {}).setdefault(setting.name, {})
    trials = {
        f"{name}, {rate:g}, {value:g}": (name, rate, value)
        for name, method in METHODS.items()
        if name not in SEARCHED
        for rate, value in itertools.product(RATES, method.values)
    }
    start_of = functools.cache(functools.partial(train_start, setting.mixture))

    def keep(into: dict[str, Any], key: str, name: str, rate: float, value: float, seed: int) -> None:
        if key in into:
            return
        arm = Arm(setting.mixture, setting.guidance, METHODS[name], rate, value)
        if arm.method.losses not in costs:
            costs[arm.method.losses] = measure_cost(arm, start_of(seed))
        into[key] = run_arm(arm, setting, start_of(seed), costs[arm.method.losses], seed)
        print(f"{setting.name}: {key}: {mean_wasserstein(into[key]):.4f}", flush=True)
        write_file(arguments.out, json_text(results, indent=1).encode())

    for key, (name, rate, value) in trials.items():
        keep(search, key, name, rate, value, SEARCH_SEED)
    runs.setdefault("teacher", {"steps": {str(TEACHER_STEPS): setting.score(sample_exactly(setting))}})
    for seed, name in itertools.product(range(arguments.seeds), METHODS):
        keep(runs, f"{name}, seed {seed}", name, *best_trial(search, name), seed)


def best_trial(search: dict[str, Any], name: str) -> tuple[float, float]:
    """The learning rate and the value of the knob that the search of a method ended with."""
    trials = [run for key, run in search.items() if key.partition(", ")[0] == SEARCHED.get(name, name)]
    best = min(trials, key=mean_wasserstein)
    return best["rate"], best[METHODS[name].knob]


def sample_exactly(setting: Setting) -> np.ndarray:
    """The exact flow once more, with other noises: what a perfect student of this many samples scores."""
    return sample_teacher(setting.mixture, setting.text_NSD, setting.guidance, first_seed=SAMPLES)


def means(results: dict[str, Any], setting: str) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """The scores of all seeds by method and number of steps."""
    found: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for name, steps in itertools.product(METHODS, STEPS):
        runs = [run for key, run in results["runs"][setting].items() if key.rpartition(", seed ")[0] == name]
        scores = [run["steps"][str(steps)] for run in runs]
        found[name, steps] = {column: np.array([each[column] for each in scores], float) for column in COLUMNS}
    return found


def table(results: dict[str, Any]) -> str:
    """The Markdown tables of a results file, one a setting."""
    lines = []
    for setting, runs in results["runs"].items():
        head = ("", "steps", "seeds", *COLUMNS)
        lines += [f"\n{setting}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        ((steps, exact),) = runs["teacher"]["steps"].items()
        lines.append(f"| exact flow | {steps} | 1 | " + " | ".join(f"{exact[column]:.3f}" for column in COLUMNS) + " |")
        for (name, steps), scores in means(results, setting).items():
            cells = [cell(column, values) for column, values in scores.items()]
            lines.append(f"| {name} | {steps} | {len(scores[COLUMNS[0]])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(column: str, values: np.ndarray) -> str:
    """Mean and half the range over the seeds; of a spread, over those with enough samples in a mode to have one."""
    values = values[values > 0] if column == "spread" else values
    return f"{values.mean():.3f} ± {np.ptp(values) / 2:.3f}" if values.size else "-"


def draw_figure(results: dict[str, Any]) -> bytes:
    """Recall against precision, a panel a setting, a line a method through 1, 2 and 4 steps."""
    panels = {}
    for setting in results["runs"]:
        scores = means(results, setting)
        place = {key: (float(each["recall"].mean()), float(each["precision"].mean())) for key, each in scores.items()}
        panels[setting] = {name: [(*place[name, steps], str(steps)) for steps in STEPS] for name in METHODS}
    return draw_lines(panels, x_label="recall", y_label="precision")


if __name__ == "__main__":
    main()
