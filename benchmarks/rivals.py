"""The parts of diffusers' and transformers' video pipelines in PyTorch, as rivals of ours: bfloat16, random weights."""

from collections.abc import Callable
from typing import Any

from rcm_jax.convert.wan import diffusers_settings
from rcm_jax.models.umt5 import T5Config
from rcm_jax.models.vae import VAEConfig
from rcm_jax.models.wan import WanConfig


def find_fault() -> str | None:
    """Why the rivals cannot run here, or None."""
    try:
        import diffusers  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    return None if torch.cuda.is_available() else "PyTorch finds no GPU"


def find_versions() -> dict[str, str]:
    """Of PyTorch, diffusers and the device."""
    import diffusers
    import torch

    return {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": torch.cuda.get_device_name()}


def create_autoencoder(config: VAEConfig) -> Any:
    """AutoencoderKLWan of a config of ours. cuDNN chooses its convolutions by measurement."""
    import diffusers
    import torch

    torch.backends.cudnn.benchmark = True
    return _create(
        diffusers.AutoencoderKLWan,
        base_dim=config.encoder_dim,
        decoder_base_dim=config.decoder_dim,
        z_dim=config.latent_channels,
        is_residual=config.shortcuts,
        in_channels=config.pixel_channels,
        out_channels=config.pixel_channels,
        patch_size=config.patch if config.patch > 1 else None,
        scale_factor_spatial=config.space_factor * config.patch,
    )


def create_transformer(config: WanConfig) -> Any:
    """WanTransformer3DModel of a config of ours, compiled."""
    import diffusers
    import torch

    settings = {name: value for name, value in diffusers_settings(config).items() if not name.startswith("_")}
    return torch.compile(_create(diffusers.WanTransformer3DModel, **settings))


def create_text_encoder(config: T5Config) -> Any:
    """UMT5EncoderModel of a config of ours."""
    import transformers

    sizes = dict(vocab_size=config.vocabulary, d_model=config.dim, d_ff=config.ffn_dim, num_heads=config.heads)
    return _create(
        lambda **words: transformers.UMT5EncoderModel(transformers.UMT5Config(**words)),
        d_kv=config.head_dim,
        num_layers=config.layers,
        **sizes,
    )


def _create(network: Callable[..., Any], **words: Any) -> Any:
    import torch

    with torch.device("cuda"):
        return network(**words).to(torch.bfloat16).eval()
