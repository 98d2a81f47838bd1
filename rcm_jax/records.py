"""The records of a run: every metric as a JSON line, TensorBoard events, one console line, and what was run on what."""

import datetime
import importlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import jax
import numpy as np
from numpy.typing import ArrayLike
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter
from tqdm import tqdm

from rcm_jax import media
from rcm_jax.config import UserError

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array_record",
    "tensorflow-datasets",
    "numpy",
)
CONSOLE = {"loss": "loss", "grad_norm": "grad"}
OWN_KEYS = ("iteration", "time", "seconds_per_step", "tokens_per_second")


class RunRecords:
    """Writes a run's metrics to workdir/metrics.jsonl, workdir/tensorboard, the console and, if asked for, wandb.

    workdir: the run's folder. total: iterations of the whole run.
    tokens_per_step: tokens that one step trains on, all processes together.
    resume_at: iteration the run continues from (0: a new run); records of later iterations, left by the run before it,
        are dropped. A new run moves another's metrics.jsonl to metrics.1.jsonl, or the next number that is free.
    process_index: only process 0 writes; in every other one all methods do nothing.
    wandb_project: "" for none. console: metric -> its name in the console line, where it is reported.
    Raises UserError if wandb is asked for and not installed.

    Metrics must be fetched already: a device array given here makes the host wait for the step that computes it.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        total: int,
        tokens_per_step: int,
        resume_at: int = 0,
        process_index: int = 0,
        wandb_project: str = "",
        console: Mapping[str, str] = CONSOLE,
    ):
        self.enabled = process_index == 0
        if not self.enabled:
            return
        self._wandb = _start_wandb(wandb_project, workdir) if wandb_project else None
        self._total, self._tokens_per_step, self._console = total, tokens_per_step, console
        self._workdir = Path(workdir)
        self._open(resume_at)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=resume_at, bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}")

    def _open(self, resume_at: int) -> None:
        # At iteration 0 nothing is trained yet: whatever is there belongs to another run.
        first_dropped = resume_at + 1 if resume_at else 0
        log = self._workdir / "metrics.jsonl"
        if not resume_at and log.exists() and log.stat().st_size:
            log.rename(next(path for n in itertools.count(1) if not (path := log.with_suffix(f".{n}.jsonl")).exists()))
        self._log = _open_log(log, first_dropped)
        self._tensorboard = _EventFile(self._workdir / "tensorboard", first_dropped)
        self._iteration, self._seconds, self._running_since = resume_at, 0.0, time.monotonic()

    def roll_back(self, iteration: int) -> None:
        """Drops the records of later iterations: the run goes on from this one."""
        if self.enabled:
            self._close_files()
            self._open(iteration)

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Records the scalar `metrics` after `iteration` steps, and the speed since the last call that had a lower one.

        Raises ValueError, before anything is written, for a metric that is not one number or has a reserved name.
        """
        if not self.enabled:
            return
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        speed = self._speed(iteration)
        record = {"iteration": int(iteration), "time": round(time.time(), 3), **speed, **numbers}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in {**speed, **numbers}.items()]
        with _outlives_a_full_disk(iteration):
            self._log.write(media.json_text(record) + "\n")
            self._log.flush()  # a crash after this keeps the line
        with _outlives_a_full_disk(iteration):
            self._tensorboard.add(step=iteration, summary=Summary(value=values))
        if self._wandb is not None:
            self._wandb.log({**speed, **numbers}, step=int(iteration))
        self._print_line(iteration, numbers, speed)

    def write_video(
        self, iteration: int, name: str, video_THWC: ArrayLike, *, fps: float | int, scale: int = 1
    ) -> None:
        """Shows a uint8 video (T, H, W, C), C = 1 or 3, under TensorBoard's Images as a looping GIF (and in wandb)."""
        if not self.enabled:
            return
        with self.untimed():
            gif = media.encode_gif(video_THWC, fps=fps, scale=scale)
            _, height, width, channels = np.shape(video_THWC)
            # TensorBoard has no video summary: it hands an image's bytes to the browser, which plays them.
            image = Summary.Image(
                height=height * scale, width=width * scale, colorspace=channels, encoded_image_string=gif
            )
            with _outlives_a_full_disk(iteration):
                self._tensorboard.add(step=iteration, summary=Summary(value=[Summary.Value(tag=name, image=image)]))
            if self._wandb is not None:
                self._wandb.log({name: self._wandb.Video(io.BytesIO(gif), format="gif")}, step=int(iteration))

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What runs inside (sampling, scoring) does not count as time of training steps."""
        if not self.enabled or self._running_since is None:
            yield
            return
        self._seconds += time.monotonic() - self._running_since
        self._running_since = None
        try:
            yield
        finally:
            self._running_since = time.monotonic()

    def say(self, message: str) -> None:
        """Prints a line above the progress bar."""
        if not self.enabled:
            return
        with suppress(OSError):  # stdout may be a file on a disk that is full
            if self._bar is None:
                print(message, flush=True)
            else:
                self._bar.write(message)

    def close(self) -> None:
        """Writes out what is still held back. The records take nothing more after it."""
        if not self.enabled:
            return
        self.enabled = False
        self._close_files()
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _close_files(self) -> None:
        for file in (self._log, self._tensorboard):
            with _outlives_a_full_disk(self._iteration):
                file.close()

    def __enter__(self) -> "RunRecords":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _speed(self, iteration: int) -> dict[str, float]:
        """Seconds a step and tokens a second since the last iteration that was recorded; {} if it is this one."""
        steps = iteration - self._iteration
        if steps <= 0:
            return {}
        running = 0 if self._running_since is None else time.monotonic() - self._running_since
        seconds = max(self._seconds + running, 1e-9) / steps
        self._iteration, self._seconds = iteration, -running  # what has run so far is accounted for
        return {"seconds_per_step": seconds, "tokens_per_second": self._tokens_per_step / seconds}

    def _print_line(self, iteration: int, numbers: Mapping[str, float], speed: Mapping[str, float]) -> None:
        self.say(format_line(iteration, self._total, numbers, speed, self._console))
        if self._bar is not None:
            self._bar.update(iteration - self._bar.n)


def format_line(
    iteration: int,
    total: int,
    numbers: Mapping[str, float],
    speed: Mapping[str, float],
    console: Mapping[str, str] = CONSOLE,
) -> str:
    """`iter 1,200/3,000  loss 12.3  grad 0.52  0.213 s/step  9,600 tok/s  6m12s left`, in columns.

    Shows the metrics named in `console`, or all of them if there is none of those.
    """
    shown = {label: numbers[name] for name, label in console.items() if name in numbers} or numbers
    parts = [f"iter {iteration:>{len(f'{total:,}')},}/{total:,}"]
    parts += [f"{label} {value:<9.4g}" for label, value in shown.items()]
    if speed:
        seconds = speed["seconds_per_step"]
        parts += [f"{seconds:#.3g}".rstrip(".") + " s/step", f"{speed['tokens_per_second']:,.0f} tok/s"]
        parts += [f"{format_duration(seconds * max(0, total - iteration))} left"]
    return "  ".join(parts).rstrip()


def format_duration(seconds: float | int) -> str:
    """45s, 6m12s, 2h05m, 3d04h."""
    seconds = round(seconds)
    for unit, smaller, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if seconds >= size:
            rest = seconds % size * (24 if unit == "d" else 60) // size
            return f"{seconds // size}{unit}{rest:02d}{smaller}"
    return f"{seconds}s"


def read_metrics(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """metric -> (iterations, values) of a metrics.jsonl; lines that a killed run left unfinished are passed over."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in _read_lines(Path(path)):
        for name, value in record.items():
            if name in ("iteration", "time"):
                continue
            iterations, values = curves.setdefault(name, ([], []))
            iterations.append(record["iteration"])
            values.append(float(value))  # non-finite numbers are stored as "nan", "inf", "-inf"
    return curves


def write_run_info(
    workdir: str | Path, config: Mapping[str, Any], *, iteration: int = 0, process_index: int = 0
) -> dict[str, Any]:
    """Writes workdir/run.json (process 0 only): the resolved config, the command, XLA's flags, package versions,
    devices, and the config's changes since the run began.

    Returns what it holds. A run that is resumed at an `iteration` writes it anew; if the config then has other values
    than the run.json before, a line on stderr says which, and "changes" gains {"iteration": ..., "KEY": [before, now],
    ...}.
    """
    path = Path(workdir) / "run.json"
    before, changes = _read_run_info(path) if iteration else ({}, [])
    changed = changed_values(before, json.loads(media.json_text(config)))
    info = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "config": config,
        "changes": [*changes, {"iteration": iteration} | changed] if changed else changes,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {"python": platform.python_version(), **_versions()},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }
    if process_index == 0:
        if changed:
            values = ", ".join(f"{key}={now} for {old}" for key, (old, now) in changed.items())
            warn(f"{workdir} goes on from iteration {iteration} with other values than before: {values}")
        media.write_file(path, media.json_text(info, indent=2).encode() + b"\n")
    return info


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{"a.b": [before, now]} for every value that differs, of the keys that both have."""
    changed = {}
    for key in before.keys() & now.keys():
        old, new = before[key], now[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed |= {f"{key}.{inner}": pair for inner, pair in changed_values(old, new).items()}
        elif old != new:
            changed[key] = [old, new]
    return dict(sorted(changed.items()))


def _read_run_info(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """The config of a run.json and its changes; nothing of a file that cannot be read."""
    with suppress(OSError, ValueError):
        match json.loads(path.read_text(encoding="utf-8")):
            case {"config": dict(config), **rest}:
                changes = rest.get("changes")
                return config, changes if isinstance(changes, list) else []
    return {}, []


def check_unused(workdir: str | Path) -> None:
    """Raises UserError for a folder that holds what another run made and no checkpoint to go on from."""
    for name in ("student.safetensors", "ema.safetensors"):
        if (path := Path(workdir) / name).exists():
            raise UserError(f"{path} is of another run, which left no checkpoint to go on from: use another folder")


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _number(name: str, value: Any) -> float:
    if name in OWN_KEYS:
        raise ValueError(f"metric name {name!r} is taken by the log itself: choose a name outside {OWN_KEYS}")
    if isinstance(value, str | None) or np.ndim(value) != 0:
        raise ValueError(
            f"metric {name!r} is {value!r}: it must be one number, reduce it (mean, sum) before recording it"
        )
    return float(value)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "iteration" in record:
                yield record


def _open_log(path: Path, first_dropped: int) -> TextIO:
    """Opens a metrics.jsonl for appending, rid of torn lines and of the records from `first_dropped` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        kept = [media.json_text(record) for record in _read_lines(path) if record["iteration"] < first_dropped]
        media.write_file(path, "".join(line + "\n" for line in kept).encode())
    return path.open("a", encoding="utf-8")


def warn(message: str) -> None:
    """Prints a line on stderr, of whichever process."""
    with suppress(OSError):  # stderr may be a file on a disk that is full
        print(message, file=sys.stderr, flush=True)


class _EventFile:
    """TensorBoard's events, written at once.

    tensorboardX's FileWriter hands them to a thread, which a full disk ends; the next events would then wait for ever.
    """

    def __init__(self, folder: Path, first_dropped: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{time.time_ns()}"
        self._writer = RecordWriter(str(folder / name))
        self.add(file_version="brain.Event:2")
        # Tells TensorBoard to forget what earlier files hold from this step on.
        self.add(session_log=SessionLog(status=SessionLog.START), step=first_dropped)

    def add(self, **content: Any) -> None:
        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@contextmanager
def _outlives_a_full_disk(iteration: int) -> Iterator[None]:
    """What cannot be written stays in the file's buffer and is tried again with the next write."""
    try:
        yield
    except OSError as error:
        warn(f"records up to iteration {iteration} are not written yet ({error}): free space")


def _start_wandb(project: str, workdir: str | Path) -> ModuleType:
    """Starts a wandb run and gives the module, whose functions then act on that run."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError(f"wandb_{project=} needs the package wandb: pip install wandb, or leave it empty") from None
    wandb.init(project=project, name=Path(workdir).name, dir=workdir)
    return wandb
