"""Writes samples shard by shard: resumable, and bad samples are left out and counted by name."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rcm_jax.config import UserError
from rcm_jax.convert.tensors import read_json
from rcm_jax.convert.writing import Piece, Plan, write_json, write_plan
from rcm_jax.data.samples import BadSampleError, Sample, Spec, check
from rcm_jax.records import warn

SUMMARY = "precompute.json"


class Shards(NamedTuple):
    """What to write into a folder.

    Attributes:
        spec: what all samples have in common.
        names: the shards' files.
        counts: samples of each shard, good and bad.
        read: (folder, number of a shard) -> its samples, one at a time.
        write: (path, number of a shard, sound samples) -> what `finish` must know of it, of JSON types.
        finish: (folder, what each `write` returned) makes the folder complete.
        before: what is written before the shards.
    """

    spec: Spec
    names: Sequence[str]
    counts: Sequence[int]
    read: Callable[[Path, int], Iterable[Sample | BadSampleError]]
    write: Callable[[Path, int, Iterable[Sample]], Any]
    finish: Callable[[Path, list[Any]], None]
    before: Sequence[Piece] = ()


def split(count: int, size: int) -> list[int]:
    """How many of `count` samples each shard of `size` has."""
    return [min(size, count - first) for first in range(0, count, size)]


def write_shards(shards: Shards, target: Path, facts: Mapping[str, Any], *, max_bad: float) -> None:
    """Writes the shards and a summary to a new folder; the same command, given again, goes on or finds it complete.

    Args:
        shards: what to write.
        target: the folder; all is in .NAME.partial beside it until it is complete.
        facts: what tells this command from others, of JSON types.
        max_bad: share of samples that may be bad.

    Raises:
        UserError: the folder or its unfinished part is another command's, or too many samples are bad.
    """
    facts, total = json.loads(json.dumps(facts)), sum(shards.counts)
    if _is_finished(target, facts):
        print(f"{target} is complete")
        return
    if not total:
        raise UserError(f"there is no sample for {target}: give a source that has some")
    sieve = _Sieve(shards.spec, max_bad * total)

    def write(folder: Path, shard: int) -> dict[str, Any]:
        earlier = len(sieve.bad)
        fact = shards.write(folder / shards.names[shard], shard, sieve.sound(shards.read(folder, shard)))
        return {"fact": fact, "bad": sieve.bad[earlier:]}

    def finish(folder: Path, written: Mapping[str, Any]) -> None:
        notes = [written[name] for name in shards.names]
        bad = [message for note in notes for message in note["bad"]]
        sieve.check(bad)
        shards.finish(folder, [note["fact"] for note in notes])
        write_json(folder / SUMMARY, {"made_of": facts, "samples": total - len(bad), "bad": bad})

    pieces = [
        Piece(name, name, count * shards.spec.nbytes, lambda folder, shard=shard: write(folder, shard))
        for shard, (name, count) in enumerate(zip(shards.names, shards.counts, strict=True))
    ]
    plan = Plan([*shards.before, *pieces], finish)
    if resumed := write_plan(plan, target, digest(facts), is_costly=True):
        print(f"went on after {resumed} of {len(plan.pieces)} files, which an interrupted run had finished")
    summary = read_json(target / SUMMARY)
    print(f"wrote {target}: {summary['samples']:,} samples, {len(summary['bad']):,} bad ones left out")


class _Sieve:
    """Lets sound samples through; `bad` says why others were left out, and must not have more than `allowed`."""

    def __init__(self, spec: Spec, allowed: float):
        self.spec, self.allowed = spec, allowed
        self.bad: list[str] = []

    def sound(self, found: Iterable[Sample | BadSampleError]) -> Iterator[Sample]:
        for sample in found:
            try:
                if isinstance(sample, BadSampleError):
                    raise sample
                check(sample, self.spec)
            except BadSampleError as error:
                warn(f"left out: {error}")
                self.bad.append(str(error))
                self.check(self.bad)
            else:
                yield sample

    def check(self, bad: Sequence[str]) -> None:
        if len(bad) > self.allowed:
            rule = f"--max-bad allows {int(self.allowed):,}: mend them or allow more"
            raise UserError(f"bad samples: {len(bad):,}, {rule}. The first: {bad[0]}")


def _is_finished(target: Path, facts: Mapping[str, Any]) -> bool:
    summary = read_json(target / SUMMARY) if (target / SUMMARY).is_file() else {}
    return isinstance(summary, dict) and summary.get("made_of") == facts


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON types."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
