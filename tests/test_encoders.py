"""The text and image encoders: padding and neighbours change nothing, names and sizes are the published ones.

That they are umT5, T5 and CLIP is shown in tests/parity.
"""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naming import published_tensors

from rcm_jax.config import UserError
from rcm_jax.convert.clip import clip_table, split_qkv, with_prefix
from rcm_jax.convert.names import flat
from rcm_jax.convert.places import Place, params_from_published
from rcm_jax.convert.umt5 import t5_table, without_copies
from rcm_jax.models import clip, umt5
from rcm_jax.models.functional import functional

SIZES = dict(vocabulary=50, dim=16, ffn_dim=24, heads=2, head_dim=8, layers=2)
T5 = {preset: dataclasses.replace(config, **SIZES) for preset, config in umt5.PRESETS.items()}
CLIP = clip.CLIPConfig(dim=16, ffn_dim=24, heads=2, layers=2, image=28)

# These programs run for milliseconds and compile for seconds.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def t5(preset, dtype=jnp.float32):
    return functional(lambda rngs: umt5.T5Encoder(T5[preset], dtype=dtype, rngs=rngs))


@functools.cache
def image_encoder(dtype=jnp.float32):
    return functional(lambda rngs: clip.ImageEncoder(CLIP, dtype=dtype, rngs=rngs))


def initial(network):
    return fast_jit(network.init)(jax.random.key(0))


def encode(preset, ids, counts, dtype=jnp.float32):
    mask = jnp.arange(ids.shape[1])[None] < jnp.array(counts)[:, None]
    return fast_jit(t5(preset, dtype).apply)(initial(t5(preset)), jnp.asarray(ids, jnp.int32), mask)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


IDS = np.random.default_rng(0).integers(0, 50, (2, 12))


@pytest.mark.parametrize("preset", T5)
def test_padding_is_zero_after_the_encoder_and_unseen_by_it(preset):
    found = encode(preset, IDS, [12, 7])
    assert found.shape == (2, 12, 16)
    assert not found[1, 7:].any()
    assert np.abs(found[1, :7]).min() > 0
    other = IDS.copy()
    other[1, 7:] = 3
    np.testing.assert_array_equal(encode(preset, other, [12, 7]), found)
    assert relative(encode(preset, IDS[1:, :7], [7])[0], found[1, :7]) < 1e-5


@pytest.mark.parametrize("preset", T5)
def test_the_order_of_tokens_counts(preset):
    """Only the position biases can tell."""
    found, reversed_ = encode(preset, IDS, [12, 12]), encode(preset, IDS[:, ::-1], [12, 12])
    assert relative(reversed_[:, ::-1], found) > 1e-2


@pytest.mark.parametrize("preset", T5)
def test_text_in_bfloat16_is_close_to_float32(preset):
    """Within a few of its round-offs (4e-3), and further away than float32's."""
    rounded = encode(preset, IDS, [12, 7], jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert 1e-3 < relative(rounded, encode(preset, IDS, [12, 7])) < 3e-2


def test_an_image_in_bfloat16_is_close_to_float32():
    image = jnp.asarray(np.random.default_rng(0).standard_normal((1, 28, 28, 3)), jnp.float32)
    params = initial(image_encoder())
    exact, rounded = (fast_jit(image_encoder(dtype).apply)(params, image) for dtype in (jnp.float32, jnp.bfloat16))
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == jnp.float32
        assert 1e-3 < relative(a, b) < 3e-2


def test_an_image_of_another_size_is_an_error():
    network = image_encoder()
    with pytest.raises(ValueError, match=r"image of \(28, 42\) pixels must be \(28, 28\): preprocess it"):
        jax.eval_shape(network.apply, network.abstract_params(), jnp.zeros((1, 28, 42, 3)))


def test_resizing_keeps_constants_and_images_of_the_right_size():
    for size in (9, 31):
        np.testing.assert_allclose(clip.bicubic_weights(size, 16).sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(clip.bicubic_weights(16, 16), np.eye(16))


def test_a_caption_of_512_tokens_and_an_image_of_257():
    for preset, config in umt5.PRESETS.items():
        network = functional(lambda rngs, config=config: umt5.T5Encoder(config, dtype=jnp.bfloat16, rngs=rngs))
        ids, mask = (jax.ShapeDtypeStruct((1, umt5.TEXT_LENGTH), dtype) for dtype in (jnp.int32, jnp.bool_))
        text = jax.eval_shape(network.apply, network.abstract_params(), ids, mask)
        assert text.shape == (1, 512, {"umt5-xxl": 4096, "t5-11b": 1024}[preset])
    network = functional(lambda rngs: clip.ImageEncoder(clip.PRESETS["clip-vit-h-14"], rngs=rngs))
    pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    features = jax.eval_shape(network.apply, network.abstract_params(), pixels)
    assert features.tokens_BLD.shape == (1, 257, 1280)


def published_umt5_xxl():
    """The tensors of models_t5_umt5-xxl-enc-bf16.pth."""
    shapes = {"token_embedding.weight": (256_384, 4096), "norm.weight": (4096,)}
    for block in (f"blocks.{layer}" for layer in range(24)):
        shapes |= {f"{block}.{norm}.weight": (4096,) for norm in ("norm1", "norm2")}
        shapes |= {f"{block}.attn.{name}.weight": (4096, 4096) for name in "qkvo"}
        shapes |= {f"{block}.pos_embedding.embedding.weight": (32, 64)}
        shapes |= {f"{block}.ffn.{name}.weight": (10_240, 4096) for name in ("gate.0", "fc1")}
        shapes |= {f"{block}.ffn.fc2.weight": (4096, 10_240)}
    return shapes


def published_t5_11b():
    """The tensors of google-t5/t5-11b's encoder."""
    shapes = {"shared.weight": (32_128, 1024), "encoder.final_layer_norm.weight": (1024,)}
    shapes |= {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 128)}
    for block in (f"encoder.block.{layer}.layer" for layer in range(24)):
        shapes |= {f"{block}.{n}.layer_norm.weight": (1024,) for n in (0, 1)}
        shapes |= {f"{block}.0.SelfAttention.{name}.weight": (16_384, 1024) for name in "qkv"}
        shapes |= {f"{block}.0.SelfAttention.o.weight": (1024, 16_384)}
        shapes |= {f"{block}.1.DenseReluDense.wi.weight": (65_536, 1024)}
        shapes |= {f"{block}.1.DenseReluDense.wo.weight": (1024, 65_536)}
    return shapes


def published_clip(dim=1280, ffn_dim=5120, layers=32, tokens=257):
    """The image encoder's tensors in models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth."""
    shapes = {"visual.patch_embedding.weight": (dim, 3, 14, 14)}
    shapes |= {"visual.cls_embedding": (1, 1, dim), "visual.pos_embedding": (1, tokens, dim)}
    linear = {"attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.0": (ffn_dim, dim), "mlp.2": (dim, ffn_dim)}
    norms = ["visual.pre_norm", "visual.post_norm"]
    for block in (f"visual.transformer.{layer}" for layer in range(layers)):
        norms += [f"{block}.norm1", f"{block}.norm2"]
        for name, shape in linear.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return shapes | {f"{norm}.{leaf}": (dim,) for norm in norms for leaf in ("weight", "bias")}


def place_shapes(network, table):
    """Shapes by published name of all parameters."""
    places = [table(path, leaf.shape) for path, leaf in flat(network.abstract_params()).items()]
    return dict(p for place in places for p in ([place] if isinstance(place, Place) else place))


def count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("preset", "layout", "published", "total"),
    [
        ("umt5-xxl", "wan", published_umt5_xxl(), 5_680_910_336),
        ("t5-11b", "transformers", published_t5_11b(), 4_864_791_552),
    ],
)
def test_a_text_encoder_has_the_tensors_of_the_published_file(preset, layout, published, total):
    """Published as 5.7B parameters in bf16, 11.4 GB, and as the encoder of an 11B model."""
    config = umt5.PRESETS[preset]
    network = functional(lambda rngs: umt5.T5Encoder(config, rngs=rngs))
    assert place_shapes(network, t5_table(config, layout)) == published
    assert count(published) == total


def test_the_image_encoder_has_the_tensors_of_the_published_file():
    """Published as 0.63B parameters."""
    network = functional(lambda rngs: clip.ImageEncoder(clip.PRESETS["clip-vit-h-14"], rngs=rngs))
    shapes = place_shapes(network, clip_table("wan"))
    assert count(shapes) == count(published_clip()) == count(place_shapes(network, clip_table("transformers")))
    assert count(shapes) == 630_766_080


@pytest.mark.parametrize(
    ("preset", "layout"), [("umt5-xxl", "wan"), ("umt5-xxl", "transformers"), ("t5-11b", "transformers")]
)
def test_a_text_encoder_comes_back_bit_for_bit(preset, layout):
    params, table = initial(t5(preset)), t5_table(T5[preset], layout)
    tensors = published_tensors(params, table)
    jax.tree.map(np.testing.assert_array_equal, params_from_published(tensors, params, table), params)


def test_a_file_is_read_tensor_by_tensor_once_all_of_it_fits():
    params, table = initial(t5("umt5-xxl")), t5_table(T5["umt5-xxl"], "wan")
    tensors = published_tensors(params, table)
    in_file = {name: SimpleNamespace(shape=tensor.shape, name=name) for name, tensor in tensors.items()}
    order = []

    def read(tensor):
        order.append(tensor.name)
        return tensors[tensor.name]

    with pytest.raises(UserError, match="unexpected other"):
        params_from_published(in_file | {"other": SimpleNamespace(shape=())}, params, table, read=read)
    assert not order
    jax.tree.map(np.testing.assert_array_equal, params_from_published(in_file, params, table, read=read), params)
    assert sorted(order) == sorted(tensors)


def test_a_second_copy_of_the_token_embedding_is_left_out():
    one, two = np.zeros((3, 2)), np.ones(2)
    copies = {"shared.weight": one, "encoder.embed_tokens.weight": one, "encoder.final_layer_norm.weight": two}
    alone = {"encoder.embed_tokens.weight": one, "encoder.final_layer_norm.weight": two}
    for tensors in (copies, alone):
        found = without_copies(tensors)
        assert found == {"shared.weight": one, "encoder.final_layer_norm.weight": two}


def join_qkv(tensors):
    """The inverse of `split_qkv`, but for what that left out."""
    joined = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*attn\.to_)([qkv])(\..*)", name)
        if match is None:
            joined[name] = tensor
        elif match[2] == "q":
            parts = [tensors[f"{match[1]}{letter}{match[3]}"] for letter in "qkv"]
            joined[f"{match[1]}qkv{match[3]}"] = np.concatenate(parts)
    return joined


def test_an_image_encoder_comes_back_bit_for_bit_from_both_layouts():
    """Wan's file has queries, keys and values in one tensor, and much that the image encoder does not need."""
    params = initial(image_encoder())
    wan = join_qkv(published_tensors(params, clip_table("wan")))
    expected = published_clip(dim=16, ffn_dim=24, layers=2, tokens=5)
    assert {name: tensor.shape for name, tensor in wan.items()} == expected
    unused = dict.fromkeys(["textual.token_embedding.weight", "log_scale", "visual.head"], np.zeros(1))
    back = params_from_published(split_qkv(wan | unused), params, clip_table("wan"))
    jax.tree.map(np.testing.assert_array_equal, back, params)

    tensors = published_tensors(params, clip_table("transformers"))
    short = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    for named in (tensors, short):
        back = params_from_published(with_prefix(named), params, clip_table("transformers"))
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_queries_keys_and_values_are_thirds_of_one_tensor():
    name = "visual.transformer.0.attn.to_qkv.weight"
    split = split_qkv({name: np.arange(6).reshape(6, 1)})
    assert {key: part.ravel().tolist() for key, part in split.items()} == {
        "visual.transformer.0.attn.to_q.weight": [0, 1],
        "visual.transformer.0.attn.to_k.weight": [2, 3],
        "visual.transformer.0.attn.to_v.weight": [4, 5],
    }
