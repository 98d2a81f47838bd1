"""The published models: their parts, and the settings that their authors sample them with.

Sources: generate.py and wan/configs of github.com/Wan-Video/Wan2.1 and Wan2.2, the inference scripts of
github.com/nvidia-cosmos/cosmos-predict2, and for distilled models those of github.com/NVlabs/rcm.
"""

import dataclasses
from typing import Literal, get_args

from rcm_jax.config import UserError

SamplerName = Literal["few-step-sde", "few-step-ode", "euler", "unipc"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
FEW_STEPS = 4
FRAME_FACTOR = 4  # frames of one latent frame, the first excepted

# Width and height. With an image, a name gives the area alone: the shape is the image's.
RESOLUTIONS = {"480p": (832, 480), "704p": (1280, 704), "720p": (1280, 720), "768p": (1360, 768)}

_WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_COSMOS_NEGATIVE = (
    "The video captures a series of frames showing ugly scenes, static with no motion, motion blur, over-saturation, "
    "shaky footage, low resolution, grainy texture, pixelated images, poorly lit areas, underexposed and overexposed "
    "scenes, poor color balance, washed out colors, choppy sequences, jerky movements, low frame rate, artifacting, "
    "color banding, unnatural transitions, outdated special effects, fake elements, unconvincing visuals, poorly "
    "edited content, jump cuts, visual noise, and flickering. Overall, the video is of poor quality."
)


@dataclasses.dataclass(frozen=True)
class Published:
    """What a model is sampled with.

    Attributes:
        steps, guidance: of a teacher. A model of two networks has two strengths of guidance, the first for the one that
            takes noisier samples. 1 is no guidance; NVIDIA counts from 0.
        shift: of a teacher's times towards noise; None for the times of Cosmos-Predict2.
        sigma_max: noise level at which a distilled model starts.
        size: a name of RESOLUTIONS.
        block: pixels of a token, along rows and columns.
        negative: the caption to go away from.
        image: whether the first frame is given.
        condition_frames: how many of a video's last frames the model can go on from, by default the last number.
        vae, text_encoder, image_encoder: presets of models/vae.py, umt5.py and clip.py.
    """

    steps: int = 50
    guidance: tuple[float, ...] = (5.0,)
    shift: float | None = 5.0
    sampler: SamplerName = "unipc"
    sigma_max: float = 80.0
    size: str = "720p"
    block: int = 16
    frames: int = 81
    fps: int = 16
    negative: str = _WAN_NEGATIVE
    image: Literal["none", "optional", "required"] = "none"
    condition_frames: tuple[int, ...] = ()
    vae: str = "wan2.1"
    text_encoder: str = "umt5-xxl"
    image_encoder: str | None = None


_COSMOS = Published(steps=35, shift=None, sampler="euler", negative=_COSMOS_NEGATIVE, text_encoder="t5-11b")
# By model, or by the models' common name where sizes agree.
MODELS = {
    "wan2.1-t2v": Published(),
    "wan2.1-t2v-1.3b": Published(size="480p"),
    "wan2.1-i2v": Published(
        steps=40,
        shift=3.0,  # at 480p; 5 at 720p
        size="480p",
        negative="镜头晃动，" + _WAN_NEGATIVE,
        image="required",
        image_encoder="clip-vit-h-14",
    ),
    "wan2.2-t2v": Published(steps=40, guidance=(4.0, 3.0), shift=12.0),
    "wan2.2-i2v": Published(steps=40, guidance=(3.5, 3.5), sigma_max=200.0, image="required"),
    "wan2.2-ti2v": Published(size="704p", block=32, frames=121, fps=24, image="optional", vae="wan2.2"),
    "cosmos-predict2-t2i": dataclasses.replace(_COSMOS, size="768p", frames=1, negative=""),
    "cosmos-predict2-v2w": dataclasses.replace(
        _COSMOS, guidance=(8.0,), size="704p", frames=93, image="required", condition_frames=(1, 5)
    ),
}


def find_published(model: str) -> Published:
    """The settings of a model, named with or without its size.

    Raises UserError for a name that is none of a published model.
    """
    for name in (model, model.rpartition("-")[0]):
        if name in MODELS:
            return MODELS[name]
    raise UserError(f"--model {model} has no published settings: choose one of {', '.join(MODELS)}, with a size or not")


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from "832x480" or the name of a resolution. Raises UserError for anything else."""
    if text in RESOLUTIONS:
        return RESOLUTIONS[text]
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"--size {text} must be WIDTHxHEIGHT or one of {', '.join(RESOLUTIONS)}: write --size 832x480")
    return int(width), int(height)


def fit_size(image: tuple[int, int], area: int, block: int) -> tuple[int, int]:
    """Width and height, nearest multiples of `block`, of a video of about `area` pixels that is shaped like an image.

    This is the rule of rCM's scripts. Wan's own round down, so a video may have a few rows or columns less there.
    """
    ratio = image[0] / image[1]
    width, height = (max(1, round((area * r) ** 0.5 / block)) * block for r in (ratio, 1 / ratio))
    return width, height
