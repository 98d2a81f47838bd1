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

# The tensors that tell a network's sizes, and their ranks once the patch embedding is a matrix.
_TELLING = {
    "patch_embedding.weight": 2,
    "text_embedding.0.weight": 2,
    "time_embedding.0.weight": 2,
    "blocks.0.ffn.0.weight": 2,
    "head.head.weight": 2,
}

# Wan's module or parameter -> diffusers'; N is the number of a block.
DIFFUSERS_NAMES = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("blocks.N.modulation", "blocks.N.scale_shift_table"),
    *(
        (f"blocks.N.{attention}.{ours}", f"blocks.N.{theirs}.{name}")
        for attention, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for ours, name in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
    ("blocks.N.norm3", "blocks.N.norm2"),
    ("blocks.N.ffn.0", "blocks.N.ffn.net.0.proj"),
    ("blocks.N.ffn.2", "blocks.N.ffn.net.2"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
)


def wan_tensors(
    params: dict[str, Any], config: WanConfig, *, patch_layout: Literal["linear", "conv3d"] = "linear"
) -> dict[str, np.ndarray]:
    """The parameters by Wan's names, in Wan's layout, as numpy arrays of the dtype they have."""
    tensors = {}
    for path, value in _flat(params).items():
        stacked = np.asarray(jax.device_get(value))
        stacked = stacked if is_stacked(path) else stacked[None]
        for name, array in zip(leaf_names(path, len(stacked)), stacked, strict=True):
            tensors[name] = to_wan(path, array)
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
        layers, shape = (leaf.shape[0], leaf.shape[1:]) if is_stacked(path) else (1, leaf.shape)
        arrays = []
        for name in leaf_names(path, layers):
            expected.add(name)
            if name not in tensors:
                faults.append(f"missing {name}")
                continue
            array = from_wan(path, np.asarray(tensors[name]))
            if array.shape != shape:
                faults.append(f"{name} has shape {tuple(np.shape(tensors[name]))}, the network's {path} takes {shape}")
            arrays.append(array.astype(leaf.dtype))
        if not faults:
            values[path] = np.stack(arrays) if is_stacked(path) else arrays[0]
    faults += [f"unexpected {name}" for name in sorted(set(tensors) - expected)]
    if faults:
        raise UserError(f"{source} does not fit the network, nothing was loaded: " + "; ".join(faults))
    return traverse_util.unflatten_dict(values, sep=".")


def leaf_names(path: str, layers: int) -> list[str]:
    """Wan's names of a parameter of ours: one, or one a layer if it is stacked."""
    name = path
    for ours, theirs in _RENAMES:
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name)
    name = re.sub(r"\.(kernel|scale)$", ".weight", name)
    return [name.replace("blocks.", f"blocks.{layer}.", 1) for layer in range(layers)] if is_stacked(path) else [name]


def is_stacked(path: str) -> bool:
    """Whether a parameter of ours holds all layers along its first axis."""
    return path.startswith("blocks.")


def to_wan(path: str, array: np.ndarray) -> np.ndarray:
    """One layer of a parameter of ours in Wan's layout, with the patch embedding as a matrix."""
    if path.endswith(".kernel"):
        return array.T
    return array[None] if path.endswith("modulation") else array


def from_wan(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_wan`; takes the patch embedding as a Conv3d kernel too."""
    if path.endswith(".kernel"):  # a Conv3d patch kernel is a matrix once its window is flattened
        return array.reshape(len(array), -1).T
    return array[0] if path.endswith("modulation") and len(array) == 1 else array


def config_from_tensors(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> WanConfig:
    """The shape of a network with patches of (1, 2, 2) from its tensors' shapes, by Wan's names.

    The number of heads is in the `settings` of the checkpoint's config.json; without one a head has 128 channels.

    Raises:
        UserError: a tensor that tells a size is missing or has too few axes.
    """
    sizes = {}
    for name, rank in _TELLING.items():
        if len(shapes.get(name, ())) != rank:
            raise UserError(f"the checkpoint has no {name} with {rank} axes: it is no Wan network, check --model")
        sizes[name] = shapes[name]
    dim, patch_width = sizes["patch_embedding.weight"]
    layers = 1 + max(int(block[1]) for block in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if block)
    if layers > len(shapes):
        raise UserError(f"the checkpoint has a block {layers - 1} in {len(shapes)} tensors: fetch it again")
    heads = settings.get("num_heads") or settings.get("num_attention_heads") or dim // 128
    if type(heads) is not int or heads < 1 or dim % (2 * heads):
        raise UserError(f"a width of {dim} does not divide into {heads} heads: name a size, such as wan2.1-t2v-14b")
    return WanConfig(
        dim=dim,
        ffn_dim=sizes["blocks.0.ffn.0.weight"][0],
        heads=heads,
        layers=layers,
        in_channels=patch_width // 4,
        out_channels=sizes["head.head.weight"][0] // 4,
        text_dim=sizes["text_embedding.0.weight"][1],
        time_dim=sizes["time_embedding.0.weight"][1],
    )


def wan_settings(config: WanConfig) -> dict[str, Any]:
    """The config.json of Wan's own release."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.dim,
        "eps": config.norm_eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.time_dim,
        "in_dim": config.in_channels,
        "model_type": "t2v",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": config.out_channels,
        "patch_size": config.patch,
        "text_dim": config.text_dim,
        "text_len": config.text_length,
    }


def diffusers_settings(config: WanConfig) -> dict[str, Any]:
    """The config.json of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.33.0",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.norm_eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.time_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.out_channels,
        "patch_size": config.patch,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def _flat(params: dict[str, Any]) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(params, sep="."))
