"""launch.evaluate sample: names and folders that benchmarks read, sets that go on where they ended."""

import json
import os

import numpy as np
import pytest
from test_sampling_models import WAN, decoded, frames_of, parts, tiny, write_wan  # noqa: F401  (fixtures)

from launch import evaluate, sample
from rcm_jax import inference, inputs, layouts, media, sample_sets, set_scores
from rcm_jax.config import UserError
from rcm_jax.convert.loading import Transformer
from rcm_jax.data.tokenizer import Tokens

PROMPTS = ["a cat", "a red cat"]
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a red cat"},
]


def write_prompts(path, layout):
    """A prompt file as the benchmark's own are written."""
    if layout == "geneval":
        path.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    elif path.suffix == ".json":
        rows = [
            {"prompt_en": "a cat", "dimension": ["Diversity"]},
            {"prompt_en": "a red cat", "dimension": ["Material"]},
        ]
        path.write_text(json.dumps([*rows, rows[1]]))
    else:
        path.write_text("a cat\n\n a red cat \na cat\n")
    return path


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("layout", "file", "expected"),
    [
        ("vbench", "all_dimension.txt", {f"videos/{p}-{i}.mp4" for p in PROMPTS for i in range(5)}),
        ("vbench", "VBench_full_info.json", {f"videos/{p}-{i}.mp4" for p in PROMPTS for i in range(5)}),
        ("vbench2", "Material.txt", {f"videos/Material/{p}-{i}.mp4" for p in PROMPTS for i in range(3)}),
        (
            "vbench2",
            "VBench2_full_info.json",
            {f"videos/Diversity/a cat-{i}.mp4" for i in range(20)}
            | {f"videos/Material/a red cat-{i}.mp4" for i in range(3)},
        ),
        (
            "geneval",
            "evaluation_metadata.jsonl",
            {f"images/{n:05d}/samples/{i:05d}.png" for n in range(2) for i in range(4)},
        ),
    ],
)  # fmt: skip
def test_samples_lie_where_the_benchmark_looks(layout, file, expected, tmp_path):
    plan = layouts.plan(layout, write_prompts(tmp_path / file, layout))
    assert len(plan.shots) == len(expected)
    assert {str(shot.path) for shot in plan.shots} == expected
    read = {str(path): json.loads(text) for path, text in plan.files.items()}
    assert read == ({f"images/{n:05d}/metadata.jsonl": GENEVAL[n] for n in range(2)} if layout == "geneval" else {})


def test_names_have_180_characters_in_vbench2_and_all_in_vbench(tmp_path):
    prompt = "long " * 40 + "end"
    (tmp_path / "Material.txt").write_text(prompt)
    for layout, name in (("vbench", f"{prompt}-0.mp4"), ("vbench2", f"{prompt[:180]}-0.mp4")):
        shot = layouts.plan(layout, tmp_path / "Material.txt").shots[0]
        assert (shot.path.name, shot.prompt) == (name, prompt)


def test_a_seed_depends_on_its_own_prompt_alone(tmp_path):
    """Others may come before it; numbers and prompts have different ones."""

    def seeds(text, **options):
        (tmp_path / "a.txt").write_text(text)
        return {(s.prompt, s.index): s.seed for s in layouts.plan("vbench", tmp_path / "a.txt", **options).shots}

    both, alone = seeds("a\nb"), seeds("b")
    assert len(set(both.values())) == 10
    assert {key: both[key] for key in alone} == alone
    assert not set(both.values()) & set(seeds("a\nb", seed=1).values())


def test_captions_take_the_place_of_prompts_and_change_no_name(tmp_path):
    """Nor a seed. Of a prompt that is there twice the first caption counts."""
    prompts = write_prompts(tmp_path / "a.txt", "vbench")  # a cat, a red cat, a cat
    (tmp_path / "b.txt").write_text("a furry cat\n\na red furry cat\nanother cat\n")
    plain = layouts.plan("vbench", prompts, count=1).shots
    longer = layouts.plan("vbench", prompts, captions=tmp_path / "b.txt", count=1).shots
    assert [shot.caption for shot in plain] == PROMPTS
    assert [shot.caption for shot in longer] == ["a furry cat", "a red furry cat"]
    assert [shot[:4] for shot in longer] == [shot[:4] for shot in plain]
    (tmp_path / "b.txt").write_text("a furry cat\na red furry cat\n")
    with pytest.raises(UserError, match=r"b\.txt has 2 lines, .*a\.txt has 3 prompts: give a line for each"):
        layouts.plan("vbench", prompts, captions=tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("layout", "file", "text", "message"),
    [
        ("vbench", "a.txt", "", "has no prompt"),
        ("vbench", "a.txt", "a/b", "'a/b' makes a file name, which must not start with a dot, and must have no slash"),
        ("vbench", "a.txt", ".a", "must not start with a dot"),
        ("vbench", "a.txt", "a\x07b", "no control character"),
        ("vbench", "a.txt", "a" * 219, "makes a file name of 221 bytes, 220 are possible"),
        ("vbench", "a.txt", "ä" * 110, "makes a file name of 222 bytes"),
        ("vbench2", "a.txt", "a" * 180 + "b\n" + "a" * 180 + "c", "share the name"),
        ("vbench", "a.json", "[", "is not JSON"),
        ("vbench", "a.json", '[{"prompt": "a"}]', "has an entry without 'prompt_en'"),
        ("vbench2", "a.json", '[{"prompt_en": "a"}]', "'a' must have a list of names as its dimension"),
        ("vbench2", "a.json", '[{"prompt_en": "a", "dimension": ["../a"]}]', "'../a', which makes no folder"),
        ("geneval", "a.jsonl", "{}\n{", "has an entry without 'prompt'"),
        ("geneval", "a.jsonl", '{"prompt": "a"}\n{', "line 2 is not JSON"),
        ("geneval", "a.jsonl", '{"tag": "a"}', "has an entry without 'prompt'"),
        ("geneval", "a.jsonl", '{"prompt": "a \\ud800"}', "has an entry whose 'prompt' is not text in UTF-8"),
        ("vbench", "a.json", '[{"prompt_en": "a \\ud800"}]', "has an entry whose 'prompt_en' is not text in UTF-8"),
        ("vbench2", "a.json", '[{"prompt_en": "a", "dimension": ["\\udfff"]}]', "dimension that is not text in UTF-8"),
    ],
)  # fmt: skip
def test_a_prompt_file_that_makes_no_names_is_refused(layout, file, text, message, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        layouts.plan(layout, tmp_path / file)


def test_vbench_videos_are_those_of_launch_sample(tmp_path, parts, decoded):  # noqa: F811
    """Whatever else is sampled and in whatever turns; nothing but videos lies among them."""
    words = ["--model=wan2.1-t2v", f"--dit={write_wan(tmp_path / 'dit', WAN)}", *parts, "--size=32x16", "--frames=5"]
    words += ["--dtype=float32", "--steps=1", "--fps=8"]
    out, prompts = tmp_path / "out", write_prompts(tmp_path / "a.txt", "vbench")
    (tmp_path / "b.txt").write_text("a cat\na red red cat\na cat")
    task = ["--layout=vbench", f"--prompt-file={prompts}", f"--captions={tmp_path / 'b.txt'}", f"--out={out}"]
    task += ["--count=2", "--chunk=3"]
    evaluate.main(["sample", *task, *words])
    videos = [f"videos/{prompt}-{index}.mp4" for prompt in PROMPTS for index in range(2)]
    assert names(out) == sorted(["sampling.json", *videos, *(f"latents/{video}.safetensors" for video in videos)])
    assert sorted(os.listdir(out / "videos")) == sorted(name.removeprefix("videos/") for name in videos)
    metadata = media.read_metadata(out / "videos" / "a red cat-1.mp4")
    expected = {
        "prompt": "a red cat",
        "caption": "a red red cat",
        "index": 1,
        "steps": 1,
        "sampler": "unipc",
        "device": "1 x cpu",
        "fps": 8,
    }
    assert {name: metadata[name] for name in expected} == expected
    assert min(metadata["sampling_seconds"], metadata["decoding_seconds"]) > 0
    sample.main([*words, "--prompt=a red red cat", f"--seeds={metadata['seed']}", f"--out={tmp_path / 'one'}"])
    *_, same, alone = decoded
    np.testing.assert_array_equal(alone, same)
    evaluate.main(["score", str(out)])
    scores = set_scores.read_scores(out / "scores.json").scores
    assert min(scores["latent_diversity"], scores["frames_per_second"]) > 0
    ours, theirs = (sample_sets.list_samples(folder).samples for folder in (out, tmp_path / "one"))
    assert ours[-1].settings == theirs[0].settings | {"layout": "vbench", "first_seed": 0}


class Killed(Exception):
    """Ends a command wherever it is."""


@pytest.fixture
def sampled(monkeypatch):
    """Networks that take no time; the seeds that were sampled."""
    seeds = []

    def each_latent(transformer, texts, rows, shape_THWC, *rest):
        for _, seed in rows:
            seeds.append(seed)
            yield np.full(shape_THWC, seed % 256, np.float32)

    def decode(autoencoder, latents, *, tiled):
        for latent_THWC in latents:
            yield np.full((5, 16, 32, 3), latent_THWC.mean() % 256, np.uint8)

    monkeypatch.setattr(inference, "encode_texts", lambda *_: None)
    monkeypatch.setattr(inference, "each_latent", each_latent)
    monkeypatch.setattr(inference, "decode", decode)
    return seeds


def write(out, layout="vbench", *, seed=0, steps=2, count=2, chunk=3, **options):
    """Makes a set with networks that are stand-ins; the files' names."""
    prompts = write_prompts(out.parent / ("a.jsonl" if layout == "geneval" else "a.txt"), layout)
    tokens = Tokens(np.zeros((2, 4), np.int32), np.ones((2, 4), bool))
    parts = inference.Parts(Transformer("tiny", WAN, None, (), None), None, tokens=tokens)  # noqa: F811
    settings = inference.Settings("euler", steps, (1.0,))
    facts = {"model": "tiny", "steps": steps, "guidance": (1.0,)}
    sampling = sample_sets.Sampling(parts, PROMPTS, settings, (2, 2, 4, 16), 8, False, facts)
    plan = layouts.plan(layout, prompts, count=count, seed=seed)
    sample_sets.write_set(out, plan, sampling, chunk=chunk, **options)
    return names(out)


def test_geneval_pictures_lie_beside_their_line(tmp_path, sampled):
    out = tmp_path / "out"
    found = write(out, "geneval", count=1)
    pictures = [f"images/{number:05d}/samples/00000.png" for number in range(2)]
    metadata = [f"images/{number:05d}/metadata.jsonl" for number in range(2)]
    latents = [f"latents/{picture}.safetensors" for picture in pictures]
    assert found == sorted([*pictures, *metadata, *latents, "sampling.json"])
    assert [json.loads((out / path).read_text()) for path in metadata] == GENEVAL
    assert media.read_image(out / pictures[0]).shape == (16, 32, 3)


@pytest.mark.parametrize("fatal", ["write_video", "export_safetensors"])
@pytest.mark.parametrize("after", range(4))
def test_an_interrupted_command_goes_on(fatal, after, tmp_path, sampled, monkeypatch):
    """Whenever it ended: it makes what it would have made, and samples no finished latent again."""
    whole, out = write(tmp_path / "whole"), tmp_path / "out"
    sampled.clear()
    module = media if fatal == "write_video" else sample_sets
    done, original = [], getattr(module, fatal)

    def killed_after(*rest, **options):
        if len(done) == after:
            raise Killed
        done.append(original(*rest, **options))

    with monkeypatch.context() as patch:
        patch.setattr(module, fatal, killed_after)
        with pytest.raises(Killed):
            write(out)
    before = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    lost = 1 if fatal == "export_safetensors" else 0  # a latent that was there and not written
    assert write(out) == whole
    assert len(sampled) == 4 + lost
    for name in whole:
        if name.endswith(".mp4"):
            np.testing.assert_array_equal(frames_of(out / name), frames_of(tmp_path / "whole" / name))
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_processes_share_the_work(tmp_path, sampled):
    """Each takes its part; together they make all. Latents may be dropped."""
    parts = [write(tmp_path / "out", share=(number, 3), keep_latents=False) for number in (1, 0, 2)]  # noqa: F811
    assert [len(part) for part in parts] == [2, 4, 5]  # four samples, and the set's record
    assert len(set(sampled)) == len(sampled) == 4
    assert write(tmp_path / "out", keep_latents=False) == parts[-1]
    assert len(sampled) == 4


def test_processes_of_several_hosts_share_the_work(tmp_path, sampled, monkeypatch):
    """Their numbers are the same, and one makes its part while the other is about to put a sample in its place."""
    publish, out, whole = media.publish, tmp_path / "out", write(tmp_path / "whole")

    def overtaken(staged, path):
        if path.suffix == ".mp4":
            monkeypatch.setattr(media, "publish", publish)
            write(out, share=(1, 2))
        publish(staged, path)

    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(media, "publish", overtaken)
    assert write(out, share=(0, 2)) == whole
    for name in whole:
        if name.endswith(".mp4"):
            np.testing.assert_array_equal(frames_of(out / name), frames_of(tmp_path / "whole" / name))


def test_a_sample_that_another_process_wrote_first_stays(tmp_path, sampled, monkeypatch):
    """Though it came at the last moment, and leaves nothing else behind."""
    link, theirs = media.os.link, tmp_path / "out" / "videos" / "a cat-0.mp4"

    def overtaken(source, target):
        if target == theirs:
            theirs.write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(media.os, "link", overtaken)
    with pytest.raises(UserError, match=r"a cat-0\.mp4 is there already: another process works in this folder"):
        write(tmp_path / "out")
    assert theirs.read_bytes() == b"theirs"
    assert not list((tmp_path / "out").glob(".*"))


def test_dropped_latents_include_those_that_a_killed_command_left(tmp_path, sampled, monkeypatch):
    """It ended when its samples were in their places and the latents not yet removed."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sample_sets, "_drop_latents", lambda *_: None)
        write(out, keep_latents=False)
    assert sum(name.startswith("latents") for name in names(out)) == 4
    write(out, share=(0, 2), keep_latents=False)
    assert sum(name.startswith("latents") for name in names(out)) == 2  # another process's
    write(out, keep_latents=False)
    assert not any(name.startswith("latents") for name in names(out))
    assert len(sampled) == 4


def test_a_set_has_one_way_of_sampling(tmp_path, sampled):
    before = write(tmp_path / "out")
    with pytest.raises(UserError, match=r"was sampled with other steps \(steps was 2, now 3\): give another --out"):
        write(tmp_path / "out", steps=3)
    with pytest.raises(UserError, match="is of prompt, caption and seed"):
        write(tmp_path / "out", seed=1)
    assert names(tmp_path / "out") == before


def test_a_set_has_the_networks_that_it_began_with(tmp_path, parts, sampled, capsys):  # noqa: F811
    """Not others under the same names, nor in another precision; the set itself may lie among their files."""
    dit = write_wan(tmp_path / "dit", WAN)
    words = ["sample", "--layout=vbench", f"--prompt-file={write_prompts(tmp_path / 'a.txt', 'vbench')}", "--count=1"]
    words += [f"--out={dit / 'out'}", "--model=wan2.1-t2v", f"--dit={dit}", *parts, "--size=32x16", "--frames=5"]

    def refused(*more):
        with pytest.raises(SystemExit):
            evaluate.main([*words, *more])
        return capsys.readouterr().err.splitlines()[-1]

    evaluate.main(words)
    assert "was sampled with other dtype (dtype was 'bfloat16', now 'float32')" in refused("--dtype=float32")
    assert "was sampled with other tile (tile was False, now True): give another --out" in refused("--tile")
    for file in (dit / "model.safetensors", tmp_path / "vae" / "model.safetensors", tmp_path / "tokenizer.json"):
        before = file.read_bytes()
        file.write_bytes(before + b" " if file.suffix == ".json" else before[:-1] + bytes([before[-1] ^ 1]))
        assert f"was sampled with other file {file} (file {file} was" in (error := refused())
        assert error.endswith("give another --out, or the files it began with")
        file.write_bytes(before)  # with another time
    evaluate.main(words)
    assert len(sampled) == 2


@pytest.mark.parametrize(
    ("files", "counted"),
    [
        (["a.pth"], ["a.pth"]),
        (["a-1.safetensors", "a-2.safetensors", "config.json", "notes.txt", "out/latents/b.safetensors"], slice(3)),
        (["low_noise_model/a.safetensors", "high_noise_model/a.safetensors", "vae.pth"], slice(2)),
        (["model/.metadata", "model/__0_0.distcp", "metrics.jsonl"], ["model/__0_0.distcp"]),
        (["checkpoints/9/state/a", "checkpoints/10/state/b/c", "report.html"], ["checkpoints/10/state/b/c"]),
    ],
)
def test_what_counts_in_a_checkpoints_folder_is_its_networks(files, counted, tmp_path):
    for file in files:
        media.write_file(tmp_path / file, b"12")
    path = tmp_path / "a.pth" if files == ["a.pth"] else tmp_path
    wanted = files[counted] if isinstance(counted, slice) else counted
    found = inputs.describe_checkpoints([path, None])
    assert set(found) == {f"file {tmp_path / file}" for file in wanted}
    assert all(text.startswith("2 bytes, ") for text in found.values())


def test_a_latent_of_another_prompt_is_refused(tmp_path, sampled):
    write(tmp_path / "out")
    video = tmp_path / "out" / "videos" / "a cat-0.mp4"
    video.unlink()
    latents = tmp_path / "out" / "latents" / "videos"
    (latents / "a red cat-0.mp4.safetensors").rename(latents / "a cat-0.mp4.safetensors")
    with pytest.raises(UserError, match=r"is of another prompt, caption or seed than 'a cat', \d+: remove it"):
        write(tmp_path / "out")
    assert not video.exists()


def test_a_file_of_another_prompt_is_not_taken_for_finished(tmp_path):
    shot = layouts.Shot("a cat", 0, 7, layouts.Path("videos/a-0.mp4"), "a furry cat")
    video = np.zeros((2, 16, 16, 3), np.uint8)
    assert not sample_sets.is_finished(tmp_path, shot)
    same = {"prompt": "a cat", "caption": "a furry cat", "seed": 7}
    for metadata, is_same in ((same, True), (same | {"caption": "a cat"}, False), ({}, False)):
        media.write_video(tmp_path / shot.path, video, fps=8, metadata=metadata)
        if is_same:
            assert sample_sets.is_finished(tmp_path, shot)
        else:
            with pytest.raises(UserError, match=r"wanted are \('a cat', 'a furry cat', 7\): give another --out"):
                sample_sets.is_finished(tmp_path, shot)


T2V = ["--model=wan2.1-t2v", "--dit=a", "--vae=b", "--text-encoder=c", "--tokenizer=d", "--prompt-file=a.txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--layout=vbench"], "sample needs --model: give it"),
        (["--layout=vbench", *T2V[:-1]], "sample needs --prompt-file: give it"),
        (["--layout=vbench", *T2V], "--prompt-file a.txt cannot be read (No such file or directory)"),
        (["--layout=vbench", *T2V[1:], "--model=wan2.1-i2v"], "starts from an image"),
        (["--layout=vbench", *T2V, "--frames=1"], "--layout vbench cannot take 1 frames"),
        (["--layout=geneval", *T2V, "--frames=81"], "--layout geneval cannot take 81 frames: give --frames 1"),
        (["--layout=vbench", *T2V, "--count=0"], "--count 0 must be at least 1"),
        (["--layout=vbench", *T2V, "--chunk=0"], "--chunk 0 must be at least 1"),
        (["--layout=vbench", *T2V, "--seed=-1"], "--seed -1 must lie between 0 and"),
        (["--layout=vbench", *T2V, "--share=2/2"], "--share 2/2 must be K/N"),
        (["--layout=fid", *T2V], "argument --layout: invalid choice"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["sample", f"--out={tmp_path / 'out'}", *given])
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "out").exists()
