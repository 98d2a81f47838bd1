"""The story of a conversion: find, name, check, merge, and only then write, one tensor after the other."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rcm_jax.config import UserError
from rcm_jax.convert import families, merging, orbax, safetensors_file, torch_file
from rcm_jax.convert.families import Family
from rcm_jax.convert.sources import Part, Source, open_source
from rcm_jax.convert.tensors import BFLOAT16, Tensors
from rcm_jax.convert.writing import Plan, check_target, partial_of, write_json, write_plan
from rcm_jax.models.presets import PRESETS, Config

Format = Literal["orbax", "wan", "rcm", "diffusers"]
DTYPES = {"bf16": BFLOAT16, "f32": np.dtype("<f4")}
FLOATS = (*DTYPES.values(), np.dtype("<f2"))
FILES: dict[str, tuple[str, ...]] = {"wan": (".safetensors",), "rcm": (".pth", ".pt", ".safetensors")}
STEM = "diffusion_pytorch_model"  # what Wan and diffusers call their files
SHARD_BYTES = 5_000_000_000


def convert(
    source: Path,
    target: Path,
    *,
    model: str,
    to: Format,
    part: Part | None = None,
    dtype: Literal["bf16", "f32"] | None = None,
    delta: tuple[Path, Path] | None = None,
    lora: Path | None = None,
    scale: float = 1.0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Converts a checkpoint; prints what it finds and what it writes.

    Args:
        source: any checkpoint that `open_source` knows.
        target: a path that does not exist: a folder, but for rcm a .pth, .pt or .safetensors file; wan takes both.
        model: a preset, or a family such as "wan2.1-t2v", whose sizes are then taken from the tensors.
        to: Wan's own layout, rCM's, diffusers', or a checkpoint of ours.
        part: which network of a checkpoint with several.
        dtype: what the numbers become; None keeps them.
        delta: teacher and student, whose difference is added `scale` times.
        lora: a LoRA file that is added `scale` times.
        scale: the strength of either.
        shard_bytes: how large a file of a folder of safetensors may become.

    Raises:
        UserError: something does not fit. Nothing is written then.
    """
    check_target(target)
    is_file = _is_file(target, to)
    family, config = families.find_model(model)
    if to == "wan" and "wan" not in family.settings:
        raise UserError(f"--model {model} has no wan layout: write --to rcm, which is its authors' own, or another")
    tensors, found = _read(source, family, part)
    if config is None:
        config = config_of(found, tensors, family)
        model, config = families.name_config(config, model)
    print(_describe(model, config, tensors))
    shapes = families.tensor_shapes(family, config)
    families.check(tensors, shapes, str(source))
    _check_dtypes(tensors, source)
    tensors = {name: tensors[name] for name in shapes}  # one order, whatever the source's
    sources = [found]
    if delta:
        (teacher, before), (student, after) = (_read(path, family, None) for path in delta)
        tensors = merging.add_delta(tensors, teacher, student, scale, family.patch_kernel)
        sources += [before, after]
    if lora:
        tensors, added = _with_lora(tensors, family, lora, scale)
        sources += [added]
    if dtype:
        tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    plan = plan_target(
        tensors, family, config, to, model=model, file=target.name if is_file else None, limit=shard_bytes
    )
    plan = Plan(plan.pieces, functools.partial(_finish, plan, sources))
    inputs = [source.path for source in sources]
    fingerprint = _fingerprint([to, model, part, dtype, scale, bool(lora)], inputs, plan, partial_of(target))
    resumed = write_plan(plan, target, fingerprint, single_file=target.name if is_file else None)
    if resumed:
        print(f"went on after the {resumed} tensors that an interrupted run had written")
    print(f"wrote {target}: {to} layout, {sum(piece.nbytes for piece in plan.pieces):,} bytes")


def _read(path: Path, family: Family, part: Part | None) -> tuple[Tensors, Source]:
    """The tensors of a checkpoint by their published names, and where they come from. Says what it found."""
    found = open_source(path, part)
    layout, tensors = families.published(found, family)
    which = f", {found.part} of the networks in it" if found.part else ""
    dtypes = sorted({tensor.dtype.name for tensor in tensors.values()})
    print(f"found {found.path}: {found.kind}, {layout} layout, {len(tensors)} tensors, {', '.join(dtypes)}{which}")
    return tensors, found


def config_of(found: Source, tensors: Tensors, family: Family) -> Config:
    """The sizes of a network from its published tensors. Raises UserError if they do not tell."""
    try:
        return family.config_from_tensors({name: tensor.shape for name, tensor in tensors.items()}, found.settings)
    except UserError as error:
        raise UserError(f"{found.path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{found.path}: {error}; name a size with --model, or mend config.json") from None


def plan_target(
    tensors: Tensors, family: Family, config: Config, to: Format, *, model: str, file: str | None, limit: int
) -> Plan:
    """How to write published tensors in a format: as one `file`, or a folder of files of at most `limit` bytes."""
    if to == "orbax":
        metadata = {"model": model, "config": dataclasses.asdict(config)}
        return orbax.plan_checkpoint(families.stacked(tensors, family, config), metadata)
    arranged = families.arranged(tensors, family, to, config)
    if file is None:
        plan = safetensors_file.plan_sharded(STEM, arranged, limit)
        settings = family.settings[to](config)

        def finish(folder: Path, facts: Any) -> None:
            plan.finish(folder, facts)
            write_json(folder / "config.json", settings)

        return Plan(plan.pieces, finish)
    if file.endswith(".safetensors"):
        return safetensors_file.plan_file(file, arranged, {"format": "pt", "model": model})
    return torch_file.plan_file(file, arranged)


def _is_file(target: Path, to: Format) -> bool:
    """Whether the target is a file. Raises UserError if the format is not written to one of that name."""
    suffixes = FILES.get(to, ())
    if target.suffix in suffixes:
        return True
    if to == "rcm" or target.suffix in (".safetensors", ".pth", ".pt"):
        kinds = " or ".join([*(["a folder"] if to != "rcm" else []), *(f"a {suffix} file" for suffix in suffixes)])
        raise UserError(f"{target} cannot hold the {to} layout: name {kinds}")
    return False


def _describe(model: str, config: Config, tensors: Tensors) -> str:
    size = "" if model in PRESETS else " of its own size"
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    shape = f"width {config.dim}, {config.layers} blocks, {config.heads} heads, {count:,} parameters"
    return f"taken as {model}{size}: {shape}"


def _check_dtypes(tensors: Tensors, source: Path) -> None:
    wrong = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if wrong:
        raise UserError(f"{source} must hold float32, bfloat16 or float16 numbers, save it so: {'; '.join(wrong)}")


def _with_lora(tensors: Tensors, family: Family, lora: Path, scale: float) -> tuple[Tensors, Source]:
    found = open_source(lora)
    print(f"found {found.path}: {found.kind}, {len(found.tensors)} tensors of a LoRA")
    rename = families.diffusers_to_published(family)
    return merging.add_lora(tensors, found.tensors, found.metadata, scale, rename), found


def _finish(plan: Plan, sources: Iterable[Source], folder: Path, facts: Mapping[str, Any]) -> None:
    """Completes the target, once the sources are known to be sound: an interrupted run had not read them to the end."""
    for source in sources:
        families.read_rest(source)
    plan.finish(folder, facts)


def _fingerprint(options: list[Any], inputs: Iterable[Path], plan: Plan, partial: Path) -> str:
    """Changes with the options, the files of the checkpoints that are read and the pieces to write.

    `partial`, the folder that the target is written in, may lie within a checkpoint and is not of it.
    """
    every = [file for path in inputs for file in sorted([path.resolve(), *path.resolve().rglob("*")])]
    facts = [(str(file), file.stat()) for file in every if file.is_file() and partial.resolve() not in file.parents]
    # The time of the last change of the file's entry too: a copy that is put back may have the old file's other time.
    files = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in facts]
    pieces = [(piece.key, piece.nbytes) for piece in plan.pieces]
    return hashlib.sha256(json.dumps([options, files, pieces]).encode()).hexdigest()
