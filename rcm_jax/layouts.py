"""The folders and file names in which benchmarks read samples, and the prompt files that they come with.

Sources, as of 2026: vbench/__init__.py, prompts/README.md and VBench-2.0/prompts/README.md of
github.com/Vchitect/VBench; README.md, generation/diffusers_generate.py and evaluation/evaluate_images.py of
github.com/djghosh13/geneval.

VBench takes the suffix of all videos from whatever file it is shown first, so a folder of videos holds nothing else.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rcm_jax.config import UserError
from rcm_jax.plain_text import check_text, read_text

LayoutName = Literal["vbench", "vbench2", "geneval"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)
COUNTS = {"vbench": 5, "vbench2": 3, "geneval": 4}  # samples of a prompt
DIVERSITY, DIVERSITY_COUNT = "Diversity", 20  # the dimension of VBench-2.0 that takes more
SHORTENED = 180  # characters of a prompt in VBench-2.0's names; VBench's names have them all
LONGEST = 220  # bytes of a name without its suffix: file systems take 255, with what is put around unfinished names


class Shot(NamedTuple):
    """A sample that is wanted: its prompt, which of the prompt's samples it is, its seed, and its file in the set.

    The model is given the caption, which is the prompt or a longer form of it.
    """

    prompt: str
    index: int
    seed: int
    path: Path
    caption: str


class Plan(NamedTuple):
    """The samples that a benchmark wants, and text files that it reads beside them: path in the set -> text."""

    shots: list[Shot]
    files: Mapping[Path, str]


class _Entry(NamedTuple):
    """A prompt of a file: its folder among the samples, the whole of its line, and its caption."""

    prompt: str
    folder: str = ""
    line: str = ""
    caption: str = ""


def plan(
    layout: LayoutName, prompt_file: Path, *, captions: Path | None = None, count: int | None = None, seed: int = 0
) -> Plan:
    """The samples that a benchmark wants of each prompt, in the order of the prompts.

    A prompt that is there twice is sampled once, except for GenEval, which numbers them. A sample's seed follows from
    `seed`, the prompt and the sample's number, so it is the same whatever else is sampled.

    Args:
        layout: "vbench" puts videos/PROMPT-INDEX.mp4, "vbench2" videos/DIMENSION/PROMPT-INDEX.mp4 with 180 characters
            of the prompt, "geneval" images/NUMBER/samples/INDEX.png with the prompt's line in metadata.jsonl.
        prompt_file: VBench_full_info.json or VBench2_full_info.json, a text file with one prompt a line (for "vbench2"
            called DIMENSION.txt), or GenEval's evaluation_metadata.jsonl.
        captions: a text file with a line for each prompt, in their order, that the model is given in its place.
        count: samples of a prompt; None as many as the benchmark wants.
        seed: 0 to 2^31 - 1.

    Raises:
        UserError: the file is not such a file, there is not a caption for each prompt, or a prompt makes no file name,
            or the name of another prompt.
    """
    entries = list(_read_entries(layout, prompt_file))
    if not entries:
        raise UserError(f"--prompt-file {prompt_file} has no prompt: give one with some")
    if captions is not None:
        entries = _with_captions(entries, captions, prompt_file)
    once: dict[tuple[str, ...], _Entry] = {}
    for entry in entries:
        once.setdefault(entry[:3], entry)
    shots, files = [], {}
    for number, entry in enumerate(once.values()):
        folder = Path("images", f"{number:05d}") if layout == "geneval" else Path("videos", entry.folder)
        if layout == "geneval":
            files[folder / "metadata.jsonl"] = entry.line + "\n"
        for index in range(count or _count(layout, entry)):
            name = f"samples/{index:05d}.png" if layout == "geneval" else _name(layout, entry.prompt, index)
            path = folder / name
            caption = entry.caption or entry.prompt
            shots.append(Shot(entry.prompt, index, draw_seed(seed, entry.prompt, index), path, caption))
    _check_names(shots)
    return Plan(shots, files)


def draw_seed(seed: int, prompt: str, index: int) -> int:
    """The seed, 0 to 2^31 - 1, of one sample of a prompt."""
    return zlib.crc32(json.dumps([seed, prompt, index]).encode()) % 2**31


def _count(layout: LayoutName, entry: _Entry) -> int:
    return DIVERSITY_COUNT if layout == "vbench2" and entry.folder == DIVERSITY else COUNTS[layout]


def _name(layout: LayoutName, prompt: str, index: int) -> str:
    """The file name of a video. Raises UserError for a prompt that makes none."""
    name = f"{prompt[:SHORTENED] if layout == 'vbench2' else prompt}-{index}"
    if name.startswith(".") or "/" in name or min(name) < " ":
        rule = "must not start with a dot, and must have no slash and no control character"
        raise UserError(f"prompt {prompt!r} makes a file name, which {rule}: change it in the prompt file")
    if (length := len(name.encode())) > LONGEST:
        raise UserError(f"prompt {prompt!r} makes a file name of {length} bytes, {LONGEST} are possible: shorten it")
    return f"{name}.mp4"


def _check_names(shots: list[Shot]) -> None:
    prompts: dict[Path, str] = {}
    for shot in shots:
        other = prompts.setdefault(shot.path, shot.prompt)
        if other != shot.prompt:
            raise UserError(f"prompts {other!r} and {shot.prompt!r} share the name {shot.path.name}: leave one out")


def _with_captions(entries: list[_Entry], path: Path, prompt_file: Path) -> list[_Entry]:
    lines = [line.strip() for line in read_text(path, "--captions").splitlines() if line.strip()]
    if len(lines) != len(entries):
        raise UserError(
            f"--captions {path} has {len(lines)} lines, {prompt_file} has {len(entries)} prompts: give a line for each"
        )
    return [entry._replace(caption=line) for entry, line in zip(entries, lines, strict=True)]


def _read_entries(layout: LayoutName, path: Path) -> Iterator[_Entry]:
    text = read_text(path, "--prompt-file")
    if layout == "geneval":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                row = _parse(path, line, f", line {number}")
                # The number makes entries of one line two: a line's samples lie under its number.
                yield _Entry(_text(path, row, "prompt"), str(number), line.strip())
    elif path.suffix == ".json":
        rows = _parse(path, text, "")
        for row in rows if isinstance(rows, list) else [rows]:
            prompt = _text(path, row, "prompt_en")
            dimensions = row.get("dimension") if layout == "vbench2" else [""]
            if not (isinstance(dimensions, list) and dimensions and all(isinstance(name, str) for name in dimensions)):
                raise UserError(
                    f"--prompt-file {path}: {prompt!r} must have a list of names as its dimension: correct it"
                )
            yield from (_Entry(prompt, _folder(path, name)) for name in dimensions)
    else:
        folder = path.stem if layout == "vbench2" else ""
        yield from (_Entry(line.strip(), folder) for line in text.splitlines() if line.strip())


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--prompt-file {path}{where} is not JSON ({error}): give the benchmark's own file") from None


def _text(path: Path, row: Any, key: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not (isinstance(value, str) and value.strip()):
        raise UserError(f"--prompt-file {path} has an entry without {key!r}: give the benchmark's own file")
    return check_text(value.strip(), f"--prompt-file {path} has an entry whose {key!r}")


def _folder(path: Path, name: str) -> str:
    if "/" in name or name.startswith("."):
        raise UserError(f"--prompt-file {path} has the dimension {name!r}, which makes no folder: correct it")
    return check_text(name, f"--prompt-file {path} has a dimension that")
