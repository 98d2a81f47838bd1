"""Hostile input is refused with one line, before anything is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fuzz
from launch import sample, train

ROOT = Path(__file__).parents[2]
USER_ERROR = 2


def with_header(header: dict) -> bytes:
    """A safetensors file that has 8 bytes of data."""
    coded = json.dumps(header).encode()
    return len(coded).to_bytes(8, "little") + coded + bytes(8)


def tensor(*, shape=(2,), dtype="F32", offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WEIGHTS = {
    "empty": b"",
    "cut": b"\x40\x00\x00",
    "header_of_2_exabytes": (2**61).to_bytes(8, "little") + b"{}",
    "overlapping_tensors": with_header({"a": tensor(), "b": tensor()}),
    "tensor_beyond_the_end": with_header({"a": tensor(shape=(2**40,), offsets=(0, 2**42))}),
    "size_unlike_the_shape": with_header({"a": tensor(shape=(3,))}),
    "unknown_dtype": with_header({"a": tensor(dtype="X9")}),
    "float8": with_header({"a": tensor(shape=(8,), dtype="F8_E4M3")}),
    "pickle": b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR.",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weights_file_that_is_none_is_refused(name, folder, tmp_path, monkeypatch, capsys):
    """In this process, for speed, but for that as a user would."""
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(WEIGHTS[name])
    monkeypatch.setattr(train, "keep_compilations", lambda: None)
    workdir = tmp_path / "run"
    words = ["train", "--config=configs/digits_teacher.py", f"--workdir={workdir}", "--config.data.batch_size=8"]
    words += [f"--config.data.dir={folder}", "--config.data.name=digits/first_2/1.0.0", "--config.log.sample_every=0"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*words, f"--config.teacher.negative_path={path}"])
    with pytest.raises(SystemExit) as end:
        train.main()
    error = capsys.readouterr().err
    assert end.value.code == USER_ERROR
    assert error.count("\n") == 1
    reason = "holds a tensor of a dtype that numpy lacks" if name == "float8" else "is not a complete safetensors file"
    assert f"{path} {reason} (" in error
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=99999999999", "seed=99999999999 must be an integer of at least 0 and below 2^31"),
        ("stages=scm:" + "9" * 5000, "must end in a positive number of iterations below 2^31"),
        ("loss.simulation_times=" + "(" * 500, "must be of type tuple"),
        ("data.batch_size=" + "9" * 5000, "must be of type int"),
        ("teacher.caption_dropout=1.5", "teacher.caption_dropout=1.5 must be a number from 0 to 1"),
        ("faults.max_bad_data=2.0", "must be a number of at least 0 and below 1"),
        ("optimizer.student_lr=1e999", "must be of type float"),
        ("no\nsuch\nkey=1", "no value is named no such key"),
    ],
    ids=lambda text: text[:30],
)
def test_a_value_out_of_range_is_refused(override, message, tmp_path):
    words = ["--config=configs/digits_rcm.py", f"--workdir={tmp_path / 'run'}", f"--config.{override}"]
    run = subprocess.run(
        [sys.executable, "-m", "launch.train", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr.count("\n")) == (USER_ERROR, 1), run.stderr
    assert message in run.stderr
    assert len(run.stderr) < 5000
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line", ["long" * 2**18, "so many words " * 2**16], ids=["one word", "many words"])
def test_a_prompt_of_a_megabyte_is_refused(line, tmp_path, monkeypatch, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text(line)
    words = ["--config=configs/digits_rcm.py", "--sampler=euler", f"--prompt-file={path}", f"--out={tmp_path / 'out'}"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sample", *words])
    monkeypatch.setattr(sample, "keep_compilations", lambda: None)
    with pytest.raises(SystemExit) as end:
        sample.main()
    error = capsys.readouterr().err
    assert end.value.code == USER_ERROR
    assert "characters, at most 4,096 fit: shorten it" in error
    assert (error.count("\n"), len(error) < 300) == (1, True)
    assert list(tmp_path.iterdir()) == [path]


def test_inputs_by_the_hundred_are_read_or_refused_in_one_line(tmp_path):
    """`python -m benchmarks.fuzz`, shortened."""
    out = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "benchmarks.fuzz", "--examples=300", f"--out={out}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    counts = json.loads(out.read_text())
    for target in fuzz.TARGETS:
        assert counts[target]["read"] > 0 < counts[target]["refused"]


def test_what_an_input_makes_run_can_guide_the_choice_of_the_next(tmp_path):
    """`--engine=atheris`: the same kinds of input, and those that reached something new are kept."""
    pytest.importorskip("atheris")
    out = tmp_path / "fuzz.json"
    words = ["--engine=atheris", "--kinds", "tar shards", "--examples=500", f"--out={out}"]
    command = [sys.executable, "-m", "benchmarks.fuzz", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    counts = json.loads(out.read_text())["tar shards, atheris"]
    assert counts["read"] + counts["refused"] == 500
    assert min(counts["read"], counts["refused"], counts["kept"]) > 0


def test_the_guided_choice_of_inputs_needs_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "atheris", None)
    with pytest.raises(SystemExit) as end:
        fuzz.main(["--engine=atheris", f"--out={tmp_path / 'fuzz.json'}"])
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (USER_ERROR, 1)
    assert "--engine atheris needs a package that is not installed: pip install atheris" in error
    assert not list(tmp_path.iterdir())


def test_determinism_reaches_xla(make_run):
    run = make_run("deterministic")
    run.finish("deterministic=True", "stages=flow_matching:1")
    flags = json.loads((run.workdir / "run.json").read_text())["xla_flags"]
    assert flags.split() == [
        *os.environ.get("XLA_FLAGS", "").split(),
        "--xla_gpu_deterministic_ops=true",
        "--xla_gpu_autotune_level=0",
    ]
