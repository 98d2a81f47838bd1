"""What conversion knows of each kind of network: its name tables, its sizes, and how its parameters lie in a file.

Between reading and writing, a network's tensors go by the published names, with the patch embedding as a matrix.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rcm_jax.config import UserError
from rcm_jax.convert import cosmos, wan
from rcm_jax.convert.names import Table, flat, from_theirs, is_stacked, list_faults, their_names, to_theirs
from rcm_jax.convert.orbax import Leaf, NewLeaf
from rcm_jax.convert.sources import Source
from rcm_jax.convert.tensors import LazyTensor, Tensors, refusal
from rcm_jax.models.presets import PRESETS, Config, create_network

Layout = Literal["wan", "rcm", "diffusers"]


class Family(NamedTuple):
    """A kind of network.

    Attributes:
        models: what the names of its models begin with; a size follows.
        published: the table of the names that its authors use.
        diffusers: the table of diffusers' names.
        settings: the config.json of each layout that has one.
        config_from_tensors: a config from the tensors' shapes by name and the settings of a config.json.
        is_weight: whether a tensor of the authors' files is a weight.
        patch_kernel: the tensor that is a Conv3d kernel in some layouts and a matrix in others.
        windowed: the layouts in which it is a Conv3d kernel.
    """

    models: Sequence[str]
    published: Table
    diffusers: Table
    settings: Mapping[str, Callable[[Any], dict[str, Any]]]
    config_from_tensors: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], Config]
    is_weight: Callable[[str], bool]
    patch_kernel: str
    windowed: Sequence[str]


WAN = Family(
    models=("digits", "digits28", "wan2.1-t2v", "wan2.1-i2v", "wan2.2-t2v", "wan2.2-i2v", "wan2.2-ti2v"),
    published=wan.WAN,
    diffusers=wan.DIFFUSERS,
    settings={"wan": wan.wan_settings, "diffusers": wan.diffusers_settings},
    config_from_tensors=wan.config_from_tensors,
    is_weight=lambda name: True,
    patch_kernel="patch_embedding.weight",
    windowed=("wan", "diffusers"),
)
COSMOS = Family(
    models=("cosmos-predict2-t2i", "cosmos-predict2-v2w"),
    published=cosmos.COSMOS,
    diffusers=cosmos.DIFFUSERS,
    settings={"diffusers": cosmos.diffusers_settings},
    config_from_tensors=cosmos.config_from_tensors,
    is_weight=cosmos.is_weight,
    patch_kernel="x_embedder.proj.1.weight",
    windowed=(),
)


def find_model(model: str) -> tuple[Family, Config | None]:
    """The family of a model, and its config if the name gives a size, else None.

    Raises UserError for an unknown name.
    """
    for family in (WAN, COSMOS):
        if model in family.models or (model in PRESETS and model.startswith(tuple(family.models))):
            return family, PRESETS.get(model)
    known = sorted({*WAN.models, *COSMOS.models, *PRESETS})
    raise UserError(f"--model {model} is not known: choose one of {', '.join(known)}")


def name_config(config: Config, model: str) -> tuple[str, Config]:
    """The preset among a model's sizes that has this config, and its name; or what was given.

    The boundary between the two networks of a model, which no tensor tells, is the preset's.
    """
    known = dataclasses.asdict(config)
    for name, preset in PRESETS.items():
        if name.startswith(model) and dataclasses.asdict(preset) | {"boundary": None} == known | {"boundary": None}:
            return name, preset
    return model, config


def published(source: Source, family: Family) -> tuple[str, Tensors]:
    """The tensors of a checkpoint by their published names, and the layout they had. Unknown names are kept."""
    if source.leaves:
        return "orbax", _unstacked(source.leaves, family)
    tensors = {name: tensor for name, tensor in source.tensors.items() if family.is_weight(name)}
    to_published, to_diffusers = diffusers_to_published(family), published_to_diffusers(family)
    if sum(to_published(name) != name for name in tensors) > sum(to_diffusers(name) != name for name in tensors):
        layout = "diffusers"
        tensors = {to_published(name): tensor for name, tensor in tensors.items()}
    else:
        kernel = tensors.get(family.patch_kernel)
        layout = "wan" if kernel is not None and len(kernel.shape) > 2 else "rcm"
    return layout, {name: _as_matrix(name, tensor, family) for name, tensor in tensors.items()}


def _as_matrix(name: str, tensor: LazyTensor, family: Family) -> LazyTensor:
    if name != family.patch_kernel or len(tensor.shape) <= 2 or 0 in tensor.shape:
        return tensor
    return tensor.reshape(tensor.shape[0], tensor.size // tensor.shape[0])


def arranged(tensors: Tensors, family: Family, layout: Layout, config: Config) -> Tensors:
    """Published tensors by the names and in the shapes of a layout, in the same order."""
    if layout in family.windowed:
        kernel = tensors[family.patch_kernel]
        window = kernel.reshape(kernel.shape[0], config.in_channels, *config.patch)
        tensors = tensors | {family.patch_kernel: window}
    if layout == "rcm":
        return {f"net.{name}": tensor for name, tensor in tensors.items()}
    rename = published_to_diffusers(family) if layout == "diffusers" else str
    return {rename(name): tensor for name, tensor in tensors.items()}


def published_to_diffusers(family: Family) -> Callable[[str], str]:
    """A function from a published name to diffusers'; an unknown name stays."""
    return _renaming({name: family.diffusers[path] for path, name in family.published.items()})


def diffusers_to_published(family: Family) -> Callable[[str], str]:
    """A function from a name of diffusers to the published one; an unknown name stays."""
    return _renaming({name: family.published[path] for path, name in family.diffusers.items()})


def _renaming(modules: Mapping[str, str]) -> Callable[[str], str]:
    """A function by a table of modules and parameters, in which {} stands for the number of a block."""

    def rename(name: str) -> str:
        block = re.match(r"(\w*blocks)\.(\d+)\.", name)
        number = block[2] if block else ""
        general = name.replace(block[0], f"{block[1]}.{{}}.", 1) if block else name
        module, _, parameter = general.rpartition(".")
        if general in modules:
            return modules[general].replace("{}", number)
        return f"{modules[module].replace('{}', number)}.{parameter}" if module in modules else name

    return rename


def _unstacked(leaves: Mapping[str, Leaf], family: Family) -> Tensors:
    tensors: Tensors = {}
    for path, leaf in leaves.items():
        layers, shape = (leaf.shape[0], leaf.shape[1:]) if is_stacked(path) else (1, leaf.shape)
        for layer, name in enumerate(_names(path, layers, family)):
            tensors[name] = _of_leaf(path, leaf, layer if is_stacked(path) else None, shape)
    return tensors


def _names(path: str, layers: int, family: Family) -> list[str]:
    """The published names of a parameter of ours; an unknown one keeps its path."""
    try:
        return their_names(path, layers, family.published)
    except KeyError:
        return [path]


def _of_leaf(path: str, leaf: Leaf, layer: int | None, shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(_published_shape(path, shape), leaf.dtype, lambda: to_theirs(path, leaf.read(layer)))


def read_rest(source: Source) -> None:
    """Reads what nobody has read of an Orbax checkpoint. Raises UserError if an array is not what was saved."""
    for path, leaf in source.leaves.items():
        leaf.read_rest(stacked=is_stacked(path))


def stacked(tensors: Tensors, family: Family, config: Config) -> dict[str, NewLeaf]:
    """Parameters of ours by path, from published tensors.

    Raises UserError if the layers of a parameter differ in dtype.
    """
    leaves = {}
    for path, shape in parameter_shapes(config).items():
        many = is_stacked(path)
        parts = [tensors[name] for name in their_names(path, shape[0], family.published)]
        if len({part.dtype for part in parts}) > 1:
            raise UserError(f"the layers of {path} differ in dtype, Orbax stacks them: give --dtype bf16 or f32")
        chunks = [_chunk(path, part) for part in parts]
        leaves[path.replace(".", "/")] = NewLeaf(shape, parts[0].dtype, many, chunks)
    return leaves


def _chunk(path: str, tensor: LazyTensor) -> Callable[[], np.ndarray]:
    return lambda: from_theirs(path, tensor.read())


@functools.cache
def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path, in the network's order."""
    return {path: leaf.shape for path, leaf in flat(create_network(config).abstract_params()).items()}


def tensor_shapes(family: Family, config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of the published tensors by name."""
    shapes = {}
    for path, shape in parameter_shapes(config).items():
        inner = shape[1:] if is_stacked(path) else shape
        shapes |= dict.fromkeys(their_names(path, shape[0], family.published), _published_shape(path, inner))
    return shapes


def _published_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return to_theirs(path, np.broadcast_to(np.zeros(()), shape)).shape


def check(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises UserError that names every tensor which is missing, unexpected or of another shape."""
    faults = list_faults({name: tensor.shape for name, tensor in tensors.items()}, shapes)
    if faults:
        raise refusal(source, "does not fit the model, nothing was written; check --model", "; ".join(faults))
