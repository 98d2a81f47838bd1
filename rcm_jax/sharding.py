"""The mesh, and where every array of a run lies on it: the only file that names mesh axes.

Four axes, the busiest last, so that its devices are the nearest neighbours. `data` and `fsdp` cut the batch, `context`
the tokens of a sample. All but `data` cut the parameters, `tensor` so that every device computes some of the heads and
of the hidden channels. Slices or hosts that a slow network joins lie along `data`, as far as it reaches.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import pallas_kernels
from rcm_jax.config import UserError
from rcm_jax.context_parallel import Ring, Ulysses
from rcm_jax.models.blocks import GATHERED, BlockOps, of_first_keys
from rcm_jax.models.layers import fill

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")

STORED = ("fsdp", "context")  # devices that differ in these alone gather a block's parameters to compute with them
SHARED = (*STORED, "tensor")  # parameters outside the blocks, which every device computes with, are cut by all

# (pattern of a parameter's dotted path, how its axes lie). Every leaf must match exactly one.
RULES = (
    # Columns of a device's heads and hidden channels, then the rows that take them (Megatron-LM, arXiv 1909.08053).
    (r"blocks\.((self|cross)_attn\.(q|k|v|k_img|v_img)|ffn\.up)\.kernel", PartitionSpec(None, STORED, "tensor")),
    (r"blocks\.((self|cross)_attn\.o|ffn\.down)\.kernel", PartitionSpec(None, "tensor", STORED)),
    (r"blocks\.((self|cross)_attn\.(q|k|v|k_img|v_img)|ffn\.up)\.lora_a", PartitionSpec(None, STORED, None)),
    (r"blocks\.((self|cross)_attn\.(q|k|v|k_img|v_img)|ffn\.up)\.lora_b", PartitionSpec(None, None, "tensor")),
    (r"blocks\.((self|cross)_attn\.o|ffn\.down)\.lora_a", PartitionSpec(None, "tensor", None)),
    (r"blocks\.((self|cross)_attn\.o|ffn\.down)\.lora_b", PartitionSpec(None, None, STORED)),
    (r"blocks\.modulation_\w+\.\w+\.kernel", PartitionSpec(None, STORED, None)),
    (r"blocks\.(self_attn|cross_attn|ffn)\.\w+\.(bias|scale)", PartitionSpec()),
    (r"blocks\.norm3\.(bias|scale)", PartitionSpec()),
    # The rows of these are few, and seldom a multiple of 8.
    (
        r"(patch_embedding|(text|time|span)_embedding\.up|image_embedding\.mlp\.up)\.kernel",
        PartitionSpec(None, SHARED),
    ),
    (r"((text|time|span)_embedding|image_embedding\.mlp)\.down\.kernel", PartitionSpec(SHARED, None)),
    (r"(time_projection|head\.head|(head\.modulation|discriminator\.mlp)\.\w+)\.kernel", PartitionSpec(SHARED, None)),
    (r"((text|time|span)_embedding|(image_embedding|discriminator)\.mlp)\.\w+\.bias", PartitionSpec()),
    (r"(patch_embedding|time_projection|head\.head)\.bias", PartitionSpec()),
    (r"(image_embedding\.norm_(in|out)|time_norm)\.(bias|scale)", PartitionSpec()),
    (r"(blocks|head)\.modulation", PartitionSpec()),
)

# The parameters of a block that are multiplied in the network's dtype, whatever they are stored in.
MATRICES = r"(self_attn|cross_attn|ffn)\.\w+\.(kernel|lora_a|lora_b)"

# What a device's tokens are best a multiple of: matrix units read 16 bytes at once, eight numbers in bfloat16. With
# 16,380 tokens on each of two H200s cuBLAS chose kernels for any alignment, which took 152 ms of an sCM step of 2,164.
ALIGNED = 8

# XLA's options, beyond its defaults, that let communication overlap computing; only such as JAX 0.10 to 0.12 all know.
# On TPUs the gathers of weights and the rounds of a ring overlap by default; exchanges that do are refused on some v5e
# slices.
OVERLAP = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}


def make_mesh(
    *, data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over `devices`, by default all of all processes; -1 takes the devices that are left.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, sizes = len(devices), (data, fsdp, context, tensor)
    if sizes.count(-1) == 1:
        left = count // max(-math.prod(sizes), 1)
        sizes = tuple(left if size == -1 else size for size in sizes)
    if math.prod(sizes) != count or min(sizes) < 1:
        given = -1 in (data, fsdp, context, tensor)
        remedy = "choose sizes whose product divides them" if given else "set mesh.data=-1"
        raise UserError(f"mesh of {data=}, {fsdp=}, {context=}, {tensor=} does not cover {count} devices: {remedy}")
    return Mesh(_arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(devices: Sequence[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices as an array of shape `sizes`: neighbours along the last axes, slices along the first they divide."""
    left, across = len({getattr(device, "slice_index", 0) for device in devices}), []
    if left == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    inside = [size // part for size, part in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is cut into: devices that differ in `context` or `tensor` alone share theirs."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """What to compile programs for the mesh with."""
    return OVERLAP.get(mesh.devices.flat[0].platform, {}) if mesh.size > 1 else {}


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a scalar, or of any array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process' devices hold, in order; processes that share samples hold the same."""
    places = batch_sharding(mesh).devices_indices_map((batch_size,)).items()
    held = [np.arange(batch_size)[index] for device, index in places if device.process_index == jax.process_index()]
    return np.unique(np.concatenate(held))


def block_ops(mesh: Mesh | None, heads: int, ulysses: int = 0, *, dtype: Any, implementation: str = "auto") -> BlockOps:
    """Blocks of so many heads over the mesh: kernels, which XLA cannot split, and what it should not choose itself.

    `ulysses` neighbours along the context axis exchange heads for tokens, as many as possible if it is 0; keys go round
    the others in a ring. Tokens need not divide. Matrices travel in `dtype`, which they are multiplied in. A mesh of
    one device, or none, changes nothing but the `implementation` of attention (see pallas_kernels).

    Raises UserError if the tensor axis does not divide the heads, or `ulysses` the context axis and a device's heads.
    """
    choice = {"implementation": implementation}
    if mesh is None or mesh.size == 1:
        return BlockOps(
            of_first_keys(functools.partial(pallas_kernels.attention, **choice)),
            of_first_keys(functools.partial(pallas_kernels.attention_given, **choice)),
        )
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    if heads % tensor:
        raise UserError(f"mesh.tensor={tensor} must divide the {heads} heads of the network: lower it")
    ulysses = ulysses or math.gcd(heads // tensor, context)
    if context % ulysses or heads // tensor % ulysses:
        raise UserError(
            f"model.ulysses={ulysses} must divide mesh.context={context} and the {heads // tensor} heads of a device: "
            "set it to 0"
        )

    split_attention = functools.partial(_split_attention, implementation, mesh, ulysses)

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, *, keys: int | None = None, return_lse: bool = False, **options: Any
    ) -> Any:
        function = functools.partial(pallas_kernels.attention, return_lse=True, **choice | options)
        results = split_attention(function, keys, q, k, v)
        return results if return_lse else results[0]

    def given(
        q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, *, keys: int | None = None
    ) -> jax.Array:
        return split_attention(functools.partial(pallas_kernels.attention_given, **choice), keys, q, k, v, out, lse)

    def fill_parts(x_BLD: jax.Array) -> jax.Array:
        length = context * part_length(x_BLD.shape[1], context, ulysses)
        if context == 1 or length == x_BLD.shape[1]:
            return x_BLD
        # Left to itself, XLA splits the hidden channels before tokens are filled up, and finds no way back but copies.
        spec = PartitionSpec(_batch_axes(mesh, len(x_BLD)), None, None)
        return fill(lax.with_sharding_constraint(x_BLD, NamedSharding(mesh, spec)), 1, length)

    def place(x_BLD: jax.Array) -> jax.Array:
        spec = PartitionSpec(_batch_axes(mesh, len(x_BLD)), "context", None)
        return lax.with_sharding_constraint(x_BLD, NamedSharding(mesh, spec))

    return BlockOps(attention, given, fill_parts, place, functools.partial(_gather, mesh, dtype))


def part_length(tokens: int, context: int, ulysses: int) -> int:
    """The tokens of a device: a multiple of ALIGNED if with that the last device still has some that are real.

    In a ring only if parts are unequal anyhow: which of its visits is to the last, smaller part differs by device, and
    a choice between kernels makes GPUs wait for the host.
    """
    part = -(-tokens // context)
    aligned = -(-part // ALIGNED) * ALIGNED
    equal_in_ring = ulysses < context and tokens % context == 0
    return part if equal_in_ring or aligned * (context - 1) >= tokens else aligned


def _split_attention(
    inner: str, mesh: Mesh, ulysses: int, function: Callable[..., Any], real: int | None, q, k, v, *kept: jax.Array
) -> Any:
    """`function` on each device's part of the batch, tokens and heads; `inner` is what a ring computes with.

    As many keys as queries are taken for those of the same tokens, and lie with them; the first `real` of them count,
    if that is given. Others, such as a caption's, and those of so few tokens that devices have none, are whole
    everywhere. Either is right for any keys.
    """
    batch, tokens, context = _batch_axes(mesh, len(q)), q.shape[1], mesh.shape["context"]
    part, real = -(-tokens // context), real or k.shape[1]
    rows, statistic = PartitionSpec(batch, "context", "tensor"), PartitionSpec(batch, "tensor", "context")
    keys, options = PartitionSpec(batch, None, "tensor"), {}
    last = real - part * (context - ulysses)
    if k.shape[1] == tokens and context > 1 and last > 0:
        ring = Ring("context", context, ulysses, last, pallas_kernels.choose_back_end(inner, q))
        keys, options = rows, {"implementation": Ulysses("context", context, ulysses, ring) if ulysses > 1 else ring}
        k, v = _fill_tokens(k, part * context), _fill_tokens(v, part * context)
    else:
        k, v = k[:, :real], v[:, :real]
    split = jax.shard_map(
        functools.partial(function, **options),
        mesh=mesh,
        in_specs=(rows, keys, keys, *(rows, statistic)[: len(kept)]),
        out_specs=rows if kept else (rows, statistic),
        check_vma=False,
    )
    filled = (_fill_tokens(x, part * context) for x in (q, *kept))
    results = split(next(filled), k, v, *filled)
    return jax.tree.map(lambda x: x[:, :tokens] if x.ndim == 4 else x[:, :, :tokens], results)


def _fill_tokens(x: jax.Array, tokens: int) -> jax.Array:
    """Zeros behind the tokens of (B, L, N, H), or of row statistics (B, N, L), up to a number of them."""
    return fill(x, 1 if x.ndim == 4 else 2, tokens)


def _batch_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | None:
    """Those that cut a batch of so many rows; none where it does not divide, and every device takes it whole."""
    return BATCH if rows % batch_parts(mesh) == 0 else None


def _gather(mesh: Mesh, dtype: Any, params: Any) -> Any:
    """One block's parameters from all devices that store a part, each of which gets its part of the gradient.

    Said to XLA, which else moves activations instead, or sums weights up from parts.
    """

    def gather(path: Any, leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(dtype) if re.fullmatch(MATRICES, _dotted(path)) else leaf
        cut = _match(f"blocks.{_dotted(path)}")[1:]  # of one block: without the axis of the stack
        whole = [None if axis == STORED else axis for axis in cut]
        return checkpoint_name(_move(mesh, PartitionSpec(*cut), PartitionSpec(*whole), leaf), GATHERED)

    return jax.tree_util.tree_map_with_path(gather, params)


def _move_value(mesh: Mesh, home: PartitionSpec, away: PartitionSpec, x: jax.Array) -> jax.Array:
    x = lax.with_sharding_constraint(x, NamedSharding(mesh, home))  # what travels is x, not what it was cast from
    return lax.with_sharding_constraint(x, NamedSharding(mesh, away))


_move = jax.custom_vjp(_move_value, nondiff_argnums=(0, 1, 2))
_move.defvjp(
    lambda *arguments: (_move_value(*arguments), None),
    lambda mesh, home, away, _, gradient: (lax.with_sharding_constraint(gradient, NamedSharding(mesh, home)),),
)


def place_params(tree: Any, mesh: Mesh) -> Any:
    """A pytree of parameters, whole in this process' memory, on the devices of the mesh."""
    return jax.tree.map(
        lambda leaf, at: jax.make_array_from_callback(leaf.shape, at, lambda index: leaf[index]),
        tree,
        tree_shardings(tree, mesh),
    )


def in_host_memory(shardings: Any) -> Any:
    """The same places, those of matrices in the memory of the devices' hosts; the rest of a network is small."""

    def move(path: Any, at: NamedSharding) -> NamedSharding:
        return at.with_memory_kind("pinned_host") if _dotted(path).endswith(".kernel") else at

    return jax.tree_util.tree_map_with_path(move, shardings)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a pytree whose leaves are scalars or lie at a path that ends in a parameter's.

    Raises ValueError for a leaf that no rule, or more than one, matches, UserError for one that does not divide over
    its axes.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf_sharding(_dotted(path), leaf, mesh), tree)


def _leaf_sharding(path: str, leaf: Any, mesh: Mesh) -> NamedSharding:
    if leaf.ndim == 0:
        return replicated(mesh)
    spec = _match(path)
    for size, axes in zip(leaf.shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            names = " * ".join(f"mesh.{axis}" for axis in axes)
            raise UserError(f"{path} is cut along {size}, not a multiple of {names} = {parts}: lower it")
    return NamedSharding(mesh, spec)


def _match(path: str) -> PartitionSpec:
    matches = [spec for pattern, spec in RULES if re.search(rf"(^|\.){pattern}$", path)]
    if len(matches) != 1:
        raise ValueError(f"{path} matches {len(matches)} rules of sharding.RULES: it must match exactly one")
    return matches[0]


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
