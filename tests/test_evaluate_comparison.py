"""launch.evaluate compare: a page of pairs that hides nothing, links to what is there and keeps videos in step."""

import json
import math
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from test_report import HOSTILE, Page

from launch import evaluate
from rcm_jax import comparison, media, sample_sets, set_scores
from rcm_jax.config import UserError

ODD = "100% of cats? #1 & 'more'"


def write_set(folder, samples, *, suffix=".mp4", steps=4, scores=None, conditions=None):
    """A set of (prompt, seed), and scores if there are some."""
    for number, (prompt, seed) in enumerate(samples):
        said = {"prompt": prompt, "seed": seed, "size": "32x16", "model": "tiny", "steps": steps}
        path = folder / "videos" / f"{prompt.replace('/', '')}-{number}{suffix}"
        if suffix == ".png":
            media.write_image(path, np.full((16, 32, 3), 9, np.uint8), metadata=said)
        else:
            media.write_video(path, np.full((3, 16, 32, 3), 9, np.uint8), fps=8, metadata=said)
    if scores is not None:
        prompts = {prompt: {"latent_diversity": 0.5 * len(scores)} for prompt, _ in samples}
        scored = set_scores.Scored({"n": len(samples), **scores}, prompts, conditions or {}, ["a note"])
        set_scores.write_scores(folder / "scores.json", scored)
    return folder


def compare(tmp_path, *words, out="compare.html"):
    evaluate.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / out}", *words])
    return Page((tmp_path / out).read_text(encoding="utf-8"))


def shown(page, tag="video"):
    return [attributes for name, attributes in page.tags if name == tag]


def text(page):
    return " ".join(page.text)


def test_videos_of_a_prompt_and_seed_stand_side_by_side(tmp_path, capsys):
    """In the order of the first set, whatever their files are called; every link leads to its file."""
    write_set(tmp_path / "a", [(ODD, 1), ("a dog", 2)])
    write_set(tmp_path / "b", [("a dog", 2), (ODD, 1)])
    page = compare(tmp_path, "--names=teacher,student", out="pages/compare.html")
    assert "2 pairs, 0 samples without a counterpart" in capsys.readouterr().out
    labels = [video["aria-label"] for video in shown(page)]
    assert labels == [f"{name}: {prompt}" for prompt in (ODD, "a dog") for name in ("teacher", "student")]
    for video, (folder, prompt, seed) in zip(
        shown(page), [(f, p, s) for p, s in ((ODD, 1), ("a dog", 2)) for f in "ab"], strict=True
    ):
        path = tmp_path / "pages" / unquote(urlsplit(video["src"]).path)
        assert path.resolve().is_relative_to(tmp_path / folder)
        metadata = media.read_metadata(path)
        assert (metadata["prompt"], metadata["seed"]) == (prompt, seed)
        assert (video["width"], video["height"]) == ("32", "16")
    assert len(page.links) == 8  # each video, and a link to its file
    assert not any(link.startswith(("/", "http", "file:")) for link in page.links)


def test_one_control_moves_all_videos(tmp_path):
    for name in "ab":
        write_set(tmp_path / name, [("a cat", 1)])
    page = compare(tmp_path)
    assert [page.count(tag) for tag in ("button", "input", "script")] == [1, 1, 1]
    for video in shown(page):
        assert {"muted", "playsinline", "controls"} <= video.keys()  # controls of its own for want of the script
        assert not {"autoplay", "loop"} & video.keys()


def test_pictures_need_no_controls(tmp_path):
    for name in "ab":
        write_set(tmp_path / name, [("a cat", 1)], suffix=".png")
    page = compare(tmp_path)
    assert [page.count(tag) for tag in ("img", "video", "button")] == [2, 0, 0]


def test_what_only_one_set_has_is_listed(tmp_path):
    """Another seed is another sample; files that do not tell theirs are listed too."""
    write_set(tmp_path / "a", [("a cat", 1), ("a cat", 2), ("a fox", 1)])
    write_set(tmp_path / "b", [("a cat", 1), ("a dog", 1)])
    media.write_video(tmp_path / "b" / "other.mp4", np.zeros((3, 16, 32, 3), np.uint8), fps=8)
    page = compare(tmp_path)
    assert len(shown(page)) == 2
    for words in (
        f"Only in {tmp_path / 'a'}: 2", "a cat, seed 2", "a fox, seed 1",
        f"Only in {tmp_path / 'b'}: 2", "a dog, seed 1", "tells no prompt and seed", "other.mp4",
    ):  # fmt: skip
        assert words in text(page)


def test_scores_and_settings_stand_side_by_side(tmp_path):
    same = {"network": {"sha256": "x"}, "real": "y", "n": 1, "device": "1 x H200"}
    write_set(tmp_path / "a", [("a cat", 1)], scores={"frechet": 2.0, "recall": 0.5}, conditions=same)
    write_set(tmp_path / "b", [("a cat", 1)], scores={"frechet": 1.0, "recall": 0.5}, steps=50, conditions=same)
    page = compare(tmp_path, "--names=A,B")
    assert page.tables == [
        [["", "A", "B"], ["steps", "4", "50"]],
        [
            ["", "Fréchet distance\xa0↓", "Recall\xa0↑", "Videos scored"],
            ["A", "2.000", "0.500", "1"],
            ["B", "1.000", "0.500", "1"],
        ],
    ]
    assert "<b>1.000</b>" in (tmp_path / "compare.html").read_text()
    for words in ("model", "tiny", "A: a note", "B: a note", "Latent diversity 1.000 | 1.000"):
        assert words in text(page)
    assert "cannot be compared" not in text(page)


@pytest.mark.parametrize(
    ("condition", "words", "bold"),
    [
        ("network", "networks or their clips differ: Fréchet distance", {"9"}),
        ("real", "the real videos differ: Fréchet distance", {"9"}),
        ("n", "the numbers of videos differ: Fréchet distance", {"9"}),
        ("device", "devices differ: Frames a second", {"1.000"}),
        ("latents", "where the latents are from differ: Latent diversity", {"1.000", "9"}),
    ],
)
def test_scores_under_different_conditions_are_not_judged(condition, words, bold, tmp_path):
    """They are shown, with the reason; the better one is not bold."""
    for name, frechet, speed in (("a", 2.0, 9.0), ("b", 1.0, 8.0)):
        scores = {"frechet": frechet, "frames_per_second": speed, "latent_diversity": 1.0}
        write_set(tmp_path / name, [("a cat", 1)], scores=scores, conditions={condition: name})
    page = compare(tmp_path)
    assert f"cannot be compared, for {words}" in text(page)
    assert set(re.findall("<b>([^<]*)</b>", (tmp_path / "compare.html").read_text())) == bold
    assert {"2.000", "1.000", "9", "8"} <= {cell for row in page.tables[-1] for cell in row}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_finite_number_is_shown_as_none_with_a_note(value, tmp_path):
    """It is not the best, and what it is read from says what was written."""
    scores = {"frechet": value, "recall": 0.5}
    write_set(tmp_path / "a", [("a cat", 1)], scores=scores)
    write_set(tmp_path / "b", [("a cat", 1)], scores={"frechet": 1.0, "recall": 0.25})
    scored = set_scores.Scored({"n": 1, **scores}, {"a cat": {"latent_diversity": value}}, {}, [])
    set_scores.write_scores(tmp_path / "a" / "scores.json", scored)
    np.testing.assert_equal(set_scores.read_scores(tmp_path / "a" / "scores.json"), scored)
    page = compare(tmp_path, "--names=A,B")
    assert page.tables[-1][1:] == [["A", "–", "0.500", "1"], ["B", "1.000", "0.250", "1"]]
    assert re.findall("<b>([^<]*)</b>", (tmp_path / "compare.html").read_text()) == ["0.500"]
    assert "A has scores that are not finite numbers, shown as –: Fréchet distance" in text(page)
    assert "Latent diversity – | 1.000" in text(page)


def test_settings_that_vary_within_a_set_are_not_given_a_value(tmp_path):
    write_set(tmp_path / "a", [("a cat", 1)])
    write_set(tmp_path / "a", [("x", 1), ("a dog", 1)], steps=8)
    write_set(tmp_path / "b", [("a cat", 1)])
    assert compare(tmp_path, "--names=A,B").tables[0] == [["", "A", "B"], ["steps", "various", "4"]]


def test_scores_that_are_missing_or_old_are_named(tmp_path):
    write_set(tmp_path / "a", [("a cat", 1)], scores={})
    write_set(tmp_path / "a", [("a cat", 1), ("a dog", 1)])
    write_set(tmp_path / "b", [("a cat", 1)])
    page = compare(tmp_path, "--names=A,B")
    assert "A was scored when it had 1 samples, now 2" in text(page)
    assert f"B is not scored: python -m launch.evaluate score {tmp_path / 'b'}" in text(page)


def test_text_of_users_stays_text(tmp_path):
    for name in "ab":
        write_set(tmp_path / name, [(HOSTILE, 1), (HOSTILE, 2 if name == "a" else 3)])
    page = compare(tmp_path, f"--names={HOSTILE},B")
    assert page.count("script") == 1
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert HOSTILE in text(page)


def test_sets_without_a_common_sample_are_refused(tmp_path):
    write_set(tmp_path / "a", [("a cat", 1)])
    write_set(tmp_path / "b", [("a cat", 2)])
    first, second = (comparison.open_set(name, tmp_path / name) for name in "ab")
    with pytest.raises(
        UserError, match="have no prompt and seed in common: sample the same prompts with the same --seed"
    ):
        comparison.write_page(tmp_path / "page.html", first, second)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "a has no .mp4 or .png file: give a folder of samples"),
        (["a", "a"], "must be two different words: write --names teacher,student"),
        (["a", "b", "--names=x"], "--names x must be two different words"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["compare", *words])
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert not list(tmp_path.iterdir())


SCORED = {"scores": {"n": 1}, "prompts": {}, "conditions": {}, "notes": []}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"scores": {}},
        SCORED | {"scores": [1]},
        SCORED | {"scores": {"n": "many"}},
        SCORED | {"scores": {"n": None}},
        SCORED | {"prompts": {"a cat": 1}},
        SCORED | {"conditions": 1},
        SCORED | {"notes": 1},
    ],
)
def test_a_broken_file_is_named(content, tmp_path):
    write_set(tmp_path / "a", [("a cat", 1)])
    (tmp_path / "a" / "scores.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"scores\.json holds no scores"):
        comparison.open_set("a", tmp_path / "a")
    (tmp_path / "a" / "videos" / "b.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"b.mp4 cannot be read as a video"):
        sample_sets.list_samples(Path(tmp_path / "a"))
