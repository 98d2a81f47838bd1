"""Updates of a small Wan network, and its samples, are the same on any mesh, and compile to what TPUs should run.

The optimiser is plain gradient descent, so that parameters show the gradient itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rcm_jax import sampling, sharding
from rcm_jax.models.blocks import WHOLE
from rcm_jax.models.presets import create_network
from rcm_jax.models.wan import WanConfig
from rcm_jax.state import create_state
from rcm_jax.steps import Recipe, critic_step, student_step
from rcm_jax.trigflow import rf_velocity

CONFIG = WanConfig(dim=48, ffn_dim=96, heads=4, layers=2, in_channels=2, out_channels=2, text_dim=10, text_length=5)
LATENT, TEXT = (5, 4, 6, 2), (5, 10)  # 30 tokens, which 4 and 8 do not divide
BATCH = 8
OPTIMIZER = optax.sgd(1e-3)
NEGATIVE, KEY, RATIO = jnp.zeros(TEXT), jax.random.key(5), jnp.float32(0.7)
FAST = {"xla_backend_optimization_level": 0}  # these programs run for milliseconds and compile for seconds

MESHES = {  # sizes of the mesh, ulysses
    "data": ({"data": 8}, 0),
    "fsdp": ({"data": 1, "fsdp": 8}, 0),
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
    ops = WHOLE if mesh is None else sharding.block_ops(mesh, CONFIG.heads, ulysses)
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
    settings = dict(apply=network.apply, optimizer=OPTIMIZER, recipe=Recipe(scm_weight=5.0))
    state, metrics = student_step(state, batch, key, ratio, loss_names=losses, negative_text=NEGATIVE, **settings)
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
CASES = [*((name, SCM) for name in MESHES), ("both and tensor", DMD)]


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
