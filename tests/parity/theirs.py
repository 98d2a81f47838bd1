"""Networks of PyTorch that the comparisons share."""

import diffusers
import torch


def create_random(create, seed=0):
    """A network with random weights, in which no bias is zero and no norm's scale one."""
    torch.manual_seed(seed)
    network = create()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network.eval()


def create_autoencoder(config):
    """diffusers' autoencoder of a VAEConfig."""
    return diffusers.AutoencoderKLWan(
        base_dim=config.encoder_dim,
        decoder_base_dim=config.decoder_dim,
        num_res_blocks=config.blocks,
        z_dim=config.latent_channels,
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
        is_residual=config.shortcuts,
        in_channels=config.pixel_channels,
        out_channels=config.pixel_channels,
        patch_size=config.patch if config.patch > 1 else None,
        scale_factor_spatial=config.space_factor * config.patch,
    )
