"""What the autoencoders are built from: causal convolutions, 2x resampling, residual blocks, attention.

Tensors are (B, C, H, W) for images or (B, C, T, H, W) for video; `conv` is `nn.Conv2d` or `CausalConv3d`.
Parameter names are those of the checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Conv = type[nn.Conv2d] | type["CausalConv3d"]


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that sees only the past: in time, the first frame is repeated in front."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int], stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(in_dim, out_dim, kernel, stride, padding=(0, padding, padding))

    def forward(self, x: Tensor) -> Tensor:
        # Concatenation rather than an edge pad: exact, and no exporter turns it into index arithmetic.
        first = x[:, :, :1]
        past = [first] * (self.kernel_size[0] - 1)
        x = torch.cat([*past, x], dim=2) if past else x
        return self.as_2d(x) if self.training else super().forward(x)

    def as_2d(self, x: Tensor) -> Tensor:
        """The same as one 2D convolution, each frame's past stacked in its channels.

        oneDNN's gradient of 3D convolutions in bfloat16 is wrong for many sizes, up to NaN (torch 2.13).
        """
        taps, step = self.kernel_size[0], self.stride[0]
        frames = (x.shape[2] - taps) // step + 1
        x = x.transpose(1, 2)
        past = [x[:, tap : tap + (frames - 1) * step + 1 : step] for tap in range(taps)]
        stacked = torch.cat(past, dim=2).flatten(0, 1)  # (B*T, taps*C, H, W)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        out = F.conv2d(stacked, weight, self.bias, self.stride[1:], self.padding[1:])
        return frames_of(out, frames)


def resize_frames(x: Tensor, mode: str) -> Tensor:
    """Each frame 2x higher and wider, "nearest" or "bilinear": (B, C, [T,] H, W) -> (B, C, [T,] 2H, 2W)."""
    # As one 4D resize: runtimes have fast kernels for it, where their 5D one is slow or missing.
    flat = x.flatten(1, -3)  # (B, C*T, H, W)
    return F.interpolate(flat, scale_factor=2.0, mode=mode).unflatten(1, x.shape[1:-2])


def doubled(before: Tensor, after: Tensor) -> Tensor:
    """Interleave two indices per frame (T,) and drop the first of all: (2T - 1,).

    So all frames but the first are doubled, and a single frame needs no case of its own.
    """
    return torch.stack([before, after], dim=1).flatten()[1:]


def repeat_in_time(x: Tensor) -> Tensor:
    """Double all frames but the first by repetition: (B, C, T, H, W) -> (B, C, 2T - 1, H, W)."""
    frame = torch.arange(x.shape[2], device=x.device)
    return x.index_select(2, doubled(frame, frame))


def interpolate_in_time(x: Tensor) -> Tensor:
    """Double all frames but the first linearly: (B, C, T, H, W) -> (B, C, 2T - 1, H, W).

    On frames 1 .. T-1 this is `F.interpolate(scale 2, linear, align_corners=False)`: every output is 3/4 of
    its own frame and 1/4 of the one before or after, which at either end is that frame itself.
    """
    frame = torch.arange(x.shape[2], device=x.device)
    here = doubled(frame, frame)
    near = doubled(frame - 1, frame + 1).clamp(min=1).clamp(max=x.shape[2] - 1)
    near = torch.where(here > 0, near, here)  # the first frame stands apart
    return 0.75 * x.index_select(2, here) + 0.25 * x.index_select(2, near)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1x1 convolution where the width changes."""

    def __init__(self, in_dim: int, out_dim: int, conv: Conv) -> None:
        super().__init__()
        self.norm1 = group_norm(in_dim)
        self.conv1 = conv(in_dim, out_dim, 3, padding=1)
        self.norm2 = group_norm(out_dim)
        self.conv2 = conv(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = conv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.conv_shortcut(x)


class Attention(nn.Module):
    """One head over the pixels of each frame. The norm before it spans all frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.group_norm = group_norm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5:
            return frames_of(self._attend(batch_frames(self.group_norm(x))), x.shape[2])
        return self._attend(self.group_norm(x))

    def _attend(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, H*W, C)
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return self.to_out[0](out).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Two residual blocks around one attention."""

    def __init__(self, dim: int, conv: Conv) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(dim, dim, conv) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(dim)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        return self.resnets[1](self.attentions[0](x) + x)


def group_norm(dim: int) -> nn.GroupNorm:
    """The published autoencoders use 32 groups whatever `norm_num_groups` says."""
    return nn.GroupNorm(32, dim, eps=1e-6)


def batch_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)"""
    return x.transpose(1, 2).flatten(0, 1)


def frames_of(x: Tensor, frames: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W)"""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)
