"""What every test runs under: eight CPU devices, no silent broadcasting of ranks, shapes and types checked.

Compiled programs are kept in .jax_cache, which makes the second run of the tests about twice as fast.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# XLA sizes its thread pool by this. With fewer threads than collectives that run at once on the eight devices, they
# wait for each other until XLA aborts the process.
os.environ.setdefault("NPROC", "64")
# libtpu compiles for TPUs where there is none: it need not ask the cloud for them, nor lock them.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
import pytest
import safetensors
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # a GPU would multiply float32 as TF32
install_import_hook(["rcm_jax", "pallas_kernels"], "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, np.ndarray], dict[str, str]]]:
    """`golden("scm")` gives (tensors, metadata) of tests/golden/scm.safetensors; see the README there."""

    def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        with safetensors.safe_open(GOLDEN / f"{name}.safetensors", framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}

    return load


@pytest.fixture
def tpu_interpreter(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Runs TPU kernels on the CPU, and fails the test where they race."""
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert "RACE DETECTED" not in capsys.readouterr().out  # jax 0.12 raises an error instead


@pytest.fixture
def no_cache() -> Iterator[None]:
    """JAX would keep these programs on disk, and fail to load them for chips that are not there."""
    name = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    yield
    jax.config.update(name, seconds)
