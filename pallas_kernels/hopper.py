"""The fastest kernels for each pass and shape on NVIDIA Hopper, by `python -m benchmarks.attention`.

Measured on an H200 (benchmarks/README.md): for values our kernel is 2 % behind cuDNN's where lengths are multiples of
its tiles and 7 % ahead where they are not; it has no rival for values with tangents; and for gradients it is ahead
where keys or queries are few, while for long ones cuDNN makes five products where ours makes seven. What no kernel
takes goes to plain JAX.
"""

from jaxtyping import Array, Float

from pallas_kernels import cudnn, mosaic_gpu, portable

FEW = 2048  # keys or queries, up to which our gradient is the faster and cuDNN's value
CUDNN_TILE = 128


def forward(
    q_BLNH: Float[Array, "b l n h"], k_BSNH: Float[Array, "b s n h"], v_BSNH: Float[Array, "b s n h"], *, scale: float
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    back_end = mosaic_gpu if _is_for_mosaic(q_BLNH) else portable
    is_ragged = q_BLNH.shape[1] % CUDNN_TILE > 0 or k_BSNH.shape[1] % CUDNN_TILE > 0
    is_ours = is_ragged and q_BLNH.shape[3] > 64 and not _is_short(q_BLNH, k_BSNH)
    if _is_for_cudnn(q_BLNH, k_BSNH) and not (back_end is mosaic_gpu and is_ours):
        back_end = cudnn
    return back_end.forward(q_BLNH, k_BSNH, v_BSNH, scale=scale)


def forward_with_tangent(
    q_BLNH: Float[Array, "b l n h"],
    k_BSNH: Float[Array, "b s n h"],
    v_BSNH: Float[Array, "b s n h"],
    tq_BLNH: Float[Array, "b l n h"] | None,
    tk_BSNH: Float[Array, "b s n h"] | None,
    tv_BSNH: Float[Array, "b s n h"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"], Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns (out, lse) of `forward` and their tangents, from one pass over the keys. A tangent of None is zero."""
    back_end = mosaic_gpu if _is_for_mosaic(q_BLNH) else portable
    return back_end.forward_with_tangent(q_BLNH, k_BSNH, v_BSNH, tq_BLNH, tk_BSNH, tv_BSNH, scale=scale)


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
    """Returns the gradients (dq, dk, dv), given `forward`'s results and their cotangents; a dlse of None is zero."""
    back_end = mosaic_gpu if _is_for_mosaic(q_BLNH) else portable
    if (
        dlse_BNL is None
        and _is_for_cudnn(q_BLNH, k_BSNH)
        and not (back_end is mosaic_gpu and _is_short(q_BLNH, k_BSNH))
    ):
        back_end = cudnn
    return back_end.backward(q_BLNH, k_BSNH, v_BSNH, out_BLNH, lse_BNL, dout_BLNH, dlse_BNL, scale=scale)


def _is_short(q: Array, k: Array) -> bool:
    return min(q.shape[1], k.shape[1]) <= FEW


def _is_for_mosaic(q: Array) -> bool:
    return q.dtype.name in mosaic_gpu.DTYPES and q.shape[3] <= mosaic_gpu.MAX_HEAD_DIM


def _is_for_cudnn(q: Array, k: Array) -> bool:
    fits = q.shape[3] % cudnn.HEAD_DIM_MULTIPLE == 0 and q.shape[3] <= cudnn.MAX_HEAD_DIM
    return fits and q.dtype.name in cudnn.DTYPES and min(q.shape[1], k.shape[1]) > 1
