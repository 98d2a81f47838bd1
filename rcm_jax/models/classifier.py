"""The judge of moving-digit videos: which digit, which direction, and features that distances between videos use."""

from pathlib import Path
from typing import NamedTuple

import einops
import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float

from rcm_jax.data import digits

FEATURES = 64
WEIGHTS = Path(__file__).parents[1] / "assets" / "digits_classifier.safetensors"


class Judgement(NamedTuple):
    """What the classifier says of a batch of videos."""

    feature_BF: Float[Array, "b f"]
    digit_logit_BK: Float[Array, "b 10"]
    direction_logit_BK: Float[Array, "b 8"]
    start_B2: Float[Array, "b 2"]
    image_BHW: Float[Array, "b 8 8"]


class Classifier(nnx.Module):
    """Convolutions over single frames, then over all frames stacked; 160 thousand weights.

    Heads are linear in the features. Beside digit and direction they give the digit's first position and its 8x8
    image, for training only: so features also tell handwritings and places apart, and distances see their variety.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        self.frame_convs = nnx.List(
            [
                nnx.Conv(1, 16, (3, 3), rngs=rngs),
                nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs),
                nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs),
            ]
        )
        self.video_convs = nnx.List(
            [nnx.Conv(digits.FRAMES * 64, 64, (1, 1), rngs=rngs), nnx.Conv(64, 64, (3, 3), rngs=rngs)]
        )
        self.feature = nnx.Linear(64 * (digits.SIZE // 4) ** 2, FEATURES, rngs=rngs)
        self.digit = nnx.Linear(FEATURES, len(digits.DIGIT_NAMES), rngs=rngs)
        self.direction = nnx.Linear(FEATURES, len(digits.DIRECTIONS), rngs=rngs)
        self.start = nnx.Linear(FEATURES, 2, rngs=rngs)
        self.image = nnx.Linear(FEATURES, digits.DIGIT_SIZE**2, rngs=rngs)

    def __call__(self, video_BTHWC: Float[Array, "b 8 16 16 1"]) -> Judgement:
        """Judges videos of pixels in [0, 1]; starts are in units of the canvas' room, images in [0, 1]."""
        x = einops.rearrange(video_BTHWC, "b t h w c -> (b t) h w c")
        for conv in self.frame_convs:
            x = jax.nn.relu(conv(x))
        x = einops.rearrange(x, "(b t) h w c -> b h w (t c)", t=digits.FRAMES)
        for conv in self.video_convs:
            x = jax.nn.relu(conv(x))
        feature_BF = jax.nn.relu(self.feature(einops.rearrange(x, "b h w c -> b (h w c)")))
        return Judgement(
            feature_BF=feature_BF,
            digit_logit_BK=self.digit(feature_BF),
            direction_logit_BK=self.direction(feature_BF),
            start_B2=self.start(feature_BF),
            image_BHW=einops.rearrange(self.image(feature_BF), "b (h w) -> b h w", h=digits.DIGIT_SIZE),
        )


def to_tensors(classifier: Classifier) -> dict[str, np.ndarray]:
    """The weights by dotted path, as `load` reads them."""
    leaves = nnx.to_flat_state(nnx.state(classifier, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in leaves}


def load(path: Path = WEIGHTS) -> tuple[Classifier, dict[str, str]]:
    """Loads trained weights (the shipped ones by default) and what their file says of them.

    Raises:
        ValueError: the file's tensors are not this network's.
    """
    with safetensors.safe_open(path, framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    graph, state = nnx.split(nnx.eval_shape(lambda: Classifier(rngs=nnx.Rngs(0))))
    leaves = nnx.to_flat_state(state)
    wanted = {".".join(map(str, path)): leaf.shape for path, leaf in leaves}
    found = {key: tensor.shape for key, tensor in tensors.items()}
    if wanted != found:
        raise ValueError(
            f"{str(path)!r} does not hold this classifier: expected {wanted}, found {found}: "
            "train it anew with python -m launch.classifier"
        )
    flat = [(path, leaf.replace(jax.numpy.asarray(tensors[".".join(map(str, path))]))) for path, leaf in leaves]
    return nnx.merge(graph, nnx.from_flat_state(flat)), metadata
