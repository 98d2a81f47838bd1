"""Official .tar shards: read and written to the last bit, and no damaged one is taken for whole."""

import io
import json
import pickle
import tarfile
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import precompute
from rcm_jax.checkpoint import load_safetensors
from rcm_jax.config import UserError
from rcm_jax.convert.torch_file import Region, encode_tensor, read_value
from rcm_jax.data import pipeline, tar_file, tar_shards
from rcm_jax.data.samples import BadSampleError, Sample

PROMPTS = ("a fox", "", "ein Füchslein 狐", "a\nb", "e")


def make_sample(number, prompt="a fox", dtype=ml_dtypes.bfloat16):
    random = np.random.default_rng(number)
    latent_THWC, text_SD = random.standard_normal((2, 3, 4, 5)), random.standard_normal((6, 7))
    return Sample(latent_THWC.astype(dtype), text_SD.astype(dtype), prompt, f"sample {number}")


SAMPLES = [make_sample(number, prompt) for number, prompt in enumerate(PROMPTS)]


def write_set(folder, shards=(SAMPLES[:3], SAMPLES[3:]), *, manifest=True):
    """Shards as launch.precompute exports them."""
    folder.mkdir(exist_ok=True)
    hashes, first = {}, 0
    for number, samples in enumerate(shards):
        name = f"shard_{number:06d}.tar"
        hashes[name] = tar_shards.write_shard(folder / name, samples, first)
        first += len(samples)
    if manifest:
        tar_shards.write_manifest(folder, hashes)
    return folder


def pack(path, members, kind=tarfile.USTAR_FORMAT):
    """An archive by Python's tarfile; a member is (name, bytes), or a TarInfo."""
    with tarfile.open(path, "w", format=kind) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def members_of(key="0", **changes):
    """The members of a sound sample, some of them changed; None leaves one out."""
    sample = SAMPLES[0]
    parts = {
        "latent.pt": encode_tensor(np.moveaxis(sample.latent_THWC, -1, 0)),
        "embed.pt": encode_tensor(sample.text_SD),
        "prompt.txt": sample.prompt.encode(),
    } | {name.replace("_", "."): data for name, data in changes.items()}
    return [(f"{key}.{suffix}", data) for suffix, data in parts.items() if data is not None]


def read(path):
    """Sound samples, and what is said of the others."""
    found = [sample for shard in tar_shards.open_shards([path]) for sample in tar_shards.read_samples(shard)]
    sound = [sample for sample in found if isinstance(sample, Sample)]
    return sound, [str(sample) for sample in found if isinstance(sample, BadSampleError)]


def assert_same(found, expected):
    assert [sample.prompt for sample in found] == [sample.prompt for sample in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("latent_THWC", "text_SD"):
            assert getattr(ours, key).dtype == getattr(theirs, key).dtype
            np.testing.assert_array_equal(getattr(ours, key), getattr(theirs, key))


def run(out, *words):
    precompute.main([f"--out={out}", "--name=mine", *words])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("manifest", [True, False])
def test_shards_become_a_data_set_and_shards_again(manifest, tmp_path):
    """Every bit of every sample and of every file; the negative caption's embedding goes along."""
    shards = write_set(tmp_path / "shards", (SAMPLES[:4], SAMPLES[4:]), manifest=manifest)
    (tmp_path / "negative.pt").write_bytes(encode_tensor(SAMPLES[1].text_SD))
    run(tmp_path, f"--from-tar={shards}", f"--negative-embedding={tmp_path / 'negative.pt'}")
    source = pipeline.open_source("mine", tmp_path, "train")
    records = [
        Sample(r["latent"], r["text"], r["prompt"].decode(), "") for r in (source[n] for n in range(len(source)))
    ]
    assert_same(records, SAMPLES)
    negative = load_safetensors(tmp_path / "mine" / "negative.safetensors")[0]["text"]
    np.testing.assert_array_equal(negative, SAMPLES[1].text_SD)
    run(tmp_path, f"--to-tar={tmp_path / 'again'}", "--shard-size=4")
    again = files(tmp_path / "again")
    assert again.pop("negative.pt") == (tmp_path / "negative.pt").read_bytes()
    assert json.loads(again.pop("precompute.json"))["samples"] == 5
    if not manifest:
        del again["manifest.json"]
    assert again == files(shards)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_dtypes_are_kept(dtype, tmp_path):
    samples = [make_sample(3, dtype=dtype)]
    write_set(tmp_path / "shards", (samples,))
    run(tmp_path, f"--from-tar={tmp_path / 'shards'}")
    record = pipeline.open_source("mine", tmp_path, "train")[0]
    assert record["latent"].dtype == record["text"].dtype == dtype
    np.testing.assert_array_equal(record["latent"], samples[0].latent_THWC)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_other_programs(kind, tmp_path):
    """In any format, with folders, times in fractions of a second, other members between, and samples not in a row."""
    folder = tarfile.TarInfo("./part")
    folder.type = tarfile.DIRTYPE
    stamped = tarfile.TarInfo("x.json")
    stamped.mtime = 0.5
    first, second = members_of("./part/a.v1"), members_of("b")
    mixed = [folder, first[0], second[2], stamped, second[0], first[2], second[1], first[1]]
    sound, bad = read(pack(tmp_path / "a.tar", mixed, kind))
    assert not bad
    assert [sample.name.split()[1] for sample in sound] == ["part/a.v1", "b"]
    assert_same(sound, [SAMPLES[0]] * 2)


names = st.text("abc._-09 ü/", min_size=1, max_size=60).filter(lambda name: not {"", ".", ".."} & set(name.split("/")))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5, unique_by=lambda member: member[0]),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]),
)
def test_members_are_those_of_pythons_tarfile(tmp_path_factory, members, kind):
    path = pack(tmp_path_factory.mktemp("tar") / "a.tar", members, kind)
    found, fault = tar_file.read_members(path)
    assert not fault
    with tarfile.open(path) as archive:
        assert [(m.name, m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in archive]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Writes three samples' shard, cut to a length; with a manifest or without. `cut.ends` of the samples' bytes."""
    folder = write_set(tmp_path_factory.mktemp("cut"), (SAMPLES[:3],))
    path, manifest = folder / "shard_000000.tar", folder / "manifest.json"
    data, listed = path.read_bytes(), manifest.read_bytes()
    found, _ = tar_file.read_members(path)

    def write(length, *, with_manifest):
        path.write_bytes(data[:length])
        manifest.write_bytes(listed) if with_manifest else manifest.unlink(missing_ok=True)
        return folder

    write.ends = [member.offset + member.size for member in found[2::3]]
    return write


@settings(max_examples=100, deadline=None)
@given(length=st.data())
def test_no_cut_goes_unnoticed(cut, length):
    """Wherever an archive is cut, also between members and in headers: what is sound is read, the rest is named."""
    blocks = -(-cut.ends[-1] // tar_file.BLOCK)
    length = length.draw(st.integers(0, blocks * tar_file.BLOCK) | st.integers(0, blocks).map(tar_file.BLOCK.__mul__))
    expected = SAMPLES[: sum(end <= length for end in cut.ends)]
    sound, bad = read(cut(length, with_manifest=True))
    assert_same(sound, expected)
    assert [message.split()[1] for message in bad] == [f"{number:09d}" for number in range(len(sound), 3)]
    sound, bad = read(cut(length, with_manifest=False))
    assert_same(sound, expected)
    assert "the samples after it are lost: fetch it again" in bad[-1]


def test_a_changed_bit_is_found_by_the_manifest(tmp_path):
    folder = write_set(tmp_path)
    path = folder / "shard_000001.tar"
    member = tar_file.read_members(path).members[0]
    data = bytearray(path.read_bytes())
    data[member.offset + member.size // 2] ^= 1
    path.write_bytes(data)
    sound, bad = read(folder)
    assert_same(sound, [*SAMPLES[:3], SAMPLES[4]])
    assert bad == [f"sample 000000003 of {path} is not what manifest.json says: fetch it again"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("listed_shard_is_gone", "shard_000001.tar is no .tar file, nor a folder with one: check the path"),
        ("unlisted_shard", "shard_000002.tar is not listed in the manifest.json beside it: remove one of them"),
        ("no_json", "manifest.json must hold valid JSON"),
        ("other_json", "manifest.json must list, by file names, the hashes of each shard's samples"),
        ("path_that_climbs", "manifest.json must list, by file names, the hashes of each shard's samples"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(change, message, tmp_path):
    folder = write_set(tmp_path)
    match change:
        case "listed_shard_is_gone":
            (folder / "shard_000001.tar").unlink()
        case "unlisted_shard":
            tar_shards.write_shard(folder / "shard_000002.tar", SAMPLES[:1], 5)
        case "no_json":
            (folder / "manifest.json").write_bytes(b"{")
        case "other_json":
            (folder / "manifest.json").write_bytes(b'{"shards": {"shard_000000.tar": ["a"]}}')
        case "path_that_climbs":
            (folder / "manifest.json").write_bytes(b'{"shards": {"../shard_000000.tar": {}}}')
    with pytest.raises(UserError, match=message):
        tar_shards.open_shards([folder])


def test_a_shard_that_is_given_twice_is_refused(tmp_path):
    folder = write_set(tmp_path)
    with pytest.raises(UserError, match=r"a \.tar file is given twice"):
        tar_shards.open_shards([folder, folder / "shard_000001.tar"])


class Touch:
    """A pickle of it would write a file, were it run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def torch_zip(value):
    """A .pt file with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", value)
    return file.getvalue()


def misplaced(data):
    """A .pt file whose zip directory says that the tensor's bytes lie far beyond its end."""
    name = b"archive/data/0"
    at = data.rindex(name) + len(name) + 20  # in the extra field: a head of 4 bytes, then three numbers of 8
    return data[:at] + (2**62).to_bytes(8, "little") + data[at + 8 :]


def bad_parts(folder):
    """Members that are not what a sample has, and what is said of each."""
    latent = np.zeros((5, 2, 3, 4), ml_dtypes.bfloat16)
    yield {"latent_pt": None}, "lacks latent.pt: fetch it again"
    yield {"embed_pt": None, "prompt_txt": None}, "lacks embed.pt and prompt.txt: fetch it again"
    yield {"latent_pt": b""}, "is no complete zip archive"
    yield {"latent_pt": encode_tensor(latent)[:-9]}, "is no complete zip archive"
    yield {"latent_pt": misplaced(encode_tensor(latent))}, "has a zip directory that lies about data/0"
    yield (
        {"latent_pt": torch_zip(pickle.dumps(Touch(f"{folder}/owned"), 2))},
        "io.open, which no weights need, and is not run",
    )
    yield {"latent_pt": torch_zip(pickle.dumps([1], 2))}, "holds no tensor where one of 4 axes"
    yield {"latent_pt": encode_tensor(latent[0])}, "holds a bfloat16 tensor of shape (2, 3, 4) where one of 4 axes"
    yield {"embed_pt": encode_tensor(np.zeros((6, 7), np.int64))}, "holds a int64 tensor of shape (6, 7)"
    yield {"latent_pt": encode_tensor(latent[:, :1])}, "has a latent bfloat16[1, 3, 4, 5]"
    yield {"latent_pt": encode_tensor(np.float32(latent))}, "has a latent float32[2, 3, 4, 5]"
    yield {"latent_pt": encode_tensor(np.full_like(latent, np.nan))}, "has a number in its latent that is not finite"
    yield {"prompt_txt": b"caf\xe9"}, "has a prompt that is not text in UTF-8 (unexpected end of data)"
    yield {"prompt_txt": b"a" * 2**20}, "has a prompt of more than 65,536 bytes: shorten it"


def test_bad_samples_are_left_out_by_name(tmp_path, capfd):
    """Whatever a sample lacks or has too much, the others are read; nothing of it is run."""
    cases = list(bad_parts(tmp_path))
    members = [member for n, (changes, _) in enumerate(cases) for member in members_of(f"bad{n}", **changes)]
    path = pack(tmp_path / "a.tar", [*members_of("first"), *members, *members_of("last")])
    run(tmp_path, f"--from-tar={path}", "--max-bad=0.9")
    source = pipeline.open_source("mine", tmp_path, "train")
    assert len(source) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "left out: " in line]
    for number, (_, message) in enumerate(cases):
        assert f"sample bad{number} of {path}" in said[number]
        assert message in said[number]
    assert json.loads((tmp_path / "mine" / "precompute.json").read_text())["samples"] == 2
    assert not (tmp_path / "owned").exists()


def test_too_many_bad_samples_stop_it(tmp_path, capsys):
    """The share is of all samples, and the reason is that of the first."""
    members = [*members_of("a"), *members_of("b", embed_pt=None), *members_of("c"), *members_of("d", prompt_txt=None)]
    path = pack(tmp_path / "a.tar", members)
    with pytest.raises(SystemExit):
        run(tmp_path, f"--from-tar={path}", "--max-bad=0.4")
    error = capsys.readouterr().err.splitlines()[-1]
    assert "bad samples: 2, --max-bad allows 1: mend them or allow more. The first: sample b of" in error
    assert not (tmp_path / "mine").exists()
    run(tmp_path, f"--from-tar={path}", "--max-bad=0.5")
    assert len(pipeline.open_source("mine", tmp_path, "train")) == 2


def test_memory_is_that_of_a_sample(tmp_path):
    """However many a shard has, in and out."""
    sample = Sample(np.ones((8, 32, 32, 16), np.float32), np.ones((6, 7), np.float32), "a fox", "")
    shards = write_set(tmp_path / "shards", ([sample] * 48,))
    tracemalloc.start()
    try:
        run(tmp_path, f"--from-tar={shards}")
        run(tmp_path, f"--to-tar={tmp_path / 'again'}")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # As read, in the order of the record, as a record's bytes, and some of these twice.
    assert peak < 12 * sample.latent_THWC.nbytes


def test_a_tensor_is_written_as_it_is_read(tmp_path):
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32, np.int64):
        array = np.arange(24).astype(dtype).reshape(2, 3, 4).transpose(2, 0, 1)
        data = encode_tensor(array)
        (tmp_path / "a").write_bytes(b"before" + data + b"after")
        found = read_value(Region(tmp_path / "a", 6, len(data)))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.read(), array)
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
