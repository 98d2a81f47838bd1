"""Recipes: files, overrides and rules. Every mistake is one line that names the value, the rule and the remedy."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from rcm_jax.config import Command, Stage, UserError, load, parse_stages, validate

RECIPE = """
from ml_collections import ConfigDict, config_dict

def get_config():
    return ConfigDict({
        "seed": 0, "deterministic": False, "stages": "scm:1,rcm:2",
        "model": {"preset": "digits", "dtype": "float32", "remat": False, "ulysses": 0, "lora_rank": 0,
                  "critic_lora_rank": 0},
        "teacher": {"path": config_dict.placeholder(str), "guidance": 5.0, "negative_path": "", "caption_dropout": 0.1},
        "data": {"name": "digits", "dir": "data", "batch_size": 64, "accumulate": 2, "in_memory": False},
        "optimizer": {"student_lr": 1e-4, "critic_lr": 1e-5, "weight_decay": 0.01, "b1": 0.0, "b2": 0.999, "warmup": 9,
                      "decay_from": 0, "decay_to": 0},
        "loss": {"scm_weight": config_dict.placeholder(float), "dmd_weight": 1.0, "tangent_warmup": 0,
                 "student_update_freq": 5, "simulation_steps": 4, "simulation_times": (), "p_G_mean": 0.7,
                 "p_G_std": 1.6, "p_D_shift": 5.0, "dcm_steps": 48, "dcm_shift": 5.0, "gan_weight": 0.01,
                 "gan_critic_weight": 0.1, "tangent": "exact", "tangent_step": 1e-4, "rf_range": (0.0, 1.0),
                 "mean_flow_share": 0.25, "mean_flow_power": 1.0},
        "ema": {"sigma_rel": 0.1}, "host_memory": "", "mesh": {"data": -1, "fsdp": 1, "context": 1, "tensor": 1},
        "checkpoint": {"every": 100, "keep": 2, "keep_every": 0, "best": ""},
        "faults": {"hang_seconds": 60.0, "max_skipped": 9, "max_loss_ratio": 9.0, "max_bad_data": 0.01, "rollbacks": 0},
        "log": {"every": 10, "sample_every": 0, "samples": 8, "wandb": config_dict.placeholder(str)},
        "sampling": {"sigma_max": 80.0, "mid_times": (1.5, 1.4, 1.0), "teacher_steps": 50,
                     "teacher_shift": 3.0},
    })
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def at(config: ConfigDict, key: str) -> object:
    for part in key.split("."):
        config = config[part]
    return config


def stages(*pairs: tuple[str, int]) -> tuple[Stage, ...]:
    return tuple(Stage(frozenset(losses.split("+")), iterations) for losses, iterations in pairs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flow_matching:2000", stages(("flow_matching", 2000))),
        ("dcm:200,scm:400,scm+dmd:1000", stages(("dcm", 200), ("scm", 400), ("scm+dmd", 1000))),
        ("rcm:7", stages(("scm+dmd", 7))),
        ("sct:3,dmd2:7", stages(("sct", 3), ("dmd+gan", 7))),
        ("dmd + dcm:1, dmd:2", stages(("dcm+dmd", 1), ("dmd", 2))),
    ],
)
def test_stages_name_losses_and_iterations(text: str, expected: tuple[Stage, ...]):
    assert parse_stages(text) == expected


JOINABLE = st.sampled_from(["flow_matching", "scm", "dcm", "dmd", "scm+dmd", "dmd+scm", "dcm+dmd"])


@given(st.lists(st.tuples(JOINABLE, st.integers(1, 10**9)), min_size=1, max_size=6))
def test_any_list_of_valid_stages_is_read_back(pairs: list[tuple[str, int]]):
    assert parse_stages(",".join(f"{losses}:{iterations}" for losses, iterations in pairs)) == stages(*pairs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "LOSSES:ITERATIONS"),
        ("scm", "positive number of iterations"),
        ("scm:0", "positive number of iterations"),
        ("scm:-3", "positive number of iterations"),
        ("scm:1.5", "positive number of iterations"),
        ("scm:²", "positive number of iterations"),
        ("scm:1,", "LOSSES:ITERATIONS"),
        ("dmdd:10", "did you mean dmd?"),
        ("scm+scm:10", "once"),
        ("rcm+dmd:10", "once"),
        ("dmd2+gan:10", "once"),
        ("scm+dcm:10", "must have one of dcm, scm, sct"),
        ("rcm+sct:10", "must have one of dcm, scm, sct"),
        ("mean_flow+dmd:10", "mean_flow alone"),
        ("scm+gan:10", "gan without dmd, whose fake score it reads: write dmd2:10"),
        ("flow_matching+dmd:10", "flow_matching alone"),
    ],
)
def test_a_wrong_stage_is_quoted_with_its_rule(text: str, message: str):
    with pytest.raises(UserError) as error:
        parse_stages(text)
    assert message in str(error.value)
    assert repr(text.split(",")[-1]) in str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.batch_size=128", 128),
        ("model.dtype=bfloat16", "bfloat16"),
        ("model.remat=true", True),
        ("model.remat=False", False),
        ("optimizer.student_lr=2e-6", 2e-6),
        ("teacher.guidance=3", 3.0),
        ("data.dir=a=b", "a=b"),
        ("sampling.mid_times=(1.3, 1.0, 0.6)", (1.3, 1.0, 0.6)),
        ("sampling.mid_times=1.3,1", (1.3, 1.0)),
        ("sampling.mid_times=1.3", (1.3,)),
        ("sampling.mid_times=()", ()),
        ("loss.scm_weight=2", 2.0),
        ("loss.scm_weight=none", None),
        ("teacher.path=teacher.safetensors", "teacher.safetensors"),
    ],
)
def test_an_override_sets_a_value_of_the_recipes_type(recipe: Path, override: str, expected: object):
    value = at(load(recipe, [override]), override.partition("=")[0])
    assert value == expected
    assert type(value) is type(expected)


def test_the_last_override_wins(recipe: Path):
    assert load(recipe, ["seed=1", "seed=2"]).seed == 2


def test_a_loaded_config_takes_no_new_key(recipe: Path):
    with pytest.raises(AttributeError, match="locked"):
        load(recipe).data.batch_sise = 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_sise=64", "did you mean data.batch_size?"),
        ("batch_size=64", "did you mean data.batch_size?"),
        ("every=64", "did you mean checkpoint.every or log.every?"),
        ("dta.batch_size=64", "did you mean data.batch_size?"),
        ("nonsense_beyond_repair=1", "known are checkpoint.best"),
        ("data=3", "it is a group: set one of data.accumulate, data.batch_size, data.dir, data.in_memory, data.name"),
        ("data.batch_size", "write --config.data.batch_size=VALUE"),
        ("data.batch_size=many", "must be of type int: its value in the config file is 64"),
        ("data.batch_size=1.5", "must be of type int"),
        ("data.batch_size=none", "must be of type int"),
        ("teacher.guidance=high", "must be of type float"),
        ("teacher.guidance=nan", "must be of type float"),
        ("model.remat=maybe", "must be of type bool"),
        ("loss.scm_weight=heavy", "must be of type float or none"),
        ("sampling.mid_times=1.5,late", "must be of type tuple"),
        ("sampling.mid_times=(1.5,None)", "must be of type tuple"),
    ],
)
def test_a_wrong_override_is_quoted_with_its_remedy(recipe: Path, override: str, message: str):
    with pytest.raises(UserError) as error:
        load(recipe, [override])
    assert f"--config.{override}" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("get_config = (", "recipe.py, line 1: "),
        ("x = 1\n", "has no get_config()"),
        ("get_config = 3\n", "has no get_config()"),
        ("\n\nimport no_such_module\n", "line 3: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    return {}['a']\n", "line 2: KeyError: 'a'"),
        ("def get_config(name):\n    return name\n", "TypeError"),
        ("def get_config():\n    raise ValueError('two\\nlines')\n", "line 2: ValueError: two lines"),
        ("def get_config():\n    return {'seed': 0}\n", "must return a ConfigDict, not dict"),
        ("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': 0})\n", "has no "),
    ],
)
def test_a_broken_recipe_is_named_in_one_line(recipe: Path, source: str, message: str):
    recipe.write_text(source)
    with pytest.raises(UserError) as error:
        load(recipe)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    for path, message in [("missing.py", "No such file"), (".", "directory"), ("binary.py", "not text")]:
        with pytest.raises(UserError, match=message) as error:
            load(tmp_path / path)
        assert str(tmp_path / path) in str(error.value)


def test_loading_leaves_nothing_beside_a_users_recipe(recipe: Path):
    load(recipe)
    assert list(recipe.parent.iterdir()) == [recipe]


def test_a_value_that_is_plainly_none_has_no_type_to_override(recipe: Path):
    recipe.write_text(RECIPE.replace("config_dict.placeholder(str)", "None"))
    with pytest.raises(UserError, match=r"write config_dict.placeholder\(TYPE\)"):
        load(recipe, ["teacher.path=x"])


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("seed", [-1, 2**31, 0.5]),
        ("deterministic", [1, "yes"]),
        ("teacher.path", [3]),
        ("teacher.caption_dropout", [-0.1, 1.1, "all"]),
        ("data.dir", [None]),
        ("data.in_memory", ["yes"]),
        ("loss.p_G_mean", [math.inf, math.nan]),
        ("log.wandb", [3]),
        ("checkpoint.keep_every", [-1]),
        ("checkpoint.best", [None]),
        ("faults.hang_seconds", [-1.0, math.inf]),
        ("faults.max_skipped", [-1]),
        ("faults.max_loss_ratio", [-1.0]),
        ("faults.max_bad_data", [-0.1, 1.0]),
        ("faults.rollbacks", [-1]),
        ("stages", ["scm:0", "", 3, "scm:3000000000"]),
        ("model.dtype", ["float16"]),
        ("teacher.guidance", [0.9, math.inf, math.nan, None]),
        ("data.batch_size", [0, -64, 63, "64"]),
        ("data.accumulate", [0, 3]),
        ("optimizer.student_lr", [0.0, -1e-4]),
        ("optimizer.critic_lr", [0.0, -1e-4]),
        ("optimizer.weight_decay", [-0.1]),
        ("optimizer.b1", [1.0, -0.1]),
        ("optimizer.b2", [1.0, -0.1]),
        ("optimizer.warmup", [-1]),
        ("loss.scm_weight", [-1.0, math.inf]),
        ("loss.dmd_weight", [-1.0]),
        ("loss.tangent_warmup", [-1]),
        ("loss.student_update_freq", [0]),
        ("loss.simulation_steps", [0]),
        ("optimizer.decay_from", [-1]),
        ("optimizer.decay_to", [-1]),
        ("loss.simulation_times", [(1.0, 1.0)]),
        ("log.samples", [0]),
        ("sampling.teacher_shift", [0.0]),
        ("loss.p_G_std", [0.0]),
        ("loss.p_D_shift", [0.0]),
        ("loss.dcm_steps", [1]),
        ("loss.dcm_shift", [0.0]),
        ("loss.gan_weight", [-1.0]),
        ("loss.gan_critic_weight", [-1.0]),
        ("loss.tangent", ["forward"]),
        ("loss.tangent_step", [0.0, 0.1]),
        ("loss.rf_range", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.5,), 3]),
        ("loss.mean_flow_share", [0.0, 1.1]),
        ("loss.mean_flow_power", [-0.1, 1.1]),
        ("model.lora_rank", [-1]),
        ("model.critic_lora_rank", [-1]),
        ("ema.sigma_rel", [0.0, 0.29]),
        ("model.ulysses", [-1, 1.5]),
        ("host_memory", ["student", "teacher;ema", "teacher,", 3]),
        ("mesh.data", [0, -2, 1.5]),
        ("mesh.fsdp", [0, -2]),
        ("mesh.context", [0, 1.5]),
        ("mesh.tensor", [0, -2]),
        ("checkpoint.every", [0]),
        ("checkpoint.keep", [0]),
        ("log.every", [0]),
        ("log.sample_every", [-1]),
        ("sampling.sigma_max", [0.0]),
        ("sampling.mid_times", [(1.0, 1.4), (1.6,), (0.0,), 3, ("a",)]),
        ("sampling.teacher_steps", [0]),
    ],
)
def test_a_value_that_breaks_its_rule_is_named(recipe: Path, key: str, values: list[object]):
    for value in values:
        config = load(recipe)
        group = at(config, key.rpartition(".")[0]) if "." in key else config
        with config.unlocked(), config.ignore_type():
            group[key.rpartition(".")[2]] = value
        with pytest.raises(UserError) as error:
            validate(config)
        assert key in str(error.value)
        assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages=sct:9", "model.lora_rank=4"], "model.lora_rank adapts a teacher, and no stage has one"),
        (["stages=sct:9", "host_memory=ema,teacher"], "host_memory=ema,teacher names a teacher, and no stage has one"),
        (["stages=scm:9", "model.critic_lora_rank=4"], "adapts a fake score, and no stage has dmd"),
        (["stages=dcm:9", "loss.rf_range=0.5,1.0"], "loss.rf_range bounds drawn times, dcm has a grid of all"),
        (
            ["stages=dmd:9", "loss.rf_range=0.5,1.0", "loss.simulation_steps=3", "loss.simulation_times=(1.3, 0.6)"],
            "loss.simulation_times has 0.6, RF time 0.406, outside loss.rf_range",
        ),
        (["loss.simulation_times=1.3,0.6"], "is pi/2: set --config.loss.simulation_steps=3"),
        (["loss.simulation_times=1.3,1.0,0.6,0.2"], "is pi/2: set --config.loss.simulation_steps=5"),
        (
            ["optimizer.warmup=100", "optimizer.decay_from=50", "optimizer.decay_to=200"],
            "optimizer.decay_from=50 must be at least optimizer.warmup=100 and less than optimizer.decay_to=200",
        ),
        (
            ["optimizer.warmup=0", "optimizer.decay_from=200", "optimizer.decay_to=200"],
            "optimizer.decay_from=200 must be at least optimizer.warmup=0 and less than optimizer.decay_to=200",
        ),
    ],
)
def test_values_that_do_not_go_together_are_named(recipe: Path, overrides: list[str], message: str):
    with pytest.raises(UserError) as error:
        load(recipe, overrides)
    assert message in str(error.value)


def test_a_batch_that_does_not_split_names_one_that_does(recipe: Path):
    with pytest.raises(UserError, match=r"set --config.data.batch_size=63$"):
        load(recipe, ["data.accumulate=7"])


def test_a_missing_key_is_named(recipe: Path):
    recipe.write_text(RECIPE.replace('"seed": 0,', ""))
    with pytest.raises(UserError, match="has no seed"):
        load(recipe)


def test_a_placeholder_keeps_its_type_in_a_variant_of_a_recipe(recipe: Path):
    recipe.write_text(
        RECIPE.replace("get_config", "base")
        + "def get_config():\n    c = base()\n    c.teacher.path = 'a'\n    return c\n"
    )
    assert load(recipe).teacher.path == "a"
    assert load(recipe, ["teacher.path=none"]).teacher.path is None


class TestCommand:
    @pytest.fixture
    def command(self) -> Command:
        command = Command("Trains.")
        command.add_argument("--workdir", required=True)
        return command

    def test_reads_the_recipe_its_overrides_and_the_other_options(self, command: Command, recipe: Path):
        words = [f"--config={recipe}", "--config.seed=3", "--workdir=runs/a", "--config.log.every", "7"]
        arguments, config = command.parse(words)
        assert (arguments.workdir, config.seed, config.log.every) == ("runs/a", 3, 7)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--workdir=w"], "--config"),
            (["--config={recipe}"], "--workdir"),
            (["--config={recipe}", "--workdir=w", "--wrokdir=w"], "--wrokdir"),
            (["--config={recipe}", "--workd=w"], "--workdir"),
            (["--config=nowhere.py", "--workdir=w"], "nowhere.py"),
            (["--config={recipe}", "--workdir=w", "--config.data.batch_sise=3"], "data.batch_size"),
            (["--config={recipe}", "--workdir=w", "--config.seed"], "must be of type int"),
            (["--config={recipe}", "--workdir=w", "--config.seed=-1"], "seed=-1"),
        ],
    )
    def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
        self, command: Command, recipe: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
    ):
        with pytest.raises(SystemExit) as exit_:
            command.parse([word.format(recipe=recipe) for word in words])
        out, err = capsys.readouterr()
        assert exit_.value.code == 2
        assert out == ""
        assert err.count("\n") == 1
        assert message in err

    def test_a_user_error_of_the_run_is_reported_likewise(self, command: Command, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit) as exit_, command.reports_user_errors():
            raise UserError("mesh.data=3 does not cover 8 devices: set mesh.data=-1")
        assert exit_.value.code == 2
        assert capsys.readouterr().err.endswith("error: mesh.data=3 does not cover 8 devices: set mesh.data=-1\n")

    def test_other_errors_keep_their_traceback(self, command: Command):
        with pytest.raises(ZeroDivisionError), command.reports_user_errors():
            raise ZeroDivisionError
