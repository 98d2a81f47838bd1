"""Checkpoints that a run resumes from exactly, and weights in safetensors files for everybody else.

A checkpoint holds the train state, the position in the data and a JSON description of every leaf. Orbax writes it to a
temporary directory in the background and renames it when complete, so a killed run finds its newest complete one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from grain.checkpoint import CheckpointRestore, CheckpointSave
from jax.experimental import multihost_utils

from rcm_jax.config import UserError

CHUNK_BYTES = 2**27


class Checkpoints:
    """The checkpoints of one run, in DIRECTORY/ITERATION, written in the background.

    Every process of a run calls every method. An error of a background write is raised by the next call.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int, every: int):
        """Keeps the newest `keep` checkpoints of those `save` is asked for at multiples of `every` iterations."""
        self.directory = Path(directory).absolute()
        self.every = every
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(
        self,
        iteration: int,
        state: Any,
        iterator: grain.DatasetIterator | None,
        metadata: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Starts to write a checkpoint and returns once `state` may be donated. A save under way is waited for.

        Args:
            iteration: iterations done so far.
            state: any pytree of JAX arrays, typed PRNG keys included.
            iterator: the data, whose next batch belongs to the iteration after this one; None if there is none.
            metadata: further facts, of JSON types.
            force: save even when `iteration` is no multiple of `every`.

        Returns: whether it saved: not if `iteration` is no multiple of `every` or is saved already.

        Raises:
            UserError: the directory holds a later checkpoint.
            TypeError: a leaf is no JAX array, or the metadata is not JSON.
        """
        latest = self._manager.latest_step()
        if iteration == latest or (iteration % self.every and not force):
            return False
        if latest is not None and iteration < latest:
            raise UserError(
                f"{self.directory} holds checkpoint {latest}, later than {iteration=}: resume it or use another"
                " directory"
            )
        leaves = _named_leaves(state)
        description = {
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
            "key_impls": {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)},
            "processes": jax.process_count(),
            "has_data": iterator is not None,
            "metadata": dict(metadata or {}),
        }
        json.dumps(description)  # a TypeError here rather than in the background, where Orbax takes minutes to give up
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(
                {name: _storable(leaf) for name, leaf in leaves.items()},
                save_args={name: _chunks(leaf) for name, leaf in leaves.items()},
            ),
            "description": ocp.args.JsonSave(description),
        }
        if iterator is not None:
            items["data"] = CheckpointSave(iterator)
        self.directory.mkdir(parents=True, exist_ok=True)
        return self._manager.save(iteration, args=ocp.args.Composite(**items), force=True)

    def latest(self) -> int | None:
        """The iteration of the newest complete checkpoint, None if there is none."""
        self.wait()
        return self._manager.latest_step()

    def metadata(self, iteration: int | None = None) -> dict[str, Any]:
        """The metadata that was given to `save`, of the newest checkpoint if `iteration` is None."""
        return self._description(self._existing(iteration))["metadata"]

    def restore(
        self, abstract_state: Any, iterator: grain.DatasetIterator | None, iteration: int | None = None
    ) -> tuple[int, Any]:
        """Reads a checkpoint, the newest if `iteration` is None, onto the devices that `abstract_state` asks for.

        Args:
            abstract_state: the state that was saved, as arrays or as `jax.ShapeDtypeStruct`s, whose shardings may
                differ from the saved ones. A leaf without a sharding goes to the first device.
            iterator: set to the saved position; None to leave the data alone.

        Returns: the iteration and the state.

        Raises:
            UserError: there is no such checkpoint, or a leaf of it is missing, unknown or has another shape or dtype.
        """
        iteration = self._existing(iteration)
        description = self._description(iteration)
        wanted = _named_leaves(abstract_state)
        self._check_leaves(iteration, description["leaves"], {name: _describe(leaf) for name, leaf in wanted.items()})
        items: dict[str, Any] = {
            "state": ocp.args.StandardRestore({name: _stored_form(leaf) for name, leaf in wanted.items()})
        }
        if iterator is not None:
            self._check_data(iteration, description)
            items["data"] = CheckpointRestore(iterator)
        restored = self._manager.restore(iteration, args=ocp.args.Composite(**items))["state"]
        for name, impl in description["key_impls"].items():
            restored[name] = jax.random.wrap_key_data(restored[name], impl=impl)
        return iteration, jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in wanted])

    def wait(self) -> None:
        """Waits for the background write, and raises its error if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the background write and ends its threads."""
        self._manager.close()

    def _existing(self, iteration: int | None) -> int:
        self.wait()
        known = self._manager.all_steps()
        if not known:
            raise UserError(
                f"{self.directory} holds no complete checkpoint: give the directory of a run that saved one"
            )
        if iteration is not None and iteration not in known:
            raise UserError(f"{self.directory} holds no checkpoint {iteration}: choose one of {sorted(known)}")
        return max(known) if iteration is None else iteration

    def _description(self, iteration: int) -> dict[str, Any]:
        args = ocp.args.Composite(description=ocp.args.JsonRestore())
        return self._manager.restore(iteration, args=args)["description"]

    def _check_leaves(self, iteration: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        wrong = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        if not wrong:
            return
        name = wrong[0]
        there, here = (
            f"{side[name]['dtype']}{side[name]['shape']}" if name in side else "absent" for side in (saved, wanted)
        )
        more = f" ({len(wrong) - 1} more leaves disagree)" if len(wrong) > 1 else ""
        raise UserError(
            f"checkpoint {iteration} in {self.directory} does not fit: {name} is {there} there and {here} in this run"
            f"{more}: use the config it was saved with or another directory"
        )

    def _check_data(self, iteration: int, description: dict[str, Any]) -> None:
        where = f"checkpoint {iteration} in {self.directory}"
        if not description["has_data"]:
            raise UserError(f"{where} holds no position in the data: restore it without an iterator")
        if description["processes"] != jax.process_count():
            raise UserError(
                f"{where} holds the position in the data of {description['processes']} processes: resume with as many,"
                f" not {jax.process_count()}"
            )


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by path, such as "student/blocks/0/kernel"."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    for name, leaf in named.items():
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            raise TypeError(f"leaf {name} of the state is of type {type(leaf).__name__}: it must be a jax.Array")
    if len(named) < len(leaves):
        raise ValueError(f"two leaves of the state share one path among {list(named)}: keys must not contain '/'")
    return named


def _describe(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _chunks(leaf: Any) -> ocp.SaveArgs:
    """Large arrays are split along their first axis first, so that one layer of a parameter can be read alone."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if leaf.ndim else ())


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> Any:
    """A typed PRNG key is stored as its integers; the description keeps its kind."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _stored_form(wanted: Any) -> jax.ShapeDtypeStruct:
    stored = jax.eval_shape(_storable, jax.ShapeDtypeStruct(wanted.shape, wanted.dtype))
    sharding = wanted.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)


def export_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, jax.Array | np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes tensors to one safetensors file, which replaces an older one at `path` only when it is complete.

    Every process of a run calls it; sharded arrays are gathered to each host, and process 0 writes.
    """
    path = Path(path)
    gathered = {name: _on_host(tensor) for name, tensor in tensors.items()}
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(safetensors.numpy.save(gathered, dict(metadata)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _on_host(tensor: jax.Array | np.ndarray) -> np.ndarray:
    """The whole tensor in the order of C, which is how safetensors reads the buffer it is given."""
    if isinstance(tensor, jax.Array) and not tensor.is_fully_addressable:
        tensor = multihost_utils.process_allgather(tensor, tiled=True)
    return np.asarray(tensor, order="C")


def load_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file: its tensors (bfloat16 included) and its metadata.

    Raises:
        UserError: the file is missing, cut short or not a safetensors file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file: give the path of a safetensors file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}): fetch or export it again") from None
