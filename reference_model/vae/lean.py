"""The OpenSora decoder cut at the convolutions of its last two blocks, which need a few frames at a time.

Exact: a group norm spans all frames of a tile, so each piece also returns what its frames add to the next
norm's statistics; a convolution sees its frame and the two before it. Frames stay apart: (1, C, H, W) each.
Their order, and what goes from one to the next, stands in nova_export/lean_stages.py; the loop over frames
in nova_export/runtime/lean_decode.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nova_export.lean_stages import GROUPS, LEAN_BLOCKS
from reference_model.vae import COMMON, Config, VaeDecoder
from reference_model.vae.autoencoder_kl import Decoder
from reference_model.vae.blocks import CausalConv3d, batch_frames, resize_frames

NORM_OF = {"conv1": "norm1", "conv2": "norm2", "conv_out": "conv_norm_out"}


class Start(VaeDecoder):
    """The blocks before: latents (1, C, l, h, w) -> frames (F, C', H, W) in `dtype`, mean and variance."""

    def __init__(self, config: Config, dtype: str) -> None:
        super().__init__(config)
        assert isinstance(self.decoder, Decoder)
        self.decoder.up_blocks = self.decoder.up_blocks[:-LEAN_BLOCKS]
        self.decoder.up_blocks[-1].upsamplers = nn.ModuleList()
        del self.decoder.conv_norm_out, self.decoder.conv_out
        self.dtype = getattr(torch, dtype)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x = super().forward(latents)
        return batch_frames(x).to(self.dtype), *statistics(x)

    def _decode(self, z: Tensor) -> Tensor:
        assert isinstance(self.decoder, Decoder)
        x: Tensor = self.decoder.mid_block(self.decoder.conv_in(self.post_quant_conv(z)))
        for block in self.decoder.up_blocks:
            x = block(x)
        return x


class Piece(nn.Module):
    """One convolution, at `path` in the decoder. dtype: of frames that go from piece to piece."""

    def __init__(self, config: Config, path: str, dtype: str) -> None:
        super().__init__()
        self.path, self.dtype = path, getattr(torch, dtype)
        self.take(Decoder({**COMMON, **config}))

    def take(self, decoder: Decoder) -> None:
        """Keep of the decoder what this piece needs."""
        raise NotImplementedError

    def parameter_name(self, key: str) -> str:
        """The name here of the weight that a checkpoint calls `key`."""
        where = self.path.rpartition(".")[0]
        return key.removeprefix("decoder.").removeprefix(f"{where}.")

    def made(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The frame as the next piece takes it, and its statistics."""
        return frame.to(self.dtype), *statistics(frame)


class Upsampler(Piece):
    """A frame (1, C, H, W), twice as high and wide and convolved; mean and variance."""

    conv: CausalConv3d

    def take(self, decoder: Decoder) -> None:
        self.add_module("conv", decoder.get_submodule(self.path))

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = resize_frames(frame.float(), "nearest")
        return self.made(self.conv(x.unsqueeze(2)).squeeze(2))


class GrowingUpsampler(Upsampler):
    """One that doubles time too: between two frames, here nearer than near, and so for the two before it."""

    def forward(  # type: ignore[override]
        self, here: Tensor, near: Tensor, here_1: Tensor, near_1: Tensor, here_2: Tensor, near_2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        here, near = torch.stack([here_2, here_1, here], dim=1), torch.stack([near_2, near_1, near], dim=1)
        x = (0.75 * here.float() + 0.25 * near.float()).flatten(1, 2)
        return self.made(over_taps(self.conv, resize_frames(x, "bilinear")))


class NormConvolution(Piece):
    """Normalised, through SiLU and convolved with the two frames before it; mean and variance.

    mean, variance (32,): of what is normalised, over the whole tile. Before the first frame stands itself.
    """

    def take(self, decoder: Decoder) -> None:
        where, _, name = self.path.rpartition(".")
        self.names = NORM_OF[name], name
        for each in self.names:
            self.add_module(each, decoder.get_submodule(f"{where}.{each}".lstrip(".")))

    def convolve(
        self, frame: Tensor, past_1: Tensor, past_2: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor:
        norm, conv = (self.get_submodule(name) for name in self.names)
        assert isinstance(norm, nn.GroupNorm) and isinstance(conv, CausalConv3d)
        each = norm.num_channels // norm.num_groups
        scale = norm.weight * (variance + norm.eps).rsqrt().repeat_interleave(each)
        shift = norm.bias - mean.repeat_interleave(each) * scale
        x = torch.stack([past_2, past_1, frame], dim=1).float()  # (1, taps, C, H, W)
        return over_taps(conv, F.silu(x * scale[:, None, None] + shift[:, None, None]).flatten(1, 2))


class FirstConvolution(NormConvolution):
    """Of a residual block."""

    def forward(
        self, frame: Tensor, past_1: Tensor, past_2: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.made(self.convolve(frame, past_1, past_2, mean, variance))


class SecondConvolution(NormConvolution):
    """Of a residual block: residual, the frame that the block got, is added."""

    def take(self, decoder: Decoder) -> None:
        super().take(decoder)
        self.conv_shortcut = decoder.get_submodule(f"{self.path.rpartition('.')[0]}.conv_shortcut")

    def forward(
        self,
        frame: Tensor,
        past_1: Tensor,
        past_2: Tensor,
        residual: Tensor,
        mean: Tensor,
        variance: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = residual.float()
        if isinstance(self.conv_shortcut, CausalConv3d):
            kept = F.conv2d(kept, self.conv_shortcut.weight.squeeze(2), self.conv_shortcut.bias)
        return self.made(self.convolve(frame, past_1, past_2, mean, variance) + kept)


class LastConvolution(NormConvolution):
    """To pixels (1, 3, H, W) in [-1, 1], not clamped."""

    def forward(
        self, frame: Tensor, past_1: Tensor, past_2: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor:
        return self.convolve(frame, past_1, past_2, mean, variance)


def over_taps(conv: CausalConv3d, x: Tensor) -> Tensor:
    """One frame of a 3D convolution, as one in 2D: x (1, taps * C, H, W), the oldest tap first."""
    return F.conv2d(x, conv.weight.transpose(1, 2).flatten(1, 2), conv.bias, padding=1)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (32,) of the groups of a group norm: x (1, C, ...)."""
    x = x.float().unflatten(1, (GROUPS, -1)).flatten(2)
    mean = x.mean(dim=2, keepdim=True)
    return mean.flatten(), (x - mean).square().mean(dim=2).flatten()
