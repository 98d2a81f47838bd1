"""The text and image encoders against transformers, with random weights, in float32."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from naming import published_tensors
from safetensors.numpy import save_file
from theirs import create_random

from rcm_jax.convert.clip import clip_table, with_prefix
from rcm_jax.convert.places import params_from_published
from rcm_jax.convert.umt5 import t5_table, without_copies
from rcm_jax.data.tokenizer import clean_prompt, load_tokenizer
from rcm_jax.models import clip, umt5
from rcm_jax.models.functional import functional

# Relative to the norm of the whole result. float32 has 6e-8 a number; a few layers lose one digit of it.
TOLERANCE = 1e-6
T5 = {
    "umt5-xxl": dataclasses.replace(
        umt5.PRESETS["umt5-xxl"], vocabulary=60, dim=32, ffn_dim=48, heads=4, head_dim=16, layers=3
    ),
    "t5-11b": dataclasses.replace(
        umt5.PRESETS["t5-11b"], vocabulary=60, dim=32, ffn_dim=48, heads=4, head_dim=16, layers=3
    ),
}
CLIP = clip.CLIPConfig(dim=32, ffn_dim=48, heads=2, layers=3, image=42)


def fast_jit(function):
    """These programs run for milliseconds and compile for seconds."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def numpy_tensors(network):
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


@functools.cache
def their_t5(name):
    c = T5[name]
    config, network = {
        "umt5-xxl": (transformers.UMT5Config, transformers.UMT5EncoderModel),
        "t5-11b": (transformers.T5Config, transformers.T5EncoderModel),
    }[name]
    sizes = dict(vocab_size=c.vocabulary, d_model=c.dim, d_ff=c.ffn_dim, num_heads=c.heads, d_kv=c.head_dim)
    return create_random(lambda: network(config(**sizes, num_layers=c.layers)))


@functools.cache
def their_clip():
    config = transformers.CLIPVisionConfig(
        hidden_size=CLIP.dim,
        intermediate_size=CLIP.ffn_dim,
        num_hidden_layers=CLIP.layers,
        num_attention_heads=CLIP.heads,
        image_size=CLIP.image,
        patch_size=CLIP.patch,
        hidden_act="gelu",
    )
    return create_random(lambda: transformers.CLIPVisionModel(config))


def create_t5(name):
    return functional(lambda rngs: umt5.T5Encoder(T5[name], rngs=rngs))


def create_clip():
    return functional(lambda rngs: clip.ImageEncoder(CLIP, rngs=rngs))


def t5_params(name):
    tensors = without_copies(numpy_tensors(their_t5(name)))
    return params_from_published(tensors, create_t5(name).abstract_params(), t5_table(T5[name], "transformers"))


def clip_params():
    tensors = with_prefix(numpy_tensors(their_clip()))
    return params_from_published(tensors, create_clip().abstract_params(), clip_table("transformers"))


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("name", T5)
def test_text_encoder(name):
    """Long enough that distances share buckets and that some exceed the largest. Theirs runs in float64."""
    ids = np.random.default_rng(0).integers(0, 60, (2, 150))
    mask = np.arange(150)[None] < np.array([[150], [90]])
    with torch.no_grad():
        network = copy.deepcopy(their_t5(name)).double()
        expected = network(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    found = fast_jit(create_t5(name).apply)(t5_params(name), jnp.asarray(ids, jnp.int32), jnp.asarray(mask))
    assert_close(found, expected * mask[..., None])


def test_position_buckets_of_a_whole_caption():
    attention = their_t5("umt5-xxl").encoder.block[0].layer[0].SelfAttention
    positions = torch.arange(umt5.TEXT_LENGTH)
    expected = attention._relative_position_bucket(positions[None] - positions[:, None])
    np.testing.assert_array_equal(umt5.position_buckets(umt5.TEXT_LENGTH, T5["umt5-xxl"]), expected.numpy())


def test_image_encoder():
    image = np.random.default_rng(0).standard_normal((2, 42, 42, 3)).astype(np.float32)
    with torch.no_grad():
        expected = their_clip()(torch.from_numpy(image).permute(0, 3, 1, 2), output_hidden_states=True)
    found = fast_jit(create_clip().apply)(clip_params(), jnp.asarray(image))
    assert_close(found.tokens_BLD, expected.hidden_states[-2].numpy())
    assert_close(found.pooled_BD, expected.pooler_output.numpy())


@pytest.mark.parametrize("size", [(30, 50), (300, 260)], ids=["enlarged", "reduced"])
def test_preprocessing_is_that_of_wan(size):
    """Wan calls PyTorch's bicubic interpolation and normalises with CLIP's statistics."""
    image = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(image).double().permute(0, 3, 1, 2), size=(224, 224), mode="bicubic", align_corners=False
    )
    mean, std = (np.array(values) for values in (clip.PIXEL_MEAN, clip.PIXEL_STD))
    expected = (resized.permute(0, 2, 3, 1).numpy() * 0.5 + 0.5 - mean) / std
    np.testing.assert_allclose(clip.preprocess(jnp.asarray(image)), expected, atol=1e-5)


@pytest.mark.parametrize("name", [*T5, "clip"])
def test_our_weights_open_in_transformers(name, tmp_path):
    """A folder with our tensors and their config loads with nothing missing, unexpected or changed."""
    network = their_clip() if name == "clip" else their_t5(name)
    params = clip_params() if name == "clip" else t5_params(name)
    table = clip_table("transformers") if name == "clip" else t5_table(T5[name], "transformers")
    network.config.save_pretrained(tmp_path)
    save_file(published_tensors(params, table), tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = type(network).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for key, tensor in numpy_tensors(network).items():
        np.testing.assert_array_equal(loaded.state_dict()[key].numpy(), tensor)


def test_token_ids_and_mask_are_those_of_the_pipelines(tmp_path):
    """diffusers' pipelines pad and cut to a length as here."""
    pieces = ["<pad>", "</s>", "<s>", "<unk>", "▁a", "▁red", "▁cat", "▁", *"abcdert"]
    file = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -float(len(piece) < 2)) for piece in pieces], 3))
    file.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    file.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    file.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    prompts = ["a red cat", "", "a bad cat ☃", "a red cat " * 9]
    expected = theirs(prompts, padding="max_length", max_length=12, truncation=True, return_tensors="np")
    ids, mask = load_tokenizer(tmp_path, length=12)(prompts)
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(mask, expected.attention_mask.astype(bool))


@pytest.mark.parametrize(
    "prompt", ["色调艳丽，过曝，静态，细节模糊不清", " a\t“red”  cat\n", "caf&eacute; &amp;amp; cafÃ©", "ＡＢＣ １２３"]
)
def test_prompts_are_cleaned_as_by_the_wan_pipeline(prompt):
    assert clean_prompt(prompt) == prompt_clean(prompt)
