"""Reading a recipe: `--config=FILE`, its overrides `--config.KEY=VALUE`, and the rules its values keep.

A recipe is a Python file with `get_config()` that returns an `ml_collections.ConfigDict`. The values in it fix the type
of every key; `config_dict.placeholder(type)` stands for a value that may be left out. Nothing here imports JAX, so a
mistake on the command line is reported at once.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import itertools
import math
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict, FieldReference

LOSSES = ("flow_matching", "scm", "sct", "dcm", "mean_flow", "mean_flow_scratch", "dmd", "gan")
SUMS = {"rcm": ("scm", "dmd"), "dmd2": ("dmd", "gan")}  # short names
CONSISTENCY = frozenset({"scm", "sct", "dcm"})  # forms of one loss
MEAN_FLOW = frozenset({"mean_flow", "mean_flow_scratch"})
FROM_TEACHER = frozenset({"scm", "dcm", "mean_flow", "dmd"})

LONGEST_MESSAGE = 4000  # characters; a value that is quoted may be longer than any screen


class UserError(ValueError):
    """A mistake the user can mend; `Command` prints it as one line, without a traceback."""

    def __init__(self, message: str):
        line = "".join(char if char.isprintable() else " " for char in message)
        half = LONGEST_MESSAGE // 2
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} ... {line[-half:]}")


class EarlyEnd(Exception):
    """A run ended before its last iteration, on purpose and in good order.

    `Command` prints the reason as one line and ends the process with `code`, which tells the program that started it
    what to do.
    """

    code: int


class Preempted(EarlyEnd):
    """The run was asked to end: start the same command again, it continues."""

    code = 75  # EX_TEMPFAIL of sysexits.h: a later attempt will succeed


class Halted(EarlyEnd):
    """Something is wrong that another start will not mend: somebody must look first."""

    code = 3


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training: the losses that are summed, and for how many iterations."""

    losses: frozenset[str]
    iterations: int


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Reads "dcm:200,scm:400,scm+dmd:1000" into stages, in order. "rcm" is short for "scm+dmd", "dmd2" for "dmd+gan".

    Raises:
        UserError: a stage is not LOSSES:ITERATIONS, a loss is unknown, repeated or cannot be joined with the others, or
            the number of iterations is not a positive integer.
    """
    return tuple(_parse_stage(stage) for stage in text.replace(" ", "").split(","))


def _parse_stage(text: str) -> Stage:
    where = f"stages: {text!r}"
    names, _, iterations = text.partition(":")
    losses = [loss for name in names.split("+") for loss in SUMS.get(name, (name,))]
    for loss in losses:
        if loss not in LOSSES:
            hint = _nearest(loss, (*LOSSES, *SUMS))
            raise UserError(f"{where} has no loss named {loss!r}: write LOSSES:ITERATIONS, as in scm+dmd:1000; {hint}")
    if len(set(losses)) < len(losses):
        raise UserError(f"{where} must name a loss once: rcm already means scm+dmd, dmd2 dmd+gan")
    if len(CONSISTENCY & set(losses)) > 1:
        raise UserError(f"{where} must have one of {', '.join(sorted(CONSISTENCY))}: they are forms of one loss")
    alone = sorted({"flow_matching", *MEAN_FLOW} & set(losses))
    if alone and len(losses) > 1:
        raise UserError(f"{where} must have {alone[0]} alone: its network predicts another thing than other losses'")
    if "gan" in losses and "dmd" not in losses:
        raise UserError(f"{where} has gan without dmd, whose fake score it reads: write dmd2:{iterations}")
    short = iterations.isascii() and iterations.isdecimal() and len(iterations) <= 10
    if not (short and 0 < int(iterations) < 2**31):
        raise UserError(f"{where} must end in a positive number of iterations below 2^31: write {names}:1000")
    return Stage(frozenset(losses), int(iterations))


def load(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Runs `get_config()` of the file at `path`, applies overrides such as "data.batch_size=64" and validates it all.

    Returns: the config, locked: no key can be added to it.

    Raises:
        UserError: the file cannot be read or run, an override names no key or has the wrong type, or a value breaks
            its rule.
    """
    config = _read(Path(path))
    for override in overrides:
        apply_override(config, override)
    validate(config)
    return config.lock()


def _read(path: Path) -> ConfigDict:
    try:
        source = path.read_text()
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}; give the path of a Python file") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {path} is not text: give the path of a Python file") from None
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source, path, "exec"), module.__dict__)
        if not callable(vars(module).get("get_config")):
            raise UserError(f"config file {path} has no get_config(): define one that returns a ConfigDict")
        config = module.get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"config file {error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [f", line {at.lineno}" for at in traceback.extract_tb(error.__traceback__) if at.filename == str(path)]
        message = " ".join(str(error).split())
        raise UserError(f"config file {path}{lines[-1] if lines else ''}: {type(error).__name__}: {message}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path}: get_config() must return a ConfigDict, not {type(config).__name__}")
    return config


def _flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The config's values by dotted key. A value that may be left out is its FieldReference, which knows its type."""
    flat = {}
    for key, value in config.items(preserve_field_references=True):
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return flat


def _nearest(name: str, known: Sequence[str]) -> str:
    """A hint for an unknown name: the known ones that end alike ("batch_size"), or the closest, or all of them."""
    same_end = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    close = same_end or difflib.get_close_matches(name, known, n=1)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def apply_override(config: ConfigDict, override: str) -> None:
    """Applies one such as "data.batch_size=64", in place. Raises UserError if it names no key or has the wrong type."""
    key, equals, text = override.partition("=")
    where = f"--config.{override}"
    flat = _flat(config)
    if key not in flat:
        members = [name for name in flat if name.startswith(f"{key}.")]
        hint = f"it is a group: set one of {', '.join(members)}" if members else _nearest(key, list(flat))
        raise UserError(f"{where}: no value is named {key}; {hint}")
    if not equals:
        raise UserError(f"{where} needs a value: write --config.{key}=VALUE")
    optional = isinstance(flat[key], FieldReference)
    kind = flat[key].get_type() if optional else type(flat[key])
    if kind is type(None):
        raise UserError(f"{where}: {key} is None in the config file; write config_dict.placeholder(TYPE) there")
    current = flat[key].get() if optional else flat[key]
    try:
        value = None if optional and text.lower() == "none" else _parse_value(text, kind, current)
    except (KeyError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        rule = f"must be of type {kind.__name__}{' or none' if optional else ''}"
        raise UserError(f"{where} {rule}: its value in the config file is {current!r}") from None
    config.update_from_flattened_dict({key: value})


def _parse_value(text: str, kind: type, current: Any) -> Any:
    """The value that `text` stands for; a tuple's elements are of the type that the current ones have."""
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is float and not math.isfinite(float(text)):
        raise ValueError(text)
    if kind in (int, float, str):
        return kind(text)
    if kind is not tuple:
        raise ValueError(text)
    elements = ast.literal_eval(text)
    elements = elements if isinstance(elements, tuple) else (elements,)
    return tuple(_parse_value(str(element), type(current[0]), None) for element in elements) if current else elements


def validate(config: ConfigDict) -> None:
    """Checks every value that a rule is known for.

    Raises:
        UserError: a key is missing or breaks its rule; the message holds the value, the rule and the remedy.
    """
    flat = {key: value.get() if isinstance(value, FieldReference) else value for key, value in _flat(config).items()}
    for key, (test, rule) in _RULES.items():
        if key not in flat:
            raise UserError(f"the config has no {key}: take it over from a recipe in configs/")
        if not _holds(test, flat[key]):
            raise UserError(
                f"{key}={flat[key]!r} must be {rule}: change it in the config file or with --config.{key}=VALUE"
            )
    _check_methods(flat, {loss for stage in parse_stages(flat["stages"]) for loss in stage.losses})
    warmup, decay_from, decay_to = (flat[f"optimizer.{key}"] for key in ("warmup", "decay_from", "decay_to"))
    if decay_to and not warmup <= decay_from < decay_to:
        raise UserError(
            f"optimizer.{decay_from=} must be at least optimizer.{warmup=} and less than optimizer.{decay_to=}: "
            "change one of them, or set optimizer.decay_to=0 for a rate that does not fall"
        )
    batch_size, accumulate = flat["data.batch_size"], flat["data.accumulate"]
    if batch_size % accumulate:
        near = max(batch_size // accumulate, 1) * accumulate
        raise UserError(
            f"data.{batch_size=} must be a multiple of data.{accumulate=}: set --config.data.batch_size={near}"
        )


def _check_methods(flat: dict[str, Any], losses: set[str]) -> None:
    """What the losses of all stages ask of other values."""
    if flat["model.lora_rank"] and not losses & FROM_TEACHER:
        raise UserError("model.lora_rank adapts a teacher, and no stage has one: set it to 0")
    if flat["model.critic_lora_rank"] and "dmd" not in losses:
        raise UserError("model.critic_lora_rank adapts a fake score, and no stage has dmd: set it to 0")
    if "teacher" in flat["host_memory"] and not losses & FROM_TEACHER:
        raise UserError(f"host_memory={flat['host_memory']} names a teacher, and no stage has one: leave it out")
    times, steps = flat["loss.simulation_times"], flat["loss.simulation_steps"]
    if times and len(times) != steps - 1:
        raise UserError(
            f"loss.simulation_times={times} must be one fewer than loss.simulation_steps={steps}, or none, for the "
            f"first is pi/2: set --config.loss.simulation_steps={len(times) + 1}"
        )
    lowest, highest = flat["loss.rf_range"]
    if (lowest, highest) == (0, 1):
        return
    if "dcm" in losses:
        raise UserError("loss.rf_range bounds drawn times, dcm has a grid of all: set it to 0.0,1.0 or use scm")
    for t in times:
        s = math.sin(t) / (math.sin(t) + math.cos(t))
        if not lowest <= s <= highest:
            raise UserError(f"loss.simulation_times has {t}, RF time {s:.3f}, outside loss.rf_range: leave it out")


def _falling(times: Sequence[float]) -> bool:
    return all(high > low for high, low in itertools.pairwise((math.pi / 2, *times, 0.0)))


Rule = tuple[Callable[[Any], bool], str]

_POSITIVE_INTEGER: Rule = (lambda value: type(value) is int and 1 <= value < 2**31, "a positive integer below 2^31")
_COUNT: Rule = (lambda value: type(value) is int and 0 <= value < 2**31, "an integer of at least 0 and below 2^31")
_NUMBER: Rule = (lambda value: -math.inf < value < math.inf, "a finite number")
_TEXT: Rule = (lambda value: isinstance(value, str), "text, perhaps empty")
_OPTIONAL_TEXT: Rule = (lambda value: value is None or isinstance(value, str), "text, or none")
_SWITCH: Rule = (lambda value: isinstance(value, bool), "True or False")
_POSITIVE: Rule = (lambda value: 0 < value < math.inf, "a positive number")
_WEIGHT: Rule = (lambda value: 0 <= value < math.inf, "a number of at least 0")
_DECAY_RATE: Rule = (lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
_FALLING_TIMES: Rule = (_falling, "TrigFlow times that fall, each between 0 and pi/2")
_HOST_MEMORY: Rule = (
    lambda value: value in ("", "teacher", "ema", "teacher,ema", "ema,teacher"),
    "teacher, ema, both with a comma between them, or empty",
)
_MESH_SIZE: Rule = (
    lambda value: type(value) is int and (value == -1 or 1 <= value < 2**31),
    "a positive integer, or -1 for the devices that are left",
)

_RULES: dict[str, Rule] = {
    "seed": _COUNT,
    "stages": (lambda value: isinstance(value, str), "stages such as 'scm:400,scm+dmd:1000'"),
    "deterministic": _SWITCH,
    "model.preset": _TEXT,
    "model.lora_rank": _COUNT,
    "model.critic_lora_rank": _COUNT,
    "model.dtype": (lambda value: value in ("float32", "bfloat16"), "float32 or bfloat16"),
    "model.ulysses": _COUNT,
    "teacher.path": _OPTIONAL_TEXT,
    "teacher.negative_path": _OPTIONAL_TEXT,
    "teacher.caption_dropout": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "teacher.guidance": (lambda value: 1 <= value < math.inf, "a number of at least 1 (no guidance)"),
    "data.name": _TEXT,
    "data.dir": _TEXT,
    "data.in_memory": _SWITCH,
    "data.batch_size": _POSITIVE_INTEGER,
    "data.accumulate": _POSITIVE_INTEGER,
    "optimizer.student_lr": _POSITIVE,
    "optimizer.critic_lr": _POSITIVE,
    "optimizer.weight_decay": _WEIGHT,
    "optimizer.b1": _DECAY_RATE,
    "optimizer.b2": _DECAY_RATE,
    "optimizer.warmup": _COUNT,
    "optimizer.decay_from": _COUNT,
    "optimizer.decay_to": _COUNT,
    "loss.scm_weight": (lambda value: value is None or 0 <= value < math.inf, "a number of at least 0, or none"),
    "loss.dmd_weight": _WEIGHT,
    "loss.gan_weight": _WEIGHT,
    "loss.gan_critic_weight": _WEIGHT,
    "loss.tangent": (
        lambda value: value in ("exact", "semicontinuous", "discrete"),
        "exact, semicontinuous or discrete",
    ),
    "loss.tangent_step": (lambda value: 0 < value < 0.1, "a number above 0 and below 0.1"),
    "loss.tangent_warmup": _COUNT,
    "loss.student_update_freq": _POSITIVE_INTEGER,
    "loss.simulation_steps": _POSITIVE_INTEGER,
    "loss.simulation_times": _FALLING_TIMES,
    "loss.p_G_mean": _NUMBER,
    "loss.p_G_std": _POSITIVE,
    "loss.p_D_shift": _POSITIVE,
    "loss.rf_range": (
        lambda value: len(value) == 2 and 0 <= value[0] < value[1] <= 1,
        "two RF times that rise, from 0 to 1, as in (0.0, 1.0)",
    ),
    "loss.mean_flow_share": (lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "loss.mean_flow_power": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "loss.dcm_steps": (lambda value: type(value) is int and value >= 2, "an integer of at least 2"),
    "loss.dcm_shift": _POSITIVE,
    "ema.sigma_rel": (lambda value: 0 < value < 12**-0.5, "a number above 0 and below 0.2886"),
    "host_memory": _HOST_MEMORY,
    "mesh.data": _MESH_SIZE,
    "mesh.fsdp": _MESH_SIZE,
    "mesh.context": _MESH_SIZE,
    "mesh.tensor": _MESH_SIZE,
    "checkpoint.every": _POSITIVE_INTEGER,
    "checkpoint.keep": _POSITIVE_INTEGER,
    "checkpoint.keep_every": _COUNT,
    "checkpoint.best": _TEXT,
    "faults.hang_seconds": _WEIGHT,
    "faults.max_skipped": _COUNT,
    "faults.max_loss_ratio": _WEIGHT,
    "faults.max_bad_data": _DECAY_RATE,
    "faults.rollbacks": _COUNT,
    "log.every": _POSITIVE_INTEGER,
    "log.sample_every": _COUNT,
    "log.samples": _POSITIVE_INTEGER,
    "log.wandb": _OPTIONAL_TEXT,
    "sampling.sigma_max": _POSITIVE,
    "sampling.mid_times": _FALLING_TIMES,
    "sampling.teacher_steps": _POSITIVE_INTEGER,
    "sampling.teacher_shift": _POSITIVE,
}


def _holds(test: Callable[[Any], bool], value: Any) -> bool:
    try:
        return test(value)
    except TypeError:
        return False


class Command(argparse.ArgumentParser):
    """The command line of a launcher: the options added to it and, through `parse`, the recipe.

    A mistake ends the process with one line on stderr and exit code 2.
    """

    def __init__(self, description: str | None):
        spec = sys.modules["__main__"].__spec__
        super().__init__(
            prog=f"python -m {spec.name}" if spec else None,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, ConfigDict]:
        """Reads --config=FILE, any --config.KEY=VALUE and the options added before, of `argv` or this process's own."""
        arguments, config = self._parse(argv, required=True)
        assert config is not None
        return arguments, config

    def parse_optional(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, ConfigDict | None]:
        """As `parse`, but the recipe may be left out."""
        return self._parse(argv, required=False)

    def _parse(self, argv: Sequence[str] | None, *, required: bool) -> tuple[argparse.Namespace, ConfigDict | None]:
        self.add_argument(
            "--config", metavar="FILE", required=required, help="the recipe, for example configs/digits_rcm.py"
        )
        self.add_argument("--config.KEY", metavar="VALUE", help="changes one value of the recipe; may be repeated")
        rest, overrides = [], []
        words = iter(sys.argv[1:] if argv is None else argv)
        for word in words:
            if word.startswith("--config."):
                override = word.removeprefix("--config.")
                overrides.append(override if "=" in override else f"{override}={next(words, '')}")
            else:
                rest.append(word)
        arguments = self.parse_args(rest)
        with self.reports_user_errors():
            if arguments.config is None and overrides:
                raise UserError(f"--config.{overrides[0]} changes a recipe: name it with --config=FILE")
            return arguments, load(arguments.config, overrides) if arguments.config is not None else None

    @contextlib.contextmanager
    def reports_user_errors(self) -> Iterator[None]:
        """Within this context a UserError ends the process as any other mistake on the command line does.

        An EarlyEnd does so with its own exit code.
        """
        try:
            yield
        except UserError as error:
            self.error(str(error))
        except EarlyEnd as end:
            self.exit(end.code, f"{self.prog}: {end}\n")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")
