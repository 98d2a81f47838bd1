"""Programs to start with `python -m launch.NAME`."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from rcm_jax.config import EarlyEnd, UserError


def keep_compilations() -> None:
    """Keeps what XLA compiles in ~/.cache/rcm_jax or $JAX_COMPILATION_CACHE_DIR: a second start is quick."""
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "rcm_jax")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def set_determinism(wanted: bool) -> None:
    """Lets XLA use, on GPUs, only kernels that always give the same bits. Call it before JAX finds its devices."""
    if wanted:
        flags = (os.environ.get("XLA_FLAGS", ""), "--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def join_processes() -> None:
    """Makes this process one of several, by what the cluster says (TPU pods, SLURM, ...) or by environment variables.

    The variables are JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises UserError if neither tells.
    """
    import jax

    try:
        count, index = (
            int(os.environ[name]) if name in os.environ else None for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        jax.distributed.initialize(num_processes=count, process_id=index)
    except ValueError as error:
        raise UserError(
            f"--distributed finds no cluster ({error}): set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
        ) from None


@contextlib.contextmanager
def ends_together() -> Iterator[None]:
    """Within this context an error in one process of several ends it at once, and thereby the others.

    An orderly exit would wait for the others, and they wait for this process.
    """
    import jax

    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, EarlyEnd):
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, UserError) else 1)
