"""What conversion knows of each kind of network: its name table, its sizes, and how its parameters lie in a file.

Between reading and writing, a network's tensors go by the published names, with the patch embedding as a matrix.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx, traverse_util

from rcm_jax.config import UserError
from rcm_jax.convert import wan
from rcm_jax.convert.orbax import Leaf, NewLeaf
from rcm_jax.convert.sources import Source
from rcm_jax.convert.tensors import LazyTensor, Tensors, refusal
from rcm_jax.models.wan import PRESETS, Wan

Layout = Literal["wan", "rcm", "diffusers"]


class Family(NamedTuple):
    """A kind of network.

    Attributes:
        create: a network of a config, from its random numbers.
        config_from_tensors: a config from the tensors' shapes by name and the settings of a config.json.
        diffusers_names: pairs of modules or parameters, published and diffusers'; N stands for a number.
        settings: the config.json of a layout that has one, by layout.
        patch_kernel: the tensor that is a Conv3d kernel in some layouts and a matrix in others.
        leaf_names, is_stacked, to_published, from_published: how parameters of ours become published tensors, as
            in convert/wan.py.
    """

    create: Callable[[Any, nnx.Rngs], nnx.Module]
    config_from_tensors: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], Any]
    diffusers_names: Sequence[tuple[str, str]]
    settings: Mapping[str, Callable[[Any], dict[str, Any]]]
    patch_kernel: str
    leaf_names: Callable[[str, int], list[str]]
    is_stacked: Callable[[str], bool]
    to_published: Callable[[str, np.ndarray], np.ndarray]
    from_published: Callable[[str, np.ndarray], np.ndarray]


WAN = Family(
    create=lambda config, rngs: Wan(config, rngs=rngs),
    config_from_tensors=wan.config_from_tensors,
    diffusers_names=wan.DIFFUSERS_NAMES,
    settings={"wan": wan.wan_settings, "diffusers": wan.diffusers_settings},
    patch_kernel="patch_embedding.weight",
    leaf_names=wan.leaf_names,
    is_stacked=wan.is_stacked,
    to_published=wan.to_wan,
    from_published=wan.from_wan,
)

# Models by the beginning of their name; what follows is a size. Wan2.2 T2V has two networks of Wan2.1's layout.
FAMILIES = {"digits": WAN, "wan2.1-t2v": WAN, "wan2.2-t2v": WAN}


def find_model(model: str) -> tuple[Family, Any]:
    """The family of a model, and its config if the name gives a size, else None.

    Raises UserError for an unknown name.
    """
    for name, family in FAMILIES.items():
        if model == name or (model in PRESETS and model.startswith(name)):
            return family, PRESETS.get(model)
    known = sorted({*FAMILIES, *(preset for preset in PRESETS if preset.startswith(tuple(FAMILIES)))})
    raise UserError(f"--model {model} is not known: choose one of {', '.join(known)}")


def published(source: Source, family: Family) -> tuple[str, Tensors]:
    """The tensors of a checkpoint by their published names, and the layout they had. Unknown names are kept."""
    if source.leaves:
        return "orbax", _unstacked(source.leaves, family)
    tensors = source.tensors
    to_published, to_diffusers = renaming(family.diffusers_names, back=True), renaming(family.diffusers_names)
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


def arranged(tensors: Tensors, family: Family, layout: Layout, config: Any) -> Tensors:
    """Published tensors by the names and in the shapes of a layout, in the same order."""
    if layout == "rcm":
        return {f"net.{name}": tensor for name, tensor in tensors.items()}
    kernel = tensors[family.patch_kernel]
    window = kernel.reshape(kernel.shape[0], config.in_channels, *config.patch)
    tensors = tensors | {family.patch_kernel: window}
    if layout == "wan":
        return tensors
    rename = renaming(family.diffusers_names)
    return {rename(name): tensor for name, tensor in tensors.items()}


def renaming(table: Sequence[tuple[str, str]], *, back: bool = False) -> Callable[[str], str]:
    """A function from a tensor's name to its name by a table of modules; a name that the table lacks stays."""
    modules = {theirs: ours for ours, theirs in table} if back else dict(table)

    def rename(name: str) -> str:
        block = re.match(r"(\w*blocks)\.(\d+)(?=\.)", name)
        number = block[2] if block else "N"
        general = name.replace(block[0], f"{block[1]}.N", 1) if block else name
        module, _, parameter = general.rpartition(".")
        if general in modules:
            return modules[general].replace("N", number)
        return f"{modules[module]}.{parameter}".replace("N", number) if module in modules else name

    return rename


def _unstacked(leaves: Mapping[str, Leaf], family: Family) -> Tensors:
    tensors: Tensors = {}
    for path, leaf in leaves.items():
        stacked = family.is_stacked(path)
        layers, shape = (leaf.shape[0], leaf.shape[1:]) if stacked else (1, leaf.shape)
        for layer, name in enumerate(family.leaf_names(path, layers)):
            tensors[name] = _of_leaf(path, leaf, layer if stacked else ..., shape, family)
    return tensors


def _of_leaf(path: str, leaf: Leaf, index: Any, shape: tuple[int, ...], family: Family) -> LazyTensor:
    return LazyTensor(
        _published_shape(path, shape, family), leaf.dtype, lambda: family.to_published(path, leaf.read(index))
    )


def stacked(tensors: Tensors, family: Family, config: Any) -> dict[str, NewLeaf]:
    """Parameters of ours by path, from published tensors.

    Raises UserError if the layers of a parameter differ in dtype.
    """
    leaves = {}
    for path, shape in parameter_shapes(family, config).items():
        many = family.is_stacked(path)
        parts = [tensors[name] for name in family.leaf_names(path, shape[0] if many else 1)]
        if len({part.dtype for part in parts}) > 1:
            raise UserError(f"the layers of {path} differ in dtype, Orbax stacks them: give --dtype bf16 or f32")
        chunks = [_chunk(path, part, family) for part in parts]
        leaves[path.replace(".", "/")] = NewLeaf(shape, parts[0].dtype, many, chunks)
    return leaves


def _chunk(path: str, tensor: LazyTensor, family: Family) -> Callable[[], np.ndarray]:
    return lambda: family.from_published(path, tensor.read())


def parameter_shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path, in the network's order."""
    return _parameter_shapes(family.create, config)


@functools.cache
def _parameter_shapes(create: Callable[[Any, nnx.Rngs], nnx.Module], config: Any) -> dict[str, tuple[int, ...]]:
    network = nnx.eval_shape(lambda: create(config, nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="."))
    return {path: leaf.shape for path, leaf in leaves.items()}


def tensor_shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the published tensors by name."""
    shapes = {}
    for path, shape in parameter_shapes(family, config).items():
        many = family.is_stacked(path)
        for name in family.leaf_names(path, shape[0] if many else 1):
            shapes[name] = _published_shape(path, shape[1:] if many else shape, family)
    return shapes


def _published_shape(path: str, shape: tuple[int, ...], family: Family) -> tuple[int, ...]:
    return family.to_published(path, np.broadcast_to(np.zeros(()), shape)).shape


def check(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises UserError that names every tensor which is missing, unexpected or of another shape."""
    faults = [f"missing {name}" for name in shapes if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in shapes]
    faults += [
        f"{name} has shape {tensor.shape}, not {shapes[name]}"
        for name, tensor in tensors.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    if faults:
        raise refusal(source, "does not fit the model, nothing was written", "; ".join(faults))
