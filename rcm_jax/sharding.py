"""The mesh, and where every array of a run lies on it: the only file that names mesh axes.

Two axes: `data` replicates the parameters, `fsdp` shards them; a batch is cut over both.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rcm_jax.config import UserError

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)

# (pattern of a parameter's dotted path, how its axes lie). Every leaf must match exactly one.
RULES = (
    (r"blocks\.(self_attn|cross_attn|ffn|modulation_\w+)\.\w+\.kernel", PartitionSpec(None, "fsdp", None)),
    (r"blocks\.(self_attn|cross_attn|ffn)\.\w+\.(bias|scale)", PartitionSpec()),
    (r"blocks\.(self_attn|cross_attn|ffn)\.\w+\.lora_a", PartitionSpec(None, "fsdp", None)),
    (r"blocks\.(self_attn|cross_attn|ffn)\.\w+\.lora_b", PartitionSpec(None, None, "fsdp")),
    (r"blocks\.norm3\.(bias|scale)", PartitionSpec()),
    (r"patch_embedding\.kernel", PartitionSpec(None, "fsdp")),  # its rows are few and seldom a multiple of 8
    (
        r"((text|time|span)_embedding|(image_embedding|discriminator)\.mlp|head\.modulation)\.\w+\.kernel",
        PartitionSpec("fsdp", None),
    ),
    (r"((text|time|span)_embedding|(image_embedding|discriminator)\.mlp)\.\w+\.bias", PartitionSpec()),
    (r"(time_projection|head\.head)\.kernel", PartitionSpec("fsdp", None)),
    (r"(patch_embedding|time_projection|head\.head)\.bias", PartitionSpec()),
    (r"(image_embedding\.norm_(in|out)|time_norm)\.(bias|scale)", PartitionSpec()),
    (r"(blocks|head)\.modulation", PartitionSpec()),
)


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh over all devices of all processes; -1 takes the devices that are left.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp}
    if list(sizes.values()).count(-1) == 1:
        known = -int(np.prod(list(sizes.values())))
        sizes = {axis: devices // max(known, 1) if size == -1 else size for axis, size in sizes.items()}
    if int(np.prod(list(sizes.values()))) != devices or min(sizes.values()) < 1:
        raise UserError(f"mesh of data={data}, fsdp={fsdp} does not cover {devices} devices: set mesh.data=-1")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a scalar, or of any array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, BATCH)


def split_over_batch(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function` of arrays whose leading axis is the batch, each device of the mesh taking its part of it.

    For kernels, which XLA cannot split. Where the batch does not divide, every device takes it whole.
    """

    def run(*arrays: jax.Array, **options: Any) -> Any:
        spec = BATCH if len(arrays[0]) % mesh.size == 0 else PartitionSpec()
        split = functools.partial(function, **options)
        return jax.shard_map(split, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    return run


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a pytree whose leaves are scalars or lie at a path that ends in a parameter's.

    Raises ValueError for a leaf that no rule, or more than one, matches, UserError for one that does not divide over
    its axes.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf_sharding(_dotted(path), leaf, mesh), tree)


def _leaf_sharding(path: str, leaf: Any, mesh: Mesh) -> NamedSharding:
    if leaf.ndim == 0:
        return replicated(mesh)
    matches = [spec for pattern, spec in RULES if re.search(rf"(^|\.){pattern}$", path)]
    if len(matches) != 1:
        raise ValueError(f"{path} matches {len(matches)} rules of sharding.RULES: it must match exactly one")
    sharding = NamedSharding(mesh, matches[0])
    for size, axis in zip(leaf.shape, matches[0], strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(f"{path} is cut along {size}, not a multiple of mesh.{axis}={mesh.shape[axis]}: lower it")
    return sharding


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
