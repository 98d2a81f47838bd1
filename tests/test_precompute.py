"""launch.precompute with tiny networks: what the data sets hold, that they train, resume, and refuse."""

import json

import av
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_sampling_models import FRAMES, SIZE, WAN, tiny, write_parts, write_wan  # noqa: F401, tiny is a fixture

from launch import precompute, train
from rcm_jax import inference, media
from rcm_jax.checkpoint import load_safetensors
from rcm_jax.config import UserError
from rcm_jax.convert import loading
from rcm_jax.data import pipeline, videos
from rcm_jax.data.tokenizer import load_tokenizer
from rcm_jax.models import umt5, vae, wan

FPS = 8
CAPTIONS = ("a cat", "a red cat", "a bed", "red", "cat")
LATENT, TEXT = (2, 2, 4, 16), (512, 16)


def film(frames=FRAMES, seed=0, size=SIZE):
    """Frames of one colour each, which survive compression."""
    colours = np.random.default_rng(seed).integers(40, 216, (frames, 1, 1, 3), np.uint8)
    return np.broadcast_to(colours, (frames, size[1], size[0], 3))


@pytest.fixture
def folder(tmp_path):
    """Five captioned videos."""
    folder = tmp_path / "videos"
    for number, caption in enumerate(CAPTIONS):
        media.write_video(folder / f"{number}.mp4", film(seed=number), fps=FPS)
        (folder / f"{number}.txt").write_text(f"{caption}\n")
    return folder


@pytest.fixture
def words(tmp_path):
    """The options that every data set of a model has."""
    return [
        *write_parts(tmp_path / "parts"),
        "--model=wan2.1-t2v",
        "--dtype=float32",
        f"--size={SIZE[0]}x{SIZE[1]}",
        f"--frames={FRAMES}",
        "--shard-size=2",
    ]


@pytest.fixture
def of_videos(folder, words):
    return [f"--videos={folder}", f"--fps={FPS}", *words]


@pytest.fixture
def of_captions(tmp_path, words):
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    words = [word for word in words if not word.startswith("--vae")]
    return [
        f"--prompt-file={tmp_path / 'prompts.txt'}",
        f"--dit={write_wan(tmp_path / 'dit', WAN)}",
        "--steps=2",
        *words,
    ]


def run(out, *words, name="mine"):
    precompute.main([f"--out={out}", f"--name={name}", *words])
    return out / name


def contents(folder):
    """The bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_users_videos(tmp_path, of_videos, folder):
    """Records hold what the autoencoder and the text encoder give, in bfloat16, in the order of the files' names."""
    data_set = run(tmp_path, *of_videos)
    source = pipeline.open_source("mine", tmp_path, "train")
    assert [source[number]["prompt"].decode() for number in range(len(source))] == list(CAPTIONS)
    assert (source[0]["latent"].shape, source[0]["text"].shape) == (LATENT, TEXT)
    assert source[0]["latent"].dtype == source[0]["text"].dtype == ml_dtypes.bfloat16
    assert len(list(data_set.glob("mine-train.array_record-*-of-00003"))) == 3

    parts = tmp_path / "parts"
    encoder = loading.open_autoencoder(parts / "vae", vae.PRESETS["wan2.1"]).encoder
    with av.open(str(folder / "3.mp4")) as container:
        pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    latent = encoder.network.apply(encoder.load(), jnp.asarray(pixels[None] / 127.5 - 1, jnp.float32))[0]
    np.testing.assert_array_equal(source[3]["latent"], np.asarray(latent).astype(ml_dtypes.bfloat16))
    text_encoder = loading.open_text_encoder(parts / "text_encoder", umt5.PRESETS["umt5-xxl"])
    tokens = load_tokenizer(parts / "tokenizer.json")([CAPTIONS[1]])
    text = text_encoder.network.apply(text_encoder.load(), *map(jnp.asarray, tokens))[0]
    np.testing.assert_allclose(np.float32(source[1]["text"]), text, rtol=2**-8)  # bfloat16 rounds by up to 2^-9


def test_a_teachers_samples(tmp_path, of_captions):
    """Sample i has caption i and seed 3 + i, whatever the shards; the negative caption is the one that guided it."""
    data_set = run(tmp_path, *of_captions, "--seed=3", "--guidance=2", "--repeat=2", "--negative=a bed")
    source = pipeline.open_source("mine", tmp_path, "train")
    assert [record["prompt"].decode() for record in source] == [*CAPTIONS, *CAPTIONS]
    negative = load_safetensors(data_set / "negative.safetensors")[0]["text"]
    np.testing.assert_array_equal(negative, source[2]["text"])
    transformer = loading.open_transformer([tmp_path / "dit"], "wan2.1-t2v")
    texts = inference.Texts(np.float32(source[6]["text"])[None], np.float32(negative))
    settings = inference.Settings("unipc", 2, (2.0,), shift=5.0)
    (latent,) = inference.sample_latents(transformer, texts, [(0, 9)], LATENT, settings, inference.Condition())
    np.testing.assert_array_equal(source[6]["latent"], latent.astype(ml_dtypes.bfloat16))
    assert (source[1]["latent"] != source[6]["latent"]).any()


def test_a_data_set_trains(tmp_path, of_videos, monkeypatch):
    """launch.train distils a tiny teacher on the user's own videos."""
    data_set = run(tmp_path, *of_videos)
    monkeypatch.setitem(wan.PRESETS, "wan2.1-t2v-1.3b", WAN)
    monkeypatch.setattr(train, "keep_compilations", lambda: None)
    settings = {
        "data.dir": tmp_path,
        "data.name": "mine",
        "data.batch_size": 8,
        "teacher.path": write_wan(tmp_path / "teacher", WAN),
        "teacher.negative_path": data_set / "negative.safetensors",
        "stages": "scm:2",
        "model.dtype": "float32",
        "model.remat": "none",
        "faults.hang_seconds": 0,
        "log.every": 1,
    }
    workdir = tmp_path / "run"
    words = ["train", "--config=configs/wan2_1_t2v_1_3b.py", f"--workdir={workdir}"]
    monkeypatch.setattr("sys.argv", [*words, *(f"--config.{key}={value}" for key, value in settings.items())])
    train.main()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["grad_norm"]) for line in lines)


class Kill(BaseException):
    """Ends a command wherever it is."""


@pytest.fixture
def read(monkeypatch):
    """The videos that were read, by number. `read.last` ends the command at that one."""

    class Read(list):
        last = None

    read, read_frames = Read(), videos.read_frames

    def watched(path, **how):
        number = int(path.stem)
        read.append(number)
        if number == read.last:
            raise Kill
        return read_frames(path, **how)

    monkeypatch.setattr(videos, "read_frames", watched)
    return read


@pytest.mark.parametrize("last", [0, 3])
def test_an_interrupted_command_goes_on(last, tmp_path, of_videos, read, capsys):
    """After the last finished shard of two, to the same bytes; given again once more, it does nothing."""
    expected = contents(run(tmp_path / "whole", *of_videos))
    read.clear()
    read.last = last
    with pytest.raises(Kill):
        run(tmp_path / "broken", *of_videos)
    assert not (tmp_path / "broken" / "mine").exists()
    read.clear()
    read.last = None
    data_set = run(tmp_path / "broken", *of_videos)
    assert set(read) == set(range(last // 2 * 2, 5))  # the broken command's readers may still end what they began
    assert contents(data_set) == expected
    assert [path.name for path in data_set.parent.iterdir()] == ["mine"]
    capsys.readouterr()
    run(tmp_path / "broken", *of_videos)
    assert capsys.readouterr().out == f"{data_set} is complete\n"
    assert contents(data_set) == expected


def refuse(out, words, capsys):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as exit_:
        run(out, *words)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2
    assert "error: " in error
    return error


def test_another_commands_work_is_kept(tmp_path, of_videos, read, capsys):
    """Neither an unfinished data set nor a finished one gives way to another command's."""
    read.last = 3
    with pytest.raises(Kill):
        run(tmp_path, *of_videos)
    read.last = None
    other = [*of_videos, "--negative=ugly"]
    assert "is what another command has not finished: give that one again, or remove it" in refuse(
        tmp_path, other, capsys
    )
    expected = contents(run(tmp_path, *of_videos))
    assert "mine exists and is never overwritten" in refuse(tmp_path, other, capsys)
    assert contents(tmp_path / "mine") == expected


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("of_captions", "dit/model.safetensors"),
        ("of_captions", "parts/text_encoder/model.safetensors"),
        ("of_videos", "parts/vae/model.safetensors"),
        ("of_videos", "videos/0.mp4"),
    ],
)
def test_a_data_set_is_finished_with_the_files_it_began_with(source, changed, tmp_path, request, monkeypatch, capsys):
    """Others that came under the same names make another command."""

    def kill(*_, **__):
        raise Kill

    monkeypatch.setattr(inference, "sample_latents", kill)
    monkeypatch.setattr(videos, "read_frames", kill)
    words, path = request.getfixturevalue(source), tmp_path / changed
    with pytest.raises(Kill):
        run(tmp_path, *words)
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert "is what another command has not finished" in refuse(tmp_path, words, capsys)
    path.write_bytes(before)
    with pytest.raises(Kill):  # it goes on
        run(tmp_path, *words)


def test_bad_videos_are_left_out_by_name(tmp_path, of_videos, folder, capsys):
    """Without a caption, too short, no video: named, counted, and the others stay as they are."""
    (folder / "0.txt").unlink()
    media.write_video(folder / "2.mp4", film(frames=FRAMES - 1), fps=FPS)
    (folder / "3.mp4").write_bytes(b"no video")
    assert "bad samples: 1, --max-bad allows 0: mend them or allow more. The first:" in refuse(
        tmp_path, of_videos, capsys
    )
    data_set = run(tmp_path / "out", *of_videos, "--max-bad=0.6", "--tile")
    summary, said = json.loads((data_set / "precompute.json").read_text()), capsys.readouterr().err
    assert summary["samples"] == 2
    for name, fault in (
        ("0.mp4", "has no caption: give one"),
        ("2.mp4", "lasts 0.50 s"),
        ("3.mp4", "cannot be read as a"),
    ):
        (message,) = (message for message in summary["bad"] if f"/{name} " in message)
        assert fault in message
        assert f"left out: {message}" in said
    source = pipeline.open_source("mine", tmp_path / "out", "train")
    assert [record["prompt"].decode() for record in source] == [CAPTIONS[1], CAPTIONS[4]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_list_of_videos(suffix, encoding, folder):
    """Paths are relative to the list; captions are its own. Excel's "CSV UTF-8" starts with a byte order mark."""
    rows = [("3.mp4", 'a "red",\n cat'), ("0.mp4", "ein Füchslein")]
    if suffix == ".csv":
        lines = ["caption,path", '"a ""red"",', ' cat",3.mp4', "ein Füchslein,0.mp4"]
    else:
        lines = ["", *(json.dumps({"path": path, "caption": caption, "fps": 3}) for path, caption in rows)]
    (folder / f"list{suffix}").write_text("\n".join(lines), encoding=encoding)
    assert videos.list_clips(folder / f"list{suffix}") == [videos.Clip(folder / path, text) for path, text in rows]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa red cat\r\n", b"a red cat"])
@pytest.mark.parametrize("suffix", videos.SUFFIXES)
def test_a_caption_beside_a_video(suffix, content, tmp_path):
    (tmp_path / f"a{suffix}").touch()
    (tmp_path / "a.txt").write_bytes(content)
    assert videos.list_clips(tmp_path) == [videos.Clip(tmp_path / f"a{suffix}", "a red cat")]


def test_a_picture_is_a_video():
    assert set(videos.PICTURES) < set(videos.SUFFIXES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.jsonl", '{"path": "a", "caption": "b"}\n{"path": 3}', "list.jsonl, line 2 must be"),
        ("list.jsonl", "[" * 10**5, "list.jsonl, line 1 must be"),
        ("list.csv", "path,text\na,b", "list.csv, line 2 must be"),
        ("list.csv", f"path,caption\na,{'b' * 2**20}", "list.csv, line 2: field larger than field limit"),
        ("list.csv", "", "has no video: give a folder"),
        ("list.jsonl", '{"path": "a", "caption": "\\ud800"}', "list.jsonl, line 1 is not text in UTF-8"),
        ("list.csv", b"\xff", r"list.csv is not text in UTF-8, byte 0 is 0xff: save it"),
    ],
)
def test_a_list_that_is_none_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        videos.list_clips(tmp_path / name)


@pytest.mark.parametrize(("rate", "taken"), [(4, [0, 0, 1, 1, 2]), (8, [0, 1, 2, 3, 4]), (24, [0, 3, 6, 9, 12])])
def test_frames_are_those_shown_at_the_models_rate(rate, taken, tmp_path):
    video = film(frames=13)
    media.write_video(tmp_path / "a.mp4", video, fps=rate)
    frames = videos.read_frames(tmp_path / "a.mp4", count=5, fps=8, size=SIZE)
    # H.264 in BT.709 loses a little of a flat colour.
    np.testing.assert_allclose(frames.astype(int), video[taken], atol=4)


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (24, 24)])
def test_the_middle_fills_the_size(size, tmp_path):
    """A white square in the middle of a wide black frame keeps its place and shape, however the frame is cut."""
    image = np.zeros((1, 48, 96, 3), np.uint8)
    image[:, 12:36, 36:60] = 255
    media.write_image(tmp_path / "a.png", image[0])
    (frame,) = videos.read_frames(tmp_path / "a.png", count=1, fps=8, size=size)
    assert frame.shape == (size[1], size[0], 3)
    bright = frame[..., 0] > 128
    rows, columns = bright.any(1), bright.any(0)
    assert (rows == rows[::-1]).all()
    assert (columns == columns[::-1]).all()
    assert abs(int(rows.sum()) - int(columns.sum())) <= 1


def test_a_camera_held_upright(tmp_path):
    """What a phone stores on its side, with a note, is turned: the red left edge of the file is the upper edge."""
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :8] = (255, 0, 0)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.set_display_rotation(-90)  # clockwise
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    (frame,) = videos.read_frames(tmp_path / "a.mp4", count=1, fps=8, size=(16, 32))
    assert frame[:6, :, 0].min() > 128 > frame[10:, :, 0].max()


def test_the_last_frames_of_a_folder_are_those_of_the_highest_numbers(tmp_path):
    """10 follows 9, as it would not by the alphabet; other files are no frames."""
    frames = film(12)
    for number in range(12):
        media.write_image(tmp_path / f"frame{number}.png", frames[number])
    (tmp_path / "notes.txt").write_text("")
    np.testing.assert_array_equal(videos.read_last_frames(tmp_path, 5), frames[-5:])


def test_frames_that_are_too_few_or_differ_in_size_are_refused(tmp_path):
    media.write_video(tmp_path / "a.mp4", film(4), fps=FPS)
    assert len(videos.read_last_frames(tmp_path / "a.mp4", 4)) == 4
    with pytest.raises(UserError, match=r"a\.mp4 has 4 frames, and its last 5 are asked for: give a longer one"):
        videos.read_last_frames(tmp_path / "a.mp4", 5)
    for number in range(2):
        media.write_image(tmp_path / "b" / f"{number}.png", film(1, size=(16 + number, 32))[0])
    with pytest.raises(UserError, match=r"b has frames of sizes \[\(16, 32\), \(17, 32\)\], they must have one"):
        videos.read_last_frames(tmp_path / "b", 2)


OF_VIDEOS = ["--videos=v", "--model=wan2.1-t2v-1.3b", "--vae=a", "--text-encoder=b", "--tokenizer=c"]
OF_CAPTIONS = ["--prompt-file=pyproject.toml", "--dit=a", *(word for word in OF_VIDEOS[1:] if word != "--vae=a")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --videos, --prompt-file, --from-tar, --to-tar: there are 0"),
        ([*OF_VIDEOS, "--from-tar=t"], "there are 2"),
        ([*OF_VIDEOS, "--name=a/b"], "--name a/b must be a word of letters, digits and _"),
        ([*OF_VIDEOS, "--name=digits"], "and not digits or digits28: choose another"),
        ([*OF_VIDEOS, "--guidance=3"], "--guidance is of no use to --videos: leave it out"),
        ([*OF_CAPTIONS, "--fps=3"], "--fps is of no use to --prompt-file"),
        (["--from-tar=t", "--model=wan2.1-t2v"], "--model is of no use to --from-tar"),
        (OF_VIDEOS[:2], "--videos needs --vae: give it"),
        (OF_CAPTIONS[:1], "--prompt-file needs --model"),
        ([*OF_VIDEOS, "--shard-size=0"], "--shard-size 0 must be at least 1"),
        ([*OF_CAPTIONS, "--seed=-1"], "--seed -1 must lie between 0 and"),
        ([*OF_VIDEOS, "--max-bad=1"], "--max-bad 1.0 must be at least 0 and less than 1"),
        ([*OF_VIDEOS, "--model=wan2.1-i2v-14b"], "--model wan2.1-i2v-14b starts from an image"),
        ([*OF_VIDEOS, "--frames=4"], "--frames 4 must be 1 + a multiple of 4"),
        ([*OF_CAPTIONS, "--size=830x480"], "--size 830x480 must have multiples of 16"),
        (OF_VIDEOS, "--videos v cannot be read (No such file or directory): check the path"),
        (OF_CAPTIONS, "tokeniser c must be tokenizer.json, spiece.model or a folder"),
        (["--from-tar=t"], "t is no .tar file, nor a folder with one"),
        (["--to-tar=t"], "holds no dataset_info.json"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, tmp_path, capsys):
    assert message in refuse(tmp_path / "out", words, capsys)
    assert not list(tmp_path.iterdir())
