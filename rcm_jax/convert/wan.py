"""Tensor names and layouts of Wan networks: Wan's own and rCM's, which are one, and diffusers'.

Wan's and diffusers' files hold the patch embedding as a Conv3d kernel (out, in, kt, kh, kw), rCM's as a matrix
(out, in * kt * kh * kw); both are read.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rcm_jax.config import UserError
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
    ("span_embedding.up", "span_embedding.0", "condition_embedder.span_embedder.linear_1"),
    ("span_embedding.down", "span_embedding.2", "condition_embedder.span_embedder.linear_2"),
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

CLIP_TOKENS = 257  # of ViT-H/14 at 224 x 224 pixels: 16 x 16 patches and the class


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


def config_from_tensors(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> WanConfig:
    """The shape of a network with patches of (1, 2, 2) from its tensors' shapes, by Wan's names.

    The number of heads is in the `settings` of the checkpoint's config.json; without one a head has 128 channels.

    Raises:
        UserError: a tensor that tells a size is missing or has another number of axes.
    """
    dim, patch_width = _matrix(shapes, "patch_embedding.weight")
    layers = 1 + max((int(block[1]) for block in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if block), default=0)
    if layers > len(shapes):
        raise UserError(f"the checkpoint has a block {layers - 1} in {len(shapes)} tensors: fetch it again")
    heads = settings.get("num_heads") or settings.get("num_attention_heads") or dim // 128
    if type(heads) is not int or heads < 1 or dim % (2 * heads):
        raise UserError(f"a width of {dim} does not divide into {heads} heads: name a size, such as wan2.1-t2v-14b")
    config = WanConfig(
        dim=dim,
        ffn_dim=_matrix(shapes, "blocks.0.ffn.0.weight")[0],
        heads=heads,
        layers=layers,
        in_channels=patch_width // 4,
        out_channels=_matrix(shapes, "head.head.weight")[0] // 4,
        text_dim=_matrix(shapes, "text_embedding.0.weight")[1],
        time_dim=_matrix(shapes, "time_embedding.0.weight")[1],
        spans="span_embedding.0.weight" in shapes,
    )
    image_norm = shapes.get("img_emb.proj.0.weight")
    return dataclasses.replace(config, image_tokens=CLIP_TOKENS, image_dim=image_norm[0]) if image_norm else config


def _matrix(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != 2:
        raise UserError(f"the checkpoint has no matrix {name}: it is no Wan network, check --model")
    return shapes[name]


def wan_settings(config: WanConfig) -> dict[str, Any]:
    """The config.json of Wan's own releases."""
    kind = "t2v" if config.in_channels == config.out_channels else "i2v"
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.dim,
        "eps": config.norm_eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.time_dim,
        "in_dim": config.in_channels,
        "model_type": "ti2v" if config.out_channels == 48 else kind,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": config.out_channels,
        "patch_size": list(config.patch),
        "text_dim": config.text_dim,
        "text_len": config.text_length,
    }


def diffusers_settings(config: WanConfig) -> dict[str, Any]:
    """The config.json of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.33.0",
        "added_kv_proj_dim": config.dim if config.image_tokens else None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.norm_eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.time_dim,
        "image_dim": config.image_dim if config.image_tokens else None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def _as_conv3d(tensors: dict[str, np.ndarray], config: WanConfig) -> dict[str, np.ndarray]:
    weight = tensors["patch_embedding.weight"]
    return tensors | {"patch_embedding.weight": weight.reshape(len(weight), config.in_channels, *config.patch)}
