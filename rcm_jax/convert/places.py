"""Parameters from the tensors of a published checkpoint, given the place of each.

Arrays differ only in the order of their axes: our kernels are (window..., in, out), published weights
(out, in, window...), with axes of length 1 added or dropped.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from rcm_jax.config import UserError
from rcm_jax.convert.names import LEAVES, flat, list_faults


class Place(NamedTuple):
    """A published tensor's name and shape."""

    name: str
    shape: tuple[int, ...]


# (path, shape) of one of our parameters -> its place; if it is stacked over layers, a list of one place a layer.
Table = Callable[[str, tuple[int, ...]], Place | list[Place]]


def named_table(names: Mapping[str, str]) -> Table:
    """The table of a network from our modules' names, or parameters', to the published ones.

    "{}" stands for the number of the layer in the names of stacked parameters.
    """

    def table(path: str, shape: tuple[int, ...]) -> Place | list[Place]:
        module, _, leaf = path.rpartition(".")
        name = names[path] if path in names else f"{names[module]}.{LEAVES[leaf]}"
        if "{}" not in name:
            return Place(name, published_shape(path, shape))
        return [Place(name.format(layer), published_shape(path, shape[1:])) for layer in range(shape[0])]

    return table


def published_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the parameter at `path`, of one layer, as PyTorch has it."""
    if not path.endswith("kernel"):
        return shape
    *window, in_dim, out_dim = shape
    return (out_dim, in_dim, *window)


def params_from_published(
    tensors: Mapping[str, Any],
    abstract_params: dict[str, Any],
    table: Table,
    *,
    source: str = "checkpoint",
    read: Callable[[Any], np.ndarray] = np.asarray,
) -> dict[str, Any]:
    """Parameters with the structure, shapes and dtypes of `abstract_params`, from tensors by their published names.

    Tensors have a shape, and `read` turns one into a numpy array; it is called for one at a time, after all fit.

    Raises UserError that lists every missing, unexpected or wrong-shaped tensor of `source` by name.
    """
    places = check_tensors(tensors, abstract_params, table, source=source)
    values = {}
    for path, leaf in flat(abstract_params).items():
        match places[path]:
            case Place() as place:
                values[path] = adopt(path, read(tensors[place.name]), leaf.shape).astype(leaf.dtype)
            case layers:
                values[path] = np.empty(leaf.shape, leaf.dtype)
                for layer, place in zip(values[path], layers, strict=True):
                    layer[...] = adopt(path, read(tensors[place.name]), layer.shape)
    return traverse_util.unflatten_dict(values, sep=".")


def adopt(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A published tensor as the parameter of ours at `path`, of one layer, which has this shape."""
    if path.endswith("kernel"):
        *window, in_dim, out_dim = shape
        return np.moveaxis(tensor.reshape(out_dim, in_dim, *window), (0, 1), (-1, -2))
    return tensor.reshape(shape)


def check_tensors(
    tensors: Mapping[str, Any], abstract_params: dict[str, Any], table: Table, *, source: str = "checkpoint"
) -> dict[str, Place | list[Place]]:
    """The places of all parameters by path.

    Raises UserError that lists every missing, unexpected or wrong-shaped tensor of `source` by name.
    """
    places = {path: table(path, leaf.shape) for path, leaf in flat(abstract_params).items()}
    expected = dict(p for place in places.values() for p in ([place] if isinstance(place, Place) else place))
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = list_faults(found, expected)
    if faults:
        raise UserError(f"{source} does not fit the network, nothing was loaded: " + "; ".join(faults))
    return places
