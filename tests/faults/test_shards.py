"""launch.precompute with .tar shards: hostile ones are refused, and kill -9 costs no more than the shard at hand."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from launch import precompute
from rcm_jax.data import tar_shards
from rcm_jax.data.samples import Sample

ROOT = Path(__file__).parents[2]
USER_ERROR = 2
SHARDS = 40


def pack(*members, kind=tarfile.USTAR_FORMAT):
    """An archive whose members have 9 bytes each; what is given of them are fields of TarInfo."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
        for fields in members:
            info = tarfile.TarInfo()
            info.size = 9
            for name, value in fields.items():
                setattr(info, name, value)
            archive.addfile(info, io.BytesIO(b"nine bytes"))
    return file.getvalue()


def with_field(offset, value, data):
    """An archive whose first header says something else, with the sum that belongs to it."""
    header = bytearray(data[:512])
    header[offset : offset + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


SOUND = pack({"name": "0.prompt.txt"})
SIZE, KIND = 124, 156
HOSTILE = {
    "absolute_path": (pack({"name": "/etc/0.prompt.txt"}), "whose path leads out of the archive"),
    "path_that_climbs": (pack({"name": "a/../../0.prompt.txt"}), "whose path leads out of the archive"),
    "path_that_climbs_by_prefix": (with_field(345, b"../..", SOUND), "whose path leads out of the archive"),
    "backslashes": (pack({"name": "..\\0.prompt.txt"}), "whose path leads out of the archive"),
    "name_of_several_lines": (pack({"name": "0\n.prompt.txt"}), "whose path leads out of the archive"),
    "name_that_is_no_text": (with_field(0, b"\xff", SOUND), "whose name is not text in UTF-8"),
    "symbolic_link": (pack({"name": "0.prompt.txt", "type": b"2", "linkname": "/etc/passwd"}), "a symbolic link"),
    "hard_link": (pack({"name": "0.prompt.txt", "type": b"1", "linkname": "1.prompt.txt"}), "a hard link"),
    "device": (pack({"name": "0.prompt.txt", "type": b"3"}), "a character device"),
    "pipe": (pack({"name": "0.prompt.txt", "type": b"6"}), "a pipe"),
    "sparse_file": (with_field(KIND, b"S", SOUND), "a sparse file"),
    "folder_with_bytes": (with_field(KIND, b"5", SOUND), "of kind b'5' and no plain file"),
    "long_name": (pack({"name": "a" * 120}, kind=tarfile.GNU_FORMAT), "a long name of GNU tar"),
    "renamed_by_an_extended_header": (
        pack({"name": "0.prompt.txt", "pax_headers": {"path": "/etc/0"}}, kind=tarfile.PAX_FORMAT),
        "holds an extended header with 'path', which could rename a member",
    ),
    "extended_header_that_lies": (with_field(KIND, b"x", SOUND), "holds an extended header with 'byte'"),
    "one_name_twice": (pack({"name": "0.prompt.txt"}, {"name": "./0.prompt.txt"}), "holds 0.prompt.txt twice"),
    "size_in_binary": (with_field(SIZE, b"\x80" + bytes(10) + b"\x09", SOUND), "which is no octal number"),
    "size_below_zero": (with_field(SIZE, b"-0000000001\0", SOUND), "which is no octal number"),
    "size_beyond_the_end": (with_field(SIZE, b"77777777777\0", SOUND), "is cut inside 0.prompt.txt"),
    "size_too_small": (with_field(SIZE, b"00000000000\0", SOUND), "has a damaged header at byte 512"),
    "something_after_the_end": (SOUND + SOUND, "goes on after its end mark"),
    "compressed": (b"\x1f\x8b\x08" + bytes(600), "is no .tar file: give an uncompressed .tar file"),
    "empty": (b"", "is cut at byte 0, before its end mark"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_shard_is_refused(name, tmp_path, monkeypatch, capsys):
    """In this process, for speed, but for that as a user would."""
    data, message = HOSTILE[name]
    path = tmp_path / "shard.tar"
    path.write_bytes(data)
    monkeypatch.setattr(precompute, "keep_compilations", lambda: None)
    with pytest.raises(SystemExit) as end:
        precompute.main([f"--out={tmp_path / 'out'}", "--name=set", f"--from-tar={path}", "--max-bad=0.9"])
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (USER_ERROR, 1)
    assert str(path) in error
    assert message in error
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Enough samples that a kill finds the command at work."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    for shard in range(SHARDS):
        latents = random.standard_normal((8, 4, 16, 16, 16)).astype(ml_dtypes.bfloat16)
        texts = random.standard_normal((8, 16, 64)).astype(ml_dtypes.bfloat16)
        samples = [Sample(latent, text, "a fox", "") for latent, text in zip(latents, texts, strict=True)]
        tar_shards.write_shard(folder / f"shard_{shard:06d}.tar", samples, 8 * shard)
    return folder


def start(out, shards):
    command = [sys.executable, "-m", "launch.precompute", f"--out={out}", "--name=set", f"--from-tar={shards}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_kill_9_costs_no_finished_shard(shards, tmp_path):
    """Killed in the middle of the shards; the same command goes on and ends with the same bytes."""
    precompute.main([f"--out={tmp_path / 'whole'}", "--name=set", f"--from-tar={shards}"])
    partial = tmp_path / "broken" / ".set.partial"
    killed = start(tmp_path / "broken", shards)
    while not list(partial.glob("content/set-*")):
        assert killed.poll() is None
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    noted = (partial / "journal.jsonl").read_text().count("}\n") - 1  # the first line is the command's
    finished = {path.name: os.stat(path).st_mtime_ns for path in (partial / "content").glob("set-*")}
    assert noted < SHARDS

    again = start(tmp_path / "broken", shards)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert f"went on after {noted} of {SHARDS} files" in said or not noted
    data_set = tmp_path / "broken" / "set"
    kept = sorted(finished)[:noted]
    assert {name: os.stat(data_set / name).st_mtime_ns for name in kept} == {name: finished[name] for name in kept}
    assert contents(data_set) == contents(tmp_path / "whole" / "set")
    assert json.loads((data_set / "precompute.json").read_text())["samples"] == 8 * SHARDS
