"""Reads the headers of .tar files strictly: what could mean more than a plain file of its own name is refused.

Python's tarfile takes an archive that was cut between two members, or in a header, for one of fewer members. Format:
POSIX.1-2017, pax, "ustar Interchange Format".
"""

import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rcm_jax.convert.tensors import refusal

BLOCK = 512
MAX_PAX_BYTES = 2**20
_REMEDY = "pack plain files by short relative names, as Python's tarfile or GNU tar --format=ustar does"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"L": "a long name of GNU tar",
    b"K": "a long link of GNU tar",
    b"S": "a sparse file",
}
# What extended headers may say: nothing of it changes a member's name or bytes.
_HARMLESS = {"atime", "ctime", "mtime", "uid", "gid", "uname", "gname", "comment"}


class Member(NamedTuple):
    """A file of an archive, and where its bytes lie."""

    name: str
    offset: int
    size: int


class Listing(NamedTuple):
    """The complete members of an archive, in order; `fault` says why there may have been more, or is empty."""

    members: list[Member]
    fault: str


def read_members(path: Path) -> Listing:
    """Lists the files of an archive, from its headers alone.

    Raises:
        UserError: it is no .tar file, or has a member that is no plain file or directory, leads out of the archive,
            comes twice, or has a size that is no number.
    """
    members: dict[str, Member] = {}
    with path.open("rb") as file:
        size = file.seek(0, 2)
        at = 0
        while True:
            file.seek(at)
            header = file.read(BLOCK)
            if len(header) < BLOCK:
                where = f"inside the header at byte {at}" if header else f"at byte {at}, before its end mark"
                return Listing(list(members.values()), f"is cut {where}")
            if not any(header):
                _check_end(path, file)
                return Listing(list(members.values()), "")
            if not _is_sound(header):
                if not at:
                    raise refusal(path, "is no .tar file", "give an uncompressed .tar file")
                return Listing(list(members.values()), f"has a damaged header at byte {at}")
            member, kind = Member(_name(path, header), at + BLOCK, _size(path, header)), header[156:157]
            end = member.offset + member.size
            if end > size:
                return Listing(list(members.values()), f"is cut inside {member.name}")
            if kind in b"xg":
                _check_pax(path, file, member)
            elif kind in b"07\0":
                if member.name in members:
                    raise refusal(path, f"holds {member.name} twice, and readers could disagree which counts", _REMEDY)
                members[member.name] = member
            elif kind != b"5" or member.size:
                what = _KINDS.get(kind, f"of kind {kind!r}")
                raise refusal(path, f"holds {member.name}, which is {what} and no plain file", _REMEDY)
            at = end + -end % BLOCK


def _is_sound(header: bytes) -> bool:
    """Whether the sum of the header's bytes is what the header says."""
    said = _octal(header[148:156])
    return said == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def _name(path: Path, header: bytes) -> str:
    raw = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    try:
        name = b"/".join([prefix, raw] if prefix else [raw]).decode()
    except UnicodeDecodeError:
        raise refusal(path, f"holds a member {raw!r} whose name is not text in UTF-8", _REMEDY) from None
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or not name.isprintable():
        raise refusal(path, f"holds a member {name!r}, whose path leads out of the archive", _REMEDY)
    return name.removeprefix("./")


def _size(path: Path, header: bytes) -> int:
    size = _octal(header[124:136])
    if size is None:
        rule = f"gives {_name(path, header)} a size of {header[124:136]!r}, which is no octal number"
        raise refusal(path, rule, _REMEDY)
    return size


def _check_pax(path: Path, file: BinaryIO, member: Member) -> None:
    """An extended header is a list of `LENGTH KEY=VALUE` lines, LENGTH counting the whole line."""
    file.seek(member.offset)
    data = file.read(min(member.size, MAX_PAX_BYTES))
    while data:
        length, _, rest = data.partition(b" ")
        key = rest.partition(b"=")[0].decode("utf-8", "replace")
        line = data[: int(length)] if re.fullmatch(rb"[0-9]{1,9}", length) else b""
        if key not in _HARMLESS or not line.endswith(b"\n") or len(line) <= len(length):
            raise refusal(path, f"holds an extended header with {key[:40]!r}, which could rename a member", _REMEDY)
        data = data[len(line) :]


def _check_end(path: Path, file: BinaryIO) -> None:
    """After the first block of zeros there must be nothing else: other readers stop there and see no more."""
    while chunk := file.read(2**20):
        if any(chunk):
            raise refusal(path, "goes on after its end mark", "unpack each part alone and pack all into one archive")
