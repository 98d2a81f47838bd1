"""Kills one run at random, again and again, and compares what it ends with to a run that was left alone.

    python -m benchmarks.soak --kills=200 --out=benchmarks/results/soak.json --workdir=runs/soak

Every start is that of `python -m launch.train` with the same command. The signal, the moment (while it starts, at a
step, during a save) and the step come from the seed. The two runs must agree in a fingerprint of every leaf of the
state, in the position in the data, in the exported weights and in every logged number.
"""

import argparse
import collections
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from rcm_jax import media
from rcm_jax.checkpoint import export_safetensors, load_safetensors
from rcm_jax.data import digits, text

ROOT = Path(__file__).parent.parent
STEPS_PER_KILL = 10
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV)
MOMENTS = ("start", "step", "save")
PREEMPTED = 75
CLOCK = ("time", "seconds_per_step", "tokens_per_second")


def main() -> None:
    """Runs both and reports; exits with code 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--minutes", type=float, default=1e9, metavar="N", help="ends the killing after so long")
    parser.add_argument("--workdir", type=Path, default=Path("runs/soak"), metavar="DIR", help="must not exist")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON file for the result")
    arguments = parser.parse_args()
    result = soak(arguments.workdir.absolute(), arguments.kills, arguments.seed, arguments.minutes)
    print(json.dumps(result, indent=2))
    if arguments.out:
        media.write_file(arguments.out, json.dumps(result, indent=2).encode() + b"\n")
    sys.exit(not result["identical"])


def soak(workdir: Path, kills: int, seed: int, minutes: float) -> dict:
    """Kills a run up to `kills` times and returns what was done and whether the result is that of a run left alone."""
    prepare(workdir)
    total = STEPS_PER_KILL * kills
    draw, began = random.Random(seed), time.monotonic()
    counts, codes = collections.Counter(), collections.Counter()
    for kill in tqdm(range(kills), unit=" kills", disable=None):
        if time.monotonic() - began > 60 * minutes:
            break
        moment, number = draw.choice(MOMENTS), draw.choice(SIGNALS)
        step, delay = int((kill + draw.random()) * STEPS_PER_KILL), draw.uniform(0, 6)
        process = start(workdir, "killed", total)
        wait_for(process, workdir / "killed", moment, step, delay)
        process.send_signal(number)
        code = process.wait()
        if code not in (-number, PREEMPTED if number == signal.SIGTERM else -number):
            raise RuntimeError(f"{number.name} at {moment} {step} ended the run with code {code}: see killed.log")
        counts[f"{number.name} {moment}"] += 1
        codes[str(code)] += 1
    for name in ("killed", "alone"):
        if code := start(workdir, name, total).wait():
            raise RuntimeError(f"the {name} run ended with code {code}: see {workdir / name}.log")
    return {
        "kills": counts.total(),
        "steps": total,
        "seed": seed,
        "identical": outcome(workdir / "killed", total) == outcome(workdir / "alone", total),
        "signals and moments": dict(sorted(counts.items())),
        "exit codes": dict(sorted(codes.items())),
        "set aside": len(list((workdir / "killed" / "checkpoints").glob("*.damaged*"))),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, "
        f"jax {jax.__version__}",
        "command": " ".join(["python -m benchmarks.soak", *sys.argv[1:]]),
    }


def prepare(workdir: Path) -> None:
    """Makes a folder with the data that tiny_recipe.py needs."""
    workdir.mkdir(parents=True)
    digits.build(workdir, limit=2)
    export_safetensors(workdir / "negative.safetensors", {"text": text.encode([""])[0]}, {})


def start(
    workdir: Path,
    name: str,
    total: int,
    *words: str,
    changes: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """Starts or resumes the run in workdir/name, or one process of it; `changes` are those to the recipe."""
    settings = {
        "stages": f"flow_matching:{total}",
        "data.dir": workdir,
        "teacher.negative_path": workdir / "negative.safetensors",
        "checkpoint.every": 5,
        "checkpoint.keep": 2,
        **(changes or {}),
    }
    command = [sys.executable, "-m", "launch.train", "--config=benchmarks/tiny_recipe.py"]
    command += [f"--workdir={workdir / name}", *(f"--config.{key}={value}" for key, value in settings.items()), *words]
    with (workdir / f"{name}.log").open("a") as log:
        variables = os.environ | dict(environment or {})
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)


def wait_for(process: subprocess.Popen, run: Path, moment: str, step: int, delay: float) -> None:
    """Returns when the moment has come: `delay` seconds after the start, at `step`, or at the first save after it."""
    if moment == "start":
        time.sleep(delay)
        return
    while process.poll() is None and steps_done(run) < step:
        time.sleep(0.005)
    while moment == "save" and process.poll() is None and not any(run.glob("checkpoints/*.orbax-checkpoint-tmp")):
        time.sleep(0.001)


def steps_done(run: Path) -> int:
    """The last iteration in metrics.jsonl."""
    lines = read_lines(run)
    return lines[-1]["iteration"] if lines else 0


def read_lines(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def outcome(run: Path, total: int) -> tuple:
    """Everything in which two runs must agree."""
    description = json.loads((run / "checkpoints" / str(total) / "description" / "metadata").read_text())
    tensors = [load_safetensors(run / f"{name}.safetensors")[0] for name in ("student", "ema")]
    weights = {f"{i}/{name}": np.asarray(x).tobytes() for i, file in enumerate(tensors) for name, x in file.items()}
    lines = [{name: value for name, value in line.items() if name not in CLOCK} for line in read_lines(run)]
    return description, weights, lines


if __name__ == "__main__":
    main()
