"""Time and memory of encoding and decoding a video with Wan's autoencoder, in bfloat16, with random weights.

    python -m benchmarks.vae --out=benchmarks/results/vae.json

Prints a Markdown table. Beside our network stands diffusers' AutoencoderKLWan in PyTorch, on the same GPU, if both are
installed. Every measurement has a process of its own, so that its peak memory is its own. --forms also measures other
ways to convolve over frames: "frames" as the library's convolution over three axes, "sums" as three convolutions of
images that are added up.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import processes, rivals
from rcm_jax import media
from rcm_jax.models import vae
from rcm_jax.models.functional import functional

TASKS = ("encode", "decode")
FORMS = ("images", "frames", "sums")


def main() -> None:
    """Measures every combination in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON of all numbers")
    parser.add_argument("--model", default="wan2.1", choices=("wan2.1", "wan2.2"))
    parser.add_argument("--shape", type=int, nargs=3, default=(81, 480, 832), metavar=("FRAMES", "ROWS", "COLUMNS"))
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs after the first, which compiles")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["images"], help="ways to convolve over frames")
    parser.add_argument("--only", metavar="TASK:LIBRARY:FORM", help="measures one, prints its JSON")
    arguments = parser.parse_args()
    if arguments.only:
        task, library, form = arguments.only.split(":")
        what = (arguments.model, task, tuple(arguments.shape), arguments.repeats)
        print(json.dumps(measure_torch(*what) if library == "torch" else measure_jax(*what, form)))
        return
    results = []
    for task in TASKS:
        for library, form in [*(("jax", form) for form in arguments.forms), ("torch", "frames")]:
            words = [*sys.argv[1:], f"--only={task}:{library}:{form}"]
            found = processes.measure_apart("benchmarks.vae", words)
            results.append({"task": task, "library": library, "form": form, **found})
            print(_row(results[-1]) if len(results) > 1 else f"{HEAD}\n{_row(results[-1])}", flush=True)
    if arguments.out:
        command = " ".join(["python -m benchmarks.vae", *sys.argv[1:]])
        media.write_file(arguments.out, media.json_text({"command": command, "results": results}, indent=1).encode())


def measure_jax(model: str, task: str, shape: tuple[int, int, int], repeats: int, form: str) -> dict[str, Any]:
    """Of our encoder or decoder on the first device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else the peak is what JAX reserves
    config, part = vae.PRESETS[model], {"encode": vae.Encoder, "decode": vae.Decoder}[task]
    network = functional(lambda rngs: part(config, dtype=jnp.bfloat16, rngs=rngs))
    halve = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)  # noqa: E731
    params = jax.jit(lambda key: halve(network.init(key)))(jax.random.key(0))
    x = jax.random.normal(jax.random.key(0), (1, *_shape(config, task, shape)))
    convolve = {"images": vae.convolve, "frames": convolve_frames, "sums": convolve_and_add}[form]
    with mock.patch.object(vae, "convolve", convolve):
        start = time.perf_counter()
        run = jax.jit(network.apply).lower(params, x).compile()
        compile_seconds = time.perf_counter() - start
    device = jax.devices()[0]
    seconds = _seconds(lambda: jax.block_until_ready(run(params, x)), repeats)
    versions = {"jax": jax.__version__, "device": device.device_kind}
    peak = processes.peak_bytes(device)
    return {"seconds": seconds, "peak_bytes": peak, "compile_seconds": compile_seconds, **versions}


def measure_torch(model: str, task: str, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Of diffusers' autoencoder on a GPU; a reason in place of numbers if that is not to be had."""
    if fault := rivals.find_fault():
        return {"missing": fault}
    import torch

    config = vae.PRESETS[model]
    network = rivals.create_autoencoder(config)
    *sizes, channels = _shape(config, task, shape)
    x = torch.randn(1, channels, *sizes, device="cuda", dtype=torch.bfloat16)

    @torch.no_grad()
    def run() -> None:
        network.encode(x) if task == "encode" else network.decode(x)
        torch.cuda.synchronize()

    seconds = _seconds(run, repeats)
    return {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated(), **rivals.find_versions()}


def convolve_frames(x_BTHWC: Any, kernel_THWIO: Any, time_stride: int) -> Any:
    """vae.convolve as one convolution over three axes."""
    margin = (kernel_THWIO.shape[1] // 2,) * 2
    return lax.conv_general_dilated(
        x_BTHWC,
        kernel_THWIO,
        (time_stride, 1, 1),
        [(0, 0), margin, margin],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def convolve_and_add(x_BTHWC: Any, kernel_THWIO: Any, time_stride: int) -> Any:
    """vae.convolve as the sum of one convolution of images for each frame under the window."""
    window, (batch, frames, *image) = len(kernel_THWIO), x_BTHWC.shape
    ends = frames - window + 1
    parts = []
    for k, kernel_HWIO in enumerate(kernel_THWIO):
        x = x_BTHWC[:, k : k + ends : time_stride].reshape(-1, *image)
        parts.append(
            lax.conv_general_dilated(x, kernel_HWIO, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
    y = sum(parts[1:], parts[0])
    return y.reshape(batch, -1, *y.shape[1:])


def _shape(config: Any, task: str, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """(frames, rows, columns, channels) of what the network takes."""
    return (*shape, 3) if task == "encode" else config.latent_shape(shape)


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


HEAD = "| task | library | convolution over | seconds | peak GiB | device |\n|---|---|---|---|---|---|"


def _row(result: dict[str, Any]) -> str:
    start = f"| {result['task']} | {result['library']} | {result['form']} |"
    if "missing" in result:
        return f"{start} {result['missing']} | | |"
    peak = processes.format_peak(result["peak_bytes"])
    return f"{start} {result['seconds']:.3f} | {peak} | {result['device']} |"


if __name__ == "__main__":
    main()
