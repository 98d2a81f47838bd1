"""The network and every loss against numbers that the official PyTorch code printed (tests/golden/README.md).

Tolerance: both sides compute in float32 (unit round-off 6e-8), in different orders, through a network of two blocks;
guidance 5 multiplies the teacher's error by up to 9, and the loss's gradient sums over 192 tokens. 2e-5 of the norm
is some 300 round-offs: an error in any formula is larger by orders of magnitude (see test_losses for each term).
"""

import jax
import jax.numpy as jnp
import numpy as np

from rcm_jax import losses
from rcm_jax.convert.wan import params_from_wan, wan_tensors
from rcm_jax.methods import conditioned, guided
from rcm_jax.models.functional import functional
from rcm_jax.models.wan import Wan, WanConfig
from rcm_jax.trigflow import trig_velocity

TOLERANCE = 2e-5
# The official code feeds its nets a float64 time; 1000 s rounded to float32 is off by up to 3e-5, and the highest
# frequency of the time embedding turns that into a relative error of the same size in a time derivative.
TANGENT_TOLERANCE = 1e-4


def video(array):
    """(B, C, T, H, W) as the official code has it, to (B, T, H, W, C)."""
    return jnp.moveaxis(jnp.asarray(array, jnp.float32), 1, -1)


def load(golden, name):
    tensors, metadata = golden(name)
    return tensors, int(metadata["iteration"]) / int(metadata["warmup"]), float(metadata["guidance"])


def build(in_channels=16, layers=2):
    config = WanConfig(dim=48, ffn_dim=96, heads=2, layers=layers, in_channels=in_channels, text_dim=24, text_length=12)
    return config, functional(lambda rngs: Wan(config, rngs=rngs))


def network(golden, name, prefix, **shape):
    tensors, _ = golden(name)
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    config, net = build(**shape)
    return net, params_from_wan(weights, net.abstract_params()), config, weights


def assert_close(ours, theirs, tolerance=TOLERANCE):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


def assert_gradients_match(gradient, golden_tensors, config, tolerance=TOLERANCE):
    """Every parameter's gradient, by its official name, relative to its own norm, and all together.

    A key's gradient is a difference of larger terms (the softmax is blind to a common shift), so single parameters
    get a digit less than the whole, and one below 1e-3 of the whole is measured against that.
    """
    ours = wan_tensors(gradient, config)
    theirs = {name.removeprefix("grad/"): value for name, value in golden_tensors.items() if name.startswith("grad/")}
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(np.linalg.norm(value) ** 2 for value in theirs.values()))
    errors = {name: np.linalg.norm(ours[name] - value) for name, value in theirs.items()}
    assert np.sqrt(sum(error**2 for error in errors.values())) <= tolerance * whole
    for name, value in theirs.items():
        assert errors[name] <= 10 * tolerance * max(np.linalg.norm(value), 1e-3 * whole), name


def test_wan21_t2v_value_and_tangent(golden):
    net, params, _, _ = network(golden, "wan21_t2v", "weights/")
    tensors, _ = golden("wan21_t2v")

    def forward(x, time):
        return net.apply(params, x, time, jnp.asarray(tensors["text"]), mode="forward")

    x, time, tx, tt = (
        video(tensors["x"]),
        jnp.asarray(tensors["t"][:, 0]),
        video(tensors["tx"]),
        jnp.asarray(tensors["tt"][:, 0]),
    )
    out, tangent = jax.jit(lambda *a: jax.jvp(forward, a[:2], a[2:]))(x, time, tx, tt)
    assert_close(out, video(tensors["out"]), 1e-5)
    assert_close(tangent, video(tensors["tangent"]), 1e-5)
    assert_close(net.apply(params, x, time, jnp.asarray(tensors["text"])), video(tensors["out"]), 1e-5)


def test_wan22_i2v_value(golden):
    net, params, _, _ = network(golden, "wan22_i2v", "weights/", in_channels=36)
    tensors, _ = golden("wan22_i2v")
    out = net.apply(
        params,
        video(tensors["x"]),
        jnp.asarray(tensors["t"][:, 0]),
        jnp.asarray(tensors["text"]),
        condition_BTHWC=video(tensors["y"]),
    )
    assert_close(out, video(tensors["out"]), 1e-5)


def test_official_names_round_trip_bit_exactly(golden):
    _, params, config, weights = network(golden, "weights", "student/")
    again = wan_tensors(params, config)
    assert again.keys() == weights.keys()
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


def test_scm_loss_and_every_gradient(golden):
    tensors, ratio, guidance = load(golden, "scm")
    net, student, config, _ = network(golden, "weights", "student/")
    _, teacher, _, _ = network(golden, "weights", "teacher/")
    text, negative = jnp.asarray(tensors["text"]), jnp.asarray(tensors["negative"])
    t = jnp.asarray(tensors["time"][:, 0], jnp.float32)

    def loss(student):
        value, terms = losses.scm(
            conditioned(net.apply, student, text, mode="forward"),
            trig_velocity(guided(net.apply, teacher, text, negative, guidance)),
            video(tensors["x0"]),
            video(tensors["noise"]),
            t,
            ratio,
        )
        return 100.0 * value.sum(), (100.0 * value, terms)

    gradient, (value, terms) = jax.jit(jax.grad(loss, has_aux=True))(student)
    assert_close(terms.teacher, video(tensors["F_teacher"]))
    assert_close(terms.student, video(tensors["F_student"]))
    cos, sin = np.cos(t)[:, None, None, None, None], np.sin(t)[:, None, None, None, None]
    x_t = cos * video(tensors["x0"]) + sin * video(tensors["noise"])
    df_dt = -cos * (terms.student - terms.teacher) - (sin * x_t + terms.student_tangent)
    assert_close(df_dt, video(tensors["df_dt"]), TANGENT_TOLERANCE)
    assert_close(value, tensors["loss"])
    assert_gradients_match(gradient, tensors, config, TANGENT_TOLERANCE)


def test_dcm_loss_and_every_gradient(golden):
    tensors, _, guidance = load(golden, "dcm")
    net, student, config, _ = network(golden, "weights", "student/")
    _, teacher, _, _ = network(golden, "weights", "teacher/")
    text, negative = jnp.asarray(tensors["text"]), jnp.asarray(tensors["negative"])
    times = losses.dcm_times(jnp.asarray(tensors["u"][:, 0]), steps=48, shift=5.0)

    def loss(params):
        value = losses.dcm(
            conditioned(net.apply, params, text),
            conditioned(net.apply, student, text),
            trig_velocity(guided(net.apply, teacher, text, negative, guidance)),
            video(tensors["x0"]),
            video(tensors["noise"]),
            *times,
        )
        return 100.0 * value.sum(), 100.0 * value

    gradient, value = jax.jit(jax.grad(loss, has_aux=True))(student)
    assert_close(times[0], tensors["time"][:, 0])
    assert_close(value, tensors["loss"])
    assert_gradients_match(gradient, tensors, config)


def simulation(tensors):
    steps = int(tensors["steps"])
    times = [np.full(2, np.pi / 2), *(tensors[f"sim_time_{k}"][:, 0] for k in range(steps - 1))]
    noises = [video(tensors[f"sim_noise_{k}"]) for k in range(steps)]
    return losses.simulation_times(jnp.asarray(np.stack(times), jnp.float32)), jnp.stack(noises), steps


def test_dmd_loss_and_every_gradient(golden):
    tensors, _, guidance = load(golden, "dmd")
    net, student, config, _ = network(golden, "weights", "student/")
    _, teacher, _, _ = network(golden, "weights", "teacher/")
    _, fake, _, _ = network(golden, "weights", "fake/")
    text, negative = jnp.asarray(tensors["text"]), jnp.asarray(tensors["negative"])
    times, noises, steps = simulation(tensors)

    def loss(params):
        generated = losses.simulate(
            conditioned(net.apply, params, text), conditioned(net.apply, student, text), times, noises, steps
        )
        value, x0_fake = losses.dmd(
            generated,
            conditioned(net.apply, fake, text),
            trig_velocity(guided(net.apply, teacher, text, negative, guidance)),
            video(tensors["noise"]),
            jnp.asarray(tensors["time"][:, 0], jnp.float32),
        )
        return value.sum(), (value, x0_fake, generated)

    gradient, (value, x0_fake, generated) = jax.jit(jax.grad(loss, has_aux=True))(student)
    assert_close(generated, video(tensors["G_x0"]))
    assert_close(x0_fake, video(tensors["x0_fake"]))
    assert_close(value, tensors["loss"])
    assert_gradients_match(gradient, tensors, config)


def test_critic_loss_and_every_gradient(golden):
    tensors, _, _ = load(golden, "critic")
    net, student, config, _ = network(golden, "weights", "student/")
    _, fake, _, _ = network(golden, "weights", "fake/")
    text = jnp.asarray(tensors["text"])
    times, noises, steps = simulation(tensors)
    frozen = conditioned(net.apply, student, text)
    generated = losses.simulate(frozen, frozen, times, noises, steps)

    def loss(params):
        velocity = conditioned(net.apply, params, text)
        value = losses.critic(
            velocity, generated, video(tensors["noise"]), jnp.asarray(tensors["time"][:, 0], jnp.float32)
        )
        return value.sum(), value

    gradient, value = jax.jit(jax.grad(loss, has_aux=True))(fake)
    assert_close(generated, video(tensors["G_x0"]))
    assert_close(value, tensors["loss"])
    assert_gradients_match(gradient, tensors, config)
