"""The arena of methods on digits: equal network evaluations, intervals, and that it goes on where it stopped."""

import argparse
import functools
import io
import json
import sys
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from benchmarks import digits_arena as arena
from rcm_jax import evaluation
from rcm_jax.config import UserError, parse_stages
from rcm_jax.data import digits
from rcm_jax.schedule import total_iterations

EVERY = arena.METHODS | arena.ABLATIONS


def options(**changes):
    return argparse.Namespace(**{"data": "digits28", "override": [], "evaluations": 3600, **changes})


# Forward 1, tangent 1, gradient 2, guided teacher 2; a backward simulation has 2.5 forward passes on average.
TEACHER, LEARN, TANGENT, SIMULATION = 2, 3, 1, 2.5
SCM, DMD, CRITIC = TEACHER + LEARN + TANGENT, SIMULATION + 2 + TEACHER + 1, SIMULATION + LEARN


@pytest.mark.parametrize(
    ("method", "stages", "expected"),
    [
        ("sCM", "scm:10", 10 * SCM),
        ("dCM", "dcm:10", 10 * (TEACHER + LEARN + 1)),
        ("MeanFlow", "mean_flow:10", 10 * SCM),
        ("sCT", "scm:1,sct:9", SCM + 9 * (LEARN + TANGENT)),
        ("DMD", "dmd:10", 5 * DMD + 5 * CRITIC),
        ("rCM", "rcm:70", 60 * SCM + 5 * (SCM + DMD) + 5 * CRITIC),
        # The logit comes from the middle of the fake score; the student's goes back through that half alone.
        ("DMD2", "dmd2:10", 2 * (DMD + 0.5) + 8 * (CRITIC + 0.5 * LEARN)),
    ],
)
def test_network_evaluations_are_those_counted_by_hand(method, stages, expected):
    config = arena.create_recipe(EVERY[method], 0, options())
    assert arena.count_evaluations(parse_stages(stages), config) == pytest.approx(expected)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("evaluations", [1500, 3600])
def test_every_method_gets_as_many_evaluations_up_to_an_iteration_of_each_stage(name, evaluations):
    config = arena.create_recipe(EVERY[name], 0, options(evaluations=evaluations))
    stages = parse_stages(config.stages)
    used = arena.count_evaluations(stages, config)
    assert evaluations - (SCM + DMD) * len(stages) < used <= evaluations


@pytest.mark.parametrize("name", EVERY)
def test_the_learning_rate_falls_to_zero_with_the_last_update_or_never(name):
    config = arena.create_recipe(EVERY[name], 0, options())
    updates = arena.count_updates(parse_stages(config.stages), config)
    assert config.optimizer.decay_to in (0, updates)
    assert config.optimizer.decay_from <= 0.6 * config.optimizer.decay_to


@pytest.mark.parametrize("name", EVERY)
def test_methods_differ_in_stages_schedule_and_what_is_their_own_alone(name):
    own = {
        "stages",
        *("optimizer.decay_from", "optimizer.decay_to", "loss.dmd_weight", "loss.mean_flow_share"),
        *("loss.simulation_times", "loss.student_update_freq"),
    }
    flat, base = (
        {
            f"{group}.{key}": value
            for group in ("optimizer", "loss", "data", "model", "teacher")
            for key, value in config[group].items()
        }
        | {"stages": config.stages}
        for config in (arena.create_recipe(EVERY[run], 0, options()) for run in (name, "rCM"))
    )
    assert {key for key in flat if flat[key] != base[key]} <= own


def test_an_override_goes_into_every_recipe_and_a_wrong_one_is_refused():
    config = arena.create_recipe(EVERY["DMD"], 2, options(override=["data.batch_size=8"]))
    assert (config.data.batch_size, config.seed) == (8, 2)
    with pytest.raises(UserError, match=r"no value is named data\.batch_sise"):
        arena.create_recipe(EVERY["DMD"], 2, options(override=["data.batch_sise=8"]))


def test_the_recipe_in_configs_is_the_arenas():
    config = arena.create_recipe(EVERY["rCM"], 0, options())
    alone = arena.load(arena.CONFIGS / "digits28_rcm.py")
    assert config.to_dict() == alone.to_dict()


def test_small_digits_keep_their_recipe_but_for_the_length():
    config = arena.create_recipe(EVERY["sCM"], 0, options(data="digits", evaluations=6000))
    assert (config.data.name, config.model.preset) == ("digits", "digits")
    assert total_iterations(parse_stages(config.stages)) == 1000


@pytest.mark.parametrize("values", [[0.0, 1.0], [3.0, 4.0, 8.0], [0.5] * 4])
def test_intervals_are_scipys(values):
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values) or 1e-300)
    assert arena.half_interval(values) == pytest.approx((high - low) / 2, abs=1e-12)


@pytest.mark.parametrize("variant", digits.VARIANTS.values(), ids=digits.VARIANTS)
def test_samples_come_from_the_seeds_asked_for_in_the_pixels_of_their_variant(variant):
    @jax.jit
    def grey(params, text_BSD, seeds_B):
        """Videos as bright as their seed."""
        latent_B = (seeds_B % 256 / 255 - variant.mean) / variant.std
        return jnp.ones((len(text_BSD), *variant.latent_shape)) * latent_B[:, None, None, None, None]

    video = evaluation.sample_all(grey, {}, per_caption=2, label="grey", variant=variant, first_seed=300).video_NTHWC
    assert video.shape == (160, *variant.latent_shape)
    np.testing.assert_array_equal(video.min((1, 2, 3, 4)), (300 + np.arange(160)) % 256)
    np.testing.assert_array_equal(video.max((1, 2, 3, 4)), video.min((1, 2, 3, 4)))


def scores(value):
    return dict.fromkeys(arena.COLUMNS, value)


def run_of(name, value):
    return {"scores": {steps: scores(value) for steps in ("1", "2", "4")} if name in EVERY else {"-": scores(value)}}


def test_the_table_has_means_over_seeds_with_their_intervals_and_a_row_a_number_of_steps():
    runs = {"DMD; seed 0": 0.2, "real; seed 0": 1.0, "DMD; seed 1": 0.4, "rCM; seed 0": 0.5}
    runs = {key: run_of(key.partition(";")[0], value) for key, value in runs.items()}
    head, _, *rows = arena.table({"runs": runs}).splitlines()
    assert [row.split("|")[1:3] for row in rows] == [
        [" real ", " - "],
        *([" rCM ", f" {steps} "] for steps in (1, 2, 4)),
        *([" DMD ", f" {steps} "] for steps in (1, 2, 4)),
    ]
    assert rows[-1].split("|")[3] == " 0.300 ± 1.271 "
    assert rows[0].split("|")[3] == " 1.000 ", "one seed has no interval"
    assert head.count("|") == rows[0].count("|")


def test_the_chart_is_a_picture_with_every_method():
    runs = {f"{name}; seed 0": run_of(name, 0.5) for name in (*arena.REFERENCES, *EVERY)}
    with Image.open(io.BytesIO(arena.chart({"runs": runs}))) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300


def test_the_curves_are_those_of_methods_with_more_than_one_point_of_scms_loss():
    def run(**curve):
        return {"curve": curve}

    runs = {
        "sCM; seed 0": run(loss_scm=[0.9, None, 0.8]),
        "sCM; seed 1": run(loss_scm=[0.9, 0.9, 0.9]),
        "sCT; seed 0": run(loss_scm=[0.9, None, None], loss_sct=[0.5] * 3),
        "DMD; seed 0": run(loss_dmd=[0.5] * 3),
        "real; seed 0": {},
    }
    ((title, lines),) = arena.scm_curves({"runs": runs}).items()
    assert title == "sCM's loss, sCM"
    assert [len(lines[seed]) for seed in ("seed 0", "seed 1")] == [2, 3]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["0", "1", "0"]), ("", ["0", "1", "0"]), ("3,5", ["3", "5", "3"]), ("7", 3 * ["7"])],
)
def test_processes_share_the_gpus_evenly(visible, expected):
    assert arena.share_gpus(3, visible, 2) == expected


class Inline:
    """Runs what is submitted in this process, each when its result is waited for."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *arguments):
        pass

    def submit(self, *call):
        future = Future()
        future.call = functools.partial(*call)
        return future


def as_completed(futures):
    for future in futures:
        try:
            future.set_result(future.call())
        except RuntimeError as error:
            future.set_exception(error)
        yield future


def start(tmp_path, monkeypatch, *words):
    """Runs the program with a judge and a teacher that are there, if only as files."""
    (tmp_path / "teacher").touch()
    monkeypatch.setattr(arena.classifier, "load", lambda variant: None)
    base = ["digits_arena", f"--out={tmp_path / 'out.json'}", f"--workdir={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", [*base, f"--override=teacher.path={tmp_path / 'teacher'}", *words])
    arena.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds=0"], "--seeds 0 must be at least 1"),
        (["--per_caption=1"], "--per_caption 1 must be at least 2"),
        (["--override=teacher.path=absent"], "absent does not exist: train the teacher first"),
        (["--override=data.batch_sise=4"], "did you mean data.batch_size?"),
        (["--override=data.batch_size=4"], "out.json was made with {'data': 'digits28'"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(words, message, tmp_path, monkeypatch, capsys):
    before = '{"settings": {"data": "digits28"}, "runs": {}}'
    (tmp_path / "out.json").write_text(before)
    with pytest.raises(SystemExit) as exit_:
        start(tmp_path, monkeypatch, *words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "teacher"}


def test_what_is_done_is_kept_at_once_and_not_done_again_and_a_failure_ends_only_its_own_run(tmp_path, monkeypatch):
    out, done, fails = tmp_path / "out.json", [], {("sCM", 1)}

    def run(name, seed, arguments):
        if (name, seed) in fails:
            raise RuntimeError("diverged")
        if done:
            assert set(json.loads(out.read_text())["runs"]) == {f"{name}; seed {seed}" for name, seed in done}
        done.append((name, seed))
        return run_of(name, 0.5)

    monkeypatch.setattr(arena, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(arena, "as_completed", as_completed)
    monkeypatch.setattr(arena.digits, "build", lambda *arguments, **options: None)
    monkeypatch.setattr(arena, "keep_compilations", lambda: None)
    monkeypatch.setattr(arena, "_train_and_score", run)
    for name in arena.REFERENCES:
        monkeypatch.setattr(arena, f"_score_{name}", lambda seed, arguments, name=name: run(name, seed, arguments))
    words = ["--seeds=2", "--methods", "rCM", "sCM"]
    with pytest.raises(SystemExit, match="not done: sCM; seed 1"):
        start(tmp_path, monkeypatch, *words)
    everything = {(name, seed) for name in ("real", "teacher", "rCM", "sCM") for seed in (0, 1)}
    assert set(done) == everything - fails
    fails.clear()
    start(tmp_path, monkeypatch, *words)
    assert set(done) == everything
    assert len(done) == len(everything)
    assert json.loads(out.read_text())["command"].startswith("python -m benchmarks.digits_arena --out=")
