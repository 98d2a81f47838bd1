"""Tensor names of Cosmos-Predict2 networks: NVIDIA's own and diffusers'."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rcm_jax.convert.names import collect_params, make_table, rename_params

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


def cosmos_tensors(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters by NVIDIA's names, as numpy arrays of the dtype they have; their files prefix these with "net."."""
    return rename_params(params, COSMOS)


def params_from_cosmos(
    tensors: Mapping[str, Any], abstract_params: dict[str, Any], *, source: str = "checkpoint"
) -> dict[str, Any]:
    """Parameters with the structure, shapes and dtypes of `abstract_params`, from tensors by NVIDIA's names.

    Raises UserError that lists every missing, unexpected or wrong-shaped tensor of `source` by name.
    """
    weights = {name: tensors[name] for name in tensors if is_weight(name)}
    return collect_params(weights, abstract_params, COSMOS, source=source)


def is_weight(name: str) -> bool:
    """Whether a tensor of NVIDIA's files is a weight, rather than a counter, a constant or a library's state."""
    return not name.startswith(_NO_WEIGHTS) and not name.endswith("_extra_state")


def diffusers_tensors(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The parameters as diffusers' CosmosTransformer3DModel holds them, as numpy arrays of the dtype they have."""
    return rename_params(params, DIFFUSERS)


def params_from_diffusers(
    tensors: Mapping[str, Any], abstract_params: dict[str, Any], *, source: str = "checkpoint"
) -> dict[str, Any]:
    """As params_from_cosmos, from tensors of diffusers' CosmosTransformer3DModel."""
    return collect_params(tensors, abstract_params, DIFFUSERS, source=source)
