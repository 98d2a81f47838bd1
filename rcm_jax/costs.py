"""What a training step costs: operations, counted from the model, and communication, read from the program."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from rcm_jax.config import UserError
from rcm_jax.methods import Recipe
from rcm_jax.models.blocks import Remat
from rcm_jax.models.wan import WanConfig
from rcm_jax.schedule import Phase

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Operations(NamedTuple):
    """TFLOP for a sample: a forward pass, what its tangent adds, its gradient; and a forward pass without attention."""

    forward: float
    tangent: float
    gradient: float
    linear: float


def pass_operations(preset: WanConfig, tokens: int) -> Operations:
    """Those of the products and the attention of all blocks."""
    linear = 2 * tokens * (6 * preset.dim**2 + 2 * preset.dim * preset.ffn_dim)
    linear += 2 * preset.text_length * 2 * preset.dim**2
    attention = 4 * tokens * (tokens + preset.text_length) * preset.dim
    counts = linear + attention, linear + 2 * attention, 2 * linear + 2.5 * attention, linear
    return Operations(*(preset.layers * count * 1e-12 for count in counts))


def step_operations(one: Operations, phase: Phase, recipe: Recipe, remat: Remat | None = None) -> float:
    """TFLOP of one sample's part of an update, on average over the lengths of the backward simulation.

    With `remat`, what the backward pass makes again counts too.

    Raises UserError for a loss whose cost is not known.
    """
    made_again = {"attention": one.linear, "offload": one.linear, "block": one.forward}  # see models/blocks.py
    again = made_again.get(remat or "none", 0.0)
    learn = one.forward + one.gradient + again
    teacher = one.forward * (1 if recipe.guidance == 1 else 2)
    simulation = (recipe.simulation_steps - 1) / 2 * one.forward
    # The GAN's logit comes from the middle of the fake score.
    judge = 0.5 * learn if "gan" in phase.losses else 0.0
    if phase.update == "critic":
        return simulation + one.forward + learn + judge
    with_tangent = one.tangent + learn
    consistency = {
        "exact": with_tangent,
        "semicontinuous": with_tangent + one.forward,
        "discrete": one.forward + learn,
    }[recipe.tangent]
    parts = {
        "flow_matching": learn,
        "scm": teacher + consistency,
        "sct": consistency,
        "dcm": teacher + one.forward + learn,
        "mean_flow": teacher + with_tangent,
        "mean_flow_scratch": one.forward + with_tangent,
        "dmd": simulation + learn + one.forward + teacher,
        "gan": judge - 0.5 * one.forward - 0.5 * one.linear,  # the forward pass is DMD's, the weights do not learn
    }
    if unknown := phase.losses - parts.keys():
        raise UserError(f"what {min(unknown)} costs is not known: add it to step_operations in rcm_jax/costs.py")
    return sum(parts[name] for name in phase.losses)


def received_bytes(program: str, dynamic_trips: float) -> dict[str, float]:
    """Bytes that a device receives in each kind of collective, in one run of a compiled program's text.

    What stands in a loop counts as often as the loop runs. A loop whose length the program computes itself, as the
    backward simulation's is, counts as `dynamic_trips`.
    """
    computations, entry, sizes = _parse(program)
    received: dict[str, float] = {}

    def visit(name: str, times: float) -> None:
        for line in computations[name]:
            if collective := re.search(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\((.*?)\)", line):
                kind, operands = collective.groups()
                # For TPUs, a reduce-scatter is written as a computation that cuts the result of an all-reduce.
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                operand_bytes = sum(sizes[operand] for operand in re.findall(r"%([\w.-]+)", operands))
                received[kind] = received.get(kind, 0.0) + times * operand_bytes * _share(kind, line)
            trips = _trips(line, computations, dynamic_trips)
            for callee in _callees(line):
                visit(callee, times * trips)

    visit(entry, 1.0)
    return received


def _parse(program: str) -> tuple[dict[str, list[str]], str, dict[str, float]]:
    """The lines of each computation, the name of the first to run, and the bytes of each instruction's result."""
    computations, entry, sizes, lines = {}, "", {}, []
    for line in program.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) [\w-]+\(", line):
            lines.append(line)
            sizes[instruction[1]] = _bytes(instruction[2])
    return computations, entry, sizes


def _bytes(shape: str) -> float:
    """Bytes of "bf16[2,3]{1,0}" or of a tuple of such."""
    total = 0.0
    for dtype, dims in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += bits / 8 * math.prod(int(dim) for dim in dims.split(",") if dim)
    return total


def _share(kind: str, line: str) -> float:
    """Bytes received for each byte of the operand."""
    if kind == "collective-permute":
        return 1.0
    group = _group_size(line)
    return {"all-gather": group - 1.0, "all-reduce": 2 * (group - 1) / group}.get(kind, (group - 1) / group)


def _group_size(line: str) -> int:
    """Devices that take part in one collective, as XLA writes it: {{0,1},{2,3}}, [2,4]<=[8], or axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in mesh[2].split(","))
    raise ValueError(
        f"no devices are known of the collective {line.strip()!r}: teach costs.py how this XLA writes them"
    )


def _callees(line: str) -> Iterator[str]:
    for names in re.findall(
        r"(?:body|calls|to_apply|branch_computations|\w+_computation)=\{?(%[^\s},]+(?:, ?%[^\s},]+)*)", line
    ):
        yield from re.findall(r"%([\w.-]+)", names)


def _trips(line: str, computations: dict[str, list[str]], dynamic_trips: float) -> float:
    """How often a loop runs: as XLA says, or as the constant that its counter is compared with."""
    condition = re.search(r" while\(.*condition=%([\w.-]+)", line)
    if not condition:
        return 1.0
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return float(known[1])
    constants = re.findall(r" s32\[\].*? constant\((\d+)\)", "\n".join(computations[condition[1]]))
    return float(constants[0]) if len(constants) == 1 else dynamic_trips
