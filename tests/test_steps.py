"""One update: the same on any mesh and with any accumulation, deaf to broken samples, and confined to its own networks.

The optimiser is plain gradient descent with momentum, so that parameters show the gradient itself; Adam's first step is
its sign, which round-off can turn.
"""

import dataclasses
import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from rcm_jax import config, sharding
from rcm_jax.methods import Applies, Recipe, guided
from rcm_jax.state import create_state
from rcm_jax.steps import critic_step, ema_decay, student_step

LATENT, TEXT = (2, 4, 4, 2), (5, 10)
BATCH = 8
# All at once, as one compilation; no recipe does. sct and mean_flow are scm and mean_flow_scratch at another velocity.
LOSSES = frozenset(config.LOSSES) - {"sct", "mean_flow"}
CONSISTENCY = LOSSES - {"flow_matching", "dmd", "gan"}
GAN = frozenset({"gan"})
OPTIMIZER = optax.sgd(1e-3, momentum=0.9)
NEGATIVE = jnp.zeros(TEXT)
KEY, RATIO = jax.random.key(5), jnp.float32(0.7)
FAST = {"xla_backend_optimization_level": 0}  # these programs run for milliseconds and compile for seconds


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


STUDENT, FAKE = {"span_embedding.up": (2, 32)}, {"discriminator.mlp.up": (32, 1)}  # what they add to a teacher


def small_init(key, extra=MappingProxyType({})):
    """Named as a Wan network's parameters, so that sharding.RULES know them."""
    shapes = {
        "patch_embedding": (2, 32),
        "text_embedding.up": (10, 32),
        "time_projection": (2, 32),
        "head.head": (32, 2),
        **extra,
    }
    keys = jax.random.split(key, len(shapes))
    kernels = {f"{name}.kernel": jax.random.normal(k, shapes[name]) for k, name in zip(keys, shapes, strict=True)}
    return traverse_util.unflatten_dict(kernels | {"patch_embedding.bias": jnp.full(32, 0.1, jnp.float32)}, sep=".")


def small_apply(params, x, time_B, text_BSD, *, span_B=None, mode="reverse", discriminate=False):
    """A network that compiles in no time: two layers and a norm, over every token alone."""
    del mode

    def embed(time_B, kernel):
        return jnp.stack([jnp.sin(time_B / 200), jnp.cos(time_B / 200)], axis=-1) @ kernel

    time = embed(time_B, params["time_projection"]["kernel"])
    if span_B is not None:
        time = time + embed(span_B, params["span_embedding"]["up"]["kernel"])
    condition = time + (text_BSD @ params["text_embedding"]["up"]["kernel"]).mean(axis=1)
    hidden = x @ params["patch_embedding"]["kernel"] + params["patch_embedding"]["bias"].reshape(1, 1, 1, 1, -1)
    hidden = jnp.tanh(hidden + condition[:, None, None, None])
    hidden = hidden / jnp.sqrt(jnp.square(hidden).mean(axis=-1, keepdims=True) + 1e-6)
    out = hidden @ params["head"]["head"]["kernel"] / 6 + condition.mean(axis=1).reshape(-1, 1, 1, 1, 1)
    if not discriminate:
        return out
    return out, (hidden @ params["discriminator"]["mlp"]["up"]["kernel"]).mean(axis=(1, 2, 3, 4))


def same(apply):
    """One network's apply for student, teacher and fake score."""
    return Applies(apply, apply, apply)


@functools.cache
def compiled(accumulate=1, mesh=None):
    """(student step, critic step), jitted; on a mesh, with results that lie as a state does."""
    recipe = Recipe(accumulate=accumulate, scm_weight=5.0)
    student = functools.partial(student_step, loss_names=LOSSES, negative_text=NEGATIVE)
    critic = functools.partial(critic_step, loss_names=GAN)
    steps = (
        functools.partial(f, apply=same(small_apply), optimizer=OPTIMIZER, recipe=recipe) for f in (student, critic)
    )
    placed = {}
    if mesh is not None:
        state = jax.eval_shape(first_small_state)
        placed = {"out_shardings": (sharding.tree_shardings(state, mesh), None)}
    return tuple(jax.jit(step, compiler_options=FAST, **placed) for step in steps)


def first_state(student, teacher, fake):
    state = create_state(student, teacher, OPTIMIZER, OPTIMIZER)
    return state.replace(fake=fake, fake_opt=OPTIMIZER.init(fake))


def first_small_state():
    """A state in which student, teacher and fake score differ."""
    return first_state(*(small_init(jax.random.key(seed), extra) for seed, extra in enumerate((STUDENT, {}, FAKE))))


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def start():
    return first_small_state()


@pytest.fixture(scope="module")
def batch():
    return {"latent": normal(0, BATCH, *LATENT), "text": normal(1, BATCH, *TEXT)}


def update_each(state, batch, *, accumulate=1):
    """The gradients, and the metrics, of a student and of a critic update, both from `state`."""
    student, critic = compiled(accumulate)
    (after_student, student_metrics), (after_critic, critic_metrics) = (
        student(state, batch, KEY, RATIO),
        critic(state, batch, KEY),
    )
    # The momentum of a first update is its gradient.
    gradient = {"student": after_student.student_opt[0].trace, "fake": after_critic.fake_opt[0].trace}
    return jax.device_get((gradient, (student_metrics, critic_metrics)))


def update_in_turn(state, batch, *, rounds=1, mesh=None):
    """`rounds` student and critic updates, one after the other; the state and each update's metrics."""
    student, critic = compiled(mesh=mesh)
    history = []
    for _ in range(rounds):
        state, metrics = student(state, batch, jax.random.fold_in(KEY, state.iteration), RATIO)
        history.append(metrics)
        state, metrics = critic(state, batch, jax.random.fold_in(KEY, state.iteration))
        history.append(metrics)
    return jax.device_get((state, history))


@pytest.fixture(scope="module")
def once(start, batch):
    with jax.default_matmul_precision("highest"):
        return update_each(start, batch)


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


def assert_close(ours, theirs, tolerance):
    """Relative to the norm of the whole tree."""
    ours, theirs = (jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def test_an_update_reports_finite_metrics_of_every_loss(once):
    _, (student, critic) = once
    parts = {name: float(student[f"loss_{name}"]) for name in LOSSES}
    expected = parts["flow_matching"] + 5.0 * sum(parts[name] for name in CONSISTENCY)
    expected += parts["dmd"] + Recipe().gan_weight * parts["gan"]
    assert float(student["loss"]) == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in parts.values())
    assert 0 < float(critic["loss_critic"]) < np.inf
    assert 0 < float(critic["loss_gan_critic"]) < np.inf
    assert 0 < float(student["grad_norm"]) < np.inf
    assert 0 < float(critic["grad_norm_critic"]) < np.inf
    assert student["skipped"] == critic["skipped"] == 0


def test_a_student_update_leaves_the_teacher_and_the_fake_score_as_they_are(start, batch):
    after, _ = compiled()[0](start, batch, KEY, RATIO)
    assert_same((after.teacher, after.fake, after.fake_opt), (start.teacher, start.fake, start.fake_opt))
    for name in ("student", "ema", "student_opt"):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), getattr(after, name), getattr(start, name))
        assert all(jax.tree.leaves(moved)), name
    assert (after.iteration, after.student_updates, after.critic_updates) == (1, 1, 0)


def test_a_critic_update_changes_the_fake_score_alone(start, batch):
    after, _ = compiled()[1](start, batch, KEY)
    unchanged = {"fake": start.fake, "fake_opt": start.fake_opt, "iteration": 0, "critic_updates": 0}
    assert_same(dataclasses.replace(after, **unchanged), dataclasses.replace(start, **unchanged))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.fake, start.fake)
    assert all(jax.tree.leaves(moved))
    assert (after.iteration, after.critic_updates) == (1, 1)


@pytest.mark.parametrize("accumulate", [4])
def test_accumulated_gradients_are_those_of_the_whole_batch(accumulate, start, batch, once):
    found, found_metrics = update_each(start, batch, accumulate=accumulate)
    gradient, metrics = once
    assert_close(found, gradient, 1e-5)
    for ours, theirs in zip(found_metrics, metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)


def test_accumulation_keeps_the_noises_of_one_micro_batch_in_memory():
    """Those of a critic's sample, four of a simulation and two more, are six times a latent."""
    latent = (4, 64, 64, 2)

    def temporaries(batch, accumulate):
        shapes = {"latent": (batch, *latent), "text": (batch, *TEXT)}
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        step = compiled(accumulate)[1].lower(jax.eval_shape(first_small_state), batch, KEY)
        return step.compile().memory_analysis().temp_size_in_bytes

    more = temporaries(16, 16) - temporaries(1, 1)
    assert more < 3 * 16 * np.dtype(np.float32).itemsize * np.prod(latent)  # copies of the batch, cut into parts


def spread(tree, mesh):
    return jax.device_put(tree, sharding.tree_shardings(tree, mesh))


def change(after, before):
    """Of the networks' parameters."""
    names = ("student", "ema", "fake")
    return {
        name: jax.tree.map(np.subtract, getattr(after, name), jax.device_get(getattr(before, name))) for name in names
    }


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2)])
def test_two_rounds_of_updates_do_not_depend_on_the_mesh(data, fsdp, start, batch):
    alone, alone_metrics = update_in_turn(start, batch, rounds=2)
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    found, found_metrics = update_in_turn(spread(start, mesh), batch, rounds=2, mesh=mesh)
    for ours, theirs in zip(found_metrics, alone_metrics, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, err_msg=name)
    assert_close(change(found, start), change(alone, start), 2e-5)


def spoil(batch, samples, name, value):
    """The batch with one number of each of `samples` replaced."""
    return batch | {name: batch[name].at[jnp.array(samples), 1, 2].set(value)}


@pytest.mark.parametrize(("name", "value"), [("latent", np.nan), ("latent", np.inf), ("text", -np.inf)])
def test_a_broken_sample_only_loses_its_own_share_of_the_gradient(name, value, start, batch, once):
    """The gradient without sample 2 and that of sample 2 alone are finite and add up to the whole."""
    rest = [sample for sample in range(BATCH) if sample != 2]
    without, without_metrics = update_each(start, spoil(batch, [2], name, value))
    alone, alone_metrics = update_each(start, spoil(batch, rest, name, value))
    gradient, metrics = once
    assert_close(jax.tree.map(np.add, without, alone), gradient, 1e-5)
    for whole, *parts in zip(metrics, without_metrics, alone_metrics, strict=True):
        for metric in whole:
            if metric.startswith("loss"):
                assert sum(float(part[metric]) for part in parts) == pytest.approx(float(whole[metric]), rel=1e-5)
        assert all(part["skipped"] == 0 for part in parts)


def test_what_a_broken_sample_holds_does_not_matter(start, batch):
    broken = [spoil(batch, [2], "latent", np.nan), spoil(spoil(batch, [2], "latent", np.inf), [2], "text", np.nan)]
    first, second = (update_each(start, each)[0] for each in broken)
    assert_same(first, second)


def test_a_batch_of_broken_samples_has_no_gradient_and_is_no_skipped_update(start, batch):
    gradient, metrics = update_each(start, spoil(batch, range(BATCH), "latent", np.nan))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    assert [each["skipped"] for each in metrics] == [0, 0]


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(start, batch):
    """A finite caption whose square is not. After an ordinary round, so that optimisers hold something to lose."""
    before, _ = update_in_turn(start, batch)
    huge = batch | {"text": batch["text"].at[2].set(1e30)}
    after, (student, critic) = update_in_turn(before, huge)
    assert not np.isfinite(student["grad_norm"])
    assert not np.isfinite(critic["grad_norm_critic"])
    for name in ("student", "student_opt", "fake", "fake_opt", "teacher"):
        assert_same(getattr(after, name), getattr(before, name))
    assert (after.skipped, after.iteration, after.student_updates, after.critic_updates) == (2, 4, 2, 2)
    assert (student["skipped"], critic["skipped"]) == (1, 2)
    recovered, _ = update_in_turn(after, batch)
    assert recovered.skipped == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(recovered))


def test_the_ema_copies_the_first_update_and_then_lags(start, batch):
    first, _ = compiled()[0](start, batch, KEY, RATIO)
    assert_close(first.ema, first.student, 1e-6)
    second, _ = compiled()[0](first, batch, KEY, RATIO)
    beta = float(ema_decay(jnp.int32(1), Recipe().ema_gamma))
    assert beta == pytest.approx(0.5 ** (Recipe().ema_gamma + 1))
    expected = jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, first.ema, second.student)
    change = functools.partial(jax.tree.map, lambda a, b: a - b)
    assert_close(change(second.ema, first.ema), change(expected, first.ema), 1e-3)
    lag = optax.tree.norm(change(second.ema, second.student)) / optax.tree.norm(change(second.student, first.ema))
    assert float(lag) == pytest.approx(beta, rel=0.1)


@pytest.mark.parametrize("updates", ["student_updates", "critic_updates"])
def test_the_simulation_grows_with_its_own_networks_updates(updates, start, batch):
    """One student pass at updates 0, 4, 8..., four at 3, 7...; beside them, those that the loss makes."""
    passes = []

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: passes.append(1))
        return small_apply(*args, **kwargs)

    settings = {"apply": same(counted), "optimizer": OPTIMIZER, "recipe": Recipe()}
    if updates == "student_updates":
        step = functools.partial(student_step, loss_names=frozenset({"dmd"}), negative_text=NEGATIVE, **settings)
        arguments, others = (RATIO,), 2  # guided teacher, fake score
    else:
        step, arguments, others = functools.partial(critic_step, **settings), (), 1
    step, counts = jax.jit(step, compiler_options=FAST), []
    for count in range(6):
        passes.clear()
        step(start.replace(**{updates: jnp.int32(count)}), batch, KEY, *arguments)
        jax.effects_barrier()
        counts.append(len(passes) - others)
    assert counts == [1, 2, 3, 4, 1, 2]


@pytest.mark.parametrize("one_for_all", [True, False])
def test_guidance_is_the_formula_of_two_forward_passes(one_for_all, start, batch):
    x, text, time_B = batch["latent"], batch["text"], jnp.linspace(0.0, 1000.0, BATCH)
    negative = normal(9, *text.shape[1:]) if one_for_all else normal(9, *text.shape)
    apply = jax.jit(small_apply)
    conditional = apply(start.student, x, time_B, text)
    unconditional = apply(start.student, x, time_B, jnp.broadcast_to(negative, text.shape))
    found = guided(apply, start.student, text, negative, 5.0)(x, time_B)
    np.testing.assert_allclose(found, unconditional + 5.0 * (conditional - unconditional), rtol=1e-5, atol=1e-5)


def test_guidance_of_one_runs_no_unconditional_half(start, batch):
    rows = []

    def counting(params, x, time_B, text_BSD):
        rows.append(len(x))
        return small_apply(params, x, time_B, text_BSD)

    x, text, time_B = batch["latent"], batch["text"], jnp.linspace(0.0, 1000.0, BATCH)
    np.testing.assert_array_equal(
        guided(counting, start.student, text, text, 1.0)(x, time_B), small_apply(start.student, x, time_B, text)
    )
    guided(counting, start.student, text, text, 2.0)(x, time_B)
    assert rows == [BATCH, 2 * BATCH]
