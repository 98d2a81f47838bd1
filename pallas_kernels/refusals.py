"""Errors that say what to do, where JAX asks of a differentiation rule what it cannot serve.

JAX itself refuses a pushed-forward custom_vjp with a fixed message, and notices only much later, and cannot say where,
that `jax.grad` met a custom_jvp whose values and tangents come from one kernel. The functions here are identities,
gone from the compiled program, whose own rules see the wrong use first.
"""

from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval
from jaxtyping import Array


def reverse_only(x: Array, error: str) -> Array:
    """Returns `x`, an operand of an operation that has a reverse rule only. TypeError(error) under `jax.jvp`."""
    return _reverse_only_p.bind(x, error=error)


def forward_only(tangent: Array, operands: tuple[Array, ...], *, grad_error: str, tangent_error: str) -> Array:
    """Returns `tangent`, which a jvp rule hands with its `operands` to one operation that treats it as a constant.

    Raises:
      TypeError: grad_error under `jax.grad` with no `jax.jvp` inside; tangent_error where `tangent` depends on what
        is differentiated and no operand does, so that a gradient could come through `tangent` alone.
    """
    return _forward_only_p.bind(tangent, *operands, grad_error=grad_error, tangent_error=tangent_error)


def _identity_primitive(name: str) -> Primitive:
    """The primitive whose result is its first operand."""
    primitive = Primitive(name)
    primitive.def_impl(lambda *operands, **errors: operands[0])
    primitive.def_abstract_eval(lambda *operands, **errors: operands[0])
    mlir.register_lowering(primitive, lambda context, *operands, **errors: operands[:1])
    batching.primitive_batchers[primitive] = lambda operands, axes, **errors: (
        primitive.bind(*operands, **errors),
        axes[0],
    )
    return primitive


_reverse_only_p = _identity_primitive("reverse_only")
_pulled_back_p = _identity_primitive("reverse_only_tangent")


def _raise(*_, error):
    raise TypeError(error)


# `jax.grad` transposes the tangent's primitive and never runs it; `jax.jvp` runs it.
ad.primitive_jvps[_reverse_only_p] = lambda primals, tangents, error: (
    _reverse_only_p.bind(*primals, error=error),
    _pulled_back_p.bind(*tangents, error=error),
)
ad.deflinear2(_pulled_back_p, lambda cotangent, _, error: [cotangent])
_pulled_back_p.def_impl(_raise)
mlir.register_lowering(_pulled_back_p, _raise)


_forward_only_p = _identity_primitive("forward_only")


def _forward_only_jvp(primals, tangents, **errors):
    tangent_dot, *operand_dots = tangents
    if all(type(x) is ad.Zero for x in operand_dots):
        raise TypeError(errors["tangent_error"])
    return _forward_only_p.bind(*primals, **errors), tangent_dot


# `jax.grad` splits a program into what it knows, the primals, and what it does not yet, the tangents. It does so in
# two ways, the second for programs under `jax.checkpoint`.
def _forward_only_partial_eval(trace, tangent, *operands, **errors):
    if not tangent.is_known() and all(x.is_known() for x in operands):
        raise TypeError(errors["grad_error"])
    return trace.default_process_primitive(_forward_only_p, (tangent, *operands), errors)


def _forward_only_partial_eval_checkpoint(saveable, unknown, instantiated, eqn):
    if unknown[0] and not any(unknown[1:]):
        raise TypeError(eqn.params["grad_error"])
    # Computed once more in the backward pass, from inputs that must then be there.
    inputs = [x for x, is_there in zip(eqn.invars, instantiated, strict=True) if not is_there]
    return None if any(unknown) else eqn, eqn, [any(unknown)], [True], inputs


ad.primitive_jvps[_forward_only_p] = _forward_only_jvp
partial_eval.custom_partial_eval_rules[_forward_only_p] = _forward_only_partial_eval
partial_eval.partial_eval_jaxpr_custom_rules[_forward_only_p] = _forward_only_partial_eval_checkpoint
