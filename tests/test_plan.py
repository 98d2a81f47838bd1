"""`launch.compile`: tiny steps for TPUs and GPUs that are not there, sized by their compilers and by hand."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tiny_recipe
from launch import compile as launch_compile
from pallas_kernels import hopper
from pallas_kernels.attention import choose_back_end
from rcm_jax import chips, plan, sharding, train
from rcm_jax.config import LOSSES, load
from rcm_jax.schedule import Phase

RECIPE = tiny_recipe.__file__
WORDS = [f"--config={RECIPE}", "--config.mesh.fsdp=4"]
SMALL = ["--latent", "4", "8", "8"]


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(words)` gives exit code and output."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["compile", *words])
        try:
            launch_compile.main()
        except SystemExit as exit_:
            return exit_.code, capsys.readouterr()
        finally:
            jax.config.update("jax_enable_compilation_cache", True)

    return run


@pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("h100:2x2", marks=pytest.mark.cuda)])
def test_a_step_that_fits_is_sized(topology, run, tmp_path):
    code, printed = run(*WORDS, *SMALL, f"--topology={topology}", f"--out={tmp_path / 'plan.json'}")
    assert code == 0, printed.err
    numbers = json.loads((tmp_path / "plan.json").read_text())
    (step,) = numbers["steps"]
    assert (numbers["devices"], step["step"], step["iterations"]) == (4, "student, flow_matching", 40)

    config = load(RECIPE, ["mesh.fsdp=4"])
    mesh = sharding.make_mesh(fsdp=4, devices=jax.devices()[:4])
    state = train.abstract_state(config, train.create_networks(config), train.create_optimizers(config), mesh)
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # The state, and a batch of two samples; a TPU pads the last two axes of an array to tiles of 8 x 128.
    assert held < step["memory"]["arguments"] * 2**30 < 3 * held
    assert step["memory"]["total"] == pytest.approx(sum(list(step["memory"].values())[:-1]))
    assert sum(step["received_gb"].values()) * 1e9 > held / 3  # of a state that holds student, EMA and optimiser
    assert step["seconds"]["least"] == max(list(step["seconds"].values())[:-1])
    assert "student, flow_matching: 40 iterations" in printed.out
    assert "all fit; 40 iterations take at least" in printed.out


def test_steps_that_keep_things_in_the_hosts_memory_compile_for_tpus(run):
    """libtpu takes fewer operations on such arrays than a CPU."""
    words = [
        "--config.stages=rcm:9",
        "--config.loss.tangent_warmup=1",
        "--config.model.remat=offload",
        "--config.host_memory=teacher,ema",
    ]
    code, printed = run(*WORDS, *SMALL, *words, "--topology=v5e:2x2")
    assert code == 0, printed.err
    assert "critic: " in printed.out
    assert "student, dmd+scm: " in printed.out


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:2x2", "does not fit: RESOURCE_EXHAUSTED"),
        pytest.param("h100:1x4", " of 75.1: does not fit", marks=pytest.mark.cuda),
    ],
)
def test_a_step_that_does_not_fit_is_said_to_be_too_large(topology, message, run):
    code, printed = run(*WORDS, "--latent", "800", "800", "800", f"--topology={topology}")
    assert code == 1
    assert message in printed.out
    assert "all fit" not in printed.out


@pytest.mark.cuda
@pytest.mark.parametrize("name", chips.GPUS)
def test_gpus_that_are_not_there_are_as_they_would_be(name):
    devices = chips.topology_devices(f"{name}:2x4")
    assert [device.process_index for device in devices] == [0] * 4 + [1] * 4
    assert {device.device_kind for device in devices} == {chips.GPUS[name]} <= chips.CHIPS.keys()
    queries = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with jax.default_device(devices[0]):
        assert choose_back_end("auto", queries) is hopper


@pytest.mark.parametrize(("hosts", "memory", "notes"), [(1, 50.0, 0), (2, 50.0, 1), (1, 70.0, 1), (2, 70.0, 2)])
def test_what_numbers_of_gpus_leave_out_is_said(hosts, memory, notes):
    """Traffic between hosts, and memory that JAX does not take by default: 59.3 of 79.1 GiB."""
    devices = [SimpleNamespace(platform="gpu", device_kind=chips.GPUS["h100"], process_index=i) for i in range(hosts)]
    said = list(plan.gpu_notes([{"fits": True, "memory": {"total": memory}}], devices))
    assert len(said) == notes
    assert any("between hosts" in note for note in said) == (hosts > 1)
    assert any("XLA_CLIENT_MEM_FRACTION=0.95" in note for note in said) == (memory > 59.3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v9z:2x2"], "--topology=v9z:2x2: "),
        (["--topology=v5e"], "name a chip and the shape of its slice, as v5e:8x8"),
        (["--topology=h200:8"], "--topology=h200:8: '8' is no number of hosts x GPUs of a host; "),
        (["--topology=h300:1x8"], 'install "jax[cuda13-local]"'),
        (
            ["--topology=v5e:2x4", "--config.data.batch_size=12"],
            "data.batch_size=12 must be a multiple of mesh.data * mesh.fsdp = 8: set it to 16",
        ),
        pytest.param(
            ["--topology=h200:1x4", "--config.stages=dmd:9", "--config.host_memory=ema"],
            "host_memory=ema needs the memory of hosts",
            marks=pytest.mark.cuda,
        ),
        pytest.param(
            ["--topology=h200:1x4", "--config.model.remat=offload"],
            "model.remat=offload needs the memory",
            marks=pytest.mark.cuda,
        ),
        (["--topology=v5e:2x4", "--latent", "8", "17", "16"], "latents of (8, 17, 16, 1) do not fit model.preset="),
        ([], "the peak rates of 'cpu' are not known: name TPUs or GPUs with --topology"),
    ],
)
def test_a_mistake_is_one_line(words, message, run):
    code, printed = run(f"--config={RECIPE}", *SMALL, *words)
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_method_of_unknown_cost_is_named_before_anything_is_compiled(run, monkeypatch):
    monkeypatch.setattr("rcm_jax.config.LOSSES", (*LOSSES, "ict"))
    monkeypatch.setattr(plan, "lower_step", lambda *_: pytest.fail("a step was lowered"))
    code, printed = run(*WORDS, *SMALL, "--topology=v5e:2x2", "--config.stages=scm:2,ict:3")
    assert code == 2
    assert printed.err.endswith("what ict costs is not known: add it to step_operations in rcm_jax/costs.py\n")
    assert printed.err.count("\n") == 1


def test_the_phases_of_a_run_are_counted():
    config = load("configs/wan2_1_t2v_1_3b.py", ["stages=rcm:100", "loss.tangent_warmup=20"])
    student = frozenset({"scm", "dmd"})
    assert plan.count_phases(config) == {
        Phase("student", frozenset({"scm"}), 1.0): 20,
        Phase("student", student, 1.0): 16,
        Phase("critic", frozenset(), 1.0): 64,
    }
