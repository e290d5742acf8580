"""The spatial encoder: from the tokens predicted so far to what the head needs for the next set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nova_export.config import NovaConfig
from reference_model.layers import (
    Block,
    PatchEmbed,
    grid_positions,
    position_table,
    rotary_angles,
    rotate,
)

Rotary = tuple[Tensor, Tensor]


class MaskTokens(nn.Module):
    """The learned token that stands for a token not predicted yet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, width))


class ImageEncoder(nn.Module):
    """Patch embedding and blocks, named as in the checkpoint."""

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        arch = config.spatial
        self.patch_embed = PatchEmbed(config.latent_channels, arch.width, config.patch)
        blocks = nn.ModuleList(Block(arch.width, arch.heads) for _ in range(arch.depth))
        self.blocks = cast("Sequence[Block]", blocks)
        self.norm = nn.LayerNorm(arch.width)


class SpatialEncoder(nn.Module):
    """Stage `spatial_encoder`.

    First half of the blocks on [context, the P predicted tokens], second half on [context, all N tokens],
    where tokens not predicted yet enter as the mask token. Of the last block only the K next tokens are
    computed.
    """

    table: Tensor

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.mask_embed = MaskTokens(config.spatial.width)
        if not config.rotary:
            table = position_table(config.spatial.width, config.token_grid)
            self.register_buffer("table", table, persistent=False)

    def forward(self, context: Tensor, tokens: Tensor, predicted_ids: Tensor, next_ids: Tensor) -> Tensor:
        """context (rows, M, D), tokens (rows, P, d), their ids, next_ids (rows, K) -> z (rows, K, D)."""
        x, rotary = self.before_last(context, tokens, predicted_ids)
        last = self.image_encoder.blocks[-1]
        ids = next_ids + context.shape[1]
        queries = take(x, ids)  # (rows, K, D)
        q, k, v = (last.attn.split_heads(part) for part in qkv_of(last, queries, x))
        if rotary is not None:
            q, k = rotate(q, *self.rotary(next_ids, 0)), rotate(k, *rotary)
        queries = last.feed_forward(queries + last.norm1(last.attn.attend(q, k, v)))
        return self.image_encoder.norm(queries)

    def all_tokens(self, context: Tensor, tokens: Tensor, predicted_ids: Tensor) -> Tensor:
        """z of all N tokens (rows, N, D), as the published pipeline computes it."""
        x, rotary = self.before_last(context, tokens, predicted_ids)
        x = self.image_encoder.blocks[-1](x, rotary)
        return self.image_encoder.norm(x[:, context.shape[1] :])

    def before_last(
        self, context: Tensor, tokens: Tensor, predicted_ids: Tensor
    ) -> tuple[Tensor, Rotary | None]:
        """The sequence [context, all N tokens] in front of the last block, and its rotary positions."""
        blocks = self.image_encoder.blocks
        half = len(blocks) // 2
        rows, length = context.shape[:2]
        x = self.image_encoder.patch_embed.embed(tokens)  # (rows, P, D)
        masked = self.mask_embed.mask_token.expand(self.config.num_tokens, -1)
        if not self.config.rotary:
            x, masked = x + self.table[predicted_ids], masked + self.table
        rotary = self.rotary(predicted_ids, length) if self.config.rotary else None
        x = torch.cat([context, x], dim=1)
        for block in blocks[:half]:
            x = block(x, rotary)
        x = torch.cat([x[:, :length], put(masked.expand(rows, -1, -1), predicted_ids, x[:, length:])], dim=1)
        rotary = None
        if self.config.rotary:
            everything = torch.arange(self.config.num_tokens, device=x.device)[None]
            rotary = self.rotary(everything, length)
        for block in blocks[half:-1]:
            x = block(x, rotary)
        return x, rotary

    def rotary(self, ids: Tensor, context_tokens: int) -> Rotary:
        """cos and sin (rows, 1, M + S, d / 2) of tokens `ids` (rows, S) behind context tokens at 0."""
        positions = grid_positions(self.config.token_grid).to(ids.device)[ids]  # (rows, S, 2)
        positions = torch.cat([torch.zeros_like(positions[..., :1]), positions], dim=-1)
        if context_tokens:
            positions = torch.cat([positions.new_zeros(ids.shape[0], context_tokens, 3), positions], dim=1)
        angles = rotary_angles(positions, self.config.spatial.head_dim)[:, None]
        return angles.cos(), angles.sin()


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens `ids` (rows, K) of x (rows, S, D) -> (rows, K, D)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], ids]


def put(x: Tensor, ids: Tensor, new: Tensor) -> Tensor:
    """x (rows, N, D) with tokens `ids` (rows, P) replaced by new (rows, P, D)."""
    return x.index_put((torch.arange(x.shape[0], device=x.device)[:, None].expand(ids.shape), ids), new)


def qkv_of(block: Block, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query of the chosen tokens, key and value of all, from one packed weight."""
    width = x.shape[-1]
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    q = nn.functional.linear(queries, weight[:width], bias[:width])
    k, v = nn.functional.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
    return q, k, v
