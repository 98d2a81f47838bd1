"""Whole samples of tiny networks against diffusers' pipelines: image, guidance, times, networks and latent alike.

The pipelines cut times to whole thousandths, which no network needs: here they are handed the times themselves.
"""

import dataclasses
from types import SimpleNamespace

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos import pipeline_cosmos2_video2world
from PIL import Image
from theirs import create_autoencoder, create_random

from rcm_jax import inference, sampling
from rcm_jax.convert.loading import open_autoencoder, open_transformer
from rcm_jax.models.vae import PRESETS

SIZE, FRAMES, STEPS, SEED = (64, 32), 5, 4, 3
WAN = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, freq_dim=8)
COSMOS = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, text_embed_dim=16, adaln_lora_dim=4)
# Relative to the norm of the whole latent: that of the autoencoder with that of the steps' evaluations.
TOLERANCE = 1e-4


class UniPC(diffusers.UniPCMultistepScheduler):
    """With the times that belong to its noise levels."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = 1000.0 * self.sigmas[:-1]


def saved(network, path):
    network.save_pretrained(path)
    return path


def their_autoencoder(name):
    config = dataclasses.replace(PRESETS[name], encoder_dim=4, decoder_dim=4, blocks=1)
    return config, create_random(lambda: create_autoencoder(config))


def their_wan(seed=0, **sizes):
    return create_random(lambda: diffusers.WanTransformer3DModel(**WAN | sizes), seed)


def random_texts():
    random = np.random.default_rng(0)
    return inference.Texts(*(random.standard_normal((*n, 512, 16)).astype(np.float32) for n in ((1,), ())))


def pictures(count):
    return np.random.default_rng(1).integers(0, 256, (count, SIZE[1], SIZE[0], 3), np.uint8)


def channels_first(x_BTHWC):
    return torch.from_numpy(np.moveaxis(np.array(x_BTHWC), -1, 1))


def sample_ours(folder, model, config, settings, *, given=1, frames=FRAMES, tokens=None):
    """The latent (T, H, W, C) of our code, from the folders that diffusers' networks were saved in."""
    paths = sorted(folder.glob("transformer*"))
    parts = inference.Parts(open_transformer(paths, model), open_autoencoder(folder / "vae", config))
    condition = inference.Condition()
    if "t2v" not in model:
        condition = inference.encode_given(parts, pictures(given), pictures(given), frames)
        condition = condition._replace(tokens_BND=tokens)
    shape = config.latent_shape((frames, *SIZE[::-1]))
    return inference.sample_latents(parts.transformer, random_texts(), [(0, SEED)], shape, settings, condition)[0]


def pipeline_words(config, texts, frames=FRAMES):
    """What every pipeline is called with."""
    shape = config.latent_shape((frames, *SIZE[::-1]))
    return dict(
        prompt_embeds=torch.from_numpy(texts.text_NSD),
        negative_prompt_embeds=torch.from_numpy(texts.negative_SD[None]),
        width=SIZE[0],
        height=SIZE[1],
        num_frames=frames,
        num_inference_steps=STEPS,
        latents=channels_first(sampling.sample_noise(jnp.array([SEED]), shape, 0)),
        output_type="latent",
    )


def assert_close(found_THWC, expected):
    expected_THWC = np.moveaxis(expected[0].numpy(), 0, -1)
    assert found_THWC.shape == expected_THWC.shape
    assert np.linalg.norm(found_THWC - expected_THWC) <= TOLERANCE * np.linalg.norm(expected_THWC)


@pytest.mark.parametrize("model", ["wan2.1-t2v", "wan2.1-i2v", "wan2.2-t2v", "wan2.2-i2v", "wan2.2-ti2v"])
def test_wan(model, tmp_path):
    config, autoencoder = their_autoencoder("wan2.2" if "ti2v" in model else "wan2.1")
    latent = config.latent_channels
    sizes = dict(in_channels=36 if "-i2v" in model else latent, out_channels=latent)
    if model == "wan2.1-i2v":
        sizes |= dict(image_dim=20, added_kv_proj_dim=24)
    networks = {"transformer": their_wan(**sizes)}
    boundary = {"wan2.2-t2v": 0.875, "wan2.2-i2v": 0.9}.get(model)
    if boundary:
        networks["transformer_2"] = their_wan(seed=1, **sizes)
    for name, network in [("vae", autoencoder), *networks.items()]:
        saved(network, tmp_path / name)
    tokens = np.random.default_rng(2).standard_normal((1, 257, 20)).astype(np.float32) if "image_dim" in sizes else None

    guidance = (4.0, 3.0)[: len(networks)]
    settings = inference.Settings("unipc", STEPS, guidance, shift=3.0)
    found = sample_ours(tmp_path, model, config, settings, tokens=tokens)

    pipe_class = diffusers.WanPipeline if "t2v" in model else diffusers.WanImageToVideoPipeline
    pipe = pipe_class(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder,
        scheduler=UniPC(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        boundary_ratio=boundary,
        expand_timesteps="ti2v" in model,
        **networks,
    )
    pipe.set_progress_bar_config(disable=True)
    words = pipeline_words(config, random_texts()) | {"guidance_scale": 4.0}
    if boundary:
        words["guidance_scale_2"] = 3.0
    if "t2v" not in model:
        words["image"] = Image.fromarray(pictures(1)[0])
    if tokens is not None:
        pipe.encode_image = lambda *_: torch.from_numpy(tokens)  # of CLIP, which is compared elsewhere
    assert_close(found, pipe(**words).frames)


@pytest.fixture
def resize(monkeypatch):
    """torchvision's resizing of the padding mask, which is zero."""
    zeros = lambda mask, size, **_: mask.new_zeros(*mask.shape[:-2], *size)  # noqa: E731
    stub = SimpleNamespace(functional=SimpleNamespace(resize=zeros), InterpolationMode=SimpleNamespace(NEAREST=0))
    monkeypatch.setattr(transformer_cosmos, "transforms", stub, raising=False)


class NoChecker:
    """The pipeline refuses to be without one."""

    def to(self, device):
        pass


@pytest.mark.parametrize("given", [1, 5], ids=["image", "video"])
def test_cosmos(given, tmp_path, resize, monkeypatch):
    """Its pipeline draws the latent of given frames around the mean; here it takes the mean."""
    config, autoencoder = their_autoencoder("wan2.1")
    sizes = dict(in_channels=17, out_channels=16, max_size=(128, 240, 240), rope_scale=(1.0, 3.0, 3.0))
    sizes |= dict(concat_padding_mask=True, extra_pos_embed_type=None)
    network = create_random(lambda: diffusers.CosmosTransformer3DModel(**COSMOS | sizes))
    for block in network.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = 1e-6  # NVIDIA's
    saved(network, tmp_path / "transformer")
    saved(autoencoder, tmp_path / "vae")
    settings = inference.Settings("euler", STEPS, (8.0,))
    found = sample_ours(tmp_path, "cosmos-predict2-v2w", config, settings, given=given, frames=13)

    monkeypatch.setattr(pipeline_cosmos2_video2world, "retrieve_latents", lambda output, *_: output.latent_dist.mode())
    pipe = diffusers.Cosmos2VideoToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=network,
        vae=autoencoder,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=NoChecker(),
    )
    pipe.set_progress_bar_config(disable=True)
    words = pipeline_words(config, random_texts(), frames=13) | {"guidance_scale": 7.0, "fps": 24}
    shown = [Image.fromarray(frame) for frame in pictures(given)]
    words |= {"image": shown[0]} if given == 1 else {"video": shown}
    # The pipeline's last step goes nowhere. Ours takes it down to no noise at all.
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *a, **k: (pipe.scheduler.sigmas.__setitem__(-1, 0.0), step(*a, **k))[1]
    assert_close(found, pipe(**words).frames)
