"""Wan's published parameter names and layouts, to and from the pytree of models/wan.py.

The names are those of Wan's own release. Two layouts of the patch embedding exist: Wan's files hold a Conv3d kernel
(out, in, kt, kh, kw), rCM's a matrix (out, in * kt * kh * kw); both are read, `patch_layout` chooses what is written.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util

from rcm_jax.config import UserError
from rcm_jax.models.wan import WanConfig

# Our module path -> Wan's. A linear kernel is the transposed weight, a norm's scale its weight.
_RENAMES = (
    ("text_embedding.up", "text_embedding.0"),
    ("text_embedding.down", "text_embedding.2"),
    ("time_embedding.up", "time_embedding.0"),
    ("time_embedding.down", "time_embedding.2"),
    ("time_projection", "time_projection.1"),
    ("ffn.up", "ffn.0"),
    ("ffn.down", "ffn.2"),
)


def wan_tensors(
    params: dict[str, Any], config: WanConfig, *, patch_layout: Literal["linear", "conv3d"] = "linear"
) -> dict[str, np.ndarray]:
    """The parameters by Wan's names, in Wan's layout, as numpy arrays of the dtype they have."""
    tensors = {}
    for path, value in _flat(params).items():
        stacked = np.asarray(jax.device_get(value))
        stacked = stacked if _is_stacked(path) else stacked[None]
        for name, array in zip(_wan_names(path, len(stacked)), stacked, strict=True):
            tensors[name] = _to_wan(path, array)
    if patch_layout == "conv3d":
        weight = tensors["patch_embedding.weight"]
        tensors["patch_embedding.weight"] = weight.reshape(len(weight), config.in_channels, *config.patch)
    return tensors


def params_from_wan(
    tensors: Mapping[str, Any], abstract_params: dict[str, Any], *, source: str = "checkpoint"
) -> dict[str, Any]:
    """Parameters with the structure, shapes and dtypes of `abstract_params`, from tensors by Wan's names.

    Raises UserError that lists every missing, unexpected or wrong-shaped tensor of `source` by name.
    """
    faults, values, expected = [], {}, set()
    for path, leaf in _flat(abstract_params).items():
        layers, shape = (leaf.shape[0], leaf.shape[1:]) if _is_stacked(path) else (1, leaf.shape)
        arrays = []
        for name in _wan_names(path, layers):
            expected.add(name)
            if name not in tensors:
                faults.append(f"missing {name}")
                continue
            array = _from_wan(path, np.asarray(tensors[name]))
            if array.shape != shape:
                faults.append(f"{name} has shape {tuple(np.shape(tensors[name]))}, the network's {path} takes {shape}")
            arrays.append(array.astype(leaf.dtype))
        if not faults:
            values[path] = np.stack(arrays) if _is_stacked(path) else arrays[0]
    faults += [f"unexpected {name}" for name in sorted(set(tensors) - expected)]
    if faults:
        raise UserError(f"{source} does not fit the network, nothing was loaded: " + "; ".join(faults))
    return traverse_util.unflatten_dict(values, sep=".")


def _flat(params: dict[str, Any]) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(params, sep="."))


def _is_stacked(path: str) -> bool:
    return path.startswith("blocks.")


def _wan_names(path: str, layers: int) -> list[str]:
    name = path
    for ours, theirs in _RENAMES:
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name)
    name = re.sub(r"\.(kernel|scale)$", ".weight", name)
    return [name.replace("blocks.", f"blocks.{layer}.", 1) for layer in range(layers)] if _is_stacked(path) else [name]


def _to_wan(path: str, array: np.ndarray) -> np.ndarray:
    if path.endswith(".kernel"):
        return array.T
    return array[None] if path.endswith("modulation") else array


def _from_wan(path: str, array: np.ndarray) -> np.ndarray:
    if path.endswith(".kernel"):  # a Conv3d patch kernel is a matrix once its window is flattened
        return array.reshape(len(array), -1).T
    return array[0] if path.endswith("modulation") and len(array) == 1 else array
