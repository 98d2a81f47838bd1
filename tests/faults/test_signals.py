"""A run that was asked to end, was killed or hung goes on, by the same command, as if it had not."""

import os
import shutil
import signal

PREEMPTED = 75


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


def test_sigterm_saves_and_a_kill_during_a_save_loses_nothing(undisturbed, make_run, folder, tmp_path):
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

    shutil.copytree(folder / "digits", tmp_path / "moved" / "digits")
    output = run.finish(f"data.dir={tmp_path / 'moved'}")
    assert f"iter {before[-1] + 1:2}/40" in output
    assert f"iter {before[-1]:2}/40" not in output
    assert not writes(run)
    run.assert_ends_as(undisturbed)


def test_a_hang_becomes_an_exit_with_every_threads_stack(make_run, folder, tmp_path):
    """The data set's file is a pipe that nobody writes to: who opens it waits for ever, as on a dead file server."""
    data = shutil.copytree(folder / "digits" / "first_2" / "1.0.0", tmp_path / "data")
    (shard,) = data.glob("*-train*")
    shard.unlink()
    os.mkfifo(shard)
    output = make_run("hung").finish(f"data.name={data}", "faults.hang_seconds=5", code=1)
    assert "Timeout (0:00:05)!" in output
    assert "in open_source" in output or "in first_sound" in output
