"""Peak memory and time of conversions of full-size checkpoints of zeros, each in a process of its own.

    python -m benchmarks.convert_memory --models=wan2.1-t2v-1.3b,wan2.1-t2v-14b --workdir=/tmp/conversions \
        --out=benchmarks/results/convert_memory.json

The sources take no space, since holes in a file and absent chunks of an array read as zeros. The largest target takes
28.6 GB and is removed after its conversion.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from rcm_jax import media
from rcm_jax.convert import families, orbax, safetensors_file
from rcm_jax.convert.conversion import SHARD_BYTES, STEM
from rcm_jax.convert.tensors import BFLOAT16, LazyTensor
from rcm_jax.models.presets import PRESETS

CONVERSIONS = (("wan", "orbax"), ("orbax", "wan"), ("wan", "rcm"), ("wan", "diffusers"))


def main() -> None:
    """Reads the command line, converts, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="wan2.1-t2v-1.3b,wan2.1-t2v-14b", help="presets, with commas between")
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="where the checkpoints lie")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the JSON to write")
    arguments = parser.parse_args()
    rows = []
    print(f"| {'conversion':36} | GB | peak MiB | s |\n|---|---|---|---|")
    for model in arguments.models.split(","):
        for source_layout, to in CONVERSIONS:
            source, target = (arguments.workdir / f"{model}.{name}" for name in ("source", f"{to}.pth"))
            target = target if to == "rcm" else target.with_suffix("")
            write_holes(source, model, source_layout)
            rows.append(measure(source, target, model, f"{source_layout} to {to}", to))
            remove(source)
            remove(target)
            facts = {"command": sys.argv, "machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": rows}
            media.write_file(arguments.out, media.json_text(facts, indent=2).encode() + b"\n")


def write_holes(folder: Path, model: str, layout: str) -> None:
    """A checkpoint of zeros, bfloat16, in Wan's own layout or ours, without the zeros."""
    family, config = families.find_model(model)[0], PRESETS[model]
    tensors = {
        name: LazyTensor(shape, BFLOAT16, lambda: np.empty(0, BFLOAT16))
        for name, shape in families.tensor_shapes(family, config).items()
    }
    if layout == "orbax":
        plan = orbax.plan_checkpoint(families.stacked(tensors, family, config), {})
        plan.finish(folder, {piece.key: (0, 0) for piece in plan.pieces})
        return
    plan = safetensors_file.plan_sharded(STEM, families.arranged(tensors, family, "wan", config), SHARD_BYTES)
    plan.finish(folder, {})
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            file.truncate(8 + length + max(ends))


def measure(source: Path, target: Path, model: str, conversion: str, to: str) -> dict[str, object]:
    """Converts in a process of its own; its peak resident memory is what the kernel counted."""
    command = [sys.executable, "-m", "launch.convert", str(source), str(target), "--model", model, "--to", to]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    peak = usage.ru_maxrss / 1024
    name = f"{model}, {conversion}"
    print(f"| {name:36} | {size / 1e9:.2f} | {peak:.0f} | {seconds:.0f} |", flush=True)
    return {"conversion": name, "bytes": size, "peak_mib": round(peak), "seconds": round(seconds, 1)}


def remove(path: Path) -> None:
    """Removes a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


if __name__ == "__main__":
    main()
