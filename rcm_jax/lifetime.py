"""How a run notices that it must end, a request by SIGTERM or no progress, and that it may not begin."""

import contextlib
import faulthandler
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from rcm_jax.config import UserError

HANDOVER_SECONDS = 60.0  # that a run waits for the one before it, which may be ending


@contextlib.contextmanager
def termination_notice() -> Iterator[Callable[[int], bool]]:
    """Gives a function that tells whether SIGTERM has asked the run to end; inside, the signal does nothing else.

    It must be called before every iteration, with its number. With several processes a signal to any of them is
    answered by all, before the same iteration.
    """
    if jax.process_count() > 1:  # JAX has a handler of its own, which lets the processes agree
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python does not let signals be handled
        yield lambda iteration: asked.is_set()
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda iteration: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Gives a function to call at every sign of progress; 0 seconds: it does nothing.

    After so many seconds without a call the stack of every thread goes to stderr and the process ends with code 1, even
    where no Python code can run any more.
    """
    if not seconds:
        yield lambda: None
        return

    def beat() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    beat()
    try:
        yield beat
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def sole_run(folder: Path, wait: float = HANDOVER_SECONDS) -> Iterator[None]:
    """Keeps other runs out of a folder, which it makes, while this one writes there; process 0 does so for all.

    Where the file system has no locks, nothing is kept out.

    Raises UserError if another run is still there after `wait` seconds.
    """
    if jax.process_index() != 0:
        yield
        return
    is_new, path = not folder.exists(), folder / ".lock"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        until = time.monotonic() + wait
        while not _try_lock(lock.fileno()):
            if time.monotonic() > until:
                lock.seek(0)
                raise UserError(f"{folder} is in use by {lock.read() or 'another run'}: end it, or use another folder")
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} of {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            if is_new and list(folder.iterdir()) == [path]:  # a mistake ended it before anything was written
                path.unlink()
                folder.rmdir()


def _try_lock(file: int) -> bool:
    """Whether nobody else holds the lock; the system gives it back when the process ends, however it does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        pass
    return True
