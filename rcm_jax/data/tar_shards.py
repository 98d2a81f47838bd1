"""The official training sets, shard_000000.tar and so on: a sample is KEY.latent.pt, KEY.embed.pt and KEY.prompt.txt.

Latents are (C, T, H, W) and embeddings (S, D), each a tensor of torch.save; prompts are UTF-8. Source:
rcm/datasets/build_synthetic_dataset.py and webdataset.py of github.com/NVlabs/rcm.

manifest.json beside the shards, which `write_manifest` makes and official ones lack, lists every sample of every shard
with its hash, so that what is missing or changed is known by name.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rcm_jax.config import UserError
from rcm_jax.convert.tensors import LazyTensor, read_bytes, read_json, refusal
from rcm_jax.convert.torch_file import Region, encode_tensor, read_value
from rcm_jax.convert.writing import write_json
from rcm_jax.data.samples import BadSampleError, Sample
from rcm_jax.data.tar_file import Member, read_members

SUFFIXES = ("latent.pt", "embed.pt", "prompt.txt")
DTYPES = ("bfloat16", "float16", "float32")
MANIFEST = "manifest.json"
LONGEST_PROMPT = 2**16  # bytes

Hashes = Mapping[str, str]  # of each sample by its key


class Shard(NamedTuple):
    """A shard whose headers were read: the members of each sample by suffix.

    `fault` says where the archive is damaged, or is empty. `listed` is what the manifest lists; None without one.
    """

    path: Path
    samples: dict[str, dict[str, Member]]
    fault: str
    listed: Hashes | None

    @property
    def keys(self) -> list[str]:
        """The samples that are or should be there, in the archive's order, then those that are missing."""
        return list(dict.fromkeys([*self.samples, *(self.listed or ())]))

    @property
    def count(self) -> int:
        """How many samples it gives, good and bad. What is lost where there is no manifest counts as one."""
        return len(self.keys) + self.has_lost

    @property
    def has_lost(self) -> bool:
        """Whether samples may be missing of which nothing is known."""
        return bool(self.fault) and self.listed is None


def open_shards(paths: Sequence[Path]) -> list[Shard]:
    """Opens .tar files and folders of them, in the order of their names, and reads every header.

    Raises:
        UserError: there is none, one is given twice or refused by tar_file.py, or a manifest lists others.
    """
    files = [file for path in paths for file in _find(path)]
    if len({file.resolve() for file in files}) < len(files):
        raise UserError("a .tar file is given twice, alone or with its folder: name each once")
    manifests = {folder: read_manifest(folder) for folder in {file.parent for file in files}}
    return [_open_shard(file, manifests[file.parent]) for file in files]


def _find(path: Path) -> list[Path]:
    """The .tar files that a path names: those of a folder, and those its manifest lists."""
    listed = (read_manifest(path) or {}) if path.is_dir() else {}
    files = sorted({*path.glob("*.tar"), *(path / name for name in listed)}) if path.is_dir() else [path]
    missing = [file for file in files or [path] if not file.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is no .tar file, nor a folder with one: check the path")
    return files


def _open_shard(path: Path, manifest: Mapping[str, Hashes] | None) -> Shard:
    if manifest is not None and path.name not in manifest:
        raise refusal(path, f"is not listed in the {MANIFEST} beside it", "remove one of them")
    members, fault = read_members(path)
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        for suffix in SUFFIXES:
            key = member.name.removesuffix(f".{suffix}")
            if key != member.name:
                samples.setdefault(key, {})[suffix] = member
    return Shard(path, samples, fault, None if manifest is None else manifest[path.name])


def read_samples(shard: Shard) -> Iterator[Sample | BadSampleError]:
    """The samples of a shard, one at a time; in the place of a bad one what is wrong with it."""
    for key in shard.keys:
        try:
            yield _read_sample(shard, key)
        except BadSampleError as error:
            yield error
    if shard.has_lost:
        yield BadSampleError(f"{shard.path} {shard.fault}, the samples after it are lost: fetch it again")


def _read_sample(shard: Shard, key: str) -> Sample:
    name, members = f"sample {key} of {shard.path}", shard.samples.get(key, {})
    if lacking := [suffix for suffix in SUFFIXES if suffix not in members]:
        why = f", whose archive {shard.fault}" if shard.fault else ""
        raise BadSampleError(f"{name} lacks {' and '.join(lacking)}{why}: fetch it again")
    parts = [(shard.path, *members[suffix][1:]) for suffix in SUFFIXES]
    if shard.listed is not None:
        hash_ = hash_sample(read_bytes(*part).tobytes() for part in parts)
        if hash_ != shard.listed.get(key):
            raise BadSampleError(f"{name} is not what {MANIFEST} says: fetch it again")
    latent_CTHW, text_SD = (_read_tensor(Region(*part), rank, name) for part, rank in zip(parts, (4, 2), strict=False))
    if members["prompt.txt"].size > LONGEST_PROMPT:
        raise BadSampleError(f"{name} has a prompt of more than {LONGEST_PROMPT:,} bytes: shorten it")
    try:
        prompt = read_bytes(*parts[2]).tobytes().decode()
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"{name} has a prompt that is not text in UTF-8 ({error.reason}): write it again"
        ) from None
    return Sample(np.ascontiguousarray(np.moveaxis(latent_CTHW, 0, -1)), text_SD, prompt, name)


def _read_tensor(region: Region, rank: int, name: str) -> np.ndarray:
    try:
        value = read_value(region)
    except UserError as error:
        raise BadSampleError(f"{name}: {error}") from None
    if not isinstance(value, LazyTensor) or len(value.shape) != rank or value.dtype.name not in DTYPES:
        what = f"a {value.dtype} tensor of shape {value.shape}" if isinstance(value, LazyTensor) else "no tensor"
        rule = f"holds {what} where one of {rank} axes in {', '.join(DTYPES)} must be"
        raise BadSampleError(f"{name} {rule}: save it again")
    return value.read()


def write_shard(path: Path, samples: Iterable[Sample], first: int) -> dict[str, str]:
    """Writes samples, numbered from `first`, to an archive, which is whole or absent; returns their hashes by key.

    The same samples always give the same file.
    """
    hashes = {}
    temporary = path.with_name(f".{path.name}.tmp")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, sample in enumerate(samples, first):
            latent_CTHW = np.moveaxis(sample.latent_THWC, -1, 0)
            contents = (encode_tensor(latent_CTHW), encode_tensor(sample.text_SD), sample.prompt.encode())
            for suffix, content in zip(SUFFIXES, contents, strict=True):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            hashes[f"{number:09d}"] = hash_sample(contents)
    os.replace(temporary, path)
    return hashes


def hash_sample(contents: Iterable[bytes]) -> str:
    """SHA-256 of a sample's members in the order of SUFFIXES, each after its length in 8 bytes, little-endian."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def write_manifest(folder: Path, shards: Mapping[str, Hashes]) -> None:
    """Writes which samples, with which hashes, each shard holds."""
    write_json(folder / MANIFEST, {"shards": shards})


def read_manifest(folder: Path) -> dict[str, Hashes] | None:
    """The hashes of each shard's samples; None if there is no manifest. Raises UserError for one that is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    shards = manifest.get("shards") if isinstance(manifest, dict) else None
    is_table = isinstance(shards, dict) and all(
        Path(name).name == name
        and isinstance(hashes, dict)
        and all(isinstance(hash_, str) for hash_ in hashes.values())
        for name, hashes in shards.items()
    )
    if not is_table:
        raise refusal(
            path, "must list, by file names, the hashes of each shard's samples", "fetch it again, or remove it"
        )
    return shards
