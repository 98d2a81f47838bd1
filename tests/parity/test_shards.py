"""Shards written with PyTorch and Python's tarfile, as rCM's script does, are read; ours are opened by both."""

import io
import tarfile

import numpy as np
import pytest
import torch

from launch import precompute
from rcm_jax.data import pipeline

PROMPTS = ("a fox", "ein Füchslein 狐", "a bed")


def make_tensors(dtype):
    """A batch of latents (C, T, H, W) and embeddings (S, D), of which a sample is a slice."""
    generator = torch.Generator().manual_seed(0)
    latents, texts = torch.randn(3, 16, 2, 4, 6, generator=generator), torch.randn(3, 8, 10, generator=generator)
    return latents.to(dtype), texts.to(dtype)


def save(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


def write_shard(path, latents, texts):
    """One sample after the other is appended, as an interrupted script goes on."""
    for number, prompt in enumerate(PROMPTS):
        with tarfile.open(path, "a") as archive:
            parts = {"latent.pt": save(latents[number]), "embed.pt": save(texts[number]), "prompt.txt": prompt.encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def as_torch(array):
    """A numpy array, bfloat16 included, as a tensor of the same bits."""
    return torch.from_numpy(np.array(array, np.float32)).to(getattr(torch, array.dtype.name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_official_shards_there_and_back(dtype, tmp_path):
    latents, texts = make_tensors(dtype)
    write_shard(tmp_path / "shard_000000.tar", latents, texts)
    torch.save(texts[2], tmp_path / "negative.pt")
    words = [f"--out={tmp_path}", "--name=mine"]
    negative = f"--negative-embedding={tmp_path / 'negative.pt'}"
    precompute.main([*words, f"--from-tar={tmp_path / 'shard_000000.tar'}", negative])

    source = pipeline.open_source("mine", tmp_path, "train")
    assert len(source) == len(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        record = source[number]
        assert record["prompt"].decode() == prompt
        torch.testing.assert_close(as_torch(record["latent"]), latents[number].permute(1, 2, 3, 0), rtol=0, atol=0)
        torch.testing.assert_close(as_torch(record["text"]), texts[number], rtol=0, atol=0)

    precompute.main([*words, f"--to-tar={tmp_path / 'again'}"])
    with tarfile.open(tmp_path / "again" / "shard_000000.tar") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
    assert list(found) == [f"{n:09d}.{suffix}" for n in range(3) for suffix in ("latent.pt", "embed.pt", "prompt.txt")]
    for number, prompt in enumerate(PROMPTS):
        assert found[f"{number:09d}.prompt.txt"].decode() == prompt
        for suffix, expected in (("latent.pt", latents[number]), ("embed.pt", texts[number])):
            tensor = torch.load(io.BytesIO(found[f"{number:09d}.{suffix}"]), weights_only=True)
            assert tensor.is_contiguous()
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    tensor = torch.load(tmp_path / "again" / "negative.pt", weights_only=True)
    torch.testing.assert_close(tensor, texts[2], rtol=0, atol=0)
