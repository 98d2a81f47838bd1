"""From stored records to batches.

A record is a dict of "latent" (T, H, W, C), "text" (S, D) and "prompt" (str), stored as a TFDS data set in array_record
files. Digits and Wan runs read the same record: only the shapes differ.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from rcm_jax.config import UserError
from rcm_jax.data import digits
from rcm_jax.state import FAULTS

Source = Sequence[Mapping[str, Any]]  # random access to records
Batch = dict[str, np.ndarray]

RANKS = {"latent": 4, "text": 2, "prompt": 0}
TRIED_FIRST = 100  # records among which one must be sound
CAUSE_LENGTH = 200  # characters of a library's error that are shown


class BadRecordError(UserError):
    """A record is not what its data set's records are; `fault` is one of state.FAULTS."""

    def __init__(self, fault: str, message: str):
        super().__init__(message)
        self.fault = fault


def open_source(name: str | os.PathLike, data_dir: str | os.PathLike, split: str) -> Source:
    """Opens one split of "digits" or "digits28" (built under `data_dir` if need be) or of any TFDS folder of records.

    A folder is named by its path, absolute or below `data_dir`; it is the one that holds dataset_info.json.
    `split` may be a slice such as "train[:1000]".

    Raises:
        UserError: no such folder or split, the folder is damaged, or its features are not those of a record.
    """
    if str(name) in digits.VARIANTS:
        builder = digits.build(data_dir, variant=digits.VARIANTS[str(name)])
    else:
        folder = Path(data_dir) / name
        if not (folder / "dataset_info.json").exists():
            raise UserError(
                f"{os.fspath(folder)!r} holds no dataset_info.json: set data.name to 'digits' or a TFDS folder, "
                "which launch.precompute makes"
            )
        with _naming(folder):
            builder = tfds.builder_from_directory(folder)
    if split.partition("[")[0] not in builder.info.splits:
        raise UserError(f"{split=} is not in {os.fspath(name)!r}: choose from {sorted(builder.info.splits)}")
    features: Any = builder.info.features
    for key, rank in RANKS.items():
        if key not in features:
            raise UserError(
                f"the records of {os.fspath(name)!r} lack {key!r}, they have {sorted(features)}: "
                f"write them with {sorted(RANKS)}"
            )
        shape = features[key].shape
        if len(shape) != rank:
            raise UserError(
                f"{key!r} in the records of {os.fspath(name)!r} has shape {shape}: it must have {rank} axes"
            )
    with _naming(builder.data_dir):
        return builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]


@contextlib.contextmanager
def _naming(folder: str | os.PathLike) -> Iterator[None]:
    """Turns whatever TFDS makes of a damaged folder into a UserError, which no launcher tries again."""
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0][:CAUSE_LENGTH]
        raise UserError(f"{os.fspath(folder)!r} cannot be read as a TFDS data set ({cause}): copy it again") from error


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | Int[np.ndarray, "b"] | None = None,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Endless shuffled batches: some `rows` of each, by default all, `prefetch` batches ahead in one thread.

    Every process draws the same global batches of record numbers and reads its own rows, so a run sees the same
    batches in the same order on any number of processes. Each epoch is a new permutation of the records; a batch may
    span two epochs. The position, `get_state()` and `set_state()`, is the number of batches taken.

    Yields:
        "latent" (b, T, H, W, C) float32, "text" (b, S, D) float32, "prompt" (b,) str; b is the number of rows.
        In the place of a bad record are zeros; "fault" (b,) int32 is then its number in state.FAULTS plus 1, else 0,
        and "reason" (b,) str says more.

    Raises:
        ValueError: no rows, or none of a batch's.
        UserError: there are no records, or the first are all bad.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(rows) or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows {rows} must be some of the {batch_size} of a batch")
    if len(source) == 0:
        raise UserError("the source has no records: build it, or choose another split")
    indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size)
    example = first_sound(source)
    batches = indices.map(lambda index_B: read_tolerantly(source, index_B[rows], example))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


def read_in_order(source: Source, *, batch_size: int) -> Iterator[Batch]:
    """All records once, in stored order; the last batch may be smaller. For evaluation."""
    for first in range(0, len(source), batch_size):
        yield read(source, range(first, min(first + batch_size, len(source))))


def read(source: Source, indices: Sequence[int] | Int[np.ndarray, "b"]) -> Batch:
    """Reads and stacks records.

    Raises:
        BadRecordError: a record cannot be read, lacks a key, or is unlike the first one.
    """
    example = read_record(source, int(indices[0]))
    return _stack([read_record(source, int(index), example) for index in indices])


def read_tolerantly(source: Source, indices: Sequence[int] | Int[np.ndarray, "b"], example: Mapping[str, Any]) -> Batch:
    """Reads and stacks records like `example`; in the place of others are zeros, "fault" and "reason"."""
    records, fault, reason = [], np.zeros(len(indices), np.int32), [""] * len(indices)
    for row, index in enumerate(indices):
        try:
            records.append(read_record(source, int(index), example))
        except BadRecordError as error:
            records.append({key: np.zeros_like(example[key]) for key in ("latent", "text")} | {"prompt": ""})
            fault[row], reason[row] = FAULTS.index(error.fault) + 1, str(error)
    return {**_stack(records), "fault": fault, "reason": np.array(reason)}


def first_sound(source: Source) -> dict[str, Any]:
    """The first record that can be read, by which all others are judged. Raises BadRecordError if there is none."""
    error = None
    for index in range(min(TRIED_FIRST, len(source))):
        try:
            return read_record(source, index)
        except BadRecordError as bad:
            error = error or bad
    raise error or UserError("the source has no records: build it, or choose another split")


def read_record(source: Source, index: int, example: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Record `index`, its prompt as str; shapes and dtypes must be those of `example`.

    Raises:
        BadRecordError: it cannot be read, lacks a key, is unlike the example, or its prompt is not text in UTF-8.
    """
    try:
        record = dict(source[index])
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise BadRecordError("unreadable", f"record {index} cannot be read: {type(error).__name__}") from error
    if fault := record.get("fault", 0):  # found before
        raise BadRecordError(FAULTS[fault - 1], str(record["reason"]))
    for key in RANKS:
        if key not in record:
            raise BadRecordError(
                "missing_key",
                f"record {index} lacks {key!r}, it has {sorted(record)}: write records with {sorted(RANKS)}",
            )
        if example is None or key == "prompt":
            continue
        for fault in ("shape", "dtype"):
            found, expected = (getattr(np.asarray(side[key]), fault) for side in (record, example))
            if found != expected:
                raise BadRecordError(
                    fault,
                    f"{key!r} of record {index} has {fault} {found}, of the first {expected}: one data set holds one",
                )
    return {"latent": record["latent"], "text": record["text"], "prompt": _as_str(record["prompt"], index)}


def _stack(records: list[dict[str, Any]]) -> Batch:
    return {
        "latent": np.stack([record["latent"] for record in records]).astype(np.float32),
        "text": np.stack([record["text"] for record in records]).astype(np.float32),
        "prompt": np.array([record["prompt"] for record in records]),
    }


class InMemory(Sequence):
    """All records of a source, decoded once: for small data whose decoding would hold up the steps."""

    def __init__(self, source: Source):
        """Reads every record. A bad one remains known as bad."""
        self.arrays = read_tolerantly(source, range(len(source)), first_sound(source))

    def __len__(self) -> int:
        return len(self.arrays["prompt"])

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {key: array[index] for key, array in self.arrays.items()}


def _as_str(prompt: Any, index: int) -> str:
    try:
        prompt = prompt.decode() if isinstance(prompt, bytes) else prompt
    except UnicodeDecodeError as error:
        raise BadRecordError("text", f"the prompt of record {index} is not text in UTF-8: {error.reason}") from None
    if not isinstance(prompt, str):
        raise BadRecordError("dtype", f"the prompt of record {index} is of type {type(prompt).__name__}, not text")
    return prompt
