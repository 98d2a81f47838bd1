"""`python -m benchmarks.pair`, shortened: what two processes began, and lost one of in a save, one device ends."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_one_device_ends_what_two_processes_began(tmp_path):
    out = tmp_path / "pair.json"
    command = [sys.executable, "-m", "benchmarks.pair", "--steps=40", "--moments=save"]
    command += [f"--workdir={tmp_path / 'pair'}", f"--out={out}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert result["agree"] is True
    for case in result["killed at"].values():
        assert case["devices before and after"] == [2, 1]
        assert 0 < case["saved"] <= case["reached"] < 40
        assert -9 in case["exit codes"]
        assert 0 not in case["exit codes"]
        assert case["weights"] > 0  # a run that was not on two devices for a while would be identical
