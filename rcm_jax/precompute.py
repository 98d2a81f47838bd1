"""Makes training sets of videos, of captions and a teacher, or of official shards; and exports them as such shards."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from tqdm import tqdm

from rcm_jax import inference
from rcm_jax.checkpoint import export_safetensors, load_safetensors
from rcm_jax.config import UserError
from rcm_jax.convert.loading import Autoencoder, Loadable, Transformer
from rcm_jax.convert.tensors import BFLOAT16, LazyTensor
from rcm_jax.convert.torch_file import Region, encode_tensor, read_value
from rcm_jax.convert.writing import Piece, write_piece
from rcm_jax.data import pipeline, samples, tar_shards, videos
from rcm_jax.data.samples import BadSampleError, Sample, Spec
from rcm_jax.data.shards import Shards, digest, split, write_shards
from rcm_jax.data.tokenizer import Tokens
from rcm_jax.inputs import describe_file

NEGATIVE = "negative.safetensors"
READERS = 8  # videos that are decoded at once, ahead of the network
TRIED_FIRST = 100  # samples among which one must be sound


class Source(NamedTuple):
    """Where samples come from.

    Attributes:
        facts: what tells this source from others, of JSON types.
        spec: what all samples have in common.
        counts: samples of each shard, good and bad.
        read: (number of a shard, embedding of the negative caption) -> its samples, one at a time.
        negative: makes the embedding (S, D) of the negative caption, or is None.
    """

    facts: Mapping[str, Any]
    spec: Spec
    counts: Sequence[int]
    read: Callable[[int, np.ndarray | None], Iterator[Sample | BadSampleError]]
    negative: Callable[[], np.ndarray] | None


class Captions(NamedTuple):
    """How captions become embeddings of (`length`, `dim`), and the negative one among them."""

    tokenize: Callable[[Sequence[str]], Tokens]
    encoder: Loadable
    length: int
    dim: int
    negative: str

    def embed(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings (N, S, D), bfloat16."""
        return inference.embed(self.encoder, self.tokenize(captions)).astype(BFLOAT16)

    def embed_negative(self) -> np.ndarray:
        """The embedding (S, D) of the negative caption, bfloat16."""
        return self.embed([self.negative])[0]

    def spec(self, latent_shape: tuple[int, ...]) -> Spec:
        return Spec(latent_shape, (self.length, self.dim), BFLOAT16, BFLOAT16)


def from_videos(
    clips: Sequence[videos.Clip],
    captions: Captions,
    autoencoder: Autoencoder,
    *,
    size: tuple[int, int],
    frames: int,
    fps: int,
    tiled: bool,
    shard_size: int,
) -> Source:
    """Samples of a user's own videos, cut to `frames` at `fps` a second and to `size` (width, height)."""

    def read_frames(clip: videos.Clip) -> np.ndarray | BadSampleError:
        if clip.caption is None:
            return BadSampleError(f"{clip.path} has no caption: give one, beside it or in the list, in UTF-8")
        try:
            return videos.read_frames(clip.path, count=frames, fps=fps, size=size)
        except BadSampleError as error:
            return error

    def read(shard: int, _: np.ndarray | None) -> Iterator[Sample | BadSampleError]:
        chosen = clips[shard * shard_size : (shard + 1) * shard_size]
        text_NSD = captions.embed([clip.caption or "" for clip in chosen])
        ahead = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=READERS)
        films = grain.MapDataset.source(chosen).map(read_frames).to_iter_dataset(ahead)
        bar = tqdm(films, "videos", len(chosen), leave=False, disable=None)
        with inference.video_encoder(autoencoder, tiled=tiled) as encode:
            for clip, text_SD, film in zip(chosen, text_NSD, bar, strict=True):
                if isinstance(film, BadSampleError):
                    yield film
                else:
                    yield Sample(encode(film).astype(BFLOAT16), text_SD, clip.caption or "", str(clip.path))

    known = [(str(clip.path), describe_file(clip.path), clip.caption) for clip in clips]
    shape = autoencoder.config.latent_shape((frames, size[1], size[0]))
    facts = {"source": "videos", "clips": digest(known), "fps": fps}
    counts = split(len(clips), shard_size)
    return Source(facts, captions.spec(shape), counts, read, captions.embed_negative)


def from_captions(
    prompts: Sequence[str],
    captions: Captions,
    transformer: Transformer,
    settings: inference.Settings,
    *,
    latent_shape: tuple[int, ...],
    seed: int,
    shard_size: int,
) -> Source:
    """Samples of a teacher: number i has the i-th caption and the seed `seed` + i, and depends on nothing else."""

    def read(shard: int, negative_SD: np.ndarray | None) -> Iterator[Sample]:
        first = shard * shard_size
        chosen = prompts[first : first + shard_size]
        text_NSD = captions.embed(chosen)
        assert negative_SD is not None
        texts = inference.Texts(text_NSD.astype(np.float32), negative_SD.astype(np.float32))
        rows = [(number, seed + first + number) for number in range(len(chosen))]
        condition = inference.Condition()
        latents = inference.sample_latents(transformer, texts, rows, latent_shape, settings, condition)
        for number, (latent_THWC, text_SD, prompt) in enumerate(zip(latents, text_NSD, chosen, strict=True), first):
            yield Sample(latent_THWC.astype(BFLOAT16), text_SD, prompt, f"sample {number}")

    facts = {"source": "captions", "prompts": digest(prompts), "seed": seed, **settings._asdict()}
    counts = split(len(prompts), shard_size)
    return Source(facts, captions.spec(latent_shape), counts, read, captions.embed_negative)


def from_tar(paths: Sequence[Path], negative: Path | None) -> Source:
    """Samples of official shards. `negative` is a .pt file with the embedding of the negative caption.

    Raises:
        UserError: a shard is refused, or none of the first samples is sound.
    """
    shards = tar_shards.open_shards(paths)
    spec = samples.spec_of(_first_sound(sample for shard in shards for sample in tar_shards.read_samples(shard)))
    known = [(str(shard.path), describe_file(shard.path)) for shard in shards]
    negative_SD = None if negative is None else _read_negative(negative, spec.text_shape)
    return Source(
        {"source": "tar", "shards": digest(known), "negative": negative and [str(negative), describe_file(negative)]},
        spec,
        [shard.count for shard in shards],
        lambda shard, _: tar_shards.read_samples(shards[shard]),
        None if negative_SD is None else lambda: negative_SD,
    )


def _first_sound(candidates: Iterable[Sample | BadSampleError]) -> Sample:
    fault = None
    for _, sample in zip(range(TRIED_FIRST), candidates, strict=False):
        if isinstance(sample, Sample):
            return sample
        fault = fault or sample
    raise fault or UserError("the shards hold no sample: give others")


def _read_negative(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    value = read_value(Region(path)) if path.is_file() else None
    if not isinstance(value, LazyTensor) or value.shape != shape:
        raise UserError(f"--negative-embedding {path} must be a .pt file with one tensor of shape {shape}")
    return value.read()


def write_data_set(source: Source, target: Path, options: Mapping[str, Any], *, max_bad: float) -> None:
    """Writes the samples of a source as a TFDS data set in the folder `target`, whose name is the data set's.

    `options` are what else tells this command from others, of JSON types; for the rest see write_shards.
    """
    count = len(source.counts)

    def read_negative(folder: Path) -> np.ndarray | None:
        return load_safetensors(folder / NEGATIVE)[0]["text"] if source.negative else None

    def write_negative(folder: Path) -> None:
        assert source.negative is not None
        export_safetensors(folder / NEGATIVE, {"text": source.negative()}, {})

    def finish(folder: Path, written: list[dict[str, int]]) -> None:
        lengths, nbytes = [fact["records"] for fact in written], sum(fact["nbytes"] for fact in written)
        samples.write_metadata(folder, target.name, source.spec, lengths, nbytes)

    shards = Shards(
        spec=source.spec,
        names=[samples.file_name(target.name, shard, count) for shard in range(count)],
        counts=source.counts,
        read=lambda folder, shard: source.read(shard, read_negative(folder)),
        write=lambda path, _, sound: samples.write_shard(path, sound, source.spec),
        finish=finish,
        before=[Piece("negative", NEGATIVE, 0, write_negative)] if source.negative else [],
    )
    write_shards(shards, target, {**source.facts, **options, "counts": source.counts}, max_bad=max_bad)


def export_tar(data_set: Path, target: Path, *, shard_size: int, max_bad: float) -> None:
    """Writes the records of a data set as official shards to the folder `target`.

    Beside them lie a manifest and, as negative.pt, the embedding of the negative caption if the data set has it.
    """
    records = pipeline.open_source(data_set, "", samples.SPLIT)
    example = pipeline.first_sound(records)
    counts = split(len(records), shard_size)
    names = [f"shard_{shard:06d}.tar" for shard in range(len(counts))]

    def read(_: Path, shard: int) -> Iterator[Sample | BadSampleError]:
        first = shard * shard_size
        for number in tqdm(range(first, first + counts[shard]), "records", leave=False, disable=None):
            try:
                yield _as_sample(pipeline.read_record(records, number, example), f"record {number} of {data_set}")
            except pipeline.BadRecordError as error:
                yield BadSampleError(f"{data_set}: {error}")

    def finish(folder: Path, written: list[dict[str, str]]) -> None:
        tar_shards.write_manifest(folder, dict(zip(names, written, strict=True)))
        if (data_set / NEGATIVE).exists():
            write_piece(folder / "negative.pt", 0, encode_tensor(load_safetensors(data_set / NEGATIVE)[0]["text"]))

    shards = Shards(
        spec=samples.spec_of(_as_sample(example, "the first record")),
        names=names,
        counts=counts,
        read=read,
        write=lambda path, shard, sound: tar_shards.write_shard(path, sound, first=shard * shard_size),
        finish=finish,
    )
    described = (data_set / "dataset_info.json").read_text()
    files = [(file.name, describe_file(file)) for file in sorted(data_set.iterdir()) if file.is_file()]
    facts = {"source": str(data_set), "described": digest([described, files]), "shard_size": shard_size}
    write_shards(shards, target, facts, max_bad=max_bad)


def _as_sample(record: Mapping[str, Any], name: str) -> Sample:
    return Sample(np.asarray(record["latent"]), np.asarray(record["text"]), record["prompt"], name)
