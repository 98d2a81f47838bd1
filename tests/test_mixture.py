"""The arena's mixture: its velocity against the gradient of its density, its scores on samples with known faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from benchmarks.mixture import CAPTIONS, STD, create_mixture, score, sliced_wasserstein

MIXTURE = create_mixture(4)
X = np.random.default_rng(0).normal(0, 3, (6, 4))
S = np.array([0.05, 0.2, 0.5, 0.8, 0.95, 1.0])


def log_density(x_BD, s_B1, caption):
    """Of x_s = (1 - s) x0 + s noise, up to the caption's frequency."""
    has = np.ones(25) if caption is None else MIXTURE.caption_K == caption
    spread_B1 = jnp.sqrt(((1 - s_B1) * STD) ** 2 + s_B1**2)
    offset_BKD = x_BD[:, None] - (1 - s_B1)[..., None] * MIXTURE.mean_KD[None]
    log_BK = jax.scipy.stats.norm.logpdf(offset_BKD, scale=spread_B1[..., None]).sum(-1)
    return jax.scipy.special.logsumexp(log_BK, b=(has * MIXTURE.weight_K)[None], axis=1)


@pytest.mark.parametrize("caption", [None, 0, 3])
def test_the_velocity_is_that_of_the_densitys_score(caption):
    """E[noise | x] = -s score, E[x0 | x] = (x + s^2 score) / (1 - s), by Tweedie."""
    with jax.enable_x64(True):
        x, s = jnp.asarray(X[:-1]), jnp.asarray(S[:-1])[:, None]
        grad = jax.grad(lambda x: log_density(x, s, caption).sum())(x)
        expected = -s * grad - (x + s**2 * grad) / (1 - s)
        text = jnp.zeros((5, 1, CAPTIONS)) if caption is None else jnp.eye(CAPTIONS)[jnp.full((5, 1), caption)]
        found = MIXTURE.velocity({}, x[:, None, None, None], 1000 * s[:, 0], text)[:, 0, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # the means are float32


@pytest.fixture(scope="module")
def samples():
    """Two independent samples for the same captions, and the captions."""
    x, text = MIXTURE.sample(jax.random.key(0), 4000)
    caption = np.asarray(text)[:, 0].argmax(axis=1)
    weights = np.where(caption[:, None] == MIXTURE.caption_K, MIXTURE.weight_K, 0.0).cumsum(axis=1)
    random = np.random.default_rng(1)
    mode = (random.uniform(0, 1, 4000)[:, None] * weights[:, -1:] < weights).argmax(axis=1)
    return np.asarray(x)[:, 0, 0, 0], MIXTURE.mean_KD[mode] + STD * random.standard_normal((4000, 4)), caption


def test_fresh_samples_of_the_mixture_score_as_the_mixture(samples):
    reference, fresh, caption = samples
    found = score(MIXTURE, fresh, caption, reference)
    assert abs(found["precision"] - 0.999) < 0.002  # by the definition of the radius; four standard deviations
    assert abs(found["spread"] - 1.0) < 0.02
    assert found["weights_tv"] < 0.06
    assert found["recall"] > 0.9


@pytest.mark.parametrize("name", ["precision", "recall", "spread", "weights_tv", "wasserstein"])
def test_each_score_sees_its_own_fault(name, samples):
    reference, fresh, caption = samples
    centre = MIXTURE.mean_KD[np.linalg.norm(fresh[:, None] - MIXTURE.mean_KD, axis=-1).argmin(axis=1)]
    first = MIXTURE.mean_KD[[np.flatnonzero(MIXTURE.caption_K == each)[0] for each in caption]]
    faulty = {
        "precision": fresh + 0.6 * np.sign(fresh),
        "recall": centre + 0.2 * (fresh - centre),
        "spread": centre + 0.5 * (fresh - centre),
        "weights_tv": first + fresh - centre,
        "wasserstein": fresh + 1.0,
    }[name]
    good, bad = (score(MIXTURE, x, caption, reference)[name] for x in (fresh, faulty))
    expected = {"precision": bad < 0.5, "recall": bad < 0.5, "spread": abs(bad - 0.5) < 0.02}
    assert expected.get(name, bad > 10 * good)


def test_the_sliced_distance_is_the_mean_over_directions_of_scipys():
    x, y = np.random.default_rng(0).normal(size=(2, 500, 1))
    assert sliced_wasserstein(x, y + 0.3) == pytest.approx(stats.wasserstein_distance(x[:, 0], y[:, 0] + 0.3))
