"""Tensor names of Cosmos-Predict2 networks: NVIDIA's own and diffusers'."""

import re
from collections.abc import Mapping
from typing import Any

from rcm_jax.config import UserError
from rcm_jax.convert.names import make_table
from rcm_jax.models.cosmos import PRESETS, CosmosConfig

# Our module, NVIDIA's, diffusers'.
_MODULES = (
    ("patch_embedding", "x_embedder.proj.1", "patch_embed.proj"),
    ("time_embedding.up", "t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
    ("time_embedding.down", "t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
    ("time_norm", "t_embedding_norm", "time_embed.norm"),
    ("head.modulation.down", "final_layer.adaln_modulation.1", "norm_out.linear_1"),
    ("head.modulation.up", "final_layer.adaln_modulation.2", "norm_out.linear_2"),
    ("head.head", "final_layer.linear", "proj_out"),
)
_BLOCK_MODULES = (
    ("modulation_self_attn.down", "adaln_modulation_self_attn.1", "norm1.linear_1"),
    ("modulation_self_attn.up", "adaln_modulation_self_attn.2", "norm1.linear_2"),
    ("self_attn.q", "self_attn.q_proj", "attn1.to_q"),
    ("self_attn.k", "self_attn.k_proj", "attn1.to_k"),
    ("self_attn.v", "self_attn.v_proj", "attn1.to_v"),
    ("self_attn.o", "self_attn.output_proj", "attn1.to_out.0"),
    ("self_attn.norm_q", "self_attn.q_norm", "attn1.norm_q"),
    ("self_attn.norm_k", "self_attn.k_norm", "attn1.norm_k"),
    ("modulation_cross_attn.down", "adaln_modulation_cross_attn.1", "norm2.linear_1"),
    ("modulation_cross_attn.up", "adaln_modulation_cross_attn.2", "norm2.linear_2"),
    ("cross_attn.q", "cross_attn.q_proj", "attn2.to_q"),
    ("cross_attn.k", "cross_attn.k_proj", "attn2.to_k"),
    ("cross_attn.v", "cross_attn.v_proj", "attn2.to_v"),
    ("cross_attn.o", "cross_attn.output_proj", "attn2.to_out.0"),
    ("cross_attn.norm_q", "cross_attn.q_norm", "attn2.norm_q"),
    ("cross_attn.norm_k", "cross_attn.k_norm", "attn2.norm_k"),
    ("modulation_ffn.down", "adaln_modulation_mlp.1", "norm3.linear_1"),
    ("modulation_ffn.up", "adaln_modulation_mlp.2", "norm3.linear_2"),
    ("ffn.up", "mlp.layer1", "ff.net.0.proj"),
    ("ffn.down", "mlp.layer2", "ff.net.2"),
)
COSMOS = make_table(_MODULES, _BLOCK_MODULES, column=1, blocks="blocks")
DIFFUSERS = make_table(_MODULES, _BLOCK_MODULES, column=2, blocks="transformer_blocks")

# What NVIDIA's files hold besides weights: counters, rotary frequencies, Transformer Engine's state.
_NO_WEIGHTS = ("accum_", "pos_embedder.")


def is_weight(name: str) -> bool:
    """Whether a tensor of NVIDIA's files is a weight, rather than a counter, a constant or a library's state."""
    return not name.startswith(_NO_WEIGHTS) and not name.endswith("_extra_state")


def config_from_tensors(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> CosmosConfig:
    """The shape of a network from its tensors' shapes, by NVIDIA's names, and its checkpoint's config.json.

    No tensor tells how far the rotary embedding is stretched: that is `rope_scale` of diffusers' config.json, or else
    that of the published network of the same width and input.

    Raises:
        UserError: a tensor that tells a size is missing or has another number of axes, or nothing tells the stretch.
    """
    patch_embedding = _matrix(shapes, "x_embedder.proj.1.weight")
    head_dim = shapes.get("blocks.0.self_attn.q_norm.weight", (0,))[0]
    if not head_dim or patch_embedding[0] % head_dim:
        raise UserError(f"heads of {head_dim} do not fill a width of {patch_embedding[0]}: check --model")
    dim, in_channels = patch_embedding[0], patch_embedding[1] // 4
    known = {(preset.dim, preset.in_channels): preset.rope_scale for preset in PRESETS.values()}
    rope_scale = settings.get("rope_scale", known.get((dim, in_channels)))
    if rope_scale is None:
        raise UserError(f"no published network has width {dim} and {in_channels} input channels: give a config.json")
    blocks = {int(block[1]) for block in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if block}
    return CosmosConfig(
        dim=dim,
        heads=dim // head_dim,
        layers=len(blocks),
        rope_scale=tuple(rope_scale),
        in_channels=in_channels,
        out_channels=_matrix(shapes, "final_layer.linear.weight")[0] // 4,
        text_dim=_matrix(shapes, "blocks.0.cross_attn.k_proj.weight")[1],
        lora_dim=_matrix(shapes, "blocks.0.adaln_modulation_mlp.1.weight")[0],
    )


def diffusers_settings(config: CosmosConfig) -> dict[str, Any]:
    """The config.json of diffusers' CosmosTransformer3DModel."""
    return {
        "_class_name": "CosmosTransformer3DModel",
        "_diffusers_version": "0.34.0",
        "adaln_lora_dim": config.lora_dim,
        "attention_head_dim": config.head_dim,
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
        "in_channels": config.in_channels - 1,  # without the padding mask
        "max_size": [128, 240, 240],
        "mlp_ratio": 4.0,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "rope_scale": list(config.rope_scale),
        "text_embed_dim": config.text_dim,
    }


def _matrix(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != 2:
        raise UserError(f"the checkpoint has no matrix {name}: it is no Cosmos-Predict2 network, check --model")
    return shapes[name]
