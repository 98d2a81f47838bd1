"""One update: the same on any mesh and with any accumulation, deaf to broken samples, and confined to its own networks.

The optimiser is plain gradient descent with momentum, so that parameters show the gradient itself; Adam's first step is
its sign, which round-off can turn.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rcm_jax import sharding
from rcm_jax.models.functional import functional
from rcm_jax.models.wan import Wan, WanConfig
from rcm_jax.state import create_state
from rcm_jax.steps import Recipe, critic_step, ema_decay, guided, student_step

CONFIG = WanConfig(dim=48, ffn_dim=96, heads=2, layers=2, in_channels=2, out_channels=2, text_dim=10, text_length=5)
LATENT = (2, 4, 4, 2)  # 8 tokens
BATCH = 8
# All at once, as one compilation; no recipe does.
LOSSES = frozenset({"flow_matching", "scm", "dcm", "dmd"})
NETWORK = functional(lambda rngs: Wan(CONFIG, rngs=rngs))
OPTIMIZER = optax.sgd(1e-4, momentum=0.9)
NEGATIVE = jnp.zeros((CONFIG.text_length, CONFIG.text_dim))
KEY = jax.random.key(5)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.cache
def compiled(accumulate=1):
    """(student step, critic step), jitted."""
    settings = {"apply": NETWORK.apply, "optimizer": OPTIMIZER, "recipe": Recipe(accumulate=accumulate, scm_weight=5.0)}
    student = functools.partial(student_step, loss_names=LOSSES, negative_text=NEGATIVE, **settings)
    return jax.jit(student), jax.jit(functools.partial(critic_step, **settings))


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def start():
    """A state in which student, teacher and fake score differ."""
    student, teacher, fake = (NETWORK.init(jax.random.key(seed)) for seed in range(3))
    state = create_state(student, teacher, OPTIMIZER, OPTIMIZER)
    return state.replace(fake=fake, fake_opt=OPTIMIZER.init(fake))


@pytest.fixture(scope="module")
def batch():
    return {"latent": normal(0, BATCH, *LATENT), "text": normal(1, BATCH, CONFIG.text_length, CONFIG.text_dim)}


RATIO = jnp.float32(0.7)


def update_both(state, batch, *, accumulate=1, rounds=1):
    """`rounds` student and critic updates in turn; the state and each update's metrics."""
    student, critic = compiled(accumulate)
    history = []
    for _ in range(rounds):
        state, metrics = student(state, batch, jax.random.fold_in(KEY, state.iteration), RATIO)
        history.append(metrics)
        state, metrics = critic(state, batch, jax.random.fold_in(KEY, state.iteration))
        history.append(metrics)
    return jax.device_get((state, history))


def gradients(before, after):
    """What the update had as gradient: the momentum after one step."""
    del before
    return jax.device_get((after.student_opt[0].trace, after.fake_opt[0].trace))


@pytest.fixture(scope="module")
def once(start, batch):
    with jax.default_matmul_precision("highest"):
        return update_both(start, batch)


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
    expected = parts["flow_matching"] + 5.0 * (parts["scm"] + parts["dcm"]) + parts["dmd"]
    assert float(student["loss"]) == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in parts.values())
    assert 0 < float(critic["loss_critic"]) < np.inf
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
    whole, whole_metrics = once
    parts, parts_metrics = update_both(start, batch, accumulate=accumulate)
    assert_close(gradients(start, parts), gradients(start, whole), 1e-5)
    for ours, theirs in zip(parts_metrics, whole_metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2)])
def test_two_rounds_of_updates_do_not_depend_on_the_mesh(data, fsdp, start, batch):
    alone, alone_metrics = update_both(start, batch, rounds=2)
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    spread = jax.device_put(start, sharding.tree_shardings(start, mesh))
    spread, spread_metrics = update_both(spread, jax.device_put(batch, sharding.batch_sharding(mesh)), rounds=2)
    for ours, theirs in zip(spread_metrics, alone_metrics, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, err_msg=name)
    for name in ("student", "ema", "fake"):
        moved = functools.partial(jax.tree.map, lambda a, b: a - b)
        change = moved(getattr(alone, name), jax.device_get(getattr(start, name)))
        assert_close(moved(getattr(spread, name), jax.device_get(getattr(start, name))), change, 1e-4)


def spoil(batch, samples, name, value):
    """The batch with one number of each of `samples` replaced."""
    return batch | {name: batch[name].at[jnp.array(samples), 1, 2].set(value)}


@pytest.mark.parametrize(("name", "value"), [("latent", np.nan), ("latent", np.inf), ("text", -np.inf)])
def test_a_broken_sample_only_loses_its_own_share_of_the_gradient(name, value, start, batch, once):
    """The gradient without sample 2 and that of sample 2 alone are finite and add up to the whole."""
    rest = [sample for sample in range(BATCH) if sample != 2]
    without, without_metrics = update_both(start, spoil(batch, [2], name, value))
    alone, alone_metrics = update_both(start, spoil(batch, rest, name, value))
    total = jax.tree.map(np.add, gradients(start, without), gradients(start, alone))
    assert_close(total, gradients(start, once[0]), 1e-5)
    for whole, *parts in zip(once[1], without_metrics, alone_metrics, strict=True):
        for metric in whole:
            if metric.startswith("loss"):
                assert sum(float(part[metric]) for part in parts) == pytest.approx(float(whole[metric]), rel=1e-5)
            assert all(part["skipped"] == 0 for part in parts)


def test_what_a_broken_sample_holds_does_not_matter(start, batch):
    broken = [spoil(batch, [2], "latent", np.nan), spoil(spoil(batch, [2], "latent", np.inf), [2], "text", np.nan)]
    first, second = (update_both(start, each)[0] for each in broken)
    assert_same(first, second)


def test_a_batch_of_broken_samples_has_no_gradient_and_is_no_skipped_update(start, batch):
    after, _ = update_both(start, spoil(batch, range(BATCH), "latent", np.nan))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients(start, after)))
    assert after.skipped == 0


@pytest.fixture(scope="module")
def overflowing(batch):
    """Finite, but its squares are not: the gradient of every loss is NaN or infinite."""
    return batch | {"text": batch["text"].at[2].set(3e38)}


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(start, batch, once, overflowing):
    """After an ordinary round, so that optimisers and EMA hold something to lose."""
    before, _ = once
    after, (student, critic) = update_both(before, overflowing)
    assert not np.isfinite(student["grad_norm"])
    assert not np.isfinite(critic["grad_norm_critic"])
    for name in ("student", "student_opt", "fake", "fake_opt", "teacher"):
        assert_same(getattr(after, name), getattr(before, name))
    assert (after.skipped, after.iteration, after.student_updates, after.critic_updates) == (2, 4, 2, 2)
    assert (student["skipped"], critic["skipped"]) == (1, 2)
    again, _ = update_both(after, batch)
    assert again.skipped == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(again))


def test_the_ema_copies_the_first_update_and_then_lags(start, batch):
    first, _ = compiled()[0](start, batch, KEY, RATIO)
    assert_close(first.ema, first.student, 1e-6)
    second, _ = compiled()[0](first, batch, KEY, RATIO)
    beta = float(ema_decay(jnp.int32(1), Recipe().ema_gamma))
    assert beta == pytest.approx(0.5 ** (Recipe().ema_gamma + 1))
    expected = jax.tree.map(lambda old, new: beta * old + (1 - beta) * new, first.ema, second.student)
    change = functools.partial(jax.tree.map, lambda a, b: a - b)
    assert_close(change(second.ema, first.ema), change(expected, first.ema), 1e-3)
    lag = optax.global_norm(change(second.ema, second.student)) / optax.global_norm(change(second.student, first.ema))
    assert float(lag) == pytest.approx(beta, rel=0.1)


@pytest.mark.parametrize("counter", ["student_updates", "critic_updates"])
def test_the_simulation_grows_with_its_own_networks_updates(counter, start, batch):
    """One step at updates 0, 4, 8..., four at 3, 7...: seen in the loss, everything else being equal."""
    which = ("student_updates", "critic_updates").index(counter)
    metric, arguments = ("loss_dmd", "loss_critic")[which], ((RATIO,), ())[which]

    def loss(count):
        state = start.replace(**{counter: jnp.int32(count)})
        return float(compiled()[which](state, batch, KEY, *arguments)[1][metric])

    values = [loss(count) for count in range(5)]
    assert len(set(values[:4])) == 4
    assert values[4] == values[0]
    other = ("critic_updates", "student_updates")[which]
    state = start.replace(**{other: jnp.int32(1)})
    assert float(compiled()[which](state, batch, KEY, *arguments)[1][metric]) == values[0]


def tangled(params, x, time_B, text_BSD):
    """A cheap network whose rows depend on parameters, latent, time and caption."""
    shape = (-1, 1, 1, 1, 1)
    return jnp.sin(params * x + time_B.reshape(shape) / 1000) * (1 + text_BSD.mean((1, 2)).reshape(shape))


@pytest.mark.parametrize("one_for_all", [True, False])
def test_guidance_is_the_formula_of_two_forward_passes(one_for_all, batch):
    x, text, time_B = batch["latent"], batch["text"], jnp.linspace(0.0, 1000.0, BATCH)
    negative = normal(9, *text.shape[1:]) if one_for_all else normal(9, *text.shape)
    conditional = tangled(1.5, x, time_B, text)
    unconditional = tangled(1.5, x, time_B, jnp.broadcast_to(negative, text.shape))
    found = guided(tangled, 1.5, text, negative, 5.0)(x, time_B)
    np.testing.assert_allclose(found, unconditional + 5.0 * (conditional - unconditional), rtol=1e-5, atol=1e-5)


def test_guidance_of_one_runs_no_unconditional_half(batch):
    rows = []

    def counting(params, x, time_B, text_BSD):
        rows.append(len(x))
        return tangled(params, x, time_B, text_BSD)

    x, text, time_B = batch["latent"], batch["text"], jnp.linspace(0.0, 1000.0, BATCH)
    np.testing.assert_array_equal(guided(counting, 1.5, text, None, 1.0)(x, time_B), tangled(1.5, x, time_B, text))
    guided(counting, 1.5, text, text, 2.0)(x, time_B)
    assert rows == [BATCH, 2 * BATCH]
