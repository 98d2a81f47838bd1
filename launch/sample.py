"""Generates videos from captions: a distilled student in a few steps, or its guided teacher.

    python -m launch.sample --config=configs/digits_rcm.py --weights=runs/digits_rcm/ema.safetensors \
        --prompt="a three moving up and left" --steps=4 --seeds=0,1,2 --out=samples
    python -m launch.sample --config=configs/digits_rcm.py --teacher --prompt="a three moving up and left"
"""

from pathlib import Path

from launch import keep_compilations
from rcm_jax.config import Command, UserError


def main() -> None:
    """Reads the command line and writes one MP4 a prompt and seed, with its settings in the file's metadata."""
    command = Command(__doc__)
    command.add_argument("--weights", metavar="FILE", help="safetensors of the network (default: teacher.path)")
    command.add_argument("--teacher", action="store_true", help="sample as a teacher: guided Euler steps")
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a caption; may be repeated")
    command.add_argument("--prompt_file", metavar="FILE", help="a text file with one caption a line")
    command.add_argument("--steps", type=int, default=4, metavar="N", help="steps of a student (1 to 4)")
    command.add_argument("--kind", choices=("sde", "ode"), default="sde", help="how a student goes from step to step")
    command.add_argument("--seeds", default="0", metavar="N,N", help="seeds; each caption is sampled with each")
    command.add_argument("--out", default="samples", metavar="DIR", help="where the videos go")
    arguments, config = command.parse()
    with command.reports_user_errors():
        prompts = arguments.prompt + read_prompts(arguments.prompt_file)
        seeds = _parse_seeds(arguments.seeds)
        if not prompts:
            raise UserError("there is no caption: give --prompt TEXT or --prompt_file FILE")
        if not arguments.teacher and not arguments.weights:
            raise UserError("a student needs --weights FILE; --teacher samples the recipe's teacher")
        if config.data.name != "digits":
            raise UserError(f"data.name={config.data.name!r} cannot be sampled here: only 'digits' has a text encoder")
        keep_compilations()
        _sample(config, arguments, prompts, seeds)


def _sample(config, arguments, prompts, seeds) -> None:
    import jax.numpy as jnp
    import numpy as np

    from rcm_jax import media
    from rcm_jax.data import digits, text
    from rcm_jax.generation import generate, student_sampler, teacher_sampler
    from rcm_jax.train import create_network, load_params

    network, shape = create_network(config), (digits.FRAMES, digits.SIZE, digits.SIZE, 1)
    weights = arguments.weights or config.teacher.path
    if arguments.teacher:
        sampler = teacher_sampler(config, network, shape, jnp.asarray(text.encode([""])[0]))
        settings = {"steps": config.sampling.teacher_steps, "guidance": config.teacher.guidance}
    else:
        sampler = student_sampler(config, network, shape, steps=arguments.steps, kind=arguments.kind)
        settings = {"steps": arguments.steps, "kind": arguments.kind}
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    generated = generate(
        sampler,
        load_params(weights, network),
        text.encode([prompt for prompt, _ in rows]),
        np.array([seed for _, seed in rows]),
        batch_size=min(len(rows), 80),
        label="sampling",
    )
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for index, ((prompt, seed), latent) in enumerate(zip(rows, generated.latent_NTHWC, strict=True)):
        path = out / f"{index:04d}_seed{seed}.mp4"
        metadata = {"prompt": prompt, "seed": seed, "weights": str(weights), **settings}
        media.write_video(path, digits.latent_to_video(latent), fps=digits.FPS, scale=8, metadata=metadata)
        print(path)


def read_prompts(path: str | None) -> list[str]:
    """The lines of a text file that are not blank; none of no file. Raises UserError if it is not text."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {path} cannot be read as text: {error}") from None
    return [line.strip() for line in lines if line.strip()]


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
