"""Compiles a recipe's training steps for TPUs or GPUs, which need not be there, and says whether they fit.

    python -m launch.compile --config=configs/wan2_1_t2v_14b.py --topology=v5p:4x4x4 --config.mesh.fsdp=64
    python -m launch.compile --config=configs/wan2_1_t2v_1_3b.py --topology=h200:8x8 --config.mesh.fsdp=8

A topology is a TPU and the shape of its slice, or a GPU, hosts and GPUs of a host. Neither weights nor data are read.
Without --topology it compiles for the GPUs or TPUs of this machine. Printed are the memory of a device, the operations
it carries out, the bytes it receives from others, and the least time that a step can take: that of the busiest of its
units at its peak rate, as if the others' work hid behind it. Between hosts of GPUs bytes count at the rate within one.

Exit codes: 0 every step fits; 1 one does not; 2 a mistake to mend.
"""

import os
import sys
from pathlib import Path
from typing import Any

from rcm_jax import options
from rcm_jax.config import Command

LATENT = (21, 60, 104)  # of 81 frames of 480 x 832 pixels


def main() -> None:
    """Reads the command line, compiles, reports."""
    command = Command(__doc__)
    command.add_argument("--topology", metavar="CHIP:SHAPE", help="v5p:4x4x4, h200:8x8, ...")
    command.add_argument("--latent", type=int, nargs=3, default=LATENT, metavar=("T", "H", "W"), help="size of a video")
    command.add_argument("--out", type=Path, metavar="FILE", help="also writes the numbers as JSON")
    arguments, config = command.parse()
    with command.reports_user_errors():
        if arguments.out:
            options.check_target("--out", arguments.out, kind="file")
        if arguments.topology:  # libtpu need not ask the cloud for TPUs, nor lock them
            os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        import jax  # only now: a mistake on the command line need not wait for it

        from rcm_jax import chips, media, plan

        if arguments.topology:  # nor does CUDA's plugin look for GPUs and the rest of CUDA
            jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # JAX cannot load programs of devices it does not see
        devices = chips.topology_devices(arguments.topology) if arguments.topology else jax.devices()
        where = arguments.topology or devices[0].device_kind
        print(f"compiling {arguments.config} for {len(devices)} devices of {where}", flush=True)
        rows, progress = [], lambda seconds: print(f"{seconds:.0f} s", file=sys.stderr, flush=True)
        for row in plan.compile_steps(config, devices, arguments.latent, progress):
            rows.append(row)
            print(step_text(row, chips.chip_of(devices[0]).memory), flush=True)
        fits = all(row["fits"] for row in rows)
        if fits:
            print(run_text(rows, len(devices)))
        for note in plan.gpu_notes(rows, devices):
            print(note)
        if arguments.out:
            numbers = {"config": arguments.config, "topology": where, "devices": len(devices), "jax": jax.__version__}
            numbers |= {"mesh": config.mesh.to_dict(), "latent": arguments.latent, "steps": rows}
            media.write_file(arguments.out, media.json_text(numbers, indent=1).encode())
    sys.exit(0 if fits else 1)


def step_text(row: dict[str, Any], limit: float) -> str:
    """What was found out about a step, in a few lines; `limit` is the memory of a device in GiB."""
    title = f"{row['step']}: {row['iterations']:,} iterations, compiled after {row['compile_seconds']} s"
    if "memory" not in row:
        return f"{title}\n  does not fit: {row['reason']}"
    parts = " + ".join(f"{size:.1f} {name}" for name, size in row["memory"].items() if name != "total")
    received = ", ".join(f"{kind} {amount:.1f}" for kind, amount in row["received_gb"].items())
    seconds = ", ".join(f"{unit} {time:.2f}" for unit, time in row["seconds"].items() if unit != "least")
    return (
        f"{title}\n"
        f"  memory, GiB: {parts} = {row['memory']['total']:.1f} of {limit}{'' if row['fits'] else ': does not fit'}\n"
        f"  operations, TFLOP: {row['tflop']:,.0f}, of them the model's {row['model_tflop']:,.0f}\n"
        f"  received, GB: {received or 'nothing'}\n"
        f"  at peak rates, s: {seconds}; at least {row['seconds']['least']:.2f} a step"
    )


def run_text(rows: list[dict[str, Any]], devices: int) -> str:
    """The least time of the whole run."""
    hours = sum(row["iterations"] * row["seconds"]["least"] for row in rows) / 3600
    iterations = sum(row["iterations"] for row in rows)
    return f"all fit; {iterations:,} iterations take at least {hours:,.0f} hours, {hours * devices:,.0f} device-hours"


if __name__ == "__main__":
    main()
