"""A training step on one device and on several of one host, by kind of parallelism: Wan 1.3B at 480p, random weights.

    python -m benchmarks.scaling --out=benchmarks/results/scaling.json

By data and fsdp every device has a sample, by context and tensor all devices share one. The gain is that in samples a
second over one device. Every mesh is measured by `benchmarks.step` in a process of its own, which says what is
measured; words that are unknown here are handed on to it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from rcm_jax import media, sharding


def main() -> None:
    """Measures every mesh, prints a Markdown table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all measurements")
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="of the larger meshes (default: 2)")
    parser.add_argument("--axes", nargs="+", choices=sharding.AXES, default=sharding.AXES, help="which (default: all)")
    parser.add_argument("--parts", nargs="+", default=["sCM step"], metavar="PART", help="see benchmarks.step")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="values of the recipe to change")
    arguments, words = parser.parse_known_args()
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.scaling", *sys.argv[1:]]),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "meshes": {},
    }
    for axis in (None, *arguments.axes):
        devices = 1 if axis is None else arguments.devices
        results["meshes"][axis or "one device"] = measure(axis, devices, arguments, words)
        media.write_file(arguments.out, media.json_text(results, indent=1).encode())
        print(f"{axis or 'one device'}: done", flush=True)
    print(table(results))


def measure(axis: str | None, devices: int, arguments: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """What benchmarks.step finds with `devices` along an axis: its rows, with the samples of an update."""
    samples = devices if axis in sharding.BATCH else 1
    mesh = {"data": 1} | ({axis: devices} if axis else {})
    overrides = [f"data.batch_size={samples}", *(f"mesh.{name}={size}" for name, size in mesh.items())]
    visible = ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[:devices])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "JAX_NUM_CPU_DEVICES": str(devices)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = [sys.executable, "-m", "benchmarks.step", f"--out={out}", "--parts", *arguments.parts]
        command += ["--override", *arguments.override, *overrides, *words]
        if code := subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
            return {"missing": f"the process ended with {code}"}
        return {"samples": samples} | json.loads(out.read_text())


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a results file. Memory is that of a device's temporaries, beside the state."""
    lines = ["| part | mesh | devices | samples | ms | gain | memory, GiB | first loss |", "|---" * 8 + "|"]
    alone = {row["part"]: row for row in results["meshes"]["one device"].get("rows", [])}
    for mesh, found in results["meshes"].items():
        if "missing" in found:
            lines.append(f"| - | {mesh} | - | - | {found['missing']} | - | - | - |")
            continue
        for row in found["rows"]:
            gain = found["samples"] * alone[row["part"]]["seconds"] / row["seconds"] if row["part"] in alone else None
            cells = [row["part"], mesh, str(found["devices"]), str(found["samples"]), f"{row['seconds'] * 1e3:,.0f}"]
            cells += ["-" if gain is None else f"{gain:.2f}", f"{row['bytes'] / 2**30:.1f}"]
            lines.append(f"| {' | '.join([*cells, first_loss(row)])} |")
    return "\n".join(lines)


def first_loss(row: dict[str, Any]) -> str:
    """Of the first update, which no mesh may change."""
    return f"{next(iter(row['first'].values())):.6g}" if "first" in row else "-"


if __name__ == "__main__":
    main()
