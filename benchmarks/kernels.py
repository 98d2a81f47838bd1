"""Which kernels a computation spends its time in, from JAX's profiler."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# The names of kernels: what moves data between devices, ours and cuDNN's attention, then cuBLAS' and Triton's matrix
# products. Anything else is none of these.
KINDS = {
    "exchange": r"nccl|MemcpyP2P|MemcpyPeer",
    "attention": r"mosaic|sdpa|flash|attention",
    "products": r"gemm|nvjet|xmma|cutlass|matmul|dot",
}


def profile(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of `run()`, the longest first: name, kind, seconds, calls, of all devices together.

    XLA must not have recorded them into command buffers, which the profiler sees as one kernel each.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    seconds, calls = Counter(), Counter()
    for name, duration in _events(data):
        seconds[name] += duration * 1e-9
        calls[name] += 1
    return [
        {"kernel": name, "kind": kind_of(name), "seconds": total, "calls": calls[name]}
        for name, total in seconds.most_common()
    ]


def kind_of(kernel: str) -> str:
    """One of KINDS, or "other"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def shares(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """The share of each kind in the time of all kernels."""
    seconds = Counter()
    for kernel in kernels:
        seconds[kernel["kind"]] += kernel["seconds"]
    return {kind: seconds[kind] / seconds.total() for kind in (*KINDS, "other")}


def _events(data: Any):
    """(kernel, nanoseconds) of everything that ran on streams of a GPU, or on threads of XLA's CPU client."""
    for plane in data.planes:
        for line in plane.lines:
            if line.name.startswith("Stream") if "GPU" in plane.name else line.name.startswith("tf_XLAPjRtCpuClient"):
                yield from ((event.name, event.duration_ns) for event in line.events)
