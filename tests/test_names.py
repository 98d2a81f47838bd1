"""Names of weights in the files of other projects, and configs from those files."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from naming import wan_of_diffusers

from rcm_jax.config import UserError
from rcm_jax.convert import cosmos, names, wan
from rcm_jax.models.presets import PRESETS, create_network

SMALL = {"dim": 48, "heads": 2, "layers": 2, "text_dim": 10}
WAN = dataclasses.replace(PRESETS["wan2.1-i2v-14b"], **SMALL, ffn_dim=64, image_tokens=4, image_dim=12)
COSMOS = dataclasses.replace(PRESETS["cosmos-predict2-v2w-2b"], **SMALL, lora_dim=4)


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_params(config))


def abstract_params(config):
    return create_network(config).abstract_params()


def by(table):
    """Writing and reading by a table of names."""
    return functools.partial(names.rename_params, table=table), functools.partial(names.collect_params, table=table)


# (config, write, read) of each layout.
LAYOUTS = {
    "wan": (WAN, lambda params: wan.wan_tensors(params, WAN, patch_layout="conv3d"), wan.params_from_wan),
    "rcm": (WAN, lambda params: wan.wan_tensors(params, WAN), wan.params_from_wan),
    "wan of diffusers": (WAN, lambda params: wan_of_diffusers(params, WAN), by(wan.DIFFUSERS)[1]),
    "cosmos": (COSMOS, *by(cosmos.COSMOS)),
    "cosmos of diffusers": (COSMOS, *by(cosmos.DIFFUSERS)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_bit_by_bit(layout):
    config, write, read = LAYOUTS[layout]
    params = random_params(config)
    again = read(write(params), abstract_params(config))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_that_does_not_fit_is_listed(layout):
    config, write, read = LAYOUTS[layout]
    tensors = write(random_params(config))
    missing, short, *_ = sorted(tensors)
    wrong = {name: tensor for name, tensor in tensors.items() if name != missing}
    wrong |= {short: np.zeros((3, 3), np.float32), "blocks.0.extra": np.zeros(1, np.float32)}
    with pytest.raises(UserError) as error:
        read(wrong, abstract_params(config), source="model.safetensors")
    assert str(error.value).startswith("model.safetensors does not fit the network, nothing was loaded: ")
    for fault in (f"missing {missing}", f"{short} has shape (3, 3), the network's", "unexpected blocks.0.extra"):
        assert fault in str(error.value)


def published_block(stem, weights, biases=()):
    return {f"{stem}.{name}.weight" for name in weights} | {f"{stem}.{name}.bias" for name in biases}


def test_wan_i2v_has_the_published_names():
    """Those of wan/modules/model.py that image-to-video adds to text-to-video."""
    image = {"img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4"}
    expected = {f"{module}.{leaf}" for module in image for leaf in ("weight", "bias")}
    for block in ("blocks.0.cross_attn", "blocks.1.cross_attn"):
        expected |= published_block(block, ["k_img", "v_img", "norm_k_img"], ["k_img", "v_img"])
    text_only = dataclasses.replace(WAN, image_tokens=0)
    added = (
        wan.wan_tensors(random_params(WAN), WAN).keys() - wan.wan_tensors(random_params(text_only), text_only).keys()
    )
    assert added == expected


def test_cosmos_has_the_published_names():
    """Those of cosmos_predict2/models/text2image_dit.py."""
    attention = ["q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm"]
    expected = published_block("t_embedder.1", ["linear_1", "linear_2"])
    expected |= {"x_embedder.proj.1.weight", "t_embedding_norm.weight", "final_layer.linear.weight"}
    expected |= published_block("final_layer.adaln_modulation", "12")
    for block in ("blocks.0", "blocks.1"):
        expected |= published_block(f"{block}.self_attn", attention) | published_block(f"{block}.cross_attn", attention)
        expected |= published_block(f"{block}.mlp", ["layer1", "layer2"])
        for layer in ("self_attn", "cross_attn", "mlp"):
            expected |= published_block(f"{block}.adaln_modulation_{layer}", "12")
    assert names.rename_params(random_params(COSMOS), cosmos.COSMOS).keys() == expected


def test_what_is_no_weight_of_cosmos_is_told_by_its_name():
    weights = names.rename_params(random_params(COSMOS), cosmos.COSMOS).keys()
    others = {"accum_iteration", "pos_embedder.seq", "blocks.0.self_attn.q_norm._extra_state"}
    assert {name for name in weights | others if cosmos.is_weight(name)} == weights


def published_shapes(config):
    """The shapes of a Cosmos network's tensors by NVIDIA's names; allocates nothing."""
    shapes = {}
    for path, leaf in names.flat(abstract_params(config)).items():
        stacked = names.is_stacked(path)
        shape = leaf.shape[1:] if stacked else leaf.shape
        for name in names.their_names(path, leaf.shape[0] if stacked else 1, cosmos.COSMOS):
            shapes[name] = shape[::-1]
    return shapes


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("cosmos")])
def test_the_tensors_of_a_published_cosmos_tell_its_config(preset):
    assert cosmos.config_from_tensors(published_shapes(PRESETS[preset]), {}) == PRESETS[preset]


def test_a_config_json_tells_the_rope_scale_of_an_unpublished_cosmos():
    shapes = published_shapes(COSMOS)
    assert cosmos.config_from_tensors(shapes, cosmos.diffusers_settings(COSMOS)) == COSMOS
    with pytest.raises(UserError, match="no published network has width 48 and 18 input channels"):
        cosmos.config_from_tensors(shapes, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_embedder.proj.1.weight": ()}, "has no matrix x_embedder.proj.1.weight: it is no Cosmos-Predict2 network"),
        ({"blocks.0.self_attn.q_norm.weight": (7,)}, "heads of 7 do not fill a width of 48"),
        ({"final_layer.linear.weight": (4,)}, "has no matrix final_layer.linear.weight"),
    ],
)
def test_tensors_of_another_network_are_an_error(changes, message):
    shapes = published_shapes(COSMOS) | changes
    with pytest.raises(UserError, match=message):
        cosmos.config_from_tensors(shapes, cosmos.diffusers_settings(COSMOS))
