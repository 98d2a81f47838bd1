"""Tensors that are read when they are needed, one at a time, and what every reader of files shares."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rcm_jax.config import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_JSON_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: its shape, its dtype, and `read`, which returns it as a numpy array in the order of C."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads it, for numpy."""
        return self.read() if dtype is None else self.read().astype(dtype)

    def reshape(self, *shape: int) -> "LazyTensor":
        """The same numbers in another shape of as many elements."""
        return LazyTensor(shape, self.dtype, lambda: self.read().reshape(shape))

    def astype(self, dtype: np.dtype) -> "LazyTensor":
        """The tensor in another dtype."""
        return self if dtype == self.dtype else LazyTensor(self.shape, dtype, lambda: self.read().astype(dtype))


Tensors = dict[str, LazyTensor]


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """`count` bytes of a file as uint8, without mapping it: what is read, and no more, is in memory.

    Raises UserError if the file has become shorter.
    """
    array = np.empty(count, np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < count and (got := file.readinto(array.data[done:])):  # a read stops at 2 GiB
            done += got
    if done < count:
        raise refusal(path, f"ends {count - done} bytes before its last tensor does", "fetch it again")
    return array


def read_json(path: Path) -> Any:
    """A JSON file. Raises UserError if it is no JSON or larger than any index or configuration is."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise refusal(path, f"must have at most {MAX_JSON_BYTES} bytes", "fetch it again")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from None


def parse_json(data: bytes, where: Path | str) -> Any:
    """JSON of a file. A name that is given twice is refused: two readers could disagree on its value."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            raise refusal(where, "must not give a name twice", "fetch or export it again")
        return names

    try:
        return json.loads(data, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise refusal(where, "must hold valid JSON", "fetch or export it again") from None


def refusal(where: Path | str, rule: str, remedy: str) -> UserError:
    """The error about a file that is not what it should be, in one line whatever names the file gives."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in f"{rule}: {remedy}")
    return UserError(f"{where} {text}")


def is_counts(value: Any) -> bool:
    """Whether a value from a file is a list or tuple of integers of at least 0."""
    return isinstance(value, list | tuple) and all(type(n) is int and 0 <= n < 2**63 for n in value)
