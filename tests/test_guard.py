"""When a run's numbers are too wrong to go on."""

import math

import pytest

from rcm_jax.guard import ENOUGH, Guard

BATCH_SIZE = 10


def judge_all(guard, metrics):
    """(iteration, trouble) pairs: what the guard says when it is given each iteration in turn."""
    troubles = [
        guard.judge(iteration, f"batch {iteration}", {"skipped": 0} | one, last=iteration == len(metrics))
        for iteration, one in enumerate(metrics, 1)
    ]
    return [(iteration, trouble) for iteration, trouble in enumerate(troubles, 1) if trouble]


def make(**limits):
    return Guard(**{"max_skipped": 0, "max_loss_ratio": 0.0, "max_bad_data": 0.0, "batch_size": BATCH_SIZE} | limits)


def skips(counts):
    return [{"skipped": count} for count in counts]


def losses(values, name="loss_scm"):
    return [{name: value} for value in values]


def test_updates_skipped_in_a_row_are_trouble_and_others_are_not():
    assert not judge_all(make(max_skipped=3), skips([1, 2, 2, 3, 4, 4, 5, 6]))
    ((noticed, trouble), *_) = judge_all(make(max_skipped=3), skips([0, 1, 2, 3, 3]))
    assert (noticed, trouble.iteration, trouble.sound, trouble.batch) == (5, 4, 1, "batch 4")


def test_what_is_sound_ends_before_the_first_of_the_updates_skipped_in_a_row():
    guard, seen = make(max_skipped=3), []
    guard.start(40, skipped=0)
    for iteration, one in enumerate(skips([0, 1, 2, 2, 2]), 41):
        seen.append(guard.sound)
        assert guard.judge(iteration, None, one) is None
    assert [*seen, guard.sound] == [40, 40, 41, 41, 41, 44]


def test_a_resumed_run_counts_from_what_it_had_skipped():
    guard = make(max_skipped=1)
    guard.start(0, skipped=7)
    assert not judge_all(guard, skips([7, 7]))
    assert judge_all(guard, skips([8]))


@pytest.mark.parametrize("name", ["loss_scm", "loss_critic"])
def test_a_loss_out_of_proportion_is_trouble_once_there_is_a_history(name):
    history = [1.0, -2.0] * (ENOUGH // 2)
    assert not judge_all(make(max_loss_ratio=10.0), losses([*history, 19.0], name))
    assert not judge_all(make(max_loss_ratio=10.0), losses([*history[:-1], 1e9], name))
    ((noticed, trouble),) = judge_all(make(max_loss_ratio=10.0), losses([*history, -21.0], name))
    assert (noticed, trouble.iteration, trouble.sound) == (ENOUGH + 1, ENOUGH + 1, ENOUGH)
    assert f"{name} is -21, the largest of those before was 2" in trouble.reason


def test_losses_are_compared_with_their_own_kind_and_nan_is_left_to_the_skip_count():
    mixed = [{"loss_scm": 1.0} if step % 2 else {"loss_critic": 1e6} for step in range(3 * ENOUGH)]
    assert not judge_all(make(max_loss_ratio=10.0), [*mixed, {"loss_scm": math.nan}, {"loss_scm": 2.0}])


def test_a_share_of_bad_records_is_trouble_that_no_rollback_mends():
    few = [{"bad_data/text": 10, "bad_data/shape": 0}]
    assert not judge_all(make(max_bad_data=0.01), few)  # of the 1,000 samples that count at least
    ((_, trouble),) = judge_all(make(max_bad_data=0.01), [{"bad_data/text": 10, "bad_data/shape": 1}])
    assert trouble.is_data
    many = [{"bad_data/text": 0}] * 199 + [{"bad_data/text": 20}]
    assert not judge_all(make(max_bad_data=0.01), many)  # 20 of 2,000


def test_without_limits_nothing_is_trouble():
    assert not judge_all(
        make(), [{"skipped": step, "loss_scm": 10.0**step, "bad_data/text": step} for step in range(60)]
    )
