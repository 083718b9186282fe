"""Small autoencoders with random weights, saved by diffusers as published ones are."""

from pathlib import Path

import torch


def save_kl(folder: Path, *, seed: int = 0, channels: int = 4, in_channels: int = 3, **settings):
    """An AutoencoderKL of factor 4 with weights of order 1, so that means, variances and images vary."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(seed)
    net = AutoencoderKL(
        in_channels=in_channels,
        out_channels=in_channels,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        norm_num_groups=4,
        sample_size=16,
        **settings,
    ).eval()
    net.save_pretrained(folder)
    return net


def save_tiny(folder: Path, *, seed: int = 0, in_channels: int = 3, **settings):
    """An AutoencoderTiny of factor 4."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    torch.manual_seed(seed)
    net = AutoencoderTiny(
        in_channels=in_channels,
        out_channels=in_channels,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        **settings,
    ).eval()
    net.save_pretrained(folder)
    return net
