"""Renames and reshapes weights between our pytrees and the tensors of PyTorch projects, one tensor at a time.

A table gives, for each of our modules by dotted path, another project's name for it; "{}" in that name stands for the
number of the block. Their weight of a linear layer is our kernel transposed, their norm's weight our scale.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from rcm_jax.config import UserError

Table = Mapping[str, str]

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def make_table(
    modules: Sequence[tuple[str, ...]], block_modules: Sequence[tuple[str, ...]], *, column: int, blocks: str
) -> Table:
    """The table from rows of (our name, one project's, another's, ...), of which `column` is read.

    `block_modules` are named within a block; `blocks` is what the project calls the list of blocks.
    """
    table = {row[0]: row[column] for row in modules}
    return table | {f"blocks.{row[0]}": f"{blocks}.{{}}.{row[column]}" for row in block_modules}


def their_names(path: str, layers: int, table: Table) -> list[str]:
    """Names of the tensors that make up our parameter at `path`: one for each block if it is stacked, else one.

    `layers` is the number of blocks. Raises KeyError for a path that the table lacks.
    """
    module, _, leaf = path.rpartition(".")
    name = f"{table[module]}.{LEAVES[leaf]}" if leaf in LEAVES else table[path]
    return [name.format(layer) for layer in range(layers)] if is_stacked(path) else [name]


def is_stacked(path: str) -> bool:
    """Whether a parameter's leading axis counts blocks."""
    return path.startswith("blocks.")


def to_theirs(path: str, array: np.ndarray) -> np.ndarray:
    """One block's slice of the parameter at `path`, shaped as PyTorch holds it."""
    if path.endswith(".kernel"):
        return array.T
    return array[None] if path.endswith("modulation") else array


def from_theirs(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of to_theirs; also reads a convolution over whole patches, which is a matrix once flattened."""
    if path.endswith(".kernel"):
        return array.reshape(len(array), -1).T
    return array[0] if path.endswith("modulation") and len(array) == 1 else array


def rename_params(params: dict[str, Any], table: Table) -> dict[str, np.ndarray]:
    """All parameters by their names, in their shapes, as numpy arrays of the dtype they have."""
    tensors = {}
    for path, value in flat(params).items():
        stacked = np.asarray(jax.device_get(value))
        stacked = stacked if is_stacked(path) else stacked[None]
        for name, array in zip(their_names(path, len(stacked), table), stacked, strict=True):
            tensors[name] = to_theirs(path, array)
    return tensors


def collect_params(
    tensors: Mapping[str, Any], abstract_params: dict[str, Any], table: Table, *, source: str = "checkpoint"
) -> dict[str, Any]:
    """Parameters with the structure, shapes and dtypes of `abstract_params`, from tensors by their names.

    Raises UserError that lists every missing, unexpected or wrong-shaped tensor of `source` by name.
    """
    faults, values, expected = [], {}, set()
    for path, leaf in flat(abstract_params).items():
        layers, shape = (leaf.shape[0], leaf.shape[1:]) if is_stacked(path) else (1, leaf.shape)
        arrays = []
        for name in their_names(path, layers, table):
            expected.add(name)
            if name not in tensors:
                faults.append(f"missing {name}")
                continue
            array = from_theirs(path, np.asarray(tensors[name]))
            if array.shape != shape:
                faults.append(f"{name} has shape {tuple(np.shape(tensors[name]))}, the network's {path} takes {shape}")
            arrays.append(array.astype(leaf.dtype))
        if not faults:
            values[path] = np.stack(arrays) if is_stacked(path) else arrays[0]
    faults += [f"unexpected {name}" for name in sorted(set(tensors) - expected)]
    if faults:
        raise UserError(f"{source} does not fit the network, nothing was loaded: " + "; ".join(faults))
    return traverse_util.unflatten_dict(values, sep=".")


def list_faults(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every tensor, by name, that is missing, unexpected or of another shape than expected."""
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [
        f"{name} has shape {found[name]}, the network takes {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    return faults + [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]


def flat(params: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a nested dict by dotted path."""
    return dict(traverse_util.flatten_dict(params, sep="."))
