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

import re
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from launch import keep_compilations
from rcm_jax import media, options
from rcm_jax.config import Command, UserError
from rcm_jax.published import FEW_STEPS, FRAME_FACTOR, Published, find_published


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and writes a file for each prompt and seed."""
    command = Command(__doc__)
    options.add_model(command)
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a caption; may be repeated")
    command.add_argument("--seeds", default="0", metavar="N,N", help="seeds; each caption is sampled with each")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("samples"),
        metavar="DIR",
        help="where the files go, numbered on from those there",
    )
    group = command.add_argument_group("published models")
    of_model = options.add_parts(group)
    of_model += [
        group.add_argument(f"--{name}", metavar=metavar, type=type_, help=text).dest
        for name, metavar, type_, text in (
            ("image", "FILE", Path, "the first frame"),
            ("video", "PATH", Path, "a video, or a folder of its frames, that a video-to-world model goes on from"),
            ("condition-frames", "N", int, "how many of its last frames: 1 or 5 (default: 5)"),
            ("image-encoder", "FILE", Path, "CLIP, for Wan2.1 image-to-video"),
            ("embeddings", "FILE", Path, "safetensors with `text`, and `negative`, in the place of captions"),
        )
    ]
    arguments, config = command.parse_optional(argv)
    with command.reports_user_errors():
        if (config is None) == (arguments.model is None):
            raise UserError("name what to sample: either --config FILE, a recipe, or --model NAME, a published model")
        options.check_target("--out", arguments.out, kind="folder")
        if config is None:
            _sample_model(arguments)
            return
        given = [option for option in of_model if getattr(arguments, option) is not None]
        if given:
            raise UserError(f"{options.spell(given[0])} belongs to --model: a recipe says it itself")
        _sample_recipe(config, arguments)


def _sample_recipe(config: ConfigDict, arguments: Namespace) -> None:
    sampler: Any = arguments.sampler or "few-step-sde"
    is_teacher = not sampler.startswith("few-step")
    prompts, seeds = _prompts(arguments), _parse_seeds(arguments.seeds)
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    if len(arguments.dit or []) > 1:
        raise UserError(f"--dit gives {len(arguments.dit)} checkpoints, a recipe has one network: give one")
    if not is_teacher and not arguments.dit:
        raise UserError("a student needs --dit PATH; --sampler euler samples the recipe's teacher")
    from rcm_jax.data import digits, text

    if config.data.name not in digits.VARIANTS:
        raise UserError(f"data.name={config.data.name!r} has no text encoder of its own: sample with --model")
    keep_compilations()
    import jax.numpy as jnp
    import numpy as np

    from rcm_jax.generation import generate, student_sampler, teacher_sampler
    from rcm_jax.train import create_network, load_params

    variant = digits.VARIANTS[config.data.name]
    network, shape = create_network(config), variant.latent_shape
    weights = arguments.dit[0] if arguments.dit else config.teacher.path
    if is_teacher:
        steps = config.sampling.teacher_steps if arguments.steps is None else arguments.steps
        negative = jnp.asarray(text.encode([""])[0])
        sample = teacher_sampler(
            config, network, shape, negative, steps=options.positive("--steps", steps), method=sampler
        )
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
    for (prompt, seed), latent in zip(rows, generated.latent_NTHWC, strict=True):
        metadata = {"prompt": prompt, "seed": seed, "dit": str(weights), **settings}
        video_THWC = digits.latent_to_video(latent, variant)
        write = partial(media.write_video, video_THWC=video_THWC, fps=digits.FPS, scale=8, metadata=metadata)
        print(_write_next(arguments.out, f"seed{seed}.mp4", write))


class Order(NamedTuple):
    """What is wanted of a published model."""

    published: Published
    sampling: dict[str, Any]  # inference.Settings
    prompts: list[str]
    negative: str
    seeds: list[int]
    given: Any  # the first frames, (G, H, W, 3), or None
    size: tuple[int, int]
    frames: int
    fps: int


def _sample_model(arguments: Namespace) -> None:
    """Checks everything, then lets text encoder, image encoders, network and decoder take turns in memory."""
    order = check_order(arguments)
    keep_compilations()
    import numpy as np

    from rcm_jax import inference

    settings = inference.Settings(**order.sampling)
    inference.sample_times(settings)
    parts = open_parts(arguments, order, settings)
    texts = inference.encode_texts(parts, len(order.prompts))
    condition = inference.Condition()
    if order.given is not None:
        covered = np.stack([media.cover(frame_HWC, order.size) for frame_HWC in order.given])
        condition = inference.encode_given(parts, order.given, covered, order.frames)
    rows = [(text, seed) for text in range(len(texts.text_NSD)) for seed in order.seeds]
    shape = parts.autoencoder.config.latent_shape((order.frames, *reversed(order.size)))
    latents = inference.sample_latents(parts.transformer, texts, rows, shape, settings, condition)
    videos = inference.decode(parts.autoencoder, latents, tiled=bool(arguments.tile))
    for (text, seed), video_THWC in zip(rows, videos, strict=True):
        prompt = order.prompts[text] if order.prompts else None
        metadata = {"prompt": prompt, "embedding": None if prompt else text, "seed": seed}
        metadata |= describe_order(arguments, order, parts.transformer.model)
        if order.frames == 1:
            name, write = f"seed{seed}.png", partial(media.write_image, image_HWC=video_THWC[0], metadata=metadata)
        else:
            name = f"seed{seed}.mp4"
            write = partial(media.write_video, video_THWC=video_THWC, fps=order.fps, metadata=metadata)
        print(_write_next(arguments.out, name, write))


def _write_next(folder: Path, name: str, write: Callable[..., None]) -> Path:
    """Writes a file under the number after those in a folder; another command may take that one meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    number = _next_number(folder)
    while True:
        path = folder / f"{number:04d}_{name}"
        try:
            write(path, replace=False)
            return path
        except FileExistsError:
            number += 1


def _next_number(folder: Path) -> int:
    """The number after those of the files that are in a folder."""
    numbers = (re.match(r"(\d+)_seed", path.name) for path in folder.glob("*_seed*"))
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def check_order(arguments: Namespace) -> Order:
    """Everything that can be known before a checkpoint is opened. Raises UserError for what does not fit."""
    published = find_published(arguments.model)
    for name in ("dit", "vae"):
        if getattr(arguments, name) is None:
            raise UserError(f"--model {arguments.model} needs --{name} PATH: give its checkpoint")
    if arguments.embeddings and (arguments.prompt or arguments.prompt_file):
        raise UserError(f"--embeddings {arguments.embeddings} takes the place of captions: leave --prompt out")
    if published.image_encoder and not arguments.image_encoder:
        raise UserError(f"{arguments.model} needs --image-encoder PATH: give CLIP's checkpoint")
    if arguments.image_encoder and not published.image_encoder:
        raise UserError(f"--image-encoder {arguments.image_encoder} is of no use to {arguments.model}: leave it out")
    options.check_dtype(arguments)
    frames = options.check_frames(arguments, published)
    given = _read_given(arguments, published, frames)
    return Order(
        published=published,
        sampling=options.check_sampling(arguments, published),
        prompts=[] if arguments.embeddings else _prompts(arguments),
        negative=published.negative if arguments.negative is None else arguments.negative,
        seeds=_parse_seeds(arguments.seeds),
        given=given,
        size=options.check_size(arguments.size or published.size, published.block, None if given is None else given[0]),
        frames=frames,
        fps=options.check_fps(published.fps if arguments.fps is None else arguments.fps),
    )


def _read_given(arguments: Namespace, published: Published, frames: int) -> Any:
    """The first frames of the video to make: an image, or the last frames of a video; None for none.

    Raises UserError for what does not fit the model.
    """
    image, video, count, allowed = (
        arguments.image,
        arguments.video,
        arguments.condition_frames,
        published.condition_frames,
    )
    if image and video:
        raise UserError(f"--image {image} and --video {video} both give the first frame: leave one out")
    if image and published.image == "none":
        raise UserError(f"--image {image} is of no use to {arguments.model}: leave it out")
    if video and not allowed:
        raise UserError(f"--video {video} is of no use to {arguments.model}: leave it out")
    if published.image == "required" and not (image or video):
        either = "--image FILE or --video PATH" if allowed else "--image FILE"
        raise UserError(f"{arguments.model} needs the first frame: give {either}")
    if count is not None and not video:
        raise UserError(f"--condition-frames {count} counts the frames of a video: give --video PATH, or leave it out")
    if not video:
        return media.read_image(image)[None] if image else None
    count = allowed[-1] if count is None else count
    if count not in allowed:
        raise UserError(f"--condition-frames {count} must be {' or '.join(map(str, allowed))}: choose one of them")
    if frames <= count:
        more = count + FRAME_FACTOR
        raise UserError(f"--frames {frames} leaves none to make after the {count} given: write --frames {more} or more")
    from rcm_jax.data.videos import read_last_frames

    return read_last_frames(video, count)


def open_parts(arguments: Namespace, order: Order, settings: Any) -> Any:
    """Opens every checkpoint, tokenises the captions and reads the embeddings; loads no network yet."""
    import jax.numpy as jnp

    from rcm_jax import inference
    from rcm_jax.convert import loading
    from rcm_jax.models import clip, vae

    published, dtype = order.published, jnp.dtype(options.check_dtype(arguments))
    mesh = options.make_mesh(arguments)
    encoder_device = options.choose_device("--encoder-device", arguments.encoder_device)
    vae_device = options.choose_device("--vae-device", arguments.vae_device)
    transformer = loading.open_transformer(arguments.dit, arguments.model, dtype=dtype, mesh=mesh)
    embedded = inference.read_embeddings(arguments.embeddings, transformer.config) if arguments.embeddings else {}
    captions = list(order.prompts)
    if max(settings.guidance) > 1 and "negative" not in embedded:
        captions.append(order.negative)
    tokens = text_encoder = image_encoder = None
    if captions:
        for name in ("text_encoder", "tokenizer"):
            if getattr(arguments, name) is None:
                raise UserError(f"{len(captions)} captions need {options.spell(name)} PATH: give it or --embeddings")
        tokenize, text_encoder = options.open_text_encoder(arguments, published, length=transformer.config.text_length)
        tokens = tokenize(captions)
    if published.image_encoder:
        preset = clip.PRESETS[published.image_encoder]
        image_encoder = loading.open_image_encoder(arguments.image_encoder, preset, dtype=dtype, device=encoder_device)
    autoencoder = loading.open_autoencoder(arguments.vae, vae.PRESETS[published.vae], dtype=dtype, device=vae_device)
    return inference.Parts(transformer, autoencoder, text_encoder, image_encoder, tokens, embedded)


def describe_order(arguments: Namespace, order: Order, model: str) -> dict[str, Any]:
    """The settings that all files of a command share."""
    has_guidance = max(order.sampling["guidance"]) > 1
    names = ("vae", "text_encoder", "tokenizer", "image_encoder", "embeddings", "image", "video")
    paths = {name: getattr(arguments, name) for name in names}
    return {
        "model": model,
        "dit": [str(path) for path in arguments.dit],
        **{name: path and str(path) for name, path in paths.items()},
        "dtype": options.check_dtype(arguments),
        "tile": bool(arguments.tile),
        **order.sampling,
        "negative": order.negative if has_guidance else None,
        "condition_frames": len(order.given) if arguments.video else None,
        "size": "x".join(map(str, order.size)),
        "frames": order.frames,
        "fps": order.fps,
    }


def _prompts(arguments: Namespace) -> list[str]:
    """The captions of the command line, then those of a file. Raises UserError if there is none."""
    prompts = arguments.prompt + options.read_prompts(arguments.prompt_file)
    if not prompts:
        raise UserError("there is no caption: give --prompt TEXT or --prompt-file FILE")
    return prompts


def _parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text} must be integers with commas between: write --seeds 0,1,2") from None
    if any(not 0 <= seed < 2**31 for seed in seeds):
        raise UserError(f"--seeds {text} must lie between 0 and {2**31 - 1}: choose others")
    return seeds


if __name__ == "__main__":
    main()
