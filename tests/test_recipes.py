"""Every recipe loads, names its own command, and describes a run whose whole state has shapes and shardings."""

from pathlib import Path

import jax
import pytest

from rcm_jax import sharding
from rcm_jax.config import load
from rcm_jax.train import abstract_state, create_network, create_optimizers

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_loads_and_its_docstring_holds_its_command(name):
    load(CONFIGS / f"{name}.py")
    assert f"python -m launch.train --config=configs/{name}.py --workdir=" in (CONFIGS / f"{name}.py").read_text()


def parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def published_parameters(dim, ffn_dim, layers, text_dim=4096, time_dim=256, patch=4, channels=16):
    """Counted from the layout of Wan's release: every weight, bias, norm and modulation."""
    attention = 4 * (dim * dim + dim) + 2 * dim
    block = 2 * attention + (dim * ffn_dim + ffn_dim) + (ffn_dim * dim + dim) + 2 * dim + 6 * dim
    embeddings = (channels * patch * dim + dim) + (text_dim * dim + dim) + (dim * dim + dim)
    time = (time_dim * dim + dim) + (dim * dim + dim) + (dim * 6 * dim + 6 * dim)
    head = dim * patch * channels + patch * channels + 2 * dim
    return layers * block + embeddings + time + head


@pytest.mark.parametrize(
    ("name", "shape", "published"),
    [
        ("wan2_1_t2v_1_3b", {"dim": 1536, "ffn_dim": 8960, "layers": 30}, 1.3e9),
        ("wan2_1_t2v_14b", {"dim": 5120, "ffn_dim": 13824, "layers": 40}, 14e9),
    ],
)
def test_whole_state_of_a_wan_recipe(name, shape, published):
    config = load(CONFIGS / f"{name}.py", ["mesh.fsdp=8"])
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    state = abstract_state(config, create_network(config), create_optimizers(config), mesh)
    count = parameters(state.student)
    assert count == published_parameters(**shape)
    assert abs(count / published - 1) < 0.1
    assert parameters(state.teacher) == parameters(state.ema) == parameters(state.fake) == count
    # With b1 = 0 each optimiser stores the second moment alone, and a few counters.
    assert count <= parameters(state.student_opt) <= count + 3
    kernel = state.fake["blocks"]["ffn"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (shape["layers"], shape["dim"] // 8, shape["ffn_dim"])


def test_digits_state_is_fully_sharded():
    config = load(CONFIGS / "digits_staged.py")
    mesh = sharding.make_mesh(data=2, fsdp=4)
    state = abstract_state(config, create_network(config), create_optimizers(config), mesh)
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(state))
