"""The launchers as a user starts them: a run killed and resumed, its samples, and mistakes answered in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from launch import compile as launch_compile
from launch import demo, evaluate, precompute, sample, train
from rcm_jax import media, options
from rcm_jax.checkpoint import export_safetensors, load_safetensors
from rcm_jax.config import UserError
from rcm_jax.data import digits, text

ROOT = Path(__file__).parent.parent
TOTAL, SAVED_EVERY = 16, 4
# One device, as a user has; what is compiled here runs for a second.
ENVIRONMENT = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds 64 videos and the embedding of the empty caption."""
    folder = tmp_path_factory.mktemp("launch")
    digits.build(folder, limit=2)
    export_safetensors(folder / "negative.safetensors", {"text": text.encode([""])[0]}, {})
    return folder


def train_words(folder, workdir, *overrides, recipe="digits_teacher"):
    settings = {
        "stages": f"flow_matching:{TOTAL}",
        "data.dir": folder,
        "data.name": "digits/first_2/1.0.0",
        "data.batch_size": 8,
        "teacher.negative_path": folder / "negative.safetensors",
        "checkpoint.every": SAVED_EVERY,
        "log.every": 1,
        "log.sample_every": 0,
    }
    words = [f"--config=configs/{recipe}.py", f"--workdir={workdir}"]
    return [*words, *(f"--config.{key}={value}" for key, value in settings.items()), *overrides]


def start(launcher, words, log):
    command = [sys.executable, "-m", f"launch.{launcher}", *words]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, text=True)


def finish(launcher, words, log_path):
    """Exit code and output."""
    with log_path.open("w") as log:
        code = start(launcher, words, log).wait(timeout=300)
    return code, log_path.read_text()


def iterations(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["iteration"] for line in lines if line.endswith("}")]


def newest_checkpoint(workdir):
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=0)


@pytest.fixture(scope="module")
def killed_and_resumed(folder):
    """The work directory of a run that was killed after a checkpoint, then started again by the same command."""
    workdir, words = folder / "run", train_words(folder, folder / "run")
    with (folder / "killed.log").open("w") as log:
        process = start("train", words, log)
        deadline = time.monotonic() + 300
        while not newest_checkpoint(workdir) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (folder / "killed.log").read_text()
    assert not (workdir / "ema.safetensors").exists()
    saved = newest_checkpoint(workdir)
    code, output = finish("train", words, folder / "resumed.log")
    assert code == 0, output
    return workdir, saved, output


def test_a_killed_run_resumes_from_its_newest_checkpoint_and_finishes(killed_and_resumed):
    workdir, saved, output = killed_and_resumed
    assert SAVED_EVERY <= saved < TOTAL
    assert iterations(workdir) == list(range(1, TOTAL + 1))
    printed = [line.split()[1] for line in output.splitlines() if line.startswith("iter ")]
    assert printed == [f"{iteration}/{TOTAL}" for iteration in range(saved + 1, TOTAL + 1)]
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    _, metadata = load_safetensors(workdir / "ema.safetensors")
    assert metadata["iteration"] == str(TOTAL)


def test_samples_are_videos_that_tell_how_they_were_made(killed_and_resumed, folder):
    weights, prompt = killed_and_resumed[0] / "ema.safetensors", "a three moving up and left"
    words = ["--config=configs/digits_rcm.py", f"--weights={weights}", f"--prompt={prompt}"]
    code, output = finish(
        "sample", [*words, "--seeds=0,7", "--steps=1", f"--out={folder / 'out'}"], folder / "sample.log"
    )
    assert code == 0, output
    paths = sorted((folder / "out").iterdir())
    assert [path.name for path in paths] == ["0000_seed0.mp4", "0001_seed7.mp4"]
    assert all(str(path) in output for path in paths)
    for path, seed in zip(paths, (0, 7), strict=True):
        metadata = media.read_metadata(path)
        settings = {"prompt": prompt, "seed": seed, "steps": 1, "sampler": "few-step-sde", "dit": str(weights)}
        assert {name: metadata[name] for name in settings} == settings
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_commands_that_share_a_folder_keep_each_others_files(tmp_path, monkeypatch):
    """Though the other one takes the number at the last moment."""
    write, theirs = media.write_video, tmp_path / "0000_seed0.mp4"

    def overtaken(path, *pixels, **rest):
        if not theirs.exists():
            media.write_file(theirs, b"theirs")
        write(path, *pixels, **rest)

    latents = SimpleNamespace(latent_NTHWC=np.zeros((1, *digits.VARIANTS["digits"].latent_shape), np.float32))
    monkeypatch.setattr(media, "write_video", overtaken)
    monkeypatch.setattr("rcm_jax.generation.generate", lambda *_, **__: latents)
    monkeypatch.setattr("rcm_jax.train.load_params", lambda *_: {})
    monkeypatch.setattr(sample, "keep_compilations", lambda: None)
    sample.main([f"--config={ROOT / 'configs/digits_rcm.py'}", "--dit=a", "--prompt=a one", f"--out={tmp_path}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000_seed0.mp4", "0001_seed0.mp4"]
    assert theirs.read_bytes() == b"theirs"
    assert media.read_metadata(tmp_path / "0001_seed0.mp4")["prompt"] == "a one"


def test_help_shows_the_command_of_the_docstring(tmp_path):
    code, output = finish("train", ["--help"], tmp_path / "log")
    assert code == 0
    assert "python -m launch.train --config=configs/digits_rcm.py --workdir=runs/digits_rcm" in output
    assert "--config.KEY" in output


def test_an_unknown_key_is_one_line_with_the_nearest_name(folder, tmp_path):
    words = train_words(folder, tmp_path / "run", "--config.optimizer.student_rl=1e-3")
    code, output = finish("train", words, tmp_path / "log")
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith("python -m launch.train: error: --config.optimizer.student_rl=1e-3: no value is named")
    assert "did you mean optimizer.student_lr?" in output
    assert not (tmp_path / "run").exists()


def fails(main, words, monkeypatch, capsys):
    """What a launcher that runs in this process says before it exits with code 2: one line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["launch", *words])
    monkeypatch.setattr(sys.modules[main.__module__], "keep_compilations", lambda: None, raising=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main()
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1), error
    return error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.mesh.fsdp=3"], "mesh of data=-1, fsdp=3, context=1, tensor=1 does not cover 8 devices"),
        (["--config.stages=rmc:10"], "'rmc:10' has no loss named 'rmc'"),
        (["--config.stages=rcm:10", "--config.teacher.path="], "teacher.path is empty"),
        (["--config.stages=rcm:10", "--config.teacher.path=README.md"], "README.md is not a complete safetensors file"),
        (
            ["--config.stages=rcm:10", "--config.teacher.path=rcm_jax/assets/digits_classifier.safetensors"],
            "does not fit the network, nothing was loaded: missing",
        ),
        (["--config.model.preset=wan"], "model.preset='wan' must be one of digits"),
        (["--config.model.remat=all"], "model.remat='all' must be"),
        (["--config.data.name=elsewhere"], "holds no dataset_info.json"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_line_and_nothing_is_written(
    overrides, message, folder, tmp_path, monkeypatch, capsys
):
    words = train_words(folder, tmp_path / "run", *overrides)
    assert message in fails(train.main, words, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights=absent.safetensors", "--prompt=a three moving up"], "absent.safetensors is not a file"),
        (["--prompt=a three moving up"], "a student needs --dit PATH"),
        (["--sampler=euler"], "there is no caption: give --prompt TEXT or --prompt-file FILE"),
        (["--sampler=euler", "--prompt=a", "--seeds=one"], "--seeds one must be integers"),
        (["--sampler=euler", "--prompt=a", "--seeds=-1"], "--seeds -1 must lie between 0 and"),
        (["--sampler=euler", "--prompt-file=absent.txt"], "--prompt-file absent.txt cannot be read"),
        (["--sampler=euler", "--prompt=" + "long " * 9], "has 9 words, at most 8 fit"),
        (
            ["--weights=rcm_jax/assets/digits_teacher.safetensors", "--prompt=a", "--steps=5"],
            "steps=5 must lie between 1 and 4",
        ),
    ],
)
def test_a_mistake_in_sampling_is_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    words = ["--config=configs/digits_rcm.py", f"--out={tmp_path / 'out'}", *words]
    assert message in fails(sample.main, words, monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


RECIPE = "--config=configs/digits_rcm.py"


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, [RECIPE, "--workdir=FILE"]),
        (train.main, [RECIPE, "--workdir=FILE/run"]),
        (demo.main, ["--workdir=FILE"]),
        (sample.main, [RECIPE, "--prompt=a three moving up", "--sampler=euler", "--out=FILE"]),
        (sample.main, ["--model=wan2.1-t2v", "--out=FILE"]),
        (launch_compile.main, [RECIPE, "--out=FOLDER"]),
        (precompute.main, ["--videos=a", "--model=b", "--vae=c", "--text-encoder=d", "--tokenizer=e", "--out=FILE"]),
        (precompute.main, ["--to-tar=FILE", "--out=FOLDER"]),
        (evaluate.main, [RECIPE, "--workdir=FILE"]),
        (evaluate.main, ["sample", "--layout=vbench", "--out=FILE"]),
        (evaluate.main, ["score", "FOLDER", "--out=FILE"]),
        (evaluate.main, ["compare", "a", "b", "--out=FOLDER"]),
        (evaluate.main, ["features", "a", "--network=b.onnx", "--out=FOLDER"]),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_work(main, words, tmp_path, monkeypatch, capsys):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("a user's own")
    folder.mkdir()
    words = [word.replace("FILE", str(file)).replace("FOLDER", str(folder)) for word in words]
    words += ["--name=foxes"] if main is precompute.main else []
    error = fails(main, words, monkeypatch, capsys)
    assert re.search(r"must be a (file|folder), and something else is there|must be a folder that you may", error), (
        error
    )
    assert (file.read_text(), list(folder.iterdir())) == ("a user's own", [])


@pytest.mark.parametrize(
    ("path", "kind"),
    [("file", "file"), ("folder", "folder"), ("new", "file"), ("new", "folder"), ("new/a/b", "file"), (".", "folder")],
)
def test_a_target_may_be_new_or_of_its_kind_but_must_be_below_a_folder_of_the_users(path, kind, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    options.check_target("--out", tmp_path / path, kind=kind)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=rf"--out {tmp_path}.* must be a folder that you may write to$"):
        options.check_target("--out", tmp_path / path, kind=kind)


def test_a_target_is_no_broken_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="must be a folder, and something else is there"):
        options.check_target("--workdir", tmp_path / "link", kind="folder")
