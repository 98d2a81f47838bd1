"""All that a run carries from one step to the next, and how it starts."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = dict[str, Any]
# What can be wrong with a record; a batch's "fault" holds 0 for a sound one, else the place in this list plus 1.
FAULTS = ("missing_key", "shape", "dtype", "text", "unreadable", "not_finite")
Counter = Any  # an int32 scalar; in a tree of shapes or shardings, that of one


class TrainState(flax.struct.PyTreeNode):
    """Parameters of every network in float32 masters, their optimisers and the counters that schedules read.

    `teacher` is None when a run trains without one; `fake` and `fake_opt` are None without a DMD loss. Student, EMA and
    fake score may hold a part of their parameters only, such as LoRA's: the rest is the teacher's (see `overlay`).
    `student_updates` and `critic_updates` count attempts, skipped ones included: EMA and backward simulation go by
    them, learning rates by the optimisers' own counts of updates that were made. `skipped` counts updates dropped
    because a gradient was not finite, `bad_data` the samples left out, by the name of their fault.
    """

    iteration: Counter
    student_updates: Counter
    critic_updates: Counter
    skipped: Counter
    bad_data: dict[str, Counter]
    student: Params
    ema: Params
    student_opt: optax.OptState
    teacher: Any
    fake: Any
    fake_opt: Any


def create_state(
    student: Params,
    teacher: Any,
    student_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation | None,
    fake: Any = None,
) -> TrainState:
    """A state at iteration 0; student, EMA and fake score are copies, so that each can be donated.

    Without a `critic_optimizer` there is no fake score; it starts from `fake`, or else from the teacher. `teacher` may
    be None.
    """
    fake = None if critic_optimizer is None else _copy(teacher if fake is None else fake)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        iteration=zero,
        student_updates=jnp.copy(zero),
        critic_updates=jnp.copy(zero),
        skipped=jnp.copy(zero),
        bad_data={fault: jnp.copy(zero) for fault in FAULTS},
        student=_copy(student),
        ema=_copy(student),
        student_opt=student_optimizer.init(student),
        teacher=teacher,
        fake=fake,
        fake_opt=None if critic_optimizer is None else critic_optimizer.init(fake),
    )


def create_optimizer(
    learning_rate: float,
    *,
    b1: float = 0.0,
    b2: float = 0.999,
    weight_decay: float = 0.01,
    warmup: int = 100,
    decay_from: int = 0,
    decay_to: int = 0,
) -> optax.GradientTransformation:
    """AdamW with linear warm-up and, if `decay_to` is given, a linear decay to zero between two counts.

    With b1 = 0 the first moment is the gradient and is not stored. Weight decay applies to kernels only.
    """
    schedule = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, max(warmup - 1, 1))
    if decay_to:
        ramp = optax.linear_schedule(learning_rate, 0.0, max(decay_to - decay_from, 1))
        schedule = optax.join_schedules([schedule, ramp], [decay_from])
    if b1 == 0.0:
        precondition = optax.scale_by_rms(b2, eps=1e-8, eps_in_sqrt=False, bias_correction=True)
    else:
        precondition = optax.scale_by_adam(b1, b2, eps=1e-8)
    return optax.chain(
        precondition,
        optax.add_decayed_weights(weight_decay, mask=_is_kernel),
        optax.scale_by_learning_rate(schedule),
    )


def ema_exponent(sigma_rel: float) -> float:
    """gamma of the power EMA of relative width `sigma_rel` (EDM2, arXiv 2312.02696, eq. 123)."""
    return float(np.roots([1.0, 7.0, 16.0 - sigma_rel**-2, 12.0 - sigma_rel**-2]).real.max())


def overlay(base: Any, own: Any) -> Any:
    """The nested dict `own` with what it lacks taken from `base`: a network that learns a part of its parameters only.

    Without a `base`, `own` is whole.
    """
    if not isinstance(own, dict) or base is None:
        return own
    return base | {name: overlay(base.get(name), value) for name, value in own.items()}


def _copy(params: Any) -> Any:
    return jax.tree.map(jnp.copy, params)


def _is_kernel(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
