"""The contract of test_attention.py on an NVIDIA Hopper GPU, for the kernels that run there and nowhere else.

JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest tests/gpu -n 8
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import CASES, COMPOSITIONS, Case, assert_matches, draw, grad, grad_of_value, softmax_attention

from pallas_kernels import attention, cudnn, hopper, mosaic_gpu

LONG = (
    Case("head dim 128, ragged", (1, 1003, 1501, 2, 128), "bfloat16"),
    Case("head dim 64, ragged", (2, 1003, 1501, 2, 64), "bfloat16"),
    Case("head dim 96", (1, 640, 700, 2, 96), "bfloat16"),
    Case("few keys", (1, 4097, 77, 2, 128), "bfloat16"),
    Case("few queries", (1, 77, 4097, 2, 128), "bfloat16"),
    Case("one query, head dim 128", (2, 1, 333, 2, 128), "bfloat16"),
    Case("one key, head dim 128", (2, 333, 1, 2, 128), "bfloat16"),
    Case("large logits, head dim 128", (1, 600, 700, 2, 128), "bfloat16", logit=50.0),
    Case("large tangents, head dim 128", (1, 600, 700, 2, 128), "bfloat16", tangent=1e4),
)
SERVED = [("mosaic_gpu", case) for case in CASES + LONG if case.dtype == "bfloat16"]
SERVED += [("auto", case) for case in CASES + LONG if case.dtype != "float64"]


@pytest.mark.parametrize(("implementation", "case"), SERVED, ids=str)
class TestAccuracy:
    def test_reverse_mode(self, implementation, case):
        assert_matches(implementation, case, "reverse", "out", "lse", "dq", "dk", "dv")

    def test_forward_mode(self, implementation, case):
        assert_matches(implementation, case, "forward", "out", "lse", "t_out", "t_lse", "dq", "dk", "dv")


# cuDNN takes no single query or key.
OF_CUDNN = [case for case in CASES + LONG if case.dtype in cudnn.DTYPES and min(case.shape[1:3]) > 1]


@pytest.mark.parametrize("case", OF_CUDNN, ids=str)
def test_cudnn_has_the_value_and_gradient_of_plain_jax(case):
    """Within the rounding of its operands and results, each relative to the largest."""
    x = draw(case)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(implementation, q, k, v, dout):
        out, pull_back = jax.vjp(functools.partial(attention, implementation=implementation), q, k, v)
        return out, *pull_back(dout)

    operands = x["q"], x["k"], x["v"], x["dout"]
    for a, b in zip(value_and_gradient("cudnn", *operands), value_and_gradient("portable", *operands), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 4 * jnp.finfo(case.dtype).eps * np.linalg.norm(b)


@pytest.mark.parametrize("composition", [name for name in COMPOSITIONS if "shard_map" not in name])
def test_composition(composition):
    """bfloat16 inside the layer; tolerances are its rounding, a few times over for the layers above."""
    compose, x = COMPOSITIONS[composition], jax.random.normal(jax.random.key(0), (2, 300, 2, 64))

    def layer(x, mode):
        q, k, v = (y.astype(jnp.bfloat16) for y in (0.75 * x, 2 * x, x))
        return jnp.sin(attention(q, k, v, mode=mode, implementation="mosaic_gpu").astype(jnp.float32))

    def plain(x):
        once = jnp.sin(softmax_attention(0.75 * x, 2 * x, x)[0])
        return jnp.sin(softmax_attention(0.75 * once, 2 * once, once)[0]) if "scan" in composition else once

    reverse, forward = (compose(functools.partial(layer, mode=mode)) for mode in ("reverse", "forward"))
    actual = grad(reverse, x), grad_of_value(forward, x), *jax.jvp(forward, (x,), (3 * x,))
    expected = grad(plain, x), grad(plain, x), *jax.jvp(plain, (x,), (3 * x,))
    for a, b in zip(actual, expected, strict=True):
        assert np.linalg.norm(a - b) <= 8 * jnp.finfo(jnp.bfloat16).eps * np.linalg.norm(b)


def test_in_shard_map():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (2, 300, 2, 64), jnp.bfloat16)
    spec = jax.sharding.PartitionSpec("batch")

    def value_and_tangent(x):
        return jax.jvp(lambda x: attention(x, x, x, mode="forward"), (x,), (3 * x,))

    split = jax.shard_map(value_and_tangent, mesh=mesh, in_specs=spec, out_specs=spec)
    for a, b in zip(jax.jit(split)(x), jax.jit(value_and_tangent)(x), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(2, 1003, 1501, 3, 128), (2, 4096, 512, 4, 64)], ids=str)
def test_results_are_the_same_in_every_run(shape):
    """A race would move them."""
    x = draw(Case("", shape, "bfloat16"))

    @jax.jit
    def run(q, k, v, tq, tk, tv, dout, dlse):
        out, lse, *tangents = mosaic_gpu.forward_with_tangent(q, k, v, tq, tk, tv, scale=0.1)
        return out, lse, *tangents, *mosaic_gpu.backward(q, k, v, out, lse, dout, dlse, scale=0.1)

    first = run(**x)
    for _ in range(20):
        for a, b in zip(first, run(**x), strict=True):
            np.testing.assert_array_equal(a, b)


def test_memory_grows_with_the_length():
    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16)
        lse = jax.ShapeDtypeStruct((1, 2, length), jnp.float32)
        passes = (
            (functools.partial(hopper.forward, scale=0.1), (q, q, q)),
            (functools.partial(hopper.forward_with_tangent, scale=0.1), (q,) * 6),
            (functools.partial(hopper.backward, dlse_BNL=None, scale=0.1), (q, q, q, q, lse, q)),
        )
        return [jax.jit(f).lower(*x).compile().memory_analysis().temp_size_in_bytes for f, x in passes]

    for short, long in zip(temporaries(4096), temporaries(16384), strict=True):
        assert long <= 4 * short + 4096
