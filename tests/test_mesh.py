"""Updates of a small Wan network, and its samples, are the same on any mesh, and compile to what TPUs should run.

The optimiser is plain gradient descent, so that parameters show the gradient itself.
"""

import dataclasses
import functools
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies

from rcm_jax import sampling, sharding
from rcm_jax.methods import Applies, Recipe
from rcm_jax.models.blocks import WHOLE
from rcm_jax.models.cosmos import CosmosConfig
from rcm_jax.models.presets import create_network
from rcm_jax.models.wan import WanConfig
from rcm_jax.state import create_state
from rcm_jax.steps import critic_step, student_step
from rcm_jax.trigflow import rf_velocity

LAYERS = 3
CONFIG = WanConfig(
    dim=48, ffn_dim=96, heads=4, layers=LAYERS, in_channels=2, out_channels=2, text_dim=16, text_length=5
)
LATENT, TEXT = (5, 4, 6, 2), (5, 16)  # 30 tokens, which 4 and 8 do not divide
BATCH = 8
TIMES = [0.99, 0.8, 0.0]  # RF times of a sampler
OPTIMIZER = optax.sgd(0.1)  # large, so that changes stand out of the rounding of what is changed
NEGATIVE, KEY, RATIO = jnp.zeros(TEXT), jax.random.key(5), jnp.float32(0.7)
FAST = {"xla_backend_optimization_level": 0}  # these programs run for milliseconds and compile for seconds

MESHES = {  # sizes of the mesh, ulysses
    "data and fsdp": ({"data": 4, "fsdp": 2}, 0),
    "fsdp and tensor": ({"data": 1, "fsdp": 2, "tensor": 2}, 0),
    "ulysses": ({"data": 1, "context": 2}, 2),
    "ring": ({"data": 2, "context": 4}, 1),
    "both and tensor": ({"data": 1, "context": 4, "tensor": 2}, 2),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def devices(name):
    return jax.devices()[: int(np.prod(list(MESHES[name][0].values())))]


def build(mesh=None, ulysses=0, **settings):
    ops = WHOLE if mesh is None else sharding.block_ops(mesh, CONFIG.heads, ulysses, dtype=jnp.float32)
    return create_network(CONFIG, ops=ops, **settings)


@pytest.fixture(scope="module")
def start():
    """A state whose three networks differ."""
    init = jax.jit(build().init, compiler_options=FAST)
    student, teacher, fake = (init(jax.random.key(seed)) for seed in range(3))
    state = create_state(student, teacher, OPTIMIZER, OPTIMIZER)
    return jax.device_get(state.replace(fake=fake))


BATCHES = {"latent": normal(0, BATCH, *LATENT), "text": normal(1, BATCH, *TEXT)}


def update(network, losses, state, batch, key, ratio):
    """Of the student; where a loss needs the critic, of that too."""
    applies = Applies(*3 * [network.apply])
    settings = dict(apply=applies, loss_names=losses, optimizer=OPTIMIZER, recipe=Recipe(scm_weight=5.0))
    state, metrics = student_step(state, batch, key, ratio, negative_text=NEGATIVE, **settings)
    if "dmd" not in losses:
        return state, metrics
    state, more = critic_step(state, batch, key, **settings)
    return state, metrics | more


@pytest.fixture(scope="module")
def alone(start):
    """The update by some losses on one device."""

    @functools.cache
    def run(losses):
        step = jax.jit(functools.partial(update, build(), losses), compiler_options=FAST)
        return jax.device_get(step(start, BATCHES, KEY, RATIO))

    return run


SCM, DMD = frozenset({"scm"}), frozenset({"dmd"})
CASES = [*((name, SCM) for name in MESHES), ("ulysses", DMD)]


@pytest.mark.parametrize(("name", "losses"), CASES, ids=lambda value: "".join(value))
def test_an_update_does_not_depend_on_the_mesh(name, losses, start, alone):
    sizes, ulysses = MESHES[name]
    mesh = sharding.make_mesh(**sizes, devices=devices(name))
    place = sharding.tree_shardings(start, mesh)
    state, batch = jax.device_put((start, BATCHES), (place, sharding.batch_sharding(mesh)))
    step = functools.partial(update, build(mesh, ulysses), losses)
    step = jax.jit(step, out_shardings=(place, None), compiler_options=FAST)
    (found, found_metrics), (expected, metrics) = jax.device_get(step(state, batch, KEY, RATIO)), alone(losses)
    for metric, value in metrics.items():
        np.testing.assert_allclose(found_metrics[metric], value, rtol=1e-4, err_msg=metric)
    for network in ("student", "ema", "fake"):
        changes = (jax.tree.map(np.subtract, getattr(s, network), getattr(start, network)) for s in (found, expected))
        assert_close(*changes, 1e-4)


def assert_close(ours, theirs, tolerance):
    """Relative to the norm of the leaf, or to a thousandth of the whole for leaves that are smaller."""
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    whole = np.sqrt(sum(np.linalg.norm(leaf) ** 2 for leaf in theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-3 * whole)


@pytest.mark.parametrize("name", ["data and fsdp", "ring", "both and tensor"])
def test_samples_do_not_depend_on_the_mesh(name, start):
    """Nor on whether their number divides over it."""
    sizes, ulysses = MESHES[name]
    mesh, count = sharding.make_mesh(**sizes), 3

    def sample(network, params):
        velocity = rf_velocity(lambda x, time: network.apply(params, x, time, BATCHES["text"][:count]))
        return sampling.few_step(velocity, jnp.arange(count), LATENT, TIMES, kind="sde")

    alone, spread = build(), build(mesh, ulysses)
    expected = jax.jit(functools.partial(sample, alone), compiler_options=FAST)(start.ema)
    found = jax.jit(functools.partial(sample, spread), compiler_options=FAST)(sharding.place_params(start.ema, mesh))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


COSMOS = CosmosConfig(
    dim=48, heads=4, layers=2, rope_scale=(1.0, 3.0, 3.0), in_channels=3, out_channels=2, text_dim=16, lora_dim=8
)


@pytest.mark.parametrize(
    ("tokens", "context", "part"),
    [(32760, 2, 16384), (32760, 8, 4096), (32, 4, 8), (30, 2, 16), (30, 8, 4), (9, 4, 3), (1, 4, 1)],
)
def test_a_device_has_a_multiple_of_eight_tokens_if_that_leaves_some_to_the_last(tokens, context, part):
    assert sharding.part_length(tokens, context, ulysses=context) == part
    in_ring = part if tokens % context else tokens // context  # where equal parts stay equal
    assert sharding.part_length(tokens, context, ulysses=1) == in_ring


@pytest.mark.parametrize("name", ["ulysses", "ring", "both and tensor"])
def test_tokens_are_filled_up_once_for_all_blocks(name):
    sizes, ulysses = MESHES[name]
    network = build(sharding.make_mesh(**sizes, devices=devices(name)), ulysses)
    arguments = network.abstract_params(), BATCHES["latent"], jnp.zeros(BATCH), BATCHES["text"]

    def count(jaxpr, in_blocks=False):
        """Operations that put zeros behind something, outside and inside of loops."""
        found = np.array([0, 0])
        for eqn in jaxpr.eqns:
            found[int(in_blocks)] += eqn.primitive.name == "pad"
            for inner in jax.tree.leaves(list(eqn.params.values())):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += count(inner, in_blocks or eqn.primitive.name == "scan")
        return found

    assert count(jax.make_jaxpr(network.apply)(*arguments).jaxpr).tolist() == [1, 0]


def test_what_is_filled_up_is_split_by_samples_alone():
    """On 512 GPUs XLA split its channels instead, and copied whole batches to every device: 62 GiB for 17."""
    mesh = sharding.make_mesh(**MESHES["ulysses"][0], devices=devices("ulysses"))
    fill = sharding.block_ops(mesh, CONFIG.heads, dtype=jnp.float32).fill
    first, *_ = jax.make_jaxpr(fill)(jnp.zeros((4, 18, CONFIG.dim))).jaxpr.eqns
    assert first.primitive.name == "sharding_constraint"
    assert first.params["sharding"].spec == jax.sharding.PartitionSpec(sharding.BATCH, None, None)


@pytest.mark.parametrize(("config", "times"), [(CONFIG, 5), (COSMOS, 30)], ids=["Wan, by frame", "Cosmos, by token"])
def test_every_token_keeps_its_own_time_and_place(config, times):
    """On tokens that do not divide over the devices."""
    sizes, ulysses = MESHES["both and tensor"]
    mesh, time = sharding.make_mesh(**sizes), 500 + 200 * normal(2, BATCH, times)
    alone, spread = (
        create_network(config),
        create_network(config, ops=sharding.block_ops(mesh, config.heads, ulysses, dtype=jnp.float32)),
    )
    noisy = (normal(seed, *leaf.shape) / 8 for seed, leaf in enumerate(jax.tree.leaves(alone.abstract_params())))
    params = jax.tree.structure(alone.abstract_params()).unflatten(noisy)
    expected = jax.jit(alone.apply, compiler_options=FAST)(params, BATCHES["latent"], time, BATCHES["text"])
    params = sharding.place_params(params, mesh)
    found = jax.jit(spread.apply, compiler_options=FAST)(params, BATCHES["latent"], time, BATCHES["text"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Program:
    """A compiled program, as one device runs it: `loops` are the lines of its loops over blocks, in order."""

    def __init__(self, text):
        self.text = text
        found = re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
        self.computations = {name: body.splitlines() for name, body in found}
        loops = (self.computations[name] for name in re.findall(r" while\(.* body=%([\w.\-]+)", text))
        self.loops = [lines for lines in loops if any(" custom-call(" in line for line in lines)]

    def count_fused(self, lines, operation):
        """Asynchronous fusions among the lines that hold an operation."""
        called = (re.search(r"calls=%(async_collective_fusion[\w.\-]*)", line) for line in lines)
        return sum(f" {operation}(" in "".join(self.computations[name[1]]) for name in called if name)


def count_between(lines, operation):
    """Of each start of an operation among the lines, how many kernels run before it is done."""
    kernels = [number for number, line in enumerate(lines) if 'custom_call_target="tpu_custom_call"' in line]
    starts = ((number, re.match(rf"\s*(%\S+) = .* {operation}-start\(", line)) for number, line in enumerate(lines))
    spans = [
        (number, next(at for at, line in enumerate(lines) if f" {operation}-done({start[1]})" in line))
        for number, start in starts
        if start
    ]
    return [sum(first < kernel < last for kernel in kernels) for first, last in spans]


def test_weights_of_blocks_are_cast_before_they_travel():
    """Where XLA is told of a block's matrices: TPUs would see to it by themselves, other devices need not."""
    mesh = sharding.make_mesh(data=1, fsdp=8)
    config = dataclasses.replace(CONFIG, dim=512, ffn_dim=1024, heads=4)
    ops = sharding.block_ops(mesh, config.heads, dtype=jnp.bfloat16)
    network = create_network(config, dtype=jnp.bfloat16, ops=ops)
    arrays = (jax.ShapeDtypeStruct((8, *shape), jnp.float32) for shape in ((2, 4, 4, 2), (), TEXT))
    program = jax.jit(network.apply).lower(network.abstract_params(), *arrays).as_text()
    found = re.findall(r"sharding_constraint .* tensor<(?:512|1024)x(?:512|1024)x(\w+)>", program)
    assert len(found) >= 20  # ten matrices, each where it is stored and where it is gathered
    assert set(found) == {"bf16"}


@functools.cache
def program():
    """Value, tangent and gradient, by weights of 512 x 512, on 8 TPUs: FSDP, and Ulysses inside a ring."""
    chips = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    mesh = sharding.make_mesh(data=1, fsdp=2, context=4, devices=chips)
    config = dataclasses.replace(CONFIG, dim=512, ffn_dim=1024, heads=4, layers=LAYERS)
    ops = sharding.block_ops(mesh, config.heads, ulysses=2, dtype=jnp.bfloat16)
    network = create_network(config, dtype=jnp.bfloat16, ops=ops)

    def loss(params, x, time, text):
        apply = functools.partial(network.apply, params, mode="forward")
        value, tangent = jax.jvp(lambda x, time: apply(x, time, text), (x, time), (x, time))
        return ((value - jax.lax.stop_gradient(tangent)) ** 2).sum()

    params = network.abstract_params()
    place = sharding.tree_shardings(params, mesh)
    arrays = (jax.ShapeDtypeStruct((2, *shape), jnp.float32) for shape in ((2, 32, 48, 2), (), TEXT))
    gradient = jax.jit(
        jax.grad(loss),
        in_shardings=(place, *3 * [sharding.batch_sharding(mesh)]),
        out_shardings=place,
        compiler_options=sharding.compiler_options(mesh),
    )
    with mock.patch.object(sys.modules["pallas_kernels.attention"], "_architecture", return_value="tpu"):
        return Program(gradient.lower(params, *arrays).compile().as_text())


@pytest.mark.usefixtures("no_cache")
class TestProgramForTPUs:
    def test_no_attention_with_tangent_runs_in_the_backward_pass(self):
        """Twice a block over the keys of the ring, once over the caption's."""
        kernels = [re.findall(r"custom-call\(.*\W(attention\w*)/pallas_call", "\n".join(x)) for x in program().loops]
        assert kernels == [3 * ["attention_with_tangent"], 3 * ["attention_gradient"]]
        assert program().text.count('custom_call_target="tpu_custom_call"') == 6

    def test_weights_are_gathered_block_by_block_while_others_compute(self):
        """Not all blocks' at once, nor as sums; of a block's ten matrices the first have nothing to hide behind."""
        for lines in program().loops:
            assert sum(" all-gather(" in line for line in lines) <= 3
            assert program().count_fused(lines, "all-gather") >= 7
        forward, _ = program().loops
        assert not [line for line in forward if " all-reduce(" in line]
        assert not re.findall(rf"= \w+\[{LAYERS},\d+,\d+\]\S* all-gather\(", program().text)

    def test_keys_of_a_ring_move_while_kernels_run(self):
        """Forwards keys and values, each with its tangent; backwards at least keys and values, of the sums some."""
        forward, backward = (count_between(lines, "collective-permute") for lines in program().loops)
        assert min(forward) == 1
        assert len(forward) == 4
        assert sum(kernels > 0 for kernels in backward) >= 2

    def test_tokens_stay_where_they_are_until_they_are_pixels(self):
        """Of 768."""
        assert not re.findall(r"\[\d+,768,512\]\S* all-gather\(", program().text)

    def test_every_array_of_heads_is_exchanged_once(self):
        """q, k, v, their tangents, out, its tangent and lse; q, k, v, out, lse, dout and three gradients."""
        assert [sum(" all-to-all(" in line for line in lines) for lines in program().loops] == [9, 9]


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("platform", sharding.OVERLAP)
def test_options_are_known_to_the_compiler(platform):
    """The CPU's knows those of GPUs."""
    x = jax.ShapeDtypeStruct((), jnp.float32)
    jax.jit(jnp.sin, compiler_options=sharding.OVERLAP[platform]).lower(x).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        jax.jit(jnp.sin, compiler_options={"xla_no_such_option": True}).lower(x).compile()
