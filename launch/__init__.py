"""Programs to start with `python -m launch.NAME`."""

import os
from pathlib import Path


def keep_compilations() -> None:
    """Keeps what XLA compiles in ~/.cache/rcm_jax or $JAX_COMPILATION_CACHE_DIR: a second start is quick."""
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "rcm_jax")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
