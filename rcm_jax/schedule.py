"""Which update an iteration makes: a pure function of the stages and the iteration, the same on every host."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from rcm_jax.config import MEAN_FLOW, Stage

TANGENT = frozenset({"scm", "sct"}) | MEAN_FLOW  # losses with a tangent to warm up


@dataclasses.dataclass(frozen=True)
class Phase:
    """One iteration: whose update it is, that network's losses, and r of the tangent warm-up in [0, 1].

    The fake score always denoises; what its `losses` may add is "gan".
    """

    update: Literal["student", "critic"]
    losses: frozenset[str]
    tangent_ratio: float


def phase_at(stages: Sequence[Stage], iteration: int, *, tangent_warmup: int, student_update_freq: int) -> Phase:
    """The phase of `iteration` (from 0). Raises ValueError past the end of the last stage.

    The first `tangent_warmup` iterations that have a loss of TANGENT train it alone (rCM section 4). After them, a
    stage with a DMD loss makes one student update in every `student_update_freq` iterations and critic updates between.
    """
    start, warm = 0, 0  # first iteration of the stage; iterations with a tangent before it
    for stage in stages:
        if iteration < start + stage.iterations:
            return _phase_in(stage, iteration - start, warm, tangent_warmup, student_update_freq)
        start += stage.iterations
        warm += stage.iterations if TANGENT & stage.losses else 0
    raise ValueError(f"{iteration=} must be below the {start} iterations of all stages: lengthen the last stage")


def _phase_in(stage: Stage, index: int, warm: int, tangent_warmup: int, student_update_freq: int) -> Phase:
    ratio = 1.0 if tangent_warmup == 0 else min(1.0, (warm + index) / tangent_warmup)
    if "dmd" not in stage.losses:
        return Phase("student", stage.losses, ratio)
    warming = max(tangent_warmup - warm, 0) if TANGENT & stage.losses else 0
    if index < warming:
        return Phase("student", stage.losses - {"dmd", "gan"}, ratio)
    if (index - warming) % student_update_freq == 0:
        return Phase("student", stage.losses, ratio)
    return Phase("critic", stage.losses & {"gan"}, ratio)


def total_iterations(stages: Sequence[Stage]) -> int:
    """Iterations of all stages together."""
    return sum(stage.iterations for stage in stages)


def needs(stages: Sequence[Stage], *losses: str) -> bool:
    """Whether any stage has any of the losses."""
    return any(set(losses) & stage.losses for stage in stages)
