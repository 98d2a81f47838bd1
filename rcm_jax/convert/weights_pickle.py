"""Reads the pickles that hold weights, and refuses every other: nothing that a file names is imported or called.

A pickle is a program for a stack machine. This is such a machine, with the instructions that plain data needs. A class
or function that the file names must be in the caller's table, which says what stands in for it.
"""

import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rcm_jax.config import UserError
from rcm_jax.convert.tensors import refusal

# What stands in for a class or function, by "module name": a function of the arguments that the file gives.
StandIns = Mapping[str, Callable[..., Any]]

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_REMEDY = "export it with torch.save of a dict of tensors, or as safetensors"


class Record:
    """Stands for an instance of a class: the arguments and the state that the file gives it."""

    def __init__(self, *args: Any):
        self.args, self.state = args, {}


class _Global(str):
    """The name of a class or function that has a stand-in."""


def load_pickle(
    data: bytes, stand_ins: StandIns, where: Path | str, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The value of a pickle: dicts, lists, tuples, text, numbers and what the stand-ins return.

    Args:
        data: the pickle.
        stand_ins: the classes and functions that the file may name.
        where: the file, for errors.
        persistent: makes a value of a persistent id; without it the file must not have any.

    Raises:
        UserError: the pickle is damaged, or uses an instruction, a class or a function that plain weights do not need.
    """
    machine = _Machine(stand_ins, where, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise refusal(where, f"holds a damaged pickle ({type(error).__name__})", "fetch it again") from None
    return value


class _Machine:
    def __init__(self, stand_ins: StandIns, where: Path | str, persistent: Callable[[Any], Any] | None):
        self.stand_ins, self.where, self.persistent = stand_ins, where, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES or name in _TEXTS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name == "TUPLE":
            self.stack = self.marked.pop()
            self.stack.append(tuple(stack))
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
            self._add(name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(f"{stack.pop(-2)} {stack.pop()}" if name == "STACK_GLOBAL" else argument)
        elif name in ("REDUCE", "NEWOBJ"):
            self._make()
        elif name == "BUILD":
            self._fill()
        elif name == "BINPERSID" and self.persistent:
            stack.append(self.persistent(stack.pop()))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise refusal(self.where, f"uses {name}, which no pickle of weights needs, and is not run", _REMEDY)

    def _add(self, name: str) -> None:
        """Puts what lies above the mark, or the last item, into the dict or list below."""
        if name.endswith("S"):
            items, self.stack = self.stack, self.marked.pop()
        else:
            items = [self.stack.pop() for _ in range(2 if name == "SETITEM" else 1)][::-1]
        target = self.stack[-1]
        if name.startswith("APPEND") and isinstance(target, list):
            target.extend(items)
        elif name.startswith("SETITEM") and isinstance(target, dict) and len(items) % 2 == 0:
            for key in items[::2]:  # tuples are no keys: the hash of one that nests shared tuples takes forever
                if not isinstance(key, str | int | Record):
                    raise TypeError(key)
            target.update(zip(items[::2], items[1::2], strict=True))
        else:
            raise TypeError(name)

    def _name(self, name: str) -> None:
        if name not in self.stand_ins:
            dotted = name.replace(" ", ".")
            raise refusal(self.where, f"names {dotted}, which no weights need, and is not run", _REMEDY)
        self.stack.append(_Global(name))

    def _make(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Global) or not isinstance(arguments, tuple):
            raise TypeError(name)
        self.stack.append(self.stand_ins[name](*arguments))

    def _fill(self) -> None:
        """Gives a Record its state. A dict's is dropped: a state_dict's says versions of modules."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict):
            raise TypeError(target)
