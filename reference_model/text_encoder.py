"""The text encoder: Phi of the transformers library, last hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PhiConfig, PhiModel
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from nova_export.config import NovaConfig


class TextEncoder(nn.Module):
    """Stage `text_encoder`."""

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        assert config.text_encoder is not None
        phi = PhiConfig(
            **{k: v for k, v in config.text_encoder.items() if k not in ("architectures", "dtype")}
        )
        phi._attn_implementation = "sdpa"
        self.model = PhiModel(phi)
        with torch.device("cpu"):  # its frequencies are computed, not loaded: never leave them on meta
            self.model.rotary_emb = PhiRotaryEmbedding(phi)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(prompts, length) -> (prompts, length, text dim).

        The library's layers, without its forward: that builds a mask from padding, which a causal model that
        runs true lengths does not need, and which exports to a graph full of it.
        """
        positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
        x = self.model.embed_tokens(token_ids)
        rotary = self.model.rotary_emb(x, position_ids=positions)
        for layer in self.model.layers:
            x = layer(x, attention_mask=None, position_embeddings=rotary)
        return self.model.final_layernorm(x)
