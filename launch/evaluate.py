"""Scores a distilled digits run beside its teacher and writes report.html, report.json, a grid and videos.

python -m launch.evaluate --config=configs/digits_rcm.py --workdir=runs/digits_rcm
"""

from pathlib import Path

from launch import keep_compilations
from rcm_jax.config import Command, UserError


def main() -> None:
    """Reads the command line and scores the run."""
    command = Command(__doc__)
    command.add_argument("--workdir", metavar="DIR", required=True, help="the run; the reports are written there too")
    command.add_argument("--weights", metavar="FILE", help="the student (default: ema.safetensors of the run)")
    command.add_argument("--per_caption", type=int, default=8, metavar="N", help="videos of each of the 80 captions")
    arguments, config = command.parse()
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


if __name__ == "__main__":
    main()
