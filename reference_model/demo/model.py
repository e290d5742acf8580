"""The demo's transformer and text encoder in training form: all frames of a clip in one pass.

It is made of the stages' own modules, so its weights are named as in a checkpoint and there is one model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nova_export.config import NovaConfig
from reference_model.condition import TextCondition
from reference_model.head import DiffusionHead
from reference_model.layers import AdaLayerNorm, Block, PatchEmbed, frequencies
from reference_model.spatial import SpatialEncoder, take
from reference_model.temporal import TemporalEncoder
from reference_model.text_encoder import TextEncoder

_IN_BLOCK = re.compile(r"\.(blocks|layers)\.\d")
LEAST_VARIANCE = 0.01  # of a principal component of patches, where training begins
EMBEDDED_DEVIATION = 2.0  # of embedded patches, where training begins
BRANCH_WEIGHT = 0.1  # of the norm behind every branch, where training begins; 1 would drown the positions
LOSS_REPEAT = 4  # noise levels a token is trained at for one pass of the encoders, as published


class Nova(nn.Module):
    """Text encoder, condition, temporal and spatial encoder, diffusion head."""

    def __init__(self, config: NovaConfig, alpha_bars: Tensor) -> None:
        """alpha_bars (trained steps,): products of 1 - beta of the DDPM schedule."""
        super().__init__()
        self.config = config
        self.alpha_bars: Tensor
        self.register_buffer("alpha_bars", alpha_bars, persistent=False)
        self.text_encoder, self.condition = TextEncoder(config), TextCondition(config)
        self.temporal, self.spatial = TemporalEncoder(config), SpatialEncoder(config)
        self.head = DiffusionHead(config)
        self.apply(_init)
        _zero(self.head.image_decoder.head)
        nn.init.normal_(self.condition.text_embed.weight, std=0.02)
        self._begin_apart()

    def losses(
        self,
        token_ids: Tensor,  # (B, text_len), any ids behind the prompts' own
        lengths: Tensor,  # (B,); 0 drops the prompt
        motion: Tensor,  # (B, 2): flow, fps
        latents: Tensor,  # (B, C, l, h, w), scaled
        frames: Tensor,  # (l,): frame positions, t * T0 / L
        order: Tensor,  # (B * l, N): a random order of each frame's tokens
        visible: int,  # P: tokens of each frame that are seen, the first of its order
        most_snr: float = math.inf,
    ) -> Tensor:
        """Weighted squared error of the predicted noise of every masked token: (B, l)."""
        text = self.condition(self.text_encoder(token_ids), lengths, motion)
        contexts = self.contexts(text, latents, frames)  # (B, l, M, D)
        batch, length = contexts.shape[:2]
        patch = self.spatial.image_encoder.patch_embed
        tokens = patch.patchify(latents.transpose(1, 2).flatten(0, 1))  # (B * l, N, d)
        seen, hidden = order[:, :visible], order[:, visible:]
        z = self.spatial(contexts.flatten(0, 1), take(tokens, seen), seen, hidden)  # (B * l, K, D)
        return self.diffusion_loss(z, take(tokens, hidden), most_snr).mean(1).unflatten(0, (batch, length))

    def contexts(self, text: Tensor, latents: Tensor, frames: Tensor) -> Tensor:
        """The temporal encoder over all frames at once, each of which sees itself and those before.

        text (B, X, D), latents (B, C, l, h, w), frames (l,) -> what the spatial encoder gets (B, l, M, D).
        Equal to the frame-by-frame stage with its caches; attention is block-causal by a mask instead.
        """
        encoder, length = self.temporal.video_encoder, latents.shape[2]
        never = torch.tensor(False, device=latents.device)
        parts = [text]
        for t in range(length):
            before = latents[:, :, max(t - 1, 0)]
            parts.append(self.temporal.embed_frame(before, ~never if t == 0 else never, frames[t : t + 1]))
        x = torch.cat(parts, dim=1)  # (B, X + l * M, D)
        frame_of = torch.arange(length, device=x.device).repeat_interleave(self.config.frame_tokens)
        frame_of = torch.cat([frame_of.new_zeros(text.shape[1]), frame_of])
        mask = frame_of[:, None] >= frame_of
        for block in encoder.blocks:
            q, k, v = (block.attn.split_heads(part) for part in block.attn.qkv(x).chunk(3, dim=-1))
            x = block.feed_forward(x + block.norm1(block.attn.attend(q, k, v, mask)))
        c = encoder.norm(x[:, text.shape[1] :]).unflatten(1, (length, -1))
        return torch.cat([c[:, :1], self.temporal.mix(c[:, :1], c[:, 1:])], dim=1)

    def diffusion_loss(self, z: Tensor, tokens: Tensor, most_snr: float) -> Tensor:
        """z (rows, K, D) and clean tokens (rows, K, d) -> weighted squared error of the noise (rows, K).

        Weights are those of Min-SNR (arXiv 2303.09556) in a soft form, g / (g + SNR) with g = most_snr: where
        there is hardly any noise its error is large, nearly all of it the autoencoder's own noise, and says
        little of the picture. Each token's noise levels are drawn from equal parts of the schedule.
        """
        network = self.head.image_decoder
        condition = network.time_cond_embed.condition_proj(z)
        clean = tokens.expand(LOSS_REPEAT, *tokens.shape)
        part = torch.arange(LOSS_REPEAT, device=z.device).view(-1, 1, 1)
        times = (part + torch.rand(clean.shape[:-1], device=z.device)) / LOSS_REPEAT * len(self.alpha_bars)
        times = times.long().clamp(max=len(self.alpha_bars) - 1)
        signal = self.alpha_bars[times].unsqueeze(-1)
        noise = torch.randn_like(clean)
        angles = frequencies(times.float())
        time = network.time_cond_embed.timestep_proj(torch.cat([angles.cos(), angles.sin()], dim=-1))
        predicted = network(signal.sqrt() * clean + (1 - signal).sqrt() * noise, condition + time)
        error = (predicted.float() - noise).square().mean(-1)
        weight = 1 / (1 + signal / (1 - signal) / most_snr).squeeze(-1)
        return (weight * error).mean(0)

    @torch.no_grad()
    def begin_even(self, latents: Tensor) -> None:
        """First patch embeddings under which every principal component of the patches weighs the same.

        latents (n, C, l, h, w): examples. Patches differ mostly by their ground, a hundred times more than by
        the outlines on it, which random weights would leave below what a LayerNorm in bfloat16 resolves.
        """
        frames = latents.transpose(1, 2).flatten(0, 1)
        for embed in (self.temporal.video_encoder.patch_embed, self.spatial.image_encoder.patch_embed):
            patches = embed.patchify(frames).flatten(0, 1)  # (all patches, d)
            variances, directions = torch.linalg.eigh(patches.T.cov())
            even = directions / variances.clamp(min=LEAST_VARIANCE).sqrt()  # (d, d)
            weight = embed.proj.weight  # (width, C, p, p)
            gain = EMBEDDED_DEVIATION * (weight.shape[0] / even.shape[0]) ** 0.5
            matrix = gain * nn.init.orthogonal_(weight.flatten(1).clone()) @ even.T
            # (width, d) with d in a token's order: row, column, channel
            weight.copy_(matrix.unflatten(1, (embed.patch, embed.patch, -1)).permute(0, 3, 1, 2))
            _bias(embed).sub_(matrix @ patches.mean(0))

    def _begin_apart(self) -> None:
        """Take out what all positions share: most of a sincos table over so few is the same anywhere."""
        for table, token, embed in (
            (
                self.temporal.table,
                self.temporal.mask_embed.bos_token,
                self.temporal.video_encoder.patch_embed,
            ),
            (self.spatial.table, self.spatial.mask_embed.mask_token, self.spatial.image_encoder.patch_embed),
        ):
            nn.init.normal_(token, std=0.02)
            with torch.no_grad():
                token.sub_(table.mean(0))
                _bias(embed).copy_(-table.mean(0))

    def matrices(self) -> set[str]:
        """Names of the weights of linear layers inside blocks."""
        return {name for name, p in self.named_parameters() if p.ndim == 2 and _IN_BLOCK.search(name)}

    def compile_blocks(self) -> None:
        """Let TorchInductor compile the blocks and the head: a fifth less time a step, for half a minute."""
        encoders = self.temporal.video_encoder, self.spatial.image_encoder
        for block in [block for encoder in encoders for block in encoder.blocks]:
            block.compile(dynamic=True)
        self.head.image_decoder.compile(dynamic=True)

    def parts(self) -> dict[str, dict[str, Any]]:
        """Weights by checkpoint part, named as there."""
        stages = (self.condition, self.temporal, self.spatial, self.head)
        transformer = {name: tensor for stage in stages for name, tensor in stage.state_dict().items()}
        text_encoder = dict(self.text_encoder.state_dict())
        embedding = text_encoder["model.embed_tokens.weight"]
        # Published checkpoints hold the language model's output layer too; nothing reads it.
        text_encoder["lm_head.weight"] = torch.zeros_like(embedding)
        text_encoder["lm_head.bias"] = torch.zeros_like(embedding[:, 0])
        return {"transformer": transformer, "text_encoder": text_encoder}

    def load_parts(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The reverse of `parts`."""
        for stage in (self.condition, self.temporal, self.spatial, self.head):
            stage.load_state_dict({name: parts["transformer"][name] for name in stage.state_dict()})
        text_encoder = {name: parts["text_encoder"][name] for name in self.text_encoder.state_dict()}
        self.text_encoder.load_state_dict(text_encoder)


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
    elif isinstance(module, Block):
        nn.init.constant_(module.norm1.weight, BRANCH_WEIGHT)
        nn.init.constant_(module.norm2.weight, BRANCH_WEIGHT)
    elif isinstance(module, AdaLayerNorm):
        module.proj.apply(_zero)  # every modulation begins as none


def _bias(embed: PatchEmbed) -> Tensor:
    assert embed.proj.bias is not None
    return embed.proj.bias


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
