"""What the arena keeps of a training, its networks' number formats, and what an ablation changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.ablations import ABLATIONS
from benchmarks.arena import METHODS, Arm, apply_mlp, best_trial, cell, init_mlp, thin
from benchmarks.mixture import CAPTIONS, create_mixture
from benchmarks.tangents import relative_errors

DIM = 4
PARAMS = init_mlp(jax.random.key(0), DIM)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 1, 1, DIM)), jnp.float32)
TEXT = jnp.eye(CAPTIONS)[jnp.array([[0], [2], [4]])]


def test_a_curve_is_the_mean_of_what_each_window_has():
    metrics = [{"loss_scm": 1.0}, {"loss_scm": 3.0}, {"loss_critic": 7.0}, {"loss_scm": 5.0}, {"loss_critic": 9.0}]
    assert thin(metrics, 3) == {"loss_scm": [2.0, 5.0, None], "loss_critic": [None, 7.0, 9.0]}


def test_the_best_trial_is_the_nearest_of_its_own_method():
    def trial(rate, value, *distances):
        return {"rate": rate, "p_G_mean": value, "steps": {str(k): {"wasserstein": d} for k, d in enumerate(distances)}}

    search = {
        "sCM, 1, 0": trial(1.0, 0.0, 0.3, 0.1),
        "sCM, 2, 0": trial(2.0, 0.5, 0.1, 0.2),
        "sCT, 3, 0": trial(3.0, 0.0, 0.0),
    }
    assert best_trial(search, "sCM") == best_trial(search, "sCM, longer") == (2.0, 0.5)


@pytest.mark.parametrize(("dtype", "epsilon"), [("float32", 2**-24), ("bfloat16", 2**-9)])
def test_a_network_is_as_exact_as_its_format(dtype, epsilon):
    time = jnp.array([100.0, 500.0, 900.0])
    found = apply_mlp(PARAMS, X, time, TEXT, dtype=dtype)
    with jax.enable_x64(True):
        exact = apply_mlp(PARAMS, X, time.astype("float64"), TEXT, dtype="float64", time_dtype="float64")
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert epsilon / 100 < error < 20 * epsilon  # five layers deep


@pytest.mark.parametrize(("time_dtype", "same"), [("float32", False), ("bfloat16", True)])
def test_a_time_in_bfloat16_has_eight_bits(time_dtype, same):
    """Between 512 and 1024 bfloat16 knows every fourth number."""
    early, late = (apply_mlp(PARAMS, X, jnp.full(3, time), TEXT, time_dtype=time_dtype) for time in (899.0, 901.0))
    assert bool((early == late).all()) == same


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_it_names_and_nothing_else(name):
    ablation, mixture = ABLATIONS[name], create_mixture(DIM)
    changed, base = (
        dataclasses.asdict(Arm(mixture, 1.0, method, 1e-3, 0.5).recipe)
        for method in (ablation.method, METHODS[ablation.base])
    )
    assert {key: value for key, value in changed.items() if value != base[key]} == dict(ablation.recipe)


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("precision", [0.0, 0.5], "0.250 ± 0.250"),
        ("spread", [1.1, 1.2], "1.150 ± 0.050"),
        ("spread", [0.0, 1.1], "1.100 ± 0.000"),
        ("spread", [0.0, 0.0], "-"),
    ],
)
def test_a_spread_is_of_the_seeds_that_have_one(column, values, expected):
    assert cell(column, np.array(values)) == expected


def test_errors_are_relative_to_each_samples_own_reference():
    reference = np.array([[3.0, 4.0], [0.0, 10.0]])
    found = reference + np.array([[0.3, 0.4], [0.1, 0.0]])
    np.testing.assert_allclose(relative_errors(found, reference), [0.1, 0.01])
