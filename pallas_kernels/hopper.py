"""The fastest kernels for each pass and shape on NVIDIA Hopper, by `python -m benchmarks.attention`.

Measured on H200s (benchmarks/README.md): for values our kernel is as fast as cuDNN's where lengths are multiples of
cuDNN's tiles and 8 % to 12 % faster where they are not, but slower where keys or queries are few or head dims 64, and
it computes other head dims as if they were 64 or 128; it has no rival for values with tangents; and for gradients it is
ahead where keys or queries are few, while for long ones cuDNN makes five products where ours makes seven. What no
kernel takes goes to plain JAX.
"""

from types import ModuleType

from jaxtyping import Array, Float

from pallas_kernels import cudnn, mosaic_gpu, portable
from pallas_kernels.operands import serves

FEW = 2048  # keys or queries, up to which our gradient is the faster, and cuDNN's value


def forward(
    q_BLNH: Float[Array, "b l n h"], k_BSNH: Float[Array, "b s n h"], v_BSNH: Float[Array, "b s n h"], *, scale: float
) -> tuple[Float[Array, "b l n h"], Float[Array, "b n l"]]:
    """Returns out = softmax(scale q k^T) v, and lse, the logarithm of each row's sum of exponentials."""
    is_ours = q_BLNH.shape[3] == mosaic_gpu.MAX_HEAD_DIM and not _is_short(q_BLNH, k_BSNH)
    return _choose(q_BLNH, k_BSNH, is_ours=is_ours).forward(q_BLNH, k_BSNH, v_BSNH, scale=scale)


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
    back_end = mosaic_gpu if serves(mosaic_gpu, q_BLNH) else portable
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
    back_end = _choose(q_BLNH, k_BSNH, is_ours=_is_short(q_BLNH, k_BSNH), has_cudnn=dlse_BNL is None)
    return back_end.backward(q_BLNH, k_BSNH, v_BSNH, out_BLNH, lse_BNL, dout_BLNH, dlse_BNL, scale=scale)


def _choose(q: Array, k: Array, *, is_ours: bool, has_cudnn: bool = True) -> ModuleType:
    """Our kernels where `is_ours` says that they are the faster, else cuDNN's; the others where these do not serve."""
    has_cudnn = has_cudnn and serves(cudnn, q) and min(q.shape[1], k.shape[1]) > 1
    if serves(mosaic_gpu, q) and (is_ours or not has_cudnn):
        return mosaic_gpu
    return cudnn if has_cudnn else portable


def _is_short(q: Array, k: Array) -> bool:
    return min(q.shape[1], k.shape[1]) <= FEW
