"""Writing that can be interrupted: into a folder beside the target, with a journal of what is finished, then renamed.

The folder is .NAME.partial beside the target NAME. It holds the journal, journal.jsonl, and the target so far. The same
command, started again, goes on after the last finished piece.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from rcm_jax.config import UserError

SYNC_BYTES = 2**28  # how much may be written again after an interruption


class Piece(NamedTuple):
    """What is written without a break: one tensor's part of a file of the target, or a whole file.

    `write(folder)` puts it in place and returns what `finish` must know of it: a JSON value.
    """

    key: str
    file: str
    nbytes: int
    write: Callable[[Path], Any]


class Plan(NamedTuple):
    """The pieces of a target in the order of writing, and `finish(folder, facts)`, which makes it complete.

    `facts` maps the key of every piece to what its `write` returned, in this run or an earlier one: JSON values.
    """

    pieces: list[Piece]
    finish: Callable[[Path, Mapping[str, Any]], None]


def check_target(target: Path) -> None:
    """Raises UserError if the target exists or there is no folder for it."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists and is never overwritten: remove it or choose another name")
    ancestor = next(parent for parent in target.absolute().parents if parent.exists())
    if not ancestor.is_dir():
        raise UserError(f"{target} lies below {ancestor}, which is a file: choose another name")


def write_plan(
    plan: Plan, target: Path, fingerprint: str, *, single_file: str | None = None, is_costly: bool = False
) -> int:
    """Carries out a plan, or what is left of it, and names the result `target` when it is complete.

    Args:
        plan: what to write.
        target: a path that does not exist.
        fingerprint: tells this command from others; pieces of another fingerprint are not used.
        single_file: the name of the plan's only file if the target is that file; None for a folder.
        is_costly: each piece takes long. It is noted as soon as it is finished, and the pieces of another fingerprint
            are not thrown away.

    Returns: the number of pieces that an earlier, interrupted run had finished.

    Raises:
        UserError: the target exists, another process is writing it, or costly pieces of another command are there.
    """
    check_target(target)
    partial = partial_of(target)
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "journal.jsonl").open("a+") as journal:
        _lock(journal, target)
        content, facts = partial / "content", _finished(journal, fingerprint)
        if is_costly and facts is None and content.is_dir():
            raise UserError(f"{partial} is what another command has not finished: give that one again, or remove it")
        if facts is None or not content.is_dir():
            shutil.rmtree(content, ignore_errors=True)
            journal.truncate(0)
            facts = {}
            _append(journal, {"fingerprint": fingerprint})
        content.mkdir(exist_ok=True)
        resumed = len(facts)
        _check_space(target, sum(piece.nbytes for piece in plan.pieces if piece.key not in facts))
        with tqdm(total=sum(p.nbytes for p in plan.pieces), unit="B", unit_scale=True, desc=target.name) as bar:
            pending: list[Piece] = []
            for piece in plan.pieces:
                if piece.key not in facts:
                    facts[piece.key] = piece.write(content)
                    pending.append(piece)
                if is_costly or sum(piece.nbytes for piece in pending) >= SYNC_BYTES:
                    _note(journal, content, pending, facts)
                    pending = []
                bar.update(piece.nbytes)
            _note(journal, content, pending, facts)
        plan.finish(content, facts)
        _sync([content, *content.rglob("*")])
        check_target(target)
        os.replace(content / single_file if single_file else content, target)
        _sync([target.parent])
        shutil.rmtree(partial)
    return resumed


def partial_of(target: Path) -> Path:
    """The folder that a target is written in."""
    return target.with_name(f".{target.name}.partial")


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(f"{target} needs {needed:,} more bytes, its disk has {free:,}: make room, or write elsewhere")


def _lock(journal: Any, target: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{target} is being written by another process: wait for it, or end it") from None


def _finished(journal: Any, fingerprint: str) -> dict[str, Any] | None:
    """What an earlier run noted, without a last line that it did not complete; None if it did something else."""
    journal.seek(0)
    lines = [line for line in journal.read().splitlines(keepends=True) if line.endswith("\n")]
    if not lines or json.loads(lines[0]) != {"fingerprint": fingerprint}:
        return None
    journal.truncate(sum(len(line.encode()) for line in lines))
    return {note["key"]: note["fact"] for note in map(json.loads, lines[1:])}


def _note(journal: Any, content: Path, pieces: list[Piece], facts: Mapping[str, Any]) -> None:
    """Notes pieces as finished once the disk has them."""
    _sync({content / piece.file for piece in pieces})
    for piece in pieces:
        _append(journal, {"key": piece.key, "fact": facts[piece.key]})
    _sync([Path(journal.name)])


def _append(journal: Any, note: dict[str, Any]) -> None:
    journal.write(json.dumps(note) + "\n")
    journal.flush()


def write_piece(path: Path, offset: int, *parts: bytes | memoryview) -> None:
    """Writes bytes at an offset of a file, which may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.seek(offset)
        for part in parts:
            file.write(part)


def as_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes in the order of C."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_json(path: Path, value: Any) -> None:
    """Writes a small file of JSON."""
    write_piece(path, 0, (json.dumps(value, indent=2) + "\n").encode())


def _sync(paths: Iterable[Path]) -> None:
    """Waits until the disk has what was written to files and folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
