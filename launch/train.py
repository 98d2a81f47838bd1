"""Trains a teacher or distils one: everything a recipe describes.

    python -m launch.train --config=configs/digits_rcm.py --workdir=runs/digits_rcm --config.seed=1

The same command resumes a run that was interrupted. With several processes, start it in each with --distributed.

Exit codes: 0 done; 2 a mistake to mend; 3 the numbers went wrong; 75 asked to end by SIGTERM, after a checkpoint. After
75, 1 and death by a signal, start the same command again: it continues.
"""

import faulthandler
import sys

from launch import ends_together, join_processes, keep_compilations, set_determinism
from rcm_jax import options
from rcm_jax.config import Command


def main() -> None:
    """Reads the command line and runs the recipe."""
    command = Command(__doc__)
    command.add_argument("--workdir", metavar="DIR", required=True, help="where the run keeps all that it writes")
    command.add_argument("--distributed", action="store_true", help="this is one of several processes of the run")
    arguments, config = command.parse()
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # a crash outside Python tells where
    with command.reports_user_errors():
        options.check_target("--workdir", arguments.workdir, kind="folder")
        set_determinism(config.deterministic)
        keep_compilations()
        if arguments.distributed:
            join_processes()
        from rcm_jax.train import train  # only now: a mistake on the command line need not wait for JAX

        with ends_together():
            train(config, arguments.workdir)


if __name__ == "__main__":
    main()
