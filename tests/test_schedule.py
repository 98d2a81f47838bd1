"""Which update an iteration makes, against the official rule and by hand."""

import pytest

from rcm_jax.config import parse_stages
from rcm_jax.schedule import Phase, needs, phase_at, total_iterations


def phases(stages, *, warmup=0, freq=1):
    stages = parse_stages(stages)
    return [
        phase_at(stages, iteration, tangent_warmup=warmup, student_update_freq=freq)
        for iteration in range(total_iterations(stages))
    ]


def official(iteration, warmup, freq):
    """The rule of the official code, iteration by iteration."""
    ratio = 1.0 if warmup == 0 else min(1.0, iteration / warmup)
    if iteration < warmup:
        return Phase("student", frozenset({"scm"}), ratio)
    if (iteration - warmup) % freq == 0:
        return Phase("student", frozenset({"scm", "dmd"}), ratio)
    return Phase("critic", frozenset(), ratio)


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("freq", [1, 2, 5])
def test_rcm_follows_the_official_rule(warmup, freq):
    assert phases("rcm:30", warmup=warmup, freq=freq) == [official(i, warmup, freq) for i in range(30)]


def test_stages_follow_each_other_and_share_one_warm_up():
    """Six iterations of warm-up: four in the sCM stage, two in the rCM stage, none in dCM's."""
    found = phases("dcm:3,scm:4,rcm:6", warmup=6, freq=3)
    losses = ["dcm"] * 3 + ["scm"] * 4 + ["scm"] * 2 + ["dmd+scm", "", "", "dmd+scm"]
    assert ["+".join(sorted(phase.losses)) for phase in found] == losses
    assert [phase.update for phase in found] == ["student" if each else "critic" for each in losses]
    assert [phase.tangent_ratio for phase in found[3:]] == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1, 1]


def test_dmd2_trains_its_discriminator_in_the_critics_updates():
    found = phases("dmd2:4", warmup=0, freq=2)
    assert [phase.update for phase in found] == ["student", "critic"] * 2
    assert [phase.losses for phase in found] == [frozenset({"dmd", "gan"}), frozenset({"gan"})] * 2


@pytest.mark.parametrize("loss", ["scm", "sct", "mean_flow", "mean_flow_scratch"])
def test_every_loss_with_a_tangent_warms_it_up(loss):
    assert [phase.tangent_ratio for phase in phases(f"{loss}:4", warmup=2)] == [0, 0.5, 1, 1]


def test_a_stage_without_scm_does_not_wait_for_the_warm_up():
    found = phases("dmd:4,dcm+dmd:4", warmup=100, freq=2)
    assert [phase.losses for phase in found[::2]] == [frozenset({"dmd"})] * 2 + [frozenset({"dcm", "dmd"})] * 2
    assert [phase.update for phase in found] == ["student", "critic"] * 4


@pytest.mark.parametrize("loss", ["flow_matching", "scm", "dcm"])
def test_a_stage_without_dmd_updates_the_student_alone(loss):
    assert {(phase.update, phase.losses) for phase in phases(f"{loss}:9", warmup=3, freq=5)} == {
        ("student", frozenset({loss}))
    }


@pytest.mark.parametrize("iteration", [13, 14])
def test_an_iteration_past_the_end_is_an_error(iteration):
    stages = parse_stages("dcm:3,scm:4,rcm:6")
    assert total_iterations(stages) == 13
    with pytest.raises(ValueError, match=f"iteration={iteration} must be below the 13 iterations of all stages"):
        phase_at(stages, iteration, tangent_warmup=0, student_update_freq=1)


def test_needs_looks_at_every_stage():
    stages = parse_stages("dcm:3,scm:4,rcm:6")
    assert needs(stages, "dmd")
    assert needs(stages, "flow_matching", "dcm")
    assert not needs(stages, "flow_matching")
