"""What back ends share about their operands: which they serve, and where their heads lie."""

from types import ModuleType

import jax.numpy as jnp
from jaxtyping import Array, Float


def serves(back_end: ModuleType, q_BLNH: Array) -> bool:
    """Whether a back end takes such queries, by its DTYPES, MAX_HEAD_DIM and HEAD_DIM_MULTIPLE."""
    head_dim = q_BLNH.shape[3]
    fits = head_dim <= back_end.MAX_HEAD_DIM and head_dim % back_end.HEAD_DIM_MULTIPLE == 0
    return fits and q_BLNH.dtype.name in back_end.DTYPES


def heads_outside(x_BLNH: Float[Array, "b l n h"]) -> Float[Array, "b n l h"]:
    """With heads before rows, and in float32 if in float16, whose range gradients and tangents exceed."""
    x_BNLH = jnp.swapaxes(x_BLNH, 1, 2)
    return x_BNLH.astype(jnp.float32) if x_BNLH.dtype == jnp.float16 else x_BNLH


def heads_inside(x_BNLH: Float[Array, "b n l h"], like: Array) -> Float[Array, "b l n h"]:
    """The inverse of `heads_outside`, in the dtype of `like`."""
    return jnp.swapaxes(x_BNLH, 1, 2).astype(like.dtype)
