"""The two schedulers of NOVA checkpoints as torch steps on a whole latent, for the eager pipeline.

Written from the papers, one step at a time, and on purpose apart from nova_export/runtime/schedule.py, which
folds a step into three numbers: that both give the same videos proves both. Arithmetic is float32 on 0-dim
tensors, as in the published schedulers. Must not know tokens, guidance or the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from nova_export.errors import CheckpointError

Draw = Callable[[Sequence[int]], Tensor]  # shape -> standard normal


class Scheduler(Protocol):
    """Timesteps (T,) as the network is conditioned on them, and the step from each to the next."""

    @property
    def timesteps(self) -> Tensor: ...
    def step(self, index: int, prediction: Tensor, sample: Tensor, draw: Draw) -> Tensor: ...


def make_scheduler(config: Mapping[str, Any], num_steps: int, flow_shift: float | None = None) -> Scheduler:
    """The scheduler of a checkpoint's scheduler_config.json, set to T = `num_steps`.

    Raises CheckpointError: a scheduler, or an option of it, that is unknown.
    """
    if str(config.get("_class_name")).startswith("FlowMatchEulerDiscrete"):
        return FlowMatching.of(config, num_steps, flow_shift)
    if config.get("_class_name") != "DDPMScheduler":
        raise CheckpointError(f"scheduler_config.json: scheduler {config.get('_class_name')!r} is unknown")
    return DDPM.of(config, num_steps)


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling, arXiv 2006.11239 eq. 7. `alpha_bars` (trained steps,): products of 1 - beta."""

    timesteps: Tensor
    alpha_bars: Tensor
    stride: int  # trained steps between two steps: where "the step before" is looked up, whatever the spacing
    predicts: str
    variance: str

    @classmethod
    def of(cls, config: Mapping[str, Any], num_steps: int) -> DDPM:
        trained = int(config.get("num_train_timesteps", 1000))
        betas = _betas(config, trained)
        if config.get("rescale_betas_zero_snr", False):
            betas = _rescaled(betas)
        return cls(
            timesteps=_timesteps(config, trained, num_steps),
            alpha_bars=torch.cumprod(1 - betas, dim=0),
            stride=trained // num_steps,
            predicts=str(config.get("prediction_type", "epsilon")),
            variance=str(config.get("variance_type", "fixed_small")),
        )

    def step(self, index: int, prediction: Tensor, sample: Tensor, draw: Draw) -> Tensor:
        """x_t -> x_(t - stride), in `sample`'s shape. Clips nothing; draws unless t = 0."""
        t = int(self.timesteps[index])
        bar, bar_before = self._alpha_bar(t), self._alpha_bar(t - self.stride)
        alpha = bar / bar_before
        clean = self._clean(prediction, sample, bar)  # x_0
        mean = bar_before.sqrt() * (1 - alpha) / (1 - bar) * clean
        mean = mean + alpha.sqrt() * (1 - bar_before) / (1 - bar) * sample
        if t == 0:
            return mean
        return mean + self._deviation(bar, bar_before) * draw(sample.shape)

    def _alpha_bar(self, t: int) -> Tensor:
        return self.alpha_bars[t] if t >= 0 else torch.ones(())

    def _clean(self, prediction: Tensor, sample: Tensor, bar: Tensor) -> Tensor:
        """x_0, from a prediction of the noise (eq. 15), of x_0, or of the velocity (arXiv 2202.00512)."""
        if self.predicts == "epsilon":
            return (sample - (1 - bar).sqrt() * prediction) / bar.sqrt()
        if self.predicts == "sample":
            return prediction
        if self.predicts == "v_prediction":
            return bar.sqrt() * sample - (1 - bar).sqrt() * prediction
        raise CheckpointError(f"scheduler_config.json: prediction_type {self.predicts!r} is unknown")

    def _deviation(self, bar: Tensor, bar_before: Tensor) -> Tensor:
        beta = 1 - bar / bar_before
        if self.variance == "fixed_large":
            return beta.sqrt()
        posterior = ((1 - bar_before) / (1 - bar) * beta).clamp(min=1e-20)
        if self.variance == "fixed_small":
            return posterior.sqrt()
        if self.variance == "fixed_small_log":
            return (posterior.log() / 2).exp()
        raise CheckpointError(f"scheduler_config.json: variance_type {self.variance!r} has no deviation")


@dataclass(frozen=True)
class FlowMatching:
    """Euler steps along a velocity, arXiv 2403.03206. `sigmas` (T + 1,) end in 0."""

    timesteps: Tensor
    sigmas: list[float]

    @classmethod
    def of(cls, config: Mapping[str, Any], num_steps: int, flow_shift: float | None) -> FlowMatching:
        """The ends are shifted by the trained shift, then all by `flow_shift` or, without, by it again."""
        if config.get("use_dynamic_shifting", False):
            raise CheckpointError("scheduler_config.json: use_dynamic_shifting needs a size that NOVA lacks")
        trained, shift = int(config.get("num_train_timesteps", 1000)), float(config.get("shift", 1.0))
        first, last = (float(shifted(torch.tensor(s), shift)) * trained for s in (1.0, 1 / trained))
        # Spaced in double and rounded once, as numpy does.
        spaced = torch.linspace(first, last, num_steps, dtype=torch.float64).float()
        sigmas = shifted(spaced / trained, flow_shift or shift)
        return cls(sigmas * trained, [*sigmas.tolist(), 0.0])

    def step(self, index: int, prediction: Tensor, sample: Tensor, draw: Draw) -> Tensor:
        """x at sigma -> x at the next sigma. Draws nothing."""
        return sample + prediction * (self.sigmas[index + 1] - self.sigmas[index])


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """Towards noise for shift > 1, arXiv 2403.03206 eq. 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _betas(config: Mapping[str, Any], trained: int) -> Tensor:
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    if kind == "linear":
        return torch.linspace(first, last, trained)
    if kind == "scaled_linear":
        return torch.linspace(math.sqrt(first), math.sqrt(last), trained).square()
    if kind == "sigmoid":
        return torch.linspace(-6, 6, trained).sigmoid() * (last - first) + first
    if kind != "squaredcos_cap_v2":
        raise CheckpointError(f"scheduler_config.json: beta_schedule {kind!r} is unknown")
    bars = [math.cos((i / trained + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(trained + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(bars)])


def _rescaled(betas: Tensor) -> Tensor:
    """Betas whose last step is pure noise, arXiv 2305.08891 algorithm 1."""
    roots = torch.cumprod(1 - betas, dim=0).sqrt()
    roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    bars = roots.square()
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])


def _timesteps(config: Mapping[str, Any], trained: int, num_steps: int) -> Tensor:
    """(T,) int64, falling; arXiv 2305.08891 table 2."""
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "leading":
        return torch.arange(num_steps).flip(0) * (trained // num_steps) + int(config.get("steps_offset", 0))
    if spacing == "linspace":
        return torch.linspace(0, trained - 1, num_steps, dtype=torch.float64).round().long().flip(0)
    if spacing == "trailing":
        # One by one: an arange down to 0 holds a step too many where rounding makes it miss 0.
        steps = trained - torch.arange(num_steps, dtype=torch.float64) * (trained / num_steps)
        return steps.round().long() - 1
    raise CheckpointError(f"scheduler_config.json: timestep_spacing {spacing!r} is unknown")
