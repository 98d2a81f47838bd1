"""Where a run's arrays lie: every leaf of the published models' states by exactly one rule, on eight devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import digits_rcm, wan2_1_t2v_1_3b, wan2_1_t2v_14b
from rcm_jax import sharding
from rcm_jax.models.presets import PRESETS
from rcm_jax.models.presets import create_network as create_published
from rcm_jax.train import create_initial_state, create_networks, create_optimizers

RECIPES = {"digits": digits_rcm, "wan2.1-t2v-1.3b": wan2_1_t2v_1_3b, "wan2.1-t2v-14b": wan2_1_t2v_14b}


def abstract_state(name):
    """Shapes of the state of a run that distils by sCM and DMD; allocates nothing."""
    config = RECIPES[name].get_config()
    networks = create_networks(config)
    teacher = networks.teacher.abstract_params()
    return jax.eval_shape(
        lambda teacher: create_initial_state(config, networks, create_optimizers(config), teacher), teacher
    )


def dotted(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


@pytest.mark.parametrize("name", RECIPES)
def test_every_array_of_a_state_matches_one_rule_and_is_spread_evenly(name):
    state, mesh = abstract_state(name), sharding.make_mesh(data=1, fsdp=8)
    shardings = dict(jax.tree.leaves_with_path(sharding.tree_shardings(state, mesh)))
    whole = spread = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        matches = [spec for pattern, spec in sharding.RULES if re.search(rf"(^|\.){pattern}$", dotted(path))]
        assert len(matches) == (leaf.ndim > 0), dotted(path)
        assert shardings[path].spec == (matches[0] if matches else P())
        is_kernel = path[-1] == jax.tree_util.DictKey("kernel")
        assert ("fsdp" in shardings[path].spec) == is_kernel, dotted(path)
        whole += leaf.size
        spread += math.prod(shardings[path].shard_shape(leaf.shape))
    # Student, EMA, second moment, teacher, fake score and its second moment; what stays whole is small.
    assert whole == pytest.approx(6 * sum(leaf.size for leaf in jax.tree.leaves(state.student)), abs=20)
    assert whole / 8 < spread < whole / 7.5 if name != "digits" else spread < whole / 5


@pytest.mark.parametrize("preset", PRESETS)
def test_the_matrices_of_every_network_are_spread_over_eight_devices(preset):
    params, mesh = create_published(PRESETS[preset]).abstract_params(), sharding.make_mesh(data=1, fsdp=8)
    for path, place in jax.tree.leaves_with_path(sharding.tree_shardings(params, mesh)):
        assert ("fsdp" in place.spec) == dotted(path).endswith(".kernel"), dotted(path)


@pytest.mark.parametrize(
    ("path", "matches"),
    [
        (("blocks", "self_attn", "gate", "kernel"), 1),
        (("blocks", "new_attn", "q", "kernel"), 0),
        (("head", "kernel"), 0),
        (("blocks", "norm9", "scale"), 0),
        (("lora", "a"), 0),
    ],
)
def test_a_leaf_without_a_rule_is_an_error(path, matches):
    tree = jax.ShapeDtypeStruct((2, 8, 8) if "kernel" in path else (8,), jnp.float32)
    for name in reversed(path):
        tree = {name: tree}
    mesh = sharding.make_mesh(data=1, fsdp=8)
    if matches:
        assert jax.tree.leaves(sharding.tree_shardings(tree, mesh))[0].spec == P(None, "fsdp", None)
        return
    with pytest.raises(ValueError, match=re.escape(f"{'.'.join(path)} matches 0 rules of sharding.RULES")):
        sharding.tree_shardings(tree, mesh)


def test_a_leaf_with_two_rules_is_an_error(monkeypatch):
    monkeypatch.setattr(sharding, "RULES", (*sharding.RULES, (r"blocks\.modulation", P())))
    tree = {"blocks": {"modulation": jnp.zeros((2, 6, 8))}}
    with pytest.raises(ValueError, match=r"blocks\.modulation matches 2 rules"):
        sharding.tree_shardings(tree, sharding.make_mesh())


def test_rows_that_do_not_divide_are_an_error():
    tree = {"student": {"head": {"head": {"kernel": jax.ShapeDtypeStruct((12, 48), jnp.float32)}}}}
    message = re.escape("student.head.head.kernel is cut along 12, not a multiple of mesh.fsdp=8")
    with pytest.raises(ValueError, match=message):
        sharding.tree_shardings(tree, sharding.make_mesh(data=1, fsdp=8))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({}, (8, 1)), ({"fsdp": 2}, (4, 2)), ({"data": 2, "fsdp": -1}, (2, 4)), ({"data": 1, "fsdp": 8}, (1, 8))],
)
def test_a_mesh_takes_the_devices_that_are_left(sizes, expected):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == expected


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": 4, "fsdp": 1}, {"fsdp": 3}, {"fsdp": 16}, {"data": -1, "fsdp": -1}, {"fsdp": 0}]
)
def test_a_mesh_that_does_not_cover_the_devices_is_an_error(sizes):
    with pytest.raises(ValueError, match="does not cover 8 devices"):
        sharding.make_mesh(**sizes)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_every_device_holds_its_own_rows_of_a_batch(fsdp):
    mesh = sharding.make_mesh(fsdp=fsdp)
    batch = jax.device_put(np.arange(16.0).reshape(16, 1), sharding.batch_sharding(mesh))
    rows = sorted(shard.data[:, 0].tolist() for shard in batch.addressable_shards)
    assert rows == [[2.0 * k, 2.0 * k + 1] for k in range(8)]
    assert sharding.replicated(mesh).shard_shape((16, 1)) == (16, 1)
