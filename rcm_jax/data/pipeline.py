"""From stored records to batches.

A record is a dict of "latent" (T, H, W, C), "text" (S, D) and "prompt" (str), stored as a TFDS data set in array_record
files. Digits and Wan runs read the same record: only the shapes differ.
"""

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

Source = Sequence[Mapping[str, Any]]  # random access to records
Batch = dict[str, np.ndarray]

RANKS = {"latent": 4, "text": 2, "prompt": 0}


def open_source(name: str | os.PathLike, data_dir: str | os.PathLike, split: str) -> Source:
    """Opens one split of "digits" (built under `data_dir` if it is not there yet) or of any TFDS folder of records.

    A folder is named by its path, absolute or below `data_dir`; it is the one that holds dataset_info.json.
    `split` may be a slice such as "train[:1000]".

    Raises:
        UserError: no such folder or split, or its features are not those of a record.
    """
    if name == "digits":
        builder = digits.build(data_dir)
    else:
        folder = Path(data_dir) / name
        if not (folder / "dataset_info.json").exists():
            raise UserError(
                f"{os.fspath(folder)!r} holds no dataset_info.json: set data.name to 'digits' or a TFDS folder"
            )
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
    return builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Endless shuffled batches: this process' rows of each global batch, `prefetch` batches ahead in one thread.

    Every process draws the same global batches of record numbers and reads its own consecutive rows, so a run sees
    the same batches in the same order on any number of processes. Each epoch is a new permutation of the records;
    a batch may span two epochs. The position, `get_state()` and `set_state()`, is the number of batches taken.

    Yields:
        "latent" (b, T, H, W, C) float32, "text" (b, S, D) float32, "prompt" (b,) str; b = batch_size / process_count.

    Raises:
        UserError: sizes that do not fit; while iterating, a record unlike the first of its batch.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"{batch_size=} must be a positive multiple of the {process_count} processes: set data.batch_size to "
            f"{max(1, round(batch_size / process_count)) * process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=} must be at least 0 and less than {process_count=}")
    if len(source) == 0:
        raise UserError("the source has no records: build it, or choose another split")
    rows = batch_size // process_count
    first = process_index * rows
    indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size)
    batches = indices.map(lambda index_B: read(source, index_B[first : first + rows]))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


def read_in_order(source: Source, *, batch_size: int) -> Iterator[Batch]:
    """All records once, in stored order; the last batch may be smaller. For evaluation."""
    for first in range(0, len(source), batch_size):
        yield read(source, range(first, min(first + batch_size, len(source))))


def read(source: Source, indices: Sequence[int] | Int[np.ndarray, "b"]) -> Batch:
    """Reads and stacks records.

    Raises:
        UserError: a record lacks a key, or its shape differs from the first one's.
    """
    records = [source[int(index)] for index in indices]
    for index, record in zip(indices, records, strict=True):
        for key in RANKS:
            if key not in record:
                raise UserError(
                    f"record {index} lacks {key!r}, it has {sorted(record)}: write records with {sorted(RANKS)}"
                )
            if np.shape(record[key]) != np.shape(records[0][key]):
                raise UserError(
                    f"{key!r} of record {index} has shape {np.shape(record[key])}, of record {indices[0]} "
                    f"{np.shape(records[0][key])}: one data set holds one shape"
                )
    return {
        "latent": np.stack([record["latent"] for record in records]).astype(np.float32),
        "text": np.stack([record["text"] for record in records]).astype(np.float32),
        "prompt": np.array([_as_str(record["prompt"]) for record in records]),
    }


class InMemory(Sequence):
    """All records of a source, decoded once: for small data whose decoding would hold up the steps."""

    def __init__(self, source: Source):
        """Reads every record. Raises UserError for one that is not like the first."""
        self.arrays = read(source, range(len(source)))

    def __len__(self) -> int:
        return len(self.arrays["prompt"])

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {key: array[index] for key, array in self.arrays.items()}


def _as_str(prompt: str | bytes) -> str:
    return prompt.decode() if isinstance(prompt, bytes) else prompt
