"""Encoder (of one image) and decoder of `AutoencoderKLCogVideoX`.

Written out rather than taken from diffusers: there, an even number of latent frames takes another path (every
frame is doubled, the first too), so results differ from the published code, and one graph cannot hold both.
Weights are named as NOVA's checkpoints name them (`conv1.weight`, `norm1.scale.weight`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from reference_model.vae.blocks import (
    CausalConv3d,
    batch_frames,
    frames_of,
    group_norm,
    repeat_in_time,
    resize_frames,
)

Config = Mapping[str, Any]


class LatentNorm(nn.GroupNorm):
    """Group norm whose scale and shift are 1x1 convolutions of the latents z, already as large as x."""

    def __init__(self, dim: int, z_dim: int) -> None:
        super().__init__(32, dim, eps=1e-6)
        self.scale = CausalConv3d(z_dim, dim, 1)
        self.shift = CausalConv3d(z_dim, dim, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * self.scale(z) + self.shift(z)


class PlainNorm(nn.GroupNorm):
    """Group norm that is handed no latents: the encoder's."""

    def forward(self, x: Tensor, z: None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def norm(dim: int, z_dim: int | None) -> nn.GroupNorm:
    """The decoder's norm, or without latents the encoder's."""
    return LatentNorm(dim, z_dim) if z_dim else PlainNorm(32, dim, eps=1e-6)


class ResBlock(nn.Module):
    """Like the other autoencoders' residual block, its norms steered by z (B, C, T, H, W)."""

    def __init__(self, in_dim: int, out_dim: int, z_dim: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(in_dim, z_dim), norm(out_dim, z_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3, padding=1)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, z)))
        return self.conv2(F.silu(self.norm2(h, z))) + self.conv_shortcut(x)


class Stack(nn.Module):
    """Residual blocks one after another, of these widths."""

    def __init__(self, dims: list[int], z_dim: int | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(*pair, z_dim) for pair in pairwise(dims))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x, z)
        return x


class FrameConv(nn.Module):
    """A 2D convolution on every frame: (B, C, T, H, W) -> (B, C, T, H', W')."""

    def __init__(self, dim: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return frames_of(self.conv(batch_frames(x)), x.shape[2])


class DownBlock(Stack):
    """A stack, then height and width halved if `down`."""

    def __init__(self, dims: list[int], down: bool) -> None:
        super().__init__(dims)
        self.downsamplers = nn.ModuleList([FrameConv(dims[-1], stride=2, padding=0)] if down else [])

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        x = super().forward(x, z)
        for downsampler in self.downsamplers:
            x = downsampler(F.pad(x, (0, 1, 0, 1)))
        return x


class UpBlock(Stack):
    """A stack, then 2x nearest upsampling if `up`. z grows with x, for the norms need it at their size."""

    def __init__(self, dims: list[int], z_dim: int, up: bool, in_time: bool) -> None:
        super().__init__(dims, z_dim)
        self.upsamplers = nn.ModuleList([FrameConv(dims[-1], stride=1, padding=1)] if up else [])
        self.in_time = in_time

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = super().forward(x, z)
        for upsampler in self.upsamplers:
            x, z = upsampler(grow(x, self.in_time)), grow(z, self.in_time)
        return x, z


class Encoder(nn.Module):
    """Moments of one image: (B, 3, H, W) -> (B, 2C, 1, h, w). Time is one frame, so nothing pools over it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dims, depth = config["block_out_channels"], config["layers_per_block"]
        self.conv_in = CausalConv3d(config["in_channels"], dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock([in_dim] + [dim] * depth, down=i < len(dims) - 1)
            for i, (in_dim, dim) in enumerate(zip([dims[0], *dims], dims, strict=False))
        )
        self.mid_block = Stack([dims[-1]] * 3)
        self.conv_norm_out = group_norm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.unsqueeze(2))  # (B, C, 1, H, W)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """(B, C, l, h, w) -> (B, 3, 4 (l - 1) + 1, H, W). The first two upsamplers reach into time."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dims, depth = config["block_out_channels"][::-1], config["layers_per_block"] + 1
        z_dim = config["latent_channels"]
        self.conv_in = CausalConv3d(z_dim, dims[0], 3, padding=1)
        self.mid_block = Stack([dims[0]] * 3, z_dim)
        self.up_blocks = nn.ModuleList(
            UpBlock([in_dim] + [dim] * depth, z_dim, up=i < len(dims) - 1, in_time=i < 2)
            for i, (in_dim, dim) in enumerate(zip([dims[0], *dims], dims, strict=False))
        )
        self.conv_norm_out = LatentNorm(dims[-1], z_dim)
        self.conv_out = CausalConv3d(dims[-1], config["out_channels"], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z), z)
        for block in self.up_blocks:
            x, z = block(x, z)
        return self.conv_out(F.silu(self.conv_norm_out(x, z)))


def grow(x: Tensor, in_time: bool) -> Tensor:
    """Nearest 2x in height and width, and in time for all frames but the first."""
    return resize_frames(repeat_in_time(x) if in_time else x, "nearest")
