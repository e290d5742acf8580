"""The diffusion head: a small MLP that denoises each token on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from nova_export.config import FREQUENCIES, NovaConfig
from reference_model.layers import AdaLayerNorm, PatchEmbed, Projector


class TimeCondition(nn.Module):
    """MLP_t of the timestep's frequencies, MLP_z of the spatial encoder's z; the condition is their sum."""

    def __init__(self, cond_dim: int, width: int) -> None:
        super().__init__()
        self.timestep_proj = Projector(FREQUENCIES, width)
        self.condition_proj = Projector(cond_dim, width)


class HeadBlock(nn.Module):
    """x + gate * LN(MLP(LN(x) * (1 + scale) + shift)), with (scale, shift, gate) from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(width, stats=3)
        self.proj = Projector(width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.norm1.statistics(condition)
        return x + gate * self.norm2(self.proj(self.norm1.norm(x) * (1 + scale) + shift))


class HeadNetwork(nn.Module):
    """One evaluation: noisy tokens and condition to the model's prediction."""

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        width = config.head.width
        self.patch_embed = PatchEmbed(config.latent_channels, width, config.patch)
        self.time_cond_embed = TimeCondition(config.spatial.width, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(config.head.depth))
        self.norm = AdaLayerNorm(width, stats=2)
        self.head = nn.Linear(width, config.token_dim)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """tokens (..., p * p * C) and condition (..., head width), broadcast, -> (..., p * p * C)."""
        x = self.patch_embed.embed(tokens)
        for block in self.blocks:
            x = block(x, condition)
        scale, shift = self.norm.statistics(condition)
        return self.head(self.norm.norm(x) * (1 + scale) + shift)


State = tuple[Tensor, Tensor]  # noisy sample of the K tokens, of the rest
Rows = tuple[Tensor, ...]  # of each table
Step = Callable[[State, Rows], tuple[State, Tensor]]
Fold = Callable[[Step, State, Rows], State]


class DiffusionHead(nn.Module):
    """All T steps of one AR step in one call, for any scheduler, number of steps and guidance.

    What a step does stands in one row of each `step_*` table, so the graph knows no scheduler: see
    nova_export/runtime/schedule.py and guidance.py. MLP_z and MLP_t are hoisted out of the loop.
    """

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        self.image_decoder = HeadNetwork(config)

    def forward(self, z: Tensor, **inputs: Tensor) -> Tensor | State:
        """Denoised tokens (B, K, d). Inputs as in `denoise`."""
        return self.denoise(fold, z, **inputs)[0]

    def denoise(
        self,
        fold: Fold,
        z: Tensor,  # (G, B, K, D)
        noise: Tensor,  # (B, K, d)
        step_noise: Tensor,  # (T, B, K, d)
        step_coefficients: Tensor,  # (T, 3): a, b, s
        step_frequencies: Tensor,  # (T, 256)
        step_guidance: Tensor,  # (T, G)
        step_extra_guidance: Tensor,  # (T, G)
        step_renorm: Tensor,  # (T, 1)
        rest: Tensor,  # (B, R): noise of the tokens not predicted now, see `norm_ratio`
        step_rest_noise: Tensor,  # (T, B, R)
    ) -> State:
        """Denoised tokens (B, K, d), and what the rest has become (B, R)."""
        network = self.image_decoder
        condition_z = network.time_cond_embed.condition_proj(z)  # (G, B, K, width)
        condition_t = network.time_cond_embed.timestep_proj(step_frequencies)  # (T, width)

        def step(carried: State, row: tuple[Tensor, ...]) -> tuple[State, Tensor]:
            x, rest = carried
            time, coefficients, guidance, extra_guidance, renorm, fresh_noise, rest_noise = row
            a, b, s = coefficients.unbind()
            prediction = network(x, condition_z + time)  # (G, B, K, d)
            guided = (prediction * guidance[:, None, None, None]).sum(0)
            ratio = norm_ratio(prediction[0], guided, rest).clamp(max=1).maximum(renorm)  # (B,)
            guided = guided * ratio[:, None, None]
            guided = guided + (prediction * extra_guidance[:, None, None, None]).sum(0)
            x = a * x + b * guided + s * fresh_noise
            rest = (a + b * ratio)[:, None] * rest + s * rest_noise
            return (x, rest), x[:1, :1, :1].clone()

        rows = (
            condition_t,
            step_coefficients,
            step_guidance,
            step_extra_guidance,
            step_renorm,
            step_noise,
            step_rest_noise,
        )
        return fold(step, (noise, rest), rows)


class UnrolledHead(DiffusionHead):
    """A fixed number of steps, one behind the other in the graph: CUDA graphs can hold no loop.

    More steps take more calls (nova_export/runtime/diffusion.py), so what the rest has become is an output.
    """

    def forward(self, z: Tensor, **inputs: Tensor) -> State:
        return self.denoise(unroll, z, **inputs)


def fold(step: Step, state: State, rows: Rows) -> State:
    """The state after `step(state, row)` of every row of the tables."""
    if torch.compiler.is_compiling():
        return scan(step, state, rows)[0]  # one loop in the graph, for any number of steps
    return unroll(step, state, rows)  # eager, a scan would be compiled anew for every shape


def unroll(step: Step, state: State, rows: Rows) -> State:
    """The same, step by step."""
    for row in zip(*(table.unbind() for table in rows), strict=True):
        state, _ = step(state, row)
    return state


def norm_ratio(conditional: Tensor, guided: Tensor, rest: Tensor) -> Tensor:
    """||cond|| / ||guided|| per sample over the whole latent: (B, K, d) twice, (B, R) -> (B,).

    `rest` is the noisy sample of the tokens not predicted now, or anything as long: there every pass predicts
    the sample itself, so they go on as x' = (a + b ratio) x + s noise, and only their norm ever matters.
    """
    squares = [tokens.square().sum((1, 2)) + rest.square().sum(1) for tokens in (conditional, guided)]
    return torch.sqrt(squares[0] / squares[1].clamp(min=torch.finfo(guided.dtype).tiny))
