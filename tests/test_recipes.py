"""The recipes in configs/: each says how it is run, keeps the rules, and describes a state that can be made."""

import ast
import math
import re
import shlex
from pathlib import Path

import jax
import pytest

from rcm_jax import sharding
from rcm_jax.config import FROM_TEACHER, load, parse_stages
from rcm_jax.models.wan import PRESETS
from rcm_jax.schedule import needs, total_iterations
from rcm_jax.state import overlay
from rcm_jax.train import abstract_state, create_networks, create_optimizers, make_recipe

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.name != "__init__.py")
WAN_480P = (21, 60, 104, 16)


def read(name, overrides=()):
    return load(CONFIGS / f"{name}.py", overrides)


def docstring(name):
    return ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))


def launch_words(name):
    """The words of the command in a recipe's docstring, as a shell splits them."""
    (command,) = re.findall(r"python -m launch\.train [^\n]*(?:\\\n[^\n]*)*", docstring(name).replace("\\\n", " "))
    return shlex.split(command)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_the_command_that_runs_it(name):
    """With overrides that the recipe takes."""
    words = launch_words(name)
    assert words[3] == f"--config=configs/{name}.py"
    assert words[4].startswith("--workdir=runs/")
    overrides = [word.removeprefix("--config.") for word in words[5:]]
    assert all(word.startswith("--config.") for word in words[5:])
    read(name, overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_describes_a_state_that_can_be_made(name):
    """Shapes alone, on eight devices that share the parameters, whatever their size."""
    config = read(name, ["mesh.fsdp=8", "mesh.data=1"])
    stages, networks = parse_stages(config.stages), create_networks(config)
    mesh = sharding.make_mesh(**config.mesh)
    state = abstract_state(config, networks, create_optimizers(config), mesh)
    whole = overlay(state.teacher, state.student)
    assert jax.tree.structure(whole) == jax.tree.structure(networks.student.abstract_params())
    assert (state.teacher is not None) == needs(stages, *FROM_TEACHER)
    assert (state.fake is None) == (not needs(stages, "dmd"))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.student))
    moments = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.student_opt) if leaf.ndim)
    assert moments == size * (1 if config.optimizer.b1 == 0 else 2)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_decays_within_its_run(name):
    config = read(name)
    if config.optimizer.decay_to:
        assert config.optimizer.warmup <= config.optimizer.decay_from < config.optimizer.decay_to
        assert config.optimizer.decay_to <= total_iterations(parse_stages(config.stages))


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("digits_")])
def test_a_digits_recipe_runs_without_further_files(name):
    config = read(name)
    assert (config.data.name, config.model.preset) == ("digits", "digits")
    if needs(parse_stages(config.stages), *FROM_TEACHER):
        assert (CONFIGS.parent / config.teacher.path).is_file()


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("digits28_")])
def test_a_recipe_of_large_digits_takes_the_teacher_that_their_recipe_leaves(name):
    config = read(name)
    assert (config.data.name, config.model.preset) == ("digits28", "digits28")
    assert f"--workdir={Path(config.teacher.path).parent}" in launch_words("digits28_teacher")
    assert Path(config.teacher.path).name == "ema.safetensors"


# Hyper-parameters of the official Wan2.1 recipes, github.com/NVlabs/rcm.
OFFICIAL = {
    "wan2_1_t2v_1_3b": {
        "model.preset": "wan2.1-t2v-1.3b",
        "data.batch_size": 256,
        "optimizer.student_lr": 2e-6,
        "optimizer.critic_lr": 4e-7,
        "loss.student_update_freq": 5,
        "loss.tangent_warmup": 1000,
        "loss.p_G_mean": 0.7,
        "sampling.sigma_max": 80.0,
    },
    "wan2_1_t2v_14b": {
        "model.preset": "wan2.1-t2v-14b",
        "data.batch_size": 64,
        "optimizer.student_lr": 1e-6,
        "optimizer.critic_lr": 1e-7,
        "loss.student_update_freq": 10,
        "loss.tangent_warmup": 0,
        "loss.p_G_mean": 1.5,
    },
}
SHARED = {
    "model.dtype": "bfloat16",
    "teacher.guidance": 5.0,
    "optimizer.b1": 0.0,
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 0.01,
    "optimizer.decay_to": 0,
    "loss.scm_weight": 100.0,
    "loss.dmd_weight": 1.0,
    "loss.simulation_steps": 4,
    "loss.simulation_times": (),
    "loss.p_G_std": 1.6,
    "loss.p_D_shift": 5.0,
    "loss.dcm_steps": 48,
    "loss.dcm_shift": 5.0,
    "ema.sigma_rel": 0.1,
    "sampling.mid_times": (1.5, 1.4, 1.0),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_wan_recipe_has_the_official_hyper_parameters(name):
    config = read(name)
    for key, value in (SHARED | OFFICIAL[name]).items():
        group, _, member = key.partition(".")
        assert config[group][member] == value, key
    assert parse_stages(config.stages)[0].losses == {"scm", "dmd"}
    assert total_iterations(parse_stages(config.stages)) == 10_000
    recipe = make_recipe(config, WAN_480P)
    assert recipe.ema_gamma == pytest.approx(6.94, abs=5e-3)
    assert (recipe.scm_weight, recipe.accumulate) == (100.0, 1)
    assert PRESETS[config.model.preset].tokens(WAN_480P) == 32_760


def rows_of_slices():
    """(recipe, where, devices, overrides) of every row of docs/slices.md."""
    text = (CONFIGS.parent / "docs" / "slices.md").read_text()
    return re.findall(r"^\| `(\w+)` \| (\w+:\w+) \| (\d+) \| `([^`]*)`", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "where", "devices", "overrides"), rows_of_slices())
def test_a_slice_is_shared_out_without_rest(name, where, devices, overrides):
    """Each part of a batch gives every group of devices whole samples, and every device heads."""
    config = read(name, [word.removeprefix("--config.") for word in overrides.split()])
    assert int(devices) == math.prod(map(int, where.partition(":")[2].split("x")))
    data, fsdp, context, tensor = (config.mesh[axis] for axis in ("data", "fsdp", "context", "tensor"))
    data = int(devices) // (fsdp * context * tensor) if data == -1 else data
    assert data * fsdp * context * tensor == int(devices)
    assert config.data.batch_size % (config.data.accumulate * data * fsdp) == 0
    assert PRESETS[config.model.preset].heads % tensor == 0
