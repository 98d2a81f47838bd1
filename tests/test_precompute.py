"""launch.precompute with tiny networks: what the data sets hold, that they train, resume, and refuse."""

import json

import av
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_sampling_models as parts_of_models
from test_sampling_models import FRAMES, SIZE, WAN, tiny, write_parts, write_wan  # noqa: F401, tiny is a fixture

from launch import precompute, train
from rcm_jax import inference, media
from rcm_jax.checkpoint import load_safetensors
from rcm_jax.convert import loading, writing
from rcm_jax.data import pipeline, samples, shards, videos
from rcm_jax.data.samples import BadSampleError
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
    return [f"--prompt-file={tmp_path / 'prompts.txt'}", f"--dit={write_wan(tmp_path / 'dit', WAN)}", "--steps=2", *words]


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
    text = text_encoder.network.apply(text_encoder.load(), *tokens)[0]
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
        "stages": "rcm:2",
        "loss.tangent_warmup": 0,
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
