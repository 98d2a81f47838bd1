"""Sample scores: against SciPy, brute force and closed forms, at their known limits, and on real videos made worse."""

import functools
import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.spatial.distance
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from rcm_jax import metrics
from rcm_jax.config import UserError
from rcm_jax.data import digits
from rcm_jax.models import classifier as classifiers


def normal(seed, n, dim, *, mean=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(mean, scale, (n, dim))


def frechet_by_scipy(a, b):
    a_cov, b_cov = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(a_cov @ b_cov)
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(a_cov + b_cov - 2 * np.real(root))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "m", "dim"), [(200, 200, 8), (50, 300, 16), (400, 100, 64)])
def test_frechet_distance_is_what_scipy_computes(seed, n, m, dim):
    mix = normal(seed, dim, dim)
    a, b = normal(seed + 10, n, dim) @ mix, normal(seed + 20, m, dim, mean=0.5, scale=2)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), frechet_by_scipy(a, b), rtol=1e-8)


def with_moments(seed, mean, variance, n=500):
    """Points whose sample mean and sample covariance (diagonal) are exactly these."""
    x = normal(seed, n, len(mean))
    x -= x.mean(0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return whitened * np.sqrt(variance) + mean


def test_frechet_distance_of_gaussians_has_its_closed_form():
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 2.0])
    variance_a, variance_b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 4.0, 1.0])
    a, b = with_moments(0, mean_a, variance_a), with_moments(1, mean_b, variance_b)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(variance_a) - np.sqrt(variance_b)).sum()
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-10)


def test_frechet_distance_bears_features_that_do_not_vary():
    a, b = normal(0, 100, 5), normal(1, 100, 5)
    flat_a, flat_b = np.pad(a, [(0, 0), (0, 3)]), np.pad(b, [(0, 0), (0, 3)])
    np.testing.assert_allclose(metrics.frechet_distance(flat_a, flat_b), metrics.frechet_distance(a, b), rtol=1e-10)
    few = normal(2, 4, 40)  # fewer points than dimensions
    assert metrics.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_falls_with_the_number_of_points():
    """Its documented bias: why only equal numbers may be compared."""
    small, large = (
        np.mean([metrics.frechet_distance(normal(k, n, 16), normal(k + 99, n, 16)) for k in range(10)])
        for n in (50, 500)
    )
    assert small > 5 * large > 0


def knn_radius(points, i, k):
    return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]


def inside_any_ball(x, points, k):
    return any(np.linalg.norm(x - points[i]) <= knn_radius(points, i, k) for i in range(len(points)))


def precision_recall_by_loops(real, fake, k):
    return np.mean([inside_any_ball(x, real, k) for x in fake]), np.mean([inside_any_ball(x, fake, k) for x in real])


def coverage_by_loops(real, fake, k):
    return np.mean([min(np.linalg.norm(real[i] - y) for y in fake) <= knn_radius(real, i, k) for i in range(len(real))])


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_neighbour_scores_are_what_loops_over_points_give(k, shift):
    real, fake = normal(0, 40, 4), normal(1, 30, 4, mean=shift, scale=0.8)
    assert metrics.precision_recall(real, fake, k) == pytest.approx(precision_recall_by_loops(real, fake, k))
    assert metrics.coverage(real, fake, k) == pytest.approx(coverage_by_loops(real, fake, k))


# Small whole numbers: their distances are exact, so ties and repeated points are decided, not rounded.
points = npst.arrays(np.float64, st.tuples(st.integers(6, 9), st.just(2)), elements=st.integers(-3, 3).map(float))


@settings(deadline=None, max_examples=50)
@given(real=points, fake=points, k=st.integers(1, 5))
def test_neighbour_scores_count_ties_and_repeats_as_loops_do(real, fake, k):
    assert metrics.precision_recall(real, fake, k) == pytest.approx(precision_recall_by_loops(real, fake, k))
    assert metrics.coverage(real, fake, k) == pytest.approx(coverage_by_loops(real, fake, k))


def test_identical_samples_score_perfectly_and_far_ones_nothing():
    real = normal(0, 100, 8)
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.coverage(real, real) == 1
    assert metrics.frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert metrics.precision_recall(real, real + 100) == (0, 0)
    assert metrics.coverage(real, real + 100) == 0


def test_collapse_onto_few_points_costs_recall_and_coverage_but_not_precision():
    real, fair, few = normal(0, 300, 4), normal(1, 300, 4), normal(2, 3, 4, scale=0.5)
    collapsed = few[np.arange(300) % 3] + normal(3, 300, 4, scale=1e-3)
    fair_precision, fair_recall = metrics.precision_recall(real, fair)
    precision, recall = metrics.precision_recall(real, collapsed)
    assert precision >= fair_precision > 0.8
    assert recall < 0.05 < 0.8 < fair_recall
    assert metrics.coverage(real, collapsed) < 0.2 < 0.8 < metrics.coverage(real, fair)


def test_precision_and_recall_change_places_with_their_arguments():
    real, fake = normal(0, 60, 3), normal(1, 60, 3, scale=2)
    assert metrics.precision_recall(real, fake) == metrics.precision_recall(fake, real)[::-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.frechet_distance(normal(0, 1, 2), normal(0, 9, 2)),
            "a covariance needs two points, got 1 and 9",
        ),
        (lambda: metrics.precision_recall(normal(0, 3, 2), normal(0, 9, 2)), "3 points have no 3-th neighbour"),
        (lambda: metrics.coverage(normal(0, 5, 2), normal(0, 9, 2)), "5 points have no 5-th neighbour"),
        (lambda: metrics.within_prompt_diversity(normal(0, 5, 2), ["a"] * 4), "4 prompts for 5 videos"),
    ],
)
def test_too_few_points_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_diversity_is_the_mean_distance_within_a_prompt():
    prompts = ["a", "b", "a", "c", "b", "a"]
    feature = normal(0, 6, 3)
    spread = metrics.within_prompt_diversity(feature, prompts)
    assert list(spread) == ["a", "b"], "one video has no distance"
    for prompt, value in spread.items():
        own = feature[[name == prompt for name in prompts]]
        assert value == pytest.approx(scipy.spatial.distance.pdist(own).mean())


def make_judged(prompts, *, seed=0, scale=1.0):
    """Judges that are always right, with features drawn around a point of each prompt."""
    parsed = [digits.parse_caption(prompt) for prompt in prompts]
    centre = np.array([[digit, 3 * list(digits.DIRECTIONS).index(direction)] for digit, direction in parsed])
    return metrics.Judged(
        centre + normal(seed, len(prompts), 2, scale=scale),
        np.array([digit for digit, _ in parsed]),
        np.array([list(digits.DIRECTIONS).index(direction) for _, direction in parsed]),
    )


def test_accuracy_counts_digit_and_direction_and_both():
    prompts = [
        digits.caption(3, "up"),
        digits.caption(4, "down"),
        digits.caption(5, "left"),
        digits.caption(6, "right"),
    ] * 3
    real = make_judged(prompts)
    fake = make_judged(prompts, seed=1)
    fake.digit_N[[0, 1]] = 9
    fake.direction_N[[1, 2, 3]] = list(digits.DIRECTIONS).index("up and left")
    scores = metrics.score(fake, prompts, real, prompts)
    assert scores["n"] == 12
    assert scores["digit_accuracy"] == pytest.approx(10 / 12)
    assert scores["direction_accuracy"] == pytest.approx(9 / 12)
    assert scores["caption_accuracy"] == pytest.approx(8 / 12)


def test_diversity_is_relative_to_real_videos_of_the_same_prompt():
    real_prompts = [digits.caption(digit, "up") for digit in range(4)] * 50
    prompts = real_prompts[:160]
    real = make_judged(real_prompts)
    for scale in (0.0, 0.5, 1.0):
        scores = metrics.score(make_judged(prompts, seed=1, scale=scale), prompts, real, real_prompts)
        assert scores["diversity"] == pytest.approx(scale, abs=0.1)


def test_diversity_is_left_out_where_no_prompt_has_two_videos():
    prompts = list(digits.captions())
    scores = metrics.score(make_judged(prompts, seed=1), prompts, make_judged(prompts * 2), prompts * 2)
    assert "diversity" not in scores
    assert np.isfinite(list(scores.values())).all()


def test_scores_need_a_caption_for_each_video():
    prompts = list(digits.captions())
    judged = make_judged(prompts)
    with pytest.raises(UserError, match="79 prompts for 80 videos: give one prompt a video"):
        metrics.score(judged, prompts[1:], judged, prompts)
    with pytest.raises(UserError, match="'a cat' is not a caption"):
        metrics.score(judged, ["a cat", *prompts[1:]], judged, prompts)


@functools.cache
def films(split, seed):
    shown = next(digits.film(digits.load_images(split), views=1, seed=seed, chunk=1000))
    return shown.video_BTHWC, shown.prompt


@functools.cache
def judge(name):
    video, prompts = films("train", 3)
    rng = np.random.default_rng(0)
    if name == "frozen":
        video = np.repeat(video[:, :1], 8, axis=1)
    elif name == "noisy":
        video = np.clip(video + rng.normal(0, 80, video.shape), 0, 255).astype(np.uint8)
    elif name == "collapsed":
        video = video[[prompts.index(prompt) for prompt in prompts]]
    elif name == "shuffled":
        prompts = rng.permutation(prompts).tolist()
    classifier, _ = classifiers.load()
    real, real_prompts = films("validation", 2)
    return metrics.score(metrics.judge(classifier, video), prompts, metrics.judge(classifier, real), real_prompts)


def test_real_videos_of_unseen_handwriting_score_well():
    scores = judge("real")
    assert scores["caption_accuracy"] > 0.97
    assert min(scores["precision"], scores["recall"]) > 0.8
    assert scores["diversity"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("name", "worse"),
    [
        ("frozen", {"direction_accuracy", "precision", "recall", "coverage", "frechet"}),
        ("noisy", {"recall", "coverage", "frechet"}),
        ("collapsed", {"recall", "coverage", "diversity", "frechet"}),
        ("shuffled", {"direction_accuracy", "digit_accuracy"}),
    ],
)
def test_what_is_wrong_with_videos_shows_in_the_scores_that_mean_it(name, worse):
    real, spoilt = judge("real"), judge(name)
    assert spoilt["frechet"] > 2 * real["frechet"] if "frechet" in worse else spoilt["frechet"] == real["frechet"]
    for key in worse - {"frechet"}:
        assert spoilt[key] < 0.8 * real[key], key
    for key in {"precision", "digit_accuracy", "direction_accuracy"} - worse:
        assert spoilt[key] > 0.8 * real[key], key


@functools.cache
def real_videos(name):
    variant = digits.VARIANTS[name]
    return next(digits.film(digits.load_images("validation", variant), views=1, seed=3, chunk=200, variant=variant))


def blurred(video_NTHWC, sigma):
    blur = scipy.ndimage.gaussian_filter(video_NTHWC.astype(float), (0, 0, sigma, sigma, 0), mode="constant")
    return np.round(blur).astype(np.uint8)


@pytest.mark.parametrize("variant", digits.VARIANTS)
def test_fine_detail_falls_with_every_bit_of_blur_and_rises_with_noise(variant):
    video = real_videos(variant).video_BTHWC
    energy = [metrics.high_frequency_energy(blurred(video, sigma)) for sigma in (0.0, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)]
    assert all(sharper > softer > 0 for sharper, softer in itertools.pairwise(energy))
    noise = np.random.default_rng(0).normal(0, 20, video.shape)
    noisy = np.clip(video + noise, 0, 255).astype(np.uint8)
    assert metrics.high_frequency_energy(noisy) > energy[0]


@pytest.mark.parametrize(("period", "share"), [(2, 1.0), (3, 1.0), (6, 0.0), (12, 0.0)])
def test_frequencies_beyond_a_quarter_of_a_cycle_a_pixel_are_high(period, share):
    wave = np.round(100 + 100 * np.cos(2 * np.pi * np.arange(12) / period)).astype(np.uint8)
    video = np.broadcast_to(wave[:, None], (2, 3, 12, 12))[..., None]
    variance = (video / 255).var()
    assert metrics.high_frequency_energy(video) == pytest.approx(share * variance, abs=1e-6)


@pytest.mark.parametrize("variant", digits.VARIANTS)
def test_strokes_of_real_videos_never_change_and_those_of_unlike_frames_do(variant):
    films = real_videos(variant)
    video = films.video_BTHWC
    direction = np.array([tuple(digits.DIRECTIONS).index(digits.parse_caption(p)[1]) for p in films.prompt])
    assert metrics.stroke_error(video, direction) == 0
    assert metrics.stroke_error(video, (direction + 1) % 8) > 0.1
    noise = np.random.default_rng(0).integers(-1, 2, video.shape) * (video // 10)
    jittered = (video + noise).clip(0, 255).astype(np.uint8)
    assert 0.01 < metrics.stroke_error(jittered, direction) < 0.3
    assert metrics.stroke_error(np.zeros_like(video), direction) == 0


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_judging_does_not_depend_on_the_batch_size(batch_size):
    classifier, _ = classifiers.load()
    video, prompts = films("train", 3)
    whole, parts = metrics.judge(classifier, video[:50]), metrics.judge(classifier, video[:50], batch_size=batch_size)
    np.testing.assert_allclose(parts.feature_NF, whole.feature_NF, atol=1e-4)
    for judged in (whole, parts):
        found = zip(judged.digit_N, judged.direction_N, strict=True)
        assert [digits.caption(int(d), tuple(digits.DIRECTIONS)[k]) for d, k in found] == prompts[:50]
