"""Names of the autoencoders' tensors in Wan's own files (Wan2.1_VAE.pth, Wan2.2_VAE.pth) and in diffusers' folders."""

from typing import Literal

from rcm_jax.convert.places import Place, Table
from rcm_jax.models.vae import VAEConfig

Layout = Literal["wan", "diffusers"]

_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "gamma"}
_ATTENTION = {"norm": "norm", "qkv": "to_qkv", "out": "proj"}
_RESAMPLE = {"conv": "resample.1", "time_conv": "time_conv"}

_WAN_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_WAN_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "shortcut": "shortcut",
}
_WAN_MIDDLE = {"before": "middle.0", "attention": "middle.1", "after": "middle.2"}

_DIFFUSERS_BLOCK = {name: name for name in _WAN_BLOCK} | {"shortcut": "conv_shortcut"}
_DIFFUSERS_MIDDLE = {
    "before": "mid_block.resnets.0",
    "attention": "mid_block.attentions.0",
    "after": "mid_block.resnets.1",
}


def vae_table(config: VAEConfig, layout: Layout) -> Table:
    """Places of the parameters of models/vae.py's VAE, paths "encoder...." and "decoder....", in a layout."""

    def table(path: str, shape: tuple[int, ...]) -> Place:
        network, *inner, leaf = path.split(".")
        name = _wan_name(network, inner, config) if layout == "wan" else _diffusers_name(network, inner, config)
        return Place(f"{name}.{_LEAVES[leaf]}", _published_shape(inner, leaf, shape))

    return table


def _published_shape(inner: list[str], leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A Conv2d's where a layer sees one frame at a time, a Conv3d's elsewhere; a scale has an axis for each window's.

    Linear layers are published as convolutions with a window of 1.
    """
    if leaf == "bias":
        return shape
    window_ndim = 2 if "attention" in inner or inner[-2:] == ["resample", "conv"] else 3
    if leaf == "scale":
        return (*shape, *(1,) * window_ndim)
    *window, in_dim, out_dim = shape
    return (out_dim, in_dim, *(window or (1,) * window_ndim))


def _wan_name(network: str, inner: list[str], config: VAEConfig) -> str:
    match inner:
        case ["quant"]:
            return {"encoder": "conv1", "decoder": "conv2"}[network]
        case ["middle", part, layer]:
            return f"{network}.{_WAN_MIDDLE[part]}.{(_WAN_BLOCK | _ATTENTION)[layer]}"
        case ["levels", level, *position, layer]:
            name = {"encoder": "downsamples", "decoder": "upsamples"}[network]
            number = _number(network, position, config)
            place = f"{level}.{name}.{number}" if config.shortcuts else _flat_number(network, level, number, config)
            return f"{network}.{name}.{place}.{(_WAN_BLOCK | _RESAMPLE)[layer]}"
        case [end]:
            return f"{network}.{_WAN_ENDS[end]}"
    raise ValueError(f"{network}.{'.'.join(inner)} is no layer of the autoencoder")


def _diffusers_name(network: str, inner: list[str], config: VAEConfig) -> str:
    match inner:
        case ["quant"]:
            return {"encoder": "quant_conv", "decoder": "post_quant_conv"}[network]
        case ["middle", part, layer]:
            return f"{network}.{_DIFFUSERS_MIDDLE[part]}.{(_DIFFUSERS_BLOCK | _ATTENTION)[layer]}"
        case ["levels", level, *position, layer]:
            name = {"encoder": "down", "decoder": "up"}[network]
            number = _number(network, position, config)
            if position[0] == "blocks":
                place = f"{level}.resnets.{number}"
            else:
                place = f"{level}.{name}sampler" + ("" if config.shortcuts else "s.0")
            if network == "encoder" and not config.shortcuts:
                place = _flat_number(network, level, number, config)
            return f"{network}.{name}_blocks.{place}.{(_DIFFUSERS_BLOCK | _RESAMPLE)[layer]}"
        case [end]:
            return f"{network}.{end}"
    raise ValueError(f"{network}.{'.'.join(inner)} is no layer of the autoencoder")


def _blocks(network: str, config: VAEConfig) -> int:
    return config.blocks + (network == "decoder")


def _number(network: str, position: list[str], config: VAEConfig) -> int:
    """Of a block within its level; the resampling comes after the blocks."""
    return int(position[1]) if position[0] == "blocks" else _blocks(network, config)


def _flat_number(network: str, level: str, number: int, config: VAEConfig) -> str:
    """Of a block counted through all levels, each of which ends with a resampling."""
    return str(int(level) * (_blocks(network, config) + 1) + number)
