"""A user's own videos: which there are, their captions, and the frames that a model sees of them."""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from rcm_jax import media
from rcm_jax.config import UserError
from rcm_jax.data.samples import BadSampleError
from rcm_jax.plain_text import check_text, read_text

PICTURES = (".jpeg", ".jpg", ".png", ".webp")
SUFFIXES = tuple(sorted((*PICTURES, ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")))
SLACK = 1e-3  # seconds; containers round their times


class Clip(NamedTuple):
    """A video's file and its caption, which is None if it was not found."""

    path: Path
    caption: str | None


def list_clips(path: Path) -> list[Clip]:
    """The videos below a folder, captioned by a .txt file of the same name beside each; or those of a list.

    A list is a file of JSON lines, {"path": ..., "caption": ...}, or a .csv file with a header that names the columns
    path and caption. Its paths are relative to it.

    Raises:
        UserError: it is none of that, or has no video.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        clips = [Clip(file, _sidecar(file)) for file in files]
    else:
        clips = [Clip(path.parent / row["path"], row["caption"].strip() or None) for row in _rows(path)]
    if not clips:
        raise UserError(f"--videos {path} has no video: give a folder with some of {', '.join(SUFFIXES)}, or a list")
    return clips


def _sidecar(file: Path) -> str | None:
    try:
        return read_text(file.with_suffix(".txt"), "the caption").strip() or None
    except UserError:  # one bad sample among good ones
        return None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    text = read_text(path, "--videos")
    for number, row in _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(text):
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("path", "caption"))):
            rule = 'must be {"path": ..., "caption": ...}, or in a .csv file have these two columns'
            raise UserError(f"--videos {path}, line {number} {rule}: correct the line")
        check_text(row["caption"], f"--videos {path}, line {number}")
        yield row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"--videos {path}, line {reader.line_num + 1}: {error}; correct the line") from None


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def read_frames(path: Path, *, count: int, fps: int, size: tuple[int, int]) -> UInt8[np.ndarray, "t h w 3"]:
    """The first `count` frames of a video, `fps` a second, the middle of each resized to fill `size` (width, height).

    A frame is the one shown at its time, so a slower video has some twice. Decoding stops after the last.

    Raises:
        BadSampleError: the file is no video, or is too short.
    """
    frames: list[np.ndarray] = []
    try:
        for shown, until in _shown(path):
            wanted = sum(1 for k in range(len(frames), count) if k / fps < until - SLACK)
            if wanted:
                frames += [media.cover(_upright(shown), size)] * wanted
            if len(frames) == count:
                return np.stack(frames)
    except (FFmpegError, OSError, ValueError) as error:
        raise BadSampleError(f"{path} cannot be read as a video ({error}): remove it, or encode it again") from None
    seconds, needed = len(frames) / fps, count / fps
    raise BadSampleError(
        f"{path} lasts {seconds:.2f} s, {count} frames at {fps} a second take {needed:.2f} s: remove it"
    )


def read_last_frames(path: Path, count: int) -> UInt8[np.ndarray, "t h w 3"]:
    """The last `count` frames of a video, or of a folder of pictures in the order of the numbers in their names.

    They are as they come: neither their rate nor their size changes.

    Raises:
        UserError: there are fewer, they cannot be read, or they differ in size.
    """
    frames = _last_pictures(path, count) if path.is_dir() else _last_shown(path, count)
    if len(frames) < count:
        found = f"has {len(frames)} frames, and its last {count} are asked for"
        raise UserError(f"--video {path} {found}: give a longer one, or --condition-frames 1")
    sizes = sorted({frame.shape[1::-1] for frame in frames})
    if len(sizes) > 1:
        raise UserError(f"--video {path} has frames of sizes {sizes}, they must have one: resize them")
    return np.stack(frames)


def _last_pictures(folder: Path, count: int) -> list[np.ndarray]:
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES]
    # So that 10.png follows 9.png.
    files.sort(key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)])
    return [media.read_image(file) for file in files[-count:]]


def _last_shown(path: Path, count: int) -> list[np.ndarray]:
    try:
        return [_upright(shown) for shown in deque((shown for shown, _ in _shown(path)), maxlen=count)]
    except (FFmpegError, OSError, ValueError) as error:
        remedy = "give an MP4 file, or a folder of pictures"
        raise UserError(f"--video {path} cannot be read as a video ({error}): {remedy}") from None


def _shown(path: Path) -> Iterator[tuple[av.VideoFrame, float]]:
    """Each frame and the second, counted from the first frame, until which it is shown."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        before, start = None, 0.0
        duration = 1 / float(stream.average_rate or stream.guessed_rate or 1)
        for frame in container.decode(stream):
            time = frame.time or 0.0
            if before is None:
                start = time
            else:
                yield before, time - start
            before = frame
        if before is not None:
            yield before, (before.time or 0.0) - start + duration


def _upright(frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    """Its RGB, turned as its camera says."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
