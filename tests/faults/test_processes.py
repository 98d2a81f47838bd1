"""Several processes of one run, sharded over all: they end together, and any number of them can go on."""

import functools
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from rcm_jax.checkpoint import load_safetensors

PREEMPTED = 75
TWO_DEVICES = {"JAX_NUM_CPU_DEVICES": "2"}
SHARDED = ("mesh.fsdp=2", "checkpoint.every=10")  # processes wait for each other at every save


def start_two(run, *overrides, devices=1):
    """Two processes of so many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": str(devices)}
    return [
        run.start(
            *SHARDED,
            *overrides,
            words=("--distributed",),
            environment=shared | {"JAX_PROCESS_ID": str(index)},
        )
        for index in range(2)
    ]


@pytest.fixture(scope="module")
def on_two_devices(make_run):
    run = make_run("two_devices")
    process = run.start(*SHARDED, environment=TWO_DEVICES)
    assert process.wait() == 0, process.output
    return run


def test_two_processes_end_together_and_one_goes_on_alone(on_two_devices, make_run):
    """SIGTERM to one; then one hangs; then a single process with as many devices ends the run."""
    run = make_run("two_processes")
    first, second = start_two(run)
    first.wait_until(lambda: 10 in run.saved())
    second.send_signal(signal.SIGTERM)
    assert (first.wait(), second.wait()) == (PREEMPTED, PREEMPTED), first.output + second.output
    ended_at = run.saved()[-1]
    assert ended_at < 40
    for process in (first, second):
        assert f"saved iteration {ended_at}, the same command continues" in process.output

    first, second = start_two(run, "faults.hang_seconds=30")  # more than a start needs
    first.wait_until(lambda: f"iter {ended_at + 1:2}/40" in first.output)
    second.send_signal(signal.SIGSTOP)
    assert first.wait() == 1, first.output
    assert "Timeout (0:00:30)!" in first.output
    assert first.output.count("hread 0x") >= 2
    assert "rcm_jax/train.py" in first.output
    second.send_signal(signal.SIGCONT)
    assert second.wait() not in (0, PREEMPTED)

    process = run.start(*SHARDED, environment=TWO_DEVICES)
    assert process.wait() == 0, process.output
    run.assert_ends_as(on_two_devices)


def test_another_mesh_changes_no_more_than_rounding(on_two_devices, undisturbed):
    """Adam's update may turn where a gradient is all rounding: norms are compared, after 40 steps."""
    one, two = (load_safetensors(run.workdir / "ema.safetensors")[0] for run in (undisturbed, on_two_devices))
    for name, tensor in one.items():
        assert np.linalg.norm(tensor - two[name]) <= 1e-3 * np.linalg.norm(tensor), name


def test_two_processes_of_four_devices_share_the_tokens_and_heads_of_every_sample(make_run, undisturbed):
    """Both work on the same samples; their losses are those of one device, to a hundred roundings of float32."""
    run, steps = make_run("two_times_four"), 6
    sizes = ("mesh.data=1", "mesh.fsdp=1", "mesh.context=4", "mesh.tensor=2")
    first, second = start_two(run, *sizes, f"stages=flow_matching:{steps}", devices=4)
    assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    expected, found = ([record["loss"] for record in each.records()] for each in (undisturbed, run))
    np.testing.assert_allclose(found, expected[:steps], rtol=1e-5)


def children(pid: int) -> list[int]:
    """The processes of `launch.train` that a process started."""
    started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in started if b"launch.train" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_host_ends_all_its_processes_when_one_dies_and_starts_them_again(on_two_devices, make_run, tmp_path):
    """SIGTERM to the script: all save and end. Started again, one is killed; then the run goes on by itself."""
    run = make_run("host")
    script = ("launch/host.sh", "--processes=2", f"--logs={tmp_path}", "--")
    start = functools.partial(run.start, *SHARDED, program=script, environment={"PYTHON": sys.executable})
    host = start()
    host.wait_until(lambda: 10 in run.saved())
    host.send_signal(signal.SIGTERM)
    assert host.wait() == 1, host.output
    assert host.output.count(f"saved iteration {run.saved()[-1]}, the same command continues") == 2

    ended_at = run.saved()[-1]
    host = start()
    host.wait_until(lambda: f"iter {ended_at + 1:2}/40" in host.output)
    victim, _ = children(host.pid)
    os.kill(victim, signal.SIGKILL)
    assert host.wait() == 0, host.output
    assert host.output.count("start 1 of 20 ended early, the next one continues") == 1
    run.assert_ends_as(on_two_devices)
    assert [path.suffixes[-2:] for path in sorted(tmp_path.iterdir())] == [[".0", ".log"], [".1", ".log"]]
