"""How libtpu schedules the TPU attention kernels, on a machine without a TPU.

    python -m benchmarks.attention_tpu --out=benchmarks/results/attention_tpu.json

Prints a Markdown table: for one tile away from the edges, the instruction bundles (a core issues one a cycle), and what
share of them the instructions of each unit would fill alone. The fullest unit is the bound. Stalls and memory are not
in it, so it is no time, but it shows what a change to a kernel or its tile does to the code. It reads what libtpu
writes for its own developers: another version than 0.0.42 may write something else.
"""

import argparse
import functools
import os
import platform
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels import mosaic_tpu
from rcm_jax import media

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
KERNELS = ("forward", "forward_with_tangent", "backward")
UNITS = {"MXU": "matrix", "VALU": "vector", "EUP": "exp2", "XLU": "lanes", "VLOAD": "load", "VSTORE": "store"}


def main() -> None:
    """Compiles every kernel for every chip, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of the table")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1024], help="queries, and keys, of a tile")
    parser.add_argument("--head_dim", type=int, default=128)
    arguments = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as dump:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        print("| chip | kernel | rows | bundles |", " | ".join(UNITS.values()), "|")
        print("|---" * (4 + len(UNITS)) + "|")
        for chip in arguments.chips:
            for kernel in arguments.kernels:
                for rows in arguments.rows:
                    compile_kernel(chip, kernel, rows, arguments.head_dim)
                    bundles, shares = read_schedule(Path(dump))
                    table.append({"chip": chip, "kernel": kernel, "rows": rows, "bundles": bundles, **shares})
                    print(f"| {chip} | {kernel} | {rows} | {bundles} |", *(f"{x:.0%} |" for x in shares.values()))
    facts = {"command": " ".join(["python -m benchmarks.attention_tpu", *sys.argv[1:]]), "machine": platform.machine()}
    facts |= {"head_dim": arguments.head_dim, "jax": jax.__version__, "libtpu": version("libtpu"), "table": table}
    media.write_file(arguments.out, media.json_text(facts, indent=1).encode() + b"\n")


def compile_kernel(chip: str, kernel: str, rows: int, head_dim: int) -> None:
    """Compiles one kernel in bfloat16 at a length that its tiles divide."""
    device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
    array = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    x, lse = array((1, 4 * rows, 1, head_dim), jnp.bfloat16), array((1, 1, 4 * rows), jnp.float32)
    arguments = {"forward": 3 * [x], "forward_with_tangent": 6 * [x], "backward": [x, x, x, x, lse, x, lse]}[kernel]
    with mock.patch.object(mosaic_tpu, "ROW_BYTES", 2 * rows):
        jax.jit(functools.partial(getattr(mosaic_tpu, kernel), scale=0.1)).lower(*arguments).compile()


def read_schedule(dump: Path) -> tuple[int, dict[str, float]]:
    """(bundles, shares) of the shortest piece of code with nearly all matrix instructions. Empties the directory."""
    (bundles,) = dump.glob("*-attention*[0-9]-final_bundles.txt")
    (utilization,) = dump.glob("*-attention*-final_hlo-static-per-bundle-utilization.txt")
    regions = read_regions(bundles.read_text())
    head, rows = utilization.read_text().split("== UTILIZATION:\n")
    units, capacities = (re.split(r"[,\s]+", line.strip()) for line in head.splitlines()[1:3])
    used = [[int(x) for x in row.split()] for row in rows.splitlines() if row.strip()]
    for file in dump.iterdir():
        file.unlink()

    def slots(region: tuple[int, int], unit: str) -> int:
        return sum(row[units.index(unit)] for row in used[slice(*region)])

    most = max(slots(region, "MXU") for region in regions)
    begin, end = min((x for x in regions if slots(x, "MXU") > 0.9 * most), key=lambda x: x[1] - x[0])
    shares = {
        name: slots((begin, end), unit) / int(capacities[units.index(unit)]) / (end - begin)
        for unit, name in UNITS.items()
    }
    return end - begin, shares


def read_regions(bundles: str) -> list[tuple[int, int]]:
    """The pieces of code between branches, as addresses of their first bundle and of the one behind the last."""
    address, begins, regions = 0, {}, []
    for line in bundles.splitlines():
        if bundle := re.match(r"\s*(0x[0-9a-f]+|0) ", line):
            address = int(bundle[1], 16)
        begins |= {region: address for region in re.findall(r"Start region (\d+)", line)}
        regions += [(begins[x], address + 1) for x in re.findall(r"End region (\d+)", line) if x in begins]
    return regions


if __name__ == "__main__":
    main()
