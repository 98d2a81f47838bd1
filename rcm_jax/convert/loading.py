"""The networks of a published model from checkpoints in any layout: opened and checked at once, read when needed."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh

from rcm_jax.config import UserError
from rcm_jax.convert import families
from rcm_jax.convert.clip import clip_table, split_qkv, with_prefix
from rcm_jax.convert.conversion import config_of
from rcm_jax.convert.names import collect_params, flat
from rcm_jax.convert.places import Table, check_tensors, params_from_published
from rcm_jax.convert.sources import Part, open_source
from rcm_jax.convert.umt5 import t5_table, without_copies
from rcm_jax.convert.vae import vae_table
from rcm_jax.models.clip import CLIPConfig, ImageEncoder
from rcm_jax.models.functional import Network, functional
from rcm_jax.models.presets import PRESETS, Config, create_network
from rcm_jax.models.umt5 import T5Config, T5Encoder
from rcm_jax.models.vae import VAE, Decoder, Encoder, VAEConfig
from rcm_jax.sharding import block_ops

Params = dict[str, Any]
# Folders of Wan2.2's release, then of diffusers' pipelines: the network for noisier samples, and the other.
_EXPERTS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))


class Loadable(NamedTuple):
    """A network, a function that reads its parameters into the host's memory, and the device, perhaps the default."""

    network: Network
    load: Callable[[], Params]
    device: Any = None


class Transformer(NamedTuple):
    """The diffusion transformer of a model.

    A model with a `boundary` has parameters twice: for RF times from there on, and for those below. With a `mesh` the
    network is split over its devices.
    """

    model: str
    config: Config
    network: Network
    loads: tuple[Callable[[], Params], ...]
    boundary: float | None
    mesh: Mesh | None = None


class Autoencoder(NamedTuple):
    """The halves of an autoencoder."""

    config: VAEConfig
    encoder: Loadable
    decoder: Loadable


def open_transformer(
    paths: Sequence[Path],
    model: str,
    *,
    dtype: Any = jnp.float32,
    part: Part | None = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """Opens the network of a model, or both, and checks every tensor's shape.

    Args:
        paths: a checkpoint; for a model of two networks two of them, or a folder that holds both.
        model: a preset, or a name such as "wan2.1-t2v", whose sizes are then taken from the tensors.
        dtype: of the blocks' matrices, in memory and in products.
        part: which network of a checkpoint with several.
        mesh: devices to split the network over.

    Raises:
        UserError: a path is no checkpoint of the model, or there are too few or too many; the mesh does not divide it.
    """
    family, config = families.find_model(model)
    boundary = next((c.boundary for name, c in _wan_presets().items() if name.startswith(model)), None)
    checkpoints = []
    for path in _expert_paths(paths, model, 1 if boundary is None else 2):
        source = open_source(path, part)
        _, tensors = families.published(source, family)
        if config is None:
            model, config = families.name_config(config_of(source, tensors, family), model)
        families.check(tensors, families.tensor_shapes(family, config), str(path))
        checkpoints.append((path, tensors))
    assert config is not None
    network = create_network(config, dtype=dtype, ops=block_ops(mesh, config.heads, dtype=dtype))
    abstract = in_dtype(network.abstract_params(), dtype)
    loads = tuple(
        functools.partial(collect_params, tensors, abstract, family.published, source=str(path))
        for path, tensors in checkpoints
    )
    return Transformer(model, config, network, loads, boundary, mesh)


def open_autoencoder(path: Path, config: VAEConfig, *, dtype: Any = jnp.float32, device: Any = None) -> Autoencoder:
    """Opens an autoencoder in Wan's layout or diffusers' and checks every tensor's shape; UserError if it is none."""
    tensors = open_source(path).tensors
    table = vae_table(config, "wan" if "encoder.conv1.weight" in tensors else "diffusers")
    whole = _open(path, tensors, lambda rngs: VAE(config, dtype=dtype, rngs=rngs), table)
    encoder = functional(lambda rngs: Encoder(config, dtype=dtype, rngs=rngs))
    decoder = functional(lambda rngs: Decoder(config, dtype=dtype, rngs=rngs))
    return Autoencoder(
        config,
        Loadable(encoder, lambda: whole.load()["encoder"], device),
        Loadable(decoder, lambda: whole.load()["decoder"], device),
    )


def open_text_encoder(path: Path, config: T5Config, *, dtype: Any = jnp.float32, device: Any = None) -> Loadable:
    """Opens a text encoder in Wan's layout or transformers', as `open_autoencoder` does."""
    tensors = without_copies(open_source(path).tensors)
    table = t5_table(config, "wan" if "token_embedding.weight" in tensors else "transformers")
    return _open(path, tensors, lambda rngs: T5Encoder(config, dtype=dtype, rngs=rngs), table, dtype, device)


def open_image_encoder(path: Path, config: CLIPConfig, *, dtype: Any = jnp.float32, device: Any = None) -> Loadable:
    """Opens an image encoder in Wan's layout or transformers', as `open_autoencoder` does."""
    tensors = open_source(path).tensors
    is_wan = any(name.startswith("visual.") for name in tensors)
    tensors = split_qkv(tensors) if is_wan else with_prefix(tensors)
    table = clip_table("wan" if is_wan else "transformers")
    return _open(path, tensors, lambda rngs: ImageEncoder(config, dtype=dtype, rngs=rngs), table, dtype, device)


def _open(
    path: Path,
    tensors: Mapping[str, Any],
    create: Callable[[nnx.Rngs], nnx.Module],
    table: Table,
    dtype: Any = jnp.float32,
    device: Any = None,
) -> Loadable:
    network = functional(create)
    abstract = in_dtype(network.abstract_params(), dtype)
    check_tensors(tensors, abstract, table, source=str(path))
    return Loadable(network, lambda: params_from_published(tensors, abstract, table, source=str(path)), device)


def in_dtype(abstract_params: Params, dtype: Any) -> Params:
    """Parameters whose large matrices are kept in `dtype`: those of the blocks, and an embedding of tokens.

    Of a block, what computes the modulation stays in float32.
    """
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype if _is_large(path) else leaf.dtype)
        for path, leaf in flat(abstract_params).items()
    }
    return traverse_util.unflatten_dict(leaves, sep=".")


def _is_large(path: str) -> bool:
    return path == "embedding" or (path.startswith("blocks.") and path.endswith("kernel") and "modulation" not in path)


def _wan_presets() -> dict[str, Any]:
    return {name: config for name, config in PRESETS.items() if getattr(config, "boundary", None) is not None}


def _expert_paths(paths: Sequence[Path], model: str, count: int) -> list[Path]:
    if count == 2 and len(paths) == 1:
        for names in _EXPERTS:
            if all((paths[0] / name).is_dir() for name in names):
                return [paths[0] / name for name in names]
    if len(paths) != count:
        what = "one network" if count == 1 else "two networks, for high and for low noise"
        raise UserError(f"--dit gives {len(paths)} checkpoints, {model} has {what}: give one path for each, in order")
    return list(paths)
