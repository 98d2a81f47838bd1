"""A file that lies, is cut short or carries code is refused in one line that names it; nothing in it is ever run."""

import dataclasses
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st

from rcm_jax.config import UserError
from rcm_jax.convert import safetensors_file, torch_distributed, torch_file, weights_pickle
from rcm_jax.convert.sources import open_source
from rcm_jax.convert.tensors import LazyTensor
from rcm_jax.convert.torch_file import Region

BF16 = np.dtype(ml_dtypes.bfloat16)
ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.linspace(-1, 1, 4).astype(BF16),
    "empty": np.zeros((0, 2), np.float16),
    "scalar": np.array(7, np.int64),
}


def read_all(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def refused(path: Path, *parts: str):
    """That opening the file gives one line with its name and these parts."""
    with pytest.raises(UserError) as error:
        read_all(open_source(path).tensors)
    message = str(error.value)
    assert message.startswith(str(path))
    assert ": " in message
    assert "\n" not in message
    assert all(part in message for part in parts), message


def attempt(read):
    """What `read` returns, or the UserError that it raises; no other error is allowed."""
    try:
        return read()
    except UserError as error:
        return error


# Safetensors


def safetensors_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_the_reference_wrote_is_read_exactly(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "x.safetensors", {"made": "by others"})
    tensors, metadata = safetensors_file.read_file(tmp_path / "x.safetensors")
    assert_same(read_all(tensors), ARRAYS)
    assert metadata == {"made": "by others"}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "header is cut short"),
        (b"1234567", "header is cut short"),
        (struct.pack("<Q", 50) + b"{}", "header is cut short"),
        (struct.pack("<Q", 2**63) + b"{}" * 40, "header is cut short"),
        (safetensors_bytes(b"[]"), "must have a header of tensors"),
        (safetensors_bytes(b"{]"), "must hold valid JSON"),
        (safetensors_bytes(b'{"a":' * 5000), "must hold valid JSON"),
        (safetensors_bytes(b"\xff\xfe{}"), "must hold valid JSON"),
        (safetensors_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), "a name twice"),
        (safetensors_bytes({"__metadata__": {"a": 1}}), "of metadata in text"),
        (safetensors_bytes({"a": 3}), "must give a a shape"),
        (safetensors_bytes({"a\nb": 3}), r"must give a\nb a shape"),
        (safetensors_bytes({"a": entry(shape=[-2])}, bytes(8)), "must give a a shape"),
        (safetensors_bytes({"a": entry(shape=[2.0])}, bytes(8)), "must give a a shape"),
        (safetensors_bytes({"a": entry(shape=[True, 2])}, bytes(8)), "must give a a shape"),
        (safetensors_bytes({"a": entry(offsets=[0])}, bytes(8)), "must give a a shape"),
        (safetensors_bytes({"a": entry(offsets=[-8, 0])}, bytes(8)), "must give a a shape"),
        (safetensors_bytes({"a": entry(dtype="F8_E4M3")}, bytes(8)), "holds a as F8_E4M3: export it as one of"),
        (safetensors_bytes({"a": entry(dtype=["F32"])}, bytes(8)), "holds a as ['F32']"),
        (safetensors_bytes({"a": entry(shape=[3])}, bytes(8)), "gives a 8 bytes, its shape and dtype take 12"),
        (safetensors_bytes({"a": entry(shape=[2**40, 2**40])}, bytes(8)), "gives a 8 bytes"),
        (safetensors_bytes({"a": entry()}, bytes(7)), "is cut short: its tensors take 8 bytes, it holds 7"),
        (safetensors_bytes({"a": entry()}, bytes(9)), "has bytes that no tensor owns"),
        (safetensors_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "lies: b overlaps with a"),
        (safetensors_bytes({"a": entry(), "b": entry()}, bytes(8)), "lies: b overlaps with a"),
        (safetensors_bytes({"a": entry(offsets=[8, 16])}, bytes(16)), "lies: a leaves a gap after the header"),
        (safetensors_bytes({"a": entry(offsets=[8, 0])}, bytes(8)), "gives a -8 bytes"),
    ],
)
def test_a_safetensors_file_that_lies_is_refused(content, part, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path, part)


def index(weight_map: Any) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{", "must hold valid JSON"),
        (b"[]", "must hold a weight_map"),
        (index({"a": 3}), "must hold a weight_map"),
        (index({"a": "../x.safetensors"}), "names '../x.safetensors', which is not a file beside it"),
        (index({"a": "/etc/passwd"}), "names '/etc/passwd', which is not a file beside it"),
        (index({"a": ".."}), "names '..', which is not a file beside it"),
        (index({"a": "y" * 300}), f"names {'y' * 300}, which is not there: fetch the missing file"),
        (index({"a": "y.safetensors"}), "names y.safetensors, which is not there: fetch the missing file"),
        (index({"a": "x.safetensors"}), "disagrees with x.safetensors on empty, half, scalar"),
        (index(dict.fromkeys([*ARRAYS, "more"], "x.safetensors")), "disagrees with x.safetensors on more"),
    ],
)
def test_an_index_that_lies_is_refused(content, part, tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "x.safetensors")
    path = tmp_path / "x.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_source(tmp_path)
    assert str(error.value).startswith(f"{path} {part}")


def reference_reads(path: Path) -> dict[str, np.ndarray]:
    """Its own error, if the file is not to be read, fails the test that asks."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


GOOD = safetensors.numpy.save(ARRAYS)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    at=st.integers(0, len(GOOD) - 1), new=st.binary(max_size=3), cut=st.integers(0, 4), end=st.integers(0, len(GOOD))
)
@hypothesis.example(at=0, new=b"", cut=0, end=len(GOOD))
def test_a_damaged_safetensors_file_is_refused_or_read_as_the_reference_does(scratch, at, new, cut, end):
    path = scratch / "x.safetensors"
    path.write_bytes((GOOD[:at] + new + GOOD[at + cut :])[: end or None])
    found = attempt(lambda: read_all(safetensors_file.read_file(path)[0]))
    if isinstance(found, UserError):
        assert str(found).startswith(str(path))
    else:
        assert_same(found, reference_reads(path))


# Pickles


class Call:
    """Pickles as a call, which Python's own unpickler would make."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def pth(pickled: bytes, path: Path, entries: dict[str, bytes] | None = None, **kinds) -> Path:
    with zipfile.ZipFile(path, "w", **kinds) as archive:
        for name, data in {"x/data.pkl": pickled, "x/byteorder": b"little", **(entries or {})}.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(os.system, "touch {marker}"), "posix.system"),
        (Call(eval, "open('{marker}', 'w')"), ".eval"),
        (Call(exec, "open('{marker}', 'w')"), ".exec"),
        (Call(open, "{marker}", "w"), "io.open"),
        (Call(getattr, "", "x"), ".getattr"),
        ({"a": Call(os.system, "touch {marker}")}, "posix.system"),
        ([types.SimpleNamespace(a=1)], "types.SimpleNamespace"),
    ],
)
def test_a_pickle_with_code_is_refused_and_not_run(value, name, protocol, tmp_path):
    marker = tmp_path / "ran"
    if isinstance(value, Call):
        value = Call(value.function, *(text.format(marker=marker) for text in value.args))
    path = pth(pickle.dumps(value, protocol), tmp_path / "x.pth")
    refused(path, f"{name}, which no weights need, and is not run")
    assert not marker.exists()


MACHINE = {"collections OrderedDict": dict, "torch Size": lambda sizes=(): tuple(sizes)}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"(cposix\nsystem\nS'id'\no.", "uses STRING|names posix"),
        (b"(S'id'\nios\nsystem\n.", "uses STRING|uses INST"),
        (b"\x82\x01.", "uses EXT1"),
        (b"\x80\x05\x97.", "uses NEXT_BUFFER"),
        (b"\x80\x04\x8f.", "uses EMPTY_SET"),
        (b"I01\n.", "uses INT"),
        (b"Pid\n.", "uses PERSID"),
        (b"K\x01Q.", "uses BINPERSID"),
        (b"", "damaged"),
        (b".", "damaged"),
        (b"}", "damaged"),
        (b"K\x01K\x02.", "damaged"),
        (b"K\x01R.", "damaged"),
        (b"K\x01K\x02R.", "damaged"),
        (b"ccollections\nOrderedDict\nK\x01R.", "damaged"),
        (b"ccollections\nOrderedDict\n(K\x01K\x02tR.", "damaged"),
        (b"K\x01}b.", "damaged"),
        (b"}K\x01s.", "damaged"),
        (b"}(K\x01u.", "damaged"),
        (b"}])K\x01s.", "damaged"),
        (b"})K\x01s.", "damaged"),
        (b"K\x01K\x02a.", "damaged"),
        (b"h\x05.", "damaged"),
        (b"t.", "damaged"),
        (b"X\xff\xff\xff\xffabc.", "damaged"),
        (b"\x8d" + b"\xff" * 8 + b"abc.", "damaged"),
    ],
)
def test_the_machine_runs_nothing_but_plain_data(code, message):
    with pytest.raises(UserError, match=rf"^x\.pth .*({message})"):
        weights_pickle.load_pickle(code, MACHINE, "x.pth")


def test_a_large_memo_index_takes_no_memory():
    """Python's own unpickler would reserve a table up to the index, 2^32 entries."""
    assert weights_pickle.load_pickle(b"}r\xff\xff\xff\xff.", MACHINE, "x") == {}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=300) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner, inner, inner)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(value=PLAIN, protocol=st.integers(2, 5))
def test_plain_data_is_read_as_python_reads_it(value, protocol):
    pickled = pickle.dumps(value, protocol)
    assert weights_pickle.load_pickle(pickled, {}, "x") == pickle.loads(pickled) == value


SEEDS = [pickle.dumps({"a": [1, (2, "x"), None]}, protocol) for protocol in (2, 4)] + [
    b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(X\x01\x00\x00\x00aq\x02K\x03X\x01\x00\x00\x00bq\x03K\x04u}b."
]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    seed=st.sampled_from(SEEDS), edits=st.lists(st.tuples(st.integers(0, 70), st.binary(max_size=3)), max_size=3)
)
def test_any_bytes_give_plain_data_or_one_error(seed, edits):
    for at, new in edits:
        seed = seed[:at] + new + seed[at + 1 :]
    value = attempt(lambda: weights_pickle.load_pickle(seed, MACHINE, "x"))
    if isinstance(value, UserError):
        assert str(value).startswith("x ")
    else:
        assert isinstance(value, dict | list | tuple | str | int | float | bytes | None)


# Archives


def storage_pickle(kind="FloatStorage", key="0", count=6, offset=0, shape=(2, 3), stride=(3, 1)) -> bytes:
    """What torch.save writes of {"a": tensor}."""

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = b"(" + plain("storage") + f"ctorch\n{kind}\n".encode() + plain(key) + plain("cpu") + plain(count) + b"tQ"
    arguments = storage + plain(offset) + plain(shape) + plain(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}(" + plain("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRu."


DATA = {"x/data/0": np.arange(6, dtype=np.float32).tobytes()}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, np.arange(6.0).reshape(2, 3)),
        ({"shape": (3,), "stride": (2,), "offset": 1}, np.array([1, 3, 5])),
        ({"shape": (3, 2), "stride": (1, 3)}, np.arange(6.0).reshape(2, 3).T),
        ({"shape": (), "stride": (), "offset": 4}, np.array(4.0)),
        ({"shape": (0, 3), "stride": (3, 1)}, np.zeros((0, 3))),
        ({"shape": (1, 2, 1), "stride": (99, 1, 99)}, np.arange(2.0).reshape(1, 2, 1)),
    ],
)
def test_views_of_a_storage_are_read(fields, expected, tmp_path):
    path = pth(storage_pickle(**fields), tmp_path / "x.pth", DATA)
    found = torch_file.read_value(Region(path))["a"].read()
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"count": 7}, "reaches beyond its storage"),
        ({"count": 5}, "reaches beyond its storage"),
        ({"offset": 1}, "reaches beyond its storage"),
        ({"shape": (2, 4), "stride": (4, 1)}, "reaches beyond its storage"),
        ({"shape": (2**40, 2**40), "stride": (2**40, 1)}, "reaches beyond its storage"),
        ({"shape": (2**40, 2**20), "stride": (0, 0)}, "repeats elements of its storage"),
        ({"offset": -1}, "damaged pickle"),
        ({"shape": (2, 3), "stride": (-3, 1)}, "damaged pickle"),
        ({"shape": (2, 3), "stride": (3,)}, "damaged pickle"),
        ({"key": "../../etc/passwd"}, "lacks its entry data/../../etc/passwd"),
        ({"key": "1"}, "lacks its entry data/1"),
        ({"kind": "ComplexFloatStorage"}, "names torch.ComplexFloatStorage"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(fields, part, tmp_path):
    refused(pth(storage_pickle(**fields), tmp_path / "x.pth", DATA), part)


@pytest.mark.parametrize(
    ("entries", "part"),
    [
        ({"x/../../evil": b""}, "has an entry 'x/../../evil', which leads out of the archive"),
        ({"/etc/passwd": b""}, "has an entry '/etc/passwd', which leads out of the archive"),
        ({"x\\..\\evil": b""}, "leads out of the archive"),
        ({"y/data/0": b""}, "all in one folder"),
        ({"x/byteorder": b"big"}, "holds big-endian numbers"),
    ],
)
def test_an_archive_with_strange_entries_is_refused(entries, part, tmp_path):
    refused(pth(storage_pickle(), tmp_path / "x.pth", DATA | entries), part)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_holds_an_entry_twice_is_refused(tmp_path):
    path = pth(storage_pickle(), tmp_path / "x.pth", DATA)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/data/0", bytes(24))
    refused(path, "must hold each entry once")


def test_compressed_entries_are_refused(tmp_path):
    path = pth(storage_pickle(), tmp_path / "x.pth", DATA, compression=zipfile.ZIP_DEFLATED)
    refused(path, "has a compressed or encrypted entry x/data.pkl: save it with torch.save")


@pytest.mark.parametrize("value", [[], {}, {"a": 3}, {"a": {"b": "c"}}, {1: 2}, "text"])
def test_a_pickle_of_other_things_than_tensors_is_refused(value, tmp_path):
    refused(pth(pickle.dumps(value, 2), tmp_path / "x.pth"), "no tensor")


def test_an_archive_that_is_cut_short_is_refused(tmp_path):
    path = pth(storage_pickle(), tmp_path / "x.pth", DATA)
    content = path.read_bytes()
    for size in range(9, len(content), 7):
        path.write_bytes(content[:size])
        refused(path, "is no complete zip archive")


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(at=st.integers(0, 2000), new=st.binary(min_size=1, max_size=4))
def test_a_damaged_archive_is_refused_or_read(scratch, at, new):
    """Whatever is damaged, no other error comes, and the memory stays small."""
    path = scratch / "x.pth"
    content = pth(storage_pickle(), path, DATA).read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + new + content[at + len(new) :])
    found = attempt(lambda: read_all(open_source(path).tensors))
    if isinstance(found, UserError):
        assert "\n" not in str(found)
    else:
        assert sum(array.nbytes for array in found.values()) <= 24


# Distributed checkpoints


@pytest.fixture
def torch_classes(monkeypatch):
    """Stand-ins for the classes that .metadata is made of, under PyTorch's names, so that Python can pickle them."""
    package = "torch.distributed.checkpoint"
    fields = {
        "Metadata": ["state_dict_metadata", "planner_data", "storage_data"],
        "TensorStorageMetadata": ["properties", "size", "chunks"],
        "TensorProperties": ["dtype"],
        "ChunkStorageMetadata": ["offsets", "sizes"],
        "MetadataIndex": ["fqn", "offset", "index"],
        "_StorageInfo": ["relative_path", "offset", "length"],
    }
    classes = {}
    for name in ("torch", f"{package}.metadata", f"{package}.filesystem"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, names in fields.items():
        module = f"{package}.{'filesystem' if name == '_StorageInfo' else 'metadata'}"
        made = dataclasses.make_dataclass(name, names, frozen=True)
        made.__module__ = module
        setattr(sys.modules[module], name, made)
        classes[name] = made
    metadata = sys.modules[f"{package}.metadata"]
    encoding = type("_MEM_FORMAT_ENCODING", (), {"__module__": metadata.__name__, "TORCH_CONTIGUOUS_FORMAT": 0})
    metadata._MEM_FORMAT_ENCODING = classes["encoding"] = encoding
    size = type("Size", (tuple,), {"__module__": "torch", "__reduce__": lambda self: (size, (tuple(self),))})
    dtype = type("float32", (), {"__module__": "torch"})
    sys.modules["torch"].Size, sys.modules["torch"].float32 = size, dtype
    return types.SimpleNamespace(**classes, Size=size, float32=dtype)


WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)
BOXES = [((0, 0), (4, 4)), ((0, 4), (1, 2)), ((1, 4), (3, 2))]


def write_dcp(
    folder: Path,
    torch_classes,
    boxes=BOXES,
    *,
    file="__0_0.distcp",
    fqn="net.w",
    size=(4, 6),
    grow=0,
    extra=None,
    protocol=4,
):
    """A distributed checkpoint of one tensor in parts, as torch writes it."""
    t = torch_classes
    folder.mkdir()
    data, storage, chunks = b"", {}, []
    for number, (offsets, sizes) in enumerate(boxes):
        part = WHOLE[tuple(slice(start, start + n) for start, n in zip(offsets, sizes, strict=True))]
        stored = {"x/data/0": part.tobytes()}
        pickled = storage_pickle(count=part.size, shape=part.shape, stride=(part.shape[1], 1))
        # one tensor instead of a dict of it
        pickled = b"\x80\x02" + pickled[pickled.index(b"ctorch._utils") : -2] + b"."
        archive = pth(pickled, folder / "part", stored).read_bytes()
        index = t.MetadataIndex(fqn, t.Size(offsets), number)
        storage[index] = t._StorageInfo(file, len(data), len(archive) + grow)
        chunks.append(t.ChunkStorageMetadata(t.Size(offsets), t.Size(sizes)))
        data += archive
    (folder / "part").unlink()
    (folder / "__0_0.distcp").write_bytes(data)
    entry = t.TensorStorageMetadata(t.TensorProperties(t.float32), t.Size(size), chunks)
    metadata = t.Metadata({"net.w": entry} | (extra or {}), None, storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    return folder


def test_a_tensor_is_put_together_from_its_parts(tmp_path, torch_classes):
    found = torch_distributed.read_folder(write_dcp(tmp_path / "x.dcp", torch_classes))
    np.testing.assert_array_equal(found["net.w"].read(), WHOLE)
    assert isinstance(found["net.w"], LazyTensor)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_member_of_an_enum_may_be_named_by_getattr_and_nothing_else(protocol, tmp_path, torch_classes):
    """So do Python 3.11.0 to 3.11.3."""
    member = {"x": Call(getattr, torch_classes.encoding, "TORCH_CONTIGUOUS_FORMAT")}
    found = torch_distributed.read_folder(write_dcp(tmp_path / "x.dcp", torch_classes, extra=member, protocol=protocol))
    np.testing.assert_array_equal(found["net.w"].read(), WHOLE)
    for owner in ("text", torch_classes.float32, torch_classes.Metadata):
        folder = write_dcp(tmp_path / str(owner), torch_classes, extra={"x": Call(getattr, owner, "__doc__")})
        with pytest.raises(UserError, match="damaged pickle"):
            open_source(folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"boxes": BOXES[:2]}, "has parts of net.w that do not make up its shape (4, 6)"),
        ({"boxes": [*BOXES[:2], ((0, 4), (3, 2))]}, "has parts of net.w that do not make up its shape"),
        ({"boxes": [*BOXES[:2], ((1, 3), (3, 2))]}, "has parts of net.w that do not make up its shape"),
        ({"size": (4, 7)}, "has parts of net.w that do not make up its shape"),
        ({"size": (3, 8)}, "has parts of net.w that do not make up its shape"),
        ({"file": "../__0_0.distcp"}, "names '../__0_0.distcp', which is not a file beside it"),
        ({"file": "y" * 300}, f"names {'y' * 300}, which is not there: fetch the missing file"),
        ({"file": "__1_0.distcp"}, "names __1_0.distcp, which is not there: fetch the missing file"),
        ({"extra": {"x": Call(os.system, "id")}}, "names posix.system, which no weights need, and is not run"),
    ],
)
def test_a_distributed_checkpoint_that_lies_is_refused(change, part, tmp_path, torch_classes):
    folder = write_dcp(tmp_path / "x.dcp", torch_classes, **change)
    with pytest.raises(UserError) as error:
        open_source(folder)
    assert str(error.value).startswith(f"{folder / '.metadata'} {part}")


@pytest.mark.parametrize(("width", "levels"), [(2, 60), (1, 5000)])
@pytest.mark.parametrize(
    ("field", "part"),
    [
        ("file", "names an object of type tuple, which is not a file beside it"),
        ("fqn", "lacks what a checkpoint needs (TypeError)"),
    ],
)
def test_a_name_that_could_not_be_printed_is_not(field, part, width, levels, tmp_path, torch_classes):
    """Tuples of the same tuple twice, 60 levels deep, would print 2^60 items; 5000 levels exceed Python's stack."""
    folder = write_dcp(tmp_path / "x.dcp", torch_classes, protocol=2, **{field: "ENDLESS"})
    level = b"q\xc8" + b"h\xc8" * (width - 1) + (b"\x85", b"\x86")[width - 1]  # memoise, get it again, tuple
    metadata = (folder / ".metadata").read_bytes()
    endless = metadata.replace(b"X\7\0\0\0ENDLESS", b")" + level * levels)
    assert len(endless) > len(metadata)
    (folder / ".metadata").write_bytes(endless)
    with pytest.raises(UserError) as error:
        open_source(folder)
    assert str(error.value).startswith(f"{folder / '.metadata'} {part}")


def test_a_part_that_ends_early_or_holds_something_else_is_refused(tmp_path, torch_classes):
    with pytest.raises(UserError, match=r"__0_0\.distcp is shorter than \.metadata says"):
        open_source(write_dcp(tmp_path / "short.dcp", torch_classes, grow=10_000))
    folder = write_dcp(tmp_path / "other.dcp", torch_classes)
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data.replace(b"PK\1\2", rb"PK\9\9"))
    with pytest.raises(UserError, match=r"__0_0\.distcp at byte 0 is no complete zip archive"):
        read_all(open_source(folder).tensors)
