"""Checkpoints that a run resumes from exactly, and weights in safetensors files for everybody else.

A checkpoint holds the train state, the position in the data and a sealed description with a fingerprint of every leaf.
Orbax writes it to a temporary directory in the background and renames it when complete, so a checkpoint is whole or
absent; what time or an accident does to it afterwards is found when it is restored.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from jax.experimental import multihost_utils

from rcm_jax import integrity
from rcm_jax.config import UserError
from rcm_jax.records import warn

T = TypeVar("T")

ATTEMPTS = 3  # of a save that a run waits for
CHUNK_BYTES = 2**27
BACKGROUND_SECONDS = 600  # that a write in the background may take


class DamagedError(Exception):
    """A checkpoint is not what was saved; the message says how."""


class Checkpoints:
    """The checkpoints of one run, in DIRECTORY/ITERATION, written in the background.

    Every process of a run calls every method, with the same arguments. A background write that fails, on a full disk
    for example, is reported on stderr and tried again; no older checkpoint is removed before a newer one is complete.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int, every: int, keep_every: int = 0, best: str = ""):
        """Saves at multiples of `every` iterations and keeps the newest `keep` checkpoints.

        Those at multiples of `keep_every` iterations are kept too, if it is not 0, and the one that has the lowest
        value of metadata["metrics"][`best`], if `best` is not empty.
        """
        self.directory = Path(directory).absolute()
        self.every, self.keep, self.keep_every, self.best = every, keep, keep_every, best
        # Where a directory cannot be made, writers that expect it from another thread would wait for minutes.
        options = ocp.options.AsyncOptions(timeout_secs=BACKGROUND_SECONDS, create_directories_asynchronously=False)
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._remover = ThreadPoolExecutor(1)
        self._writing: int | None = None  # the iteration whose checkpoint is being written
        self._warned = False  # that no checkpoint has the metric `best`
        self._sound: int | None = None  # up to which iteration the run is known to be sound; None: all of it
        self._failed = False  # whether the last write failed, so that another is due
        self._failure: Exception | None = None  # why it did, if this process knows

    def save(
        self,
        iteration: int,
        state: Any,
        iterator: grain.DatasetIterator | None,
        metadata: Callable[[], Mapping[str, Any]] = dict,
        *,
        sound: int | None = None,
        force: bool = False,
    ) -> bool:
        """Starts to write a checkpoint, if one is due, and returns once `state` may be donated. For every iteration.

        One is due at multiples of `every`, and after a failure ten times as often. A write still under way is waited
        for.

        Args:
            iteration: iterations done so far.
            state: any pytree of JAX arrays, typed PRNG keys included.
            iterator: the data, whose next batch belongs to the iteration after this one; None if there is none.
            metadata: gives further facts, of JSON types, if one is due.
            sound: the last iteration known to be good; whatever is removed, the newest checkpoint up to it stays.
                None: this one.
            force: save even when none is due.

        Returns: whether it started: not if none is due or `iteration` is saved already.

        Raises:
            UserError: the directory holds a later checkpoint.
            TypeError: a leaf is no JAX array, or the metadata is not JSON.
        """
        self._sound = sound
        regular = iteration % self.every == 0
        if regular or force:
            self._finish()
        elif iteration % max(1, self.every // 10) == 0:
            self._finish_if_done()
            regular = self._failed
        if not (regular or force):
            return False
        latest = self.latest()
        if iteration == latest:
            return False
        if latest is not None and iteration < latest:
            raise UserError(
                f"{self.directory} holds checkpoint {latest}, later than {iteration=}: resume it or use another"
                " directory"
            )
        leaves = {name: _storable(leaf) for name, leaf in _named_leaves(state).items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves, save_args={name: _chunks(leaf) for name, leaf in leaves.items()}),
            description=ocp.args.JsonSave(_describe_all(state, leaves, iterator, metadata())),
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._writer.save(self._path(iteration), args=items)
        except OSError as error:
            self._report_failure(iteration, error)
            return False
        self._writing, self._failed = iteration, False
        return True

    def save_and_wait(self, iteration: int, *args: Any, sound: int | None = None) -> None:
        """Saves, as `save` with `force`, and returns when the checkpoint is complete, after a few attempts if need be.

        Raises:
            UserError: it could not be written.
        """
        for _ in range(ATTEMPTS):
            self.save(iteration, *args, sound=sound, force=True)
            self._finish()
            if not self._failed:
                return
        raise UserError(
            f"checkpoint {iteration} cannot be written to {self.directory}: free space there and start the same"
            f" command again, it continues from iteration {self.latest() or 0}"
        )

    def latest(self) -> int | None:
        """The iteration of the newest complete checkpoint, None if there is none."""
        return max(self.iterations(), default=None)

    def iterations(self) -> list[int]:
        """The iterations of all complete checkpoints, in order."""
        names = [path.name for path in self.directory.iterdir()] if self.directory.is_dir() else []
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    def metadata(self, iteration: int) -> dict[str, Any]:
        """The metadata that was given to `save`. Raises DamagedError if it is no longer what was written."""
        return self._description(iteration)["metadata"]

    def restore(self, abstract_state: Any, iterator: grain.DatasetIterator | None) -> tuple[int, Any] | None:
        """Reads the newest checkpoint that is what was saved onto the devices that `abstract_state` asks for.

        A damaged one is renamed to ITERATION.damaged, with the reason on stderr, and the one before it is tried.

        Args:
            abstract_state: the state that was saved, as arrays or as `jax.ShapeDtypeStruct`s, whose shardings may
                differ from the saved ones. A leaf without a sharding goes to the first device.
            iterator: set to the saved position; None to leave the data alone.

        Returns: the iteration and the state; None if nothing was ever saved here.

        Raises:
            UserError: every checkpoint is damaged, or a leaf of the newest sound one is missing, unknown or has
                another shape or dtype in `abstract_state`.
        """
        self._finish()
        for iteration in reversed(self.iterations()):
            try:
                return iteration, self._read(iteration, abstract_state, iterator)
            except DamagedError as damage:
                self.set_aside(iteration, "damaged", str(damage))
        if any(self.directory.glob("*.damaged*")):
            raise UserError(
                f"{self.directory} holds damaged checkpoints and no sound one: use another directory to start anew,"
                " or remove them"
            )
        return None

    def set_aside(self, iteration: int, why: str, reason: str) -> None:
        """Renames a checkpoint to ITERATION.WHY, so that no run resumes from it, and says the reason on stderr."""
        source = self._path(iteration)
        names = [f"{iteration}.{why}", *(f"{iteration}.{why}.{count}" for count in range(2, 1000))]
        target = next(source.with_name(name) for name in names if not source.with_name(name).exists())
        if jax.process_index() == 0:
            source.rename(target)
            warn(f"checkpoint {iteration} is set aside as {target}: {reason}")
        _everywhere(True)  # no process goes on before the rename

    def roll_back(self, iteration: int, abstract_state: Any, reason: str) -> tuple[int, Any] | None:
        """Restores the newest sound checkpoint up to `iteration` and sets later ones aside; leaves the data alone."""
        self._sound = iteration
        self._finish()
        for later in self.iterations():
            if later > iteration:
                self.set_aside(later, "rolled_back", reason)
        return self.restore(abstract_state, None)

    def wait(self) -> None:
        """Waits for the background write and for the removal of old checkpoints."""
        self._finish()
        self._remover.submit(lambda: None).result()

    def close(self) -> None:
        """Waits as `wait` does and ends the threads."""
        self._finish()
        self._remover.shutdown()
        self._writer.close()

    def _path(self, iteration: int) -> Path:
        return self.directory / str(iteration)

    def _finish_if_done(self) -> None:
        """Takes note of the background write if it has ended on every process."""
        if self._writing is None:
            return
        try:
            self._writer.check_for_errors()
        except Exception as error:
            self._failure = error
        if _everywhere(self._failure is not None or self._path(self._writing).exists()):
            self._finish()

    def _finish(self) -> None:
        """Waits for the background write, if there is one; removes what is no longer needed, or reports its failure."""
        if self._writing is None:
            return
        iteration, self._writing = self._writing, None
        error, self._failure = self._failure, None
        try:
            self._writer.wait_until_finished()
        except Exception as late_error:
            error = late_error
        if not _everywhere(error is None):
            self._report_failure(iteration, error)
        else:
            self._remove_old()

    def _report_failure(self, iteration: int, error: Exception | None) -> None:
        self._failed = True
        self._remove_leftovers()
        reason = "another process failed" if error is None else _brief(error)
        warn(
            f"checkpoint {iteration} could not be written to {self.directory}: {reason}; older ones are kept, another"
            " attempt follows"
        )

    def _remove_old(self) -> None:
        """Removes, in the background, all checkpoints but those to keep."""
        iterations = self.iterations()
        kept = set(iterations[-self.keep :])
        kept |= {iteration for iteration in iterations if self.keep_every and iteration % self.keep_every == 0}
        if self._sound is not None:
            kept |= {max((iteration for iteration in iterations if iteration <= self._sound), default=iterations[0])}
        if self.best:
            best = min(iterations, key=self._metric)
            kept |= {best}
            if math.isinf(self._metric(best)):
                self._warn_of_unknown_metric(iterations[-1])
        if jax.process_index() == 0:
            for iteration in set(iterations) - kept:
                # Half a checkpoint must not pass for one, should the run be killed meanwhile.
                self._path(iteration).rename(self.directory / f"{iteration}.removed")
        self._remove_leftovers()

    def _metric(self, iteration: int) -> float:
        """The metric by which the best checkpoint is kept; infinite for one that lacks it."""
        value = self._metrics(iteration).get(self.best, math.inf)
        return value if math.isfinite(value) else math.inf

    def _metrics(self, iteration: int) -> dict[str, float]:
        try:
            return self.metadata(iteration).get("metrics", {})
        except DamagedError:
            return {}

    def _warn_of_unknown_metric(self, iteration: int) -> None:
        known = sorted(self._metrics(iteration))
        if known and not self._warned and jax.process_index() == 0:
            warn(f"no checkpoint has the metric checkpoint.best={self.best}: known are {', '.join(known)}")
            self._warned = True

    def _remove_leftovers(self) -> None:
        """Removes what a killed or failed write left behind and, in the background, checkpoints that are not kept."""
        if jax.process_index() == 0:
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            for path in self.directory.glob("*.removed"):
                self._remover.submit(shutil.rmtree, path, ignore_errors=True)

    def _description(self, iteration: int) -> dict[str, Any]:
        return _attempt(lambda: _read_description(self._path(iteration) / "description"))

    def _read(self, iteration: int, abstract_state: Any, iterator: grain.DatasetIterator | None) -> Any:
        description = self._description(iteration)
        wanted = _named_leaves(abstract_state)
        self._check_leaves(iteration, description["leaves"], {name: _describe(leaf) for name, leaf in wanted.items()})
        if iterator is not None and description["position"] is None:
            raise UserError(
                f"checkpoint {iteration} in {self.directory} holds no position in the data: restore it without an"
                " iterator"
            )
        stored = {name: _stored_form(leaf) for name, leaf in wanted.items()}
        restored = _attempt(lambda: _read_arrays(self._path(iteration) / "state", stored))
        found = integrity.fingerprints(restored)
        wrong = [name for name, leaf in description["fingerprints"].items() if leaf != found[name]]
        if wrong:
            more = f" and {len(wrong) - 1} more leaves are" if len(wrong) > 1 else " is"
            raise DamagedError(f"{wrong[0]}{more} not what was saved, by the fingerprint")
        if iterator is not None:
            iterator.set_state(description["position"])
        for name, impl in description["key_impls"].items():
            restored[name] = jax.random.wrap_key_data(restored[name], impl=impl)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[name] for name in wanted])

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


def _describe_all(
    state: Any,
    leaves: dict[str, jax.Array],
    iterator: grain.DatasetIterator | None,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """The description of a checkpoint, sealed. Raises TypeError for metadata that are not JSON."""
    named = _named_leaves(state)
    return integrity.seal(
        {
            "leaves": {name: _describe(leaf) for name, leaf in named.items()},
            "fingerprints": integrity.fingerprints(leaves),
            "key_impls": {name: str(jax.random.key_impl(leaf)) for name, leaf in named.items() if _is_key(leaf)},
            # The same on every process, so that any number of them can go on from it.
            "position": None if iterator is None else iterator.get_state(),
            "metadata": dict(metadata),
        }
    )


def _read_description(path: Path) -> dict[str, Any]:
    """The description that JsonSave wrote to the folder. Raises DamagedError if it is another."""
    description = json.loads((path / "metadata").read_text())
    if not integrity.is_sealed(description):
        raise DamagedError("its description is not the one that was written")
    return description


def _read_arrays(path: Path, stored: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays at `path`. Raises DamagedError if their names, shapes or dtypes are others."""
    handler: Any = ocp.StandardCheckpointHandler()  # takes any path, whatever its annotation says
    there = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in handler.metadata(path).tree.items()}
    saved = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in stored.items()}
    for name in sorted(there.keys() | saved.keys()):  # Orbax would convert, pad or leave out
        if there.get(name) != saved.get(name):
            raise DamagedError(f"{name} is {there.get(name, 'absent')}, saved was {saved.get(name, 'none')}")
    return handler.restore(path, args=ocp.args.StandardRestore(stored))


def _attempt(read: Callable[[], T]) -> T:
    """Calls `read` on every process. If it fails on one, raises DamagedError on all, unless no file is to blame."""
    result, error = None, None
    try:
        result = read()
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):  # the host's or the devices' memory, mostly
        raise
    except Exception as raised:  # a file may be damaged in any way
        error = raised
    if not _everywhere(error is None):
        raise DamagedError("another process cannot read it" if error is None else _brief(error)) from error
    return result  # pyright: ignore[reportReturnType]


def _everywhere(true: bool) -> bool:
    """Whether it is true on all processes, which wait for each other here."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(true))))


def _brief(error: Exception, length: int = 300) -> str:
    """An error in one line; Orbax and TensorStore append source locations and whole trees."""
    kind = "" if isinstance(error, DamagedError) else f"{type(error).__name__}: "
    line = " ".join(f"{kind}{error}".split())
    return line if len(line) <= length else f"{line[:length]}..."


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
    gathered = {name: on_host(tensor) for name, tensor in tensors.items()}
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


def on_host(tensor: jax.Array | np.ndarray) -> np.ndarray:
    """The whole tensor in the order of C, which is how safetensors reads the buffer it is given."""
    if isinstance(tensor, jax.Array) and not tensor.is_fully_addressable:
        tensor = multihost_utils.process_allgather(tensor, tiled=True)
    return np.asarray(tensor, order="C")


def load_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file: its tensors (bfloat16 included) and its metadata.

    Raises:
        UserError: the file is missing, cut short, not a safetensors file, or holds a dtype that numpy lacks.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file: give the path of a safetensors file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}): fetch or export it again") from None
    except (AttributeError, TypeError, ValueError) as error:  # float8, for one
        raise UserError(
            f"{path} holds a tensor of a dtype that numpy lacks ({error}): convert it to bfloat16"
        ) from None
