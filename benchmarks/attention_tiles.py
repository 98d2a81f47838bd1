"""Finds the tiles of our Hopper kernels: times every candidate that compiles, for each pass and head dim.

    python -m benchmarks.attention_tiles --out=benchmarks/results/attention_tiles.json

On an NVIDIA Hopper GPU. The best go into TILES of pallas_kernels/mosaic_gpu.py by hand.
"""

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any

import jax

from benchmarks.attention import compete, draw, jax_contestant
from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu import Tiles
from rcm_jax import media

SHAPES = ((1, 12, 8192, 8192, 128), (1, 12, 32760, 32760, 128), (1, 12, 32760, 512, 128), (4, 16, 4096, 4096, 64))
CANDIDATES = {
    "value": [Tiles(*x) for x in itertools.product((64, 128), (2, 3))],
    "value and tangent": [Tiles(*x) for x in itertools.product((64, 128), (2, 3))],
    "dq": [Tiles(*x) for x in itertools.product((64, 128), (2, 3))],
    "dk_dv": [Tiles(64, 2), Tiles(64, 3), Tiles(64, 4)],
}


def main() -> None:
    """Times all candidates, prints the ranking of each pass and shape, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all times")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each candidate")
    arguments = parser.parse_args()
    rows = []
    for shape, name in itertools.product(SHAPES, CANDIDATES):
        times = rank(shape, name, arguments.rounds)
        rows += [{"shape": shape, "pass": name, "tiles": tiles, "ms": ms} for tiles, ms in times]
        print(shape, name, ", ".join(f"{tiles}: {ms:.3f} ms" for tiles, ms in times[:4]), flush=True)
    facts = {"device": jax.devices()[0].device_kind, "rows": rows}
    media.write_file(arguments.out, media.json_text(facts, indent=1).encode())


def rank(shape: tuple[int, ...], name: str, rounds: int) -> list[tuple[str, float]]:
    """(tiles, milliseconds) of the candidates that compile, the fastest first."""
    inputs = draw(shape)
    q, k, v, dout = (inputs[x] for x in ("q", "k", "v", "dout"))
    scale = shape[-1] ** -0.5
    out, lse = mosaic_gpu.forward(q, k, v, scale=scale)

    def contestant(tiles: Tiles) -> Any:
        if name == "value":
            return jax_contestant(functools.partial(mosaic_gpu.forward, scale=scale, tiles=tiles), q, k, v)
        if name == "value and tangent":
            tangents = (inputs[x] for x in ("tq", "tk", "tv"))
            run = functools.partial(mosaic_gpu.forward_with_tangent, scale=scale, tiles=tiles)
            return jax_contestant(run, q, k, v, *tangents)
        # The compiler drops the kernel whose result is not returned.
        tiles_of = {f"{name}_tiles": tiles}
        results = slice(0, 1) if name == "dq" else slice(1, 3)

        def gradient(q, k, v, out, lse, dout):
            return mosaic_gpu.backward(q, k, v, out, lse, dout, None, scale=scale, **tiles_of)[results]

        return jax_contestant(gradient, q, k, v, out, lse, dout)

    contestants = {str(tuple(tiles)): contestant(tiles) for tiles in CANDIDATES[name]}
    times = [(tiles, ms) for tiles, ms, _ in compete(contestants, rounds)]
    return sorted(times, key=lambda x: x[1])


if __name__ == "__main__":
    main()
