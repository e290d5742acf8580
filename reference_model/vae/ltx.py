"""Encoder (of one image) and decoder of `AutoencoderKLLTXVideo`: diffusers' modules, set up as NOVA's are.

The published class cannot decode: its `decode` hands a timestep to a tiling helper that takes none and fails.
What it evidently means, `decoder(z, temb=0)`, is computed here: diffusers' decoder as of LTX 0.9.5,
conditioned on timestep 0, with residual 2x upsamplers that halve the width, without noise, not causal. It
equals the published decoder bit for bit; only names of weights differ (`RENAMES`), and diffusers' load too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoDecoder3d, LTXVideoEncoder3d
from torch import Tensor

# Published name -> diffusers' name. Names that are diffusers' already match none of these.
RENAMES = (
    (r"\.time_embed\.timestep_proj\.fc(\d)\.", r".time_embedder.timestep_embedder.linear_\1."),
    (r"\.timestep_scale$", ".timestep_scale_multiplier"),
    (r"\.(conv1|conv2|conv_in|conv_out)\.(weight|bias)$", r".\1.conv.\2"),
    (r"(samplers\.0\.conv)\.(weight|bias)$", r"\1.conv.\2"),
)
STRIDES = ("spatial", "temporal", "spatiotemporal", "spatiotemporal")  # (1, 2, 2), (2, 1, 1), then all by 2


class Encoder(LTXVideoEncoder3d):
    """Moments of one image: (B, 3, H, W) -> (B, 2C, 1, h, w); one variance is shared by all channels."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(
            in_channels=config["in_channels"],
            out_channels=config["latent_channels"],
            block_out_channels=config["block_out_channels"],
            down_block_types=("LTXVideo095DownBlock3D",) * 4,
            spatio_temporal_scaling=(True,) * 4,
            layers_per_block=config["layers_per_block"],
            downsample_type=STRIDES,
            patch_size=config["patch_size"],
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(2))


class Decoder(LTXVideoDecoder3d):
    """(B, C, l, h, w) -> (B, 3, 8 (l - 1) + 1, H, W), at timestep 0."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        depths = config["decoder_layers_per_block"]
        super().__init__(
            in_channels=config["latent_channels"],
            out_channels=config["out_channels"],
            # diffusers counts widths before an upsampler halves them, and depths from the output inwards.
            block_out_channels=config["decoder_block_out_channels"][1:],
            layers_per_block=(*depths[-2::-1], depths[-1]),
            spatio_temporal_scaling=(True,) * 3,
            inject_noise=(False,) * 4,
            upsample_residual=(True,) * 3,
            upsample_factor=(2,) * 3,  # type: ignore[arg-type]  # annotated bool, used as int
            timestep_conditioning=True,
            patch_size=config["patch_size"],
        )

    def forward(self, z: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z, z.new_zeros(z.shape[:1]))
