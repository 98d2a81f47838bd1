"""The parameters in our Orbax checkpoints (checkpoint.py), read layer by layer and written chunk by chunk.

Orbax would hold a whole array in memory, and one array has a parameter of all layers. Its arrays are zarr, version 2;
ours are written as plain zarr folders with one uncompressed chunk a layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from rcm_jax import integrity
from rcm_jax.config import UserError
from rcm_jax.convert.tensors import BFLOAT16, is_counts, read_json, refusal
from rcm_jax.convert.writing import Piece, Plan, as_bytes, write_json, write_piece

DTYPES = {np.dtype("<f4"): "<f4", np.dtype("<f2"): "<f2", BFLOAT16: "bfloat16"}
ROOT = "params/"  # what a leaf's name begins with in a checkpoint of parameters alone


@dataclasses.dataclass
class Leaf:
    """One array of a checkpoint, to be read whole or layer by layer.

    TensorStore gives zeros for a file that is missing, and whatever bits it finds. So the fingerprint of what is read
    is compared, once all of it is, with that of what was saved.

    Attributes:
        state: the folder of the checkpoint's arrays.
        name: the array's there.
        shape: as saved.
        dtype: as saved.
        fingerprint: of what was saved.
        store: TensorStore's description of where it lies.
        lanes: what each layer that has been read, or the whole, adds to the fingerprint.
    """

    state: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fingerprint: str
    store: Mapping[str, Any]
    lanes: dict[int | None, list[int]] = dataclasses.field(default_factory=dict)

    def read(self, layer: int | None) -> np.ndarray:
        """A layer, or the whole for None. Raises UserError if it is unreadable, or all is in and not what was saved."""
        try:
            array = ts.open({"driver": "zarr", "kvstore": self.store}, read=True).result()
            found = f"{array.dtype.name}{list(array.shape)}"
            if found != f"{self.dtype}{list(self.shape)}":
                raise ValueError(f"it is {found}")
            part = np.asarray(array[... if layer is None else layer].read().result())
        except ValueError as error:
            raise self._refusal(f"({str(error).partition(' [')[0].strip()})") from None
        self.lanes[layer] = integrity.part_lanes(part, layer)
        complete = layer is None or len(self.lanes) == self.shape[0]
        if complete and integrity.join_lanes(self.lanes.values()) != self.fingerprint:
            raise self._refusal("by its fingerprint")
        return part

    def read_rest(self, *, stacked: bool) -> None:
        """Reads the layers, or the whole, that have not been read. Raises UserError as `read` does."""
        for layer in range(self.shape[0]) if stacked else (None,):
            if layer not in self.lanes:
                self.read(layer)

    def _refusal(self, how: str) -> UserError:
        rule = f"has an array {self.name} that is not what was saved, {how}"
        return refusal(self.state, rule, "restore it from a copy, or give another checkpoint")


class NewLeaf(NamedTuple):
    """One array to write, given by its chunks: its layers if it is `stacked`, else one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    chunks: list[Callable[[], np.ndarray]]


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder, of its checkpoints/, or `folder` itself if it is one; else None."""
    for candidate in (folder, folder / "checkpoints"):
        if (candidate / "state" / "_METADATA").is_file():
            return candidate
        steps = [step for step in candidate.glob("*") if step.name.isdecimal() and (step / "state").is_dir()]
        if steps:
            return max(steps, key=lambda step: int(step.name))
    return None


def read_leaves(checkpoint: Path) -> dict[str, Leaf]:
    """The arrays of a checkpoint by name, such as "ema/blocks/ffn/up/kernel", to be read later.

    Raises UserError if the checkpoint is damaged.
    """
    state = checkpoint / "state"
    metadata, description = read_json(state / "_METADATA"), read_json(checkpoint / "description" / "metadata")
    try:
        if not integrity.is_sealed(description):
            rule = "is not the one that was written"
            raise refusal(checkpoint / "description", rule, "restore it from a copy, or give another checkpoint")
        return {
            name: Leaf(
                state,
                name,
                tuple(leaf["shape"]),
                np.dtype(leaf["dtype"]),
                description["fingerprints"][name],
                _store(state, name, metadata["use_ocdbt"]),
            )
            for name, leaf in description["leaves"].items()
            if leaf["dtype"] in ("float32", "float16", "bfloat16") and is_counts(leaf["shape"])
        }
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise refusal(checkpoint, "is no complete checkpoint", "give one that a run or a conversion saved") from None


def _store(state: Path, name: str, use_ocdbt: bool) -> dict[str, Any]:
    """Where TensorStore finds an array."""
    if not use_ocdbt:
        return {"driver": "file", "path": f"{(state / name).absolute()}/"}
    base = {"driver": "file", "path": f"{state.absolute()}/"}
    return {"driver": "ocdbt", "base": base, "path": f"{name}/"}


def plan_checkpoint(leaves: Mapping[str, NewLeaf], metadata: Mapping[str, Any]) -> Plan:
    """How to write a folder that Checkpoints opens: iteration 0 of a state {"params": parameters}, from leaves by path.

    `metadata` is what `Checkpoints.metadata` will return.
    """
    pieces, files = [], {}
    for path, leaf in leaves.items():
        itemsize = leaf.dtype.itemsize
        for index, chunk in enumerate(leaf.chunks):
            shape = leaf.shape[1:] if leaf.stacked else leaf.shape
            numbers = [index if leaf.stacked and axis == 0 else 0 for axis in range(len(leaf.shape))]
            file = f"0/state/{ROOT}{path}/{'.'.join(map(str, numbers or [0]))}"
            write = functools.partial(_write_chunk, file=file, chunk=chunk, layer=index if leaf.stacked else None)
            pieces.append(Piece(file, file, int(np.prod(shape)) * itemsize, write))
            files.setdefault(path, []).append(file)

    def finish(folder: Path, lanes: Mapping[str, Any]) -> None:
        fingerprints = {path: integrity.join_lanes(lanes[file] for file in files[path]) for path in leaves}
        for path, leaf in leaves.items():
            write_json(folder / f"0/state/{ROOT}{path}/.zarray", _zarray(leaf))
        write_json(folder / "0/state/_METADATA", _orbax_metadata(leaves))
        write_json(folder / "0/description/metadata", _description(leaves, fingerprints, metadata))
        write_json(folder / "0/_CHECKPOINT_METADATA", {})

    return Plan(pieces, finish)


def _write_chunk(folder: Path, *, file: str, chunk: Callable[[], np.ndarray], layer: int | None) -> list[int]:
    """Returns what the chunk adds to the fingerprint of its array."""
    array = chunk()
    write_piece(folder / file, 0, as_bytes(array))
    return integrity.part_lanes(array, layer)


def _zarray(leaf: NewLeaf) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": leaf.shape,
        "chunks": (1, *leaf.shape[1:]) if leaf.stacked else leaf.shape,
        "dtype": DTYPES[leaf.dtype],
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    }


def _orbax_metadata(leaves: Mapping[str, NewLeaf]) -> dict[str, Any]:
    """Orbax's description of the tree, a flat dict here: keys of type 2 are a dict's."""
    return {
        "tree_metadata": {
            str((ROOT + path,)): {
                "key_metadata": [{"key": ROOT + path, "key_type": 2}],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": leaf.shape},
            }
            for path, leaf in leaves.items()
        },
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _description(
    leaves: Mapping[str, NewLeaf], fingerprints: Mapping[str, str], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The same facts as checkpoint.py saves beside a state."""
    shapes = {ROOT + path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for path, leaf in leaves.items()}
    return integrity.seal(
        {
            "leaves": shapes,
            "fingerprints": {ROOT + path: fingerprint for path, fingerprint in fingerprints.items()},
            "key_impls": {},
            "position": None,
            "metadata": dict(metadata),
        }
    )
