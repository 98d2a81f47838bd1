"""Feeds what a user or an accident may feed: every input is read, or refused by one UserError of one line.

    python -m benchmarks.fuzz --examples=100000 --out=benchmarks/results/fuzz.json

For overrides of the config, prompts, prompt files, safetensors files, PyTorch's files and .tar shards, hypothesis makes
that many inputs each. Any other exception, a message of several lines or of more than a few screens, or a file left
behind ends it with the smallest input that shows the fault. Results of kinds that are not asked for stay in the file.

--engine=atheris lets libFuzzer choose inputs instead, by what of rcm_jax they make run: guided_fuzz.py.
"""

import importlib.util
import io
import json
import os
import platform
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.processes import measure_apart
from rcm_jax import media
from rcm_jax.checkpoint import load_safetensors
from rcm_jax.config import LONGEST_MESSAGE, Command, UserError, load
from rcm_jax.convert.tensors import LazyTensor
from rcm_jax.convert.torch_file import Region, encode_tensor, read_value
from rcm_jax.data import tar_file, tar_shards, text
from rcm_jax.data.samples import BadSampleError
from rcm_jax.options import read_prompts

SUPPRESSED = [
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
    HealthCheck.too_slow,
]
RECIPE = Path(__file__).parent.parent / "configs" / "digits_rcm.py"
SOUND = safetensors.numpy.save(
    {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.int8)}, {"m": "x"}
)

words = st.text(max_size=30) | st.sampled_from(
    ["none", "True", "1e400", "nan", "-0", "9" * 5000, "(" * 200, "()", "{}"]
)
likely = st.sampled_from(["1", "8", "0.5", "true", "none", "float32", "(1.0, 0.5)", "scm:3,rcm:5", "a/path"])
numbers = st.integers().map(str) | st.floats().map(str)
tuples = st.recursive(
    numbers, lambda inner: st.lists(inner, max_size=4).map(lambda x: f"({','.join(x)},)"), max_leaves=8
)
stages = st.lists(
    st.tuples(st.sampled_from(["scm", "dcm", "dmd", "rcm", "flow_matching", "", "x"]), numbers | words), max_size=4
).map(lambda pairs: ",".join(f"{loss}:{count}" for loss, count in pairs))


sizes = st.lists(st.integers(-1, 40) | st.sampled_from([2**31, 2**62, 2**64]), max_size=3)
dtypes = st.sampled_from(["F32", "F64", "BF16", "F16", "I64", "BOOL", "U8", "F8_E4M3", "F4", "C64", "X", 3])
entries = st.fixed_dictionaries(
    {}, optional={"dtype": dtypes, "shape": sizes | words, "data_offsets": sizes | words, "extra": words}
)


@st.composite
def overrides(draw: st.DrawFn) -> str:
    """KEY=VALUE with a key that exists, or nearly, and any value."""
    known = draw(st.sampled_from(KEYS))
    key = draw(st.sampled_from([*5 * [known], known[:-1], known.partition(".")[0]]) | words)
    return (
        key + draw(st.sampled_from([*5 * ["="], "", "=="])) + draw(likely | likely | numbers | tuples | stages | words)
    )


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """A sound file with another length, another header, other bytes or an early end; or bytes at random."""
    header = json.loads(SOUND[8 : 8 + int.from_bytes(SOUND[:8], "little")])
    for entry in draw(st.lists(st.sampled_from(sorted(header)), max_size=2, unique=True)):
        header[entry] = draw(entries.map(header[entry].__or__) | words)
    coded = json.dumps(header).encode()
    length = draw(mostly(len(coded), st.integers(0, 2**64 - 1) | st.integers(0, 300)))
    return draw(damaged(length.to_bytes(8, "little") + coded + SOUND[-24:]))


SOUND_PT = encode_tensor(np.arange(6, dtype=np.float32).reshape(2, 3))


@st.composite
def torch_files(draw: st.DrawFn) -> bytes:
    """A sound file with another pickle in a whole archive, other bytes or an early end; or bytes at random."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(SOUND_PT)) as sound, zipfile.ZipFile(file, "w") as archive:
        for name in sound.namelist():
            content = sound.read(name)
            archive.writestr(name, draw(damaged(content)) if draw(st.booleans()) else content)
    return draw(mostly(file.getvalue(), damaged(file.getvalue())))


def sound_tar() -> bytes:
    """A shard of two samples."""
    file = io.BytesIO()
    tensors = encode_tensor(np.zeros((2, 1, 1, 1), np.float32)), encode_tensor(np.zeros((2, 1), np.float16))
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key in ("a", "b"):
            for suffix, content in zip(tar_shards.SUFFIXES, (*tensors, b"a fox"), strict=True):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


SOUND_TAR = sound_tar()
HEADERS = [
    0,
    *(at for at in range(tar_file.BLOCK, len(SOUND_TAR), tar_file.BLOCK) if SOUND_TAR[at + 257 : at + 262] == b"ustar"),
]
# Where a header says a name, a size, a kind, the format and a prefix, and what it may say there.
fields = st.one_of(
    st.tuples(st.just(0), st.sampled_from([b"a.latent.pt\0", b"/a.latent.pt\0", b"a/../b\0", b"\xff", b"\0", b"./"])),
    st.tuples(
        st.just(124), st.sampled_from([b"%011o\0" % n for n in (0, 3, 511, 512, 600, 8**11 - 1)] + [b"\x80", b"-1"])
    ),
    st.tuples(st.just(156), st.sampled_from([b"%c" % kind for kind in b"\x00\x301234567xgLKS~"])),
    st.tuples(st.just(257), st.sampled_from([b"ustar  \0", bytes(8), b"ustar\x0000"])),
    st.tuples(st.just(345), st.binary(max_size=8) | st.sampled_from([b"..", b"/", b"part"])),
    st.tuples(st.integers(0, 511), st.binary(min_size=1, max_size=12)),
)


@st.composite
def tar_files(draw: st.DrawFn) -> bytes:
    """A sound shard with other headers, whose sums mostly fit, other bytes or an early end; or bytes at random."""
    data = bytearray(SOUND_TAR)
    for at in draw(st.lists(st.sampled_from(HEADERS), max_size=2)):
        offset, value = draw(fields)
        data[at + offset : at + offset + len(value)] = value
        if draw(mostly(True, st.just(False))):
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + tar_file.BLOCK])
    return draw(damaged(bytes(data)))


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """Other bytes or an early end, mostly neither; or bytes at random."""
    data = bytearray(sound)
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=2)):
        data[place] = value
    data = bytes(data[: draw(mostly(len(data), st.integers(0, len(data))))])
    return draw(mostly(data, st.binary(max_size=1200)))


def mostly(value: Any, others: st.SearchStrategy) -> st.SearchStrategy:
    """The value, four times in five."""
    return st.sampled_from([*4 * [st.just(value)], others]).flatmap(lambda chosen: chosen)


def flat(config: dict, prefix: str = "") -> list[str]:
    """The dotted keys of a config."""
    keys = [
        flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key] for key, value in config.items()
    ]
    return [key for group in keys for key in group]


KEYS = flat(load(RECIPE).to_dict())


def read_override(override: str, folder: Path) -> None:
    load(RECIPE, [override])


def read_prompt(prompt: str, folder: Path) -> None:
    text.encode([prompt])


def read_prompt_file(data: bytes, folder: Path) -> None:
    (folder / "input").write_bytes(data)
    read_prompts(str(folder / "input"))


def read_safetensors(data: bytes, folder: Path) -> None:
    (folder / "input").write_bytes(data)
    tensors, _ = load_safetensors(folder / "input")
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)


def read_torch(data: bytes, folder: Path) -> None:
    (folder / "input").write_bytes(data)
    value = read_value(Region(folder / "input"))
    if isinstance(value, LazyTensor):
        value.read()


def read_tar(data: bytes, folder: Path) -> None:
    (folder / "input").write_bytes(data)
    for shard in tar_shards.open_shards([folder / "input"]):
        for sample in tar_shards.read_samples(shard):
            if isinstance(sample, BadSampleError):
                check_message(str(sample))
            else:
                assert sample.latent_THWC.nbytes + sample.text_SD.nbytes <= len(data)


TARGETS: dict[str, tuple[Callable, st.SearchStrategy]] = {
    "config overrides": (read_override, overrides()),
    "prompts": (read_prompt, st.text() | st.text(max_size=5).map(lambda part: part * 5000)),
    "prompt files": (read_prompt_file, st.binary() | st.text().map(str.encode)),
    "safetensors files": (read_safetensors, safetensors_files()),
    "PyTorch files": (read_torch, torch_files()),
    "tar shards": (read_tar, tar_files()),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Fuzzes every target and prints how many inputs were read and how many refused."""
    command = Command(__doc__)
    command.add_argument("--examples", type=int, default=100_000, metavar="N", help="inputs of each kind")
    command.add_argument("--out", type=Path, metavar="FILE", help="a JSON file for the result")
    command.add_argument("--kinds", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="KIND", help="of inputs")
    command.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis", help="chooses the inputs")
    arguments = command.parse_args(argv)
    is_guided = arguments.engine == "atheris"
    with command.reports_user_errors():
        if is_guided and importlib.util.find_spec("atheris") is None:
            raise UserError("--engine atheris needs a package that is not installed: pip install atheris")
    machine = (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, jax {jax.__version__}"
    )
    result = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    for kind in arguments.kinds:
        name = f"{kind}, atheris" if is_guided else kind
        found = fuzz_apart(kind, arguments.examples) if is_guided else fuzz(*TARGETS[kind], arguments.examples)
        result |= {"machine": machine, name: found}
        print(f"{name}: {found}", flush=True)
        if arguments.out:
            media.write_file(arguments.out, json.dumps(result, indent=2).encode() + b"\n")


def check_message(message: str) -> None:
    """Fails unless it is one line of a length to be read."""
    assert message.isprintable()
    assert len(message) <= LONGEST_MESSAGE + len(" ... ")


def check(read: Callable, value: str | bytes, folder: Path, counts: Counter[str]) -> None:
    """Reads an input in a folder and counts it as read or refused; fails for any other end."""
    try:
        read(value, folder)
        counts["read"] += 1
    except UserError as refusal:
        counts["refused"] += 1
        check_message(str(refusal))
    assert set(os.listdir(folder)) <= {"input"}


def fuzz(read: Callable, inputs: st.SearchStrategy, examples: int) -> dict[str, int]:
    """Reads so many inputs; returns how many were read and refused, and the seconds it took."""
    counts, began = Counter(read=0, refused=0), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=SUPPRESSED)
        @given(inputs)
        def check_each(value: str | bytes) -> None:
            check(read, value, Path(folder), counts)

        check_each()
    return {**counts, "seconds": round(time.monotonic() - began)}


def fuzz_apart(kind: str, examples: int) -> dict[str, int]:
    """As `fuzz`, by guided_fuzz.py in a process of its own, which libFuzzer ends; exits if that found a fault."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure_apart("benchmarks.guided_fuzz", [kind, str(examples), folder])
    if "missing" in result:
        raise SystemExit(f"{kind}: {result['missing']}, for the reason above")
    return result


if __name__ == "__main__":
    main()
