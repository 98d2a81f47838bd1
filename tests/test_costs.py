"""Operations against XLA's own count, and communication against that of programs whose traffic is known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rcm_jax.config import UserError
from rcm_jax.costs import pass_operations, received_bytes, step_operations
from rcm_jax.models.functional import functional
from rcm_jax.models.wan import Wan, WanConfig
from rcm_jax.schedule import Phase
from rcm_jax.steps import Recipe

SMALL = WanConfig(dim=512, ffn_dim=2048, heads=4, layers=1, text_dim=16, text_length=64)
LATENT = (2, 32, 32, 16)
LENGTH, ELEMENTS, DEVICES = 7, 1024, 8
BYTES = 4 * ELEMENTS


@pytest.fixture(scope="module")
def counted():
    """XLA's TFLOP of a forward pass, of one with its tangent, and of one with its gradient."""
    network = functional(lambda rngs: Wan(SMALL, rngs=rngs))
    x, time, text = jnp.zeros((1, *LATENT)), jnp.zeros((1,)), jnp.zeros((1, SMALL.text_length, SMALL.text_dim))

    def forward(params, mode="reverse"):
        return network.apply(params, x, time, text, mode=mode)

    def tangent(params):
        return jax.jvp(lambda x, time: network.apply(params, x, time, text, mode="forward"), (x, time), (x, time))

    gradient = jax.grad(lambda params: forward(params).sum())
    params = network.abstract_params()
    return [jax.jit(f).lower(params).cost_analysis()["flops"] * 1e-12 for f in (forward, tangent, gradient)]


def test_operations_of_passes_are_those_that_xla_counts(counted):
    """XLA also counts what is no product: up to a tenth, in a network so narrow."""
    one = pass_operations(SMALL, SMALL.tokens(LATENT))
    model = one.forward, one.forward + one.tangent, one.forward + one.gradient
    np.testing.assert_array_less(model, counted)
    np.testing.assert_allclose(model, counted, rtol=0.1)


@pytest.mark.parametrize(
    ("remat", "again"), [("none", 0), ("linear", 0), ("attention", 1), ("offload", 1), ("block", 2)]
)
@pytest.mark.parametrize("losses", ["scm", "flow_matching"])
def test_a_remat_policy_adds_what_it_makes_again(losses, remat, again):
    """Nothing, a block's products, or those and its attention."""
    one, phase = pass_operations(SMALL, 512), Phase("student", frozenset({losses}), 1.0)
    more = (0.0, one.linear, one.forward)[again]
    assert step_operations(one, phase, Recipe(), remat) == pytest.approx(step_operations(one, phase, Recipe()) + more)


@pytest.mark.parametrize(
    ("losses", "forward", "tangent", "gradient"),
    [("scm", 3, 1, 1), ("dmd", 5.5, 0, 1), ("scm+dmd", 8.5, 1, 2), ("dcm", 4, 0, 1), ("flow_matching", 1, 0, 1)],
)
def test_operations_of_an_update_are_those_of_its_passes(losses, forward, tangent, gradient):
    """Guidance takes two teachers; a simulation of 1 to 4 steps has 1.5 on average before the one with a gradient."""
    one = pass_operations(SMALL, 512)
    phase = Phase("student", frozenset(losses.split("+")), 1.0)
    expected = forward * one.forward + tangent * one.tangent + gradient * one.gradient
    assert math.isclose(step_operations(one, phase, Recipe()), expected)
    assert step_operations(one, phase, Recipe(), "attention") - expected == pytest.approx(gradient * one.linear)


@pytest.mark.parametrize(("stages", "others"), [("sct", 0), ("mean_flow", 2), ("mean_flow_scratch", 1)])
def test_operations_of_a_tangent_and_what_it_goes_along(stages, others):
    """`others` are passes without gradient: a guided teacher's two, or the student's own without a caption."""
    one = pass_operations(SMALL, 512)
    expected = (others + 1) * one.forward + one.tangent + one.gradient
    assert math.isclose(step_operations(one, Phase("student", frozenset({stages}), 1.0), Recipe()), expected)


@pytest.mark.parametrize("update", ["student", "critic"])
def test_a_gan_costs_half_a_pass_with_gradient_at_most(update):
    one = pass_operations(SMALL, 512)
    without, with_gan = (
        step_operations(one, Phase(update, frozenset(losses), 1.0), Recipe()) for losses in (["dmd"], ["dmd", "gan"])
    )
    assert without < with_gan <= without + 0.5 * (one.forward + one.gradient)


def test_operations_of_a_critic_update():
    one = pass_operations(SMALL, 512)
    phase = Phase("critic", frozenset(), 1.0)
    assert math.isclose(step_operations(one, phase, Recipe()), 3.5 * one.forward + one.gradient)
    assert math.isclose(step_operations(one, phase, Recipe(simulation_steps=1)), 2 * one.forward + one.gradient)


def test_a_loss_of_unknown_cost_is_named():
    one = pass_operations(SMALL, 512)
    with pytest.raises(UserError, match=r"what ict costs is not known: add it to step_operations in rcm_jax/costs\.py"):
        step_operations(one, Phase("student", frozenset({"dmd", "ict"}), 1.0), Recipe())


# What each device of a ring must receive at the least, of operands of BYTES on each.
PROGRAMS = {
    "all-reduce": (lambda x: lax.psum(x, "i"), 2 * 7 / 8 * BYTES),
    "all-gather": (lambda x: lax.all_gather(x, "i").sum(0), 7 * BYTES),
    "reduce-scatter": (lambda x: jnp.tile(lax.psum_scatter(x, "i", tiled=True), DEVICES), 7 / 8 * BYTES),
    "all-to-all": (lambda x: lax.all_to_all(x, "i", 0, 0, tiled=True), 7 / 8 * BYTES),
    "collective-permute": (lambda x: lax.ppermute(x, "i", [(i, (i + 1) % DEVICES) for i in range(DEVICES)]), BYTES),
}


def compile_loop(collective, devices, steps=LENGTH) -> str:
    """The text of a program that runs a collective in a loop of LENGTH, or of as many steps as it is told."""
    mesh = Mesh(np.array(devices), ("i",), axis_types=(AxisType.Auto,))

    def loop(x, steps):
        return lax.fori_loop(0, steps, lambda _, x: jnp.sin(collective(x)), x)

    split = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"), check_vma=False)
    x = jax.ShapeDtypeStruct((DEVICES * ELEMENTS,), jnp.float32, sharding=NamedSharding(mesh, P("i")))
    if steps is not None:
        return jax.jit(lambda x: split(loop)(x, steps)).lower(x).compile().as_text()
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return jax.jit(split(loop)).lower(x, steps).compile().as_text()


@pytest.mark.parametrize("kind", PROGRAMS)
def test_communication_of_a_loop_on_cpus(kind):
    collective, expected = PROGRAMS[kind]
    assert received_bytes(compile_loop(collective, jax.devices()), 0.0) == {kind: LENGTH * expected}


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "collective-permute"])
def test_communication_of_a_loop_on_tpus(kind):
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    collective, expected = PROGRAMS[kind]
    received = received_bytes(compile_loop(collective, devices), 0.0)
    assert received[kind] == LENGTH * expected


def test_a_loop_of_unknown_length_counts_as_told():
    collective, expected = PROGRAMS["all-reduce"]
    assert received_bytes(compile_loop(collective, jax.devices(), steps=None), 1.5) == {"all-reduce": 1.5 * expected}


# As libtpu writes the sum of a gradient's parts.
SCATTER = """
%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

%all-reduce-scatter.1 (input: f32[64,4]) -> f32[8,4] {{
  %input = f32[64,4]{{1,0:T(8,128)}} parameter(0)
  %all-reduce.1 = f32[64,4]{{1,0:T(8,128)}} all-reduce(%input), channel_id=1, {groups}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[8,4]{{1,0:T(8,128)}} dynamic-slice(%all-reduce.1, %place, %zero)
}}

ENTRY %main (p: f32[64,4]) -> f32[8,4] {{
  %p = f32[64,4]{{1,0:T(8,128)}} parameter(0)
  ROOT %fusion.1 = f32[8,4]{{1,0:T(8,128)}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}",
        "replica_groups=[2,8]<=[16]",
        "replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_1','axis_2'}",
        "replica_groups=mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]T(1,0)) {'axis_0'}",
    ],
)
def test_a_sum_of_which_each_device_keeps_a_part_is_a_reduce_scatter(groups):
    assert received_bytes(SCATTER.format(groups=groups), 0.0) == {"reduce-scatter": 7 / 8 * 64 * 4 * 4}


def test_a_collective_of_devices_unknown_is_an_error():
    with pytest.raises(ValueError, match=r"no devices are known of the collective '%all-reduce\.1"):
        received_bytes(SCATTER.format(groups="replica_groups=all"), 0.0)
