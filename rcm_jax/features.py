"""Features of videos by a network that the user brings, for the scores of metrics.py.

A network is an ONNX file, run by onnxruntime, or a checkpoint of CLIP's ViT-H/14, run here. Features that were computed
elsewhere come as a safetensors file with a tensor `features`. (A safetensors file holds no program, so it can mean a
network only where that network is part of this library.)
"""

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8
from tqdm import tqdm

from rcm_jax.checkpoint import export_safetensors, load_safetensors
from rcm_jax.config import UserError
from rcm_jax.convert.loading import open_image_encoder
from rcm_jax.data import videos
from rcm_jax.models import clip

AXES = ("NCTHW", "NTCHW", "NTHWC", "NCHW", "NHWC")  # T frames; without T a network of pictures
BATCH = 8  # videos at once
READERS = 4
FRAMES, FPS, SIZE = 16, 8, (224, 224)  # of a clip, where neither the user nor the network says otherwise
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # of onnxruntime, the first there is
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


class View(NamedTuple):
    """What of a video a network sees, as far as the user says it.

    Attributes:
        frames: the first so many, 1 for the first alone.
        fps: frames a second; a frame is the one shown at its time.
        size: width and height; the middle of a frame, resized to fill it (Lanczos).
        mean, std: of each colour: a network is given (pixel / 255 - mean) / std.
        axes: one of AXES.
        output: the name of the network's output.
    """

    frames: int | None = None
    fps: int | None = None
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    axes: str | None = None
    output: str | None = None


class FeatureNetwork(NamedTuple):
    """A function from clips of BATCH videos or fewer to features, the clips, and what tells both from others."""

    apply: Callable[[UInt8[np.ndarray, "n t h w 3"]], Float[np.ndarray, "n f"]]
    frames: int
    fps: int
    size: tuple[int, int]
    facts: Mapping[str, Any]


class Features(NamedTuple):
    """Features of videos, the videos' paths if they are known, and the facts of the network; {} if unknown."""

    feature_NF: Float[np.ndarray, "n f"]
    paths: list[str]
    facts: Mapping[str, Any]


def open_network(path: Path, view: View) -> FeatureNetwork:
    """Opens an .onnx file, or a checkpoint of CLIP's ViT-H/14 in the layouts that launch.sample reads.

    Raises:
        UserError: the file is neither, onnxruntime is missing, or the view does not fit the network.
    """
    return _open_onnx(path, view) if path.suffix == ".onnx" else _open_clip(path, view)


def list_videos(folder: Path) -> list[Path]:
    """The videos and pictures below a folder, by path. Raises UserError if there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in videos.SUFFIXES)
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        raise UserError(f"{folder} has no video: give a folder with some of {', '.join(videos.SUFFIXES)}")
    return found


def extract(network: FeatureNetwork, paths: Sequence[Path]) -> Float[np.ndarray, "n f"]:
    """Features of videos or pictures. Raises UserError for one that cannot be read, is too short or has no features."""
    read = functools.partial(videos.read_frames, count=network.frames, fps=network.fps, size=network.size)
    ahead = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=2 * BATCH)
    clips = iter(grain.MapDataset.source(list(paths)).map(read).to_iter_dataset(ahead))
    parts = []
    with tqdm(total=len(paths), desc="features", unit="video", disable=None) as bar:
        for start in range(0, len(paths), BATCH):
            chosen = paths[start : start + BATCH]
            feature_BF = network.apply(np.stack([next(clips) for _ in chosen]))
            for path, feature_F in zip(chosen, feature_BF, strict=True):
                if not np.isfinite(feature_F).all():
                    raise UserError(f"the features of {path} are not finite: leave it out, or export a float32 network")
            parts.append(feature_BF.astype(np.float32))
            bar.update(len(chosen))
    return np.concatenate(parts)


def read_features(path: Path) -> Features:
    """Features that `write_features` or another program wrote: a tensor `features`, one row a video.

    Raises UserError for another file.
    """
    tensors, metadata = load_safetensors(path)
    if "features" not in tensors or tensors["features"].ndim != 2:
        found = ", ".join(f"{name} {tensor.shape}" for name, tensor in tensors.items())
        raise UserError(f"{path} holds {found}: it must hold `features`, one row a video")
    feature_NF = tensors["features"].astype(np.float32)
    if not np.isfinite(feature_NF).all():
        raise UserError(f"{path} holds features that are not finite: compute them again")
    try:
        paths, facts = json.loads(metadata.get("paths", "[]")), json.loads(metadata.get("facts", "{}"))
    except (ValueError, RecursionError):
        raise UserError(f"{path} has `paths` or `facts` that are not JSON: leave them out") from None
    is_list = isinstance(paths, list) and all(isinstance(each, str) for each in paths)
    if not is_list or len(paths) not in (0, len(feature_NF)):
        raise UserError(f"{path} has `paths` that are not one text for each of {len(feature_NF)} rows: leave them out")
    if not isinstance(facts, dict):
        raise UserError(f"{path} has `facts` that are no JSON object: leave them out")
    return Features(feature_NF, paths, facts)


def write_features(path: Path, features: Features) -> None:
    """Writes what `read_features` reads."""
    metadata = {"paths": json.dumps(features.paths), "facts": json.dumps(features.facts)}
    export_safetensors(path, {"features": features.feature_NF}, metadata)


def _open_clip(path: Path, view: View) -> FeatureNetwork:
    """The vector of the whole picture, averaged over frames; frames are prepared as CLIP wants them."""
    for name in ("mean", "std", "axes", "output"):
        if getattr(view, name) is not None:
            raise UserError(f"--{name} is of no use to CLIP, which is what {path} should be: leave it out")
    preset = clip.PRESETS["clip-vit-h-14"]
    encoder = open_image_encoder(path, preset)
    params = jax.device_put(encoder.load())
    size = view.size or (preset.image, preset.image)

    @jax.jit
    def encode(params, picture_BHWC):
        prepared_BHWC = clip.preprocess(picture_BHWC / 127.5 - 1.0, side=preset.image)
        return encoder.network.apply(params, prepared_BHWC).pooled_BD

    def apply(clip_NTHWC):
        pictures_BHWC = rearrange(clip_NTHWC, "n t h w c -> (n t) h w c").astype(np.float32)
        return _mean_over_frames(np.asarray(encode(params, jnp.asarray(pictures_BHWC))), len(clip_NTHWC))

    frames, fps = view.frames or 1, view.fps or FPS
    facts = {"sha256": _digest(path), "frames": frames, "fps": fps, "size": list(size)}
    return FeatureNetwork(apply, frames, fps, size, facts)


def _open_onnx(path: Path, view: View) -> FeatureNetwork:
    session = _open_session(path)
    if len(session.get_inputs()) != 1:
        names = ", ".join(each.name for each in session.get_inputs())
        raise UserError(f"{path} has the inputs {names}: export it with one, the videos")
    (given,) = session.get_inputs()
    axes = _find_axes(path, given.shape, view.axes)
    sizes = dict(zip(axes, given.shape, strict=True))
    dtype = DTYPES.get(given.type)
    if dtype is None:
        raise UserError(f"{path} takes {given.type}: export it with an input of {', '.join(DTYPES)}")
    is_pixels = dtype == np.uint8
    if is_pixels and (view.mean or view.std):
        raise UserError(f"{path} takes pixels of 0 to 255 as they are: leave --mean and --std out")
    wide, high = view.size or (None, None)
    frames = _fit(path, "--frames", "frames", sizes.get("T"), view.frames, FRAMES if "T" in axes else 1)
    width = _fit(path, "--size", "columns", sizes["W"], wide, SIZE[0])
    height = _fit(path, "--size", "rows", sizes["H"], high, SIZE[1])
    mean, std = (np.array(values or (0.5,), np.float32) for values in (view.mean, view.std))
    outputs = [each.name for each in session.get_outputs()]
    output = view.output or outputs[0]
    if output not in outputs:
        raise UserError(f"--output {output} is none of {path}, which has {', '.join(outputs)}: choose one")
    fixed = sizes["N"] if isinstance(sizes["N"], int) else None

    def apply(clip_NTHWC):
        x = clip_NTHWC if is_pixels else ((clip_NTHWC / np.float32(255) - mean) / std).astype(dtype)
        x = _arrange(x, axes)
        count = len(x)
        batches = [x] if fixed is None else [x[at : at + fixed] for at in range(0, count, fixed)]
        parts = [_run(session, path, given.name, output, batch, fixed) for batch in batches]
        feature_BF = np.concatenate(parts).astype(np.float32)
        return feature_BF if "T" in axes else _mean_over_frames(feature_BF, len(clip_NTHWC))

    fps = view.fps or FPS
    facts = {"sha256": _digest(path), "axes": axes, "output": output, "frames": frames, "fps": fps}
    facts |= {"size": [width, height]} | ({} if is_pixels else {"mean": mean.tolist(), "std": std.tolist()})
    return FeatureNetwork(apply, frames, fps, (width, height), facts)


def _open_session(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"--network {path} is not a file: give the path of an ONNX file or of CLIP's checkpoint")
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        raise UserError(f"--network {path} needs the package onnxruntime: pip install onnxruntime") from None
    try:
        providers = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # onnxruntime has a class for each fault, without a base of their own
        raise UserError(f"--network {path} cannot be opened by onnxruntime ({error}): export it again") from None


def _find_axes(path: Path, shape: Sequence[Any], given: str | None) -> str:
    """The order of the network's axes. Raises UserError where its shape does not tell, and nobody else does."""
    fitting = [axes for axes in AXES if len(axes) == len(shape)]
    if given is not None:
        colours = shape[given.index("C")] if given in fitting else 0
        if isinstance(colours, int) and colours != 3:
            raise UserError(f"--axes {given} does not fit {path}, whose input is {list(shape)}: C must be 3")
        return given
    told = [axes for axes in fitting if shape[axes.index("C")] == 3]
    if len(told) != 1:
        choice = " or ".join(told or fitting) or f"none of {', '.join(AXES)}"
        raise UserError(f"{path} has an input {list(shape)}, which may be {choice}: say so with --axes")
    return told[0]


def _fit(path: Path, option: str, what: str, fixed: Any, wanted: int | None, default: int) -> int:
    """A length of the clips. Raises UserError if the user wants another than the network takes."""
    if isinstance(fixed, int):
        if wanted not in (None, fixed):
            raise UserError(f"{option} asks for {wanted} {what}, {path} takes {fixed}: leave it out")
        return fixed
    return wanted or default


def _arrange(x_NTHWC: np.ndarray, axes: str) -> np.ndarray:
    """The clips in the order of the network's axes; pictures are the frames of all clips."""
    letters = " ".join(axes).lower()
    return rearrange(x_NTHWC, f"n t h w c -> {letters if 't' in letters else letters.replace('n', '(n t)')}")


def _run(session: Any, path: Path, name: str, output: str, batch: np.ndarray, fixed: int | None) -> np.ndarray:
    """The network's vectors; a batch that must be full is filled up with zeros."""
    count = len(batch)
    if fixed is not None:
        batch = np.concatenate([batch, np.zeros((fixed - count, *batch.shape[1:]), batch.dtype)])
    try:
        (found,) = session.run([output], {name: np.ascontiguousarray(batch)})
    except Exception as error:
        raise UserError(f"{path} fails on an input of shape {batch.shape} ({error}): try another --size") from None
    if found.ndim < 2 or found.size != found.shape[0] * found.shape[1] or len(found) != len(batch):
        rule = "must be a vector for each input: choose another --output"
        raise UserError(f"output {output} of {path}, {found.shape} for {len(batch)} inputs, {rule}")
    return found.reshape(len(found), -1)[:count]


def _mean_over_frames(feature_BF: np.ndarray, videos: int) -> np.ndarray:
    return feature_BF.reshape(videos, -1, feature_BF.shape[-1]).mean(1)


def _digest(path: Path) -> str:
    """What tells a file, or the files of a folder, from others."""
    digests = []
    for each in [path] if path.is_file() else sorted(path.rglob("*")):
        if each.is_file():
            with each.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if path.is_file() else hashlib.sha256("".join(digests).encode()).hexdigest()
