"""What stands before the first frame: projected text and motion tokens, or a class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nova_export.config import NUM_CLASSES, NovaConfig
from reference_model.layers import embedding_mlp, sincos

MAX_POSITIONS = 512  # learned null rows in every published checkpoint


class TextEmbed(nn.Module):
    """Null rows where a prompt has no tokens, then a linear layer and LayerNorm."""

    weight: Tensor

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(text_dim, width)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("weight", torch.zeros(MAX_POSITIONS, text_dim))

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """states (rows, len, text dim), of which the first `lengths` (rows,) count -> (rows, len, D)."""
        length = states.shape[1]
        is_text = torch.arange(length, device=lengths.device) < lengths[:, None]
        return self.norm(self.proj(torch.where(is_text[..., None], states, self.weight[:length])))


class MotionEmbed(nn.Module):
    """Two tokens: flow (mean optical-flow magnitude), then frames a second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.flow_proj = embedding_mlp(width)
        self.fps_proj = embedding_mlp(width)

    def forward(self, motion: Tensor) -> Tensor:
        """(rows, 2) -> (rows, 2, D)."""
        features = sincos(motion)
        return torch.stack([self.flow_proj(features[:, 0]), self.fps_proj(features[:, 1])], dim=1)


class TextCondition(nn.Module):
    """Stage `condition` of a text-conditional checkpoint."""

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        assert config.text_dim is not None
        self.text_embed = TextEmbed(config.text_dim, config.temporal.width)
        if config.is_video:
            self.motion_embed = MotionEmbed(config.temporal.width)

    def forward(self, text_states: Tensor, text_lengths: Tensor, motion: Tensor | None = None) -> Tensor:
        """(rows, len, text dim), (rows,) and for video (rows, 2) -> (rows, len + 2, D)."""
        text = self.text_embed(text_states, text_lengths)
        return text if motion is None else torch.cat([text, self.motion_embed(motion)], dim=1)


class LabelEmbed(nn.Module):
    """One learned row a class, the last for no class, then LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(NUM_CLASSES + 1, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, class_ids: Tensor) -> Tensor:
        return self.norm(self.weight[class_ids])


class ClassCondition(nn.Module):
    """Stage `condition` of a class-conditional checkpoint."""

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        self.label_embed = LabelEmbed(config.temporal.width)

    def forward(self, class_ids: Tensor) -> Tensor:
        """(rows,) -> (rows, 1, D)."""
        return self.label_embed(class_ids)[:, None]
