"""launch.evaluate features and score: what a network is given, and what is said of a set of samples."""

import json
import sys

import numpy as np
import onnx
import pytest
import scipy.linalg
import scipy.spatial.distance
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_sampling_models import frames_of, tiny, write_clip, write_parts  # noqa: F401  (tiny is a fixture)

from launch import evaluate
from rcm_jax import features, media, sample_sets, set_scores
from rcm_jax.checkpoint import export_safetensors
from rcm_jax.config import UserError
from rcm_jax.features import View

FRAMES, WIDTH, HEIGHT, OUT = 5, 32, 16, 4
LENGTHS = {"N": "batch", "C": 3, "T": FRAMES, "H": HEIGHT, "W": WIDTH}


def write_network(path, axes="NCTHW", dtype=TensorProto.FLOAT, seed=0, outputs=("features",), **lengths):
    """A network that multiplies all numbers of an input by a matrix, in their order; returns the matrix."""
    shape = [(LENGTHS | lengths)[axis] for axis in axes]
    fixed = {axis: length for axis, length in lengths.items() if isinstance(length, int)}
    count = np.prod([(LENGTHS | fixed)[axis] for axis in axes[1:]])
    weight = np.random.default_rng(seed).standard_normal((count, OUT)).astype(np.float32) / 100
    nodes = [
        helper.make_node("Cast", ["video"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"], axis=1),
        *(helper.make_node("MatMul", ["flat", "weight"], [name]) for name in outputs),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("video", dtype, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], OUT]) for name in outputs],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return weight


def write_videos(folder, count=9):
    random = np.random.default_rng(0)
    for number in range(count):
        media.write_video(
            folder / f"{number}.mp4", random.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8), fps=8
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder)
    return folder


@pytest.mark.parametrize("batch", ["batch", 2])
@pytest.mark.parametrize("axes", features.AXES)
def test_a_network_sees_pixels_in_the_order_of_its_axes(axes, batch, folder, tmp_path):
    """Frames of pictures are averaged; a batch of fixed size is filled up."""
    weight = write_network(tmp_path / "a.onnx", axes, N=batch)
    view = View(mean=(0.4, 0.5, 0.6), std=(0.25, 0.5, 2.0), frames=FRAMES)
    paths = features.list_videos(folder)
    found = features.extract(features.open_network(tmp_path / "a.onnx", view), paths)
    x = (np.stack([frames_of(path) for path in paths]) / 255 - view.mean) / np.array(view.std)
    weight = weight.reshape([LENGTHS[axis] for axis in axes[1:]] + [OUT])
    expected = np.einsum(f"nthwc,{axes[1:].lower()}o->nto", x, weight) if "T" not in axes else None
    if expected is None:
        expected = np.einsum(f"nthwc,{axes[1:].lower()}o->no", x, weight)[:, None]
    np.testing.assert_allclose(found, expected.mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [(TensorProto.UINT8, 1e-5), (TensorProto.FLOAT16, 1e-3), (TensorProto.DOUBLE, 1e-5)]
)
def test_a_network_gets_numbers_of_its_kind(kind, tolerance, folder, tmp_path):
    """Bytes are pixels as they are; without --mean and --std other numbers lie between -1 and 1."""
    weight = write_network(tmp_path / "a.onnx", "NTHWC", kind)
    paths = features.list_videos(folder)
    found = features.extract(features.open_network(tmp_path / "a.onnx", View()), paths)
    x = np.stack([frames_of(path) for path in paths]).reshape(len(paths), -1)
    x = x.astype(float) if kind == TensorProto.UINT8 else x / 127.5 - 1
    np.testing.assert_allclose(found, x @ weight, rtol=tolerance, atol=tolerance * np.abs(x).max())


def test_clips_are_the_first_frames_at_a_rate_and_a_size(tmp_path):
    """From a wide video the middle is taken; a network of free sizes takes those asked for."""
    red, blue = np.zeros((2, 8, 32, 64, 3), np.uint8)
    red[..., 16:48, 0], blue[..., 2] = 255, 255
    media.write_video(tmp_path / "a.mp4", np.concatenate([red, blue]), fps=16)
    write_network(tmp_path / "a.onnx", T="frames", H="rows", W="columns")
    network = features.open_network(tmp_path / "a.onnx", View(frames=8, fps=8, size=(16, 16)))
    assert (network.frames, network.fps, network.size) == (8, 8, (16, 16))
    seen = []
    features.extract(network._replace(apply=lambda x: seen.append(x) or np.zeros((len(x), OUT))), [tmp_path / "a.mp4"])
    (clip_NTHWC,) = seen
    assert clip_NTHWC.shape == (1, 8, 16, 16, 3)
    assert clip_NTHWC[0, :4, 2:-2, 2:-2, 0].min() > 240
    assert clip_NTHWC[0, 4:, ..., 0].max() < 15


def test_clip_reads_pictures_and_frames(tmp_path, tiny):  # noqa: F811
    """A video's features are the mean of its frames' features, and do not change with the frames' order."""
    write_clip(tmp_path)
    video = np.random.default_rng(0).integers(0, 256, (4, 1, 1, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    network = features.open_network(tmp_path / "clip", View())
    assert (network.frames, network.size) == (1, (224, 224))
    single = features.extract(network, features.list_videos(tmp_path))
    assert single.shape == (4, 16)
    clips = np.stack(
        [np.asarray(Image.fromarray(frame).resize((224, 224), Image.Resampling.LANCZOS)) for frame in video]
    )
    np.testing.assert_allclose(network.apply(clips[None]), single.mean(0)[None], rtol=1e-4, atol=1e-5)
    assert np.abs(single[0] - single[1]).max() > 1e-2


@pytest.mark.parametrize(
    ("axes", "lengths", "view", "message"),
    [
        ("NCTHW", {}, View(frames=4), "--frames asks for 4 frames, .* takes 5: leave it out"),
        ("NCTHW", {}, View(size=(16, 16)), "--size asks for 16 columns, .* takes 32: leave it out"),
        ("NCTHW", {"T": 3}, View(), "which may be NCTHW or NTCHW: say so with --axes"),
        ("NCTHW", {"C": "c"}, View(), "which may be NCTHW or NTCHW or NTHWC: say so with --axes"),
        ("NCTHW", {}, View(axes="NTHWC"), "--axes NTHWC does not fit .* C must be 3"),
        ("NCTHW", {}, View(axes="NCHW"), "--axes NCHW does not fit"),
        ("NCT", {}, View(), "which may be none of NCTHW, NTCHW, NTHWC, NCHW, NHWC"),
        ("NCTHW", {}, View(output="logits"), "--output logits is none of .*, which has features"),
        ("NCTHW", {"dtype": TensorProto.INT64}, View(), r"takes tensor\(int64\): export it with an input of"),
        ("NCTHW", {"dtype": TensorProto.UINT8}, View(mean=(0.5,)), "leave --mean and --std out"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(axes, lengths, view, message, tmp_path):
    write_network(tmp_path / "a.onnx", axes, **lengths)
    with pytest.raises(UserError, match=message):
        features.open_network(tmp_path / "a.onnx", view)


def test_what_is_no_network_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(b"no network")
    with pytest.raises(UserError, match="cannot be opened by onnxruntime"):
        features.open_network(tmp_path / "a.onnx", View())
    with pytest.raises(UserError, match="is not a file: give the path of an ONNX file or of CLIP's checkpoint"):
        features.open_network(tmp_path / "b.onnx", View())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs the package onnxruntime: pip install onnxruntime"):
        features.open_network(tmp_path / "a.onnx", View())


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"feature": np.zeros((3, 2), np.float32)}, {}, r"holds feature \(3, 2\): it must hold `features`"),
        ({"features": np.zeros(3, np.float32)}, {}, r"holds features \(3,\): it must hold `features`, one row a video"),
        ({"features": np.full((2, 2), np.nan, np.float32)}, {}, "features that are not finite"),
        ({"features": np.zeros((2, 2), np.float32)}, {"facts": "{"}, "not JSON: leave them out"),
        ({"features": np.zeros((2, 2), np.float32)}, {"facts": "[1]"}, "`facts` that are no JSON object: leave them"),
        *(
            (
                {"features": np.zeros((2, 2), np.float32)},
                {"paths": paths},
                "`paths` that are not one text for each of 2",
            )
            for paths in ('["a", "b", "c"]', '["a"]', '["a", 1]', '"ab"', "null")
        ),
    ],
)
def test_a_file_without_features_is_refused(tensors, metadata, message, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        features.read_features(tmp_path / "a.safetensors")


def write_set(folder, *, spread=1.0, prompts=("a cat", "a dog"), count=3, latents=True, **metadata):
    """Samples whose latents lie, for the second prompt, twice as far apart."""
    random, common = np.random.default_rng(1), {"frames": FRAMES, "fps": 8, "size": f"{WIDTH}x{HEIGHT}", "steps": 4}
    for number, prompt in enumerate(prompts):
        for index in range(count):
            path = folder / "videos" / f"{prompt}-{index}.mp4"
            said = {"prompt": prompt, "seed": 10 * number + index, **common, **metadata}
            said |= {"sampling_seconds": 2.0 + 100 * (index == 0), "decoding_seconds": 0.5, "device": "1 x cpu"}
            video = random.integers(0, 200, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)
            media.write_video(path, video, fps=8, metadata=said)
            if latents:
                latent = spread * (number + 1) * random.standard_normal((2, 3, 4, 16)).astype(np.float32)
                export_safetensors(sample_sets.latent_path(folder, path.relative_to(folder)), {"latent": latent}, {})
    return folder


def test_a_set_is_scored_from_the_command_line(folder, tmp_path, capsys):
    """Fréchet distance: SciPy's matrix root. Diversity: SciPy's distances. Seconds: medians."""
    write_network(tmp_path / "a.onnx")
    of = write_set(tmp_path / "set", count=5)
    evaluate.main(["score", str(of), f"--network={tmp_path / 'a.onnx'}", f"--real={folder}"])
    scored = json.loads((of / "scores.json").read_text())
    fake = load_file(of / "features.safetensors")["features"].astype(float)
    real = features.extract(features.open_network(tmp_path / "a.onnx", View()), features.list_videos(folder))
    a, b = (np.cov(x, rowvar=False) for x in (fake, real))
    shift = np.square(fake.mean(0) - real.mean(0)).sum()
    expected = shift + np.trace(a + b - 2 * np.real(scipy.linalg.sqrtm(a @ b)))
    np.testing.assert_allclose(scored["scores"]["frechet"], expected, rtol=1e-5)
    for prompt in ("a cat", "a dog"):
        latents = [load_file(path)["latent"].ravel() for path in sorted((of / "latents" / "videos").glob(f"{prompt}*"))]
        distance = scipy.spatial.distance.pdist(np.stack(latents).astype(float)).mean() / len(latents[0]) ** 0.5
        np.testing.assert_allclose(scored["prompts"][prompt]["latent_diversity"], distance, rtol=1e-6)
        rows = [
            row for row, path in enumerate(features.read_features(of / "features.safetensors").paths) if prompt in path
        ]
        distance = scipy.spatial.distance.pdist(fake[rows]).mean()
        np.testing.assert_allclose(scored["prompts"][prompt]["feature_diversity"], distance, rtol=1e-6)
    means = [
        np.mean([each[name] for each in scored["prompts"].values()])
        for name in ("latent_diversity", "feature_diversity")
    ]
    np.testing.assert_allclose([scored["scores"][name] for name in ("latent_diversity", "feature_diversity")], means)
    expected = {
        "n": 10,
        "n_real": 9,
        "sampling_seconds": 2.0,
        "decoding_seconds": 0.5,
        "frames_per_second": FRAMES / 2.5,
    }
    assert {name: scored["scores"][name] for name in expected} == expected
    assert {"precision", "recall", "coverage"} <= scored["scores"].keys()
    assert f"{'frames_per_second':20} 2" in capsys.readouterr().out


def test_features_may_be_computed_before(folder, tmp_path):
    """On the same features the score is the same; without a word of the network they are taken as they are."""
    write_network(tmp_path / "a.onnx")
    of, network = write_set(tmp_path / "set", count=5), f"--network={tmp_path / 'a.onnx'}"
    evaluate.main(["features", str(folder), network, f"--out={tmp_path / 'real.safetensors'}"])
    evaluate.main(["score", str(of), network, f"--real={folder}", f"--out={tmp_path / 'one'}"])
    given = [f"--features={tmp_path / 'one' / 'features.safetensors'}", f"--real={tmp_path / 'real.safetensors'}"]
    evaluate.main(["score", str(of), *given, f"--out={tmp_path / 'two'}"])
    one, two = (set_scores.read_scores(tmp_path / name / "scores.json") for name in ("one", "two"))
    assert one == two
    foreign = {"features": load_file(tmp_path / "real.safetensors")["features"]}
    save_file(foreign, tmp_path / "foreign.safetensors")
    given = [f"--features={tmp_path / 'foreign.safetensors'}", f"--real={tmp_path / 'real.safetensors'}"]
    evaluate.main(["score", str(of), *given, f"--out={tmp_path / 'three'}"])
    assert set_scores.read_scores(tmp_path / "three" / "scores.json").scores["frechet"] == pytest.approx(0, abs=1e-6)


def test_latents_may_be_encoded(tmp_path, tiny):  # noqa: F811
    """Where they are not beside the samples: by the autoencoder, as training sets are."""
    of = write_set(tmp_path / "set", prompts=("a cat",), latents=False)
    vae = write_parts(tmp_path)[0]
    evaluate.main(["score", str(of), "--model=wan2.1-t2v", vae, "--dtype=float32"])
    scored = set_scores.read_scores(of / "scores.json")
    assert 0 < scored.scores["latent_diversity"] < 10
    assert scored.conditions["latents"] == "encoded"


def made(folder, **options):
    return sample_sets.list_samples(write_set(folder, **options))


def test_what_is_left_out_is_said(tmp_path):
    samples = made(tmp_path / "set", count=2)
    (sample_sets.latent_path(tmp_path / "set", samples.samples[0].path.relative_to(samples.folder))).unlink()
    write_videos(tmp_path / "set", count=1)
    samples = sample_sets.list_samples(tmp_path / "set")
    found = features.Features(np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32), [], {})
    scored = set_scores.score_set(samples, found, found)
    assert [note[:29] for note in scored.notes] == [
        "1 files tell no prompt and se",
        "features are of 6 videos, the",
        "the Fréchet distance is of 6 ",
        "latent diversity leaves out 1",
    ]
    assert (scored.scores["n"], list(scored.prompts)) == (5, ["a dog"])
    assert "feature_diversity" not in scored.scores  # nothing tells which features are of which sample


@pytest.mark.parametrize(
    "said", [{"frames": None}, {"device": None}, {"sampling_seconds": "long"}, {"decoding_seconds": 0}]
)
def test_seconds_of_other_programs_are_left_out(said, tmp_path):
    samples = made(tmp_path / "set", prompts=("a cat",))
    metadata = [
        {name: value for name, value in (sample.metadata | said).items() if value is not None}
        for sample in samples.samples
    ]
    others = [sample._replace(metadata=each) for sample, each in zip(samples.samples, metadata, strict=True)]
    scored = set_scores.score_set(samples._replace(samples=others))
    assert "frames_per_second" in set_scores.score_set(samples).scores
    assert not scored.scores.keys() & {"frames_per_second", "sampling_seconds", "decoding_seconds"}


def test_seconds_of_several_devices_are_not_summed_up(tmp_path):
    made(tmp_path / "set", prompts=("a cat",))
    samples = made(tmp_path / "set", prompts=("a dog",), frames=9)
    scored = set_scores.score_set(samples)
    assert "frames_per_second" not in scored.scores
    assert "seconds are left out" in scored.notes[-1]


def test_a_folder_of_two_runs_is_refused(tmp_path):
    write_set(tmp_path / "a" / "one")
    write_set(tmp_path / "a" / "two")
    assert len(sample_sets.list_samples(tmp_path / "a").samples) == 6  # the same samples twice
    write_set(tmp_path / "a" / "three", steps=2)
    with pytest.raises(UserError, match="sampled with different steps: give a folder for each run"):
        sample_sets.list_samples(tmp_path / "a")


def test_features_of_different_networks_are_not_compared(tmp_path):
    samples, one = made(tmp_path / "set"), np.eye(6, dtype=np.float32)
    with pytest.raises(UserError, match="have 6 numbers, the real ones 5"):
        set_scores.score_set(samples, features.Features(one, [], {}), features.Features(one[:, :5], [], {}))
    a, b = (features.Features(one, [], {"network": name}) for name in "ab")
    with pytest.raises(UserError, match="compute both by one network"):
        set_scores.score_set(samples, a, b)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "."], ". has no .mp4 or .png file"),
        (["score", ".", "--real=a"], "--real a is compared by features: give --network PATH, or --features FILE"),
        (["score", ".", "--real=a", "--features=b"], "--real a must be a .safetensors file of features"),
        (["score", ".", "--network=a", "--features=b"], "--features b takes the place of --network: leave one out"),
        (["score", ".", "--vae=a"], "--vae and --model belong together"),
        (["score", ".", "--mean=0.5"], "--mean belongs to --network: give it"),
        (
            ["score", ".", "--network=a", "--std=0"],
            "--std 0 must be one number or three, for red, green and blue, above 0",
        ),
        (["score", ".", "--network=a", "--mean=1,2"], "--mean 1,2 must be one number or three"),
        (["score", ".", "--network=a", "--size=big"], "--size big must be WIDTHxHEIGHT"),
        (["score", ".", "--network=a", "--frames=0"], "--frames 0 must be at least 1"),
        (["score", ".", "--network=a", "--fps=2147483648"], "--fps 2147483648 must lie between 1 and 1000"),
        (["score", ".", "--network=a", "--axes=NHW"], "--axes NHW must be one of NCTHW"),
        (["features", ".", "--out=a"], "features needs --network"),
        (["features", ".", "--out=a", "--network=b.onnx"], ". has no video"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(words)
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_mistyped_out_costs_no_checkpoint(name, folder, tmp_path, capsys):
    save_file({"kernel": np.zeros((2, 2), np.float32)}, tmp_path / "weights.safetensors")
    (tmp_path / "weights.pth").write_bytes(b"PK")
    write_network(tmp_path / "a.onnx")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(SystemExit):
        evaluate.main(["features", str(folder), f"--network={tmp_path / 'a.onnx'}", f"--out={tmp_path / name}"])
    assert f"--out {tmp_path / name} is there and holds no features: remove it, or" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == before


def test_features_may_be_written_again(folder, tmp_path):
    write_network(tmp_path / "a.onnx")
    save_file({"features": np.zeros((1, 2), np.float32)}, tmp_path / "a.safetensors")
    evaluate.main(["features", str(folder), f"--network={tmp_path / 'a.onnx'}", f"--out={tmp_path / 'a.safetensors'}"])
    assert features.read_features(tmp_path / "a.safetensors").feature_NF.shape == (9, OUT)
