"""Tensor names and layouts of Wan networks: Wan's own and rCM's, which are one, and diffusers'.

Wan's and diffusers' files hold the patch embedding as a Conv3d kernel (out, in, kt, kh, kw), rCM's as a matrix
(out, in * kt * kh * kw); both are read.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rcm_jax.convert.names import collect_params, make_table, rename_params
from rcm_jax.models.wan import WanConfig

# Our module, Wan's, diffusers'.
_MODULES = (
    ("patch_embedding", "patch_embedding", "patch_embedding"),
    ("text_embedding.up", "text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.down", "text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("image_embedding.norm_in", "img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("image_embedding.mlp.up", "img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("image_embedding.mlp.down", "img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("image_embedding.norm_out", "img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("time_embedding.up", "time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.down", "time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection", "time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "head.modulation", "scale_shift_table"),
    ("head.head", "head.head", "proj_out"),
)
_BLOCK_MODULES = (
    ("modulation", "modulation", "scale_shift_table"),
    ("self_attn.q", "self_attn.q", "attn1.to_q"),
    ("self_attn.k", "self_attn.k", "attn1.to_k"),
    ("self_attn.v", "self_attn.v", "attn1.to_v"),
    ("self_attn.o", "self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_q", "self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "self_attn.norm_k", "attn1.norm_k"),
    ("norm3", "norm3", "norm2"),
    ("cross_attn.q", "cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_q", "cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "cross_attn.norm_k", "attn2.norm_k"),
    ("cross_attn.k_img", "cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("ffn.up", "ffn.0", "ffn.net.0.proj"),
    ("ffn.down", "ffn.2", "ffn.net.2"),
)
WAN = make_table(_MODULES, _BLOCK_MODULES, column=1, blocks="blocks")
DIFFUSERS = make_table(_MODULES, _BLOCK_MODULES, column=2, blocks="blocks")


def wan_tensors(
    params: dict[str, Any], config: WanConfig, *, patch_layout: Literal["linear", "conv3d"] = "linear"
) -> dict[str, np.ndarray]:
    """The parameters by Wan's names, in Wan's layout, as numpy arrays of the dtype they have."""
    tensors = rename_params(params, WAN)
    return _as_conv3d(tensors, config) if patch_layout == "conv3d" else tensors


def params_from_wan(
    tensors: Mapping[str, Any], abstract_params: dict[str, Any], *, source: str = "checkpoint"
) -> dict[str, Any]:
    """Parameters with the structure, shapes and dtypes of `abstract_params`, from tensors by Wan's names.

    Raises UserError that lists every missing, unexpected or wrong-shaped tensor of `source` by name.
    """
    return collect_params(tensors, abstract_params, WAN, source=source)


def diffusers_tensors(params: dict[str, Any], config: WanConfig) -> dict[str, np.ndarray]:
    """The parameters as diffusers' WanTransformer3DModel holds them, as numpy arrays of the dtype they have."""
    return _as_conv3d(rename_params(params, DIFFUSERS), config)


def params_from_diffusers(
    tensors: Mapping[str, Any], abstract_params: dict[str, Any], *, source: str = "checkpoint"
) -> dict[str, Any]:
    """As params_from_wan, from tensors of diffusers' WanTransformer3DModel."""
    return collect_params(tensors, abstract_params, DIFFUSERS, source=source)


def _as_conv3d(tensors: dict[str, np.ndarray], config: WanConfig) -> dict[str, np.ndarray]:
    weight = tensors["patch_embedding.weight"]
    return tensors | {"patch_embedding.weight": weight.reshape(len(weight), config.in_channels, *config.patch)}
