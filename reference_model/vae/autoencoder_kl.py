"""Encoder and decoder of `AutoencoderKL` (2D) and of `AutoencoderKLOpenSora` (3D, causal in time).

Both are one architecture over two kinds of convolution. OpenSora's encoder begins in 2D and goes on in 3D;
its decoder is 3D throughout. The 2D modules are our own and not diffusers': those branch on the batch size,
which no single graph with a dynamic batch can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from nova_export.errors import CheckpointError
from reference_model.vae.blocks import (
    CausalConv3d,
    Conv,
    MidBlock,
    ResBlock,
    batch_frames,
    frames_of,
    group_norm,
    interpolate_in_time,
    resize_frames,
)

Config = Mapping[str, Any]


class Downsample(nn.Module):
    """Halve height and width, and time if 3D. The first 3D one makes videos of `frames` frames of images."""

    def __init__(self, dim: int, conv: Conv) -> None:
        super().__init__()
        self.conv = conv(dim, dim, 3, stride=2)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        if isinstance(self.conv, CausalConv3d) and x.dim() == 4:
            x = x.unsqueeze(2) if frames == 1 else frames_of(x, frames)  # (B, C, T, H, W)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width, and time if `in_time`. A 3D one that is not convolves single frames."""

    def __init__(self, dim: int, conv: Conv, in_time: bool) -> None:
        super().__init__()
        self.in_time = in_time
        if conv is CausalConv3d and not in_time:
            self.conv: nn.Module = CausalConv3d(dim, dim, (1, 3, 3), padding=1)
        else:
            self.conv = conv(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time:
            # Together trilinear; time first, while frames are small.
            return self.conv(resize_frames(interpolate_in_time(x), "bilinear"))
        return self.conv(resize_frames(x, "nearest"))


class Stack(nn.Module):
    """Residual blocks one after another; the first changes the width."""

    def __init__(self, in_dim: int, out_dim: int, conv: Conv, depth: int) -> None:
        super().__init__()
        dims = [in_dim] + [out_dim] * depth
        self.resnets = nn.ModuleList(ResBlock(*pair, conv) for pair in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class DownBlock(Stack):
    """A stack, then a downsampler unless `down` is None."""

    def __init__(self, in_dim: int, out_dim: int, conv: Conv, depth: int, down: Conv | None) -> None:
        super().__init__(in_dim, out_dim, conv, depth)
        self.downsamplers = nn.ModuleList([Downsample(out_dim, down)] if down else [])

    def forward(self, x: Tensor, frames: int = 1) -> Tensor:
        x = super().forward(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, frames)
        return x


class UpBlock(Stack):
    """A stack, then an upsampler if `up`."""

    def __init__(self, in_dim: int, out_dim: int, conv: Conv, depth: int, up: bool, in_time: bool) -> None:
        super().__init__(in_dim, out_dim, conv, depth)
        self.upsamplers = nn.ModuleList([Upsample(out_dim, conv, in_time)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class Encoder(nn.Module):
    """(B, 3, H, W) -> moments (B, 2C, h, w), or (B, 2C, 1, h, w) when it ends in 3D.

    One that ends in 3D takes clips too: (B, 3, F, H, W) -> (B, 2C, l, h, w).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        dims, convs = config["block_out_channels"], _encoder_convs(config)
        outputs = config["latent_channels"] * (2 if config["double_z"] else 1)
        self.conv_in = nn.Conv2d(config["in_channels"], dims[0], 3, padding=1)
        # A downsampler is of the NEXT block's kind; the last block has none.
        blocks = zip([dims[0], *dims], dims, convs, [*convs[1:], None], strict=False)
        depth = config["layers_per_block"]
        self.down_blocks = nn.ModuleList(DownBlock(a, b, conv, depth, down) for a, b, conv, down in blocks)
        self.mid_block = MidBlock(dims[-1], convs[-1])
        self.conv_norm_out = group_norm(dims[-1])
        self.conv_out = convs[-1](dims[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[2] if x.dim() == 5 else 1
        x = self.conv_in(batch_frames(x) if x.dim() == 5 else x)
        for block in self.down_blocks:
            x = block(x, frames)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, 3, H, W), or (B, C, l, h, w) -> (B, 3, F, H, W)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        conv = _decoder_conv(config)
        dims = config["block_out_channels"][::-1]
        self.conv_in = conv(config["latent_channels"], dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0], conv)
        last, depth = len(dims) - 1, config["layers_per_block"] + 1
        self.up_blocks = nn.ModuleList()
        for i, (in_dim, dim) in enumerate(zip([dims[0], *dims], dims, strict=False)):
            # Of the upsamplers all but the last reach into time.
            in_time = conv is CausalConv3d and i < last - 1
            self.up_blocks.append(UpBlock(in_dim, dim, conv, depth, up=i < last, in_time=in_time))
        self.conv_norm_out = group_norm(dims[-1])
        self.conv_out = conv(dims[-1], config["out_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _encoder_convs(config: Config) -> list[Conv]:
    """The convolution of each block. An `AutoencoderKL` is 2D whatever its block types are called."""
    dims, names = config["block_out_channels"], config["down_block_types"]
    if config["_class_name"] == "AutoencoderKL":
        return [nn.Conv2d] * len(dims)
    convs: list[Conv] = [CausalConv3d if "Block3D" in name else nn.Conv2d for name in names]
    flat = convs.count(nn.Conv2d)
    if len(convs) != len(dims) or not flat or convs[flat:].count(nn.Conv2d):
        raise CheckpointError(
            f"vae/config.json: down_block_types {names} cannot be built: one per entry of block_out_channels "
            "is needed, 2D blocks first, then 3D blocks"
        )
    return convs


def _decoder_conv(config: Config) -> Conv:
    """The convolution of all blocks; the published OpenSora decoder runs in 3D only."""
    if config["_class_name"] == "AutoencoderKL":
        return nn.Conv2d
    if any("Block2D" in name for name in config["up_block_types"]):
        raise CheckpointError(
            f"vae/config.json: up_block_types {config['up_block_types']} cannot be built: "
            "every block of an AutoencoderKLOpenSora must be UpDecoderBlock3D"
        )
    return CausalConv3d
