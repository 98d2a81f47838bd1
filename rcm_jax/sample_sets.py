"""Sets of samples on disk: a folder of videos or pictures that tell their prompt, seed and settings, and their latents.

    set/sampling.json    what all samples have in common, and what tells the checkpoints' files from others
    set/videos, images   the samples, as a benchmark reads them (layouts.py), with nothing else among the videos
    set/latents          a latent for each sample, under the same path

A sample is whole or absent, so a set that was interrupted goes on where it ended.
"""

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from rcm_jax import inference, media
from rcm_jax.checkpoint import export_safetensors, load_safetensors
from rcm_jax.config import UserError
from rcm_jax.data import videos
from rcm_jax.data.tokenizer import Tokens
from rcm_jax.layouts import Plan, Shot
from rcm_jax.published import parse_size

RECORD = "sampling.json"
SUFFIXES = (".mp4", ".png")
# What differs between the samples of a run.
OWN = ("prompt", "caption", "seed", "index", "embedding", "device", "sampling_seconds", "decoding_seconds")


class Sample(NamedTuple):
    """A file of a set: its prompt and seed, what else its metadata say, and its latent's file if it has one."""

    path: Path
    prompt: str
    seed: int
    metadata: Mapping[str, Any]
    latent: Path | None

    @property
    def settings(self) -> dict[str, Any]:
        """How it was sampled, as far as other samples of a run share it."""
        return {name: value for name, value in self.metadata.items() if name not in OWN}


class SampleSet(NamedTuple):
    """The samples of a folder, one a prompt and seed, and the files that do not tell theirs."""

    folder: Path
    samples: list[Sample]
    unknown: list[Path]


class Sampling(NamedTuple):
    """How the samples of a set are made.

    Attributes:
        parts: the opened networks; the tokens are those of `captions`, in their order, and of the negative caption.
        captions: every caption of the plan once.
        settings: of the sampler.
        shape_THWC: of a latent.
        fps: frames a second.
        tiled: whether the decoder runs in tiles.
        facts: what a sample's metadata tell of all this.
        files: the checkpoints' files, as inputs.py tells them from others. They are part of the set's record alone:
            the same network may be elsewhere where another set is made.
    """

    parts: inference.Parts
    captions: Sequence[str]
    settings: inference.Settings
    shape_THWC: tuple[int, ...]
    fps: int
    tiled: bool
    facts: Mapping[str, Any]
    files: Mapping[str, str] = MappingProxyType({})


def write_set(
    folder: Path,
    plan: Plan,
    sampling: Sampling,
    *,
    chunk: int,
    share: tuple[int, int] = (0, 1),
    keep_latents: bool = True,
) -> int:
    """Makes the samples of a plan that are not in the folder yet, and says how many.

    `chunk` of them at a time go through text encoder, network and decoder, which take turns in the device's memory.

    Args:
        folder: of the set.
        plan: the samples.
        sampling: how they are made.
        chunk: samples of a turn, whose latents are in the host's memory at once.
        share: (number, count): every count-th sample alone, for several processes that share the work.
        keep_latents: whether a latent stays when its sample is written.

    Raises:
        UserError: the folder holds samples that were made otherwise, or by other networks.
    """
    _claim(folder, sampling.facts, sampling.files)
    ours = plan.shots[share[0] :: share[1]]
    missing = [shot for shot in ours if not is_finished(folder, shot)]
    if not keep_latents:  # those that a command left which was killed before it removed them
        _drop_latents(folder, set(ours) - set(missing))
    for path, text in plan.files.items():
        media.write_file(folder / path, text.encode())
    for start in range(0, len(missing), chunk):
        shots = missing[start : start + chunk]
        _sample(folder, shots, sampling)
        _decode(folder, shots, sampling)
        if not keep_latents:
            _drop_latents(folder, shots)
    return len(missing)


def is_finished(folder: Path, shot: Shot) -> bool:
    """Whether a sample is there. Raises UserError if its file shows another prompt, caption or seed."""
    path = folder / shot.path
    if not path.exists():
        return False
    metadata = _read_metadata(path)
    found = tuple(metadata.get(name) for name in ("prompt", "caption", "seed"))
    if found != (shot.prompt, shot.caption, shot.seed):
        raise UserError(
            f"{path} is of prompt, caption and seed {found}, wanted are"
            f" {(shot.prompt, shot.caption, shot.seed)}: give another --out"
        )
    return True


def latent_path(folder: Path, sample: Path) -> Path:
    """Where the latent of a sample lies, whose path is relative to the set's folder."""
    return folder / "latents" / f"{sample}.safetensors"


def read_latent(path: Path) -> tuple[Float[np.ndarray, "t h w c"], dict[str, str]]:
    """A latent, and what its file says of it. Raises UserError if the file holds none."""
    tensors, metadata = load_safetensors(path)
    if tensors.keys() != {"latent"} or tensors["latent"].ndim != 4:
        raise UserError(f"{path} must hold `latent` of 4 axes and nothing else: remove it, or sample it again")
    return tensors["latent"], metadata


def list_samples(folder: Path) -> SampleSet:
    """The videos and pictures below a folder, by path.

    Of files that tell one prompt, seed and settings the first is taken.

    Raises:
        UserError: the folder has no video or picture, one cannot be read, or two have one prompt and seed but were
            sampled otherwise.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and not path.name.startswith("."))
    if not files:
        raise UserError(f"{folder} has no {' or '.join(SUFFIXES)} file: give a folder of samples")
    samples: dict[tuple[str, int], Sample] = {}
    unknown = []
    for path in files:
        metadata = _read_metadata(path)
        prompt, seed = metadata.get("prompt"), metadata.get("seed")
        if not (isinstance(prompt, str) and isinstance(seed, int)):
            unknown.append(path)
            continue
        latent = latent_path(folder, path.relative_to(folder))
        sample = Sample(path, prompt, seed, metadata, latent if latent.exists() else None)
        other = samples.setdefault((prompt, seed), sample)
        if other.settings != sample.settings:
            raise UserError(
                f"{other.path} and {path} show one prompt and seed, sampled with different"
                f" {', '.join(_differing(other.settings, sample.settings))}: give a folder for each run"
            )
    return SampleSet(folder, list(samples.values()), unknown)


def read_pixels(sample: Sample) -> UInt8[np.ndarray, "f y x 3"]:
    """All frames of a sample. Raises UserError if its metadata do not tell their number, rate and size."""
    said = sample.metadata
    if sample.path.suffix == ".png":
        return media.read_image(sample.path)[None]
    if not {"frames", "fps", "size"} <= said.keys():
        raise UserError(
            f"{sample.path} does not tell its frames, fps and size: sample it with launch.sample or evaluate"
        )
    return videos.read_frames(sample.path, count=said["frames"], fps=said["fps"], size=parse_size(said["size"]))


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        return media.read_metadata(path)
    except ValueError as error:
        raise UserError(f"{error}, or remove it") from None


def _claim(folder: Path, facts: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Writes what the samples have in common, or compares it with what is there."""
    path, text = folder / RECORD, media.json_text({**facts, **files}, indent=2)
    try:
        media.write_file(path, text.encode() + b"\n", replace=False)
        return
    except FileExistsError:
        pass
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise UserError(f"{path} cannot be read: give another --out")
    wanted = json.loads(text)
    if differing := _differing(there, wanted):
        name = differing[0]
        remedy = "give another --out"
        if name in files:
            remedy += ", or the files it began with"
        raise UserError(
            f"{folder} was sampled with other {', '.join(differing)} ({name} was {there.get(name)!r}, now"
            f" {wanted.get(name)!r}): {remedy}"
        )


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]


def _sample(folder: Path, shots: Sequence[Shot], sampling: Sampling) -> None:
    """Writes the latents that are not there yet."""
    wanted = [shot for shot in shots if not latent_path(folder, shot.path).exists()]
    if not wanted:
        return
    captions = list(dict.fromkeys(shot.caption for shot in wanted))
    texts = inference.encode_texts(_with_captions(sampling, captions), len(captions))
    rows = [(captions.index(shot.caption), shot.seed) for shot in wanted]
    condition = inference.Condition()
    latents = inference.each_latent(
        sampling.parts.transformer, texts, rows, sampling.shape_THWC, sampling.settings, condition
    )
    mesh = sampling.parts.transformer.mesh
    device = f"{1 if mesh is None else mesh.size} x {jax.devices()[0].device_kind}"
    for shot, (latent_THWC, seconds) in zip(wanted, _timed(latents), strict=True):
        metadata = {"prompt": shot.prompt, "caption": shot.caption, "seed": str(shot.seed)}
        metadata |= {"device": device, "sampling_seconds": f"{seconds:.6g}"}
        export_safetensors(latent_path(folder, shot.path), {"latent": latent_THWC}, metadata)


def _with_captions(sampling: Sampling, captions: Sequence[str]) -> inference.Parts:
    """The networks, with the tokens of some of the captions, and of the negative one if it is needed."""
    tokens = sampling.parts.tokens
    assert tokens is not None
    numbers = {caption: number for number, caption in enumerate(sampling.captions)}
    rows = [numbers[caption] for caption in captions] + list(range(len(numbers), len(tokens.ids_BS)))
    return sampling.parts._replace(tokens=Tokens(tokens.ids_BS[rows], tokens.mask_BS[rows]))


def _decode(folder: Path, shots: Sequence[Shot], sampling: Sampling) -> None:
    """Writes the samples of latents."""
    latents, said = zip(*(read_latent(latent_path(folder, shot.path)) for shot in shots), strict=True)
    for shot, facts in zip(shots, said, strict=True):
        found = tuple(facts.get(name) for name in ("prompt", "caption", "seed"))
        if found != (shot.prompt, shot.caption, str(shot.seed)):
            path = latent_path(folder, shot.path)
            raise UserError(
                f"{path} is of another prompt, caption or seed than {shot.prompt!r}, {shot.seed}: remove it"
            )
    films = inference.decode(sampling.parts.autoencoder, latents, tiled=sampling.tiled)
    for shot, facts, (video_THWC, seconds) in zip(shots, said, _timed(films), strict=True):
        metadata = {
            "prompt": shot.prompt,
            "caption": shot.caption,
            "seed": shot.seed,
            "index": shot.index,
            **sampling.facts,
            "device": facts["device"],
            "sampling_seconds": float(facts["sampling_seconds"]),
            "decoding_seconds": float(f"{seconds:.6g}"),
        }
        # An unfinished file must not lie among the videos: VBench would take its suffix for theirs.
        # Its name is random: processes that share the set may run on several hosts and have one number.
        staged = folder / f".{secrets.token_hex(8)}{shot.path.suffix}"
        try:
            if shot.path.suffix == ".png":
                media.write_image(staged, video_THWC[0], metadata=metadata)
            else:
                media.write_video(staged, video_THWC, fps=sampling.fps, metadata=metadata)
            _publish(staged, folder / shot.path)
        finally:
            staged.unlink(missing_ok=True)


def _publish(staged: Path, path: Path) -> None:
    """Moves a finished file to its place. Raises UserError if something came there meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        media.publish(staged, path)
    except FileExistsError:
        raise UserError(
            f"{path} is there already: another process works in this folder, or the disk takes the names of two"
            " prompts for one; give another --out"
        ) from None


def _drop_latents(folder: Path, shots: Iterable[Shot]) -> None:
    for shot in shots:
        latent_path(folder, shot.path).unlink(missing_ok=True)


def _timed(items: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Each item, and the seconds it took to come."""
    start = time.perf_counter()
    for item in items:
        yield item, time.perf_counter() - start
        start = time.perf_counter()
