"""Finds out what a path holds, and opens the tensors of one network in it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

from rcm_jax.config import UserError
from rcm_jax.convert import orbax, safetensors_file, torch_distributed, torch_file
from rcm_jax.convert.orbax import Leaf
from rcm_jax.convert.tensors import LazyTensor, Tensors, read_json, refusal

Part = Literal["student", "ema", "teacher", "fake"]

# What rCM calls the networks in one file, what our runs call them, and how others nest them. A student's EMA is the
# one that rCM samples from, so it is taken before the student itself.
_PREFIXES: dict[str, Part] = {
    "net_ema.": "ema",
    "net.": "student",
    "net_fake_score.": "fake",
    "model.diffusion_model.": "student",
}
_NESTS: dict[str, Part] = {"ema": "ema", "model": "student", "state_dict": "student"}
_LEAF_PREFIXES: dict[str, Part] = {
    "ema/": "ema",
    "student/": "student",
    "fake/": "fake",
    "teacher/": "teacher",
    orbax.ROOT: "student",
}


# Folders of networks in Wan2.2's release and in diffusers' pipelines.
_EXPERTS = ("high_noise_model", "low_noise_model", "transformer", "transformer_2")


class Source(NamedTuple):
    """One network of a checkpoint.

    `tensors` go by the file's names without prefix; an Orbax checkpoint has `leaves` by path instead. `settings` is
    the config.json beside them, if there is one, `metadata` what a safetensors file says of itself.
    """

    path: Path
    kind: str
    tensors: Tensors
    part: Part | None
    leaves: Mapping[str, Leaf] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})
    metadata: Mapping[str, str] = MappingProxyType({})


def open_source(path: Path, part: Part | None = None) -> Source:
    """Detects what `path` is and opens it.

    Args:
        path: a .safetensors, .pth or .pt file; a folder of safetensors with or without an index; a diffusers pipeline;
            a PyTorch distributed checkpoint, or an iteration of a run that has one in model/; an Orbax checkpoint, or
            the folder of a run that has one.
        part: which network, of a checkpoint with several. By default the EMA if there is one, else the student.

    Raises:
        UserError: it is nothing of that, is damaged, or lacks the part.
    """
    if path.is_file():
        return _open_file(path, part)
    if not path.is_dir():
        raise UserError(f"{path} is not a file or folder: give a checkpoint's file or folder")
    return _open_folder(path, part)


def _open_file(path: Path, part: Part | None) -> Source:
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\3\4":
        tensors, part = _pick(path, torch_file.read_value(torch_file.Region(path)), part)
        return Source(path, "PyTorch file", tensors, part)
    if start[8:] == b"{" or path.suffix == ".safetensors":
        tensors, metadata = safetensors_file.read_file(path)
        tensors, part = _pick(path, tensors, part)
        return Source(path, "safetensors file", tensors, part, metadata=metadata)
    remedy = "fetch it again; save a .pth with PyTorch 1.6 or newer"
    raise refusal(path, "is not a complete safetensors file, nor a zip archive of torch.save", remedy)


def _open_folder(path: Path, part: Part | None) -> Source:
    for folder in (path, path / "model"):
        if (folder / ".metadata").is_file():
            tensors, part = _pick(folder, torch_distributed.read_folder(folder), part)
            return Source(folder, "PyTorch distributed checkpoint", tensors, part)
    if checkpoint := orbax.find_checkpoint(path):
        arrays = orbax.read_leaves(checkpoint)
        arrays = {name: leaf for name, leaf in arrays.items() if name.startswith(tuple(_LEAF_PREFIXES))}
        leaves, part = _choose(checkpoint, arrays, _LEAF_PREFIXES, part)
        leaves = {name.replace("/", "."): leaf for name, leaf in leaves.items()}
        return Source(checkpoint, "Orbax checkpoint", {}, part, leaves)
    experts = [path / name for name in _EXPERTS if (path / name).is_dir()]
    if len(experts) > 1:
        raise UserError(f"{path} holds {len(experts)} networks: give one of {', '.join(map(str, experts))}")
    if experts:
        return _open_folder(experts[0], part)
    return _open_safetensors(path, part)


def _open_safetensors(path: Path, part: Part | None) -> Source:
    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    if len(indices) > 1 or (not indices and len(files) > 1):
        rule = f"holds several checkpoints ({', '.join(file.name for file in indices or files)})"
        raise refusal(path, rule, "give one file, or the index of its shards")
    if not files:
        known = "safetensors, .metadata of a distributed checkpoint, or an Orbax checkpoint"
        raise refusal(path, f"holds no {known}", "give a checkpoint's file or folder")
    tensors = safetensors_file.read_sharded(indices[0]) if indices else safetensors_file.read_file(files[0])[0]
    tensors, part = _pick(path, tensors, part)
    settings = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if not isinstance(settings, dict):
        raise refusal(path / "config.json", "must hold settings by name", "fetch it again")
    return Source(path, f"folder of {len(files)} safetensors files", tensors, part, settings=settings)


def _pick(path: Path, value: Any, part: Part | None) -> tuple[Tensors, Part | None]:
    """The tensors of one network, of the value of a file, and which part they are; None if the file has no parts."""
    entries = value if isinstance(value, dict) else {}
    nests = {name: nest for name, nest in entries.items() if name in _NESTS and isinstance(nest, dict)}
    if nests:
        flat = {f"{nest}.{name}": entry for nest, inner in nests.items() for name, entry in inner.items()}
        prefixes: dict[str, Part] = {f"{name}.": part for name, part in _NESTS.items() if name in nests}
        chosen, part = _choose(path, flat, prefixes, part)
        return _pick(path, chosen, None)[0], part
    entries = {name: entry for name, entry in entries.items() if not str(name).endswith("_extra_state")}
    wrong = [
        str(name) for name, entry in entries.items() if not (isinstance(name, str) and isinstance(entry, LazyTensor))
    ]
    if wrong or not entries:
        rule = f"holds {', '.join(wrong) or 'nothing'}, which is no tensor"
        raise refusal(path, rule, "save a dict of a network's tensors")
    if not any(name.startswith(tuple(_PREFIXES)) for name in entries):
        if part is not None:
            raise UserError(f"{path} holds one network: leave --part {part} out")
        return entries, None
    return _choose(path, entries, _PREFIXES, part)


_Entry = TypeVar("_Entry")


def _choose(
    path: Path, entries: Mapping[str, _Entry], prefixes: Mapping[str, Part], part: Part | None
) -> tuple[dict[str, _Entry], Part]:
    """The entries of one part, without their prefix. Entries of no part stay as they are."""
    present: list[Part] = [p for prefix, p in prefixes.items() if any(name.startswith(prefix) for name in entries)]
    if not present:
        raise refusal(path, "holds no network", "give a checkpoint of a run or of a conversion")
    if part is not None and part not in present:
        raise UserError(f"{path} has no --part {part}: choose one of {', '.join(present)}")
    chosen = part or present[0]
    own = tuple(prefix for prefix, other in prefixes.items() if other == chosen)
    others = tuple(prefix for prefix in prefixes if prefix not in own)
    return {_without(name, own): entry for name, entry in entries.items() if not name.startswith(others)}, chosen


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)
