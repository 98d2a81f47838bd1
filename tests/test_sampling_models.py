"""launch.sample with tiny networks in the published layouts: files, their metadata, mistakes answered in one line."""

import contextlib
import dataclasses
import json

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from naming import published_tensors, wan_of_diffusers
from PIL import Image
from safetensors.numpy import save_file

from benchmarks import sampling as benchmark
from launch import sample
from rcm_jax import inference, media, published, sampling
from rcm_jax.config import UserError
from rcm_jax.convert import cosmos as cosmos_names
from rcm_jax.convert import wan as wan_names
from rcm_jax.convert.clip import clip_table
from rcm_jax.convert.loading import Transformer
from rcm_jax.convert.names import rename_params
from rcm_jax.convert.umt5 import t5_table
from rcm_jax.convert.vae import vae_table
from rcm_jax.models import clip, cosmos, presets, umt5, vae, wan
from rcm_jax.models.functional import Network, functional
from rcm_jax.models.presets import create_network

WAN = wan.WanConfig(dim=24, ffn_dim=32, heads=2, layers=2, text_dim=16, time_dim=8)
I2V = dataclasses.replace(WAN, in_channels=36, image_dim=16, image_tokens=wan_names.CLIP_TOKENS)
T5 = dict(vocabulary=16, dim=16, ffn_dim=24, heads=2, head_dim=8, layers=2)
CLIP = clip.CLIPConfig(dim=16, ffn_dim=24, heads=2, layers=2)
COSMOS = cosmos.CosmosConfig(
    dim=24, heads=2, layers=2, rope_scale=(1.0, 3.0, 3.0), in_channels=18, text_dim=16, lora_dim=4
)
SIZE, FRAMES = (32, 16), 5
PIECES = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁cat", "▁", *"abcdert"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Presets of networks that compile in moments."""
    for preset in ("wan2.1", "wan2.2"):
        config = dataclasses.replace(
            vae.PRESETS[preset], encoder_dim=4, decoder_dim=4, multipliers=(1, 1, 1, 1), blocks=1
        )
        monkeypatch.setitem(vae.PRESETS, preset, config)
    for preset in ("umt5-xxl", "t5-11b"):
        monkeypatch.setitem(umt5.PRESETS, preset, dataclasses.replace(umt5.PRESETS[preset], **T5))
    monkeypatch.setitem(clip.PRESETS, "clip-vit-h-14", CLIP)
    monkeypatch.setitem(published.RESOLUTIONS, "480p", (48, 32))
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_params(network, seed=0):
    """Small numbers everywhere: networks start with zeros that would hide mistakes."""
    random = np.random.default_rng(seed)
    shapes = network.abstract_params()
    return jax.tree.map(lambda leaf: (0.2 * random.standard_normal(leaf.shape)).astype(np.float32), shapes)


def write_folder(path, tensors, settings):
    path.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings))
    return path


def write_wan(path, config, layout="wan", seed=0):
    params = random_params(create_network(config), seed)
    if layout == "wan":
        tensors = wan_names.wan_tensors(params, config, patch_layout="conv3d")
        return write_folder(path, tensors, wan_names.wan_settings(config))
    return write_folder(path, wan_of_diffusers(params, config), wan_names.diffusers_settings(config))


def write_cosmos(path):
    tensors = rename_params(random_params(create_network(COSMOS)), cosmos_names.COSMOS)
    return write_folder(path, tensors, {"rope_scale": COSMOS.rope_scale})


def write_tokenizer(path):
    file = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -1.0) for piece in PIECES], 2))
    file.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    file.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    file.save(str(path))
    return path


def write_parts(folder, *, autoencoder="wan2.1", text="umt5-xxl", layouts=("wan", "wan", "wan")):
    """Autoencoder, text encoder, tokeniser; returns the options that name them."""
    config, t5 = vae.PRESETS[autoencoder], umt5.PRESETS[text]
    networks = {
        "vae": (functional(lambda rngs: vae.VAE(config, rngs=rngs)), vae_table(config, layouts[0])),
        "text_encoder": (functional(lambda rngs: umt5.T5Encoder(t5, rngs=rngs)), t5_table(t5, layouts[1])),
    }
    for name, (network, table) in networks.items():
        write_folder(folder / name, published_tensors(random_params(network), table), {})
    write_tokenizer(folder / "tokenizer.json")
    return [
        f"--vae={folder / 'vae'}",
        f"--text-encoder={folder / 'text_encoder'}",
        f"--tokenizer={folder / 'tokenizer.json'}",
    ]


def write_clip(folder):
    network = functional(lambda rngs: clip.ImageEncoder(CLIP, rngs=rngs))
    return write_folder(folder / "clip", published_tensors(random_params(network), clip_table("transformers")), {})


def write_image(path, size=(60, 40)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(out, *words):
    sample.main([f"--out={out}", f"--size={SIZE[0]}x{SIZE[1]}", f"--frames={FRAMES}", "--dtype=float32", *words])
    return sorted(out.iterdir())


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def parts(tmp_path):
    return write_parts(tmp_path)


@pytest.fixture
def decoded(monkeypatch):
    """All videos as the decoder made them, in order: a codec makes several levels of a difference of one."""
    videos, decode = [], inference.decode

    def watched(*arguments, **options):
        for video_THWC in decode(*arguments, **options):
            videos.append(video_THWC.astype(int))
            yield video_THWC

    monkeypatch.setattr(inference, "decode", watched)
    return videos


def test_text_to_video(tmp_path, parts, capsys):
    """A file a prompt and seed, that depends on nothing else and tells how it was made."""
    dit = write_wan(tmp_path / "dit", WAN)
    words = ["--model=wan2.1-t2v", f"--dit={dit}", *parts, "--steps=2", "--fps=8", "--prompt=a cat"]
    many = run(tmp_path / "many", *words, "--prompt=a red cat", "--seeds=0,7")
    assert [path.name for path in many] == [
        "0000_seed0.mp4", "0001_seed7.mp4", "0002_seed0.mp4", "0003_seed7.mp4"
    ]  # fmt: skip
    assert capsys.readouterr().out.split()[-4:] == [str(path) for path in many]
    assert frames_of(many[0]).shape == (FRAMES, SIZE[1], SIZE[0], 3)
    assert media.read_metadata(many[1]) == {
        "prompt": "a cat",
        "embedding": None,
        "seed": 7,
        "model": "wan2.1-t2v",
        "dit": [str(dit)],
        **{name: str(tmp_path / name) for name in ("vae", "text_encoder")},
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "image_encoder": None,
        "embeddings": None,
        "dtype": "float32",
        "tile": False,
        "sampler": "unipc",
        "guidance": [5.0],
        "steps": 2,
        "shift": 5.0,
        "negative": published.MODELS["wan2.1-t2v"].negative,
        "image": None,
        "video": None,
        "condition_frames": None,
        "size": "32x16",
        "frames": FRAMES,
        "fps": 8,
    }
    videos = [frames_of(path).astype(float) for path in many]
    (alone,) = run(tmp_path / "alone", *words, "--seeds=7")
    np.testing.assert_array_equal(frames_of(alone), videos[1])
    assert all(np.abs(videos[0] - other).max() > 1 for other in videos[1:])
    kept = alone.read_bytes()
    assert [path.name for path in run(alone.parent, *words, "--seeds=8")] == ["0000_seed7.mp4", "0001_seed8.mp4"]
    assert alone.read_bytes() == kept


@pytest.mark.parametrize("frames", [1, FRAMES], ids=["picture", "video"])
def test_commands_that_share_a_folder_keep_each_others_files(frames, tmp_path, parts, monkeypatch):
    """Though the other one takes the number at the last moment."""
    suffix, kind = ("png", "write_image") if frames == 1 else ("mp4", "write_video")
    write, theirs = getattr(media, kind), tmp_path / "out" / f"0000_seed0.{suffix}"

    def overtaken(path, *pixels, **rest):
        if not theirs.exists():
            media.write_file(theirs, b"theirs")
        write(path, *pixels, **rest)

    monkeypatch.setattr(media, kind, overtaken)
    words = ["--model=wan2.1-t2v", f"--dit={write_wan(tmp_path / 'dit', WAN)}", *parts, "--steps=1", "--prompt=a cat"]
    paths = run(tmp_path / "out", *words, "--seeds=0,3", f"--frames={frames}")
    assert [path.name for path in paths] == [
        f"000{number}_seed{seed}.{suffix}" for number, seed in ((0, 0), (1, 0), (2, 3))
    ]
    assert theirs.read_bytes() == b"theirs"
    assert [media.read_metadata(path)["seed"] for path in paths[1:]] == [0, 3]


def test_several_devices_sample_the_video_of_one(tmp_path, parts, decoded):
    """Tokens over two, heads over two; to within one of 255 steps, for sums are in another order."""
    words = ["--model=wan2.1-t2v", f"--dit={write_wan(tmp_path / 'dit', WAN)}", *parts, "--steps=2", "--prompt=a cat"]
    run(tmp_path / "1", *words)
    run(tmp_path / "4", *words, "--context=2", "--tensor=2")
    alone, spread = decoded
    assert np.abs(alone - spread).max() <= 1


def test_parts_run_where_they_are_told(tmp_path, parts, monkeypatch):
    """And give the same video."""
    words = ["--model=wan2.1-t2v", f"--dit={write_wan(tmp_path / 'dit', WAN)}", *parts, "--steps=1", "--prompt=a cat"]
    (alone,) = run(tmp_path / "1", *words)
    seen, on_device = [], inference.on_device

    @contextlib.contextmanager
    def watched(loadable):
        with on_device(loadable) as params:
            seen.extend(jax.tree.leaves(params)[0].devices())
            yield params

    monkeypatch.setattr(inference, "on_device", watched)
    (placed,) = run(tmp_path / "3", *words, "--encoder-device=3", "--vae-device=5")
    assert seen == [jax.devices()[3], jax.devices()[5]]
    np.testing.assert_array_equal(frames_of(placed), frames_of(alone))


def test_a_distilled_model_makes_an_image(tmp_path, parts):
    """A single frame is a PNG; embeddings take the place of captions, text encoder and tokeniser."""
    dit = write_wan(tmp_path / "dit", WAN, "diffusers")
    text = 20 * np.random.default_rng(0).standard_normal((2, 512, 16)).astype(np.float32)
    save_file({"text": text}, tmp_path / "texts.safetensors")
    words = ["--model=wan2.1-t2v", f"--dit={dit}", parts[0], "--frames=1", "--sampler=few-step-ode", "--steps=1"]
    paths = run(tmp_path / "out", *words, "--sigma-max=200", f"--embeddings={tmp_path / 'texts.safetensors'}")
    assert [path.name for path in paths] == ["0000_seed0.png", "0001_seed0.png"]
    metadata = media.read_metadata(paths[1])
    expected = {"prompt": None, "embedding": 1, "sampler": "few-step-ode", "steps": 1, "sigma_max": 200.0}
    expected |= {"embeddings": str(tmp_path / "texts.safetensors"), "tokenizer": None}
    assert {name: metadata[name] for name in expected} == expected
    assert (metadata["guidance"], metadata["negative"], "shift" in metadata) == ([1.0], None, False)
    first, second = (np.asarray(Image.open(path), float) for path in paths)
    assert first.shape == (SIZE[1], SIZE[0], 3)
    assert (first != second).any()


def test_image_to_video(tmp_path):
    """Wan2.1: the video takes the image's shape, and depends on what the autoencoder and CLIP see."""
    parts = write_parts(tmp_path, layouts=("diffusers", "transformers", None))
    words = ["--model=wan2.1-i2v", *parts, f"--image-encoder={write_clip(tmp_path)}", "--steps=1", "--prompt=a cat"]
    words += [f"--dit={write_wan(tmp_path / 'dit', I2V)}", "--size=480p", "--dtype=bfloat16", "--tile"]
    image = write_image(tmp_path / "tall.png", (40, 60))
    (tall,) = run(tmp_path / "tall", *words, f"--image={image}")
    assert frames_of(tall).shape == (FRAMES, 48, 32, 3)
    metadata = media.read_metadata(tall)
    assert (metadata["image"], metadata["size"], metadata["shift"]) == (str(image), "32x48", 3.0)


def test_two_networks_take_turns_at_the_boundary():
    """From it on the first one's parameters and guidance count, below it the second one's; by hand, in two steps."""

    def apply(params, x, time, text):
        return params["slope"] * x + text[:, :1, :1, None, None]

    network = Network(lambda key: {}, apply)
    loads = tuple(lambda slope=slope: {"slope": np.float32(slope)} for slope in (0.5, 0.25))
    transformer = Transformer("wan2.2-t2v", WAN, network, loads, boundary=0.5)
    texts = inference.Texts(np.ones((1, 512, 16), np.float32), np.zeros((512, 16), np.float32))
    settings = inference.Settings("euler", 3, guidance=(4.0, 3.0), shift=1.0)
    found = inference.sample_latents(transformer, texts, [(0, 3)], (1, 2, 2, 16), settings, inference.Condition())
    x = np.asarray(sampling.sample_noise(jnp.array([3]), (1, 2, 2, 16), 0))[0]
    for slope, guidance in ((0.5, 4.0), (0.5, 4.0), (0.25, 3.0)):  # at RF times 1, 2/3, 1/3
        x = x - (slope * x + guidance * 1.0) / 3
    np.testing.assert_allclose(found[0], x, rtol=1e-5, atol=1e-6)


def test_video_to_world_keeps_the_given_frame(tmp_path, monkeypatch):
    """Cosmos-Predict2: the decoder is handed the image's latent as the first frame."""
    given, decoded = [], []
    encode_given, decode = inference.encode_given, inference.decode
    monkeypatch.setattr(inference, "encode_given", lambda *a: given.append(encode_given(*a)) or given[0])
    monkeypatch.setattr(
        inference, "decode", lambda part, latents, **k: decoded.extend(latents) or decode(part, latents)
    )
    words = ["--model=cosmos-predict2-v2w", f"--dit={write_cosmos(tmp_path / 'dit')}", "--steps=2", "--prompt=a cat"]
    run(tmp_path / "out", *words, *write_parts(tmp_path, text="t5-11b"), f"--image={write_image(tmp_path / 'a.png')}")
    np.testing.assert_array_equal(decoded[0][:1], given[0].given_BTHWC[0])
    assert np.abs(decoded[0][1:]).max() > 0


@pytest.mark.parametrize(("count", "latent_frames"), [(None, 2), (1, 1)])
def test_video_to_world_goes_on_from_the_last_frames_of_a_video(count, latent_frames, tmp_path, monkeypatch):
    """Of a file or of a folder, by default five, which are two latent frames."""
    seen, given, decoded = [], [], []
    encode_given, decode = inference.encode_given, inference.decode

    def watch(parts, whole_THWC, given_THWC, frames):
        seen.append(given_THWC)
        given.append(encode_given(parts, whole_THWC, given_THWC, frames))
        return given[-1]

    monkeypatch.setattr(inference, "encode_given", watch)
    monkeypatch.setattr(
        inference, "decode", lambda part, latents, **k: decoded.extend(latents) or decode(part, latents)
    )
    video_THWC = np.random.default_rng(0).integers(0, 256, (7, *SIZE[::-1], 3), np.uint8)
    media.write_video(tmp_path / "a.mp4", video_THWC, fps=16)
    for number, frame_HWC in enumerate(frames_of(tmp_path / "a.mp4"), 5):
        media.write_image(tmp_path / "a" / f"{number}.png", frame_HWC)
    words = ["--model=cosmos-predict2-v2w", f"--dit={write_cosmos(tmp_path / 'dit')}", "--steps=2", "--prompt=a cat"]
    words += [*write_parts(tmp_path, text="t5-11b"), *([] if count is None else [f"--condition-frames={count}"])]
    for name in ("a.mp4", "a"):
        (path,) = run(tmp_path / f"{name}.out", *words, "--frames=13", f"--video={tmp_path / name}")
        assert media.read_metadata(path)["condition_frames"] == (count or 5)
    np.testing.assert_array_equal(seen[0], frames_of(tmp_path / "a.mp4")[-(count or 5) :])
    np.testing.assert_array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(given[0].channels_BTHWC[0, :, 0, 0, 0], np.arange(4) < latent_frames)
    np.testing.assert_array_equal(decoded[0][:latent_frames], given[0].given_BTHWC[0])
    assert np.abs(decoded[0][latent_frames:]).min(axis=(1, 2, 3)).max() > 0


@pytest.mark.parametrize("given_time", [0.0, 1e-4], ids=["wan", "cosmos"])
def test_a_network_is_told_the_time_of_given_frames(given_time):
    """Wan2.2 TI2V is told 0, Cosmos-Predict2 0.0001; both see the given latent in place of the sample."""
    given = jnp.full((1, 1, 2, 2, 3), 5.0)
    condition = inference.Condition(given_BTHWC=given, given_time=given_time)
    seen = {}

    def apply(params, x, time, text):
        seen.update(x=x, time=time)
        return x

    inference.conditioned(apply, condition)(
        {}, jnp.zeros((2, 3, 2, 2, 3)), jnp.array([700.0, 200.0]), jnp.zeros((2, 1, 1))
    )
    np.testing.assert_allclose(seen["time"], [[1000 * given_time, 700, 700], [1000 * given_time, 200, 200]])
    np.testing.assert_array_equal(seen["x"][:, :, 0, 0, 0], [[5, 0, 0], [5, 0, 0]])


@pytest.mark.parametrize(
    ("image", "expected"),
    [((1920, 1080), (848, 480)), ((1080, 1920), (480, 848)), ((600, 600), (624, 624))],
)
def test_a_video_takes_the_shape_of_its_image(image, expected):
    """Of about 832 x 480 pixels, in whole tokens."""
    assert published.fit_size(image, 832 * 480, 16) == expected


T2V = ["--model=wan2.1-t2v-1.3b", "--dit=a", "--vae=b", "--text-encoder=c", "--tokenizer=d", "--prompt=a cat"]
V2W = ["--model=cosmos-predict2-v2w", "--dit=a", "--vae=b", "--prompt=a cat"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt=a"], "name what to sample: either --config FILE, a recipe, or --model NAME"),
        (["--config=configs/digits_rcm.py", "--vae=b"], "--vae belongs to --model"),
        (["--model=wan2.1-t2v", "--config.seed=1"], "--config.seed=1 changes a recipe: name it with --config=FILE"),
        (["--model=wan3", "--dit=a", "--vae=b"], "--model wan3 has no published settings"),
        (T2V[:1], "needs --dit PATH"),
        (T2V[:-1], "there is no caption: give --prompt TEXT or --prompt-file FILE"),
        ([*T2V, "--embeddings=e"], "leave --prompt out"),
        ([*T2V, "--image=e"], "--image e is of no use to wan2.1-t2v-1.3b"),
        ([*T2V, "--frames=80"], "--frames 80 must be 1 + a multiple of 4: write --frames 81"),
        ([*T2V, "--frames=0"], "--frames 0 must be at least 1"),
        ([*T2V, "--fps=0"], "--fps 0 must lie between 1 and 1000"),
        ([*T2V, "--fps=2147483648"], "--fps 2147483648 must lie between 1 and 1000"),
        ([*T2V, "--size=830x480"], "--size 830x480 must have multiples of 16: write --size 832x480"),
        ([*T2V, "--size=big"], "--size big must be WIDTHxHEIGHT or one of 480p, 704p, 720p, 768p"),
        ([*T2V, "--sampler=few-step-sde", "--guidance=5"], "--guidance is of no use to --sampler few-step-sde"),
        ([*T2V, "--sampler=few-step-sde", "--steps=5"], "steps=5 must lie between 1 and 4"),
        ([*T2V, "--guidance=4,3"], "--guidance 4,3 must be 1 numbers of at least 1"),
        ([*T2V, "--shift=0"], "--shift 0.0 must be a positive number"),
        ([*T2V, "--guidance=nan"], "--guidance nan must be numbers with commas between"),
        ([*T2V, "--shift=inf"], "argument --shift: inf must be a number, such as 1.5"),
        ([*T2V, "--shift=x"], "argument --shift: x must be a number, such as 1.5"),
        ([*T2V, "--sampler=few-step-sde", "--sigma-max=nan"], "argument --sigma-max: nan must be a number"),
        ([*T2V, "--sampler=few-step-sde", "--mid-times=nan,1,0.5"], "--mid-times nan,1,0.5 must be numbers"),
        ([*T2V, "--sigma-max=80"], "--sigma-max is of no use to --sampler unipc"),
        ([*T2V, "--dtype=int8"], "--dtype int8 must be bfloat16 or float32"),
        ([*T2V, "--seeds=1,x"], "--seeds 1,x must be integers"),
        ([*T2V, "--context=0"], "--context 0 must be at least 1"),
        ([*T2V, "--context=3", "--tensor=3"], "--context 3 times --tensor 3 is more than 8 devices: lower one"),
        ([*T2V, "--vae-device=8"], "--vae-device 8 must be one of the 8 devices: choose from 0 to 7"),
        ([*T2V, "--encoder-device=-1"], "--encoder-device -1 must be one of the 8 devices: choose from 0 to 7"),
        (T2V, "a is not a file or folder"),
        (V2W, "cosmos-predict2-v2w needs the first frame: give --image FILE or --video PATH"),
        ([*V2W, "--image=e", "--video=f"], "--image e and --video f both give the first frame: leave one out"),
        ([*V2W, "--image=e", "--condition-frames=5"], "--condition-frames 5 counts the frames of a video"),
        ([*V2W, "--video=f", "--condition-frames=3"], "--condition-frames 3 must be 1 or 5: choose one of them"),
        ([*V2W, "--video=f", "--frames=5"], "--frames 5 leaves none to make after the 5 given: write --frames 9"),
        ([*V2W, "--video=f"], "--video f cannot be read as a video"),
        ([*V2W, "--video=pyproject.toml"], "--video pyproject.toml cannot be read as a video"),
        ([*T2V, "--video=f"], "--video f is of no use to wan2.1-t2v-1.3b: leave it out"),
        (["--model=wan2.2-i2v", *T2V[1:], "--video=f"], "--video f is of no use to wan2.2-i2v: leave it out"),
        ([*V2W, "--image=pyproject.toml"], "pyproject.toml cannot be read as a picture"),
        (["--model=wan2.2-t2v", *T2V[1:]], "--dit gives 1 checkpoints, wan2.2-t2v has two networks"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        sample.main([f"--out={tmp_path / 'out'}", *words])
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "shapes",
    [{}, {"text": (8, 16)}, {"text": (512, 16), "negative": (1, 512, 16)}, {"text": (512, 16), "x": (512, 16)}],
)
def test_embeddings_that_do_not_fit_are_refused(shapes, tmp_path):
    path = tmp_path / "texts.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    with pytest.raises(UserError, match=r"it must hold `text`, and may hold `negative`, each of shape \(512, 16\)"):
        inference.read_embeddings(path, WAN)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, parts, capsys):
    """Before any network is loaded, whichever of the checkpoints it is."""
    dit = write_wan(tmp_path / "dit", WAN)
    words = ["--model=wan2.1-t2v", "--prompt=a cat", f"--out={tmp_path / 'out'}"]
    for wrong, message in (
        ([*parts[1:], f"--dit={dit}", f"--vae={dit}"], "does not fit the network, nothing was loaded"),
        ([*parts, f"--dit={tmp_path / 'vae'}"], "it is no Wan network"),
    ):
        with pytest.raises(SystemExit):
            sample.main([*words, *wrong])
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", benchmark.STAGES)
def test_the_benchmark_measures_every_stage(stage, monkeypatch, capsys):
    monkeypatch.setitem(presets.PRESETS, "wan2.1-t2v-1.3b", WAN)
    benchmark.main([f"--only={stage}:jax", "--size=32x16", "--frames=1", "--steps=1", "--repeats=1"])
    result = json.loads(capsys.readouterr().out)
    assert min(result["seconds"], result["first_seconds"]) > 0
    assert (result["device"], result["jax"]) == ("cpu", jax.__version__)
