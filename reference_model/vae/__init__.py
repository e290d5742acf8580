"""The autoencoders of NOVA checkpoints: latents of one tile to pixels, and one image to a posterior.

`VaeDecoder` and `VaeEncoder` are the two stages; a family's tiling in time stands in nova_export/config.py.
Their parameters are named as in the checkpoint: each loads from the keys that start with its `prefixes`,
every key first passed through `parameter_name` (old attention names; LTX). Scaling of latents is part of both
graphs. Cutting into tiles and joining them is the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nova_export.errors import CheckpointError
from reference_model.vae import autoencoder_kl, cogvideox, ltx
from reference_model.vae.blocks import batch_frames, frames_of

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One class of autoencoder: its two halves, and the published defaults of its config."""

    decoder: Callable[[Config], nn.Module]
    encoder: Callable[[Config], nn.Module]
    conv: type[nn.Conv2d] | type[nn.Conv3d]  # of quant_conv and post_quant_conv
    defaults: Config
    renames: tuple[tuple[str, str], ...] = ()


# Attention of before diffusers 0.15.
OLD_ATTENTION = (
    (r"(\.attentions\.\d+\.)query\.", r"\1to_q."),
    (r"(\.attentions\.\d+\.)key\.", r"\1to_k."),
    (r"(\.attentions\.\d+\.)value\.", r"\1to_v."),
    (r"(\.attentions\.\d+\.)proj_attn\.", r"\1to_out.0."),
)
COMMON = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "double_z": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
COGVIDEOX = {
    **COMMON,
    **NO_QUANT,
    "block_out_channels": (128, 256, 256, 512),
    "layers_per_block": 3,
    "scaling_factor": 0.7,
}
LTX = {
    **COMMON,
    **NO_QUANT,
    "block_out_channels": (128, 256, 512, 1024, 2048),
    "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_block_out_channels": (128, 256, 512, 1024),
    "decoder_layers_per_block": (5, 5, 5, 5),
    "latent_channels": 128,
    "scaling_factor": 1.0,
    "patch_size": 4,
}
FAMILIES = {
    "AutoencoderKL": Family(
        autoencoder_kl.Decoder,
        autoencoder_kl.Encoder,
        conv=nn.Conv2d,
        defaults=COMMON,
        renames=OLD_ATTENTION,
    ),
    "AutoencoderKLOpenSora": Family(
        autoencoder_kl.Decoder,
        autoencoder_kl.Encoder,
        conv=nn.Conv3d,
        defaults=COMMON,
        renames=OLD_ATTENTION,
    ),
    "AutoencoderKLCogVideoX": Family(
        cogvideox.Decoder,
        cogvideox.Encoder,
        conv=nn.Conv3d,
        defaults=COGVIDEOX,
    ),
    "AutoencoderKLLTXVideo": Family(
        ltx.Decoder,
        ltx.Encoder,
        conv=nn.Conv3d,
        defaults=LTX,
        renames=ltx.RENAMES,
    ),
}


class _Stage(nn.Module):
    """What decoder and encoder share: the config with the published defaults, and the names of weights."""

    prefixes: tuple[str, ...]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.family, self.config = _family(config)
        self.scale: float = self.config["scaling_factor"]
        self.shift: float = self.config["shift_factor"] or 0.0

    def parameter_name(self, key: str) -> str:
        """The name here of the weight that a checkpoint calls `key`."""
        for pattern, name in self.family.renames:
            key = re.sub(pattern, name, key)
        return key

    def _quant(self, use: str, dim: int) -> nn.Module:
        return self.family.conv(dim, dim, 1) if self.config[use] else nn.Identity()


class VaeDecoder(_Stage):
    """One tile of latents, scaled as the transformer makes them, to pixels in [-1, 1] (not clamped).

    (B, C, l, h, w) -> (B, 3, F, H, W) with F = frames_per_latent * (l - 1) + 1. An image VAE decodes each
    latent frame by itself.
    """

    prefixes = ("decoder.", "post_quant_conv.")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.decoder = self.family.decoder(self.config)
        self.post_quant_conv = self._quant("use_post_quant_conv", self.config["latent_channels"])

    def forward(self, latents: Tensor) -> Tensor:
        z = latents * (1 / self.scale)
        z = z + self.shift if self.shift else z
        if self.family.conv is nn.Conv2d:
            return frames_of(self._decode(batch_frames(z)), latents.shape[2])
        return self._decode(z)

    def _decode(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(z))
        return pixels


class VaeEncoder(_Stage):
    """Images to the posterior of their latents: (B, 3, H, W) in [-1, 1] -> mean, std, each (B, C, h, w).

    Both are scaled as the transformer takes them: mean + std * noise is a sample. With `double_z` false there
    is no variance, and std is 0.
    """

    prefixes = ("encoder.", "quant_conv.")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.encoder = self.family.encoder(self.config)
        moments = self.config["latent_channels"] * (2 if self.config["double_z"] else 1)
        self.quant_conv = self._quant("use_quant_conv", moments)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.quant_conv(self.encoder(pixels))  # (B, 2C, h, w) or (B, 2C, 1, h, w)
        moments = moments.squeeze(2) if moments.dim() == 5 else moments
        if not self.config["double_z"]:
            mean, std = moments, torch.zeros_like(moments)
        else:
            mean, logvar = moments.chunk(2, dim=1)
            std = (logvar.clamp(-30.0, 20.0) * 0.5).exp()
        mean = mean - self.shift if self.shift else mean
        return mean * self.scale, std * self.scale


def _family(config: Config) -> tuple[Family, dict[str, Any]]:
    """The family of a config, and the config with the published defaults filled in."""
    name = config.get("_class_name")
    if name not in FAMILIES:
        raise CheckpointError(f"vae/config.json: _class_name is {name!r}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if family.renames is ltx.RENAMES and config.get("latents_mean"):
        raise CheckpointError("vae/config.json: latents_mean: scaling per channel is not supported for LTX")
    return family, {**family.defaults, **config}
