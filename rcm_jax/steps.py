"""The training steps: gradients, optimiser, EMA, counters and metrics of one update, as pure functions.

`student_step` serves every loss of the student (flow matching, sCM, dCM, DMD and their sums), `critic_step` trains the
fake score. All randomness of an update is drawn for the whole batch before it is cut into micro-batches, so that
gradient accumulation, like sharding, does not change what is computed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from rcm_jax import losses
from rcm_jax.state import FAULTS, Params, TrainState
from rcm_jax.trigflow import Velocity, draw_lognormal, draw_shifted_uniform, trig_velocity

Batch = dict[str, jax.Array]  # latent (B, T, H, W, C), text (B, S, D), perhaps fault (B,) int32, see state.FAULTS
Metrics = dict[str, jax.Array]
Apply = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of a distillation step; the names are those of the rCM paper, section 4.

    `simulation_times` fixes the TrigFlow times of the backward simulation (DMD2 style) when not empty.
    `caption_dropout` is the share of captions that flow matching replaces by the negative one, for guidance.
    """

    guidance: float = 5.0
    scm_weight: float = 100.0
    dmd_weight: float = 1.0
    simulation_steps: int = 4
    simulation_times: tuple[float, ...] = ()
    p_G_mean: float = 0.7
    p_G_std: float = 1.6
    p_D_shift: float = 5.0
    dcm_steps: int = 48
    dcm_shift: float = 5.0
    caption_dropout: float = 0.1
    ema_gamma: float = 6.94
    accumulate: int = 1


def student_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    tangent_ratio: jax.Array,
    *,
    loss_names: frozenset[str],
    apply: Apply,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    negative_text: jax.Array,
) -> tuple[TrainState, Metrics]:
    """One update of the student and its EMA. `negative_text` (S, D) embeds the unconditional caption."""
    batch, bad_data = _contain(batch, state.bad_data)
    draws = _draw_student(key, batch["latent"], loss_names, recipe)
    simulation_steps = state.student_updates % recipe.simulation_steps + 1

    def loss(params: Params, batch: Batch, draws: Batch) -> tuple[jax.Array, Metrics]:
        text = batch["text"]
        student = conditioned(apply, params, text)
        frozen = conditioned(apply, lax.stop_gradient(params), text)

        def teacher(x: jax.Array, t_B: jax.Array) -> jax.Array:
            return trig_velocity(guided(apply, state.teacher, text, negative_text, recipe.guidance))(x, t_B)

        parts = {}
        if "flow_matching" in loss_names:
            dropped = jnp.where((draws["u"] < recipe.caption_dropout)[:, None, None], negative_text[None], text)
            net = conditioned(apply, params, dropped)
            parts["flow_matching"] = losses.flow_matching(net, batch["latent"], draws["noise"], draws["t"])
        if "scm" in loss_names:
            student_jvp = conditioned(apply, params, text, mode="forward")
            parts["scm"], _ = losses.scm(
                student_jvp, teacher, batch["latent"], draws["noise"], draws["t"], tangent_ratio
            )
        if "dcm" in loss_names:
            times = losses.dcm_times(draws["u"], recipe.dcm_steps, recipe.dcm_shift)
            parts["dcm"] = losses.dcm(student, frozen, teacher, batch["latent"], draws["noise"], *times)
        if "dmd" in loss_names:
            generated = _generate(student, frozen, draws, simulation_steps)
            fake = conditioned(apply, state.fake, text)
            parts["dmd"], _ = losses.dmd(generated, fake, teacher, draws["dmd_noise"], draws["dmd_t"])
        parts = {name: jnp.where(batch["sound"], value, 0.0).mean() for name, value in parts.items()}
        weights = {"flow_matching": 1.0, "scm": recipe.scm_weight, "dcm": recipe.scm_weight, "dmd": recipe.dmd_weight}
        total = jnp.sum(jnp.stack([weights[name] * value for name, value in parts.items()]))
        return total, {"loss": total} | {f"loss_{name}": value for name, value in parts.items()}

    grads, metrics = _mean_gradient(loss, state.student, batch, draws, recipe.accumulate)
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
    apply: Apply,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """One update of the fake score on data the student generates."""
    batch, bad_data = _contain(batch, state.bad_data)
    draws = _draw_generated(key, batch["latent"], recipe)
    simulation_steps = state.critic_updates % recipe.simulation_steps + 1

    def loss(params: Params, batch: Batch, draws: Batch) -> tuple[jax.Array, Metrics]:
        student = conditioned(apply, state.student, batch["text"])
        generated = lax.stop_gradient(_generate(student, student, draws, simulation_steps))
        fake = conditioned(apply, params, batch["text"])
        value = losses.critic(fake, generated, draws["dmd_noise"], draws["dmd_t"])
        value = jnp.where(batch["sound"], value, 0.0).mean()
        return value, {"loss_critic": value}

    grads, metrics = _mean_gradient(loss, state.fake, batch, draws, recipe.accumulate)
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


def conditioned(apply: Apply, params: Params, text_BSD: jax.Array, *, mode: str = "reverse") -> Velocity:
    """The TrigFlow velocity of a network with parameters and caption closed over."""
    return trig_velocity(lambda x, time: apply(params, x, time, text_BSD, mode=mode))


def guided(apply: Apply, params: Params, text_BSD: jax.Array, negative: jax.Array, guidance: float) -> Velocity:
    """A network's velocity under classifier-free guidance, v_uncond + w (v_cond - v_uncond), on network times.

    `negative` is the embedding of the negative prompt, one (S, D) for all samples or (B, S, D). Both halves run in one
    batch of twice the size, where a sample and its twin are neighbours: a sharded batch needs no communication.
    """
    if guidance == 1.0:
        return lambda x, time_B: apply(params, x, time_B, text_BSD)
    pairs = jnp.stack([text_BSD, jnp.broadcast_to(negative, text_BSD.shape)], axis=1)
    pairs = pairs.reshape(-1, *text_BSD.shape[1:])

    def velocity(x: jax.Array, time_B: jax.Array) -> jax.Array:
        both = apply(params, jnp.repeat(x, 2, axis=0), jnp.repeat(time_B, 2), pairs)
        both = both.reshape(len(x), 2, *both.shape[1:])
        return both[:, 1] + guidance * (both[:, 0] - both[:, 1])

    return velocity


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


def _draw_student(key: jax.Array, latent: jax.Array, loss_names: frozenset[str], recipe: Recipe) -> Batch:
    noise, t, u, generated = jax.random.split(key, 4)
    batch = latent.shape[0]
    draws = {
        "noise": jax.random.normal(noise, latent.shape),
        "t": draw_lognormal(t, (batch,), recipe.p_G_mean, recipe.p_G_std),
        "u": jax.random.uniform(u, (batch,)),
    }
    return draws | (_draw_generated(generated, latent, recipe) if "dmd" in loss_names else {})


def _draw_generated(key: jax.Array, latent: jax.Array, recipe: Recipe) -> Batch:
    """Noises and times of a backward simulation and of the noising of its result; the batch axis leads."""
    times, noises, t, noise = jax.random.split(key, 4)
    batch, steps = latent.shape[0], recipe.simulation_steps
    if recipe.simulation_times:
        draws = jnp.array([jnp.pi / 2, *recipe.simulation_times])[:steps]
        draws = jnp.broadcast_to(draws[None], (batch, steps))
    else:
        draws = draw_shifted_uniform(times, (batch, steps), recipe.p_D_shift)
    return {
        "simulation_times": draws,
        "simulation_noises": jax.random.normal(noises, (batch, steps, *latent.shape[1:])),
        "dmd_t": draw_shifted_uniform(t, (batch,), recipe.p_D_shift),
        "dmd_noise": jax.random.normal(noise, latent.shape),
    }


def _generate(student: Velocity, frozen: Velocity, draws: Batch, steps: jax.Array) -> jax.Array:
    times = losses.simulation_times(draws["simulation_times"].T)
    return losses.simulate(student, frozen, times, jnp.moveaxis(draws["simulation_noises"], 1, 0), steps)


def _mean_gradient(
    loss: Callable[..., tuple[jax.Array, Metrics]], params: Params, batch: Batch, draws: Batch, accumulate: int
) -> tuple[Params, Metrics]:
    """Gradient and metrics averaged over `accumulate` micro-batches; sample i goes to micro-batch i mod accumulate."""
    gradient = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return gradient(params, batch, draws)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, micro: tuple[Batch, Batch]) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b / accumulate, total, gradient(params, *micro)), None

    micros = jax.tree.map(split, (batch, draws))
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
