"""NVIDIA's cuDNN attention, forward and backward: bfloat16 and float16, head dims that are multiples of 8 up to 128.

`jax.nn.dot_product_attention` calls the same kernels, but keeps the backward one to itself, and a reverse pass that
kept `out` and `lse` needs exactly that. So this file asks XLA for the two by name. It has no tangent.
"""

import json

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 128
HEAD_DIM_MULTIPLE = 8

# cuDNN's results are (B, N, L, H) arrays that lie in memory as (B, L, N, H).
HEADS_INSIDE = (0, 2, 1, 3)
NO_WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)


def forward(
    q_BLNH: Float[Array, "b l n h"], k_BSNH: Float[Array, "b s n h"], v_BSNH: Float[Array, "b s n h"], *, scale: float
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    batch, length, heads, _ = q_BLNH.shape
    call = jax.ffi.ffi_call(
        "__cudnn$fmhaSoftmax",
        (_heads_outside(q_BLNH), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32), NO_WORKSPACE),
        output_layouts=(HEADS_INSIDE, None, None),
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=_config(q_BLNH, k_BSNH, scale, FORWARD),
    )
    out_BNLH, lse_BNL, _ = call(q_BLNH, k_BSNH, v_BSNH)
    return jnp.swapaxes(out_BNLH, 1, 2), lse_BNL


def forward_with_tangent(*operands: Array | None, scale: float) -> None:
    """Raises NotImplementedError: cuDNN has no tangent."""
    raise NotImplementedError('cuDNN has no tangent: pass implementation="auto" or "mosaic_gpu"')


def backward(
    q_BLNH: Float[Array, "b l n h"],
    k_BSNH: Float[Array, "b s n h"],
    v_BSNH: Float[Array, "b s n h"],
    out_BLNH: Float[Array, "b l n h"],
    lse_BNL: Float[Array, "b n l"],
    dout_BLNH: Float[Array, "b l n h"],
    dlse_BNL: Float[Array, "b n l"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "b l n h"], Float[Array, "b s n h"], Float[Array, "b s n h"]]:
    """Returns the gradients (dq, dk, dv), given `forward`'s results and the cotangent of `out`.

    Sums over thread blocks in no fixed order: the last bits differ from run to run, unless XLA is told
    --xla_gpu_deterministic_ops. Raises NotImplementedError for a cotangent of lse.
    """
    if dlse_BNL is not None:
        raise NotImplementedError('cuDNN has no gradient of lse: pass implementation="auto" or "mosaic_gpu"')
    call = jax.ffi.ffi_call(
        "__cudnn$fmhaSoftmaxBackward",
        (*map(_heads_outside, (q_BLNH, k_BSNH, v_BSNH)), NO_WORKSPACE),
        output_layouts=(HEADS_INSIDE, HEADS_INSIDE, HEADS_INSIDE, None),
        vmap_method="sequential",
        custom_call_api_version=2,
        legacy_backend_config=_config(q_BLNH, k_BSNH, scale, BACKWARD),
    )
    *gradients_BNLH, _ = call(q_BLNH, k_BSNH, v_BSNH, lse_BNL, dout_BLNH, out_BLNH)
    dq, dk, dv = (jnp.swapaxes(x, 1, 2) for x in gradients_BNLH)
    return dq, dk, dv


def _heads_outside(x_BLNH: Array) -> jax.ShapeDtypeStruct:
    batch, length, heads, head_dim = x_BLNH.shape
    return jax.ShapeDtypeStruct((batch, heads, length, head_dim), x_BLNH.dtype)


def _dot(lhs: int, rhs: int, lhs_batch: tuple[int, int], rhs_batch: tuple[int, int]) -> dict[str, list[str]]:
    return {
        "lhs_contracting_dimensions": [str(lhs)],
        "rhs_contracting_dimensions": [str(rhs)],
        "lhs_batch_dimensions": [str(axis) for axis in lhs_batch],
        "rhs_batch_dimensions": [str(axis) for axis in rhs_batch],
    }


# Axes of the products between (B, L, N, H) operands and (B, N, L, S) probabilities.
FORWARD = {
    "bmm1_dot_dimension_numbers": _dot(3, 3, (0, 2), (0, 2)),
    "bmm2_dot_dimension_numbers": _dot(3, 1, (0, 1), (0, 2)),
}
BACKWARD = {
    "bmm1_grad_gemm1_dot_dimension_numbers": _dot(2, 1, (0, 1), (0, 2)),
    "bmm1_grad_gemm2_dot_dimension_numbers": _dot(3, 1, (0, 1), (0, 2)),
    "bmm2_grad_gemm1_dot_dimension_numbers": _dot(2, 1, (0, 1), (0, 2)),
    "bmm2_grad_gemm2_dot_dimension_numbers": _dot(3, 3, (0, 2), (0, 2)),
}


def _config(q: Array, k: Array, scale: float, products: dict) -> str:
    """XLA's description of an attention call, as JSON (its protocol buffer GpuBackendConfig)."""
    batch, length, heads, _ = q.shape
    probabilities = {
        "element_type": {"bfloat16": "BF16", "float16": "F16"}[q.dtype.name],
        "dimensions": [str(size) for size in (batch, heads, length, k.shape[1])],
        "layout": {"minor_to_major": ["3", "2", "1", "0"]},
        "is_dynamic_dimension": [False] * 4,
    }
    algorithm = {
        "algo_id": "0",
        "math_type": "TENSOR_OP_MATH",
        "tuning_knobs": {"17": "1", "24": "0"},
        "is_cudnn_frontend": True,
        "workspace_size": "0",
    }
    attention = {
        "algorithm": algorithm,
        "fmha_scale": scale,
        "intermediate_tensor_shape": probabilities,
        "is_flash_attention": True,
        "mask_type": "NO_MASK",
        "dropout_rate": 0.0,
        "seed": 0,
        "sliding_window_length": 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
        **products,
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": attention})
