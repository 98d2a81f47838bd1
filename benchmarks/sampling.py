"""Time and memory of sampling a published model, stage by stage, in bfloat16, with random weights.

    python -m benchmarks.sampling --model=wan2.1-t2v-1.3b --sampler=few-step-sde --steps=4 --out=sampling.json

Prints a Markdown table. Beside ours stand the parts of diffusers' pipeline in PyTorch, the network compiled, on the
same GPU, if they are installed (distilled Wan models only). Every measurement has a process of its own, so that its
peak memory is its own. Reading checkpoints is left out; of the whole, the frames a second count what is done for each
video: caption, network and decoder.
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

import jax
import jax.numpy as jnp

from benchmarks import processes, rivals
from rcm_jax import inference, media
from rcm_jax.convert.loading import in_dtype
from rcm_jax.models import umt5, vae
from rcm_jax.models.functional import functional
from rcm_jax.models.presets import PRESETS, create_network
from rcm_jax.published import FEW_STEPS, SAMPLERS, find_published, parse_size

STAGES = ("text", "network", "decoder")
LIBRARIES = ("jax", "torch")
HEAD = "| stage | library | seconds | first run | peak GiB | device |\n|---|---|---|---|---|---|"


def main(argv: list[str] | None = None) -> None:
    """Measures every stage in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.1-t2v-1.3b", help="a published text-to-video or text-to-image model")
    parser.add_argument("--size", metavar="WxH", help="default: the model's")
    parser.add_argument("--frames", type=int, metavar="N", help="default: the model's")
    parser.add_argument("--sampler", choices=SAMPLERS, default="few-step-sde")
    parser.add_argument("--steps", type=int, default=FEW_STEPS, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs after the first, which compiles")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON of all numbers")
    parser.add_argument("--only", metavar="STAGE:LIBRARY", help="measures one in this process, prints its JSON")
    arguments = parser.parse_args(argv)
    if arguments.only:
        stage, library = arguments.only.split(":")
        print(json.dumps({"jax": measure, "torch": measure_torch}[library](stage, arguments)))
        return
    words = sys.argv[1:] if argv is None else argv
    results = {library: {} for library in LIBRARIES}
    print(HEAD)
    for stage in STAGES:
        for library, found in results.items():
            found[stage] = processes.measure_apart("benchmarks.sampling", [*words, f"--only={stage}:{library}"])
            print(_row(stage, library, found[stage]), flush=True)
    frames = arguments.frames or find_published(arguments.model).frames
    for library, found in results.items():
        if all("seconds" in result for result in found.values()):
            rate = frames / sum(result["seconds"] for result in found.values())
            print(f"\n{library}: {rate:.1f} frames a second")
    if arguments.out:
        command = " ".join(["python -m benchmarks.sampling", *words])
        media.write_file(arguments.out, media.json_text({"command": command, **results}, indent=1).encode())


def measure(stage: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a stage for one video, compiled and the first time, and the peak of the device's memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else the peak is what JAX reserves
    run = {"text": prepare_text, "network": prepare_network, "decoder": prepare_decoder}[stage](arguments)
    first, *others = (_seconds(run) for _ in range(1 + arguments.repeats))
    device = jax.devices()[0]
    return {
        "seconds": statistics.median(others or [first]),
        "first_seconds": first,
        "peak_bytes": processes.peak_bytes(device),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def measure_torch(stage: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same of the rival's part; a reason in place of numbers if that is not to be had."""
    published = find_published(arguments.model)
    fault = rivals.find_fault()
    if published.text_encoder != "umt5-xxl" or not arguments.sampler.startswith("few-step"):
        fault = "the rival is measured for distilled Wan models only"
    if fault:
        return {"missing": fault}
    import torch

    prepare = {"text": torch_text, "network": torch_network, "decoder": torch_decoder}[stage]
    *sizes, channels = _latent_shape(arguments)
    x_BCTHW = torch.randn(1, channels, *sizes, device="cuda", dtype=torch.bfloat16)
    run = prepare(arguments, x_BCTHW)

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.no_grad():
        first, *others = (seconds() for _ in range(1 + arguments.repeats))
    times = {"seconds": statistics.median(others or [first]), "first_seconds": first}
    return times | {"peak_bytes": torch.cuda.max_memory_allocated(), **rivals.find_versions()}


def torch_text(arguments: argparse.Namespace, x_BCTHW: Any) -> Callable[[], Any]:
    """transformers' encoder on one caption."""
    encoder = rivals.create_text_encoder(umt5.PRESETS[find_published(arguments.model).text_encoder])
    ids_BS = x_BCTHW.new_ones((1, umt5.TEXT_LENGTH)).long()
    return lambda: encoder(ids_BS, attention_mask=ids_BS)


def torch_network(arguments: argparse.Namespace, x_BCTHW: Any) -> Callable[[], Any]:
    """diffusers' network, once for each step."""
    config = PRESETS[arguments.model]
    network, time_B = rivals.create_transformer(config), x_BCTHW.new_full((1,), 500.0).float()
    text_BSD = x_BCTHW.new_empty((1, config.text_length, config.text_dim)).normal_()
    return lambda: [network(x_BCTHW, time_B, text_BSD, return_dict=False) for _ in range(arguments.steps)]


def torch_decoder(arguments: argparse.Namespace, x_BCTHW: Any) -> Callable[[], Any]:
    """diffusers' decoder on one latent."""
    autoencoder = rivals.create_autoencoder(vae.PRESETS[find_published(arguments.model).vae])
    return lambda: autoencoder.decode(x_BCTHW)


def prepare_text(arguments: argparse.Namespace) -> Callable[[], Any]:
    """Encodes one caption."""
    config = umt5.PRESETS[find_published(arguments.model).text_encoder]
    network = functional(lambda rngs: umt5.T5Encoder(config, dtype=jnp.bfloat16, rngs=rngs))
    params, apply = random_params(network), jax.jit(network.apply)
    ids_BS = jnp.ones((1, umt5.TEXT_LENGTH), jnp.int32)
    return lambda: apply(params, ids_BS, ids_BS > 0)


def prepare_network(arguments: argparse.Namespace) -> Callable[[], Any]:
    """Samples one latent, with guidance if the sampler is a teacher's."""
    config, published = PRESETS[arguments.model], find_published(arguments.model)
    guidance = 1.0 if arguments.sampler.startswith("few-step") else published.guidance[0]
    settings = inference.Settings(arguments.sampler, arguments.steps, (guidance,), published.shift)
    network = create_network(config, dtype=jnp.bfloat16)
    params, text_BSD = random_params(network), _random((1, config.text_length, config.text_dim))
    shape_THWC = _latent_shape(arguments)

    def velocity(x_BTHWC: jax.Array, s_B: jax.Array) -> jax.Array:
        return inference.evaluate(network, params, x_BTHWC, s_B, text_BSD, text_BSD, inference.Condition(), guidance)

    return lambda: inference.sample_latent(velocity, 0, shape_THWC, settings)


def prepare_decoder(arguments: argparse.Namespace) -> Callable[[], Any]:
    """Decodes one latent."""
    config = vae.PRESETS[find_published(arguments.model).vae]
    network = functional(lambda rngs: vae.Decoder(config, dtype=jnp.bfloat16, rngs=rngs))
    params, apply = random_params(network), jax.jit(network.apply)
    latent_BTHWC = _random((1, *_latent_shape(arguments)))
    return lambda: apply(params, latent_BTHWC)


def random_params(network: Any) -> dict[str, Any]:
    """Small random numbers, in the dtypes of loaded checkpoints."""
    leaves, structure = jax.tree.flatten(in_dtype(network.abstract_params(), jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = jax.jit(lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=(1, 2))
    return structure.unflatten([draw(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)])


def _random(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def _latent_shape(arguments: argparse.Namespace) -> tuple[int, int, int, int]:
    published = find_published(arguments.model)
    columns, rows = parse_size(arguments.size or published.size)
    return vae.PRESETS[published.vae].latent_shape((arguments.frames or published.frames, rows, columns))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def _row(stage: str, library: str, result: dict[str, Any]) -> str:
    if "missing" in result:
        return f"| {stage} | {library} | {result['missing']} | | | |"
    times = f"{result['seconds']:.3f} | {result['first_seconds']:.1f}"
    return f"| {stage} | {library} | {times} | {processes.format_peak(result['peak_bytes'])} | {result['device']} |"


if __name__ == "__main__":
    main()
