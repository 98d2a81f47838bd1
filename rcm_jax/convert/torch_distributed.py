"""PyTorch's distributed checkpoints, which rCM trains from and saves (.dcp), without PyTorch.

Such a folder holds .metadata, a pickle of plain data classes, and *.distcp files, in which each part of a tensor is a
small .pth archive. A tensor is put together from its parts when it is read.
"""

import itertools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rcm_jax.convert.tensors import BFLOAT16, LazyTensor, is_counts, refusal
from rcm_jax.convert.torch_file import Region, read_value
from rcm_jax.convert.weights_pickle import Record, load_pickle

DTYPES = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
    "bfloat16": BFLOAT16,
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype(bool),
}

_PACKAGE = "torch.distributed.checkpoint"
_ENUM = f"{_PACKAGE}.metadata _MEM_FORMAT_ENCODING"


def _member(owner: str, name: str) -> Record:
    """Stands for `getattr`, by which Python 3.11.0 to 3.11.3 pickle a member of an enum, and for that alone."""
    if owner != _ENUM:
        raise TypeError(owner)
    return Record(name)


_CLASSES = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata")
_STAND_INS = {
    **{f"{_PACKAGE}.metadata {name}": Record for name in (*_CLASSES, "MetadataIndex", "StorageMeta")},
    **{_ENUM: Record, "builtins getattr": _member, "__builtin__ getattr": _member},
    f"{_PACKAGE}.filesystem _StorageInfo": Record,
    **{f"torch {name}": Record for name in DTYPES},
    "torch Size": lambda sizes=(): tuple(sizes),
    "torch.serialization _get_layout": Record,
    "pathlib PosixPath": Record,
    "pathlib WindowsPath": Record,
    "collections OrderedDict": lambda: {},
}


class _Part(NamedTuple):
    """A box of a tensor, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    region: Region


def read_folder(folder: Path) -> dict[str, Any]:
    """The entries of a distributed checkpoint by name: tensors as LazyTensor, other objects as Record.

    Raises UserError if the metadata is damaged or names anything but plain data classes, if a file is missing, or if
    the parts of a tensor do not make it up.
    """
    path = folder / ".metadata"
    metadata = load_pickle(path.read_bytes(), _STAND_INS, path)
    try:
        regions = {}
        for index, info in metadata.state["storage_data"].items():
            regions[_key(index.state["fqn"], index.state.get("offset"))] = _region(folder, info.state)
        return {
            name: _tensor(path, name, entry.state, regions) if entry.state else entry
            for name, entry in metadata.state["state_dict_metadata"].items()
        }
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        kind = type(error).__name__  # not its text, which may hold what the file makes endless
        raise refusal(path, f"lacks what a checkpoint needs ({kind})", "fetch it again, or save it anew") from None


def _key(name: Any, offsets: Any) -> tuple[str, tuple[int, ...]]:
    if not isinstance(name, str) or not (offsets is None or is_counts(offsets)):
        raise TypeError(name)
    return name, tuple(offsets or ())


def _region(folder: Path, info: dict[str, Any]) -> Region:
    name, offset, length = info["relative_path"], info["offset"], info["length"]
    path = folder / ".metadata"
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        named = repr(name) if isinstance(name, str) else f"an object of type {type(name).__name__}"
        raise refusal(path, f"names {named}, which is not a file beside it", "fetch it from its author")
    if info.get("transform_descriptors"):
        raise refusal(path, f"holds compressed or encrypted parts in {name}", "save it without extensions")
    if not os.path.isfile(folder / name):  # unlike Path's, false for a name that is too long
        raise refusal(path, f"names {name}, which is not there", "fetch the missing file")
    if not is_counts([offset, length]) or offset + length > (folder / name).stat().st_size:
        raise refusal(folder / name, "is shorter than .metadata says", "fetch it again")
    return Region(folder / name, offset, length)


def _tensor(
    path: Path, name: str, entry: dict[str, Any], regions: dict[tuple[str, tuple[int, ...]], Region]
) -> LazyTensor:
    properties = entry["properties"].state
    dtype = (properties[0] if isinstance(properties, tuple) else properties["dtype"]).removeprefix("torch ")
    shape = entry["size"]
    if dtype not in DTYPES or not is_counts(shape):
        raise refusal(path, f"holds {name} as {dtype}", f"save it as one of {', '.join(DTYPES)}")
    parts = []
    for chunk in entry["chunks"]:
        offsets, sizes = chunk.state["offsets"], chunk.state["sizes"]
        if not (is_counts(offsets) and is_counts(sizes) and len(offsets) == len(sizes) == len(shape)):
            raise TypeError(name)
        parts.append(_Part(tuple(offsets), tuple(sizes), regions[_key(name, offsets)]))
    _check_parts(path, name, tuple(shape), parts)

    def read() -> np.ndarray:
        whole = np.empty(tensor.shape, tensor.dtype)
        for part in parts:
            box = tuple(slice(start, start + size) for start, size in zip(part.offsets, part.sizes, strict=True))
            whole[box] = _read_part(part, tensor.dtype)
        return whole

    tensor = LazyTensor(tuple(shape), DTYPES[dtype], read)
    return tensor


def _check_parts(path: Path, name: str, shape: tuple[int, ...], parts: list[_Part]) -> None:
    """The boxes must lie within the tensor, apart from each other, and fill it."""
    inside = all(
        start + size <= n for part in parts for start, size, n in zip(part.offsets, part.sizes, shape, strict=True)
    )
    full = sum(math.prod(part.sizes) for part in parts) == math.prod(shape)
    apart = not any(
        all(max(a, b) < min(a + m, b + n) for a, m, b, n in zip(*one[:2], *other[:2], strict=True))
        for one, other in itertools.combinations((part for part in parts if math.prod(part.sizes)), 2)
    )
    if not (inside and full and apart):
        raise refusal(path, f"has parts of {name} that do not make up its shape {shape}", "save it anew")


def _read_part(part: _Part, dtype: np.dtype) -> np.ndarray:
    value = read_value(part.region)
    if not isinstance(value, LazyTensor) or value.shape != part.sizes or value.dtype != dtype:
        raise refusal(str(part.region), f"is no {dtype} tensor of shape {part.sizes}", "fetch it again")
    return value.read()
