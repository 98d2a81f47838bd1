"""Converts a checkpoint between Wan's own layout, rCM's, diffusers' and ours, tensor by tensor.

    python -m launch.convert Wan2.1-T2V-14B teacher.orbax --model wan2.1-t2v-14b --to orbax
    python -m launch.convert runs/wan ema.pth --model wan2.1-t2v --to rcm --dtype bf16
    python -m launch.convert Wan2.2-T2V-A14B/low_noise_model merged --model wan2.2-t2v --to diffusers \
        --add-delta Wan2.1-T2V-14B runs/wan

What SRC holds is detected: a file of safetensors, .pth or .pt; a folder of safetensors with or without an index; a
PyTorch distributed checkpoint (.dcp); an Orbax checkpoint or a run that has one. An interrupted conversion goes on when
the same command is given again.
"""

from pathlib import Path

from rcm_jax import options
from rcm_jax.config import Command, UserError


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and converts."""
    command = Command(__doc__)
    command.add_argument("source", metavar="SRC", type=Path, help="the checkpoint: a file or a folder")
    command.add_argument("target", metavar="DST", type=Path, help="what to write: a path that does not exist")
    command.add_argument("--model", required=True, metavar="NAME", help="such as wan2.1-t2v-14b, or without the size")
    command.add_argument("--to", required=True, choices=("orbax", "wan", "rcm", "diffusers"), help="the layout of DST")
    command.add_argument(
        "--part", choices=("student", "ema", "teacher", "fake"), help="the network to take (default: ema, else student)"
    )
    command.add_argument("--dtype", choices=("bf16", "f32"), help="what the numbers become (default: kept)")
    merges = command.add_mutually_exclusive_group()
    merges.add_argument(
        "--add-delta", nargs=2, type=Path, metavar=("TEACHER", "STUDENT"), help="add student - teacher to SRC"
    )
    merges.add_argument("--lora", type=Path, metavar="FILE", help="add a LoRA of Wan to SRC")
    command.add_argument("--scale", type=options.number, metavar="X", help="how much of it to add (default: 1)")
    arguments = command.parse_args(argv)
    with command.reports_user_errors():
        if arguments.scale is not None and not (arguments.add_delta or arguments.lora):
            raise UserError(f"--scale {arguments.scale} scales nothing: give --add-delta or --lora, or leave it out")
        from rcm_jax.convert.conversion import convert  # only now: a mistake need not wait for JAX

        convert(
            arguments.source,
            arguments.target,
            model=arguments.model,
            to=arguments.to,
            part=arguments.part,
            dtype=arguments.dtype,
            delta=arguments.add_delta and tuple(arguments.add_delta),
            lora=arguments.lora,
            scale=1.0 if arguments.scale is None else arguments.scale,
        )


if __name__ == "__main__":
    main()
