r"""Makes a training set: of your videos, of a teacher's samples, or of official .tar shards; or exports one as such.

    python -m launch.precompute --out=data --name=foxes --videos=FOLDER --model=wan2.1-t2v-1.3b --vae=Wan2.1_VAE.pth \
        --text-encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl
    python -m launch.precompute --out=data --name=synthetic --prompt-file=prompts.txt --model=wan2.1-t2v-14b \
        --dit=Wan2.1-T2V-14B --text-encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl
    python -m launch.precompute --out=data --name=official --from-tar=shards \
        --negative-embedding=umT5_wan_negative_emb.pt
    python -m launch.precompute --out=data --name=foxes --to-tar=shards

Each video has its caption in a .txt file of the same name beside it, or --videos is a list: JSON lines of "path" and
"caption", or a .csv file with these columns. The first frames of each are taken, at the model's rate, and the middle
of each frame. What is left out is as the model's authors have it.

launch.train reads the set with --config.data.dir=DIR --config.data.name=NAME and
--config.teacher.negative_path=DIR/NAME/negative.safetensors. An interrupted command goes on when it is given again.
Networks are loaded once a shard; a shard's embeddings and latents, or a few videos, are in memory at once.
"""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from launch import keep_compilations
from rcm_jax import options
from rcm_jax.config import Command, UserError
from rcm_jax.published import Published, find_published

SHARD_SIZE = 64
MAX_BAD = 0.01
_MODEL = {"model", "text_encoder", "tokenizer", "size", "frames", "negative", "dtype", "shard_size", "encoder_device"}
_TIMES = {"sampler", "steps", "shift", "sigma_max", "mid_times"}
_SAMPLING = _TIMES | {"dit", "guidance", "seed", "repeat", "context", "tensor"}
# What each source takes, and what it needs.
TAKES = {
    "videos": _MODEL | {"vae", "fps", "tile", "vae_device"},
    "prompt_file": _MODEL | _SAMPLING,
    "from_tar": {"negative_embedding"},
    "to_tar": {"shard_size"},
}
NEEDS = {
    "videos": ("model", "vae", "text_encoder", "tokenizer"),
    "prompt_file": ("model", "dit", "text_encoder", "tokenizer"),
    "from_tar": (),
    "to_tar": (),
}


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and writes the data set, or exports it."""
    command = Command(__doc__)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of data sets")
    command.add_argument("--name", required=True, metavar="NAME", help="the data set, a folder in DIR")
    command.add_argument("--videos", type=Path, metavar="PATH", help="a folder of videos, or a list of them")
    command.add_argument("--from-tar", type=Path, nargs="+", metavar="PATH", help="official shards, or folders of them")
    command.add_argument("--to-tar", type=Path, metavar="DIR", help="exports the data set to this new folder")
    command.add_argument("--negative-embedding", type=Path, metavar="FILE", help="the official one, for --from-tar")
    command.add_argument("--shard-size", type=int, metavar="N", help=f"samples of a shard (default: {SHARD_SIZE})")
    command.add_argument("--repeat", type=int, metavar="N", help="samples of each caption (default: 1)")
    command.add_argument("--seed", type=int, metavar="N", help="seed of the first sample, counted on (default: 0)")
    command.add_argument(
        "--max-bad",
        type=float,
        default=MAX_BAD,
        metavar="X",
        help="share of samples that may be bad (default: %(default)s)",
    )
    options.add_model(command)
    options.add_parts(command)
    arguments = command.parse_args(argv)
    with command.reports_user_errors():
        given = _check(arguments)
        target = arguments.out / arguments.name
        if arguments.to_tar is None:
            options.check_target("--out", target, kind="folder")
        else:
            options.check_target("--to-tar", arguments.to_tar, kind="folder")
        keep_compilations()
        from rcm_jax import inputs, precompute

        if arguments.to_tar is not None:
            size = arguments.shard_size or SHARD_SIZE
            precompute.export_tar(target, arguments.to_tar, shard_size=size, max_bad=arguments.max_bad)
            return
        if arguments.from_tar is not None:
            source = precompute.from_tar(arguments.from_tar, arguments.negative_embedding)
        else:
            source = _open_source(arguments)
            networks = [*(arguments.dit or []), arguments.vae, arguments.text_encoder, arguments.tokenizer]
            given |= inputs.describe_checkpoints(networks)
        precompute.write_data_set(source, target, given, max_bad=arguments.max_bad)


def _check(arguments: Namespace) -> dict[str, str]:
    """What is given for the source, as text. Raises UserError for what does not fit it, or is missing."""
    sources = [name for name in TAKES if getattr(arguments, name) is not None]
    if len(sources) != 1:
        raise UserError(f"give one of {', '.join(map(options.spell, TAKES))}: there are {len(sources)}")
    (source,) = sources
    from rcm_jax.data import digits

    if not re.fullmatch(r"[A-Za-z]\w*", arguments.name, re.ASCII) or arguments.name in digits.VARIANTS:
        taken = " or ".join(digits.VARIANTS)
        raise UserError(
            f"--name {arguments.name} must be a word of letters, digits and _, and not {taken}: choose another"
        )
    if not 0 <= arguments.max_bad < 1:
        raise UserError(f"--max-bad {arguments.max_bad} must be at least 0 and less than 1")
    ours = {"out", "name", "max_bad"}
    given = {name: value for name, value in vars(arguments).items() if name not in ours and value is not None}
    for name in sorted(given.keys() - TAKES[source] - {source}):
        raise UserError(f"{options.spell(name)} is of no use to {options.spell(source)}: leave it out")
    for name in NEEDS[source]:
        if name not in given:
            raise UserError(f"{options.spell(source)} needs {options.spell(name)}: give it")
    for name in ("shard_size", "repeat"):
        if name in given:
            options.positive(options.spell(name), given[name])
    return {name: " ".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in given.items()}


def _open_source(arguments: Namespace) -> Any:
    """Opens every checkpoint and reads the list of videos or captions; loads no network yet."""
    published = find_published(arguments.model)
    if published.image == "required":
        raise UserError(f"--model {arguments.model} starts from an image: choose a text-to-video model")
    options.check_dtype(arguments)
    frames = options.check_frames(arguments, published)
    size = options.check_size(arguments.size or published.size, published.block)
    open_ = _open_captions if arguments.videos is None else _open_videos
    return open_(arguments, published, frames=frames, size=size, shard_size=arguments.shard_size or SHARD_SIZE)


def _open_videos(arguments: Namespace, published: Published, *, size: tuple[int, int], **shape: int) -> Any:
    fps = options.check_fps(published.fps if arguments.fps is None else arguments.fps)
    from rcm_jax import precompute
    from rcm_jax.convert.loading import open_autoencoder
    from rcm_jax.data.videos import list_clips
    from rcm_jax.models import vae

    clips, captions = list_clips(arguments.videos), _open_text(arguments, published)
    tiled, dtype = bool(arguments.tile), options.check_dtype(arguments)
    device = options.choose_device("--vae-device", arguments.vae_device)
    autoencoder = open_autoencoder(arguments.vae, vae.PRESETS[published.vae], dtype=dtype, device=device)
    return precompute.from_videos(clips, captions, autoencoder, size=size, fps=fps, tiled=tiled, **shape)


def _open_captions(
    arguments: Namespace, published: Published, *, size: tuple[int, int], frames: int, shard_size: int
) -> Any:
    sampling = options.check_sampling(arguments, published)
    prompts = options.read_prompts(arguments.prompt_file) * (arguments.repeat or 1)
    seed = arguments.seed or 0
    if not 0 <= seed <= 2**31 - max(1, len(prompts)):
        raise UserError(f"--seed {seed} must lie between 0 and {2**31 - 1}, with all that follow it: choose another")
    from rcm_jax import inference, precompute
    from rcm_jax.convert.loading import open_transformer
    from rcm_jax.models import vae

    mesh, settings = options.make_mesh(arguments), inference.Settings(**sampling)
    inference.sample_times(settings)  # raises for steps that do not fit
    return precompute.from_captions(
        prompts,
        _open_text(arguments, published),
        open_transformer(arguments.dit, arguments.model, dtype=options.check_dtype(arguments), mesh=mesh),
        settings,
        latent_shape=vae.PRESETS[published.vae].latent_shape((frames, size[1], size[0])),
        seed=seed,
        shard_size=shard_size,
    )


def _open_text(arguments: Namespace, published: Published) -> Any:
    from rcm_jax.models import umt5
    from rcm_jax.precompute import Captions

    tokenize, encoder = options.open_text_encoder(arguments, published, length=umt5.TEXT_LENGTH)
    dim = umt5.PRESETS[published.text_encoder].dim
    negative = published.negative if arguments.negative is None else arguments.negative
    return Captions(tokenize, encoder, umt5.TEXT_LENGTH, dim, negative)


if __name__ == "__main__":
    main()
