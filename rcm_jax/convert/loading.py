"""The networks of a published model from checkpoints in any layout: opened and checked at once, read when needed."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from rcm_jax.config import UserError
from rcm_jax.convert import families
from rcm_jax.convert.clip import clip_table, split_qkv, with_prefix
from rcm_jax.convert.names import collect_params
from rcm_jax.convert.places import Table, check_tensors, params_from_published
from rcm_jax.convert.sources import Part, open_source
from rcm_jax.convert.umt5 import t5_table, without_copies
from rcm_jax.convert.vae import vae_table
from rcm_jax.models import clip, umt5, vae
from rcm_jax.models.functional import Network, functional
from rcm_jax.models.presets import PRESETS, Config, create_network

# Wan2.2's release, then diffusers' pipelines: the network for noisier samples, and the other.
EXPERTS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))


class Loadable(NamedTuple):
    """A network and a function that reads its parameters into host memory."""

    network: Network
    load: Callable[[], dict[str, Any]]


class Transformer(NamedTuple):
    """A model's diffusion transformer, or its two: the first for RF times from `config.boundary` on."""

    model: str
    config: Config
    experts: tuple[Loadable, ...]


def open_transformer(paths: list[Path], model: str, *, dtype: Any, part: Part | None = None) -> Transformer:
    """Opens the network of a model, or both, and checks every tensor's shape.

    Args:
        paths: a checkpoint; for a model of two networks also two, or a folder of both.
        model: a preset, or a name such as "wan2.1-t2v", whose sizes are then taken from the tensors.
        dtype: of matrix products, and of the matrices in memory.
        part: which network of a checkpoint with several.

    Raises:
        UserError: a path is not a checkpoint of the model, or there are too few or too many of them.
    """
    family, preset = families.find_model(model)
    boundary = next(config.boundary for name, config in _two_fold() if name.startswith(model)) if _is_pair(model) else None
    paths = _expert_paths(paths, model)
    loadables, config = [], preset
    for path in paths:
        source = open_source(path, part)
        _, tensors = families.published(source, family)
        if config is None:
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            model, config = families.name_config(families.config_from(source, tensors, family), model)
        families.check(tensors, families.tensor_shapes(family, config), str(path))
        network = create_network(config, dtype=dtype)
        loadables.append(Loadable(network, _reader(tensors, network, family.published, path, dtype)))
    return Transformer(model, config, tuple(loadables))
