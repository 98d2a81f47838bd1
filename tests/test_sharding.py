"""Where a run's arrays lie: every leaf of the published models' states by exactly one rule, on eight devices."""

import dataclasses
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from configs import digits_rcm, wan2_1_t2v_1_3b, wan2_1_t2v_14b
from rcm_jax import sharding
from rcm_jax.config import UserError
from rcm_jax.models.presets import PRESETS
from rcm_jax.models.presets import create_network as create_published
from rcm_jax.train import create_initial_state, create_networks, create_optimizers

SPLITS = [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}]
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


def axes_of(spec):
    """Names of the mesh axes that cut an array."""
    return {name for axes in spec if axes for name in ((axes,) if isinstance(axes, str) else axes)}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("sizes", SPLITS)
def test_every_array_of_a_state_matches_one_rule_and_is_spread_evenly(sizes, name):
    state, mesh = abstract_state(name), sharding.make_mesh(data=1, **sizes)
    shardings = dict(jax.tree.leaves_with_path(sharding.tree_shardings(state, mesh)))
    whole = spread = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        matches = [spec for pattern, spec in sharding.RULES if re.search(rf"(^|\.){pattern}$", dotted(path))]
        assert len(matches) == (leaf.ndim > 0), dotted(path)
        assert shardings[path].spec == (matches[0] if matches else P())
        is_kernel = path[-1] == jax.tree_util.DictKey("kernel")
        assert axes_of(shardings[path].spec) == ({"fsdp", "context", "tensor"} if is_kernel else set()), dotted(path)
        whole += leaf.size
        spread += math.prod(shardings[path].shard_shape(leaf.shape))
    # Student, EMA, second moment, teacher, fake score and its second moment; what stays whole is small.
    assert whole == pytest.approx(6 * sum(leaf.size for leaf in jax.tree.leaves(state.student)), abs=20)
    assert whole / 8 < spread < whole / 7.5 if name != "digits" else spread < whole / 5


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sizes", SPLITS)
def test_the_matrices_of_every_network_are_spread_over_eight_devices(sizes, preset):
    params, mesh = create_published(PRESETS[preset]).abstract_params(), sharding.make_mesh(data=1, **sizes)
    for path, place in jax.tree.leaves_with_path(sharding.tree_shardings(params, mesh)):
        assert ("fsdp" in axes_of(place.spec)) == dotted(path).endswith(".kernel"), dotted(path)


@pytest.mark.parametrize("sizes", SPLITS)
def test_so_is_what_methods_add_to_a_network(sizes):
    """Of a LoRA's two matrices the one of a device's heads and hidden channels is cut by `tensor` instead."""
    config = dataclasses.replace(PRESETS["wan2.1-i2v-14b"], spans=True, discriminator=True, lora_rank=16)
    params, mesh = create_published(config).abstract_params(), sharding.make_mesh(data=1, **sizes)
    for path, place in jax.tree.leaves_with_path(sharding.tree_shardings(params, mesh)):
        is_matrix = dotted(path).endswith((".kernel", ".lora_a", ".lora_b"))
        assert bool(axes_of(place.spec)) == is_matrix, dotted(path)


@pytest.mark.parametrize(("first", "then"), [("self_attn.q", "self_attn.o"), ("ffn.up", "ffn.down")])
def test_what_a_matrix_computes_on_a_device_the_next_one_takes_there(first, then):
    first, then = (spec_of(f"blocks.{name}.kernel", 3) for name in (first, then))
    assert first[2] == then[1] == "tensor"
    assert first[1] == then[2] == ("fsdp", "context")


def spec_of(path, axes):
    tree = traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct(axes * (8,), jnp.float32)}, sep=".")
    return jax.tree.leaves(sharding.tree_shardings(tree, sharding.make_mesh(data=1, fsdp=8)))[0].spec


@pytest.mark.parametrize(
    ("path", "axes"),
    [
        ("blocks.self_attn.gate.kernel", 3),
        ("blocks.new_attn.q.kernel", 3),
        ("head.kernel", 2),
        ("blocks.norm9.scale", 2),
        ("lora.a", 2),
    ],
)
def test_a_leaf_without_a_rule_is_an_error(path, axes):
    with pytest.raises(ValueError, match=re.escape(f"{path} matches 0 rules of sharding.RULES")):
        spec_of(path, axes)


def test_a_leaf_with_two_rules_is_an_error(monkeypatch):
    monkeypatch.setattr(sharding, "RULES", (*sharding.RULES, (r"blocks\.modulation", P())))
    tree = {"blocks": {"modulation": jnp.zeros((2, 6, 8))}}
    with pytest.raises(ValueError, match=r"blocks\.modulation matches 2 rules"):
        sharding.tree_shardings(tree, sharding.make_mesh())


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        (
            "head.head.kernel",
            (12, 48),
            "head.head.kernel is cut along 12, not a multiple of mesh.fsdp * mesh.context * mesh.tensor = 8",
        ),
        ("blocks.ffn.up.kernel", (2, 8, 6), "blocks.ffn.up.kernel is cut along 6, not a multiple of mesh.tensor = 4"),
    ],
)
def test_rows_or_columns_that_do_not_divide_are_an_error(path, shape, message):
    tree = {"student": traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct(shape, jnp.float32)}, sep=".")}
    with pytest.raises(UserError, match=re.escape(f"student.{message}: lower it")):
        sharding.tree_shardings(tree, sharding.make_mesh(data=1, fsdp=2, tensor=4))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1, 1)),
        ({"context": 2, "tensor": 2}, (2, 1, 2, 2)),
        ({"data": 1, "fsdp": 2, "context": -1, "tensor": 2}, (1, 2, 2, 2)),
    ],
)
def test_a_mesh_takes_the_devices_that_are_left(sizes, expected):
    mesh = sharding.make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.devices.shape == expected


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": 4, "fsdp": 1}, {"fsdp": 3}, {"fsdp": 16}, {"data": -1, "fsdp": -1}, {"fsdp": 0}]
)
def test_a_mesh_that_does_not_cover_the_devices_is_an_error(sizes):
    with pytest.raises(ValueError, match="does not cover 8 devices"):
        sharding.make_mesh(**sizes)


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [
        ({"fsdp": 4, "context": 2}, "data"),
        ({"data": 4, "tensor": 4}, "data"),
        ({"data": 1, "fsdp": 8, "context": 2}, "fsdp"),
        ({"data": 1, "context": 4, "tensor": 4}, "context"),
    ],
)
def test_only_the_first_axis_that_can_crosses_from_slice_to_slice(sizes, axis):
    """On two slices of eight chips."""
    chips = topologies.get_topology_desc("v5e:2x4", platform="tpu", num_slices=2).devices
    mesh = sharding.make_mesh(devices=chips, **sizes)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    first, *_, last = np.split(slices, mesh.shape[axis], axis=mesh.axis_names.index(axis))
    assert np.unique(first) == [0]
    assert np.unique(last) == [1]


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_every_device_holds_its_own_rows_of_a_batch(fsdp):
    mesh = sharding.make_mesh(fsdp=fsdp)
    batch = jax.device_put(np.arange(16.0).reshape(16, 1), sharding.batch_sharding(mesh))
    rows = sorted(shard.data[:, 0].tolist() for shard in batch.addressable_shards)
    assert rows == [[2.0 * k, 2.0 * k + 1] for k in range(8)]
    assert sharding.replicated(mesh).shard_shape((16, 1)) == (16, 1)


@pytest.mark.parametrize("sizes", [{"data": 16}, {"data": 8, "tensor": 2}, {"fsdp": 2, "context": 4}, {"context": 16}])
def test_a_process_reads_the_rows_of_its_devices(sizes):
    """On 4 x 4 chips, of which each process has a square, so that its rows need not be neighbours; two rows a part."""
    chips = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices
    mesh = sharding.make_mesh(**{"data": -1} | sizes, devices=chips)
    parts = mesh.devices.reshape(sharding.batch_parts(mesh), -1)
    for process in range(4):
        held = [n for n, sharers in enumerate(parts) if process in {chip.process_index for chip in sharers}]
        with mock.patch.object(jax, "process_index", return_value=process):
            found = sharding.local_rows(mesh, 2 * len(parts))
        assert found.tolist() == [row for n in held for row in (2 * n, 2 * n + 1)]


def test_parameters_are_placed_where_their_rules_say():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    params = {"blocks": {"ffn": {"up": {"kernel": np.arange(128.0).reshape(2, 8, 8), "bias": np.ones((2, 8))}}}}
    placed = sharding.place_params(params, mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert {shard.data.shape for shard in placed["blocks"]["ffn"]["up"]["kernel"].addressable_shards} == {(2, 4, 2)}
