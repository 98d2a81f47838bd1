r"""Scores a distilled digits run beside its teacher; samples, scores and compares published models.

    python -m launch.evaluate --config=configs/digits_rcm.py --workdir=runs/digits_rcm
    python -m launch.evaluate sample --layout=vbench --prompt-file=VBench_full_info.json --out=student \
        --model=wan2.1-t2v-1.3b --dit=student.pth --vae=Wan2.1_VAE.pth \
        --text-encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl --sampler=few-step-sde
    python -m launch.evaluate score student --network=i3d.onnx --real=my_videos
    python -m launch.evaluate compare teacher student --out=compare.html

The first writes report.html, report.json, a grid and videos. `sample`, `features`, `score` and `compare` have a --help
of their own.
"""

import contextlib
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors

from launch import keep_compilations
from launch.sample import check_order, describe_order, open_parts
from rcm_jax import layouts, options
from rcm_jax.config import Command, UserError
from rcm_jax.published import find_published, parse_size

SAMPLE = r"""Samples a benchmark's prompts into the folders and names that it reads.

    python -m launch.evaluate sample --layout=vbench --prompt-file=VBench_full_info.json --out=student \
        --model=wan2.1-t2v-1.3b --dit=student.pth --vae=Wan2.1_VAE.pth \
        --text-encoder=models_t5_umt5-xxl-enc-bf16.pth --tokenizer=google/umt5-xxl --sampler=few-step-sde

The prompt file is the benchmark's own: of VBench VBench_full_info.json or a text file, of VBench-2.0
VBench2_full_info.json or DIMENSION.txt, of GenEval evaluation_metadata.jsonl. VBench then reads OUT/videos, VBench-2.0
a dimension's folder there, GenEval OUT/images. The latents stay in OUT/latents. An interrupted command goes on when it
is given again: what is finished is not sampled again. What is left out is as the model's authors have it.
"""

FEATURES = r"""Writes features of a folder of videos, such as the real ones that several sets are compared with.

    python -m launch.evaluate features my_videos --network=i3d.onnx --out=real.safetensors

An .onnx network takes one input, videos or single pictures; the order of its axes, the frames and their size are read
from the input's shape as far as they are fixed there. Features of pictures are averaged over a video's frames. It
needs the package onnxruntime.
"""

SCORE = r"""Scores a folder of samples and writes SET/scores.json.

    python -m launch.evaluate score student --network=i3d.onnx --real=my_videos
    python -m launch.evaluate score student --features=student.safetensors --real=real.safetensors

The Fréchet distance (with a network such as I3D: FVD), precision, recall and coverage compare features with those of
real videos, by a network as `features --help` describes it. Features computed elsewhere are safetensors files with a
tensor `features`, one row a video. Diversity is the mean distance between samples of a prompt, of features and of the
latents that `sample` keeps, or that --vae makes. Throughput is read from the samples' metadata.
"""

COMPARE = r"""Writes a page that shows two folders of samples side by side: same prompts and seeds, in step, and scores.

    python -m launch.evaluate compare teacher student --out=compare.html

Scores are those that `score` wrote. The page links to the files where they lie: keep it where it is to them.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and does what its first word says; without such a word it scores a digits run."""
    words = sys.argv[1:] if argv is None else list(argv)
    match words[:1]:
        case ["sample"]:
            _sample(words[1:])
        case ["features"]:
            _write_features(words[1:])
        case ["score"]:
            _score(words[1:])
        case ["compare"]:
            _compare(words[1:])
        case _:
            _evaluate_digits(words)


def _evaluate_digits(words: Sequence[str]) -> None:
    command = Command(__doc__)
    command.add_argument("--workdir", metavar="DIR", required=True, help="the run; the reports are written there too")
    command.add_argument("--weights", metavar="FILE", help="the student (default: ema.safetensors of the run)")
    command.add_argument("--per_caption", type=int, default=8, metavar="N", help="videos of each of the 80 captions")
    arguments, config = command.parse(words)
    with command.reports_user_errors():
        options.check_target("--workdir", arguments.workdir, kind="folder")
        workdir = Path(arguments.workdir)
        weights = Path(arguments.weights or workdir / "ema.safetensors")
        if not weights.exists():
            raise UserError(f"{weights} does not exist: finish the run with launch.train, or give --weights FILE")
        if arguments.per_caption < 2:
            raise UserError(f"--per_caption {arguments.per_caption} must be at least 2: diversity compares videos")
        keep_compilations()
        from rcm_jax.evaluation import evaluate, training_facts
        from rcm_jax.train import create_network, load_params

        network, log = create_network(config), workdir / "metrics.jsonl"
        evaluate(
            config,
            network,
            load_params(config.teacher.path, network),
            load_params(weights, network),
            workdir,
            per_caption=arguments.per_caption,
            facts={"seeds": [config.seed], "stages": config.stages} | training_facts(log),
            metrics_path=log if log.exists() else None,
        )
        print(f"wrote {workdir / 'report.html'}")


def _command(name: str, description: str) -> Command:
    command = Command(description)
    command.prog += f" {name}"
    return command


def _sample(words: Sequence[str]) -> None:
    command = _command("sample", SAMPLE)
    command.add_argument("--layout", choices=layouts.LAYOUTS, required=True, help="the benchmark")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the set of samples")
    command.add_argument(
        "--captions", type=Path, metavar="FILE", help="a line for each prompt, that the model is given in its place"
    )
    command.add_argument("--count", type=int, metavar="N", help="samples of a prompt (default: the benchmark's)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seeds follow from it (default: 0)")
    command.add_argument("--chunk", type=int, default=128, metavar="N", help="samples of a turn (default: 128)")
    command.add_argument("--share", default="0/1", metavar="K/N", help="of N processes that share the work, this is K")
    command.add_argument("--drop-latents", action="store_true", help="remove each latent when its sample is written")
    options.add_model(command)
    options.add_parts(command)
    arguments = command.parse_args(words)
    with command.reports_user_errors():
        options.check_target("--out", arguments.out, kind="folder")
        plan, share = _check_sample(arguments)
        captions = list(dict.fromkeys(shot.caption for shot in plan.shots))
        # What launch.sample takes besides: this command samples captions alone.
        besides = {
            "image": None,
            "video": None,
            "condition_frames": None,
            "image_encoder": None,
            "embeddings": None,
            "seeds": "0",
            "prompt": captions,
        }
        arguments = Namespace(**(vars(arguments) | besides | {"prompt_file": None}))
        _write_set(arguments, plan, share)


def _check_sample(arguments: Namespace) -> tuple[layouts.Plan, tuple[int, int]]:
    """The samples, and which of them are this process's. Raises UserError for what does not fit."""
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
    plan = layouts.plan(
        arguments.layout,
        Path(arguments.prompt_file),
        captions=arguments.captions,
        count=arguments.count,
        seed=arguments.seed,
    )
    return plan, share


def _parse_share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--share {text} must be K/N with K from 0 to N - 1: write --share 0/8")
    return int(number), int(count)


def _write_set(arguments: Namespace, plan: layouts.Plan, share: tuple[int, int]) -> None:
    """Checks the rest, opens every checkpoint and makes the samples."""
    order = check_order(arguments)
    keep_compilations()
    from rcm_jax import inference, inputs, sample_sets

    settings = inference.Settings(**order.sampling)
    inference.sample_times(settings)
    parts = open_parts(arguments, order, settings)
    facts = describe_order(arguments, order, parts.transformer.model)
    sampling = sample_sets.Sampling(
        parts=parts,
        captions=order.prompts,
        settings=settings,
        shape_THWC=parts.autoencoder.config.latent_shape((order.frames, *reversed(order.size))),
        fps=order.fps,
        tiled=bool(arguments.tile),
        facts={"layout": arguments.layout, "first_seed": arguments.seed, **facts},
        files=inputs.describe_checkpoints([*arguments.dit, arguments.vae, arguments.text_encoder, arguments.tokenizer]),
    )
    keep = not arguments.drop_latents
    chunk = arguments.chunk
    made = sample_sets.write_set(arguments.out, plan, sampling, chunk=chunk, share=share, keep_latents=keep)
    print(f"made {made} samples in {arguments.out}, of {len(plan.shots)} that {arguments.layout} wants")


def _write_features(words: Sequence[str]) -> None:
    command = _command("features", FEATURES)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="videos or pictures, at any depth")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    _add_view(command)
    arguments = command.parse_args(words)
    with command.reports_user_errors():
        if arguments.network is None:
            raise UserError("features needs --network: give an .onnx file, or CLIP's checkpoint")
        options.check_target("--out", arguments.out, kind="file")
        _check_replaced(arguments.out)
        view = _check_view(arguments)
        keep_compilations()
        from rcm_jax import features

        paths = features.list_videos(arguments.folder)
        found = _extract(features.open_network(arguments.network, view), arguments.folder, paths)
        features.write_features(arguments.out, found)
        print(f"wrote {arguments.out}: {found.feature_NF.shape[0]} videos, {found.feature_NF.shape[1]} features")


def _check_replaced(path: Path) -> None:
    """Raises UserError if a file is there that does not hold features: a mistyped name must not cost a checkpoint."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            is_features = "features" in file.keys()
    except FileNotFoundError:
        return
    except (OSError, safetensors.SafetensorError):
        is_features = False
    if not is_features:
        raise UserError(f"--out {path} is there and holds no features: remove it, or choose another path")


def _add_view(command: Any) -> None:
    group = command.add_argument_group("network of features")
    for name, metavar, type_, text in (
        ("network", "PATH", Path, "an .onnx file, or CLIP's checkpoint of Wan2.1 image-to-video"),
        ("frames", "N", int, "the first N of a video (default: the network's, or 16; of a network of pictures 1)"),
        ("fps", "N", int, "frames a second (default: 8)"),
        ("size", "WxH", str, "of a frame, whose middle is resized to fill it (default: the network's, or 224x224)"),
        ("mean", "X[,X,X]", str, "it is given (pixel / 255 - mean) / std; default: 0.5"),
        ("std", "X[,X,X]", str, "default: 0.5, that is values from -1 to 1"),
        ("axes", "NCTHW", str, "order of the input's axes, where its shape does not tell"),
        ("output", "NAME", str, "the output with the features (default: the first)"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, type=type_, help=text)


def _check_view(arguments: Namespace) -> Any:
    """What a network sees of videos. Raises UserError for a value that breaks its rule, or one without a network."""
    names = ("frames", "fps", "size", "mean", "std", "axes", "output")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if given and arguments.network is None:
        raise UserError(f"{options.spell(next(iter(given)))} belongs to --network: give it")
    if "frames" in given:
        options.positive("--frames", given["frames"])
    if "fps" in given:
        options.check_fps(given["fps"])
    if "size" in given:
        given["size"] = parse_size(given["size"])
    for name in ("mean", "std"):
        if name in given:
            values = options.numbers(f"--{name}", given[name])
            if len(values) not in (1, 3) or (name == "std" and min(values) <= 0):
                rule = "one number or three, for red, green and blue" + (", above 0" if name == "std" else "")
                raise UserError(f"--{name} {given[name]} must be {rule}: write --{name} 0.5")
            given[name] = values
    from rcm_jax.features import AXES, View

    if "axes" in given and given["axes"] not in AXES:
        raise UserError(f"--axes {given['axes']} must be one of {', '.join(AXES)}")
    return View(**given)


def _extract(network: Any, folder: Path, paths: Sequence[Path]) -> Any:
    from rcm_jax import features

    names = [str(path.relative_to(folder)) for path in paths]
    return features.Features(features.extract(network, paths), names, network.facts)


def _score(words: Sequence[str]) -> None:
    command = _command("score", SCORE)
    command.add_argument("set", type=Path, metavar="SET", help="the folder of samples")
    command.add_argument("--out", type=Path, metavar="DIR", help="where the scores go (default: SET)")
    command.add_argument(
        "--real", type=Path, metavar="PATH", help="real videos: a folder, or a .safetensors file of features"
    )
    command.add_argument("--features", type=Path, metavar="FILE", help="features of SET that were computed before")
    _add_view(command)
    group = command.add_argument_group("latents, where they are not beside the samples")
    group.add_argument("--vae", type=Path, metavar="PATH", help="encodes the samples")
    group.add_argument("--model", metavar="NAME", help="whose autoencoder it is, such as wan2.1-t2v")
    group.add_argument("--dtype", metavar="NAME", help="bfloat16 (default) or float32")
    group.add_argument("--tile", action="store_true", help="run the autoencoder in tiles")
    arguments = command.parse_args(words)
    with command.reports_user_errors():
        view = _check_score(arguments)
        options.check_target("--out" if arguments.out else "SET", arguments.out or arguments.set, kind="folder")
        keep_compilations()
        from rcm_jax import features, sample_sets, set_scores

        samples = sample_sets.list_samples(arguments.set)
        network = None if arguments.network is None else features.open_network(arguments.network, view)
        real = arguments.real and _read_real(arguments.real, network)
        out, found = arguments.out or arguments.set, None
        if arguments.features is not None:
            found = features.read_features(arguments.features)
        elif network is not None:
            paths = [*(sample.path for sample in samples.samples), *samples.unknown]
            found = _extract(network, arguments.set, paths)
            features.write_features(out / "features.safetensors", found)
        with _open_encoder(arguments) as encode:
            scored = set_scores.score_set(samples, found, real, encode)
        set_scores.write_scores(out / set_scores.RECORD, scored)
        for name, value in scored.scores.items():
            print(f"{name:20} {value:.6g}")
        for note in scored.notes:
            print(f"note: {note}")


def _check_score(arguments: Namespace) -> Any:
    """What a network sees of videos. Raises UserError for options that do not fit each other."""
    if arguments.network is not None and arguments.features is not None:
        raise UserError(f"--features {arguments.features} takes the place of --network: leave one out")
    if arguments.real is not None:
        if arguments.network is None and arguments.features is None:
            raise UserError(f"--real {arguments.real} is compared by features: give --network PATH, or --features FILE")
        if arguments.network is None and arguments.real.suffix != ".safetensors":
            raise UserError(f"--real {arguments.real} must be a .safetensors file of features, or give --network PATH")
    if (arguments.vae is None) != (arguments.model is None):
        raise UserError("--vae and --model belong together: give both, or neither")
    options.check_dtype(arguments)
    return _check_view(arguments)


def _read_real(path: Path, network: Any) -> Any:
    from rcm_jax import features

    if path.suffix == ".safetensors":
        return features.read_features(path)
    return _extract(network, path, features.list_videos(path))


@contextlib.contextmanager
def _open_encoder(arguments: Namespace) -> Iterator[Any]:
    """A function from samples to latents, or None where no autoencoder is given."""
    if arguments.vae is None:
        yield None
        return
    from rcm_jax import inference, sample_sets
    from rcm_jax.convert.loading import open_autoencoder
    from rcm_jax.models import vae

    preset = vae.PRESETS[find_published(arguments.model).vae]
    autoencoder = open_autoencoder(arguments.vae, preset, dtype=options.check_dtype(arguments))
    with inference.video_encoder(autoencoder, tiled=arguments.tile) as encode:
        yield lambda sample: encode(sample_sets.read_pixels(sample))


def _compare(words: Sequence[str]) -> None:
    command = _command("compare", COMPARE)
    command.add_argument("first", type=Path, metavar="SET", help="a folder of samples")
    command.add_argument("second", type=Path, metavar="SET", help="another")
    command.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page")
    command.add_argument("--names", metavar="A,B", help="what to call the sets (default: their folders' names)")
    arguments = command.parse_args(words)
    with command.reports_user_errors():
        folders = [arguments.first, arguments.second]
        names = arguments.names.split(",") if arguments.names else [str(folder) for folder in folders]
        if len(names) != 2 or names[0] == names[1] or not all(names):
            raise UserError(f"--names {arguments.names} must be two different words: write --names teacher,student")
        options.check_target("--out", arguments.out, kind="file")
        from rcm_jax import comparison

        first, second = (comparison.open_set(name, folder) for name, folder in zip(names, folders, strict=True))
        pairing = comparison.write_page(arguments.out, first, second)
        alone = len(pairing.first_only) + len(pairing.second_only)
        print(f"wrote {arguments.out}: {len(pairing.pairs)} pairs, {alone} samples without a counterpart")


if __name__ == "__main__":
    main()
