r"""Scores a distilled digits run beside its teacher; samples, scores and compares published models.

    python -m launch.evaluate --config=configs/digits_rcm.py --workdir=runs/digits_rcm
    python -m launch.evaluate sample --layout=vbench --prompt-file=VBench_full_info.json --out=student \
        --model=wan2.1-t2v-1.3b --dit=student.pth --vae=Wan2.1_VAE.pth \
        --text-encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl --sampler=few-step-sde
    python -m launch.evaluate score student --network=i3d.onnx --real=my_videos
    python -m launch.evaluate compare teacher student --out=compare.html

The first writes report.html, report.json, a grid and videos; `sample`, `score` and `compare` have a --help of their
own.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import keep_compilations
from rcm_jax import options
from rcm_jax.config import Command, UserError
from rcm_jax.layouts import LAYOUTS, Plan
from rcm_jax.published import find_published

SAMPLE = r"""Samples a benchmark's prompts into the folders and names that it reads.

    python -m launch.evaluate sample --layout=vbench --prompt-file=VBench_full_info.json --out=student \
        --model=wan2.1-t2v-1.3b --dit=student.pth --vae=Wan2.1_VAE.pth \
        --text-encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl --sampler=few-step-sde

VBench and VBench-2.0 (its dimension's folder) then read OUT/videos, GenEval OUT/images. The latents stay in
OUT/latents. An interrupted command goes on when it is given again: what is finished is not sampled again. What is left
out is as the model's authors have it.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and does what its first word says; without such a word it scores a digits run."""
    words = sys.argv[1:] if argv is None else list(argv)
    match words[:1]:
        case ["sample"]:
            _sample(words[1:])
        case _:
            _evaluate_digits(words)


def _evaluate_digits(words: Sequence[str]) -> None:
    command = Command(__doc__)
    command.add_argument("--workdir", metavar="DIR", required=True, help="the run; the reports are written there too")
    command.add_argument("--weights", metavar="FILE", help="the student (default: ema.safetensors of the run)")
    command.add_argument("--per_caption", type=int, default=8, metavar="N", help="videos of each of the 80 captions")
    arguments, config = command.parse(words)
    with command.reports_user_errors():
        workdir = Path(arguments.workdir)
        weights = Path(arguments.weights or workdir / "ema.safetensors")
        if not weights.exists():
            raise UserError(f"{weights} does not exist: finish the run with launch.train, or give --weights FILE")
        if arguments.per_caption < 2:
            raise UserError(f"--per_caption {arguments.per_caption} must be at least 2: diversity compares videos")
        keep_compilations()
        from rcm_jax.evaluation import evaluate, train_seconds
        from rcm_jax.train import create_network, load_params

        network, log = create_network(config), workdir / "metrics.jsonl"
        evaluate(
            config,
            network,
            load_params(config.teacher.path, network),
            load_params(weights, network),
            workdir,
            per_caption=arguments.per_caption,
            facts={"seeds": [config.seed], "stages": config.stages}
            | ({"train_seconds": train_seconds(log)} if log.exists() else {}),
            metrics_path=log if log.exists() else None,
        )
        print(f"wrote {workdir / 'report.html'}")


def _sample(words: Sequence[str]) -> None:
    command = Command(SAMPLE)
    command.prog += " sample"
    command.add_argument("--layout", choices=LAYOUTS, required=True, help="the benchmark")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the set of samples")
    command.add_argument("--count", type=int, metavar="N", help="samples of a prompt (default: the benchmark's)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seeds follow from it (default: 0)")
    command.add_argument("--chunk", type=int, default=128, metavar="N", help="samples of a turn (default: 128)")
    command.add_argument("--share", default="0/1", metavar="K/N", help="of N processes that share the work, this is K")
    command.add_argument("--drop-latents", action="store_true", help="remove each latent when its sample is written")
    options.add_model(command)
    options.add_parts(command)
    arguments = command.parse_args(words)
    with command.reports_user_errors():
        plan, share = _check_sample(arguments)
        prompts = list(dict.fromkeys(shot.prompt for shot in plan.shots))
        # What launch.sample takes besides: this command samples captions alone.
        besides = {"image": None, "image_encoder": None, "embeddings": None, "seeds": "0", "prompt": prompts}
        arguments = Namespace(**(vars(arguments) | besides | {"prompt_file": None}))
        _write_set(arguments, plan, share)


def _check_sample(arguments: Namespace) -> tuple[Plan, tuple[int, int]]:
    """The samples, and which of them are this process's. Raises UserError for what does not fit."""
    from rcm_jax.layouts import plan

    for name in ("model", "prompt_file"):
        if getattr(arguments, name) is None:
            raise UserError(f"sample needs {options.spell(name)}: give it")
    if find_published(arguments.model).image == "required":
        raise UserError(f"--model {arguments.model} starts from an image: choose a model that starts from text")
    if not 0 <= arguments.seed < 2**31:
        raise UserError(f"--seed {arguments.seed} must lie between 0 and {2**31 - 1}: choose another")
    for name in ("count", "chunk"):
        if getattr(arguments, name) is not None:
            options.positive(options.spell(name), getattr(arguments, name))
    if arguments.layout == "geneval" and arguments.frames is None:
        arguments.frames = 1
    frames = options.check_frames(arguments, find_published(arguments.model))
    if (frames == 1) != (arguments.layout == "geneval"):
        wanted = "--frames 1: it reads pictures" if frames > 1 else "--frames 81 or so: it reads videos"
        raise UserError(f"--layout {arguments.layout} cannot take {frames} frames: give {wanted}")
    share = _parse_share(arguments.share)
    return plan(arguments.layout, Path(arguments.prompt_file), count=arguments.count, seed=arguments.seed), share


def _parse_share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--share {text} must be K/N with K from 0 to N - 1: write --share 0/8")
    return int(number), int(count)


def _write_set(arguments: Any, plan: Plan, share: tuple[int, int]) -> None:
    """Checks the rest, opens every checkpoint and makes the samples."""
    from launch.sample import check_order, describe_order, open_parts

    order = check_order(arguments)
    keep_compilations()
    from rcm_jax import inference, sample_sets

    settings = inference.Settings(**order.sampling)
    inference.sample_times(settings)
    parts = open_parts(arguments, order, settings)
    facts = describe_order(arguments, order, parts.transformer.model)
    sampling = sample_sets.Sampling(
        parts=parts,
        prompts=order.prompts,
        settings=settings,
        shape_THWC=parts.autoencoder.config.latent_shape((order.frames, *reversed(order.size))),
        fps=order.fps,
        tiled=bool(arguments.tile),
        facts={"layout": arguments.layout, "first_seed": arguments.seed, **facts},
    )
    keep = not arguments.drop_latents
    sample_sets.write_set(arguments.out, plan, sampling, chunk=arguments.chunk, share=share, keep_latents=keep)
    print(f"{len(plan.shots)} samples of {len(order.prompts)} prompts are planned for {arguments.out}")


if __name__ == "__main__":
    main()
