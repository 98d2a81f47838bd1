"""Runs a stack of identical transformer blocks: one compiled block, scanned over stacked parameters.

Two modes, because JAX's derivative rules for attention come in two kinds (see pallas_kernels):

`mode="reverse"` is for values and ordinary gradients; `remat` chooses what the backward pass recomputes.

`mode="forward"` is for `jax.jvp` with respect to the activations and the gradient, with respect to the parameters,
of the *primal* output of that jvp. It is what the sCM loss needs: student value, tangent and gradient from one
student forward. Differentiating the scan of jvps itself is right but slow, since JAX then also carries the tangent
chain backwards. So the stack has one rule of its own: forwards, `jax.jvp` of each block, keeping the block's input
and its attention outputs; backwards, `jax.vjp` of each block with the attention outputs *given*, so that no
attention forward, and no tangent, runs again.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

import pallas_kernels
from pallas_kernels.refusals import forward_only

Mode = Literal["reverse", "forward"]
Remat = Literal["none", "block", "attention"]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class BlockOps(NamedTuple):
    """What a mesh changes about blocks; by default nothing.

    Attributes:
        attention, given: `attention` and `attention_given` of pallas_kernels, or the same on parts of their arguments.
        place: (x_BLD) -> x_BLD, which says where activations lie before, between and after blocks.
        gather: (params) -> params, which brings the parameters of one block together where they are computed with.
    """

    attention: Callable[..., Any] = pallas_kernels.attention
    given: Callable[..., jax.Array] = pallas_kernels.attention_given
    place: Callable[[jax.Array], jax.Array] = lambda x_BLD: x_BLD
    gather: Callable[[Any], Any] = lambda params: params


WHOLE = BlockOps()
GATHERED = "gathered_params"  # checkpoint name of what `gather` returns: gathered again in the backward pass, not kept

ERROR_GRAD = (
    "mode='forward' pushes tangents of the latent and the time only; for a gradient outside jax.jvp, or with respect to"
    " parameters or text, call the network with mode='reverse'"
)
ERROR_TANGENT = "the tangent of mode='forward' is a constant: differentiate the primal output of jax.jvp only"

# (params, x_BLD, modulation, text_BSD, attend) -> x_BLD: one block, with its attention op as an argument. The time
# comes in through `modulation`, an array of any shape; an image's tokens may precede the caption's in `text_BSD`.
Block = Callable[[Any, jax.Array, jax.Array, jax.Array, Attend], jax.Array]


def run_blocks(
    block: Block,
    params: Any,
    x_BLD: jax.Array,
    modulation: jax.Array,
    text_BSD: jax.Array,
    *,
    mode: Mode,
    remat: Remat,
    ops: BlockOps,
) -> jax.Array:
    """Applies the blocks whose parameters are stacked along the leading axis of every leaf of `params`.

    Raises ValueError for an unknown mode or remat policy, TypeError for a derivative `mode` does not serve.
    """
    if mode == "forward":
        return _forward_mode(block, ops)(params, x_BLD, modulation, text_BSD)
    if mode == "reverse":
        return _scan_blocks(block, params, x_BLD, modulation, text_BSD, remat, ops)
    raise ValueError(
        f"{mode=} must be 'reverse' (values and gradients) or 'forward' (jax.jvp and gradients through it)"
    )


def _scan_blocks(block, params, x, modulation, text, remat, ops):
    def step(x, layer_params):
        return ops.place(block(ops.gather(layer_params), x, modulation, text, ops.attention)), None

    return lax.scan(_checkpoint(step, remat), ops.place(x), params)[0]


def _checkpoint(step, remat):
    if remat == "none":
        keep = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
        return jax.checkpoint(step, prevent_cse=False, policy=keep)
    if remat == "block":
        return jax.checkpoint(step, prevent_cse=False)
    if remat == "attention":
        keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
        return jax.checkpoint(step, prevent_cse=False, policy=keep)
    raise ValueError(f"{remat=} must be 'none', 'block' (recompute all) or 'attention' (recompute all but attention)")


def _forward_mode(block, ops):
    @jax.custom_jvp
    def stack(params, x, modulation, text):
        return _scan_blocks(block, params, x, modulation, text, "none", ops)

    def stack_jvp(primals, tangents):
        params, x, modulation, text = primals
        params_t, x_t, modulation_t, text_t = tangents
        if any(not isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves((params_t, text_t))):
            raise TypeError(ERROR_GRAD)
        x_t, modulation_t = (
            forward_only(_instantiate(a, a_t), (x, modulation), grad_error=ERROR_GRAD, tangent_error=ERROR_TANGENT)
            for a, a_t in ((x, x_t), (modulation, modulation_t))
        )
        return stack_with_tangent(params, x, x_t, modulation, modulation_t, text)

    stack.defjvp(stack_jvp, symbolic_zeros=True)

    @jax.custom_vjp
    def stack_with_tangent(params, x, x_t, modulation, modulation_t, text):
        return stack_with_tangent_fwd(params, x, x_t, modulation, modulation_t, text)[0]

    def stack_with_tangent_fwd(params, x, x_t, modulation, modulation_t, text):
        def step(carry, layer_params):
            x, x_t = carry
            f = _recording(block, ops.gather(layer_params), text, ops)
            y, y_t, kept = jax.jvp(f, (x, modulation), (x_t, modulation_t), has_aux=True)
            return (y, y_t), (x, kept)

        out, kept = lax.scan(step, (ops.place(x), ops.place(x_t)), params)
        return out, (params, modulation, text, kept)

    def stack_with_tangent_bwd(residuals, cotangents):
        params, modulation, text, kept = residuals
        y_bar, _ = cotangents  # the tangent is a constant of the loss

        def step(carry, layer):
            x_bar, modulation_bar, text_bar = carry
            layer_params, (x, attention) = layer
            _, pull_back = jax.vjp(_replaying(block, attention, ops), layer_params, x, modulation, text)
            params_bar, x_bar, modulation_more, text_more = pull_back(x_bar)
            return (x_bar, modulation_bar + modulation_more, text_bar + text_more), params_bar

        zeros = (y_bar, jnp.zeros_like(modulation), jnp.zeros_like(text))
        (x_bar, modulation_bar, text_bar), params_bar = lax.scan(step, zeros, (params, kept), reverse=True)
        return params_bar, x_bar, jnp.zeros_like(x_bar), modulation_bar, jnp.zeros_like(modulation), text_bar

    stack_with_tangent.defvjp(stack_with_tangent_fwd, stack_with_tangent_bwd)
    return stack


def _recording(block, params, text, ops):
    """(x, modulation) -> (block's output, the (out, lse) of each of its attention calls)."""

    def f(x, modulation):
        kept = []

        def attend(q, k, v):
            out, lse = ops.attention(q, k, v, mode="forward", return_lse=True)
            kept.append((out, lse))
            return out

        y = ops.place(block(params, x, modulation, text, attend))
        return y, tuple(kept)

    return f


def _replaying(block, attention, ops):
    """The block with the results of its attention calls given, in the order they were recorded."""

    def f(params, x, modulation, text):
        given = iter(attention)
        attend = lambda q, k, v: ops.given(q, k, v, *next(given))  # noqa: E731
        return ops.place(block(ops.gather(params), x, modulation, text, attend))

    return f


def _instantiate(primal, tangent):
    return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
