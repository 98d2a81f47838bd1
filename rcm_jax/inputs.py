"""Tells the files that a command reads from others that were put in their place since, under the same names."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from rcm_jax.convert import orbax

PLACES, PIECE = 16, 4096  # how many pieces of a file are looked at, and their bytes

# What counts in a folder that is given as a checkpoint or a tokeniser. All kinds of things may lie beside it, such as
# the samples that are being made.
_PATTERNS = ("*.safetensors", "*.distcp", "config.json", "tokenizer.json", "spiece.model")
_SUBFOLDERS = ("", "model", "high_noise_model", "low_noise_model", "transformer", "transformer_2")


def describe_file(path: Path) -> str:
    """Size of a file and a digest of pieces all over it: a network that was trained further differs nearly everywhere.

    A copy has the same, whenever it was made and wherever it lies.
    """
    if not path.is_file():
        return "absent"
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for place in range(PLACES):
            file.seek(max(0, size - PIECE) * place // (PLACES - 1))
            digest.update(file.read(PIECE))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def describe_checkpoints(paths: Iterable[Path | None]) -> dict[str, str]:
    """Every file of checkpoints and tokenisers, as files or folders, by name; None is passed over."""
    files = [file for path in paths if path is not None for file in _checkpoint_files(path)]
    return {f"file {file}": describe_file(file) for file in files}


def _checkpoint_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if checkpoint := orbax.find_checkpoint(path):
        return sorted(file for file in checkpoint.rglob("*") if file.is_file())
    found = (path / folder for folder in _SUBFOLDERS)
    return sorted(file for folder in found for pattern in _PATTERNS for file in folder.glob(pattern))
