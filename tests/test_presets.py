"""Every preset has the size of the published model."""

import math

import jax
import pytest

from rcm_jax.models.presets import PRESETS, create_network

# The exact total, which `make parity` also counts in diffusers' model of each, and the size in GB (1e9 bytes) of the
# published 16-bit file. Three totals are published to the last parameter:
# - Wan2.2 T2V A14B, whose shape is Wan2.1's: total_size 57,153,966,336 in each expert's diffusers index, float32;
# - Wan2.2 I2V A14B: 20 input channels more, each with four weights for each of 5,120 channels;
# - Wan2.2 TI2V 5B: 19,999,150,848 bytes of float32.
# The files are those of Comfy-Org/Wan_2.1_ComfyUI_repackaged, Wan_2.2_ComfyUI_Repackaged and
# Cosmos_Predict2_repackaged. For Cosmos-Predict2 0.6B there is only the number in the name.
PUBLISHED = {
    "wan2.1-t2v-1.3b": (1_418_996_800, "2.84"),
    "wan2.1-t2v-14b": (57_153_966_336 // 4, "28.6"),
    "wan2.1-i2v-14b": (16_394_878_784, "32.8"),
    "wan2.2-t2v-a14b": (57_153_966_336 // 4, "28.6"),
    "wan2.2-i2v-a14b": (57_153_966_336 // 4 + 20 * 4 * 5120, "28.6"),
    "wan2.2-ti2v-5b": (19_999_150_848 // 4, "10.0"),
    "cosmos-predict2-t2i-0.6b": (597_536_000, "1.2"),
    "cosmos-predict2-t2i-2b": (1_956_405_248, "3.91"),
    "cosmos-predict2-t2i-14b": (14_265_265_152, "28.5"),
    "cosmos-predict2-v2w-2b": (1_956_405_248 + 4 * 2048, "3.91"),
    "cosmos-predict2-v2w-14b": (14_265_265_152 + 4 * 5120, "28.5"),
}


def test_all_but_the_toy_models_are_published():
    assert PUBLISHED.keys() == PRESETS.keys() - {"digits", "digits28"}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_the_published_model(preset):
    expected, gigabytes = PUBLISHED[preset]
    params = create_network(PRESETS[preset]).abstract_params()
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert total == expected
    decimals = len(gigabytes.partition(".")[2])
    assert f"{2 * total / 1e9:.{decimals}f}" == gigabytes


@pytest.mark.parametrize(
    ("preset", "latent", "tokens"),
    [
        ("wan2.1-t2v-1.3b", (21, 60, 104, 16), 32_760),  # 81 frames of 480 x 832
        ("wan2.2-ti2v-5b", (31, 44, 80, 48), 27_280),  # 121 frames of 704 x 1280, compressed 16-fold
        ("cosmos-predict2-t2i-2b", (1, 96, 170, 16), 4_080),  # an image of 768 x 1360
    ],
)
def test_a_latent_has_one_token_for_every_patch(preset, latent, tokens):
    assert PRESETS[preset].tokens(latent) == tokens
