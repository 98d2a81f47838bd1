"""How long the accelerator waits for data: the loader beside steps that take a given time.

    python -m benchmarks.input --out=benchmarks/results/input.json

The records are moving digits, and random ones of the size of Wan's at 480p: latents of 21 x 60 x 104 x 16, float32, and
embeddings of 512 x 4096, bfloat16, 12.6 MB each, written to a temporary folder first. As in `launch.train`, the host
hands over the data of a step while the step before runs, then waits for that to end. An accelerator that takes a given
time for a step waits where its next step comes later than its last one ended.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds

from rcm_jax import media, sharding, train
from rcm_jax.data import pipeline

RECORDS = 32
LATENT, TEXT = (21, 60, 104, 16), (512, 4096)


class Load(NamedTuple):
    """Samples that a host takes for each step, the seconds of the step, and whether records are decoded once."""

    records: str
    samples: int
    seconds: float
    what: str
    in_memory: bool = False


LOADS = (
    Load("digits", 32, 0.25, "digits_rcm on two CPU cores"),
    Load("digits", 256, 0.02, "digits_teacher on one H200", in_memory=True),
    Load("wan", 4, 20.0, "wan2_1_t2v_14b, 16 hosts of 4 TPU v5p"),
    Load("wan", 64, 60.0, "wan2_1_t2v_1_3b, 4 hosts of 4 TPU v5p"),
)


class Records(tfds.core.GeneratorBasedBuilder):
    """Random records of Wan's size."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded

    def _info(self) -> tfds.core.DatasetInfo:
        latent = tfds.features.Tensor(shape=LATENT, dtype=np.float32, encoding="bytes")
        text = tfds.features.Tensor(shape=TEXT, dtype=ml_dtypes.bfloat16, encoding="bytes")
        features = tfds.features.FeaturesDict({"latent": latent, "text": text, "prompt": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        random = np.random.default_rng(0)
        for key in range(RECORDS):
            text = random.standard_normal(TEXT, np.float32).astype(ml_dtypes.bfloat16)
            yield key, {"latent": random.standard_normal(LATENT, np.float32), "text": text, "prompt": str(key)}


def main() -> None:
    """Measures every load, prints a Markdown table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON of all measurements")
    parser.add_argument(
        "--steps",
        type=int,
        default=10,
        metavar="N",
        help="least number of steps of a load, after two of warm-up; short ones take five seconds",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tfds.display_progress_bar(False)
        builder = Records(data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
        names = {"digits": "digits", "wan": str(builder.data_path)}
        rows = [measure(load, names[load.records], folder, arguments.steps) for load in LOADS]
    facts = {"command": " ".join(["python -m benchmarks.input", *sys.argv[1:]]), "machine": platform.machine()}
    facts |= {"cpus": os.cpu_count(), "jax": jax.__version__, "rows": rows}
    media.write_file(arguments.out, media.json_text(facts, indent=1).encode())
    print(table(rows))


def measure(load: Load, name: str, data_dir: str, steps: int) -> dict[str, Any]:
    """Mean seconds that the host works for a step, and that the accelerator waits, over so many steps or more."""
    mesh = sharding.make_mesh()
    source = pipeline.open_source(name, data_dir, "train")
    source = pipeline.InMemory(source) if load.in_memory else source
    batches = pipeline.make_loader(source, batch_size=load.samples, seed=0)
    work, waits, end = [], [], time.perf_counter()
    for _ in range(max(steps, round(5 / load.seconds)) + 2):
        start, step_before = time.perf_counter(), end
        jax.block_until_ready(train.to_mesh(next(batches), mesh, load.samples))
        now = time.perf_counter()
        work.append(now - start)
        waits.append(max(0.0, now - step_before))
        end = max(now, step_before) + load.seconds
        time.sleep(max(0.0, step_before - now))
    batches.close()
    return load._asdict() | {"work": float(np.mean(work[2:])), "wait": float(np.mean(waits[2:]))}


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of the measurements."""
    lines = ["| load | samples a host | step, s | host's work, ms | wait, ms | share |", "|---|---|---|---|---|---|"]
    for row in rows:
        share = row["wait"] / (row["wait"] + row["seconds"])
        times = f"{row['work'] * 1e3:.1f} | {row['wait'] * 1e3:.1f} | {share:.2%}"
        lines.append(f"| {row['what']} | {row['samples']} | {row['seconds']:g} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
