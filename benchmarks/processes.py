"""Measurements that each have a process of their own, so that the peak memory of each is its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax


def measure_apart(module: str, words: Sequence[str]) -> dict[str, Any]:
    """The JSON that `python -m MODULE WORDS...` prints in its last line, or {"missing": why there is none}."""
    run = subprocess.run([sys.executable, "-m", module, *words], stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        return {"missing": f"the process ended with {run.returncode}"}
    return json.loads(run.stdout.splitlines()[-1])


def peak_bytes(device: jax.Device) -> int | None:
    """The most memory of a device that this process has had in use, if the device counts it."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def format_peak(peak: int | None) -> str:
    """Bytes as GiB, for a table."""
    return "not known" if peak is None else f"{peak / 2**30:.2f}"
