"""Runs a stack of identical transformer blocks: one compiled block, scanned over stacked parameters.

Two modes, because JAX's derivative rules for attention come in two kinds (see pallas_kernels):

`mode="reverse"` is for values and ordinary gradients; `remat` chooses what the backward pass recomputes.

`mode="forward"` is for `jax.jvp` with respect to the activations and the gradient, with respect to the parameters,
of the *primal* output of that jvp. It is what the sCM loss needs: student value, tangent and gradient from one
student forward. Differentiating the scan of jvps itself is right but slow, since JAX then also carries the tangent
chain backwards. So the stack has one rule of its own: forwards, `jax.jvp` of each block, keeping the block's
input and what `remat` says; backwards, `jax.vjp` of each block with what was kept *given*, so that neither it nor the
tangent runs again.

What is kept for the backward pass, by `remat`; the rest is computed again:

- "none": everything, in reverse mode; in forward mode as "linear";
- "linear": the outputs of attention and of the matrix products of a block;
- "attention": the outputs of attention;
- "block": the inputs of blocks alone;
- "offload": the inputs of blocks and the outputs of attention, in the host's memory.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

import pallas_kernels
from pallas_kernels.refusals import forward_only, reverse_only

Mode = Literal["reverse", "forward"]
Remat = Literal["none", "linear", "attention", "block", "offload"]


class Inside(NamedTuple):
    """What a block calls where a backward pass may keep results.

    Attributes:
        attend: (q, k, v, keys=None) -> attention's output; to the first `keys` of k alone, if that is given.
        keep: passes on the output of a matrix product.
        tokens: how many of x are real; zeros behind them may fill up the devices' parts.
    """

    attend: Callable[..., jax.Array]
    keep: Callable[[jax.Array], jax.Array]
    tokens: int


def of_first_keys(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of (q, k, v, ...), with an option `keys`: how many of k and v count, from the first on."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *kept: jax.Array, keys: int | None = None, **options: Any):
        return attention(q, k[:, :keys], v[:, :keys], *kept, **options)

    return attend


class BlockOps(NamedTuple):
    """What a mesh changes about blocks; by default nothing.

    Attributes:
        attention, given: `attention` and `attention_given` of pallas_kernels, or the same on parts of their arguments;
            both take `keys`, as Inside.attend does.
        fill: (x_BLD) -> x_BLD with zeros behind its tokens, up to a number of them that suits the devices.
        place: (x_BLD) -> x_BLD, which says where activations lie before, between and after blocks.
        gather: (params) -> params, which brings the parameters of one block together where they are computed with.
    """

    attention: Callable[..., Any] = of_first_keys(pallas_kernels.attention)
    given: Callable[..., jax.Array] = of_first_keys(pallas_kernels.attention_given)
    fill: Callable[[jax.Array], jax.Array] = lambda x_BLD: x_BLD
    place: Callable[[jax.Array], jax.Array] = lambda x_BLD: x_BLD
    gather: Callable[[Any], Any] = lambda params: params


WHOLE = BlockOps()
# Checkpoint names, beside those of attention's outputs.
GATHERED = "gathered_params"  # of what `gather` returns: gathered again in the backward pass, not kept
INPUT, LINEAR = "block_input", "linear_out"
ATTENTION = ("attention_out", "attention_lse")


def from_host(ops: BlockOps) -> BlockOps:
    """The same for parameters in the host's memory: a block's come to the device where they are computed with."""

    def gather(params: Any) -> Any:
        return ops.gather(checkpoint_name(jax.device_put(params, jax.memory.Space.Device), GATHERED))

    return ops._replace(gather=gather)


ERROR_GRAD = (
    "mode='forward' pushes tangents of the latent and the time only; for a gradient outside jax.jvp, or with respect to"
    " parameters or text, call the network with mode='reverse'"
)
ERROR_JVP = "mode='reverse' is for values and jax.grad: for jax.jvp call the network with mode='forward'"
ERROR_TANGENT = "the tangent of mode='forward' is a constant: differentiate the primal output of jax.jvp only"

# (params, x_BLD, modulation, text_BSD, inside) -> x_BLD: one block. The time comes in through `modulation`, an array of
# any shape; an image's tokens may precede the caption's in `text_BSD`.
Block = Callable[[Any, jax.Array, jax.Array, jax.Array, Inside], jax.Array]


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

    In between, x has the tokens that `ops.fill` gives it.

    Raises ValueError for an unknown mode or remat policy, TypeError for a derivative `mode` does not serve.
    """
    if remat not in get_args(Remat):
        raise ValueError(f"{remat=} must be one of {', '.join(get_args(Remat))}")
    tokens = x_BLD.shape[1]
    x_BLD = ops.fill(x_BLD)
    if mode == "forward":
        return _forward_mode(block, tokens, remat, ops)(params, x_BLD, modulation, text_BSD)[:, :tokens]
    if mode == "reverse":
        x_BLD, modulation, text_BSD = (reverse_only(a, ERROR_JVP) for a in (x_BLD, modulation, text_BSD))
        return _scan_blocks(block, params, x_BLD, modulation, text_BSD, tokens, remat, ops)[:, :tokens]
    raise ValueError(
        f"{mode=} must be 'reverse' (values and gradients) or 'forward' (jax.jvp and gradients through it)"
    )


def _scan_blocks(block, params, x, modulation, text, tokens, remat, ops):
    inside = Inside(ops.attention, lambda y: checkpoint_name(_whole_gradient(y), LINEAR), tokens)

    def step(x, layer_params):
        x = checkpoint_name(x, INPUT)
        return ops.place(block(ops.gather(layer_params), x, modulation, text, inside)), None

    return lax.scan(jax.checkpoint(step, prevent_cse=False, policy=_policy(remat)), ops.place(x), params)[0]


def _policy(remat):
    keep = jax.checkpoint_policies
    return {
        "none": keep.save_anything_except_these_names(GATHERED),
        "linear": keep.save_only_these_names(*ATTENTION, LINEAR),
        "attention": keep.save_only_these_names(*ATTENTION),
        "block": keep.nothing_saveable,
        "offload": keep.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT, *ATTENTION],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]


def _forward_mode(block, tokens, remat, ops):
    @jax.custom_jvp
    def stack(params, x, modulation, text):
        return _scan_blocks(block, params, x, modulation, text, tokens, "none", ops)

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
            f = _recording(block, ops.gather(layer_params), text, tokens, remat, ops)
            y, y_t, kept = jax.jvp(f, (x, modulation), (x_t, modulation_t), has_aux=True)
            return (y, y_t), _to_memory(remat, jax.memory.Space.Host, (x, kept))

        out, kept = lax.scan(step, (ops.place(x), ops.place(x_t)), params)
        return out, (params, modulation, text, kept)

    def stack_with_tangent_bwd(residuals, cotangents):
        params, modulation, text, kept = residuals
        y_bar, _ = cotangents  # the tangent is a constant of the loss

        def step(carry, layer):
            x_bar, modulation_bar, text_bar = carry
            layer_params, kept = layer
            x, results = _to_memory(remat, jax.memory.Space.Device, kept)
            _, pull_back = jax.vjp(_replaying(block, results, tokens, remat, ops), layer_params, x, modulation, text)
            params_bar, x_bar, modulation_more, text_more = pull_back(x_bar)
            return (x_bar, modulation_bar + modulation_more, text_bar + text_more), params_bar

        zeros = (y_bar, jnp.zeros_like(modulation), jnp.zeros_like(text))
        (x_bar, modulation_bar, text_bar), params_bar = lax.scan(step, zeros, (params, kept), reverse=True)
        return params_bar, x_bar, jnp.zeros_like(x_bar), modulation_bar, jnp.zeros_like(modulation), text_bar

    stack_with_tangent.defvjp(stack_with_tangent_fwd, stack_with_tangent_bwd)
    return stack


def _to_memory(remat, space, tree):
    """What is kept between the passes, where `remat` wants it."""
    return jax.device_put(tree, space) if remat == "offload" else tree


class Kept(NamedTuple):
    """Results of a block, each in the order that they were made: (out, lse) of attention, and matrix products."""

    attention: tuple[tuple[jax.Array, jax.Array], ...]
    linear: tuple[jax.Array, ...]


def _recording(block, params, text, tokens, remat, ops):
    """(x, modulation) -> (block's output, what `remat` keeps)."""

    def f(x, modulation):
        attention, linear = [], []

        def attend(q, k, v, keys=None):
            out, lse = ops.attention(q, k, v, keys=keys, mode="forward", return_lse=True)
            attention.append((out, lse))
            return out

        def keep(y):
            linear.append(y)
            return y

        y = ops.place(block(params, x, modulation, text, Inside(attend, keep, tokens)))
        return y, Kept(
            () if remat == "block" else tuple(attention), tuple(linear) if remat in ("none", "linear") else ()
        )

    return f


def _replaying(block, kept, tokens, remat, ops):
    """The block with what was kept given, in the order it was recorded, and the rest computed again."""

    def f(params, x, modulation, text):
        attention, linear = map(iter, kept)

        def attend(q, k, v, keys=None):
            kept = () if remat == "block" else next(attention)
            return (ops.given if kept else ops.attention)(q, k, v, *kept, keys=keys)

        def keep(y):
            y = _whole_gradient(y)
            return _given(y, next(linear)) if remat in ("none", "linear") else y

        return ops.place(block(ops.gather(params), x, modulation, text, Inside(attend, keep, tokens)))

    return f


@jax.custom_vjp
def _given(computed, kept):
    """`kept` in value, with the gradient of `computed`, which nobody computes, as its value is not used."""
    return kept


_given.defvjp(lambda computed, kept: (kept, None), lambda _, gradient: (gradient, None))


@jax.custom_vjp
def _whole_gradient(y):
    """y. Its gradient is in memory before it is used: else XLA writes it in float32 with the sum for the bias."""
    return y


_whole_gradient.defvjp(lambda y: (y, None), lambda _, gradient: (lax.optimization_barrier(gradient),))


def _instantiate(primal, tangent):
    return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
