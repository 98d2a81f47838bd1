"""How a run notices that it must end: a request by SIGTERM, or no progress."""

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


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
