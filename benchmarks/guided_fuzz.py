"""Inputs of one kind of fuzz.py, drawn by hypothesis from bytes that libFuzzer chooses by what they make run.

`python -m benchmarks.fuzz --engine=atheris` starts it; it needs atheris (github.com/google/atheris).
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import atheris  # pyright: ignore[reportMissingModuleSource]
from hypothesis import given, settings

SECONDS = 60  # an input that takes longer counts as a hang


def main() -> None:
    """Takes a kind, a number of inputs and an empty folder; prints, as JSON, what fuzz.fuzz returns.

    `kept` is the number of inputs that reached something new, from which libFuzzer makes others. A fault ends it with
    a traceback that names the input, and another code than 0.
    """
    kind, examples, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    # What is imported here reports which branches it takes.
    with atheris.instrument_imports(include=["rcm_jax"]):  # pyright: ignore[reportAttributeAccessIssue]
        from benchmarks import fuzz
    read, inputs = fuzz.TARGETS[kind]
    kept, place = folder / "kept", folder / "place"
    kept.mkdir()
    place.mkdir()
    counts, began = Counter(read=0, refused=0), time.monotonic()

    @settings(deadline=None, database=None)
    @given(inputs)
    def check_one(value: str | bytes) -> None:
        try:
            fuzz.check(read, value, place, counts)
        except BaseException:
            print(f"The input was {value!r}", file=sys.stderr)
            raise
        if counts.total() == examples:
            result = {**counts, "kept": len(list(kept.iterdir())), "seconds": round(time.monotonic() - began)}
            print(json.dumps(result), flush=True)
            os._exit(0)  # libFuzzer takes any other end of the process for a fault

    # Bytes that end before an input is drawn are none: they do not count.
    words = [f"-artifact_prefix={folder}/", f"-timeout={SECONDS}", "-len_control=0", "-verbosity=0", str(kept)]
    atheris.Setup([sys.argv[0], *words], check_one.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
