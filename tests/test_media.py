"""Videos and pictures come back from disk as they were given, with their metadata, in formats that others read."""

import io
import json
import struct
import zlib

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rcm_jax import media


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def decode(mp4: bytes) -> tuple[np.ndarray, av.VideoStream]:
    container = av.open(io.BytesIO(mp4))
    frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames), container.streams.video[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 1, 1), (1, 16, 16), (8, 16, 16), (3, 17, 33), (2, 5, 8)])
def test_mp4_plays_everywhere_and_keeps_frames_and_even_size(frames, height, width, channels):
    video = np.full((frames, height, width, channels), 200, np.uint8)
    decoded, stream = decode(media.encode_mp4(video, fps=8))
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert decoded.shape == (frames, height + height % 2, width + width % 2, 3)
    np.testing.assert_allclose(decoded, 200, atol=2)


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_shows_each_pixel_enlarged_and_in_place(channels):
    video = noise(4, 5, 7, channels)
    decoded, _ = decode(media.encode_mp4(video, fps=8, scale=8))
    centres = decoded[:, 4::8, 4::8].astype(float)
    assert centres.shape == (4, 5, 7, 3)
    np.testing.assert_allclose(centres, np.broadcast_to(video, centres.shape), atol=14)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (255, 255, 255), (0, 0, 0)])
def test_mp4_colours_are_right_and_labelled(colour):
    decoded, stream = decode(media.encode_mp4(np.full((2, 16, 16, 3), colour, np.uint8), fps=8))
    np.testing.assert_allclose(decoded[-1, 8, 8], colour, atol=2)
    assert stream.codec_context.colorspace == 1  # BT.709 in ITU-T H.273


@pytest.mark.parametrize("fps", [0.5, 8, 23.976, 60])
def test_mp4_frame_rate(fps):
    _, stream = decode(media.encode_mp4(noise(4, 16, 16, 1), fps=fps))
    assert not stream.codec_context.has_b_frames
    assert float(stream.average_rate) == pytest.approx(fps, rel=1e-6)
    assert float(stream.duration * stream.time_base) == pytest.approx(4 / fps, rel=1e-6)


def test_odd_edges_are_padded_with_their_last_line():
    video = np.zeros((1, 3, 3, 1), np.uint8)
    video[:, -1], video[:, :, -1] = 255, 255
    decoded, _ = decode(media.encode_mp4(video, fps=1))
    assert decoded[0, 3, 3].min() > 240


def test_videos_from_jax_are_taken(tmp_path):
    media.write_video(tmp_path / "a.mp4", jnp.zeros((2, 4, 4, 1), jnp.uint8), fps=2)
    assert decode((tmp_path / "a.mp4").read_bytes())[0].shape == (2, 4, 4, 3)


METADATA = {"prompt": 'a "three" <b> é 数字 🎬', "seed": 3, "times": [1.5, 0.0], "nested": {"ema": None, "sde": True}}


@pytest.mark.parametrize("metadata", [METADATA, {"prompt": "long " * 50_000}, {}])
@pytest.mark.parametrize("name", ["a.mp4", "image.png", "grid.png"])
def test_metadata_comes_back(tmp_path, name, metadata):
    path = tmp_path / "made" / "on the way" / name
    if name == "a.mp4":
        media.write_video(path, noise(2, 4, 4, 1), fps=4, metadata=metadata)
    elif name == "image.png":
        media.write_image(path, noise(4, 4, 3), metadata=metadata)
    else:
        media.write_grid(path, {"student": [noise(2, 4, 4, 1)]}, ["a"], metadata=metadata)
    assert media.read_metadata(path) == metadata
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_files_of_other_programs_have_no_metadata(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["comment"] = "made by hand"
        stream = container.add_stream("libx264", rate=1)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode(None))
    assert media.read_metadata(tmp_path / "a.png") == media.read_metadata(tmp_path / "a.mp4") == {}


@pytest.mark.parametrize("comment", [b"caf\xe9 au lait", b"[" * 9000, b"9" * 9000], ids=["latin-1", "nested", "long"])
def test_a_comment_of_another_program_may_be_anything(comment, tmp_path):
    media.write_video(tmp_path / "a.mp4", noise(1, 16, 16, 3), fps=1, metadata={"x": "y" * (len(comment) - 9)})
    content = (tmp_path / "a.mp4").read_bytes()
    start = content.index(b'{"x"')
    (tmp_path / "a.mp4").write_bytes(content[:start] + comment + content[start + len(comment) :])
    assert media.read_metadata(tmp_path / "a.mp4") == {}


def png(*chunks: tuple[bytes, bytes], side: int = 1) -> bytes:
    """A gray picture, and other chunks after its head."""
    head, pixels = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0), zlib.compress(b"\0\0")
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    "content",
    [png(side=60_000), png((b"zTXt", b"Comment\0\0" + zlib.compress(b"0" * 2**21)))],
    ids=["pixels", "text"],
)
def test_a_picture_that_would_fill_the_memory_is_named(content, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    assert media.read_metadata(tmp_path / "a.png") == {}
    assert media.read_image(tmp_path / "a.png").shape == (1, 1, 3)
    (tmp_path / "a.png").write_bytes(content)
    for read in (media.read_metadata, media.read_image):
        with pytest.raises(ValueError, match=r"a\.png cannot be read as .* (exceeds limit|too large)"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_reading_metadata_of_what_is_no_media_file_says_so(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        media.read_metadata(tmp_path / name)
    (tmp_path / name).write_bytes(b"not a media file")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        media.read_metadata(tmp_path / name)


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (np.zeros((2, 4, 4, 1)), {}, "video_THWC has dtype float64: it must be uint8"),
        (np.zeros((4, 4, 1), np.uint8), {}, r"video_THWC has shape \(4, 4, 1\): it must be \(frames"),
        (np.zeros((2, 4, 4, 4), np.uint8), {}, r"shape \(2, 4, 4, 4\)"),
        (np.zeros((0, 4, 4, 1), np.uint8), {}, r"shape \(0, 4, 4, 1\)"),
        (noise(2, 4, 4, 1), {"fps": 0}, "fps=0 must be a positive"),
        (noise(2, 4, 4, 1), {"fps": float("nan")}, "fps=nan must be a positive"),
        (noise(2, 4, 4, 1), {"scale": 0}, "scale=0 must be a whole number"),
        (noise(2, 4, 4, 1), {"name": "a.avi"}, r"a.avi' must end in .mp4"),
    ],
)
def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path, video, options, message):
    options = {"fps": 8, "name": "a.mp4"} | options
    with pytest.raises(ValueError, match=message):
        media.write_video(tmp_path / options.pop("name"), video, **options)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(media.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        media.write_video(path, noise(2, 4, 4, 1), fps=8)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(params=["hard links", "no hard links"])
def file_system(request, monkeypatch):
    """One with hard links, and one without, as FAT and some that are mounted over a network."""

    def refuse(source, target):
        raise PermissionError("Operation not permitted")

    if request.param == "no hard links":
        monkeypatch.setattr(media.os, "link", refuse)


@pytest.mark.usefixtures("file_system")
def test_a_file_that_must_be_new_replaces_none(tmp_path):
    path = tmp_path / "a" / "a.png"
    media.write_image(path, noise(4, 4, 3), metadata={"seed": 0}, replace=False)
    with pytest.raises(FileExistsError):
        media.write_image(path, noise(4, 4, 3), metadata={"seed": 1}, replace=False)
    with pytest.raises(FileExistsError):
        media.write_file(path, b"other", replace=False)
    assert media.read_metadata(path) == {"seed": 0}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("file_system")
def test_processes_of_one_number_write_the_same_file_at_once(tmp_path, monkeypatch):
    """They run on hosts of their own, and share a folder: each file is whole, and the first one stays."""
    path, write_bytes = tmp_path / "a.json", media.Path.write_bytes

    def overtaken(self, data):
        monkeypatch.setattr(media.Path, "write_bytes", write_bytes)
        write_bytes(self, data)
        media.write_file(path, b"first", replace=False)

    monkeypatch.setattr(media.Path, "write_bytes", overtaken)
    with pytest.raises(FileExistsError):
        media.write_file(path, b"second", replace=False)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_that_fails_leaves_its_place_free(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(media.os, "link", fail)
    monkeypatch.setattr(media.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        media.write_file(tmp_path / "a", b"new", replace=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_image_pixels_are_exact(tmp_path, channels):
    image = noise(5, 7, channels)
    media.write_image(tmp_path / "a.png", image, scale=3)
    with Image.open(tmp_path / "a.png") as read:
        enlarged = np.kron(image, np.ones((3, 3, 1)))
        np.testing.assert_array_equal(np.asarray(read.convert("RGB")), np.broadcast_to(enlarged, (15, 21, 3)))


@pytest.mark.parametrize(("image", "message"), [(noise(5, 7), "shape \\(5, 7\\)"), (noise(5, 7, 2), "5, 7, 2")])
def test_image_of_a_wrong_shape_is_refused(tmp_path, image, message):
    with pytest.raises(ValueError, match=message):
        media.write_image(tmp_path / "a.png", image)


def test_gif_loops_at_the_frame_rate_with_exact_grays():
    video = noise(4, 6, 5, 1)
    with Image.open(io.BytesIO(media.encode_gif(video, fps=4, scale=2))) as gif:
        assert (gif.n_frames, gif.info["loop"], gif.info["duration"]) == (4, 0, 250)
        for time, frame in enumerate(video):
            gif.seek(time)
            np.testing.assert_array_equal(np.asarray(gif.convert("L")), np.kron(frame[..., 0], np.ones((2, 2))))


def read_grid(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("frames", "times"), [(3, [0, 4, 7]), (1, [0]), (99, range(8))])
def test_grid_has_a_row_a_sampler_and_a_column_a_prompt_with_frames_in_order(tmp_path, frames, times):
    # Every frame has a colour of its own: red tells the row, green the column, blue the time.
    def video(row: int, column: int) -> np.ndarray:
        return np.stack([np.full((16, 16, 3), (90 * row, 90 * column, 20 * time), np.uint8) for time in range(8)])

    rows = {"teacher": [video(0, 0), video(0, 1)], "student": [video(1, 0), video(1, 1)]}
    media.write_grid(tmp_path / "a.png", rows, ["a three", "a seven"], frames=frames, frame_size=32)
    grid = read_grid(tmp_path / "a.png")

    corners = {}
    for row in range(2):
        for column in range(2):
            for time in range(8):
                y, x = np.nonzero((grid == (90 * row, 90 * column, 20 * time)).all(-1))
                assert len(y) == (32 * 32 if time in times else 0)
                if len(y):
                    assert (np.ptp(y), np.ptp(x)) == (31, 31)
                    corners[row, column, time] = y.min(), x.min()
    assert len({y for y, _ in corners.values()}) == 2
    assert corners[0, 0, 0][0] < corners[1, 0, 0][0]
    across = [corners[0, column, time][1] for column in range(2) for time in times]
    assert across == sorted(across) == [corners[1, column, time][1] for column in range(2) for time in times]


def test_grid_writes_labels_left_of_the_frames_and_prompts_above(tmp_path):
    white = np.full((2, 8, 8, 1), 255, np.uint8)
    ink = {}
    for label, prompt in [("", ""), ("student", ""), ("", "a seven")]:
        media.write_grid(tmp_path / "a.png", {label: [white]}, [prompt], frame_size=96)
        ink[label, prompt] = np.argwhere(read_grid(tmp_path / "a.png").min(-1) < 200)
    assert not len(ink["", ""])
    assert len(ink["student", ""]) > 50
    assert len(ink["", "a seven"]) > 50
    assert ink["student", ""][:, 0].mean() > ink["", "a seven"][:, 0].max()
    assert ink["student", ""][:, 1].min() < ink["", "a seven"][:, 1].min()


def test_grid_shrinks_large_videos_and_cuts_long_prompts(tmp_path):
    media.write_grid(tmp_path / "a.png", {"w" * 300: [noise(2, 240, 416, 3)]}, ["word " * 500 + "w" * 500])
    height, width, _ = read_grid(tmp_path / "a.png").shape
    assert width < 3 * 256
    assert height < 2 * 256


@pytest.mark.parametrize(
    ("rows", "prompts", "message"),
    [
        ({"student": [noise(2, 4, 4, 1)]}, ["a", "b"], r"rows\['student'\] has 1 videos for 2 prompts"),
        ({"student": [noise(2, 4, 4, 1), noise(2, 4, 6, 1)]}, ["a", "b"], r"got \[\(4, 4\), \(4, 6\)\]"),
        ({"student": [noise(2, 4, 4, 1).astype(float)]}, ["a"], r"rows\['student'\]\[0\] has dtype float64"),
        ({}, ["a"], r"len\(rows\)=0"),
        ({"student": []}, [], r"len\(prompts\)=0"),
    ],
)
def test_grid_names_the_video_that_does_not_fit(tmp_path, rows, prompts, message):
    with pytest.raises(ValueError, match=message):
        media.write_grid(tmp_path / "a.png", rows, prompts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ({"a": np.float32(0.5), 1: np.int64(2)}, {"a": 0.5, "1": 2}),
        ((jnp.bfloat16(1.5), jnp.arange(2), np.bool_(True)), [1.5, [0, 1], True]),
        ([float("nan"), np.float64("inf"), jnp.float32(-jnp.inf)], ["nan", "inf", "-inf"]),
        ({"dtype": np.dtype("float32"), "none": None}, {"dtype": "float32", "none": None}),
    ],
)
def test_json_text_is_strict_json_of_anything(value, plain):
    assert json.loads(media.json_text(value), parse_constant=pytest.fail) == plain
