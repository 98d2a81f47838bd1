"""Safetensors files, alone or in shards with an index.json, read and written tensor by tensor.

The format: 8 bytes with the header's length, the header in JSON, the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). Files are read by plain reads, since mapped pages count as memory in use.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rcm_jax.convert.tensors import (
    BFLOAT16,
    MAX_JSON_BYTES,
    LazyTensor,
    Tensors,
    is_counts,
    parse_json,
    read_bytes,
    read_json,
    refusal,
)
from rcm_jax.convert.writing import Piece, Plan, as_bytes, write_json, write_piece

DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_file(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one file, to be read later, and its metadata.

    Raises UserError if the file is cut short, or its header lies about names, dtypes, shapes or offsets.
    """
    size = path.stat().st_size
    length = int.from_bytes(read_bytes(path, 0, 8).tobytes(), "little") if size >= 8 else 0
    if not 2 <= length <= min(size - 8, MAX_JSON_BYTES):
        raise refusal(path, "is not a complete safetensors file, its header is cut short", "fetch or export it again")
    header = parse_json(read_bytes(path, 8, length).tobytes(), path)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise refusal(path, "must have a header of tensors and of metadata in text", "export it again")
    tensors, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (start, end) = _check_entry(path, name, entry)
        tensors[name] = _lazy(path, 8 + length + start, dtype, shape)
        spans.append((start, end, name))
        if tensors[name].nbytes != end - start:
            rule = f"gives {name} {end - start} bytes, its shape and dtype take {tensors[name].nbytes}"
            raise refusal(path, rule, "fetch or export it again")
    _check_spans(path, sorted(spans), size - 8 - length)
    return tensors, metadata


def _check_entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape", ()), fields.get("data_offsets", ())
    if not (isinstance(shape, list) and is_counts(shape) and is_counts(offsets) and len(offsets) == 2):
        raise refusal(path, f"must give {name} a shape and two offsets in whole numbers", "fetch or export it again")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refusal(path, f"holds {name} as {dtype}", f"export it as one of {', '.join(DTYPES)}")
    return DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """The tensors must fill the file without gaps or overlaps."""
    reached, previous = 0, "the header"
    for start, end, name in spans:
        if start != reached:
            fault = "overlaps with" if start < reached else "leaves a gap after"
            raise refusal(path, f"has a header that lies: {name} {fault} {previous}", "fetch or export it again")
        reached, previous = end, name
    if reached != size:
        fault = "is cut short" if reached > size else "has bytes that no tensor owns"
        raise refusal(path, f"{fault}: its tensors take {reached} bytes, it holds {size}", "fetch or export it again")


def _lazy(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> LazyTensor:
    def read() -> np.ndarray:
        return read_bytes(path, offset, tensor.nbytes).view(dtype).reshape(shape)

    tensor = LazyTensor(shape, dtype, read)
    return tensor


def read_sharded(index_path: Path) -> Tensors:
    """The tensors of all files that an index.json names.

    Raises UserError if a shard lies outside the index's folder, is missing, or does not hold what the index says.
    """
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise refusal(index_path, "must hold a weight_map from tensors to files", "fetch or export it again")
    tensors: Tensors = {}
    for shard in sorted(set(weight_map.values())):
        path = index_path.parent / shard
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise refusal(index_path, f"names {shard!r}, which is not a file beside it", "fetch it from its author")
        if not os.path.isfile(path):  # unlike Path's, false for a name that is too long
            raise refusal(index_path, f"names {shard}, which is not there", "fetch the missing file")
        found = read_file(path)[0]
        differing = sorted(found.keys() ^ {name for name, file in weight_map.items() if file == shard})
        if differing:
            rule = f"disagrees with {shard} on {', '.join(differing)}"
            raise refusal(index_path, rule, "fetch both again, from one release")
        tensors |= found
    return tensors


def plan_file(name: str, tensors: Tensors, metadata: Mapping[str, str]) -> Plan:
    """How to write one file of the target folder."""
    pieces = []
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the reference does, for tensors that are mapped
    prefix = struct.pack("<Q", len(text)) + text
    for key, tensor in tensors.items():
        offset = len(prefix) + header[key]["data_offsets"][0]
        pieces.append(Piece(f"{name}/{key}", name, tensor.nbytes, _writer(name, offset, tensor)))
    return Plan(pieces, lambda folder, _: write_piece(folder / name, 0, prefix))


def _writer(name: str, offset: int, tensor: LazyTensor):
    def write(folder: Path) -> None:
        write_piece(folder / name, offset, as_bytes(tensor.read()))

    return write


def plan_sharded(stem: str, tensors: Tensors, shard_bytes: int) -> Plan:
    """How to write STEM.safetensors or, beyond `shard_bytes`, STEM-00001-of-0000N.safetensors and their index."""
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        return plan_file(f"{stem}.safetensors", tensors, {"format": "pt"})
    names = [f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    plans = [plan_file(name, shard, {"format": "pt"}) for name, shard in zip(names, shards, strict=True)]
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}

    def finish(folder: Path, facts: Mapping[str, Any]) -> None:
        for plan in plans:
            plan.finish(folder, facts)
        write_json(folder / f"{stem}.safetensors.index.json", index)

    return Plan([piece for plan in plans for piece in plan.pieces], finish)


def _shards(tensors: Tensors, shard_bytes: int) -> Iterator[Tensors]:
    shard: Tensors = {}
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if shard and size > shard_bytes:
            yield shard
            shard, size = {}, tensor.nbytes
        shard[name] = tensor
    yield shard
