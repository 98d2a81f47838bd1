"""Attention split over a mesh equals attention on one device: values, tangents and every gradient, for any lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcm_jax import sharding
from rcm_jax.models.blocks import WHOLE

BATCH, HEADS, DIM = 2, 4, 8
FAST = {"xla_backend_optimization_level": 0}  # these programs run for milliseconds and compile for seconds
MESHES = {  # sizes of the mesh, ulysses
    "ulysses": ({"context": 4}, 4),
    "ring": ({"context": 4}, 1),
    "ring over all": ({"data": 1, "context": 8}, 1),
    "both": ({"data": 1, "context": 8}, 2),
    "both and tensor": ({"data": 1, "context": 4, "tensor": 2}, 2),
    "ring, batch and tensor": ({"fsdp": 2, "data": 1, "context": 2, "tensor": 2}, 1),
}
LENGTHS = {"even": (32, 32), "odd": (29, 29), "to a caption": (29, 5)}
CASES = [(mesh, "odd") for mesh in MESHES] + [("both", "even"), ("both", "to a caption"), ("ring", "even")]


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
    ops = sharding.block_ops(sharding.make_mesh(**sizes), HEADS, ulysses)
    ours, theirs = (
        jax.jit(functools.partial(results, which), compiler_options=FAST)(primals) for which in (ops, WHOLE)
    )
    for key, arrays in theirs.items():
        for a, b in zip(ours[key], arrays, strict=True):
            # A few roundings of float32, of sums of 32 terms.
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=key)
