"""A run that was asked to end, was killed or hung goes on, by the same command, as if it had not."""

import os
import shutil
import signal
import socket

import numpy as np
import pytest

from rcm_jax.checkpoint import load_safetensors

PREEMPTED = 75
TWO_DEVICES = {"JAX_NUM_CPU_DEVICES": "2"}
SHARDED = ("mesh.fsdp=2", "checkpoint.every=10")  # processes wait for each other at every save


def writes(run):
    """Whether a checkpoint is being written."""
    return any(run.checkpoints.glob("*.orbax-checkpoint-tmp"))


def stop_while_it_writes(run, process):
    while True:
        process.wait_until(lambda: writes(run))
        process.send_signal(signal.SIGSTOP)
        if writes(run):
            return
        process.send_signal(signal.SIGCONT)


def test_sigterm_saves_and_a_kill_during_a_save_loses_nothing(undisturbed, make_run):
    run = make_run("signals")
    process = run.start()
    process.wait_until(lambda: 5 in run.saved())
    process.send_signal(signal.SIGTERM)
    assert process.wait() == PREEMPTED, process.output
    ended_at = run.saved()[-1]
    assert process.output.splitlines()[-1].endswith(
        f"asked to end by SIGTERM: saved iteration {ended_at}, the same command continues"
    )
    assert ended_at == run.records()[-1]["iteration"] < 40

    process = run.start()
    stop_while_it_writes(run, process)
    before = run.saved()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert run.saved() == before
    assert writes(run)

    output = run.finish()
    assert f"iter {before[-1] + 1:2}/40" in output
    assert f"iter {before[-1]:2}/40" not in output
    assert not writes(run)
    run.assert_ends_as(undisturbed)


def start_two(run, *overrides):
    """Two processes of one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
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


def test_a_hang_becomes_an_exit_with_every_threads_stack(make_run, folder, tmp_path):
    """The data set's file is a pipe that nobody writes to: who opens it waits for ever, as on a dead file server."""
    data = shutil.copytree(folder / "digits" / "first_2" / "1.0.0", tmp_path / "data")
    (shard,) = data.glob("*-train*")
    shard.unlink()
    os.mkfifo(shard)
    output = make_run("hung").finish(f"data.name={data}", "faults.hang_seconds=5", code=1)
    assert "Timeout (0:00:05)!" in output
    assert "in open_source" in output or "in first_sound" in output
