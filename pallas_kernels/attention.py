"""Exact attention: checks, choice of back end, and differentiation rules.

A back end is a module, or another object that can be hashed, with three functions of arrays and a `scale`:

    forward(q, k, v) -> (out, lse)
    forward_with_tangent(q, k, v, tq, tk, tv) -> (out, lse, t_out, t_lse); a tangent of None is zero
    backward(q, k, v, out, lse, dout, dlse) -> (dq, dk, dv); a dlse of None is zero

JAX cannot push a custom_vjp forward nor split a custom_jvp whose rule is one fused kernel, so there are two rules.
mode="reverse" is a custom_vjp with a flash backward pass. mode="forward" is a custom_jvp whose rule is one fused
kernel, itself a custom_vjp, so that `jax.grad` of the primal output of `jax.jvp` shares the kernel's one forward pass.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from pallas_kernels import cudnn, hopper, mosaic_gpu, mosaic_tpu, portable, reference
from pallas_kernels.operands import serves
from pallas_kernels.refusals import forward_only, reverse_only

DTYPES = ("bfloat16", "float16", "float32", "float64")

ERROR_JVP = 'attention(mode="reverse") is for jax.grad and jax.vjp: for jax.jvp pass mode="forward"'
ERROR_GRAD = 'attention(mode="forward") is for jax.jvp, inside jax.grad or not: for jax.grad alone pass mode="reverse"'
ERROR_TANGENT = (
    'the tangent of attention(mode="forward") is a constant: differentiate the primal output of jax.jvp only'
)


@runtime_checkable
class BackEnd(Protocol):
    """What computes attention: three functions, as the module's docstring says."""

    @property
    def forward(self) -> Callable[..., Any]: ...
    @property
    def forward_with_tangent(self) -> Callable[..., Any]: ...
    @property
    def backward(self) -> Callable[..., Any]: ...


# Plain `Array`: a wrong shape or dtype must meet the errors below, not a type checker's.
def attention(
    q_BLNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    *,
    scale: float | None = None,
    implementation: str | BackEnd = "auto",
    mode: str = "reverse",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """softmax(scale q k^T) v over every head, without mask.

    Memory grows with L + S, not L * S. Softmax and sums are float32 (float64 for float64); matmul operands keep the
    dtype of the arguments, and float32 matmuls follow `jax.default_matmul_precision`.

    The results carry checkpoint names, for `jax.checkpoint` policies that keep them instead of running attention
    again: "attention_out", "attention_lse" and, in forward mode, "attention_tangent".

    Args:
      q_BLNH: queries (batch, length, heads, head dim); bfloat16, float16, float32 or float64.
      k_BSNH: keys, of any length, otherwise like the queries.
      v_BSNH: values, shaped like the keys.
      scale: factor of the logits; 1 / sqrt(head dim) if None.
      implementation: "auto" chooses by the default device, dtype and shape; "deterministic" does too, from kernels
        that give the same bits in every run. Or one of: "mosaic_gpu" (NVIDIA Hopper; bfloat16, head dim up to 128),
        "cudnn" (NVIDIA GPUs; bfloat16 and float16, no tangent), "mosaic_tpu" (TPUs; no float64, head dim up to 256;
        on a mesh, inside `jax.shard_map`), "portable" (plain JAX, any device), "reference" (quadratic memory, for
        tests). Or a back end of the caller's own.
      mode: how the result may be differentiated. "reverse": `jax.grad`, `jax.vjp`; no `jax.jvp`. "forward": `jax.jvp`,
        and `jax.grad` of the primal output of `jax.jvp`; no other `jax.grad`. There the tangent is a constant: where
        it is differentiated after all, gradients are NaN.
      return_lse: also return the logarithm of each row's sum of exponentials.

    Returns:
      out_BLNH like the queries, or (out_BLNH, lse_BNL) with lse in float32 (float64 for float64).

    Raises:
      ValueError: shapes or dtypes disagree, or an unknown implementation or mode.
      TypeError: a derivative that `mode` does not serve.
      NotImplementedError: an implementation asked for by name that does not serve the operands or the derivative.
    """
    _check_operands(q_BLNH, k_BSNH, v_BSNH)
    static = _scale(scale, q_BLNH), choose_back_end(implementation, q_BLNH)
    match mode:
        case "reverse":
            out, lse = _reverse(*static, *(reverse_only(x, ERROR_JVP) for x in (q_BLNH, k_BSNH, v_BSNH)))
        case "forward":
            out, lse = _forward(*static, q_BLNH, k_BSNH, v_BSNH)
        case _:
            raise ValueError(f'{mode=} must be "reverse" or "forward"')
    return (out, lse) if return_lse else out


def attention_given(
    q_BLNH: Array,
    k_BSNH: Array,
    v_BSNH: Array,
    out_BLNH: Array,
    lse_BNL: Array,
    *,
    scale: float | None = None,
    implementation: str | BackEnd = "auto",
) -> Array:
    """`out`, as it was given, with the gradient of attention.

    For reverse passes written by hand that kept `attention(..., return_lse=True)`: the gradient with respect to
    q, k and v is the flash backward pass from the given `out` and `lse`, and no forward pass runs. The gradient
    with respect to `out` and `lse` is zero. Reverse mode only.

    k and v may be a part of the keys behind `out` and `lse`: gradients of parts add up, as ring attention needs.

    Args:
      q_BLNH, k_BSNH, v_BSNH, scale, implementation: as `attention` got them.
      out_BLNH, lse_BNL: what `attention` returned.

    Raises:
      ValueError: shapes or dtypes disagree, or an unknown implementation.
      NotImplementedError: an implementation asked for by name that does not serve the operands.
    """
    _check_operands(q_BLNH, k_BSNH, v_BSNH)
    batch, length, heads, _ = q_BLNH.shape
    _check_like("out", out_BLNH, q_BLNH.shape, q_BLNH.dtype)
    _check_like("lse", lse_BNL, (batch, heads, length), jnp.promote_types(q_BLNH.dtype, jnp.float32))
    static = _scale(scale, q_BLNH), choose_back_end(implementation, q_BLNH)
    operands = (reverse_only(x, "attention_given is for jax.grad and jax.vjp only") for x in (q_BLNH, k_BSNH, v_BSNH))
    return _given(*static, *operands, out_BLNH, lse_BNL)


def _check_operands(q: Array, k: Array, v: Array) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}.shape={x.shape} must have 4 axes: batch, length, heads, head dim")
        if 0 in x.shape:
            raise ValueError(f"{name}.shape={x.shape} must have no empty axis: attention needs one token at least")
    if q.dtype.name not in DTYPES:
        raise ValueError(f"q.dtype={q.dtype.name} must be one of {', '.join(DTYPES)}: cast q, k and v")
    batch, _, heads, head_dim = q.shape
    _check_like("k", k, (batch, k.shape[1], heads, head_dim), q.dtype)
    _check_like("v", v, k.shape, q.dtype)


def _check_like(name: str, x: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}.shape={x.shape} must be {shape}, to match the arguments before it")
    if x.dtype != dtype:
        raise ValueError(f"{name}.dtype={x.dtype.name} must be {dtype.name}, to match q: cast it")


def _scale(scale: float | None, q: Array) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def choose_back_end(implementation: str | BackEnd, q: Array) -> BackEnd:
    """The back end that `attention` takes for an `implementation` and queries; its errors are those of `attention`."""
    match implementation:
        case BackEnd():
            return implementation
        case "auto" | "deterministic":
            return _best(q, deterministic=implementation == "deterministic")
        case "mosaic_gpu":
            return _served(implementation, mosaic_gpu, q)
        case "cudnn":
            return _served(implementation, cudnn, q)
        case "mosaic_tpu":
            return _served(implementation, mosaic_tpu, q)
        case "portable":
            return portable
        case "reference":
            return reference
        case _:
            names = '"auto", "deterministic", "mosaic_gpu", "cudnn", "mosaic_tpu", "portable" or "reference"'
            raise ValueError(f"{implementation=} must be {names}")


def _best(q: Array, *, deterministic: bool) -> BackEnd:
    match _architecture():
        case "hopper" if not deterministic:
            return hopper
        # Nothing of cuDNN: its gradient can be deterministic, but takes 2 B N L S bytes (NVIDIA/cudnn-frontend, #398).
        case "hopper" if serves(mosaic_gpu, q):
            return mosaic_gpu
        case "tpu" if serves(mosaic_tpu, q):
            return mosaic_tpu
        case _:
            return portable


def _architecture() -> str:
    """ "hopper", "tpu" or another name, of the device that computes by default."""
    device = jax.config.values["jax_default_device"] or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0":
        return "hopper"
    return device.platform


def _served(implementation: str, back_end: Any, q: Array) -> BackEnd:
    """The back end. Raises NotImplementedError if it does not serve such queries."""
    if serves(back_end, q):
        return back_end
    dtypes, multiple, most = back_end.DTYPES, back_end.HEAD_DIM_MULTIPLE, back_end.MAX_HEAD_DIM
    if q.dtype.name not in dtypes:
        raise NotImplementedError(f'{implementation=} takes {", ".join(dtypes)}, not {q.dtype.name}: pass "auto"')
    rule = f"up to {most}" if multiple == 1 else f"up to {most} that are multiples of {multiple}"
    raise NotImplementedError(f'{implementation=} takes head dims {rule}, not {q.shape[3]}: pass "auto"')


def _value(scale, back_end, q, k, v) -> tuple[Array, Array]:
    return back_end.forward(q, k, v, scale=scale)


def _reverse_fwd(scale, back_end, *primals):
    q, k, v = (x.value for x in primals)
    out, lse = _named(*back_end.forward(q, k, v, scale=scale))
    return (out, lse), (q, k, v, out, lse)


def _reverse_bwd(scale, back_end, residuals, cotangents):
    return _backward(scale, back_end, residuals, *cotangents)


def _backward(scale, back_end, residuals, dout, dlse):
    """The back end's gradient. Statically zero cotangents cost nothing."""
    *_, out, _ = residuals
    dout = jnp.zeros_like(out) if isinstance(dout, SymbolicZero) else dout
    dlse = None if isinstance(dlse, SymbolicZero) else dlse
    return back_end.backward(*residuals, dout, dlse, scale=scale)


_reverse = jax.custom_vjp(_value, nondiff_argnums=(0, 1))
_reverse.defvjp(_reverse_fwd, _reverse_bwd, symbolic_zeros=True)


def _given_value(scale, back_end, q, k, v, out, lse) -> Array:
    return out


def _given_fwd(scale, back_end, q, k, v, out, lse):
    return out, (q, k, v, out, lse)


def _given_bwd(scale, back_end, residuals, dout):
    return *back_end.backward(*residuals, dout, None, scale=scale), None, None


_given = jax.custom_vjp(_given_value, nondiff_argnums=(0, 1))
_given.defvjp(_given_fwd, _given_bwd)


def _forward_jvp(scale, back_end, primals, tangents):
    refuse = functools.partial(forward_only, operands=primals, grad_error=ERROR_GRAD, tangent_error=ERROR_TANGENT)
    tangents = tuple(None if isinstance(t, SymbolicZero) else refuse(t) for t in tangents)
    out, lse, t_out, t_lse = _fused(scale, back_end, primals, tangents)
    return (out, lse), (t_out, t_lse)


_forward = jax.custom_jvp(_value, nondiff_argnums=(0, 1))
_forward.defjvp(_forward_jvp, symbolic_zeros=True)


def _value_and_tangent(scale, back_end, primals, tangents) -> tuple[Array, Array, Array, Array]:
    return back_end.forward_with_tangent(*primals, *tangents, scale=scale)


def _fused_fwd(scale, back_end, *operands):
    primals, tangents = jax.tree.map(lambda x: x.value, operands)
    out, lse, t_out, t_lse = back_end.forward_with_tangent(*primals, *tangents, scale=scale)
    out, lse = _named(out, lse)
    t_out, t_lse = checkpoint_name((t_out, t_lse), "attention_tangent")
    return (out, lse, t_out, t_lse), (*primals, out, lse)


def _fused_bwd(scale, back_end, residuals, cotangents):
    dout, dlse, *tangent_cotangents = cotangents
    gradients = _backward(scale, back_end, residuals, dout, dlse)
    # Where nobody differentiates the tangent, its cotangent is zero, but only as a value once a scan is transposed.
    for cotangent in tangent_cotangents:
        if not isinstance(cotangent, SymbolicZero):
            nan = jnp.where((cotangent != 0).any(), jnp.nan, 0)
            gradients = tuple(x + nan.astype(x.dtype) for x in gradients)
    return gradients, None


_fused = jax.custom_vjp(_value_and_tangent, nondiff_argnums=(0, 1))
_fused.defvjp(_fused_fwd, _fused_bwd, symbolic_zeros=True)


def _named(out: Array, lse: Array) -> tuple[Array, Array]:
    return checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
