r"""Generates videos and images from captions: of a published model, or of a recipe's teacher or student.

    python -m launch.sample --model=wan2.1-t2v-1.3b --dit=student.pth --vae=Wan2.1_VAE.pth \
        --text-encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl \
        --prompt="a red fox in the snow" --sampler=few-step-sde --seeds=0,1 --out=samples
    python -m launch.sample --config=configs/digits_rcm.py --dit=runs/digits_rcm/ema.safetensors \
        --prompt="a three moving up and left"

Checkpoints are read in any layout that launch.convert reads. What is left out is as the model's authors have it; a
model's own sampler is a teacher's, so name a few-step one for a distilled model. A video is an MP4, a single frame a
PNG, with the settings in the file's metadata.
"""

import math
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from launch import keep_compilations
from rcm_jax import media
from rcm_jax.config import Command, UserError
from rcm_jax.published import (
    FEW_STEPS,
    FRAME_FACTOR,
    RESOLUTIONS,
    SAMPLERS,
    Published,
    find_published,
    fit_size,
    parse_size,
)


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and writes a file for each prompt and seed."""
    command = Command(__doc__)
    command.add_argument("--model", metavar="NAME", help="a published model, such as wan2.1-t2v-14b or wan2.2-i2v")
    command.add_argument(
        "--dit", "--weights", dest="dit", type=Path, nargs="+", metavar="PATH", help="the network; of Wan2.2 A14B two"
    )
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a caption; may be repeated")
    command.add_argument("--prompt-file", metavar="FILE", help="a text file with one caption a line")
    command.add_argument("--sampler", choices=SAMPLERS, help="few-step-... for distilled models (a recipe's default)")
    command.add_argument("--steps", type=int, metavar="N", help="steps (default: 4 of a distilled model)")
    command.add_argument("--seeds", default="0", metavar="N,N", help="seeds; each caption is sampled with each")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("samples"),
        metavar="DIR",
        help="where the files go, numbered on from those there",
    )
    of_model = _add_model_options(command)
    arguments, config = command.parse_optional(argv)
    with command.reports_user_errors():
        if (config is None) == (arguments.model is None):
            raise UserError("name what to sample: either --config FILE, a recipe, or --model NAME, a published model")
        if config is None:
            _sample_model(arguments)
            return
        given = [option for option in of_model if getattr(arguments, option) is not None]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} belongs to --model: a recipe says it itself")
        _sample_recipe(config, arguments)


def _add_model_options(command: ArgumentParser) -> list[str]:
    """Adds what only published models take; returns the names."""
    group = command.add_argument_group("published models")
    actions = [
        group.add_argument(f"--{name}", metavar=metavar, type=type_, help=text)
        for name, metavar, type_, text in (
            ("vae", "PATH", Path, "the autoencoder"),
            ("text-encoder", "PATH", Path, "umT5-xxl for Wan, T5-11B for Cosmos-Predict2"),
            ("tokenizer", "PATH", Path, "its tokenizer.json or spiece.model, or a folder with one"),
            ("image-encoder", "PATH", Path, "CLIP, for Wan2.1 image-to-video"),
            ("embeddings", "FILE", Path, "safetensors with `text`, and `negative`, in the place of captions"),
            ("image", "FILE", Path, "the first frame"),
            ("negative", "TEXT", str, "the caption to go away from"),
            ("guidance", "X[,X]", str, "strength, 1 is none; of two networks the one for high noise first"),
            ("size", "WxH", str, f"or {', '.join(RESOLUTIONS)}, with an image areas: the shape is the image's"),
            ("frames", "N", int, "1 + a multiple of 4; 1 makes a picture"),
            ("fps", "N", int, "frames a second"),
            ("shift", "X", float, "of a teacher's times towards noise"),
            ("sigma-max", "X", float, "noise level at which a distilled model starts"),
            ("mid-times", "T,T", str, "TrigFlow times of a distilled model's later steps"),
            ("dtype", "NAME", str, "bfloat16 (default) or float32"),
            ("context", "N", int, "devices that share out a video's tokens (default: 1)"),
            ("tensor", "N", int, "devices, times those, that share out the network's heads (default: 1)"),
        )
    ]
    tile = group.add_argument("--tile", action="store_true", default=None, help="decode in tiles: less memory")
    return [action.dest for action in (*actions, tile)]


def _sample_recipe(config: ConfigDict, arguments: Namespace) -> None:
    sampler: Any = arguments.sampler or "few-step-sde"
    is_teacher = not sampler.startswith("few-step")
    prompts, seeds = _prompts(arguments), _parse_seeds(arguments.seeds)
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    if len(arguments.dit or []) > 1:
        raise UserError(f"--dit gives {len(arguments.dit)} checkpoints, a recipe has one network: give one")
    if not is_teacher and not arguments.dit:
        raise UserError("a student needs --dit PATH; --sampler euler samples the recipe's teacher")
    if config.data.name != "digits":
        raise UserError(f"data.name={config.data.name!r} has no text encoder of its own: sample with --model")
    keep_compilations()
    import jax.numpy as jnp
    import numpy as np

    from rcm_jax.data import digits, text
    from rcm_jax.generation import generate, student_sampler, teacher_sampler
    from rcm_jax.train import create_network, load_params

    network, shape = create_network(config), (digits.FRAMES, digits.SIZE, digits.SIZE, 1)
    weights = arguments.dit[0] if arguments.dit else config.teacher.path
    if is_teacher:
        steps = config.sampling.teacher_steps if arguments.steps is None else arguments.steps
        negative = jnp.asarray(text.encode([""])[0])
        sample = teacher_sampler(config, network, shape, negative, steps=_positive("--steps", steps), method=sampler)
        settings = {"sampler": sampler, "steps": steps, "guidance": config.teacher.guidance}
    else:
        steps = FEW_STEPS if arguments.steps is None else arguments.steps
        kind: Any = sampler.removeprefix("few-step-")
        sample = student_sampler(config, network, shape, steps=steps, kind=kind)
        settings = {"sampler": sampler, "steps": steps}
    generated = generate(
        sample,
        load_params(weights, network),
        text.encode([prompt for prompt, _ in rows]),
        np.array([seed for _, seed in rows]),
        batch_size=min(len(rows), 80),
        label="sampling",
    )
    films = zip(rows, generated.latent_NTHWC, strict=True)
    for number, ((prompt, seed), latent) in enumerate(films, _first_number(arguments.out)):
        path = arguments.out / f"{number:04d}_seed{seed}.mp4"
        metadata = {"prompt": prompt, "seed": seed, "dit": str(weights), **settings}
        media.write_video(path, digits.latent_to_video(latent), fps=digits.FPS, scale=8, metadata=metadata)
        print(path)


class Order(NamedTuple):
    """What is wanted of a published model."""

    published: Published
    sampling: dict[str, Any]  # inference.Settings
    prompts: list[str]
    negative: str
    seeds: list[int]
    image: Any  # (H, W, 3) or None
    size: tuple[int, int]
    frames: int
    fps: int


def _sample_model(arguments: Namespace) -> None:
    """Checks everything, then lets text encoder, image encoders, network and decoder take turns in memory."""
    order = _check_order(arguments)
    keep_compilations()
    from rcm_jax import inference

    settings = inference.Settings(**order.sampling)
    inference.sample_times(settings)
    parts = _open_parts(arguments, order, settings)
    texts = inference.encode_texts(parts, len(order.prompts))
    condition = inference.Condition()
    if order.image is not None:
        condition = inference.encode_image(parts, order.image, media.cover(order.image, order.size), order.frames)
    rows = [(text, seed) for text in range(len(texts.text_NSD)) for seed in order.seeds]
    shape = parts.autoencoder.config.latent_shape((order.frames, *reversed(order.size)))
    latents = inference.sample_latents(parts.transformer, texts, rows, shape, settings, condition)
    videos = inference.decode(parts.autoencoder, latents, tiled=bool(arguments.tile))
    films = zip(rows, videos, strict=True)
    for number, ((text, seed), video_THWC) in enumerate(films, _first_number(arguments.out)):
        prompt = order.prompts[text] if order.prompts else None
        metadata = {"prompt": prompt, "embedding": None if prompt else text, "seed": seed}
        metadata |= _metadata(arguments, order, parts.transformer.model)
        path = arguments.out / f"{number:04d}_seed{seed}"
        if order.frames == 1:
            path = path.with_suffix(".png")
            media.write_image(path, video_THWC[0], metadata=metadata)
        else:
            path = path.with_suffix(".mp4")
            media.write_video(path, video_THWC, fps=order.fps, metadata=metadata)
        print(path)


def _first_number(folder: Path) -> int:
    """The number after those of the files that earlier commands left in a folder: none of them is written over."""
    numbers = (re.match(r"(\d+)_seed", path.name) for path in folder.glob("*_seed*"))
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def _check_order(arguments: Namespace) -> Order:
    """Everything that can be known before a checkpoint is opened. Raises UserError for what does not fit."""
    published = find_published(arguments.model)
    for name in ("dit", "vae"):
        if getattr(arguments, name) is None:
            raise UserError(f"--model {arguments.model} needs --{name} PATH: give its checkpoint")
    if arguments.embeddings and (arguments.prompt or arguments.prompt_file):
        raise UserError(f"--embeddings {arguments.embeddings} takes the place of captions: leave --prompt out")
    if published.image == "none" and arguments.image:
        raise UserError(f"--image {arguments.image} is of no use to {arguments.model}: leave it out")
    if published.image == "required" and not arguments.image:
        raise UserError(f"{arguments.model} needs the first frame: give --image FILE")
    if published.image_encoder and not arguments.image_encoder:
        raise UserError(f"{arguments.model} needs --image-encoder PATH: give CLIP's checkpoint")
    if arguments.image_encoder and not published.image_encoder:
        raise UserError(f"--image-encoder {arguments.image_encoder} is of no use to {arguments.model}: leave it out")
    if arguments.dtype not in (None, "bfloat16", "float32"):
        raise UserError(f"--dtype {arguments.dtype} must be bfloat16 or float32")
    frames = _positive("--frames", published.frames if arguments.frames is None else arguments.frames)
    if (frames - 1) % FRAME_FACTOR:
        near = 1 + frames // FRAME_FACTOR * FRAME_FACTOR
        raise UserError(f"--frames {frames} must be 1 + a multiple of {FRAME_FACTOR}: write --frames {near}")
    image = media.read_image(arguments.image) if arguments.image else None
    return Order(
        published=published,
        sampling=_sampling(arguments, published),
        prompts=[] if arguments.embeddings else _prompts(arguments),
        negative=published.negative if arguments.negative is None else arguments.negative,
        seeds=_parse_seeds(arguments.seeds),
        image=image,
        size=_size(arguments.size or published.size, published.block, image),
        frames=frames,
        fps=_positive("--fps", published.fps if arguments.fps is None else arguments.fps),
    )


def _sampling(arguments: Namespace, published: Published) -> dict[str, Any]:
    """The values of inference.Settings. Raises UserError for one that breaks its rule or that the sampler ignores."""
    sampler = arguments.sampler or published.sampler
    is_few_step = sampler.startswith("few-step")
    ignored = ("guidance", "shift", "negative") if is_few_step else ("sigma_max", "mid_times")
    for name in ignored:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is of no use to --sampler {sampler}: leave it out")
    guidance = published.guidance
    if is_few_step:
        guidance = (1.0,) * len(guidance)
    elif arguments.guidance is not None:
        given = _numbers("--guidance", arguments.guidance)
        if len(given) not in (1, len(guidance)) or min(given) < 1:
            raise UserError(f"--guidance {arguments.guidance} must be {len(guidance)} numbers of at least 1, or one")
        guidance = given * (len(guidance) // len(given))
    shift = published.shift if arguments.shift is None else arguments.shift
    if shift is not None and not 0 < shift < math.inf:
        raise UserError(f"--shift {shift} must be a positive number: 1 leaves the times as they are")
    sampling: dict[str, Any] = {"sampler": sampler, "guidance": guidance}
    sampling["steps"] = (
        arguments.steps if arguments.steps is not None else FEW_STEPS if is_few_step else published.steps
    )
    _positive("--steps", sampling["steps"])
    if not is_few_step:
        return sampling | {"shift": shift}
    if arguments.mid_times is not None:
        sampling["mid_times"] = _numbers("--mid-times", arguments.mid_times)
    sigma_max = published.sigma_max if arguments.sigma_max is None else arguments.sigma_max
    return sampling | {"sigma_max": sigma_max}


def _size(text: str, block: int, image: Any) -> tuple[int, int]:
    """Width and height. Raises UserError if they are not multiples of `block`."""
    width, height = parse_size(text)
    if image is not None and text in RESOLUTIONS:
        return fit_size((image.shape[1], image.shape[0]), width * height, block)
    if width % block or height % block:
        near = "x".join(str(max(block, round(side / block) * block)) for side in (width, height))
        raise UserError(f"--size {text} must have multiples of {block}: write --size {near}")
    return width, height


def _open_parts(arguments: Namespace, order: Order, settings: Any) -> Any:
    """Opens every checkpoint, tokenises the captions and reads the embeddings; loads no network yet."""
    import jax.numpy as jnp

    from rcm_jax import inference
    from rcm_jax.convert import loading
    from rcm_jax.data.tokenizer import clean_prompt, load_tokenizer
    from rcm_jax.models import clip, umt5, vae

    published, dtype = order.published, jnp.dtype(arguments.dtype or "bfloat16")
    mesh = _make_mesh(arguments)
    transformer = loading.open_transformer(arguments.dit, arguments.model, dtype=dtype, mesh=mesh)
    embedded = inference.read_embeddings(arguments.embeddings, transformer.config) if arguments.embeddings else {}
    captions = list(order.prompts)
    if max(settings.guidance) > 1 and "negative" not in embedded:
        captions.append(order.negative)
    tokens = text_encoder = image_encoder = None
    if captions:
        for name in ("text_encoder", "tokenizer"):
            if getattr(arguments, name) is None:
                raise UserError(
                    f"{len(captions)} captions need --{name.replace('_', '-')} PATH: give it or --embeddings"
                )
        if published.text_encoder == "umt5-xxl":
            captions = [clean_prompt(caption) for caption in captions]
        tokens = load_tokenizer(arguments.tokenizer, length=transformer.config.text_length)(captions)
        preset = umt5.PRESETS[published.text_encoder]
        text_encoder = loading.open_text_encoder(arguments.text_encoder, preset, dtype=dtype)
    if published.image_encoder:
        preset = clip.PRESETS[published.image_encoder]
        image_encoder = loading.open_image_encoder(arguments.image_encoder, preset, dtype=dtype)
    autoencoder = loading.open_autoencoder(arguments.vae, vae.PRESETS[published.vae], dtype=dtype)
    return inference.Parts(transformer, autoencoder, text_encoder, image_encoder, tokens, embedded)


def _make_mesh(arguments: Namespace) -> Any:
    """The devices that sample. Raises UserError for more than there are."""
    import jax

    from rcm_jax import sharding

    context, tensor = (
        1 if value is None else _positive(f"--{name}", value)
        for name, value in (("context", arguments.context), ("tensor", arguments.tensor))
    )
    count, devices = context * tensor, jax.devices()
    if count > len(devices):
        raise UserError(f"--context {context} times --tensor {tensor} is more than {len(devices)} devices: lower one")
    return sharding.make_mesh(data=1, context=context, tensor=tensor, devices=devices[:count])


def _metadata(arguments: Namespace, order: Order, model: str) -> dict[str, Any]:
    """The settings that all files of a command share."""
    has_guidance = max(order.sampling["guidance"]) > 1
    return {
        "model": model,
        "dit": [str(path) for path in arguments.dit],
        **order.sampling,
        "negative": order.negative if has_guidance else None,
        "image": arguments.image and str(arguments.image),
        "size": "x".join(map(str, order.size)),
        "frames": order.frames,
        "fps": order.fps,
    }


def _prompts(arguments: Namespace) -> list[str]:
    """The captions of the command line, then those of a file. Raises UserError if there is none."""
    prompts = arguments.prompt + read_prompts(arguments.prompt_file)
    if not prompts:
        raise UserError("there is no caption: give --prompt TEXT or --prompt-file FILE")
    return prompts


def read_prompts(path: str | None) -> list[str]:
    """The lines of a text file that are not blank; none of no file. Raises UserError if it is not text."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read as text: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def _parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text} must be integers with commas between: write --seeds 0,1,2") from None
    if any(not 0 <= seed < 2**31 for seed in seeds):
        raise UserError(f"--seeds {text} must lie between 0 and {2**31 - 1}: choose others")
    return seeds


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text} must be numbers with commas between: write {option} 4,3") from None


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{option} {value} must be at least 1")
    return value


if __name__ == "__main__":
    main()
