"""Distils the shipped digits teacher, samples, scores and reports: what `make demo` runs.

    python -m launch.demo --workdir=runs/demo

About eight minutes on two CPU cores. The same command resumes what was interrupted and shows what is finished.
"""

import json
import time
from pathlib import Path

from ml_collections import ConfigDict

from launch import keep_compilations
from rcm_jax import options
from rcm_jax.config import Command, UserError, load
from rcm_jax.media import json_text

CONFIG = Path(__file__).parent.parent / "configs" / "digits_rcm.py"
PER_CAPTION = 8


def main() -> None:
    """Runs the recipe, then its evaluation, unless both are there already."""
    command = Command(__doc__)
    command.add_argument("--workdir", metavar="DIR", required=True, help="where everything is written")
    arguments = command.parse_args()
    with command.reports_user_errors():
        options.check_target("--workdir", arguments.workdir, kind="folder")
        workdir, config = Path(arguments.workdir), load(CONFIG)
        _check_recipe(workdir, config)
        if not (workdir / "report.json").exists():
            _run(workdir, config)
        _print_scores(json.loads((workdir / "report.json").read_text()))
        print(f"\nEverything is in {workdir}: open report.html in a browser, or look at grid.png and videos/.")


def _check_recipe(workdir: Path, config: ConfigDict) -> None:
    """Raises UserError if the folder holds a run of another recipe: resuming it would mix the two."""
    info = workdir / "run.json"
    if info.exists() and json.loads(info.read_text())["config"] != json.loads(json_text(config.to_dict())):
        raise UserError(f"{workdir} holds a run of another recipe: remove it, or give another --workdir")


def _run(workdir: Path, config: ConfigDict) -> None:
    keep_compilations()
    from rcm_jax.evaluation import evaluate, training_facts
    from rcm_jax.train import create_network, load_params, train

    start = time.monotonic()
    train(config, workdir)
    network, log = create_network(config), workdir / "metrics.jsonl"
    evaluate(
        config,
        network,
        load_params(config.teacher.path, network),
        load_params(workdir / "ema.safetensors", network),
        workdir,
        per_caption=PER_CAPTION,
        facts=training_facts(log) | {"seeds": [config.seed], "stages": config.stages},
        metrics_path=log,
    )
    print(f"the demo took {time.monotonic() - start:.0f} seconds")


def _print_scores(summary: dict) -> None:
    scores = summary["scores"]
    rows = {"real videos": scores["real"], "teacher": scores["teacher"]}
    rows |= {f"student, {steps} step{'s' * (steps != '1')}": value for steps, value in scores["student"].items()}
    print(f"\n{'':18} caption accuracy  Frechet distance  recall  diversity")
    for name, row in rows.items():
        accuracy, frechet = row["caption_accuracy"], row["frechet"]
        print(f"{name:18} {accuracy:16.1%}  {frechet:16.2f}  {row['recall']:6.3f}  {row['diversity']:9.3f}")
    took = f"; training took {summary['train_seconds']:.0f} s" if "train_seconds" in summary else ""
    print(f"sampling is {summary['sampling_speedup']:.0f} times faster{took}")


if __name__ == "__main__":
    main()
