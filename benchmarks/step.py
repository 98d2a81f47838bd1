"""Time, memory and utilisation of the parts of a training step: Wan 1.3B at 480p, random weights.

    python -m benchmarks.step --out=benchmarks/results/step.json --rcm=CHECKOUT --profile

Batch 1, latents of 21 x 60 x 104, the recipe of configs/wan2_1_t2v_1_3b.py; --override changes it, batch and mesh too
(see benchmarks/scaling.py). The steps are those that `launch.train` compiles. Utilisation counts the operations of the
model's products and attention, none that are made again, over the `--peak` of the devices. The JSON has the losses of
the first update. With --rcm, a clone of https://github.com/NVlabs/rcm, its PyTorch networks make the same calls on the
same device (benchmarks/official.py). With --profile the kernels of each step are listed.
"""

import argparse
import functools
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import kernels, processes
from launch import set_determinism
from rcm_jax import media, sharding, train
from rcm_jax.config import load
from rcm_jax.costs import Operations, pass_operations, step_operations
from rcm_jax.methods import Recipe, guided
from rcm_jax.models.wan import PRESETS
from rcm_jax.schedule import Phase

LATENT = (21, 60, 104)
CONFIG = Path(__file__).parent.parent / "configs" / "wan2_1_t2v_1_3b.py"
PASSES = ("teacher, one pass", "teacher, guided pair", "student, value and tangent")
# A backward simulation takes 1, 2, 3 and 4 student passes in turn: the mean of four steps counts.
STEPS = {
    "sCM step": (Phase("student", frozenset({"scm"}), 1.0), 1),
    "DMD step, mean of 4": (Phase("student", frozenset({"dmd"}), 1.0), 4),
    "rCM step, mean of 4": (Phase("student", frozenset({"scm", "dmd"}), 1.0), 4),
    "critic step, mean of 4": (Phase("critic", frozenset(), 1.0), 4),
}


def main() -> None:
    """Times every part, prints a Markdown table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all measurements")
    parser.add_argument("--peak", type=float, default=989.0, metavar="TFLOPS", help="the device's dense bfloat16 rate")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed runs of each part")
    parser.add_argument("--latent", type=int, nargs=3, default=LATENT, metavar=("T", "H", "W"))
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="values of the recipe to change")
    parser.add_argument("--parts", nargs="+", choices=(*PASSES, *STEPS), default=(*PASSES, *STEPS), metavar="PART")
    parser.add_argument("--rcm", type=Path, metavar="DIR", help="a checkout of NVlabs/rcm, to measure its networks too")
    parser.add_argument("--profile", action="store_true", help="list the kernels of each step")
    arguments = parser.parse_args()
    results = {
        "command": " ".join(["python -m benchmarks.step", *sys.argv[1:]]),
        "python": platform.python_version(),
        "latent": arguments.latent,
        "official": measure_official(arguments) if arguments.rcm else {},
        "rows": [],
    }
    for row in measure(arguments):
        peak = arguments.peak * jax.device_count()
        results["rows"].append(row | {"utilisation": row["tflop"] / row["seconds"] / peak})
        results |= {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "jax": jax.__version__}
        media.write_file(arguments.out, media.json_text(results, indent=1).encode())
        print(f"{row['part']}: {row['seconds'] * 1e3:.0f} ms", flush=True)
    print(table(results))
    for row in results["rows"]:
        if row.get("kernels"):
            print(f"\n{row['part']}\n\n{kernel_table(row['kernels'])}")


def measure_official(arguments: argparse.Namespace) -> dict[str, Any]:
    """What benchmarks.official prints, measured in a process of its own that ends before ours takes the device."""
    words = [f"--rcm={arguments.rcm}", f"--repeat={arguments.repeat}", "--latent", *map(str, arguments.latent)]
    found = processes.measure_apart("benchmarks.official", words)
    print(found, flush=True)
    return found


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each part that was asked for: forward passes, then whole steps."""
    config = load(CONFIG, ["data.batch_size=1", *arguments.override])
    set_determinism(config.deterministic)
    mesh, preset, batch_size = sharding.make_mesh(**config.mesh), PRESETS[config.model.preset], config.data.batch_size
    train.check_batch_size(config, mesh)
    networks, optimizers = train.create_networks(config, mesh), train.create_optimizers(config)
    network = networks.student
    latent = (*arguments.latent, preset.in_channels)
    keys = jax.random.split(jax.random.key(0), 4)
    negative = jax.random.normal(keys[0], (preset.text_length, preset.text_dim))
    batch = {
        "latent": jax.random.normal(keys[1], (batch_size, *latent)),
        "text": jax.random.normal(keys[2], (batch_size, *negative.shape)),
    }
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    place = sharding.tree_shardings(network.abstract_params(), mesh)
    teacher = jax.jit(network.init, out_shardings=place)(keys[3])
    one = Operations(*(batch_size * count for count in pass_operations(preset, preset.tokens(latent))))
    recipe = train.make_recipe(config, latent)

    for part in PASSES:
        if part in arguments.parts:
            run = jax.jit(one_pass(part, network.apply, negative))
            operands = (teacher, batch["latent"], jnp.full((batch_size,), 500.0), batch["text"])
            run = run.lower(*operands).compile()
            yield time_part(part, run, functools.partial(run, *operands), arguments.repeat, one, recipe)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, train.abstract_state(config, networks, optimizers, mesh))
    create = functools.partial(train.create_initial_state, config, networks, optimizers)
    state = jax.jit(create, out_shardings=shardings)(teacher)
    del teacher
    step_of = train.jit_steps(config, networks, optimizers, latent, negative, shardings)
    # The profiler sees what XLA has recorded into a command buffer as one kernel.
    unrecorded = {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else None
    for part, (phase, period) in STEPS.items():
        if part in arguments.parts:
            step, others = step_of(phase)
            step = step.lower(state, batch, *others).compile(unrecorded if arguments.profile else None)
            others = [x for x in others if not isinstance(x, frozenset)]  # the names of losses are compiled in

            found = []

            def run(step=step, others=others, found=found):
                nonlocal state
                state, metrics = step(state, batch, *others)
                found.append(metrics)
                return metrics

            row = time_part(part, step, run, period * -(-arguments.repeat // period), one, recipe)
            row["first"] = {name: float(value) for name, value in found[0].items() if name.startswith("loss")}
            yield row | ({"kernels": kernels.profile(run)} if arguments.profile else {})


def one_pass(part: str, apply: Callable, negative: jax.Array) -> Callable:
    """(params, x, time_B, text_BSD) -> the results of a part of PASSES."""
    if part == "teacher, one pass":
        return apply
    if part == "teacher, guided pair":
        return lambda params, x, time_B, text_BSD: guided(apply, params, text_BSD, negative, 5.0)(x, time_B)

    def value_and_tangent(params, x, time_B, text_BSD):
        return jax.jvp(lambda x, t: apply(params, x, t, text_BSD, mode="forward"), (x, time_B), (x, time_B))

    return value_and_tangent


def time_part(
    part: str, compiled: Any, run: Callable[[], Any], repeat: int, one: Operations, recipe: Recipe
) -> dict[str, Any]:
    """A row: mean seconds of `repeat` runs after one, operations, and bytes of temporaries."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(repeat):
        results = run()
    jax.block_until_ready(results)
    seconds = (time.perf_counter() - start) / repeat
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {"part": part, "seconds": seconds, "tflop": tflop_of(part, one, recipe), "bytes": temporaries}


def tflop_of(part: str, one: Operations, recipe: Recipe) -> float:
    """What a part needs, none of it made again."""
    passes = dict(zip(PASSES, (one.forward, 2 * one.forward, one.forward + one.tangent), strict=True))
    return passes[part] if part in passes else step_operations(one, STEPS[part][0], recipe)


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a results file. Memory is that of temporaries, beside the state."""
    official = results["official"]
    lines = [
        f"{results['device']}, jax {results['jax']}, latents of {' x '.join(map(str, results['latent']))}; official:"
        f" {official.get('missing', official.get('torch', 'not measured'))}",
        "",
        "| part | ms | TFLOP | utilisation | memory, GiB | official, ms | ratio | official, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = f"{row['seconds'] * 1e3:,.0f} | {row['tflop']:,.0f} | {row['utilisation']:.0%}"
        cells += f" | {row['bytes'] / 2**30:.1f}"
        theirs = official.get("parts", {}).get(row["part"])
        cells += (
            " | - | - | -"
            if theirs is None
            else (
                f" | {theirs['seconds'] * 1e3:,.0f} | {theirs['seconds'] / row['seconds']:.2f}"
                f" | {theirs['bytes'] / 2**30:.1f}"
            )
        )
        lines.append(f"| {row['part']} | {cells} |")
    return "\n".join(lines)


def kernel_table(profile: list[dict[str, Any]], count: int = 10) -> str:
    """The Markdown table of the longest kernels, and the share of each kind."""
    total = sum(kernel["seconds"] for kernel in profile)
    lines = ["| kernel | kind | calls | ms | share |", "|---|---|---|---|---|"]
    for kernel in profile[:count]:
        cells = f"{kernel['calls']} | {kernel['seconds'] * 1e3:.0f} | {kernel['seconds'] / total:.1%}"
        lines.append(f"| {kernel['kernel'][:80]} | {kernel['kind']} | {cells} |")
    return "\n".join([*lines, "", ", ".join(f"{kind} {share:.1%}" for kind, share in kernels.shares(profile).items())])


if __name__ == "__main__":
    main()
