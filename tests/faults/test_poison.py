"""Poisoned numbers are contained, and where they are not, the run stops before it is spoilt."""

import json

import numpy as np
import pytest

from rcm_jax.checkpoint import load_safetensors
from rcm_jax.data import pipeline

HALTED = 3
VIDEO = (8, 16, 16, 1)
BAD = (5, 9, 23, 41)


def weights(run):
    return load_safetensors(run.workdir / "student.safetensors")[0]


def test_a_poisoned_sample_and_a_bad_record_change_nothing_but_their_own_weight(write_records, make_run):
    """The same four records hold NaN or infinity in one run and cannot be used in the other: the same parameters."""
    nan, inf = np.full(VIDEO, np.nan, np.float32), np.zeros(VIDEO, np.float32)
    inf[3, 4, 5] = np.inf
    embedding = np.full((8, 32), -np.inf, np.float32)
    poisoned = write_records(
        "poisoned",
        64,
        dict(zip(BAD, ({"latent": nan}, {"latent": inf}, {"text": embedding}, {"latent": nan}), strict=True)),
    )
    short, text = {"latent": np.ones((7, *VIDEO[1:]), np.float32)}, {"prompt": b"caf\xe9"}
    unusable = write_records("unusable", 64, dict(zip(BAD, (short, text, short, text), strict=True)))
    runs = {}
    for name, data in (("poisoned", poisoned), ("unusable", unusable)):
        runs[name] = make_run(name)
        output = runs[name].finish(data, "faults.max_bad_data=0.1")
    for ours, theirs in zip(weights(runs["poisoned"]).values(), weights(runs["unusable"]).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    expected = {"poisoned": {"not_finite": 20}, "unusable": {"shape": 10, "text": 10}}
    for name, counts in expected.items():
        last = runs[name].records()[-1]
        assert last["skipped"] == 0
        found = {
            fault.removeprefix("bad_data/"): count for fault, count in last.items() if fault.startswith("bad_data/")
        }
        assert {fault: count for fault, count in found.items() if count} == counts  # 5 epochs
    left_out = sorted(line for line in output.splitlines() if line.startswith("left out: "))
    assert [line.split(":")[1].split(" has ")[0].split(" is ")[0] for line in left_out] == [
        " 'latent' of record 23",
        " 'latent' of record 5",
        " the prompt of record 41",
        " the prompt of record 9",
    ]


def test_too_many_bad_records_stop_the_run(write_records, make_run):
    data = write_records("mostly_bad", 64, {number: {"prompt": b"\xff"} for number in range(1, 33)})
    run = make_run("mostly_bad")
    output = run.finish(data, "faults.max_bad_data=0.02", code=HALTED)
    assert "samples were bad records, more than faults.max_bad_data allows" in output
    ended_at = run.saved()[-1]
    counts = [record["bad_data/text"] for record in run.records()]
    assert counts[-2] <= 20 < counts[-1]  # 2 % of 1,000
    assert ended_at < 40


def test_updates_skipped_in_a_row_stop_the_run(write_records, make_run):
    """Finite numbers whose gradient is not."""
    huge = {"latent": np.full(VIDEO, 1e30, np.float32)}
    data = write_records("overflowing", 64, {number: huge for number in range(1, 64)})
    run = make_run("overflowing")
    output = run.finish(data, "faults.max_skipped=4", "faults.rollbacks=1", code=HALTED)
    assert "iteration 4: 4 updates in a row were skipped, their gradients were not finite; its batch lies in" in output
    assert run.saved() == [5]
    batch, facts = load_safetensors(run.workdir / "halted" / "batch_4.safetensors")
    assert facts["iteration"] == "4"
    assert batch["latent"].shape == (8, *VIDEO)
    assert batch["latent"].max() == np.float32(1e30)


@pytest.fixture(scope="module")
def with_a_spike(write_records):
    """A data set of one epoch, and the iteration that meets its one outlier."""
    numbered = [
        {"latent": np.full((1, 1, 1, 1), number), "text": np.zeros((1, 1)), "prompt": ""} for number in range(320)
    ]
    loader = pipeline.make_loader(numbered, batch_size=8, seed=0)
    batches = [next(loader)["latent"].ravel() for _ in range(50)]
    outlier = next(int(number) for number in batches[31] if number not in np.concatenate(batches[40:]))
    return write_records("spike", 320, {outlier: {"latent": np.full(VIDEO, 1e4, np.float32)}}), 32


def test_a_loss_out_of_proportion_stops_the_run_with_its_batch(with_a_spike, make_run):
    data, at = with_a_spike
    run = make_run("spike")
    output = run.finish(data, "checkpoint.keep=1", "checkpoint.every=16", code=HALTED)
    assert f"iteration {at}: loss_flow_matching is " in output
    assert run.saved() == [16, at + 1]  # the last one before the trouble is not given up for those after it
    batch, _ = load_safetensors(run.workdir / "halted" / f"batch_{at}.safetensors")
    assert batch["latent"].max() == 1e4


def test_a_run_may_roll_back_and_go_on_with_other_data(with_a_spike, make_run):
    data, at = with_a_spike
    run = make_run("rolled_back")
    output = run.finish(data, "faults.rollbacks=1", "checkpoint.keep=1", "checkpoint.every=16")
    assert "rolled back to iteration 16, the data go on: loss_flow_matching is " in output
    records = run.records()
    assert [record["iteration"] for record in records] == list(range(1, 41))
    assert max(record["loss"] for record in records) < 1e5
    assert run.description(40)["position"] == {"next_index": 40 + at + 1 - 16}
    assert (run.workdir / "halted" / f"batch_{at}.safetensors").exists()
    assert json.loads((run.workdir / "run.json").read_text())["config"]["faults"]["rollbacks"] == 1
