"""`python -m benchmarks.soak`, shortened: killed at random moments, a run ends as one that was left alone."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_run_killed_at_random_ends_as_if_left_alone(tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--kills=2", "--seed=3", f"--workdir={tmp_path / 'soak'}"]
    run = subprocess.run([*command, f"--out={out}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert (result["kills"], result["identical"], result["set aside"]) == (2, True, 0)
