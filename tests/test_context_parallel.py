"""Attention split over a mesh equals attention on one device: values, tangents and every gradient, for any lengths."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax import sharding
from rcm_jax.config import UserError
from rcm_jax.models.blocks import WHOLE

BATCH, HEADS, DIM = 2, 4, 8
FAST = {"xla_backend_optimization_level": 0}  # these programs run for milliseconds and compile for seconds
MESHES = {  # sizes of the mesh, ulysses
    "ulysses": ({"context": 4}, 4),
    "ring": ({"context": 4}, 1),
    "both": ({"data": 1, "context": 8}, 2),
    "both and tensor": ({"data": 1, "context": 4, "tensor": 2}, 2),
    "ring, batch and tensor": ({"fsdp": 2, "data": 1, "context": 2, "tensor": 2}, 1),
}
LENGTHS = {"even": (32, 32), "odd": (29, 29), "few": (9, 9), "to a caption": (29, 5)}
CASES = [(mesh, "odd") for mesh in MESHES]
CASES += [("both", "even"), ("both", "to a caption"), ("ring", "even"), ("ring", "few")]


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(queries, keys, dtype=jnp.float32):
    """q, k and v, with logits that differ by several units, so that parts of the keys weigh differently."""
    shapes = ((BATCH, length, HEADS, DIM) for length in (queries, keys, keys))
    q, k, v = (normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))
    return 3 * q, k, v


def results(ops, primals):
    """All that blocks.py asks of attention: by name, arrays."""
    tangents = tuple(normal(10 + seed, *x.shape, dtype=x.dtype) for seed, x in enumerate(primals))
    weight = normal(20, *primals[0].shape)

    def weigh(out, lse=0.0):
        return (weight * out.astype(jnp.float32)).sum() + jnp.sin(lse).sum()

    def shared(*primals):
        forward = functools.partial(ops.attention, mode="forward", return_lse=True)
        (out, lse), (t_out, _) = jax.jvp(forward, primals, tangents)
        return weigh(out, lse), (out, lse, t_out)

    out, lse = ops.attention(*primals, return_lse=True)
    gradient = jax.grad(lambda *x: weigh(*ops.attention(*x, return_lse=True)), argnums=(0, 1, 2))(*primals)
    through, (_, _, t_out) = jax.grad(shared, argnums=(0, 1, 2), has_aux=True)(*primals)
    given = jax.grad(lambda *x: weigh(ops.given(*x, out, lse)), argnums=(0, 1, 2))(*primals)
    return {
        "value": (out, lse, ops.given(*primals, out, lse)),
        "tangent": (t_out,),
        "gradient": gradient,
        "gradient through the tangent": through,
        "gradient from given results": given,
    }


@pytest.mark.parametrize(("name", "lengths"), CASES)
def test_attention_over_a_mesh_is_that_of_one_device(name, lengths):
    sizes, ulysses = MESHES[name]
    primals = operands(*LENGTHS[lengths])
    ops = sharding.block_ops(sharding.make_mesh(**sizes), HEADS, ulysses, dtype=jnp.float32)
    ours, theirs = (
        jax.jit(functools.partial(results, which), compiler_options=FAST)(primals) for which in (ops, WHOLE)
    )
    for key, arrays in theirs.items():
        for a, b in zip(ours[key], arrays, strict=True):
            # A few roundings of float32, of sums of 32 terms.
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=key)


def test_bfloat16_is_merged_in_float32():
    """A ring errs in bfloat16 as much as one device does."""
    rounded = operands(29, 29, jnp.bfloat16)
    ring = sharding.block_ops(sharding.make_mesh(context=4), HEADS, ulysses=1, dtype=jnp.float32)

    def tangent(ops, *primals):
        return jax.jvp(functools.partial(ops.attention, mode="forward", return_lse=True), primals, primals)

    exact, alone, spread = (
        jax.tree.leaves(jax.jit(functools.partial(tangent, ops), compiler_options=FAST)(*primals))
        for ops, primals in ((WHOLE, [x.astype(jnp.float32) for x in rounded]), (WHOLE, rounded), (ring, rounded))
    )
    for a, b, c in zip(exact, alone, spread, strict=True):
        assert np.linalg.norm(c - a) <= 1.5 * np.linalg.norm(b - a) + 1e-5 * np.linalg.norm(a)


def matmuls(f, *arguments):
    def count(jaxpr):
        inner = (getattr(x, "jaxpr", x) for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values())))
        own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
        return own + sum(count(x) for x in inner if hasattr(x, "eqns"))

    return count(jax.make_jaxpr(f)(*arguments).jaxpr)


@pytest.mark.parametrize(("name", "rounds"), [("ulysses", 1), ("ring", 4), ("both", 4)])
def test_no_attention_forward_or_tangent_runs_twice(name, rounds):
    """Products a round over keys: 2 for the value, 6 with its tangent, 6 for the gradient (one of them of vectors)."""
    sizes, ulysses = MESHES[name]
    ops = sharding.block_ops(sharding.make_mesh(**sizes), HEADS, ulysses, dtype=jnp.float32)
    primals = operands(32, 32)
    keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse", "attention_tangent")

    def gradient(attention):
        return jax.grad(lambda *x: jax.checkpoint(attention, policy=keep)(*x).sum(), argnums=(0, 1, 2))

    def value_beside_tangent(*primals):
        value, tangent = jax.jvp(functools.partial(ops.attention, mode="forward"), primals, primals)
        return value * jax.lax.stop_gradient(tangent)

    given = (primals[0], jnp.zeros((BATCH, HEADS, 32)))
    assert matmuls(ops.attention, *primals) == 2 * rounds
    assert matmuls(gradient(ops.attention), *primals) == (2 + 6) * rounds
    assert matmuls(gradient(value_beside_tangent), *primals) == (6 + 6) * rounds
    assert matmuls(gradient(lambda *x: ops.given(*x, *given)), *primals) == 6 * rounds


@pytest.mark.parametrize(
    ("sizes", "heads", "ulysses", "message"),
    [
        ({"tensor": 8}, 12, 0, "mesh.tensor=8 must divide the 12 heads of the network: lower it"),
        ({"context": 4}, 12, 3, "model.ulysses=3 must divide mesh.context=4 and the 12 heads of a device: set it to 0"),
        ({"context": 4, "tensor": 2}, 6, 4, "must divide mesh.context=4 and the 3 heads of a device: set it to 0"),
    ],
)
def test_heads_that_do_not_divide_are_an_error(sizes, heads, ulysses, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sharding.block_ops(sharding.make_mesh(**sizes), heads, ulysses, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("sizes", "heads", "group"),
    [({"context": 8}, 12, 4), ({"context": 4}, 40, 4), ({"context": 4, "tensor": 2}, 12, 2), ({"context": 8}, 5, 1)],
)
def test_as_many_devices_exchange_heads_as_these_divide_into(sizes, heads, group):
    ops = sharding.block_ops(sharding.make_mesh(**{"data": -1} | sizes), heads, dtype=jnp.float32)
    q = jax.ShapeDtypeStruct((BATCH, 32, heads, DIM), jnp.float32)
    program = str(jax.make_jaxpr(ops.attention)(q, q, q))
    groups = re.findall(r"all_to_all\[\s*axis_index_groups=\(\(([\d, ]+)\)", program)
    assert {len(found.split(",")) for found in groups} == {group} - {1}
    assert program.count("ppermute[") == 2 * (sizes["context"] // group - 1)
