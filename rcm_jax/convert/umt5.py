"""Names of the text encoders' tensors in Wan's file (models_t5_umt5-xxl-enc-bf16.pth) and in transformers' folders."""

from collections.abc import Mapping
from typing import Any, Literal

from rcm_jax.convert.places import Table, named_table
from rcm_jax.models.umt5 import T5Config

Layout = Literal["wan", "transformers"]

_WAN = {
    "embedding": "token_embedding.weight",
    "position_bias": "blocks.{}.pos_embedding.embedding.weight",
    "blocks.norm1": "blocks.{}.norm1",
    "blocks.attention.q": "blocks.{}.attn.q",
    "blocks.attention.k": "blocks.{}.attn.k",
    "blocks.attention.v": "blocks.{}.attn.v",
    "blocks.attention.o": "blocks.{}.attn.o",
    "blocks.norm2": "blocks.{}.norm2",
    "blocks.ffn.gate": "blocks.{}.ffn.gate.0",
    "blocks.ffn.up": "blocks.{}.ffn.fc1",
    "blocks.ffn.down": "blocks.{}.ffn.fc2",
    "norm_out": "norm",
}
_TRANSFORMERS = {
    "embedding": "shared.weight",
    "position_bias": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight",
    "blocks.norm1": "encoder.block.{}.layer.0.layer_norm",
    "blocks.attention.q": "encoder.block.{}.layer.0.SelfAttention.q",
    "blocks.attention.k": "encoder.block.{}.layer.0.SelfAttention.k",
    "blocks.attention.v": "encoder.block.{}.layer.0.SelfAttention.v",
    "blocks.attention.o": "encoder.block.{}.layer.0.SelfAttention.o",
    "blocks.norm2": "encoder.block.{}.layer.1.layer_norm",
    "blocks.ffn.down": "encoder.block.{}.layer.1.DenseReluDense.wo",
    "norm_out": "encoder.final_layer_norm",
}
_TRANSFORMERS_GATED = {
    "blocks.ffn.gate": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "blocks.ffn.up": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
}
_TRANSFORMERS_PLAIN = {"blocks.ffn.up": "encoder.block.{}.layer.1.DenseReluDense.wi"}

_COPY = "encoder.embed_tokens.weight"


def t5_table(config: T5Config, layout: Layout) -> Table:
    """Places of the parameters of models/umt5.py's T5Encoder. Only umT5 has a layout of Wan's."""
    if layout == "wan":
        return named_table(_WAN)
    return named_table(_TRANSFORMERS | (_TRANSFORMERS_GATED if config.gated else _TRANSFORMERS_PLAIN))


def without_copies(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a transformers folder with the token embedding once; some folders hold it under two names."""
    rest = {name: tensor for name, tensor in tensors.items() if name != _COPY}
    return {"shared.weight": tensors[_COPY]} | rest if _COPY in tensors else rest
