"""Whole trajectories of the teachers' samplers against diffusers' schedulers and Cosmos-Predict2's pipeline."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from rcm_jax import sampling
from rcm_jax.methods import guided
from rcm_jax.trigflow import rf_velocity

SHAPE = (2, 3, 3, 4)
SEEDS = jnp.array([3, 11])
# Relative to the norm of the result: float32 sums of 50 steps, whose coefficients are rounded differently.
TOLERANCE = 1e-5


def predict(tanh, x, s, text):
    """A velocity that bends with the sample, the time and the caption."""
    return tanh(1.5 * x + text) * (1.2 - s) - 0.3 * x


def sample_ours(sampler, times, guidance):
    def apply(params, x, time, text):
        s, text = (a.reshape(-1, 1, 1, 1, 1) for a in (time / 1000, text))
        return predict(jnp.tanh, x, s, text)

    captions, negative = jnp.full((2, 1, 1), 0.7), jnp.full((1, 1), -0.4)
    velocity = rf_velocity(guided(apply, {}, captions, negative, guidance))
    return np.asarray(sampler(velocity, SEEDS, SHAPE, times.tolist()))


def sample_theirs(scheduler, guidance):
    """As diffusers' pipelines go through the steps, with the scheduler's own times not cut to whole numbers."""
    x = torch.from_numpy(np.array(sampling.sample_noise(SEEDS, SHAPE, 0)))
    for s, time in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        positive, negative = (predict(torch.tanh, x, s, text) for text in (0.7, -0.4))
        x = scheduler.step(negative + guidance * (positive - negative), time, x).prev_sample
    return x.numpy()


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("steps", "shift", "guidance"),
    [(1, 5.0, 5.0), (2, 5.0, 5.0), (3, 5.0, 5.0), (50, 1.0, 5.0), (50, 5.0, 1.0), (40, 12.0, 4.0)],
)
def test_unipc(steps, shift, guidance):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    times = sampling.unipc_times(steps, shift=shift)
    np.testing.assert_array_equal(times.astype(np.float32), scheduler.sigmas.numpy())
    assert_close(sample_ours(sampling.unipc, times, guidance), sample_theirs(scheduler, guidance))


@pytest.mark.parametrize(("steps", "shift", "guidance"), [(1, 3.0, 5.0), (50, 1.0, 5.0), (50, 8.0, 1.0)])
def test_euler(steps, shift, guidance):
    times = sampling.euler_times(steps, shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    np.testing.assert_allclose(times, scheduler.sigmas, rtol=1e-6)
    assert_close(sample_ours(sampling.euler, times, guidance), sample_theirs(scheduler, guidance))


def test_euler_of_cosmos():
    """Its pipeline steps with the noise level in place of the time, on samples (1 + sigma) times as large."""
    steps, guidance = 35, 7.0
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002)
    scheduler.set_timesteps(sigmas=np.linspace(0, 1, steps))
    x = 80.0 * torch.from_numpy(np.array(sampling.sample_noise(SEEDS, SHAPE, 0)))
    for sigma, time in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        s = sigma / (1 + sigma)
        positive, negative = ((1 - s) * x - s * predict(torch.tanh, (1 - s) * x, s, text) for text in (0.7, -0.4))
        x0 = positive + guidance * (positive - negative)
        x = scheduler.step((x - x0) / sigma, time, x).prev_sample
    # Its guidance counts from the captioned prediction, ours from the other.
    assert_close(sample_ours(sampling.euler, sampling.karras_times(steps), guidance + 1), x.numpy())
