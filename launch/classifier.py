"""Trains the judge of moving-digit videos on the train split's digits: about 2 minutes on two CPU cores.

    python -m launch.classifier [--data digits28] [--out rcm_jax/assets/digits28_classifier.safetensors]

Videos are rendered as they are needed and disturbed (sub-pixel shifts, blur, brightness, noise), each one from not
at all to strongly, so that a generated video is judged by what it shows rather than by how clean it is.
"""

from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from rcm_jax import metrics, options
from rcm_jax.checkpoint import export_safetensors
from rcm_jax.config import Command, UserError
from rcm_jax.data import digits
from rcm_jax.models.classifier import Classifier, to_tensors, weights_path

STEPS = 4000
BATCH_SIZE = 64
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.02


def disturb(key: PRNGKeyArray, video_BTHWC: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Shifts by up to half a pixel, blurs, dims or brightens, and adds noise, by a strength drawn for each video."""
    keys = iter(jax.random.split(key, 7))

    def draw(low, high):
        return jax.random.uniform(next(keys), (len(video_BTHWC), 1, 1, 1, 1), minval=low, maxval=high)

    strength = draw(0.0, 1.0)
    blur = strength * draw(0.0, 0.15)
    for axis in (2, 3):
        video_BTHWC = _shift_and_blur(video_BTHWC, strength * draw(-0.5, 0.5), blur, axis)
    noise = strength * draw(0.0, 0.2) * jax.random.normal(next(keys), video_BTHWC.shape)
    return jnp.clip(video_BTHWC * (1 + strength * draw(-0.5, 0.25)) + noise, 0, 1)


def _shift_and_blur(video_BTHWC, shift, blur, axis):
    """Three taps along an axis: linear interpolation at `shift` pixels, and `blur` of each neighbour."""
    pad = [(int(k == axis), int(k == axis)) for k in range(5)]
    padded = jnp.pad(video_BTHWC, pad)
    before, here, after = (jax.lax.slice_in_dim(padded, k, k + video_BTHWC.shape[axis], axis=axis) for k in range(3))
    from_before, from_after = blur + jnp.maximum(shift, 0), blur + jnp.maximum(-shift, 0)
    return from_before * before + (1 - from_before - from_after) * here + from_after * after


def draw_batch(
    random: np.random.RandomState, images: digits.Images, batch_size: int, variant: digits.Variant = digits.DIGITS
) -> dict[str, np.ndarray]:
    """Renders random digits moving in random directions from random starts, with what the classifier should say."""
    index = random.randint(len(images.digit_N), size=batch_size)
    direction = random.randint(len(digits.DIRECTIONS), size=batch_size)
    step_B2 = np.array(tuple(digits.DIRECTIONS.values()))[direction]
    start_B2 = digits.draw_starts(random, step_B2, variant)
    return {
        "video": digits.render(images.image_NHW[index], step_B2, start_B2, variant),
        "digit": images.digit_N[index],
        "direction": direction,
        "start": (start_B2 / variant.room).astype(np.float32),
        "image": (images.image_NHW[index] / variant.white).astype(np.float32),
    }


def loss_of(classifier: Classifier, batch: dict[str, Array], key: PRNGKeyArray) -> Float[Array, ""]:
    said = classifier(disturb(key, batch["video"].astype(jnp.float32) / 255))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return (
        cross_entropy(said.digit_BK, batch["digit"]).mean()
        + cross_entropy(said.direction_BK, batch["direction"]).mean()
        + jnp.square(said.start_B2 - batch["start"]).mean()
        + 4 * jnp.square(said.image_BHW - batch["image"]).mean()
    )


@nnx.jit
def train_step(classifier, optimizer, batch, key):
    loss, gradients = nnx.value_and_grad(loss_of)(classifier, batch, key)
    optimizer.update(classifier, gradients)
    return loss


def train(variant: digits.Variant = digits.DIGITS, *, steps: int = STEPS, seed: int = 0) -> Classifier:
    images = digits.load_images("train", variant)
    random = np.random.RandomState(seed)
    classifier = Classifier(variant, rngs=nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    optimizer = nnx.Optimizer(classifier, optax.adamw(schedule, weight_decay=WEIGHT_DECAY), wrt=nnx.Param)
    with tqdm.trange(steps, desc="classifier", disable=None) as bar:
        for step in bar:
            batch = draw_batch(random, images, BATCH_SIZE, variant)
            loss = train_step(classifier, optimizer, batch, jax.random.fold_in(jax.random.key(seed), step))
            if step % 50 == 49:
                bar.set_postfix(loss=f"{loss:.3f}")
    return classifier


def accuracy(classifier: Classifier, *, disturbed: bool, views: int = 4) -> tuple[float, float]:
    """Shares of validation videos whose digit, and whose direction, the classifier names."""
    variant = classifier.variant
    images = digits.load_images("validation", variant)
    count = views * len(digits.DIRECTIONS) * len(images.digit_N)
    batch = draw_batch(np.random.RandomState(1), images, count, variant)
    video = batch["video"]
    if disturbed:
        pixel = disturb(jax.random.key(1), jnp.asarray(video, jnp.float32) / 255)
        video = np.asarray(jnp.round(pixel * 255)).astype(np.uint8)
    judged = metrics.judge(classifier, video)
    return float((judged.digit_N == batch["digit"]).mean()), float((judged.direction_N == batch["direction"]).mean())


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, trains a judge and writes it."""
    command = Command(__doc__)
    command.add_argument(
        "--data", choices=digits.VARIANTS, default="digits", help="which digits (default: %(default)s)"
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="what to write (default: rcm_jax/assets/DATA_classifier.safetensors)"
    )
    command.add_argument("--steps", type=int, default=STEPS, metavar="N", help="training steps (default: %(default)s)")
    arguments = command.parse_args(argv)
    with command.reports_user_errors():
        options.positive("--steps", arguments.steps)
        if arguments.steps != STEPS and arguments.out is None:
            raise UserError(
                f"--steps {arguments.steps} would replace the judge that all scores are by: give --out FILE"
            )
        variant = digits.VARIANTS[arguments.data]
        out = arguments.out or weights_path(variant)
        options.check_target("--out", out, kind="file")
        _train_and_write(variant, arguments.steps, out)


def _train_and_write(variant: digits.Variant, steps: int, out: Path) -> None:
    classifier = train(variant, steps=steps)
    facts = {"steps": str(steps)} | {package: version(package) for package in ("jax", "flax", "optax")}
    for name, disturbed in (("validation", False), ("disturbed_validation", True)):
        digit, direction = accuracy(classifier, disturbed=disturbed)
        facts |= {f"{name}_digit_accuracy": f"{digit:.4f}", f"{name}_direction_accuracy": f"{direction:.4f}"}
    export_safetensors(out, to_tensors(classifier), facts)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
