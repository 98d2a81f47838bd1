"""Command-line options of a published model, shared by the launchers that run one, and the rules their values keep.

Nothing here imports JAX at once, so a mistake on the command line is reported at once.
"""

import math
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rcm_jax.config import UserError
from rcm_jax.plain_text import read_text
from rcm_jax.published import (
    FEW_STEPS,
    FRAME_FACTOR,
    RESOLUTIONS,
    SAMPLERS,
    Published,
    fit_size,
    parse_size,
)

MAX_FPS = 1000  # encoders take no rate without a limit, and no video has more

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from rcm_jax.convert.loading import Loadable
    from rcm_jax.data.tokenizer import Tokens


def add_model(command: ArgumentParser) -> None:
    """Adds the model, its network and how it is sampled."""
    command.add_argument("--model", metavar="NAME", help="a published model, such as wan2.1-t2v-14b or wan2.2-i2v")
    command.add_argument(
        "--dit", "--weights", dest="dit", type=Path, nargs="+", metavar="PATH", help="the network; of Wan2.2 A14B two"
    )
    command.add_argument("--prompt-file", metavar="FILE", help="a text file with one caption a line")
    command.add_argument("--sampler", choices=SAMPLERS, help="few-step-... for distilled models (default: the model's)")
    command.add_argument("--steps", type=int, metavar="N", help="steps (default: 4 of a distilled model)")


def add_parts(group: Any) -> list[str]:
    """Adds what only published models take to a parser, or a group of one; returns the names."""
    actions = [
        group.add_argument(f"--{name}", metavar=metavar, type=type_, help=text)
        for name, metavar, type_, text in (
            ("vae", "PATH", Path, "the autoencoder"),
            ("text-encoder", "PATH", Path, "umT5-xxl for Wan, T5-11B for Cosmos-Predict2"),
            ("tokenizer", "PATH", Path, "its tokenizer.json or spiece.model, or a folder with one"),
            ("negative", "TEXT", str, "the caption to go away from"),
            ("guidance", "X[,X]", str, "strength, 1 is none; of two networks the one for high noise first"),
            ("size", "WxH", str, f"or {', '.join(RESOLUTIONS)}, with an image areas: the shape is the image's"),
            ("frames", "N", int, "1 + a multiple of 4; 1 makes a picture"),
            ("fps", "N", int, "frames a second"),
            ("shift", "X", number, "of a teacher's times towards noise"),
            ("sigma-max", "X", number, "noise level at which a distilled model starts"),
            ("mid-times", "T,T", str, "TrigFlow times of a distilled model's later steps"),
            ("dtype", "NAME", str, "bfloat16 (default) or float32"),
            ("encoder-device", "N", int, "which device encodes captions, and images for CLIP (default: 0)"),
            ("vae-device", "N", int, "which device runs the autoencoder (default: 0)"),
            ("context", "N", int, "devices that share out a video's tokens (default: 1)"),
            ("tensor", "N", int, "devices, times those, that share out the network's heads (default: 1)"),
        )
    ]
    tile = group.add_argument("--tile", action="store_true", default=None, help="run the autoencoder in tiles")
    return [action.dest for action in (*actions, tile)]


def spell(name: str) -> str:
    """The option whose value has this name."""
    return f"--{name.replace('_', '-')}"


def check_sampling(arguments: Namespace, published: Published) -> dict[str, Any]:
    """The values of inference.Settings. Raises UserError for one that breaks its rule or that the sampler ignores."""
    sampler = arguments.sampler or published.sampler
    is_few_step = sampler.startswith("few-step")
    ignored = ("guidance", "shift", "negative") if is_few_step else ("sigma_max", "mid_times")
    for name in ignored:
        if getattr(arguments, name) is not None:
            raise UserError(f"{spell(name)} is of no use to --sampler {sampler}: leave it out")
    guidance = published.guidance
    if is_few_step:
        guidance = (1.0,) * len(guidance)
    elif arguments.guidance is not None:
        given = numbers("--guidance", arguments.guidance)
        if len(given) not in (1, len(guidance)) or min(given) < 1:
            raise UserError(f"--guidance {arguments.guidance} must be {len(guidance)} numbers of at least 1, or one")
        guidance = given * (len(guidance) // len(given))
    shift = published.shift if arguments.shift is None else arguments.shift
    if shift is not None and shift <= 0:
        raise UserError(f"--shift {shift} must be a positive number: 1 leaves the times as they are")
    sampling: dict[str, Any] = {"sampler": sampler, "guidance": guidance}
    sampling["steps"] = (
        arguments.steps if arguments.steps is not None else FEW_STEPS if is_few_step else published.steps
    )
    positive("--steps", sampling["steps"])
    if not is_few_step:
        return sampling | {"shift": shift}
    if arguments.mid_times is not None:
        sampling["mid_times"] = numbers("--mid-times", arguments.mid_times)
    sigma_max = published.sigma_max if arguments.sigma_max is None else arguments.sigma_max
    return sampling | {"sigma_max": sigma_max}


def check_target(option: str, path: str | Path, *, kind: Literal["file", "folder"]) -> None:
    """Raises UserError if no file, or no folder of files, can be written at a path. Writes nothing itself."""
    is_kind = os.path.isfile if kind == "file" else os.path.isdir
    if os.path.lexists(path) and not is_kind(path):
        raise UserError(f"{option} {path} must be a {kind}, and something else is there: choose another path")
    folder = os.path.abspath(path) if kind == "folder" else os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):  # missing folders are made
        folder = os.path.dirname(folder)
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"{option} {path} cannot be written: {folder} must be a folder that you may write to")


def check_dtype(arguments: Namespace) -> str:
    """The dtype of the networks. Raises UserError for one that is not supported."""
    if arguments.dtype not in (None, "bfloat16", "float32"):
        raise UserError(f"--dtype {arguments.dtype} must be bfloat16 or float32")
    return arguments.dtype or "bfloat16"


def check_frames(arguments: Namespace, published: Published) -> int:
    """The number of frames. Raises UserError for one that does not divide into latent frames."""
    frames = positive("--frames", published.frames if arguments.frames is None else arguments.frames)
    if (frames - 1) % FRAME_FACTOR:
        near = 1 + frames // FRAME_FACTOR * FRAME_FACTOR
        raise UserError(f"--frames {frames} must be 1 + a multiple of {FRAME_FACTOR}: write --frames {near}")
    return frames


def check_fps(fps: int) -> int:
    """The frames a second. Raises UserError for a rate that no video has."""
    if not 1 <= fps <= MAX_FPS:
        raise UserError(f"--fps {fps} must lie between 1 and {MAX_FPS}: choose another")
    return fps


def check_size(text: str, block: int, image: Any = None) -> tuple[int, int]:
    """Width and height. Raises UserError if they are not multiples of `block`."""
    width, height = parse_size(text)
    if image is not None and text in RESOLUTIONS:
        return fit_size((image.shape[1], image.shape[0]), width * height, block)
    if width % block or height % block:
        near = "x".join(str(max(block, round(side / block) * block)) for side in (width, height))
        raise UserError(f"--size {text} must have multiples of {block}: write --size {near}")
    return width, height


def read_prompts(path: str | None) -> list[str]:
    """The lines of a text file that are not blank; none of no file. Raises UserError if it is not text."""
    lines = [] if path is None else read_text(Path(path), "--prompt-file").splitlines()
    return [line.strip() for line in lines if line.strip()]


def number(text: str) -> float:
    """An option's number, for argparse: float() also reads nan, inf and what float32 cannot hold."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 2.0**127:  # NaN is not less
        raise ArgumentTypeError(f"{text} must be a number, such as 1.5")
    return value


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers of a list with commas. Raises UserError if it is none."""
    try:
        return tuple(number(part) for part in text.split(","))
    except ArgumentTypeError:
        raise UserError(f"{option} {text} must be numbers with commas between: write {option} 4,3") from None


def make_mesh(arguments: Namespace) -> "Mesh":
    """The devices that run the network. Raises UserError for more than there are."""
    import jax

    from rcm_jax import sharding

    context, tensor = (
        1 if value is None else positive(f"--{name}", value)
        for name, value in (("context", arguments.context), ("tensor", arguments.tensor))
    )
    count, devices = context * tensor, jax.devices()
    if count > len(devices):
        raise UserError(f"--context {context} times --tensor {tensor} is more than {len(devices)} devices: lower one")
    return sharding.make_mesh(data=1, context=context, tensor=tensor, devices=devices[:count])


def choose_device(option: str, number: int | None) -> Any:
    """The device of a number; None for none. Raises UserError if there is no such device."""
    import jax

    count = len(jax.devices())
    if number is not None and not 0 <= number < count:
        raise UserError(f"{option} {number} must be one of the {count} devices: choose from 0 to {count - 1}")
    return None if number is None else jax.devices()[number]


def positive(option: str, value: int) -> int:
    """The value. Raises UserError if it is less than 1."""
    if value < 1:
        raise UserError(f"{option} {value} must be at least 1")
    return value


def open_text_encoder(
    arguments: Namespace, published: Published, *, length: int
) -> tuple[Callable[[Sequence[str]], "Tokens"], "Loadable"]:
    """The function from captions to tokens, `length` of each, and the network for them, not loaded yet.

    Raises UserError if a file is not what it should be.
    """
    import jax.numpy as jnp

    from rcm_jax.convert import loading
    from rcm_jax.data.tokenizer import clean_prompt, load_tokenizer
    from rcm_jax.models import umt5

    tokenize, preset = load_tokenizer(arguments.tokenizer, length=length), umt5.PRESETS[published.text_encoder]
    device, dtype = choose_device("--encoder-device", arguments.encoder_device), jnp.dtype(check_dtype(arguments))
    encoder = loading.open_text_encoder(arguments.text_encoder, preset, dtype=dtype, device=device)
    if published.text_encoder == "umt5-xxl":
        return lambda captions: tokenize([clean_prompt(caption) for caption in captions]), encoder
    return tokenize, encoder
