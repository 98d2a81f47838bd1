"""The training steps: gradients, optimiser, EMA, counters and metrics of one update, as pure functions.

`student_step` serves every loss of the student (METHODS and their sums), `critic_step` trains the fake score. Each
sample of an update has a random key of its own, with which its micro-batch draws noises and times: gradient
accumulation, like sharding, does not change what is computed, and the noises of one micro-batch alone are in memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from rcm_jax import methods
from rcm_jax.methods import Applies, Batch, Losses, Recipe, Setting, critic_losses, draw_generated, draw_student
from rcm_jax.state import FAULTS, Params, TrainState

Metrics = dict[str, jax.Array]
Loss = Callable[[Params, Batch, Batch], tuple[jax.Array, Metrics]]  # of parameters, batch and draws: value and metrics
Draw = Callable[[jax.Array], Batch]  # what a sample draws with its key

# By the name of the loss in a recipe's stages; "gan" is a part of dmd.
METHODS: dict[str, Callable[[Setting], Losses]] = {
    "flow_matching": methods.flow_matching,
    "scm": methods.scm,
    "sct": methods.sct,
    "dcm": methods.dcm,
    "mean_flow": methods.mean_flow,
    "mean_flow_scratch": methods.mean_flow_scratch,
    "dmd": methods.dmd,
}


def student_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    tangent_ratio: jax.Array,
    *,
    loss_names: frozenset[str],
    apply: Applies,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    negative_text: jax.Array,
) -> tuple[TrainState, Metrics]:
    """One update of the student and its EMA. `negative_text` (S, D) embeds the unconditional caption."""
    batch, bad_data = _contain(batch, state.bad_data)
    weights = {"flow_matching": 1.0, "dmd": recipe.dmd_weight, "gan": recipe.gan_weight}

    def loss_of(method: Callable[[Setting], Losses]) -> Loss:
        def loss(params: Params, batch: Batch, draws: Batch) -> tuple[jax.Array, Metrics]:
            at = Setting(params, state, batch, draws, tangent_ratio, loss_names, apply, recipe, negative_text)
            parts = _means(method(at), batch)
            total = jnp.sum(jnp.stack([weights.get(name, recipe.scm_weight) * value for name, value in parts.items()]))
            return total, {"loss": total} | {f"loss_{name}": value for name, value in parts.items()}

        return loss

    # In this order, whatever the set's: sums are the same in every process.
    losses = [loss_of(method) for name, method in METHODS.items() if name in loss_names]
    draw = functools.partial(draw_student, shape=batch["latent"].shape[1:], loss_names=loss_names, recipe=recipe)
    grads, metrics = _mean_gradient(losses, state.student, batch, draw, key, recipe.accumulate)
    student, student_opt, skipped, norm = _update(optimizer, grads, state.student, state.student_opt)
    beta = ema_decay(state.student_updates, recipe.ema_gamma)
    ema = jax.tree.map(lambda e, p: e + (1.0 - beta) * (p - e), state.ema, student)
    state = state.replace(
        iteration=state.iteration + 1,
        student_updates=state.student_updates + 1,
        skipped=state.skipped + skipped,
        bad_data=bad_data,
        student=student,
        ema=ema,
        student_opt=student_opt,
    )
    return state, metrics | {"grad_norm": norm} | _counts(state)


def critic_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    apply: Applies,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    loss_names: frozenset[str] = frozenset(),
) -> tuple[TrainState, Metrics]:
    """One update of the fake score on data the student generates; `loss_names` may hold "gan"."""
    batch, bad_data = _contain(batch, state.bad_data)

    def loss(params: Params, batch: Batch, draws: Batch) -> tuple[jax.Array, Metrics]:
        parts = _means(critic_losses(params, state, batch, draws, loss_names, apply, recipe), batch)
        total = parts["critic"] + recipe.gan_critic_weight * parts.get("gan_critic", 0.0)
        return total, {f"loss_{name}": value for name, value in parts.items()}

    draw = functools.partial(draw_generated, shape=batch["latent"].shape[1:], recipe=recipe)
    grads, metrics = _mean_gradient([loss], state.fake, batch, draw, key, recipe.accumulate)
    fake, fake_opt, skipped, norm = _update(optimizer, grads, state.fake, state.fake_opt)
    state = state.replace(
        iteration=state.iteration + 1,
        critic_updates=state.critic_updates + 1,
        skipped=state.skipped + skipped,
        bad_data=bad_data,
        fake=fake,
        fake_opt=fake_opt,
    )
    return state, metrics | {"grad_norm_critic": norm} | _counts(state)


def ema_decay(updates: jax.Array, gamma: float) -> jax.Array:
    """beta of the power EMA after `updates` earlier updates; 0 at the first, which copies (EDM2 eq. 121)."""
    return (1.0 - 1.0 / (updates + 1.0)) ** (gamma + 1.0)


def _contain(batch: Batch, bad_data: dict[str, jax.Array]) -> tuple[Batch, dict[str, jax.Array]]:
    """Replaces samples that are faulty or not finite by zeros, marks the others in "sound" and counts the faults.

    Masking their loss alone is not enough: a zero cotangent times a NaN activation is NaN in every weight.
    """
    finite = jnp.isfinite(batch["latent"]).all(axis=(1, 2, 3, 4)) & jnp.isfinite(batch["text"]).all(axis=(1, 2))
    fault = batch.get("fault", jnp.zeros(finite.shape, jnp.int32))
    fault = jnp.where((fault == 0) & ~finite, FAULTS.index("not_finite") + 1, fault)
    sound = fault == 0
    latent = jnp.where(sound[:, None, None, None, None], batch["latent"], 0.0)
    text = jnp.where(sound[:, None, None], batch["text"], 0.0)
    counts = {name: bad_data[name] + jnp.sum(fault == code, dtype=jnp.int32) for code, name in enumerate(FAULTS, 1)}
    return {"latent": latent, "text": text, "sound": sound}, counts


def _counts(state: TrainState) -> Metrics:
    return {"skipped": state.skipped} | {f"bad_data/{name}": count for name, count in state.bad_data.items()}


def _means(parts: Losses, batch: Batch) -> Metrics:
    """The mean of each loss over the batch, to which a sample that is not sound adds nothing."""
    return {name: jnp.where(batch["sound"], value, 0.0).mean() for name, value in parts.items()}


def _mean_gradient(
    losses: Sequence[Loss], params: Params, batch: Batch, draw: Draw, key: jax.Array, accumulate: int
) -> tuple[Params, Metrics]:
    """Gradient and metrics of a sum of losses, means over `accumulate` micro-batches; sample i is in i mod accumulate.

    The losses take turns, so that the activations of one alone are in memory; each has its "loss" among its metrics.
    """

    def gradient(params: Params, batch: Batch, key_B: jax.Array) -> tuple[Params, Metrics]:
        draws = jax.vmap(draw)(key_B)
        total, metrics = jax.grad(losses[0], has_aux=True)(params, batch, draws)
        for loss in losses[1:]:
            params, total = lax.optimization_barrier((params, total))
            more, found = jax.grad(loss, has_aux=True)(params, batch, draws)
            total = jax.tree.map(jnp.add, total, more)
            metrics |= found | {"loss": metrics["loss"] + found["loss"]}
        return total, metrics

    key_B = jax.random.split(key, len(batch["latent"]))
    if accumulate == 1:
        return gradient(params, batch, key_B)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b / accumulate, total, gradient(params, *micro)), None

    micros = jax.tree.map(split, (batch, key_B))
    shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(add, zeros, micros)[0]


def _update(
    optimizer: optax.GradientTransformation, grads: Params, params: Params, opt_state: optax.OptState
) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
    """New parameters and optimiser state, whether the update was skipped, and the gradient's norm.

    An update with any non-finite gradient changes nothing: neither parameters nor optimiser.
    """
    norm = optax.tree.norm(grads)
    sound = jnp.isfinite(norm)
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)  # noqa: E731
    params = keep(optax.apply_updates(params, updates), params)
    return params, keep(new_opt_state, opt_state), 1 - sound.astype(jnp.int32), norm
