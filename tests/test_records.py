"""A run's records survive crashes and resumes, are readable by other programs, and say what the run did."""

import io
import json
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from rcm_jax import evaluation, records
from rcm_jax.config import UserError

VIDEO = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 1)).astype(np.uint8)


def open_records(workdir, **options) -> records.RunRecords:
    return records.RunRecords(workdir, **{"total": 3000, "tokens_per_step": 2048} | options)


def read_log(workdir) -> list[dict]:
    """Every line of metrics.jsonl by the letter of the JSON standard, which has no NaN."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def read_events(path) -> list[Event]:
    """TFRecord: length, checksum of length, data, checksum of data."""
    data, events = path.read_bytes(), []
    while data:
        (length, check), body = struct.unpack("<QI", data[:12]), data[12:]
        assert masked_crc32c(data[:8]) == check
        assert struct.unpack("<I", body[length : length + 4]) == (masked_crc32c(body[:length]),)
        events.append(Event.FromString(body[:length]))
        data = body[length + 4 :]
    return events


def event_files(workdir) -> list:
    return sorted((workdir / "tensorboard").iterdir())


class Clock:
    """Stands in for time.monotonic: it goes on only when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(records.time, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (1.5, 1.5),
        (2, 2),
        (np.float32(0.25), 0.25),
        (np.int64(7), 7),
        (np.array(0.5), 0.5),
        (jnp.float32(0.75), 0.75),
        (jnp.bfloat16(1.5), 1.5),
        (float("nan"), "nan"),
        (jnp.inf, "inf"),
        (np.float32("-inf"), "-inf"),
    ],
)
def test_a_metric_is_a_number_from_anywhere_and_is_on_disk_at_once(tmp_path, value, stored):
    with open_records(tmp_path) as run:
        run.write(10, {"loss": value})
        (line,) = read_log(tmp_path)  # before close: a crash here would lose nothing
    assert (line["iteration"], line["loss"]) == (10, stored)
    assert set(line) == {"iteration", "time", "seconds_per_step", "tokens_per_second", "loss"}
    iterations, values = records.read_metrics(tmp_path / "metrics.jsonl")["loss"]
    assert iterations == [10]
    np.testing.assert_equal(values, [float(value)])


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"grad": np.zeros(2)}, r"metric 'grad' is array\(\[0., 0.\]\): it must be one number"),
        ({"grad": "0.5"}, "metric 'grad' is '0.5'"),
        ({"grad": None}, "metric 'grad' is None"),
        ({"time": 1.0}, "metric name 'time' is taken"),
    ],
)
def test_what_is_no_metric_is_refused_before_anything_is_written(tmp_path, metrics, message):
    with open_records(tmp_path) as run, pytest.raises(ValueError, match=message):
        run.write(10, {"loss": 1.0} | metrics)
    assert read_log(tmp_path) == []


def test_tensorboard_holds_scalars_and_videos(tmp_path):
    with open_records(tmp_path) as run:
        run.write(10, {"loss": 1.5, "grad_norm": float("nan")})
        run.write_video(10, "samples/student", VIDEO, fps=4, scale=2)
    (path,) = event_files(tmp_path)
    values = {value.tag: (event.step, value) for event in read_events(path) for value in event.summary.value}
    assert values["loss"][0] == 10
    assert values["loss"][1].simple_value == 1.5
    assert np.isnan(values["grad_norm"][1].simple_value)
    assert values["seconds_per_step"][1].simple_value > 0

    step, value = values["samples/student"]
    assert (step, value.image.height, value.image.width, value.image.colorspace) == (10, 12, 10, 1)
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as gif:
        assert (gif.format, gif.n_frames, gif.size, gif.info["loop"]) == ("GIF", 4, (10, 12), 0)
        gif.seek(3)
        np.testing.assert_array_equal(np.asarray(gif.convert("L"))[::2, ::2], VIDEO[3, ..., 0])


@pytest.mark.parametrize(
    ("resume_at", "kept", "purged"), [(20, [10, 20], 21), (21, [10, 20, 21], 22), (40, [10, 20, 21], 41), (0, [], 0)]
)
def test_resuming_drops_what_came_after_the_checkpoint(tmp_path, resume_at, kept, purged):
    with open_records(tmp_path) as run:
        for iteration in (10, 20, 21):
            run.write(iteration, {"loss": float(iteration)})
    before = read_log(tmp_path)
    with open_records(tmp_path, resume_at=resume_at) as run:
        assert read_log(tmp_path) == [line for line in before if line["iteration"] in kept]
        run.write(50, {"loss": 0.0})
    assert [line["iteration"] for line in read_log(tmp_path)] == [*kept, 50]

    first, second = event_files(tmp_path)  # in the same second, yet neither overwrote the other
    scalars = [[event.step for event in read_events(path) if event.summary.value] for path in (first, second)]
    assert scalars == [[10, 20, 21], [50]]
    starts = [event for event in read_events(second) if event.session_log.status == SessionLog.START]
    assert [event.step for event in starts] == [purged]  # TensorBoard forgets older events from this step on


@pytest.mark.parametrize(
    "torn", [b'{"iteration": 30, "lo', b'{"iteration": 3', b"\0\0\0\0", b"\xff\xfe\n", b"\n", b"17\n"]
)
def test_a_line_torn_by_a_kill_is_passed_over_and_repaired(tmp_path, torn):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"iteration": 10, "time": 1, "loss": 2.0}\n{"iteration": 20, "time": 2, "loss": 1.0}\n' + torn)
    assert records.read_metrics(log) == {"loss": ([10, 20], [2.0, 1.0])}
    with open_records(tmp_path, resume_at=30) as run:
        run.write(40, {"loss": 0.5})
    assert [line["iteration"] for line in read_log(tmp_path)] == [10, 20, 40]


def test_an_interrupted_repair_keeps_the_log(tmp_path, monkeypatch):
    with open_records(tmp_path) as run:
        run.write(10, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(records.media.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        open_records(tmp_path, resume_at=5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_console_says_how_it_goes_in_one_line(tmp_path, clock, capsys):
    with open_records(tmp_path, resume_at=1000) as run:
        clock.now += 42.6
        run.write(1200, {"loss": 12.3, "grad_norm": 0.52, "critic": 7.0})
        run.say("checkpoint saved")
    out, err = capsys.readouterr()
    line = "iter 1,200/3,000  loss 12.3       grad 0.52       0.213 s/step  9,615 tok/s  6m23s left"
    assert out.splitlines() == [line, "checkpoint saved"]
    assert err == ""


@pytest.mark.parametrize(
    ("numbers", "line"),
    [
        ({"loss": 12345.0}, "iter    20/1,000  loss 1.234e+04"),
        ({"loss": float("nan"), "grad_norm": 1e-5}, "iter    20/1,000  loss nan        grad 1e-05"),
        ({"caption_accuracy": 0.97}, "iter    20/1,000  caption_accuracy 0.97"),
    ],
)
def test_console_line_without_speed(numbers, line):
    assert records.format_line(20, 1000, numbers, {}) == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (372, "6m12s"), (7500, "2h05m"), (86400 * 3 + 3600 * 4, "3d04h"), (86399, "23h59m")],
)
def test_durations_are_short(seconds, text):
    assert records.format_duration(seconds) == text


def test_speed_counts_training_only(tmp_path, clock):
    with open_records(tmp_path) as run:
        clock.now += 10
        with run.untimed():
            clock.now += 500
            with run.untimed():
                clock.now += 500
            run.write_video(20, "sample", VIDEO, fps=4)
        clock.now += 10
        run.write(20, {"loss": 1.0})
        run.write(20, {"caption_accuracy": 1.0})  # the same iteration again: no steps, no speed
        clock.now += 2
        with run.untimed():
            clock.now += 7
            run.write(21, {"loss": 1.0})
        clock.now += 3
        run.write(22, {"loss": 1.0})
    assert [line.get("seconds_per_step") for line in read_log(tmp_path)] == [1.0, None, 2.0, 3.0]
    assert read_log(tmp_path)[0]["tokens_per_second"] == 2048


def test_a_bar_is_drawn_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with open_records(tmp_path, resume_at=1000) as run:
        run.write(1500, {"loss": 1.0})
    assert "1000/3000" in sys.stderr.getvalue()
    assert " 50%" in sys.stderr.getvalue()
    assert capsys.readouterr().out.splitlines()[0].startswith("iter 1,500/3,000  loss 1 ")


def test_other_processes_write_nothing(tmp_path, capsys):
    with open_records(tmp_path, process_index=1, wandb_project="never imported") as run, run.untimed():
        run.write(10, {"loss": 1.0})
        run.write_video(10, "sample", VIDEO, fps=4)
        run.say("hello")
    records.write_run_info(tmp_path, {"seed": 0}, process_index=1)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_wandb_that_is_not_installed_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    with pytest.raises(UserError, match="wandb_project='demo' needs the package wandb: pip install wandb"):
        open_records(tmp_path, wandb_project="demo")
    assert not list(tmp_path.iterdir())


def test_wandb_gets_metrics_and_videos(tmp_path, monkeypatch):
    calls = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append(options)
    wandb.log = lambda metrics, step: calls.append((step, metrics))
    wandb.Video = lambda file, format: (format, file.read(6))
    wandb.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with open_records(tmp_path, wandb_project="demo") as run:
        run.write(10, {"loss": 1.5})
        run.write_video(10, "sample", VIDEO, fps=4)
    started, (step, metrics), video, end = calls
    assert (started["project"], started["dir"]) == ("demo", tmp_path)
    assert (step, metrics["loss"]) == (10, 1.5)
    assert video == (10, {"sample": ("gif", b"GIF89a")})
    assert end == "finish"


def test_run_info_says_what_ran_on_what(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "launch.train", "--config.stages=scm:1 dmd:2"])
    config = {"seed": 0, "optimizer": {"student_lr": 1e-4, "betas": (0.0, 0.999)}, "clip": float("inf")}
    records.write_run_info(tmp_path / "new", config)
    info = json.loads((tmp_path / "new" / "run.json").read_text(), parse_constant=pytest.fail)
    assert info["config"] == {"seed": 0, "optimizer": {"student_lr": 1e-4, "betas": [0.0, 0.999]}, "clip": "inf"}
    assert info["command"] == "python -m launch.train '--config.stages=scm:1 dmd:2'"
    assert info["versions"]["jax"] == jax.__version__
    assert info["versions"]["numpy"] == np.__version__
    assert info["devices"]["count"] == jax.device_count()
    assert info["devices"]["kind"] == jax.devices()[0].device_kind


def test_other_values_of_a_resumed_run_are_said_and_kept(tmp_path, capsys):
    config = {"seed": 0, "optimizer": {"student_lr": 1e-4, "betas": (0.0, 0.999)}, "log": {"every": 10}}
    changed = config | {"optimizer": {"student_lr": 2e-4, "betas": (0.0, 0.999)}, "log": {"every": 5}}
    records.write_run_info(tmp_path, config)
    records.write_run_info(tmp_path, config, iteration=30)
    assert capsys.readouterr().err == ""
    records.write_run_info(tmp_path, changed, iteration=40)
    said = "from iteration 40 with other values than before: log.every=5 for 10, optimizer.student_lr=0.0002 for 0.0001"
    assert said in capsys.readouterr().err
    records.write_run_info(tmp_path, changed, iteration=50)
    assert capsys.readouterr().err == ""
    changes = [{"iteration": 40, "log.every": [10, 5], "optimizer.student_lr": [1e-4, 2e-4]}]
    assert json.loads((tmp_path / "run.json").read_text())["changes"] == changes


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"config": 3}', b'{"config": {"seed"', b"\xff"])
def test_a_run_info_that_cannot_be_read_is_as_none(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    assert records.write_run_info(tmp_path, {"seed": 1}, iteration=10)["changes"] == []
    assert capsys.readouterr().err == ""


def test_a_new_run_moves_anothers_metrics_aside(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        with open_records(tmp_path) as run:
            run.write(10, {"loss": loss})
    kept = {path.name: json.loads(path.read_text())["loss"] for path in tmp_path.glob("*.jsonl")}
    assert kept == {"metrics.1.jsonl": 1.0, "metrics.2.jsonl": 2.0, "metrics.jsonl": 3.0}


@pytest.mark.parametrize(
    ("lines", "facts"),
    [
        (None, {}),
        ([], {}),
        ([{"iteration": 10, "loss": 1.0}], {}),
        (
            [{"iteration": 10, "seconds_per_step": 2.0}, {"iteration": 15, "seconds_per_step": 4.0}],
            {"train_seconds": 40.0},
        ),
    ],
)
def test_seconds_of_training_are_those_that_the_log_tells(lines, facts, tmp_path):
    log = tmp_path / "metrics.jsonl"
    if lines is not None:
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluation.training_facts(log) == facts
