"""One run at a time writes to a folder."""

import pytest

from rcm_jax.config import UserError
from rcm_jax.lifetime import sole_run


def test_a_second_run_in_a_folder_is_refused_and_the_next_one_is_not(tmp_path):
    with sole_run(tmp_path / "run"):
        message = r"run is in use by process \d+ of .*: end it, or use another folder"
        with pytest.raises(UserError, match=message), sole_run(tmp_path / "run", wait=0.0):
            pytest.fail("two runs in one folder")
        (tmp_path / "run" / "metrics.jsonl").touch()
    with sole_run(tmp_path / "run", wait=0.0):
        pass
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="a mistake"), sole_run(tmp_path / "a" / "run"):
        raise UserError("a mistake")
    assert not (tmp_path / "a" / "run").exists()
