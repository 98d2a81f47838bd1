"""Names of the image encoder's tensors in Wan's file and in transformers' folders (CLIPVisionModel).

Wan's file, models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, also holds a text encoder and projections, which
image-to-video does not use, and has each layer's queries, keys and values in one tensor.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rcm_jax.convert.places import Place, Table, named_table

Layout = Literal["wan", "transformers"]

_WAN = {
    "patch_embedding": "visual.patch_embedding",
    "class_embedding": "visual.cls_embedding",
    "position_embedding": "visual.pos_embedding",
    "norm_in": "visual.pre_norm",
    "norm_out": "visual.post_norm",
    "blocks.norm1": "visual.transformer.{}.norm1",
    "blocks.q": "visual.transformer.{}.attn.to_q",
    "blocks.k": "visual.transformer.{}.attn.to_k",
    "blocks.v": "visual.transformer.{}.attn.to_v",
    "blocks.o": "visual.transformer.{}.attn.proj",
    "blocks.norm2": "visual.transformer.{}.norm2",
    "blocks.ffn.up": "visual.transformer.{}.mlp.0",
    "blocks.ffn.down": "visual.transformer.{}.mlp.2",
}
_TRANSFORMERS = {
    "patch_embedding": "vision_model.embeddings.patch_embedding",
    "class_embedding": "vision_model.embeddings.class_embedding",
    "position_embedding": "vision_model.embeddings.position_embedding.weight",
    "norm_in": "vision_model.pre_layrnorm",
    "norm_out": "vision_model.post_layernorm",
    "blocks.norm1": "vision_model.encoder.layers.{}.layer_norm1",
    "blocks.q": "vision_model.encoder.layers.{}.self_attn.q_proj",
    "blocks.k": "vision_model.encoder.layers.{}.self_attn.k_proj",
    "blocks.v": "vision_model.encoder.layers.{}.self_attn.v_proj",
    "blocks.o": "vision_model.encoder.layers.{}.self_attn.out_proj",
    "blocks.norm2": "vision_model.encoder.layers.{}.layer_norm2",
    "blocks.ffn.up": "vision_model.encoder.layers.{}.mlp.fc1",
    "blocks.ffn.down": "vision_model.encoder.layers.{}.mlp.fc2",
}
_UNUSED_BY_VIDEO = re.compile(r"textual\..*|log_scale|visual\.head")


def clip_table(layout: Layout) -> Table:
    """Places of the parameters of models/clip.py's ImageEncoder.

    The layout "wan" is that of Wan's file after `split_qkv`.
    """
    if layout == "transformers":
        return named_table(_TRANSFORMERS)
    names = named_table(_WAN)

    def table(path: str, shape: tuple[int, ...]) -> Place | list[Place]:
        place = names(path, shape)
        if isinstance(place, Place) and path in ("class_embedding", "position_embedding"):
            return place._replace(shape=(1,) * (3 - len(shape)) + shape)
        return place

    return table


def split_qkv(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of Wan's file that belong to the image encoder, with queries, keys and values apart."""
    split = {}
    for name, tensor in tensors.items():
        if "attn.to_qkv" in name:
            parts = np.split(np.asarray(tensor), 3)
            split |= {name.replace("to_qkv", f"to_{letter}"): part for letter, part in zip("qkv", parts, strict=True)}
        elif not _UNUSED_BY_VIDEO.fullmatch(name):
            split[name] = tensor
    return split


def with_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a transformers folder by the names of version 4; version 5 leaves out "vision_model."."""
    return {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in tensors.items()}
