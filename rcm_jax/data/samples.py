"""Training samples, and the TFDS data sets of array_record files that hold them. pipeline.py reads them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Shaped
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from rcm_jax.config import UserError

SPLIT = "train"


class BadSampleError(UserError):
    """A sample that must be left out; the message names it and says why."""


class Sample(NamedTuple):
    """A normalised latent, the embedding of its caption, the caption, and a name for messages."""

    latent_THWC: Shaped[np.ndarray, "t h w c"]
    text_SD: Shaped[np.ndarray, "s d"]
    prompt: str
    name: str


class Spec(NamedTuple):
    """Shapes and dtypes of a data set's samples."""

    latent_shape: tuple[int, ...]
    text_shape: tuple[int, ...]
    latent_dtype: np.dtype
    text_dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a sample without its caption."""
        latent, text = np.prod(self.latent_shape, dtype=int), np.prod(self.text_shape, dtype=int)
        return int(latent * self.latent_dtype.itemsize + text * self.text_dtype.itemsize)


def spec_of(sample: Sample) -> Spec:
    """What the samples of a data set must have in common with this one."""
    latent, text = sample.latent_THWC, sample.text_SD
    return Spec(latent.shape, text.shape, latent.dtype, text.dtype)


def check(sample: Sample, spec: Spec) -> None:
    """Raises BadSampleError for a sample of other shapes or dtypes, or with numbers that are not finite."""
    if spec_of(sample) != spec:
        raise BadSampleError(
            f"{sample.name} has {_describe(spec_of(sample))}: those of its data set are {_describe(spec)}"
        )
    for key, array in (("latent", sample.latent_THWC), ("embedding", sample.text_SD)):
        if not np.isfinite(array.astype(np.float32)).all():
            raise BadSampleError(f"{sample.name} has a number in its {key} that is not finite: make it again")


def _describe(spec: Spec) -> str:
    latent, text = f"{spec.latent_dtype}{list(spec.latent_shape)}", f"{spec.text_dtype}{list(spec.text_shape)}"
    return f"a latent {latent} and an embedding {text}"


def features(spec: Spec) -> tfds.features.FeaturesDict:
    """The record that every training run reads: latent, text embedding, prompt."""
    tensor = tfds.features.Tensor
    return tfds.features.FeaturesDict(
        {
            "latent": tensor(shape=spec.latent_shape, dtype=spec.latent_dtype.type, encoding="bytes"),
            "text": tensor(shape=spec.text_shape, dtype=spec.text_dtype.type, encoding="bytes"),
            "prompt": tfds.features.Text(),
        }
    )


def file_name(data_set: str, shard: int, count: int) -> str:
    """The name of a shard's file."""
    return f"{data_set}-{SPLIT}.array_record-{shard:05d}-of-{count:05d}"


def write_shard(path: Path, samples: Iterable[Sample], spec: Spec) -> dict[str, int]:
    """Writes samples to an array_record file, which is whole or absent; returns how many, and their bytes.

    The same samples always give the same file.
    """
    record = features(spec)
    specs: Any = record.get_serialized_info()
    serializer = ExampleSerializer(specs)
    count, nbytes = 0, 0
    temporary = path.with_name(f".{path.name}.tmp")
    writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
    for sample in samples:
        values = {"latent": sample.latent_THWC, "text": sample.text_SD, "prompt": sample.prompt}
        example: Any = serializer.get_tf_example(record.encode_example(values))
        data = example.SerializeToString(deterministic=True)
        writer.write(data)
        count, nbytes = count + 1, nbytes + len(data)
    writer.close()
    os.replace(temporary, path)
    return {"records": count, "nbytes": nbytes}


def write_metadata(folder: Path, data_set: str, spec: Spec, lengths: Sequence[int], nbytes: int) -> None:
    """Writes what makes a folder of shards a TFDS data set; `lengths` counts each shard's samples."""
    data_dir: Any = folder
    template = tfds.core.ShardedFileTemplate(
        data_dir=data_dir, dataset_name=data_set, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=list(lengths), num_bytes=nbytes, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features(spec), split_infos=[split], check_data=False, disable_shuffling=True
    )
