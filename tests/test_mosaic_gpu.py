"""Hopper kernels, as far as a CPU can tell: they lower for CUDA, one kernel each, whatever the lengths and head dims.

Their numbers are the business of the contract in test_attention.py, which runs them where it finds a Hopper GPU.
"""

import functools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import attention, choose_back_end, cudnn, hopper, mosaic_gpu, portable
from rcm_jax import sharding

SHAPES = [
    (1, 1, 1, 1, 128),
    (2, 77, 1, 3, 16),
    (1, 1003, 77, 2, 40),
    (1, 32760, 512, 12, 128),
    (1, 75600, 75600, 5, 128),
    (4, 4096, 4096, 16, 64),
]
KERNEL = "mosaic_gpu"
CUDNN = "__cudnn$fmha"


def operands(batch, queries, keys, heads, dim, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((batch, queries, heads, dim), dtype)
    k = jax.ShapeDtypeStruct((batch, keys, heads, dim), dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    return q, k, lse


def lowered(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> dict[str, int]:
    targets = [line.split("@", 1)[1].split("(")[0] for line in text.splitlines() if "stablehlo.custom_call @" in line]
    kernels = [target for target in targets if KERNEL in target or CUDNN in target]
    return {name: sum(name in kernel for kernel in kernels) for name in (KERNEL, CUDNN)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_pass_is_one_kernel_and_the_gradient_two(shape):
    q, k, lse = operands(*shape)
    value = functools.partial(mosaic_gpu.forward, scale=0.1)
    tangent = functools.partial(mosaic_gpu.forward_with_tangent, scale=0.1)
    gradient = functools.partial(mosaic_gpu.backward, scale=0.1)
    assert calls(lowered(value, q, k, k))[KERNEL] == 1
    assert calls(lowered(tangent, q, k, k, q, k, k))[KERNEL] == 1
    assert calls(lowered(gradient, q, k, k, q, lse, q, lse))[KERNEL] == 2


def test_statistics_have_whole_blocks_of_rows():
    """They are copied as plain memory: what a last, partial block writes too much would be the next head's."""
    q, k, lse = operands(2, 1003, 77, 3, 64)
    text = lowered(functools.partial(mosaic_gpu.forward, scale=0.1), q, k, k)
    assert "tensor<2x3x1024xf32>" in text
    text = lowered(functools.partial(mosaic_gpu.backward, scale=0.1), q, k, k, q, lse, q, lse)
    kernels = [line for line in text.splitlines() if KERNEL in line and "custom_call" in line]
    assert all(line.rsplit(" : ", 1)[1].count("tensor<2x3x1024xf32>") == 2 for line in kernels)


@pytest.mark.parametrize("moving", ["q", "k", "v", "qk", "kv"])
def test_operands_without_tangent_are_not_read(moving):
    q, k, _ = operands(1, 256, 128, 2, 64)
    given = [x if name in moving else None for name, x in zip("qkv", (q, k, k), strict=True)]

    def f(q, k, v, *tangents):
        tangents = iter(tangents)
        filled = [None if x is None else next(tangents) for x in given]
        return mosaic_gpu.forward_with_tangent(q, k, v, *filled, scale=0.1)

    text = lowered(f, q, k, k, *(x for x in given if x is not None))
    (call,) = [line for line in text.splitlines() if KERNEL in line and "custom_call" in line]
    arguments = call.split("custom_call")[1].split("(", 1)[1].split(")")[0]
    assert arguments.count("%") == 3 + len(moving)


def test_negative_scale_is_that_of_negative_queries():
    q, k, _ = operands(1, 256, 128, 2, 64)
    text = lowered(functools.partial(mosaic_gpu.forward, scale=-0.1), q, k, k)
    assert "stablehlo.negate" in text


@pytest.mark.parametrize(
    ("shape", "dtype", "value", "gradient"),
    [
        ((1, 32760, 32760, 12, 128), jnp.bfloat16, KERNEL, CUDNN),
        ((1, 32768, 32768, 12, 128), jnp.bfloat16, KERNEL, CUDNN),
        ((1, 32760, 32760, 12, 96), jnp.bfloat16, CUDNN, CUDNN),
        ((1, 32760, 512, 12, 128), jnp.bfloat16, CUDNN, KERNEL),
        ((4, 4096, 4096, 16, 64), jnp.bfloat16, CUDNN, CUDNN),
        ((1, 1, 1, 2, 128), jnp.bfloat16, KERNEL, KERNEL),
        ((1, 1000, 1000, 2, 60), jnp.bfloat16, KERNEL, KERNEL),
        ((1, 1000, 1000, 2, 64), jnp.float16, CUDNN, CUDNN),
        ((1, 64, 64, 2, 64), jnp.float32, None, None),
        ((1, 64, 64, 2, 256), jnp.bfloat16, None, None),
    ],
)
def test_hopper_takes_the_kernel_that_measured_fastest(shape, dtype, value, gradient):
    """None is plain JAX."""
    q, k, lse = operands(*shape, dtype)
    texts = (
        lowered(functools.partial(hopper.forward, scale=0.1), q, k, k),
        lowered(functools.partial(hopper.backward, dlse_BNL=None, scale=0.1), q, k, k, q, lse, q),
    )
    for kernel, text in zip((value, gradient), texts, strict=True):
        assert [name for name, count in calls(text).items() if count] == ([kernel] if kernel else [])


@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 4}, {"context": 8}, {"context": 2, "tensor": 4}], ids=str)
def test_runs_that_are_to_be_deterministic_leave_nothing_to_cudnn(sizes):
    """Its gradient adds in any order, or in a fixed one at the price of quadratic memory."""
    q, *_, lse = operands(8, 32768, 32768, 4, 128)
    mesh = sizes and sharding.make_mesh(**{"data": 1} | sizes)

    def gradients(implementation):
        ops = sharding.block_ops(mesh, 4, dtype=jnp.bfloat16, implementation=implementation)

        def own(q, k, v):
            return ops.attention(q, k, v).sum(dtype=jnp.float32)

        def given(q, k, v, out, lse):
            return ops.given(q, k, v, out, lse).sum(dtype=jnp.float32)

        with mock.patch.object(sys.modules["pallas_kernels.attention"], "_architecture", return_value="hopper"):
            return calls(lowered(jax.grad(own), q, q, q)), calls(lowered(jax.grad(given), q, q, q, q, lse))

    assert all(found[CUDNN] for found in gradients("auto"))
    for found in gradients("deterministic"):
        assert found[KERNEL] > 0
        assert found[CUDNN] == 0


def test_what_our_kernels_do_not_take_is_plain_jax_in_deterministic_runs():
    with mock.patch.object(sys.modules["pallas_kernels.attention"], "_architecture", return_value="hopper"):
        assert choose_back_end("deterministic", jnp.zeros((1, 8, 1, 64))) is portable


def test_the_gradient_of_lse_is_not_left_to_cudnn():
    q, k, lse = operands(1, 4096, 4096, 2, 128)
    text = lowered(functools.partial(hopper.backward, scale=0.1), q, k, k, q, lse, q, lse)
    assert calls(text) == {KERNEL: 2, CUDNN: 0}
    with pytest.raises(NotImplementedError, match="cuDNN has no gradient of lse: pass implementation="):
        jax.eval_shape(functools.partial(cudnn.backward, scale=0.1), q, k, k, q, lse, q, lse)


@pytest.mark.parametrize(
    ("implementation", "dtype", "dim", "error"),
    [
        ("mosaic_gpu", jnp.float32, 64, "takes bfloat16, not float32"),
        ("mosaic_gpu", jnp.bfloat16, 160, "takes head dims up to 128, not 160"),
        ("cudnn", jnp.float32, 64, "takes bfloat16, float16, not float32"),
        ("cudnn", jnp.float16, 60, "takes head dims up to 128 that are multiples of 8, not 60"),
    ],
)
def test_a_kernel_asked_for_by_name_says_what_it_does_not_take(implementation, dtype, dim, error):
    q = jnp.zeros((1, 8, 1, dim), dtype)
    with pytest.raises(NotImplementedError, match=error):
        attention(q, q, q, implementation=implementation)


def test_cudnn_says_that_it_has_no_tangent():
    q, k, _ = operands(1, 128, 128, 2, 64)
    attend = functools.partial(attention, implementation="cudnn", mode="forward")
    with pytest.raises(NotImplementedError, match="cuDNN has no tangent: pass implementation="):
        jax.eval_shape(lambda q, k: jax.jvp(lambda q: attend(q, k, k), (q,), (q,)), q, k)
