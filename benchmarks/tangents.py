"""How far sCM's tangent is from float64's, by number format and by the way of differentiating, on the digits' network.

    python -m benchmarks.tangents --out=benchmarks/results/tangents.json

The shipped digits teacher is its own student, as where a distillation starts: cos t sin t dF/dt along the flow under
guidance 3, at the times of configs/digits_rcm.py, on filmed digits. The reference is `jax.jvp` in float64; only the
rotary embedding is float32. `network` is the format of matrix products, attention and activations between blocks.
`time` is that of the embedding of time, which the library keeps in float32 whatever the network's: bfloat16 rounds the
network time (0 to 1000) and computes the embedding's layers in bfloat16, as a network does that is cast as a whole.
Prints a Markdown table of the error's norm over the reference's: the median of the samples, and their 90th percentile.
"""

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from benchmarks.arena import describe_machine
from configs import digits_rcm
from rcm_jax import losses
from rcm_jax.data import digits, text
from rcm_jax.media import json_text, write_file
from rcm_jax.methods import Apply, conditioned, guided
from rcm_jax.models.functional import functional
from rcm_jax.models.wan import PRESETS, Wan
from rcm_jax.state import Params
from rcm_jax.train import create_network, load_params
from rcm_jax.trigflow import draw_lognormal, mix, trig_velocity

COMMAND = "python -m benchmarks.tangents --out=benchmarks/results/tangents.json"
SAMPLES = 256
FORMATS = tuple(itertools.product(("float32", "bfloat16"), repeat=2))  # of the network, of time
STEPS = (1e-4, 1e-3, 1e-2)
WAYS = (("exact", 0.0), *itertools.product(("semicontinuous", "discrete"), STEPS))


def main() -> None:
    """Measures, writes the file of results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all errors")
    arguments = parser.parse_args()
    config = digits_rcm.get_config()
    params = jax.tree.map(np.asarray, load_params(config.teacher.path, create_network(config)))
    inputs = draw_inputs(config)
    with jax.enable_x64(True):
        exact = create_apply("float64", "float64")
        inputs64 = {name: jnp.asarray(array, jnp.float64) for name, array in inputs.items()}
        inputs64["F"] = flow(exact, params, config.teacher.guidance, **inputs64)
        reference = np.asarray(tangent(exact, params, inputs64, "exact", 0.0))
    inputs["F"] = np.asarray(inputs64["F"], np.float32)
    errors = []
    for (network, time), (way, step) in itertools.product(FORMATS, WAYS):
        found = np.asarray(tangent(create_apply(network, time), params, inputs, way, step), np.float64)
        error_B = relative_errors(found, reference)
        row = {"network": network, "time": time, "tangent": way, "step": step}
        row |= {"median": float(np.median(error_B)), "p90": float(np.percentile(error_B, 90))}
        errors.append(row)
    facts = {"command": COMMAND, "machine": describe_machine(), "samples": SAMPLES, "errors": errors}
    write_file(arguments.out, json_text(facts, indent=1).encode())
    print(table(errors))


def draw_inputs(config: Any) -> dict[str, np.ndarray]:
    """x_t (B, T, H, W, C), TrigFlow times t (B,), captions (B, S, D) and the empty one (S, D), all float32."""
    films = next(digits.film(digits.load_images("validation"), views=1, seed=0, chunk=SAMPLES))
    time, noise = jax.random.split(jax.random.key(0))
    x0 = jnp.asarray(digits.video_to_latent(films.video_BTHWC))
    t_B = draw_lognormal(time, (SAMPLES,), config.loss.p_G_mean, config.loss.p_G_std)
    x = mix(x0, jax.random.normal(noise, x0.shape), t_B)
    captions = {"text": text.encode(films.prompt), "negative": text.encode([""])[0]}
    return {"x": np.asarray(x), "t": np.asarray(t_B)} | captions


def create_apply(dtype: str, time_dtype: str) -> Apply:
    """The digits' network as steps.py calls it, computing in `dtype`, its embedding of time in `time_dtype`."""

    def create(rngs: nnx.Rngs) -> nnx.Module:
        wan = Wan(PRESETS["digits"], dtype=jnp.dtype(dtype), rngs=rngs)
        if dtype == "float64":
            wan.set_attributes(dtype=jnp.dtype(dtype))  # norms and head, too
        for part in (wan.time_embedding, wan.time_projection):
            part.set_attributes(dtype=jnp.dtype(time_dtype))
        return wan

    apply = functional(create).apply

    def rounded(params: Params, x: jax.Array, time_B: jax.Array, text_BSD: jax.Array, **options: Any) -> jax.Array:
        return apply(params, x, time_B.astype(time_dtype).astype(time_B.dtype), text_BSD, **options)

    return rounded


@functools.partial(jax.jit, static_argnums=(0, 2))
def flow(
    apply: Apply, params: Params, guidance: float, *, x: jax.Array, t: jax.Array, text: jax.Array, negative: jax.Array
) -> jax.Array:
    """F (B, T, H, W, C) of the guided network as a teacher."""
    return trig_velocity(guided(apply, params, text, negative, guidance))(x, t)


def tangent(apply: Apply, params: Params, inputs: dict[str, Any], way: str, step: float) -> jax.Array:
    """cos t sin t dF/dt of the network along the flow `inputs["F"]`, differentiated as Recipe.tangent says."""

    @jax.jit
    def run(params: Params, x: jax.Array, t_B: jax.Array, F: jax.Array, text_BSD: jax.Array) -> jax.Array:
        student = functools.partial(conditioned, apply, params, text_BSD)
        difference = {"frozen_student": student(), "step": step}
        mode, differentiate = {
            "exact": ("forward", losses.exact_tangent),
            "semicontinuous": ("forward", functools.partial(losses.semicontinuous_tangent, **difference)),
            "discrete": ("reverse", functools.partial(losses.discrete_tangent, **difference)),
        }[way]
        return differentiate(student(mode=mode), x, t_B, F)[1]

    return run(params, *(jnp.asarray(inputs[name]) for name in ("x", "t", "F", "text")))


def relative_errors(found: Float[np.ndarray, "b ..."], reference: Float[np.ndarray, "b ..."]) -> Float[np.ndarray, "b"]:
    """Euclidean norm of each sample's error over that of its reference."""
    error_BN, reference_BN = (array.reshape(len(array), -1) for array in (found - reference, reference))
    return np.linalg.norm(error_BN, axis=1) / np.linalg.norm(reference_BN, axis=1)


def table(errors: list[dict[str, Any]]) -> str:
    """The Markdown table: a row a way of differentiating, a column a pair of formats."""
    head = ["tangent", *(f"network {network}, time {time}" for network, time in FORMATS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for way, step in WAYS:
        rows = [row for row in errors if (row["tangent"], row["step"]) == (way, step)]
        cells = [f"{row['median']:.1e} ({row['p90']:.1e})" for row in rows]
        lines.append("| " + " | ".join([way if way == "exact" else f"{way}, step {step:g}", *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
