"""A full disk stops no run and costs no checkpoint: writes fail, are reported, and succeed once there is space."""

import resource
import signal

UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def test_a_run_outlives_a_disk_that_is_full_for_a_while(undisturbed, make_run):
    """The kernel lets no file of the process grow past 1 kB, as if the disk were full, until the limit is lifted."""
    run = make_run("full")
    process = run.start()
    process.wait_until(lambda: 5 in run.saved())
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    process.wait_until(lambda: process.output.count("could not be written to") >= 3)
    process.send_signal(signal.SIGSTOP)
    full = process.output
    kept = run.saved()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, UNLIMITED)
    process.send_signal(signal.SIGCONT)

    assert process.wait() == 0, process.output
    assert 5 in kept
    assert "; older ones are kept, another attempt follows" in full
    assert "records up to iteration" in full
    assert run.saved()[-1] == 40
    run.assert_ends_as(undisturbed)
