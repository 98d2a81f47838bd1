"""Kills one of two processes that train together, a device each, and lets one device alone end their run.

    python -m benchmarks.pair --out=benchmarks/results/pair.json --workdir=runs/pair

It takes two GPUs, or CPU cores where there are none, and does so twice: the first process is killed while it saves, the
second at a step, both by SIGKILL half way. Each time the other must end too, and one process with one device goes on
from the last checkpoint. Its end is compared with that of a run that had one device throughout. Sums over two devices
are in another order than over one, so the two agree to float32's error and not to the bit.
"""

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import soak
from rcm_jax import media
from rcm_jax.checkpoint import load_safetensors

CASES = {"save": 0, "step": 1}  # when, and which process is killed
# As launch/host.sh does: seconds that the other has to end by itself, and starts, for one may fail by itself.
GRACE, STARTS = 60, 5
# Of the norm of a tensor, and of a loss. Adam turns where a gradient is all rounding: weights keep fewer digits.
WEIGHTS_LIMIT, LOSS_LIMIT = 1e-3, 1e-4
# Products in float32 proper: by default GPUs round their factors to TF32.
PRECISION = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}


def main() -> None:
    """Runs all and reports; exits with code 1 if a run ends otherwise than the one with one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of each run (default: %(default)s)")
    parser.add_argument("--moments", nargs="+", choices=CASES, default=list(CASES), help="of a kill (default: both)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/pair"), metavar="DIR", help="must not exist")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON file for the result")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # this process leaves the GPUs to those that it starts
    workdir = arguments.workdir.absolute()
    soak.prepare(workdir)
    finish_alone(workdir, "alone", arguments.steps)
    cases = {
        f"{moment}, process {CASES[moment]}": kill_one(workdir, moment, CASES[moment], arguments.steps)
        for moment in arguments.moments
    }
    result = {
        "steps": arguments.steps,
        "agree": all(
            case["weights"] <= WEIGHTS_LIMIT and case["losses"] <= LOSS_LIMIT and not case["set aside"]
            for case in cases.values()
        ),
        "killed at": cases,
        "device": read_devices(workdir / "alone")["kind"],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, "
        f"jax {jax.__version__}",
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        media.write_file(arguments.out, json.dumps(result, indent=2).encode() + b"\n")
    sys.exit(not result["agree"])


def finish_alone(workdir: Path, name: str, steps: int) -> None:
    """Ends the run in workdir/name by one process with one device."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    environment = PRECISION | {"JAX_NUM_CPU_DEVICES": "1", "CUDA_VISIBLE_DEVICES": first}
    if code := soak.start(workdir, name, steps, environment=environment).wait():
        raise RuntimeError(f"the run on one device ended with code {code}: see {workdir / name}.log")


def start_two(workdir: Path, name: str, steps: int) -> list[subprocess.Popen]:
    """Starts two processes of the run in workdir/name, with a device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = PRECISION | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
    return [
        soak.start(
            workdir,
            name,
            steps,
            "--distributed",
            changes={"mesh.fsdp": 2},
            environment=shared | {"JAX_PROCESS_ID": str(index), "JAX_LOCAL_DEVICE_IDS": str(index)},
        )
        for index in range(2)
    ]


def kill_one(workdir: Path, moment: str, victim: int, steps: int) -> dict:
    """Kills a process of two at a moment, ends their run on one device and returns what was seen."""
    name = f"killed_at_a_{moment}"
    for _ in range(STARTS):
        processes = start_two(workdir, name, steps)
        soak.wait_for(processes[victim], workdir / name, moment, steps // 2, 0)
        processes[victim].kill()
        seconds = end(processes[1 - victim])
        codes = [process.wait() for process in processes]
        if codes[victim] == -signal.SIGKILL:
            break
    else:
        raise RuntimeError(f"the two processes ended with codes {codes} before: see {workdir / name}.log")
    checkpoints = workdir / name / "checkpoints"
    torn = [path.name for path in checkpoints.glob("*.orbax-checkpoint-tmp")]
    saved = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    reached, before = soak.steps_done(workdir / name), read_devices(workdir / name)
    finish_alone(workdir, name, steps)
    return {
        "devices before and after": [before["count"], read_devices(workdir / name)["count"]],
        "reached": reached,
        "saved": saved,
        "torn saves": len(torn),
        "exit codes": codes,
        "seconds until the other ended": round(seconds, 1),
        "set aside": len(list(checkpoints.glob("*.damaged*"))),
        **differences(workdir / name, workdir / "alone"),
    }


def end(process: subprocess.Popen) -> float:
    """Waits until a process has ended, kills it after a while, and returns the seconds it took."""
    began = time.monotonic()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
    return time.monotonic() - began


def read_devices(run: Path) -> dict:
    """What run.json says of the devices of the last start."""
    return json.loads((run / "run.json").read_text())["devices"]


def differences(run: Path, reference: Path) -> dict[str, float]:
    """The largest relative difference of a tensor's norm and of a logged loss between the ends of two runs."""
    files = [
        [load_safetensors(folder / f"{name}.safetensors")[0] for name in ("student", "ema")]
        for folder in (run, reference)
    ]
    weights = [
        float(np.linalg.norm(ours[name] - tensor) / np.linalg.norm(tensor))
        for ours, theirs in zip(*files, strict=True)
        for name, tensor in theirs.items()
    ]
    ours, theirs = ([line["loss"] for line in soak.read_lines(folder)] for folder in (run, reference))
    losses = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return {"weights": max(weights), "losses": max(losses)}


if __name__ == "__main__":
    main()
