"""The judge of moving-digit videos: which digit, which direction, and features in which distances are measured."""

import os
from pathlib import Path
from typing import NamedTuple

import einops
import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from rcm_jax.checkpoint import load_safetensors
from rcm_jax.config import UserError
from rcm_jax.data import digits

FEATURES = 64
ASSETS = Path(__file__).parents[1] / "assets"


class Judgement(NamedTuple):
    """What the classifier says of a batch of videos."""

    feature_BF: Float[Array, "b f"]
    digit_BK: Float[Array, "b 10"]  # logits
    direction_BK: Float[Array, "b 8"]  # logits, in the order of digits.DIRECTIONS
    start_B2: Float[Array, "b 2"]  # first top left corner (y, x), 0 to 1 over the places it can take
    image_BHW: Float[Array, "b p p"]  # the digit as its source has it, 0 to 1


class Classifier(nnx.Module):
    """Convolutions over single frames, then over all frames stacked; 175 thousand weights for digits.DIGITS.

    Every answer is linear in the features. The start and the image are there for training only: they make features
    tell places and handwritings apart, so that distances between features see variety within one caption.
    """

    def __init__(self, variant: digits.Variant = digits.DIGITS, *, rngs: nnx.Rngs):
        self.variant = variant
        self.frame_convs = nnx.List([nnx.Conv(4, 24, (3, 3), rngs=rngs), nnx.Conv(4 * 24, 48, (3, 3), rngs=rngs)])
        self.video_convs = nnx.List(
            [nnx.Conv(digits.FRAMES * 48, 64, (1, 1), rngs=rngs), nnx.Conv(64, 64, (3, 3), rngs=rngs)]
        )
        self.feature = nnx.Linear(64 * (variant.size // 4) ** 2, FEATURES, rngs=rngs)
        self.digit = nnx.Linear(FEATURES, len(digits.DIGIT_NAMES), rngs=rngs)
        self.direction = nnx.Linear(FEATURES, len(digits.DIRECTIONS), rngs=rngs)
        self.start = nnx.Linear(FEATURES, 2, rngs=rngs)
        self.image = nnx.Linear(FEATURES, variant.digit_size**2, rngs=rngs)

    def __call__(self, video_BTHWC: Float[Array, "b t h w 1"]) -> Judgement:
        """Judges videos of pixels in [0, 1]."""
        x = (video_BTHWC - self.variant.mean) / self.variant.std
        x = einops.rearrange(x, "b t h w c -> (b t) h w c")
        for conv in self.frame_convs:
            # 2x2 pixels become channels: a quarter of the positions, and no strided convolution, slow on a CPU.
            x = jax.nn.relu(conv(einops.rearrange(x, "n (h p) (w q) c -> n h w (p q c)", p=2, q=2)))
        x = einops.rearrange(x, "(b t) h w c -> b h w (t c)", t=digits.FRAMES)
        for conv in self.video_convs:
            x = jax.nn.relu(conv(x))
        feature_BF = jax.nn.relu(self.feature(einops.rearrange(x, "b h w c -> b (h w c)")))
        return Judgement(
            feature_BF,
            self.digit(feature_BF),
            self.direction(feature_BF),
            self.start(feature_BF),
            einops.rearrange(self.image(feature_BF), "b (h w) -> b h w", h=self.variant.digit_size),
        )


def to_tensors(classifier: Classifier) -> dict[str, np.ndarray]:
    """The weights by dotted path, as `load` reads them."""
    leaves = nnx.to_flat_state(nnx.state(classifier, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in leaves}


def weights_path(variant: digits.Variant = digits.DIGITS) -> Path:
    """Where launch.classifier leaves the weights of a variant's classifier."""
    return ASSETS / f"{variant.name}_classifier.safetensors"


def load(
    path: str | os.PathLike | None = None, variant: digits.Variant = digits.DIGITS
) -> tuple[Classifier, dict[str, str]]:
    """Loads trained weights, those at `weights_path` by default, and what their file says of them.

    Raises:
        UserError: the file is missing, cannot be read or holds other tensors than this network's.
    """
    remedy = f"run python -m launch.classifier --data={variant.name}"
    path = weights_path(variant) if path is None else path
    if not Path(path).exists():
        raise UserError(f"{os.fspath(path)!r} does not exist: {remedy}")
    tensors, metadata = load_safetensors(path)
    classifier = nnx.eval_shape(lambda: Classifier(variant, rngs=nnx.Rngs(0)))
    state = nnx.state(classifier, nnx.Param)
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    wanted = {name: leaf.shape for name, leaf in leaves.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != found:
        differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise UserError(f"{os.fspath(path)!r} is not of this classifier, {differing} differ: {remedy}")
    for name, leaf in leaves.items():
        leaf.set_value(jax.numpy.asarray(tensors[name]))
    nnx.update(classifier, state)
    return classifier, metadata
