"""Each method of distillation or training: where a loss meets the networks, times and noises of a run.

A method is a function of a `Setting` that returns its losses, (B,) each, by name; steps.METHODS lists them. The
formulas are in losses.py and mean_flow.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rcm_jax import losses
from rcm_jax.config import MEAN_FLOW
from rcm_jax.mean_flow import MeanVelocity, draw_interval, mean_flow_loss, mixed_velocity
from rcm_jax.state import Params, TrainState, overlay
from rcm_jax.trigflow import (
    NET_TIME_SCALE,
    WHOLE_RANGE,
    Range,
    Velocity,
    draw_lognormal,
    draw_shifted_uniform,
    mix,
    rf_velocity,
    trig_velocity,
)

Batch = dict[str, jax.Array]  # latent (B, T, H, W, C), text (B, S, D), perhaps fault (B,) int32, see state.FAULTS
Losses = dict[str, jax.Array]
Apply = Callable[..., Any]


class Applies(NamedTuple):
    """apply(params, x, time_B, text_BSD, *, mode) of each network of a run.

    The student's also takes `span_B` if it trains by MeanFlow. The fake score's takes `discriminate=True` if there is a
    GAN, and then returns the velocity and a logit (B,) that says how real its input is.
    """

    student: Apply
    teacher: Apply
    fake: Apply


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of a step; the names are those of the rCM paper, section 4.

    `scm_weight` is the weight of any consistency loss. `simulation_times` fixes the TrigFlow times of the backward
    simulation (DMD2 style) when not empty. `tangent` says how sCM differentiates the student: exact, semicontinuous or
    discrete, the latter two by differences over `tangent_step` (see losses). `rf_range` bounds the RF times of a
    network that is one of two experts. `caption_dropout` is the share of captions that training without a teacher
    replaces by the negative one, for guidance.
    """

    guidance: float = 5.0
    scm_weight: float = 100.0
    dmd_weight: float = 1.0
    gan_weight: float = 0.01
    gan_critic_weight: float = 0.1
    tangent: str = "exact"
    tangent_step: float = 1e-4
    mean_flow_share: float = 0.25
    mean_flow_power: float = 1.0
    simulation_steps: int = 4
    simulation_times: tuple[float, ...] = ()
    p_G_mean: float = 0.7
    p_G_std: float = 1.6
    p_D_shift: float = 5.0
    rf_range: Range = WHOLE_RANGE
    dcm_steps: int = 48
    dcm_shift: float = 5.0
    caption_dropout: float = 0.1
    ema_gamma: float = 6.94
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the student's losses of one micro-batch are made of. `params` are those that learn."""

    params: Params
    state: TrainState
    batch: Batch
    draws: Batch
    tangent_ratio: jax.Array
    loss_names: frozenset[str]
    apply: Applies
    recipe: Recipe
    negative_text: jax.Array  # (S, D)

    def student(self, text_BSD: jax.Array | None = None, *, frozen: bool = False, mode: str = "reverse") -> Velocity:
        """The student's TrigFlow velocity, perhaps without gradient; by default with the batch's captions."""
        text_BSD = self.batch["text"] if text_BSD is None else text_BSD
        return conditioned(self.apply.student, self._student_params(frozen), text_BSD, mode=mode)

    def mean_velocity(self, text_BSD: jax.Array, *, frozen: bool = False) -> MeanVelocity:
        """The student's mean velocity; with gradient it serves `jax.jvp` alone."""
        mode = "reverse" if frozen else "forward"
        return mean_velocity(self.apply.student, self._student_params(frozen), text_BSD, mode=mode)

    def teacher_net(self, x: jax.Array, time_B: jax.Array) -> jax.Array:
        """The guided teacher's RF velocity on network times."""
        text, guidance = self.batch["text"], self.recipe.guidance
        return guided(self.apply.teacher, self.state.teacher, text, self.negative_text, guidance)(x, time_B)

    def drop_captions(self) -> tuple[jax.Array, jax.Array]:
        """Which captions are replaced by the negative one, and the captions after that."""
        dropped_B = self.draws["u"] < self.recipe.caption_dropout
        return dropped_B, jnp.where(dropped_B[:, None, None], self.negative_text[None], self.batch["text"])

    def _student_params(self, frozen: bool) -> Params:
        params = overlay(self.state.teacher, self.params)
        return lax.stop_gradient(params) if frozen else params


def flow_matching(at: Setting) -> Losses:
    """Trains a teacher, or a student's first stage without one."""
    _, text = at.drop_captions()
    x0, noise, t = at.batch["latent"], at.draws["noise"], at.draws["t"]
    return {"flow_matching": losses.flow_matching(at.student(text), x0, noise, t)}


def scm(at: Setting) -> Losses:
    """Continuous consistency with the guided teacher."""
    return {"scm": _continuous_consistency(at, trig_velocity(at.teacher_net))}


def sct(at: Setting) -> Losses:
    """Continuous consistency without a teacher."""
    velocity = losses.conditional_velocity(at.batch["latent"], at.draws["noise"])
    return {"sct": _continuous_consistency(at, velocity)}


def _continuous_consistency(at: Setting, velocity: Velocity) -> jax.Array:
    difference = {"frozen_student": at.student(frozen=True), "step": at.recipe.tangent_step}
    mode, differentiate = {
        "exact": ("forward", losses.exact_tangent),
        "semicontinuous": ("forward", functools.partial(losses.semicontinuous_tangent, **difference)),
        "discrete": ("reverse", functools.partial(losses.discrete_tangent, **difference)),
    }[at.recipe.tangent]
    x0, noise, t = at.batch["latent"], at.draws["noise"], at.draws["t"]
    return losses.scm(at.student(mode=mode), velocity, x0, noise, t, at.tangent_ratio, differentiate)[0]


def dcm(at: Setting) -> Losses:
    """Discrete consistency with the guided teacher."""
    times = losses.dcm_times(at.draws["u"], at.recipe.dcm_steps, at.recipe.dcm_shift)
    nets = at.student(), at.student(frozen=True), trig_velocity(at.teacher_net)
    return {"dcm": losses.dcm(*nets, at.batch["latent"], at.draws["noise"], *times)}


def mean_flow(at: Setting) -> Losses:
    """MeanFlow with the guided teacher."""
    return {"mean_flow": _mean_flow(at, at.batch["text"], rf_velocity(at.teacher_net))}


def mean_flow_scratch(at: Setting) -> Losses:
    """MeanFlow without a teacher."""
    dropped_B, text = at.drop_captions()
    unconditional = at.mean_velocity(jnp.broadcast_to(at.negative_text, text.shape), frozen=True)
    guidance_B = jnp.where(dropped_B, 1.0, at.recipe.guidance)
    velocity = mixed_velocity(unconditional, at.batch["latent"], at.draws["noise"], guidance_B)
    return {"mean_flow_scratch": _mean_flow(at, text, velocity)}


def _mean_flow(at: Setting, text_BSD: jax.Array, velocity: Velocity) -> jax.Array:
    x0, draws = at.batch["latent"], at.draws
    return mean_flow_loss(
        at.mean_velocity(text_BSD),
        velocity,
        x0,
        draws["noise"],
        draws["s"],
        draws["span"],
        at.tangent_ratio,
        at.recipe.mean_flow_power,
    )


def dmd(at: Setting) -> Losses:
    """Distribution matching and, in DMD2, the GAN on the features of the same pass through the fake score."""
    text, noise, t = at.batch["text"], at.draws["dmd_noise"], at.draws["dmd_t"]
    steps = at.state.student_updates % at.recipe.simulation_steps + 1
    generated = simulate_student(at.student(), at.student(frozen=True), at.batch, at.draws, steps, at.recipe)
    params = overlay(at.state.teacher, at.state.fake)
    if "gan" not in at.loss_names:
        fake, gan = conditioned(at.apply.fake, params, text), {}
    else:
        fake_F, logit_B = judged(at.apply.fake, params, text)(mix(generated, noise, t), t)
        fake, gan = lambda x, t_B: fake_F, {"gan": losses.gan_generator(logit_B)}
    loss, _ = losses.dmd(generated, fake, trig_velocity(at.teacher_net), noise, t)
    return {"dmd": loss} | gan


def critic_losses(
    params: Params,
    state: TrainState,
    batch: Batch,
    draws: Batch,
    loss_names: frozenset[str],
    apply: Applies,
    recipe: Recipe,
) -> Losses:
    """The fake score's losses on what the student generates; with "gan" it also learns to tell that from real data."""
    text, noise, t = batch["text"], draws["dmd_noise"], draws["dmd_t"]
    student = conditioned(apply.student, overlay(state.teacher, state.student), text)
    steps = state.critic_updates % recipe.simulation_steps + 1
    generated = lax.stop_gradient(simulate_student(student, student, batch, draws, steps, recipe))
    params = overlay(state.teacher, params)
    if "gan" not in loss_names:
        return {"critic": losses.critic(conditioned(apply.fake, params, text), generated, noise, t)}
    judge = judged(apply.fake, params, text)
    fake_F, logit_B = judge(mix(generated, noise, t), t)
    _, real_logit_B = judge(mix(batch["latent"], draws["real_noise"], t), t)
    return {
        "critic": losses.critic(lambda x, t_B: fake_F, generated, noise, t),
        "gan_critic": losses.gan_critic(real_logit_B, logit_B),
    }


def conditioned(apply: Apply, params: Params, text_BSD: jax.Array, *, mode: str = "reverse") -> Velocity:
    """The TrigFlow velocity of a network with parameters and caption closed over."""
    return trig_velocity(lambda x, time: apply(params, x, time, text_BSD, mode=mode))


def mean_velocity(apply: Apply, params: Params, text_BSD: jax.Array, *, mode: str = "reverse") -> MeanVelocity:
    """The mean velocity, on RF times, of a network with parameters and caption closed over."""

    def velocity(x: jax.Array, s_B: jax.Array, span_B: jax.Array) -> jax.Array:
        return apply(params, x, NET_TIME_SCALE * s_B, text_BSD, span_B=NET_TIME_SCALE * span_B, mode=mode)

    return velocity


def judged(apply: Apply, params: Params, text_BSD: jax.Array) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(x, t_B) -> the TrigFlow velocity of a fake score, and its logit (B,) that x is noised real data."""
    return trig_velocity(lambda x, time: apply(params, x, time, text_BSD, discriminate=True), has_aux=True)


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


def draw_student(key: jax.Array, shape: tuple[int, ...], loss_names: frozenset[str], recipe: Recipe) -> Batch:
    """All that the student's losses draw for one sample, whose latent has `shape` (T, H, W, C)."""
    noise, t, u, generated, interval = jax.random.split(key, 5)
    p_G = recipe.p_G_mean, recipe.p_G_std
    draws = {
        "noise": jax.random.normal(noise, shape),
        "t": draw_lognormal(t, (), *p_G, recipe.rf_range),
        "u": jax.random.uniform(u),
    }
    if loss_names & MEAN_FLOW:
        s, span = draw_interval(interval, *p_G, recipe.mean_flow_share, recipe.rf_range)
        draws |= {"s": s, "span": span}
    return draws | (draw_generated(generated, shape, recipe) if "dmd" in loss_names else {})


def draw_generated(key: jax.Array, shape: tuple[int, ...], recipe: Recipe) -> Batch:
    """Noises and times of one sample's backward simulation and of the noising of its result."""
    times, noises, t, noise, real = jax.random.split(key, 5)
    steps, p_D = recipe.simulation_steps, (recipe.p_D_shift, recipe.rf_range)
    if recipe.simulation_times:
        draws = jnp.array([jnp.pi / 2, *recipe.simulation_times])[:steps]
    else:
        draws = draw_shifted_uniform(times, (steps,), *p_D)
    return {
        "simulation_times": draws,
        "simulation_noises": jax.random.normal(noises, (steps, *shape)),
        "dmd_t": draw_shifted_uniform(t, (), *p_D),
        "dmd_noise": jax.random.normal(noise, shape),
        "real_noise": jax.random.normal(real, shape),
    }


def simulate_student(
    student: Velocity, frozen: Velocity, batch: Batch, draws: Batch, steps: jax.Array, recipe: Recipe
) -> jax.Array:
    """Backward simulation from pure noise or, for an expert of low noise, from noised data where its range begins."""
    times, noises = draws["simulation_times"].T, jnp.moveaxis(draws["simulation_noises"], 1, 0)
    highest = recipe.rf_range[1]
    times = losses.simulation_times(times, math.atan2(highest, 1.0 - highest))
    if highest < 1.0:
        noises = noises.at[0].set(mix(batch["latent"], noises[0], times[0]))
    return losses.simulate(student, frozen, times, noises, steps)
