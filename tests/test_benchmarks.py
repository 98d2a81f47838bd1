"""The programs that measure training steps, on networks that compile in seconds: what they print and write."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import scaling, step
from rcm_jax.costs import pass_operations
from rcm_jax.methods import Recipe
from rcm_jax.models.wan import PRESETS

SMALL = ["model.preset=digits", "model.dtype=float32", "model.remat=block", "mesh.data=4", "mesh.fsdp=2"]


def test_a_step_is_measured_with_the_mesh_and_the_batch_of_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out, words = tmp_path / "step.json", ["--latent", "2", "4", "4", "--repeat=1", "--parts", "sCM step"]
    monkeypatch.setattr(sys, "argv", ["step", f"--out={out}", *words, "--override", *SMALL, "data.batch_size=8"])
    step.main()
    results = json.loads(out.read_text())
    (row,) = results["rows"]
    assert (row["part"], results["devices"]) == ("sCM step", 8)
    assert 0 < row["first"]["loss_scm"] < 1
    preset = PRESETS["digits"]
    one = pass_operations(preset, preset.tokens((2, 4, 4, 1)))
    assert row["tflop"] == pytest.approx(8 * step.tflop_of("sCM step", one, Recipe()))
    assert "| sCM step |" in capsys.readouterr().out


def test_the_gain_of_a_mesh_is_in_samples_a_second():
    def found(samples: int, seconds: float) -> dict:
        row = {"part": "sCM step", "seconds": seconds, "bytes": 2**30, "first": {"loss": 99.99932}}
        return {"samples": samples, "devices": 2, "rows": [row]}

    meshes = {"one device": found(1, 4.0), "fsdp": found(2, 4.0), "context": found(1, 2.5), "data": {"missing": "why"}}
    lines = scaling.table({"meshes": meshes}).splitlines()
    assert lines[3] == "| sCM step | fsdp | 2 | 2 | 4,000 | 2.00 | 1.0 | 99.9993 |"
    assert "| 1.60 |" in lines[4]
    assert "why" in lines[5]
