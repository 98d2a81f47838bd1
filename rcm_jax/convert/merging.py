"""Adding to a network what another one learned: the difference of two checkpoints, or a LoRA file.

Sums are float32 and are rounded once, to the dtype that the network has. All tensors stay lazy.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from rcm_jax.config import UserError
from rcm_jax.convert.tensors import LazyTensor, Tensors, parse_json


def add_delta(base: Tensors, teacher: Tensors, student: Tensors, scale: float, patch_kernel: str) -> Tensors:
    """base + scale * (student - teacher), tensor by tensor.

    An image-to-video network has a wider `patch_kernel` than the text-to-video one it came from: a condition follows
    the latent's channels there. The difference is added to those of the latent, the first.

    Raises UserError that names every tensor in which the three differ.
    """
    faults = []
    for name in sorted(base.keys() | teacher.keys() | student.keys()):
        shapes = [tensors[name].shape if name in tensors else None for tensors in (base, teacher, student)]
        ours, before, after = shapes
        if before != after or not (ours == before or (name == patch_kernel and _is_wider(ours, before))):
            faults.append(f"{name} is {', '.join('absent' if shape is None else str(shape) for shape in shapes)}")
    if faults:
        raise UserError(
            f"--add-delta needs three networks of one layout, but in source, teacher and student {'; '.join(faults)}"
        )
    return {name: _with_delta(tensor, teacher[name], student[name], scale) for name, tensor in base.items()}


def _is_wider(base: tuple[int, ...] | None, other: tuple[int, ...] | None) -> bool:
    if base is None or other is None or not len(base) == len(other) == 2:
        return False
    return base[0] == other[0] and base[1] > other[1]


def _with_delta(base: LazyTensor, teacher: LazyTensor, student: LazyTensor, scale: float) -> LazyTensor:
    def read() -> np.ndarray:
        delta = student.read().astype(np.float32)
        delta -= teacher.read().astype(np.float32)
        return _added(base, delta, scale)

    return LazyTensor(base.shape, base.dtype, read)


def _added(base: LazyTensor, delta: np.ndarray, scale: float) -> np.ndarray:
    """base + scale * delta, where delta may have fewer columns."""
    total = base.read().astype(np.float32)
    total[tuple(slice(n) for n in delta.shape)] += np.float32(scale) * delta
    return total.astype(base.dtype)


class _Lora(NamedTuple):
    """What a LoRA file holds for one tensor: it grows by alpha / rank * up @ down, or by `difference`.

    In the former case the bias of its layer grows by alpha / rank * up_bias: PEFT scales all that `up` returns.
    """

    down: LazyTensor | None = None
    up: LazyTensor | None = None
    up_bias: LazyTensor | None = None
    alpha: LazyTensor | None = None
    difference: LazyTensor | None = None


_PREFIXES = ("transformer.", "diffusion_model.")
# The end of a name -> the tensor of the module that it changes, and its part of _Lora.
_ROLES = {
    "lora_A.weight": ("weight", "down"),
    "lora_A.default.weight": ("weight", "down"),
    "lora_down.weight": ("weight", "down"),
    "lora_B.weight": ("weight", "up"),
    "lora_B.default.weight": ("weight", "up"),
    "lora_up.weight": ("weight", "up"),
    "alpha": ("weight", "alpha"),
    "diff": ("weight", "difference"),
    "diff_b": ("bias", "difference"),
    "lora_B.bias": ("weight", "up_bias"),
    "lora_B.default.bias": ("weight", "up_bias"),
}


def add_lora(
    base: Tensors, lora: Tensors, metadata: Mapping[str, str], scale: float, rename: Callable[[str], str]
) -> Tensors:
    """base + scale * alpha / rank * up @ down, and the same of the bias of up, for the layers that a LoRA file names.

    Args:
        base: tensors by their published names.
        lora: the file's, by diffusers' names ("transformer.blocks.0.attn1.to_q.lora_A.weight") or the original ones
            ("diffusion_model.blocks.0.self_attn.q.lora_down.weight", with ".alpha"; ".diff" and ".diff_b" are plain
            differences of a weight and a bias). Without an alpha, alpha = rank.
        metadata: the file's; diffusers notes the alpha of all layers there.
        scale: the strength.
        rename: gives the published name for one of diffusers'.

    Raises UserError that names every tensor that fits no layer.
    """
    alpha = _common_alpha(metadata)
    found: dict[str, dict[str, LazyTensor]] = {}
    faults = []
    for name, tensor in lora.items():
        module, kind, role = _parse(name)
        target = rename(f"{module}.{kind}")
        if target not in base or role in found.get(target, {}):
            faults.append(f"unexpected {name}")
        else:
            found.setdefault(target, {})[role] = tensor
    layers = {target: _Lora(**parts) for target, parts in found.items()}
    faults += [f"{fault} of {target}" for target, layer in layers.items() if (fault := _fault(base, target, layer))]
    if faults or not layers:
        raise UserError(f"the LoRA file does not fit the model, nothing was written: {'; '.join(faults) or 'empty'}")
    merged = dict(base)
    for target, layer in layers.items():
        merged[target] = _with_lora(merged[target], layer, alpha, scale)
        if layer.up_bias is not None:
            merged[_bias_of(target)] = _with_bias(merged[_bias_of(target)], layer, alpha, scale)
    return merged


def _parse(name: str) -> tuple[str, str, str]:
    """The module that a tensor of a LoRA file changes, which tensor of it, and the role in that."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for suffix, (kind, role) in _ROLES.items():
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), kind, role
    return name, "", ""


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"


def _fault(base: Tensors, target: str, layer: _Lora) -> str | None:
    """What is wrong with what a file holds for one tensor."""
    shape, bias = base[target].shape, base.get(_bias_of(target))
    if layer.difference is not None:
        if (layer.down, layer.up, layer.up_bias) != (None, None, None):
            return "matrices beside a difference"
        return None if layer.difference.shape == shape else f"shape {layer.difference.shape} of the difference"
    if layer.down is None or layer.up is None:
        return f"missing {'down' if layer.down is None else 'up'} matrix"
    down, up = layer.down.shape, layer.up.shape
    if len(down) != 2 or len(up) != 2 or up[1] != down[0] or (up[0], down[1]) != shape or 0 in down:
        return f"matrices of {up} and {down} for the shape {shape}"
    if layer.up_bias is not None and (bias is None or layer.up_bias.shape != bias.shape):
        return f"bias of {layer.up_bias.shape} for {'none' if bias is None else f'the bias of {bias.shape}'}"
    return "more than one alpha" if layer.alpha is not None and layer.alpha.size != 1 else None


def _common_alpha(metadata: Mapping[str, str]) -> float | None:
    """The alpha of all layers by what diffusers' save_lora_weights notes, None without one."""
    text = metadata.get("lora_adapter_metadata")
    notes = parse_json(text.encode(), "lora_adapter_metadata of the LoRA file") if text else {}
    notes = {key.removeprefix("transformer."): value for key, value in notes.items()} if isinstance(notes, dict) else {}
    for option in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora"):
        if notes.get(option):
            raise UserError(f"the LoRA file uses {option}, which is not supported: merge it with PEFT first")
    alpha = notes.get("lora_alpha")
    return float(alpha) if isinstance(alpha, int | float) else None


def _with_lora(target: LazyTensor, layer: _Lora, alpha: float | None, scale: float) -> LazyTensor:
    def read() -> np.ndarray:
        if layer.difference is not None:
            return _added(target, layer.difference.read().astype(np.float32), scale)
        down, up = (part.read().astype(np.float32) for part in (layer.down, layer.up) if part is not None)
        return _added(target, up @ down, scale * _factor(layer, alpha))

    return LazyTensor(target.shape, target.dtype, read)


def _with_bias(target: LazyTensor, layer: _Lora, alpha: float | None, scale: float) -> LazyTensor:
    def read() -> np.ndarray:
        return _added(target, np.asarray(layer.up_bias, np.float32), scale * _factor(layer, alpha))

    return LazyTensor(target.shape, target.dtype, read)


def _factor(layer: _Lora, alpha: float | None) -> float:
    """alpha / rank of a layer, by its own alpha, or else that of all layers, or else the rank."""
    assert layer.down is not None
    rank = layer.down.shape[0]
    own = alpha if layer.alpha is None else float(layer.alpha.read().reshape(()))
    return 1.0 if own is None else own / rank
