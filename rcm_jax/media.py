"""Videos and pictures on disk: MP4 and GIF encoding, PNG sample grids, and the metadata each file carries."""

import io
import json
import math
import os
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from rcm_jax.config import UserError

TEXT = (32, 33, 36)
MUTED = (95, 99, 104)
PAPER = (255, 255, 255)
# What Pillow and PyAV raise for a file that they cannot read, or will not: its pixels or text would fill the memory.
UNREADABLE = (FFmpegError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def json_text(value: object, indent: int | None = None) -> str:
    """Strict JSON of `value`: array scalars become numbers, NaN and infinities strings, anything unknown its `str`."""

    def plain(value):
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else str(float(value))
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
            return plain(np.asarray(value).tolist())
        return str(value)

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_file(path: str | Path, data: bytes, *, replace: bool = True) -> None:
    """Puts `data` at `path` whole or not at all: it is written beside `path` and renamed. Makes missing folders.

    Raises FileExistsError, without `replace`, where something is already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number alone: on two hosts that share a folder it may be the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(data)
        if replace:
            os.replace(temporary, path)
        else:
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(finished: Path, path: Path) -> None:
    """Moves a file to `path`. Raises FileExistsError where something is already, be it for an instant."""
    try:
        os.link(finished, path)
    except FileExistsError:
        raise
    except OSError:  # not every file system has hard links: there an empty file holds the place first
        path.open("xb").close()
        try:
            os.replace(finished, path)
        except BaseException:
            path.unlink()
            raise
    else:
        finished.unlink()


def encode_mp4(
    video_THWC: ArrayLike, *, fps: float | int, scale: int = 1, metadata: Mapping[str, object] | None = None
) -> bytes:
    """H.264 (yuv420p, BT.709) in an MP4 container: what every browser plays.

    video_THWC: uint8, C = 1 (gray) or 3 (RGB). Each pixel becomes scale x scale; an odd height or width is padded with
        its last line.
    fps: frames a second. metadata: stored as JSON in the container's comment; read_metadata gives it back.
    Raises ValueError for another dtype or shape, or an fps or scale that is not positive.
    """
    video_THWC = _checked_video(video_THWC, "video_THWC")
    rate = _frame_rate(fps)
    video_THWC = _upscale(video_THWC, scale)
    _, height, width, _ = video_THWC.shape
    video_THWC = np.pad(video_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = json_text(metadata or {})
        # No reordered frames (bf): the first one is there at once when a short video starts again.
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "bf": "0"})
        stream.height, stream.width = video_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Unlabelled colours are guessed by the player, from the picture's size.
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        for frame_HWC in video_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(_rgb(frame_HWC)), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def encode_gif(video_THWC: ArrayLike, *, fps: float | int, scale: int = 1) -> bytes:
    """Endless GIF of a uint8 video (T, H, W, C), C = 1 or 3. GIF counts time in 1/100 s: fps is met to that."""
    video_THWC = _upscale(_checked_video(video_THWC, "video_THWC"), scale)
    first, *rest = [_picture(frame_HWC) for frame_HWC in video_THWC]
    milliseconds = max(20, round(100 / float(_frame_rate(fps))) * 10)  # browsers slow anything below 20 ms down to 100
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return file.getvalue()


def write_video(
    path: str | Path,
    video_THWC: ArrayLike,
    *,
    fps: float | int,
    scale: int = 1,
    metadata: Mapping[str, object] | None = None,
    replace: bool = True,
) -> None:
    """Writes encode_mp4(...) to `path`, which must end in .mp4, as write_file does."""
    _require_suffix(path, ".mp4")
    write_file(path, encode_mp4(video_THWC, fps=fps, scale=scale, metadata=metadata), replace=replace)


def write_image(
    path: str | Path,
    image_HWC: ArrayLike,
    *,
    scale: int = 1,
    metadata: Mapping[str, object] | None = None,
    replace: bool = True,
) -> None:
    """Writes a uint8 picture (H, W, C), C = 1 or 3, as PNG with its metadata, as write_file does.

    Each pixel becomes scale x scale.
    """
    _require_suffix(path, ".png")
    image_HWC = np.asarray(image_HWC)
    if image_HWC.ndim != 3:
        raise ValueError(f"image_HWC has shape {image_HWC.shape}: it must be (height, width, channels)")
    image_1HWC = _upscale(_checked_video(image_HWC[None], "image_HWC[None]"), scale)
    write_file(path, _png(_picture(image_1HWC[0]), metadata), replace=replace)


def read_metadata(path: str | Path) -> dict:
    """The metadata that write_video, write_image or write_grid stored in a .mp4 or .png file; {} if it has none.

    Raises FileNotFoundError, or ValueError for a file that is neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()  # text may also follow the pixels
                comment = image.info.get("Comment", "")
        else:
            with av.open(str(path)) as container:
                comment = container.metadata.get("comment", "")
    except UnicodeDecodeError:  # text that another program wrote
        return {}
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as a video or a PNG picture ({error}): write it again") from error
    try:
        metadata = json.loads(comment)
    except (ValueError, RecursionError):  # a comment that another program wrote
        return {}
    return metadata if isinstance(metadata, dict) else {}


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture's RGB, turned as its camera says; transparent parts show what lies under them.

    Raises UserError for a file that is no picture.
    """
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read as a picture ({error}): give a PNG or JPEG file") from None


def cover(image_HWC: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "y x 3"]:
    """The middle of a picture, resized to fill `size` (width, height) without being stretched."""
    picture = ImageOps.fit(Image.fromarray(image_HWC), size, Image.Resampling.LANCZOS)
    return np.asarray(picture)


def write_grid(
    path: str | Path,
    rows: Mapping[str, Sequence[ArrayLike]],
    prompts: Sequence[str],
    *,
    frames: int = 4,
    frame_size: int | None = None,
    font: str | Path | None = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """A PNG with one row of videos a sampler and one column a prompt; a cell shows `frames` evenly spaced frames.

    rows: label -> one uint8 video (T, H, W, C) a prompt, all of one height and width, C = 1 or 3.
    frame_size: longer side of a frame in pixels (default: 64, or 256 for videos larger than that); frames are enlarged
        by whole numbers only.
    font: a TrueType file, for prompts beyond ASCII (Pillow's own font has nothing else).
    """
    _require_suffix(path, ".png")
    if not prompts or not rows or frames < 1:
        raise ValueError(f"a grid needs a row, a prompt and a frame, got {len(rows)=}, {len(prompts)=}, {frames=}")
    for label, videos in rows.items():
        if len(videos) != len(prompts):
            raise ValueError(f"rows[{label!r}] has {len(videos)} videos for {len(prompts)} prompts: give one a prompt")
    videos = {
        label: [_checked_video(video, f"rows[{label!r}][{i}]") for i, video in enumerate(row)]
        for label, row in rows.items()
    }
    sizes = {video.shape[1:3] for row in videos.values() for video in row}
    if len(sizes) > 1:
        raise ValueError(f"the videos of a grid must have one height and width, got {sorted(sizes)}: resize them")
    cells = {label: [_film_strip(video, frames, frame_size) for video in row] for label, row in videos.items()}
    write_file(path, _png(_draw_grid(cells, prompts, font), metadata))


def _draw_grid(
    cells: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], font: str | Path | None
) -> Image.Image:
    """Lays film strips of one height out as a table with a header of prompts and a column of row labels."""
    cell_width = max(strip.width for row in cells.values() for strip in row)
    cell_height = next(iter(cells.values()))[0].height
    gap = max(8, cell_height // 6)
    # Readable when a page shrinks the whole picture to its width, but at least twelve letters fit on a line.
    size = max(12, min(len(prompts) * cell_width // 66, cell_width // 7))
    face = ImageFont.load_default(size) if font is None else ImageFont.truetype(str(font), size)
    line = round(1.3 * size)

    headers = [_wrap(prompt, face, cell_width, lines=3) for prompt in prompts]
    labels = {label: _wrap(label, face, 9 * size, lines=max(1, cell_height // line)) for label in cells}
    label_width = max(round(face.getlength(text)) for lines in labels.values() for text in lines)
    left = gap + label_width + 2 * gap
    top = gap + line * max(len(lines) for lines in headers) + gap // 2
    width = left + len(prompts) * (cell_width + gap)
    height = top + len(cells) * (cell_height + gap)

    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for column, lines in enumerate(headers):
        x, bottom = left + column * (cell_width + gap), top - gap // 2
        for row, text in enumerate(lines):
            draw.text((x, bottom - line * (len(lines) - row)), text, font=face, fill=MUTED)
    for row, (label, strips) in enumerate(cells.items()):
        y = top + row * (cell_height + gap)
        middle = y + cell_height / 2 - line * (len(labels[label]) - 1) / 2
        for i, text in enumerate(labels[label]):
            draw.text((gap, middle + line * i), text, font=face, fill=TEXT, anchor="lm")
        for column, strip in enumerate(strips):
            page.paste(strip, (left + column * (cell_width + gap), y))
    return page


def _film_strip(video_THWC: UInt8[np.ndarray, "t h w c"], frames: int, frame_size: int | None) -> Image.Image:
    """Evenly spaced frames side by side, first and last included, resized so that the longer side is frame_size."""
    count, height, width, _ = video_THWC.shape
    longer = max(height, width)
    frame_size = frame_size or (64 if longer <= 64 else 256)
    if longer <= frame_size:
        factor, resample = frame_size // longer, Image.Resampling.NEAREST
    else:
        factor, resample = frame_size / longer, Image.Resampling.LANCZOS
    size = max(1, round(width * factor)), max(1, round(height * factor))
    times = np.linspace(0, count - 1, min(frames, count)).round().astype(int)
    gap = max(1, size[1] // 32)
    strip = Image.new("RGB", (len(times) * (size[0] + gap) - gap, size[1]), PAPER)
    for i, time in enumerate(times):
        strip.paste(_picture(video_THWC[time]).resize(size, resample), (i * (size[0] + gap), 0))
    return strip


def _wrap(text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """Breaks `text` into at most `lines` lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    letters = max(5, int(width / face.getlength("i")))
    while letters > 5 and any(face.getlength(line) > width for line in textwrap.wrap(text, letters)):
        letters -= 1
    return textwrap.wrap(text, letters, max_lines=lines, placeholder=" …") or [""]


def _checked_video(video_THWC: ArrayLike, name: str) -> UInt8[np.ndarray, "t h w c"]:
    video_THWC = np.asarray(video_THWC)
    if video_THWC.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {video_THWC.dtype}: it must be uint8, 0 black to 255 white")
    if video_THWC.ndim != 4 or video_THWC.shape[-1] not in (1, 3) or 0 in video_THWC.shape:
        raise ValueError(f"{name} has shape {video_THWC.shape}: it must be (frames, height, width, 1 or 3 channels)")
    return video_THWC


def _frame_rate(fps: float | int) -> Fraction:
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"{fps=} must be a positive number of frames a second")
    return Fraction(fps).limit_denominator(1001)  # 1001: the denominator of television's 30000/1001


def _upscale(video_THWC: UInt8[np.ndarray, "t h w c"], scale: int) -> UInt8[np.ndarray, "t h2 w2 c"]:
    if scale < 1:
        raise ValueError(f"{scale=} must be a whole number of at least 1")
    return video_THWC.repeat(scale, axis=1).repeat(scale, axis=2)


def _rgb(frame_HWC: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.broadcast_to(frame_HWC, (*frame_HWC.shape[:2], 3))


def _picture(frame_HWC: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(frame_HWC.squeeze(-1) if frame_HWC.shape[-1] == 1 else frame_HWC))


def _png(picture: Image.Image, metadata: Mapping[str, object] | None) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", json_text(metadata or {}))
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=text, optimize=True)
    return file.getvalue()


def _require_suffix(path: str | Path, suffix: str) -> None:
    if Path(path).suffix != suffix:
        raise ValueError(f"path={str(path)!r} must end in {suffix}")
