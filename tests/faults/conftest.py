"""Starts `launch.train` as a user would: a process of its own, its signals, its files.

All runs share one tiny recipe and its compiled programs, so that a start takes a few seconds.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from rcm_jax.checkpoint import export_safetensors, load_safetensors
from rcm_jax.data import digits, pipeline, text

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "benchmarks" / "tiny_recipe.py"
TIMEOUT = 240  # seconds after which a run that should have ended fails its test


class Process:
    """A running command, and what it printed so far."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._lines: list[bytes] = []
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._lines.extend, args=(self._process.stdout,))
        self._reader.start()
        self.pid, self.send_signal, self.poll = self._process.pid, self._process.send_signal, self._process.poll

    @property
    def output(self) -> str:
        return b"".join(self._lines).decode()

    def wait(self) -> int:
        """The exit code."""
        code = self._process.wait(TIMEOUT)
        self._reader.join()
        return code

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition holds; fails if the process ends before."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self._process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.005)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self.wait()


class Run:
    """One run's folder, and the command that starts or resumes it."""

    def __init__(self, folder: Path, workdir: Path, processes: list[Process]):
        self.folder, self.workdir, self.checkpoints = folder, workdir, workdir / "checkpoints"
        self._processes = processes

    def start(
        self,
        *overrides: str,
        environment: dict[str, str] | None = None,
        words: tuple[str, ...] = (),
        program: tuple[str, ...] = (sys.executable, "-m", "launch.train"),
    ) -> Process:
        settings = [f"data.dir={self.folder}", f"teacher.negative_path={self.folder / 'negative.safetensors'}"]
        command = [*program, f"--config={RECIPE}", f"--workdir={self.workdir}", *words]
        command += [f"--config.{setting}" for setting in (*settings, *overrides)]
        self._processes.append(Process(command, environment or {}))
        return self._processes[-1]

    def finish(self, *overrides: str, code: int = 0) -> str:
        """Runs to the end, which must be with exit code `code`; returns the output."""
        process = self.start(*overrides)
        assert process.wait() == code, process.output
        return process.output

    def saved(self) -> list[int]:
        """The iterations of the complete checkpoints."""
        names = [path.name for path in self.checkpoints.iterdir()] if self.checkpoints.exists() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def description(self, iteration: int) -> dict:
        return json.loads((self.checkpoints / str(iteration) / "description" / "metadata").read_text())

    def records(self) -> list[dict]:
        """metrics.jsonl without what the clock says."""
        path = self.workdir / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        clock = ("time", "seconds_per_step", "tokens_per_second")
        return [{name: value for name, value in line.items() if name not in clock} for line in lines]

    def assert_ends_as(self, other: "Run") -> None:
        """All that the last checkpoint holds, all exported weights and every logged number are the other run's."""
        last = other.saved()[-1]
        assert self.saved()[-1] == last
        assert self.description(last) == other.description(last)  # a fingerprint of every leaf, and the position
        for name in ("student.safetensors", "ema.safetensors"):
            ours, theirs = (load_safetensors(run.workdir / name) for run in (self, other))
            assert ours[1] == theirs[1]
            jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
        assert self.records() == other.records()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds 64 videos and the embedding of the empty caption."""
    folder = tmp_path_factory.mktemp("faults")
    digits.build(folder, limit=2)
    export_safetensors(folder / "negative.safetensors", {"text": text.encode([""])[0]}, {})
    return folder


class Records(tfds.core.GeneratorBasedBuilder):
    """Records given as a class attribute, any number of frames long."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    records: tuple[dict, ...] = ()

    def _info(self):
        video = tfds.features.Tensor(shape=(None, *digits.DIGITS.latent_shape[1:]), dtype=np.float32, encoding="bytes")
        embedding = tfds.features.Tensor(shape=(text.LENGTH, text.DIM), dtype=np.float32, encoding="bytes")
        features = {"latent": video, "text": embedding, "prompt": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self.records)


@pytest.fixture(scope="session")
def write_records(folder: Path):
    """`write_records(name, count, changes)` writes digits, of which the records in `changes` are changed.

    Gives the override that makes a run read them.
    """
    source = pipeline.open_source("digits/first_2/1.0.0", folder, "train")
    sound = pipeline.read(source, range(len(source)))

    def write(name: str, count: int, changes: dict[int, dict]) -> str:
        keys = ("latent", "text", "prompt")
        records = [{key: sound[key][number % len(source)] for key in keys} for number in range(count)]
        for number, change in changes.items():
            records[number] |= change
        builder = type(name, (Records,), {"records": tuple(records), "__module__": __name__})
        builder = builder(data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
        return f"data.name={builder.data_path}"

    return write


@pytest.fixture(scope="session")
def make_run(folder: Path):
    """`make_run(name)` gives a Run in a folder of that name; its processes end with the tests."""
    processes: list[Process] = []
    yield lambda name: Run(folder, folder / name, processes)
    for process in processes:
        process.end()


@pytest.fixture(scope="session")
def undisturbed(make_run) -> Run:
    """The run to compare with."""
    run = make_run("undisturbed")
    run.finish()
    assert run.saved() == list(range(5, 41, 5))
    return run
