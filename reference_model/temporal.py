"""The temporal encoder: one frame a call, frames before it as key and value caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nova_export.config import NovaConfig
from reference_model.layers import (
    AdaLayerNorm,
    Block,
    PatchEmbed,
    embedding_mlp,
    grid_positions,
    position_table,
    rotary_angles,
    rotate,
    sincos,
)


class VideoPosition(nn.Module):
    """Absolute positions: LayerNorm(MLP(sincos(time))) and a 2D sincos table."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_proj = embedding_mlp(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, time: Tensor) -> Tensor:
        """time (1,), in units of the trained clip's frames: t * T0 / L -> (1, D)."""
        return self.norm(self.time_proj(sincos(time)))


class MaskTokens(nn.Module):
    """The learned token of the frame before the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bos_token = nn.Parameter(torch.zeros(1, width))


class VideoEncoder(nn.Module):
    """Patch embedding, blocks and mixer, named as in the checkpoint."""

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        arch = config.temporal
        self.patch_embed = PatchEmbed(config.latent_channels, arch.width, 2 * config.patch)
        blocks = nn.ModuleList(Block(arch.width, arch.heads) for _ in range(arch.depth))
        self.blocks = cast("Sequence[Block]", blocks)
        self.norm = nn.LayerNorm(arch.width)
        if config.mixer_rank is not None:
            self.mixer = AdaLayerNorm(arch.width, stats=2, rank=config.mixer_rank)


class TemporalEncoder(nn.Module):
    """Stage `temporal_encoder`: first and later frames by the same graph."""

    table: Tensor

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        self.config = config
        self.video_encoder = VideoEncoder(config)
        self.mask_embed = MaskTokens(config.temporal.width)
        if not config.rotary:
            self.video_pos_embed = VideoPosition(config.temporal.width)
            table = position_table(config.temporal.width, config.temporal_grid)
            self.register_buffer("table", table, persistent=False)

    def forward(
        self,
        text: Tensor,  # (rows, X, D): the condition at frame 0, none later
        latents: Tensor,  # (rows, C, h, w): the previous frame
        is_blank: Tensor,  # (rows,): true where begin-of-video tokens stand for any frame, without positions
        frame_position: Tensor,  # (1,): t * T0 / L, or t with rotary positions
        cache_length: Tensor,  # (1,): rows of the caches that are filled
        first_context: Tensor | None = None,  # (rows, M, D): frame 0's output, read from frame 1 on
        **caches: Tensor,  # (rows, capacity, D) each
    ) -> tuple[Tensor, ...]:
        """The frame's context (rows, M, D), and every cache with this call's rows behind `cache_length`."""
        encoder = self.video_encoder
        frame = self.embed_frame(latents, cache_length == 0, frame_position)  # (rows, M, D)
        frame = torch.where(is_blank[:, None, None], self.mask_embed.bos_token, frame)
        x = torch.cat([text, frame], dim=1)  # (rows, X + M, D)
        rotary = self.rotary(text.shape[1], frame_position) if self.config.rotary else None
        writer = CacheWriter(x.shape[0], x.shape[1], cache_length, caches["key_cache_0"].shape[1])
        written = []
        for layer, block in enumerate(encoder.blocks):
            q, k, v = block.attn.qkv(x).chunk(3, dim=-1)
            if rotary is not None:
                k = rotate(block.attn.split_heads(k), *rotary).transpose(1, 2).flatten(2)
            keys = writer.write(caches[f"key_cache_{layer}"], k)
            values = writer.write(caches[f"value_cache_{layer}"], v)
            written += [keys, values]
            q, k, v = (block.attn.split_heads(part) for part in (q, keys, values))
            q = q if rotary is None else rotate(q, *rotary)
            x = block.feed_forward(x + block.norm1(block.attn.attend(q, k, v, writer.filled)))
        context = encoder.norm(x[:, text.shape[1] :])
        if first_context is not None:
            context = torch.where(cache_length == 0, context, self.mix(first_context, context))
        return context, *written

    def embed_frame(self, latents: Tensor, is_first: Tensor, frame_position: Tensor) -> Tensor:
        """Tokens of the previous frame (rows, M, D) with absolute positions, if the checkpoint has them."""
        tokens = self.video_encoder.patch_embed(latents)
        tokens = torch.where(is_first, self.mask_embed.bos_token, tokens)
        if self.config.rotary:
            return tokens
        return tokens + self.video_pos_embed(frame_position) + self.table

    def rotary(self, text_tokens: int, frame_position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (1, 1, X + M, d / 2); text stands at position 0."""
        grid = grid_positions(self.config.temporal_grid).to(frame_position)
        positions = torch.cat([frame_position.expand(grid.shape[0])[:, None], grid], dim=1)
        positions = torch.cat([positions.new_zeros(text_tokens, 3), positions])
        angles = rotary_angles(positions, self.config.temporal.head_dim)[None, None]
        return angles.cos(), angles.sin()

    def mix(self, first: Tensor, context: Tensor) -> Tensor:
        """Scaling and shift: frame 0's context, modulated by this frame's."""
        scale, shift = self.video_encoder.mixer.statistics(context)
        return first * (1 + scale) + shift


class CacheWriter:
    """Writes `length` new rows behind the filled ones of a cache, and says which rows may be seen then."""

    def __init__(self, rows: int, length: int, cache_length: Tensor, capacity: int) -> None:
        slots = cache_length + torch.arange(length, device=cache_length.device)  # (length,)
        self.index = (
            torch.arange(rows, device=slots.device)[:, None].expand(rows, length),
            slots[None].expand(rows, length),
        )
        filled = torch.arange(capacity, device=slots.device) < cache_length + length
        # Spelled out: ONNX Runtime broadcasts no query axis.
        self.filled = filled.expand(1, 1, length, capacity)

    def write(self, cache: Tensor, new: Tensor) -> Tensor:
        """cache (rows, capacity, D), new (rows, length, D). Exported as a ScatterND, in place if aliased."""
        return cache.index_put(self.index, new)
