"""What holds for the repository as a whole: its recipes, launchers, requirements and Makefile."""

import ast
import re
import runpy
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from rcm_jax.config import load

ROOT = Path(__file__).parent.parent
PACKAGES = ("rcm_jax", "pallas_kernels", "configs", "launch")
SOURCES = sorted(path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py"))
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")
OPTIONAL = {"wandb"}  # imported only by a run that asks for it
LAUNCHERS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.name != "__init__.py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}


def requirements(file: str) -> set[str]:
    """Names of the packages that a requirements file lists, as PyPI compares them."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if re.match(r"\w", line)]
    return {normalised(re.split(r"[\[<>=!~ ]", line)[0]) for line in lines}


def normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_stays_short(path: Path):
    assert len(path.read_text().splitlines()) <= 700


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_private_jax_and_the_broken_num_programs_are_not_used(path: Path):
    """On jax 0.11 `num_programs` of Pallas can return an earlier call's grid (jax-ml/jax#40847)."""
    assert not [module for module in imports(path) if module.startswith("jax._src")]
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"_src", "num_programs"}


def test_every_imported_package_is_required():
    distributions = packages_distributions()
    run, dev = requirements("requirements.txt"), requirements("requirements-dev.txt")
    parity = requirements("requirements-parity.txt")
    for path in SOURCES:
        known = run | dev if path.is_relative_to(ROOT / "tests") else run
        known = known | parity if path.is_relative_to(ROOT / "tests" / "parity") else known
        modules = {module.partition(".")[0] for module in imports(path)}
        tests = {test.stem for test in SOURCES}  # those on a GPU build on others
        own = {*PACKAGES, "benchmarks"}
        for module in modules - set(sys.stdlib_module_names) - own - OPTIONAL - tests:
            providers = {normalised(provider) for provider in distributions.get(module, [module])}
            assert providers & known, f"{name(path)} imports {module}, which no requirements file lists"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_loads_and_keeps_the_rules(path: Path):
    assert load(path).is_locked


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_explains_itself(launcher: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, f"launch.{launcher}", raising=False)
    monkeypatch.setattr(sys, "argv", [launcher, "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(f"launch.{launcher}", run_name="__main__")
    assert exit_.value.code == 0
    assert f"python -m launch.{launcher}" in capsys.readouterr().out


def test_a_mistake_on_the_command_line_is_one_line_before_anything_is_written(tmp_path: Path):
    words = ["--config=configs/digits_rcm.py", f"--workdir={tmp_path / 'run'}", "--config.data.batch_sise=4"]
    run = subprocess.run(
        [sys.executable, "-m", "launch.train", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.endswith("did you mean data.batch_size?\n")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_line_is_read_without_importing_jax():
    """Importing JAX takes seconds; a mistyped option should not."""
    script = "import sys, rcm_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


FAKE_PYTHON = """#!/bin/sh
# Stands in for Python {version}: logs what it is asked for; pip fails while the file "offline" exists.
case "$1 $2" in
"-c import sys; print"*) echo {version} ;;
"-c import sys; sys.exit"*) exit {too_old} ;;
"-m venv")
    echo venv >> {log}
    rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && cp "$0" "$4/bin/python{version}" ;;
"-m pip") echo "pip ${{7}}" >> {log}; test ! -e {directory}/offline ;;
*) echo "$*" >> {log} ;;
esac
"""


class Make:
    """Runs make with a stand-in for Python, and reports what that was asked for."""

    def __init__(self, directory: Path):
        self.directory, self.log = directory, directory / "log"
        for file in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
            (directory / file.name).write_text(file.read_text())

    def __call__(self, target: str, version: str = "3.11") -> tuple[int, list[str]]:
        python = self.directory / f"python{version}"
        too_old = int(tuple(map(int, version.split("."))) < (3, 11))
        python.write_text(FAKE_PYTHON.format(version=version, too_old=too_old, log=self.log, directory=self.directory))
        python.chmod(0o755)
        self.log.write_text("")
        command = ["make", "--no-print-directory", target, f"PYTHON={python}", "VENV=.venv", "ARGS=-x"]
        self.run = subprocess.run(command, cwd=self.directory, capture_output=True, text=True, check=False)
        return self.run.returncode, self.log.read_text().splitlines()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


DEMO = "-m launch.demo --workdir=runs/demo"
TEST = "-m pytest -n auto --dist loadfile --no-loadscope-reorder -x"


def test_make_installs_once_and_again_when_requirements_change(make: Make):
    assert make("demo") == (0, ["venv", "pip requirements.txt", DEMO])
    assert make("demo") == (0, [DEMO])
    assert make("test") == (0, ["pip requirements-dev.txt", TEST])
    assert make("test") == (0, [TEST])
    (make.directory / "requirements-dev.txt").touch()
    assert make("demo") == (0, [DEMO])
    assert make("test") == (0, ["pip requirements-dev.txt", TEST])
    (make.directory / "requirements.txt").touch()
    assert make("test") == (0, ["pip requirements.txt", "pip requirements-dev.txt", TEST])


@pytest.mark.parametrize(
    ("target", "tests"),
    [
        ("parity", "-m pytest tests/parity -n auto --dist loadfile -x"),
        ("cuda", "-m pytest tests/test_plan.py -m cuda -x"),
    ],
)
def test_only_the_target_that_needs_them_installs_pytorch_and_cuda(target: str, tests: str, make: Make):
    files = ["pip requirements.txt", "pip requirements-dev.txt", f"pip requirements-{target}.txt"]
    assert make(target) == (0, ["venv", *files, tests])
    assert make(target) == (0, [tests])
    assert make("test") == (0, [TEST])


def test_make_starts_afresh_where_an_install_was_broken_off(make: Make):
    (make.directory / "offline").touch()
    assert make("demo") == (2, ["venv", "pip requirements.txt"])
    assert make("demo") == (2, ["venv", "pip requirements.txt"])
    (make.directory / "offline").unlink()
    assert make("demo") == (0, ["venv", "pip requirements.txt", DEMO])


def test_make_starts_afresh_for_another_python(make: Make):
    assert make("demo", "3.11") == (0, ["venv", "pip requirements.txt", DEMO])
    assert make("demo", "3.12") == (0, ["venv", "pip requirements.txt", DEMO])
    assert make("demo", "3.12") == (0, [DEMO])


def test_make_refuses_an_older_python(make: Make):
    assert make("demo", "3.10") == (2, [])
    assert "is not Python 3.11 or newer: set PYTHON=/path/to/python3.11 after make" in make.run.stderr
    assert not (make.directory / ".venv").exists()
