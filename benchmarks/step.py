"""Time, memory and utilisation of the parts of a training step on one device: Wan 1.3B at 480p, random weights.

    python -m benchmarks.step --out=benchmarks/results/step.json

Batch 1, latents of 21 x 60 x 104, the recipe of configs/wan2_1_t2v_1_3b.py. The steps are those that `launch.train`
compiles. Utilisation counts the operations of the model's products and attention, none that are made again, over
the `--peak` of the device.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rcm_jax import media, sharding, train
from rcm_jax.config import load
from rcm_jax.costs import pass_operations, step_operations
from rcm_jax.models.wan import PRESETS
from rcm_jax.schedule import Phase
from rcm_jax.steps import guided

LATENT = (21, 60, 104)
CONFIG = Path(__file__).parent.parent / "configs" / "wan2_1_t2v_1_3b.py"


def main() -> None:
    """Times every part, prints a Markdown table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all measurements")
    parser.add_argument("--peak", type=float, default=989.0, metavar="TFLOPS", help="the device's dense bfloat16 rate")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed runs of each part")
    parser.add_argument("--latent", type=int, nargs=3, default=LATENT, metavar=("T", "H", "W"))
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="values of the recipe to change")
    arguments = parser.parse_args()
    rows = []
    for row in measure(arguments.latent, arguments.override, arguments.repeat):
        row["utilisation"] = row["tflop"] / row["seconds"] / arguments.peak
        rows.append(row)
        print(row, flush=True)
    device = jax.devices()[0]
    results = {"device": device.device_kind, "jax": jax.__version__, "latent": arguments.latent, "rows": rows}
    media.write_file(arguments.out, media.json_text(results, indent=1).encode())
    print(table(results))


def measure(size: list[int], overrides: list[str], repeat: int):
    """Yields a row for each part: forward passes, then whole steps."""
    config = load(CONFIG, ["data.batch_size=1", *overrides])
    network, optimizers = train.create_network(config), train.create_optimizers(config)
    mesh, preset = sharding.make_mesh(), PRESETS[config.model.preset]
    latent = (*size, preset.in_channels)
    one = pass_operations(preset, preset.tokens(latent))
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (1, *latent))
    text, negative = jax.random.normal(keys[1], (2, preset.text_length, preset.text_dim))
    time_B = jnp.full((1,), 500.0)
    teacher = jax.jit(network.init)(keys[2])

    def row(part: str, tflop: float, function: Callable, *operands: Any) -> dict[str, Any]:
        compiled = jax.jit(function).lower(*operands).compile()
        jax.block_until_ready(compiled(*operands))
        start = time.perf_counter()
        for _ in range(repeat):
            jax.block_until_ready(compiled(*operands))
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        return {"part": part, "seconds": (time.perf_counter() - start) / repeat, "tflop": tflop, "bytes": temporaries}

    def value_and_tangent(params, x, time_B):
        return jax.jvp(lambda x, t: network.apply(params, x, t, text[None], mode="forward"), (x, time_B), (x, time_B))

    def guided_teacher(params, x, time_B):
        return guided(network.apply, params, text[None], negative, 5.0)(x, time_B)

    yield row("teacher, one pass", one.forward, lambda p, *a: network.apply(p, *a, text[None]), teacher, x, time_B)
    yield row("teacher, guided pair", 2 * one.forward, guided_teacher, teacher, x, time_B)
    yield row("student, value and tangent", one.forward + one.tangent, value_and_tangent, teacher, x, time_B)

    state = train.create_initial_state(config, network, optimizers, teacher)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, train.abstract_state(config, network, optimizers, mesh))
    state = jax.device_put(state, shardings)
    del teacher
    step_of = train.jit_steps(config, network, optimizers, latent, negative, shardings)
    batch = jax.device_put({"latent": x, "text": text[None]}, sharding.batch_sharding(mesh))
    recipe = train.make_recipe(config, latent)
    phases = {  # the backward simulation runs 1, 2, 3 and 4 student passes in turn, the last of them with a gradient
        "sCM step": (Phase("student", frozenset({"scm"}), 1.0), 1),
        "DMD step, mean of 4": (Phase("student", frozenset({"dmd"}), 1.0), 4),
        "rCM step (sCM + DMD), mean of 4": (Phase("student", frozenset({"scm", "dmd"}), 1.0), 4),
        "critic step, mean of 4": (Phase("critic", frozenset(), 1.0), 4),
    }
    for part, (phase, period) in phases.items():
        step, arguments = step_of(phase)
        count = period * -(-repeat // period)
        for _ in range(period):
            state, metrics = step(state, batch, *arguments)
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch, *arguments)
        jax.block_until_ready((state, metrics))
        seconds = (time.perf_counter() - start) / count
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        yield {"part": part, "seconds": seconds, "tflop": step_operations(one, phase, recipe), "bytes": peak}


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a results file. Memory is that of temporaries for passes, the peak so far for steps."""
    lines = [
        f"{results['device']}, jax {results['jax']}, latents of {' x '.join(map(str, results['latent']))}",
        "",
        "| part | ms | TFLOP | utilisation | memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        cells = f"{row['seconds'] * 1e3:,.0f} | {row['tflop']:,.0f} | {row['utilisation']:.0%}"
        lines.append(f"| {row['part']} | {cells} | {row['bytes'] / 2**30:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
