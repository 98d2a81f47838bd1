"""Trains a teacher or distils one: everything a recipe describes.

    python -m launch.train --config=configs/digits_rcm.py --workdir=runs/digits_rcm --config.seed=1

The same command resumes a run that was interrupted.
"""

from launch import keep_compilations
from rcm_jax.config import Command


def main() -> None:
    """Reads the command line and runs the recipe."""
    command = Command(__doc__)
    command.add_argument("--workdir", metavar="DIR", required=True, help="where the run keeps all that it writes")
    arguments, config = command.parse()
    with command.reports_user_errors():
        keep_compilations()
        from rcm_jax.train import train  # only now: a mistake on the command line need not wait for JAX

        train(config, arguments.workdir)


if __name__ == "__main__":
    main()
