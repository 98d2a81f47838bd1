"""What methods add to a network: MeanFlow's second time, the GAN's head, LoRA, and the range of times of an expert."""

import functools
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits_dmd2, digits_lora, digits_mean_flow
from rcm_jax import adapters, sharding
from rcm_jax.checkpoint import export_safetensors, load_safetensors
from rcm_jax.config import LOSSES, parse_stages, validate
from rcm_jax.convert import merging
from rcm_jax.convert.sources import open_source
from rcm_jax.convert.wan import wan_tensors
from rcm_jax.methods import Applies, Recipe, Setting, draw_student, mean_velocity, scm, simulate_student
from rcm_jax.models.wan import PRESETS, WanConfig
from rcm_jax.state import create_state, overlay
from rcm_jax.steps import METHODS, critic_step, student_step
from rcm_jax.train import (
    abstract_state,
    create_networks,
    create_optimizers,
    export,
    first_params,
    load_params,
)
from rcm_jax.trigflow import WHOLE_RANGE, mix, trig_from_rf

TINY = WanConfig(dim=48, ffn_dim=64, heads=2, layers=2, in_channels=2, out_channels=2, text_dim=10, time_dim=16)
LATENT, TEXT, BATCH = (2, 4, 4, 2), (5, 10), 2
TIME, SPAN = jnp.array([130.25, 971.5]), jnp.array([100.0, 640.5])
# These programs run for milliseconds and compile for seconds.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


MESH = sharding.make_mesh()
X, CAPTION = normal(0, BATCH, *LATENT), normal(1, BATCH, *TEXT)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def configure(recipe, **model):
    config = recipe.get_config()
    config.model.update({"preset": "tiny", **model})
    return config


def randomised(params, seed=7):
    """No parameter is zero."""
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten([0.3 * normal(seed + index, *leaf.shape) for index, leaf in enumerate(leaves)])


def test_a_teachers_velocity_is_the_mean_velocity_of_a_new_student():
    networks = create_networks(configure(digits_mean_flow))
    teacher = randomised(networks.teacher.abstract_params())
    student = first_params(networks.student, jax.random.key(0), teacher, lora_rank=0)
    expected = fast_jit(networks.teacher.apply)(teacher, X, TIME, CAPTION)
    mean = fast_jit(lambda params, span_B: networks.student.apply(params, X, TIME, CAPTION, span_B=span_B))
    np.testing.assert_array_equal(mean(student, SPAN), expected)
    trained = randomised(student)
    assert not np.allclose(mean(trained, SPAN), mean(trained, SPAN / 2))


def test_a_teachers_checkpoint_fits_a_mean_flow_network(tmp_path):
    networks = create_networks(configure(digits_mean_flow))
    teacher = randomised(networks.teacher.abstract_params())
    export_safetensors(tmp_path / "teacher.safetensors", wan_tensors(teacher, TINY), {})
    params = load_params(tmp_path / "teacher.safetensors", networks.student)
    assert not any(leaf.any() for leaf in jax.tree.leaves(params.pop("span_embedding")))
    jax.tree.map(np.testing.assert_array_equal, params, teacher)


def test_the_tangent_of_a_mean_velocity_is_its_derivative_along_all_three_inputs():
    """By a central difference over 0.1 network times, where float32 and the third derivative leave a percent."""
    network = create_networks(configure(digits_mean_flow)).student
    params, step = randomised(network.abstract_params()), 1e-4
    inputs, tangents = (X, TIME / 1000, SPAN / 1000), (normal(3, *X.shape), jnp.ones(BATCH), jnp.ones(BATCH))
    forward = mean_velocity(network.apply, params, CAPTION, mode="forward")
    _, found = fast_jit(lambda *at: jax.jvp(forward, at, tangents))(*inputs)
    at = lambda h: [a + h * t for a, t in zip(inputs, tangents, strict=True)]  # noqa: E731
    plain = fast_jit(mean_velocity(network.apply, params, CAPTION))
    difference = (np.float64(plain(*at(step))) - np.float64(plain(*at(-step)))) / (2 * step)
    assert np.linalg.norm(found - difference) < 2e-2 * np.linalg.norm(difference)


@pytest.mark.parametrize("tangent", ["semicontinuous", "discrete"])
def test_a_difference_gives_a_network_the_gradient_of_the_exact_tangent(tangent):
    """At a step of 1e-4, which turns the fastest sinusoid of the time embedding by up to 0.1 radian, and so errs."""
    networks = create_networks(configure(digits_dmd2))
    params = randomised(networks.teacher.abstract_params())
    state = create_state(params, jax.tree.map(lambda leaf: 0.9 * leaf, params), optax.identity(), None)
    batch = {"latent": X, "text": CAPTION}
    draws = {"noise": normal(2, *X.shape), "t": jnp.array([0.4, 1.2])}

    def gradient(tangent):
        recipe = Recipe(tangent=tangent, tangent_step=1e-4)

        def loss(student):
            ratio, negative = jnp.float32(1.0), jnp.zeros(TEXT)
            at = Setting(student, state, batch, draws, ratio, frozenset(), networks.applies, recipe, negative)
            return scm(at)["scm"].sum()

        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(fast_jit(jax.grad(loss))(params))])

    exact, found = gradient("exact"), gradient(tangent)
    assert np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)


def test_the_discriminator_reads_the_middle_of_the_pass_that_gives_the_velocity():
    networks = create_networks(configure(digits_dmd2))
    params = randomised(networks.fake.abstract_params())
    velocity, logit_B = fast_jit(lambda p: networks.fake.apply(p, X, TIME, CAPTION, discriminate=True))(params)
    expected = fast_jit(networks.fake.apply)(params, X, TIME, CAPTION)
    np.testing.assert_allclose(velocity, expected, rtol=1e-5, atol=1e-5)
    assert logit_B.shape == (BATCH,)

    def logit(params, x):
        return networks.fake.apply(params, x, TIME, CAPTION, discriminate=True)[1].sum()

    by_params, by_x = fast_jit(jax.grad(logit, argnums=(0, 1)))(params, X)
    first, second = np.asarray(by_params["blocks"]["ffn"]["up"]["kernel"])
    assert np.abs(first).max() > 0
    assert np.abs(second).max() == 0
    assert np.abs(by_x).max() > 0


def test_a_lora_adds_its_product_to_every_matrix_of_the_blocks():
    networks = create_networks(configure(digits_lora))
    teacher = randomised(networks.teacher.abstract_params())
    own = first_params(networks.student, jax.random.key(0), teacher, lora_rank=8)
    student, plain = fast_jit(networks.student.apply), fast_jit(networks.teacher.apply)
    before = student(overlay(teacher, own), X, TIME, CAPTION)
    np.testing.assert_array_equal(before, plain(teacher, X, TIME, CAPTION))
    params = overlay(teacher, randomised(own))
    merged = adapters.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(teacher)
    found = student(params, X, TIME, CAPTION)
    # Products of three matrices in another order: some tens of round-offs of float32.
    error = np.abs(found - plain(merged, X, TIME, CAPTION)).max()
    assert error < 1e-4 * np.abs(found - before).max()


def test_a_lora_run_holds_and_exports_what_it_learns(tmp_path):
    """The whole weights are the teacher's plus the LoRA file, as launch.convert merges it."""
    config = configure(digits_lora)
    networks, optimizers, mesh = create_networks(config), create_optimizers(config), MESH
    state = abstract_state(config, networks, optimizers, mesh)
    learned = [state.student, state.ema, state.fake, state.student_opt, state.fake_opt]
    names = {path[-1].key for path, leaf in jax.tree.leaves_with_path(learned) if leaf.ndim}
    assert names == {"lora_a", "lora_b"}
    assert jax.tree.structure(state.teacher) == jax.tree.structure(networks.teacher.abstract_params())

    teacher = randomised(state.teacher)
    state = state.replace(iteration=jnp.int32(3), teacher=teacher, student=randomised(state.student, 50))
    export(config, state.replace(ema=state.student), tmp_path, lambda: None)
    whole, _ = load_safetensors(tmp_path / "student.safetensors")
    export(configure(digits_dmd2), state.replace(student=teacher, ema=teacher), tmp_path / "teacher", lambda: None)
    base = open_source(tmp_path / "teacher" / "student.safetensors").tensors
    lora = open_source(tmp_path / "student_lora.safetensors")
    added = merging.add_lora(base, lora.tensors, lora.metadata, 1.0, lambda name: name)
    assert whole.keys() == added.keys() == wan_tensors(teacher, TINY).keys()
    for name, tensor in added.items():
        np.testing.assert_allclose(whole[name], tensor.read(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_dmd2_with_lora_updates_adapters_and_the_head_alone():
    config = configure(digits_dmd2, lora_rank=4, critic_lora_rank=4)
    config.optimizer.update({"warmup": 0, "decay_from": 0, "decay_to": 0})
    networks, optimizers = create_networks(config), create_optimizers(config)
    teacher = randomised(networks.teacher.abstract_params())
    own = [first_params(network, jax.random.key(1), teacher, 4) for network in (networks.student, networks.fake)]
    assert {path[0].key for path, _ in jax.tree.leaves_with_path(own[1])} == {"blocks", "discriminator"}
    state = abstract_state(config, networks, optimizers, MESH)
    state = state.replace(
        **{name: jnp.int32(0) for name in ("iteration", "student_updates", "critic_updates", "skipped")},
        bad_data={name: jnp.int32(0) for name in state.bad_data},
        teacher=teacher,
        student=randomised(own[0]),
        ema=randomised(own[0]),
        fake=randomised(own[1]),
        student_opt=optimizers.student.init(own[0]),
        fake_opt=optimizers.critic.init(own[1]),
    )
    shared = {"apply": networks.applies, "recipe": Recipe(simulation_steps=1)}
    batch, losses = {"latent": X, "text": CAPTION}, frozenset({"dmd", "gan"})
    student = functools.partial(student_step, optimizer=optimizers.student, negative_text=jnp.zeros(TEXT), **shared)
    critic = functools.partial(critic_step, optimizer=optimizers.critic, loss_names=frozenset({"gan"}), **shared)
    after, metrics = fast_jit(functools.partial(student, loss_names=losses))(state, batch, jax.random.key(0), 1.0)
    assert {"loss_dmd", "loss_gan"} < metrics.keys()
    later, metrics = fast_jit(critic)(after, batch, jax.random.key(1))
    assert {"loss_critic", "loss_gan_critic"} < metrics.keys()
    assert later.skipped == 0
    for ours, before in ((later.student, state.student), (later.fake, state.fake)):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), ours, before)
        assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, later.teacher, teacher)


@pytest.fixture
def documented(monkeypatch):
    """What docs/methods.md adds, put where it says: the method's module, its entries in two tables, the recipe."""
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    method, lines, recipe = re.findall(r"```\w*\n(.*?)```", page, re.DOTALL)
    module, scope = types.ModuleType("improved_consistency"), {}
    exec(method, vars(module))
    monkeypatch.setitem(sys.modules, "rcm_jax.improved_consistency", module)
    imported, in_methods, in_losses = lines.splitlines()
    exec(imported.removeprefix("rcm_jax/steps.py").strip(), scope)
    entry = in_methods.removesuffix("in METHODS").strip()
    monkeypatch.setattr("rcm_jax.steps.METHODS", METHODS | eval(f"{{{entry}}}", scope))
    entry = in_losses.removeprefix("rcm_jax/config.py").removesuffix("in LOSSES").strip()
    monkeypatch.setattr("rcm_jax.config.LOSSES", LOSSES + eval(f"({entry})"))
    exec(recipe, scope)
    return types.SimpleNamespace(**scope)


def test_the_method_that_the_documentation_adds_trains(documented):
    config = documented.get_config()
    validate(config)
    config.model.preset = "tiny"
    networks, (stage,), optimizer = create_networks(config), parse_stages(config.stages), optax.sgd(0.1)
    settings = {"loss_names": stage.losses, "recipe": Recipe(), "negative_text": jnp.zeros(TEXT)}
    step = functools.partial(student_step, apply=networks.applies, optimizer=optimizer, **settings)
    params = randomised(networks.student.abstract_params())
    batch = {"latent": X, "text": CAPTION}
    after, metrics = fast_jit(step)(create_state(params, None, optimizer, None), batch, jax.random.key(0), 1.0)
    assert metrics["loss_ict"] > 0 == metrics["skipped"]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after.student, params)), strict=True))


def test_the_method_that_the_documentation_adds_is_zero_for_a_consistent_student_alone(documented):
    """v = x / s takes every x for noise around 0; v = 0 does not."""
    state = create_state({}, None, optax.identity(), None)
    draws = {"noise": normal(2, *X.shape), "u": jnp.array([0.2, 0.7])}

    def loss(apply):
        applies, ratio = Applies(apply, apply, apply), jnp.float32(1.0)
        at = Setting(
            {}, state, {"latent": X, "text": CAPTION}, draws, ratio, frozenset(), applies, Recipe(), CAPTION[0]
        )
        return documented.ict(at)["ict"]

    consistent = loss(lambda params, x, time_B, text, mode: x / (time_B / 1000).reshape(-1, 1, 1, 1, 1))
    np.testing.assert_allclose(consistent, 0, atol=1e-6)
    assert (loss(lambda params, x, time_B, text, mode: 0 * x) > 1e-3).all()


@pytest.mark.parametrize("rf_range", [(0.875, 1.0), (0.0, 0.875)])
def test_an_expert_draws_the_times_of_its_range_alone(rf_range):
    recipe = Recipe(rf_range=rf_range)
    losses, keys = frozenset({"scm", "mean_flow", "dmd"}), jax.random.split(jax.random.key(0), 500)
    draws = jax.device_get(fast_jit(jax.vmap(lambda key: draw_student(key, (1,) * 4, losses, recipe)))(keys))
    trig = [draws[name].ravel() for name in ("t", "dmd_t", "simulation_times")]
    for s in [*(np.sin(t) / (np.sin(t) + np.cos(t)) for t in trig), draws["s"], draws["s"] - draws["span"]]:
        assert rf_range[0] - 1e-6 <= s.min()
        assert s.max() <= rf_range[1] + 1e-6
        assert np.ptp(s) > 0.8 * (rf_range[1] - rf_range[0])


def test_an_expert_of_low_noise_generates_from_noised_data():
    """By a linear velocity, F = (cos t - sin t) x, whose data estimate is known for any start."""
    latent, noise = normal(0, BATCH, *LATENT), normal(1, BATCH, 1, *LATENT)
    draws = {"simulation_times": jnp.zeros((BATCH, 1)), "simulation_noises": noise}
    linear = lambda x, t_B: (jnp.cos(t_B) - jnp.sin(t_B)).reshape(-1, 1, 1, 1, 1) * x  # noqa: E731
    for rf_range in (WHOLE_RANGE, (0.0, 0.875)):
        found = simulate_student(linear, linear, {"latent": latent}, draws, jnp.int32(1), Recipe(rf_range=rf_range))
        t = trig_from_rf(jnp.full(BATCH, rf_range[1]))
        start = mix(latent, noise[:, 0], t)
        cos, sin = (f(t).reshape(-1, 1, 1, 1, 1) for f in (jnp.cos, jnp.sin))
        np.testing.assert_allclose(found, (cos - sin * (cos - sin)) * start, rtol=1e-5, atol=1e-6)
