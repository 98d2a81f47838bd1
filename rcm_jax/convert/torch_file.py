"""PyTorch's .pth and .pt files without PyTorch: zip archives of a pickle and of the tensors' raw storages.

Read with weights_pickle.py, tensor by tensor; written so that torch.load(..., weights_only=True) takes them.
"""

import errno
import functools
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rcm_jax.convert.tensors import BFLOAT16, LazyTensor, Tensors, is_counts, read_bytes, refusal
from rcm_jax.convert.weights_pickle import Record, load_pickle
from rcm_jax.convert.writing import Piece, Plan, as_bytes, write_piece

STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype(bool),
}
NAMES = {dtype: name for name, dtype in STORAGES.items()}
ALIGNMENT = 64  # PyTorch's own, which lets it map a file


class Region(NamedTuple):
    """A stretch of a file that is an archive of its own; `length` None is the whole file."""

    path: Path
    offset: int = 0
    length: int | None = None

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}" if self.length is not None else str(self.path)


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


def read_value(region: Region) -> Any:
    """What torch.save was given: its tensors as LazyTensor, its other objects as Record or plain data.

    Raises UserError if it is no such file, is damaged, or holds anything but plain weights.
    """
    archive = _Archive(region)

    def persistent(key: Any) -> _Storage:
        kind, dtype, name, _, count = key
        if kind != "storage" or not isinstance(name, str) or not is_counts([count]):
            raise ValueError(key)
        return _Storage(name, STORAGES[dtype.removeprefix("torch ")], count)

    def rebuild(storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> LazyTensor:
        return _view(archive, storage, offset, shape, stride)

    stand_ins = {f"torch {name}": Record for name in STORAGES} | {
        "collections OrderedDict": lambda: {},
        "torch._utils _rebuild_tensor_v2": rebuild,
        "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
        "torch Size": lambda sizes=(): tuple(sizes),
        # These carry an `_extra_state`, which holds no weights.
        "_io BytesIO": Record,
        "_codecs encode": Record,
    }
    return load_pickle(archive.pickle(), stand_ins, str(region), persistent)


class _Archive:
    """The entries of a zip archive, all of them stored without compression."""

    def __init__(self, region: Region):
        self.region = region
        try:
            with region.path.open("rb") as file:
                window: Any = _Window(file, region)
                entries = zipfile.ZipFile(window).infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
            rule = f"is no complete zip archive as torch.save writes it ({type(error).__name__})"
            raise refusal(str(region), rule, "fetch it again, or save it with PyTorch 1.6 or newer") from None
        self.entries = {entry.filename: entry for entry in entries}
        self._check(entries)
        (self.prefix,) = {name.partition("/")[0] for name in self.entries}
        if self.read_small("byteorder", b"little") != b"little":
            raise refusal(str(region), "holds big-endian numbers", "save it on a little-endian machine")

    def _check(self, entries: list[zipfile.ZipInfo]) -> None:
        where, remedy = str(self.region), "fetch it from its author"
        for entry in entries:
            parts = entry.filename.split("/")
            if ".." in parts or "" in parts or "\\" in entry.filename or "\0" in entry.orig_filename:
                raise refusal(where, f"has an entry {entry.orig_filename!r}, which leads out of the archive", remedy)
            if (
                entry.compress_type != zipfile.ZIP_STORED
                or entry.file_size != entry.compress_size
                or entry.flag_bits & 1
            ):
                raise refusal(where, f"has a compressed or encrypted entry {entry.filename}", "save it with torch.save")
        if len(self.entries) < len(entries) or len({entry.filename.partition("/")[0] for entry in entries}) != 1:
            raise refusal(where, "must hold each entry once, all in one folder", remedy)

    def read_small(self, name: str, default: bytes | None = None) -> bytes:
        if f"{self.prefix}/{name}" not in self.entries and default is not None:
            return default
        offset, size = self.span(name)
        return read_bytes(self.region.path, offset, size).tobytes()

    def pickle(self) -> bytes:
        return self.read_small("data.pkl")

    def span(self, name: str) -> tuple[int, int]:
        """Offset in the file and size of an entry's bytes."""
        entry = self.entries.get(f"{self.prefix}/{name}")
        if entry is None:
            raise refusal(str(self.region), f"lacks its entry {name}", "fetch it again")
        base, length = self.region.offset, self.region.length
        lie = refusal(str(self.region), f"has a zip directory that lies about {name}", "fetch it again")
        limit = self.region.path.stat().st_size - base if length is None else length
        if not 0 <= entry.header_offset <= limit - 30:
            raise lie
        header = read_bytes(self.region.path, base + entry.header_offset, 30).tobytes()
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        end = start + entry.file_size
        if header[:4] != b"PK\3\4" or end > limit:
            raise lie
        return base + start, entry.file_size


class _Window:
    """A region of a file, as zipfile reads one: never more than is there, whatever the file says of its sizes."""

    def __init__(self, file: BinaryIO, region: Region):
        size = os.fstat(file.fileno()).st_size - region.offset
        self._file, self._base = file, region.offset
        self._length = size if region.length is None else min(region.length, size)
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise OSError(errno.EINVAL, "before the begin of the file")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._base + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def _view(archive: _Archive, storage: _Storage, offset: int, shape: Any, stride: Any) -> LazyTensor:
    """The tensor that lies in a storage at an offset, with strides, all counted in elements."""
    if not (is_counts([offset]) and is_counts(shape) and is_counts(stride) and len(shape) == len(stride)):
        raise ValueError(shape)
    start, size = archive.span(f"data/{storage.key}")
    itemsize = storage.dtype.itemsize
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    if storage.count * itemsize != size or offset + reach > storage.count:
        rule = f"has a tensor of shape {tuple(shape)} that reaches beyond its storage data/{storage.key}"
        raise refusal(str(archive.region), rule, "fetch it again")
    if np.prod(shape, dtype=object) > max(reach, 1):  # a small file could ask for any amount of memory
        rule = f"has a tensor of shape {tuple(shape)} that repeats elements of its storage"
        raise refusal(str(archive.region), rule, "save it with .contiguous()")

    def read() -> np.ndarray:
        data = read_bytes(archive.region.path, start + offset * itemsize, reach * itemsize).view(storage.dtype)
        strides = tuple(step * itemsize for step in stride)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(data, shape, strides)).reshape(shape)

    return LazyTensor(tuple(shape), storage.dtype, read)


def plan_file(name: str, tensors: Tensors) -> Plan:
    """How to write one .pth file that holds a dict of tensors."""
    small = {"data.pkl": _pickle(tensors), "byteorder": b"little", "version": b"3\n"}
    entries, end = {}, 0
    for entry, size in (
        *((f"weights/{key}", len(data)) for key, data in small.items()),
        *((f"weights/data/{index}", tensor.nbytes) for index, tensor in enumerate(tensors.values())),
    ):
        entries[entry] = _Entry(entry.encode(), size, end)
        end = entries[entry].end
    pieces = []
    for index, (key, tensor) in enumerate(tensors.items()):
        write = functools.partial(_write_entry, name=name, entry=entries[f"weights/data/{index}"], tensor=tensor)
        pieces.append(Piece(f"{name}/{key}", name, tensor.nbytes, write))

    def finish(folder: Path, checksums: Mapping[str, Any]) -> None:
        known = [zlib.crc32(data) for data in small.values()] + [checksums[piece.key] for piece in pieces]
        for entry, data in zip(entries.values(), small.values(), strict=False):
            write_piece(folder / name, entry.offset, entry.header(zlib.crc32(data)), data)
        write_piece(folder / name, end, _directory(entries.values(), known))

    return Plan(pieces, finish)


def encode_tensor(array: np.ndarray) -> bytes:
    """The bytes of a .pt file that holds one tensor, as torch.save(tensor) makes it."""
    data = as_bytes(array)
    value = pickle.PROTO + b"\2" + _pickle_tensor(0, LazyTensor(array.shape, array.dtype, lambda: array)) + pickle.STOP
    contents = {"data.pkl": value, "byteorder": b"little", "data/0": data, "version": b"3\n"}
    entries, checksums, parts, end = [], [], [], 0
    for name, content in contents.items():
        entries.append(_Entry(f"archive/{name}".encode(), len(content), end))
        checksums.append(zlib.crc32(content))
        parts += [entries[-1].header(checksums[-1]), content]
        end = entries[-1].end
    return b"".join([*parts, _directory(entries, checksums)])


def _write_entry(folder: Path, *, name: str, entry: "_Entry", tensor: LazyTensor) -> int:
    data = as_bytes(tensor.read())
    checksum = zlib.crc32(data)
    write_piece(folder / name, entry.offset, entry.header(checksum), data)
    return checksum


class _Entry(NamedTuple):
    """A stored entry of a zip archive whose data begins at a multiple of ALIGNMENT. Sizes and offsets have 64 bits."""

    name: bytes
    size: int
    offset: int

    @property
    def padding(self) -> int:
        """Bytes of a second extra field, itself 4 bytes long at least, before the data."""
        return 4 + -(self.offset + 30 + len(self.name) + 20 + 4) % ALIGNMENT

    @property
    def end(self) -> int:
        return self.offset + 30 + len(self.name) + 20 + self.padding + self.size

    def header(self, crc: int) -> bytes:
        """What stands before the data (PKWARE's APPNOTE 4.3.7)."""
        sizes = struct.pack("<HHQQ", 1, 16, self.size, self.size)
        padding = struct.pack("<HH", 0x4246, self.padding - 4) + bytes(self.padding - 4)
        extra = sizes + padding
        fixed = struct.pack("<IHHHHHIIIHH", 0x04034B50, 45, 0, 0, 0, 33, crc, _MANY, _MANY, len(self.name), len(extra))
        return fixed + self.name + extra

    def listing(self, crc: int) -> bytes:
        """What stands in the directory at the end (4.3.12)."""
        extra = struct.pack("<HHQQQ", 1, 24, self.size, self.size, self.offset)
        lengths = (len(self.name), len(extra), 0, 0, 0, 0, _MANY)
        fixed = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 45, 45, 0, 0, 0, 33, crc, _MANY, _MANY, *lengths)
        return fixed + self.name + extra


_MANY = 0xFFFFFFFF  # says that the number stands in the extra field


def _directory(entries: Collection[_Entry], checksums: Iterable[int]) -> bytes:
    """What stands after the entries: their listings and the three records that end an archive (4.3.14 to 4.3.16)."""
    listings = b"".join(entry.listing(crc) for entry, crc in zip(entries, checksums, strict=True))
    count, size, offset = len(entries), len(listings), max(entry.end for entry in entries)
    end64 = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<IIQI", 0x07064B50, 0, offset + size, 1)
    return listings + end64 + locator + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, _MANY, _MANY, 0)


def _plain(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # without the pickle's own begin and end


def _pickle(tensors: Tensors) -> bytes:
    """The pickle of a dict of tensors, as torch.save writes it (protocol 2)."""
    parts = [pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK]
    for index, (name, tensor) in enumerate(tensors.items()):
        parts += [_plain(name), _pickle_tensor(index, tensor)]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _pickle_tensor(index: int, tensor: LazyTensor) -> bytes:
    """What puts the tensor of the storage data/INDEX on the stack."""
    strides = tuple(int(np.prod(tensor.shape[axis + 1 :])) for axis in range(len(tensor.shape)))
    return b"".join(
        [
            pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + pickle.MARK,
            _plain("storage"),
            pickle.GLOBAL + f"torch\n{NAMES[tensor.dtype]}\n".encode(),
            _plain(str(index)) + _plain("cpu") + _plain(tensor.size) + pickle.TUPLE + pickle.BINPERSID,
            _plain(0) + _plain(tensor.shape) + _plain(strides) + pickle.NEWFALSE,
            pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE,
            pickle.TUPLE + pickle.REDUCE,
        ]
    )
