"""Layers that NOVA's two encoders share. Parameter names are those of the published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nova_export.config import FREQUENCIES

THETA = 10000.0


def frequencies(values: Tensor) -> Tensor:
    """Angles of 128 frequencies 10000^(-i/128): (...) -> (..., 128). Halves are sin and cos of them."""
    half = FREQUENCIES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=values.device) / half
    return values.unsqueeze(-1) * torch.pow(THETA, -exponent)


def sincos(values: Tensor) -> Tensor:
    """(...) -> (..., 256): sin, then cos, of each value times 128 frequencies (frame, motion embeddings)."""
    angles = frequencies(values)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(values.dtype)


def position_table(width: int, grid: tuple[int, int]) -> Tensor:
    """2D sincos table (rows * columns, width): column sin, column cos, row sin, row cos."""
    # Computed, not loaded: real numbers even while modules are made on the meta device.
    with torch.device("cpu"):
        exponent = torch.arange(width // 4, dtype=torch.float32) / (width // 4)
        columns, rows = grid_positions(grid).flip(-1).unbind(-1)
        angles = [axis.unsqueeze(-1) / torch.pow(THETA, exponent) for axis in (columns, rows)]
        return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1)


def grid_positions(grid: tuple[int, int]) -> Tensor:
    """(rows * columns, 2): row and column of each token."""
    rows = torch.arange(grid[0], dtype=torch.float32).repeat_interleave(grid[1])
    columns = torch.arange(grid[1], dtype=torch.float32).repeat(grid[0])
    return torch.stack([rows, columns], dim=-1)


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Angles of 3D positions (..., 3) in (t, y, x): (..., head_dim / 2).

    The head is split into d/8 for t and two equal rests for y and x.
    """
    time = head_dim // 8
    angles = []
    for axis, dim in enumerate((time, (head_dim - time) // 2, (head_dim - time) // 2)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        angles.append(positions[..., axis : axis + 1] / torch.pow(THETA, exponent))
    return torch.cat(angles, dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position on interleaved (even, odd) pairs. x (B, H, S, d); cos, sin (B or 1, 1, S, d / 2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class PatchEmbed(nn.Module):
    """Patches of latents to tokens; also cuts latents into patches and puts them together again."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def patchify(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, p * p * C), values in the order (row in patch, column in patch, channel)."""
        x = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # (B, C, h/p, p, w/p, p)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The reverse of `patchify`, for a grid of (rows, columns) patches."""
        x = tokens.unflatten(2, (self.patch, self.patch, self.channels)).unflatten(1, grid)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def embed(self, tokens: Tensor) -> Tensor:
        """Already cut patches (..., p * p * C) -> (..., width): the convolution as one product."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(tokens, weight, self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, width)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention; queries may be fewer than keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, H, S, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (B, H, Q, d), k and v (B, H, S, d), mask True where a key may be seen -> (B, Q, D)."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        q, k, v = (self.split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self.attend(q, k, v)


class FeedForward(nn.Module):
    """Two layers, exact GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + LN(attention(x)), then x + LN(MLP(x)): norms stand behind, the residual stream feeds both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.mlp(x))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.feed_forward(x + self.norm1(self.attn(x, rotary)))


class Projector(nn.Module):
    """Two linear layers with SiLU between, as the head uses."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


def embedding_mlp(width: int) -> nn.Sequential:
    """Sincos features to the model's width: frame, flow and fps embeddings."""
    return nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))


class AdaLayerNorm(nn.Module):
    """Scale, shift (and gate) of a normed x, from a condition through SiLU and a (low-rank) linear layer."""

    def __init__(self, width: int, stats: int, rank: int = 0) -> None:
        super().__init__()
        self.width, self.stats = width, stats
        self.lora = nn.Linear(width, rank, bias=False) if rank else nn.Identity()
        self.proj = nn.Linear(rank or width, stats * width)

    def statistics(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(..., D) -> `stats` tensors (..., D)."""
        return self.proj(self.lora(F.silu(condition))).chunk(self.stats, dim=-1)

    def norm(self, x: Tensor) -> Tensor:
        """LayerNorm without affine, eps 1e-6."""
        return F.layer_norm(x, (self.width,), eps=1e-6)
