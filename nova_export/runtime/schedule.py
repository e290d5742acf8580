"""Schedulers as tables: every step of NOVA's diffusion is x' = a x + b prediction + s noise.

A schedule is a pure function of the checkpoint's scheduler config and the number of steps; there is no step
index to keep. Formulas: DDPM, arXiv 2006.11239 eq. 7, zero-SNR rescaling, arXiv 2305.08891 algorithm 1;
flow matching, Euler steps over shifted sigmas, arXiv 2403.03206. float32 as the published schedulers compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_export.config import FREQUENCIES
from nova_export.errors import CheckpointError, UsageError

F32 = np.float32
Floats = NDArray[np.float32]

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


@dataclass(frozen=True)
class Schedule:
    """T steps: the timestep each is conditioned on, its (a, b, s), and whether it draws noise."""

    timesteps: Floats  # (T,)
    coefficients: Floats  # (T, 3)
    draws_noise: NDArray[np.bool_]  # (T,)

    def frequencies(self) -> Floats:
        """(T, 256): cos, then sin, of each timestep times 128 frequencies 10000^(-i/128).

        float32 where the published code rounds to it; the functions in double, for numpy's in float32 differ
        from one CPU to the next, and from those of C.
        """
        half = FREQUENCIES // 2
        step = F32(-math.log(10000) / half)
        frequencies = np.exp((np.arange(half, dtype=F32) * step).astype(np.float64)).astype(F32)
        angles = (self.timesteps[:, None] * frequencies).astype(np.float64)
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(F32)


def make_schedule(config: Mapping[str, Any], num_steps: int, flow_shift: float | None = None) -> Schedule:
    """The steps of the checkpoint's scheduler.

    Raises:
        CheckpointError: a scheduler, or an option of it, that the published pipeline cannot run either.
        UsageError: too many steps, or `flow_shift` for a scheduler that has no shift.
    """
    trained = int(config.get("num_train_timesteps", 1000))
    if not 1 <= num_steps <= trained:
        raise UsageError(f"num_diffusion_steps is {num_steps}; it must be 1 to {trained}")
    if flow_shift is not None and not (math.isfinite(flow_shift) and flow_shift >= 0):
        raise UsageError(f"flow_shift is {flow_shift:g}; it must be above 0, or 0 for the checkpoint's own")
    kind = str(config.get("_class_name"))
    if kind.startswith("FlowMatchEulerDiscrete"):
        return _flow_matching(config, trained, num_steps, flow_shift)
    if kind != "DDPMScheduler":
        raise CheckpointError(
            f"scheduler {kind!r} is unknown; NOVA has DDPMScheduler and FlowMatchEulerDiscreteScheduler"
        )
    if flow_shift:
        raise UsageError("flow_shift is for flow-matching checkpoints; this one has a DDPM scheduler")
    return _ddpm(config, trained, num_steps)


def _flow_matching(config: Mapping[str, Any], trained: int, num_steps: int, shift: float | None) -> Schedule:
    """Sigmas from 1 to sigma_min, shifted, then 0; x' = x + (next sigma - sigma) * velocity."""
    if config.get("use_dynamic_shifting", False):
        raise CheckpointError(
            "scheduler_config.json has use_dynamic_shifting, which NOVA's pipeline gives no size for"
        )
    trained_shift = float(config.get("shift", 1.0))
    bounds = _shift(np.array([trained, 1], F32) / F32(trained), trained_shift) * F32(trained)
    sigmas = np.linspace(float(bounds[0]), float(bounds[1]), num_steps, dtype=F32) / F32(trained)
    sigmas = _shift(sigmas, shift or trained_shift)
    change = np.diff(np.append(sigmas, F32(0)))
    coefficients = np.stack([np.ones_like(change), change, np.zeros_like(change)], axis=1)
    return Schedule(sigmas * F32(trained), coefficients, np.zeros(num_steps, bool))


def _shift(sigmas: Floats, shift: float) -> Floats:
    return (F32(shift) * sigmas / (1 + F32(shift - 1) * sigmas)).astype(F32)


def _ddpm(config: Mapping[str, Any], trained: int, num_steps: int) -> Schedule:
    # In double, as torch accumulates.
    alphas = np.cumprod(F32(1) - _betas(config, trained), dtype=np.float64).astype(F32)
    timesteps = _timesteps(config, trained, num_steps)
    rows = [_ddpm_step(config, alphas, int(t), int(t) - trained // num_steps) for t in timesteps]
    return Schedule(timesteps.astype(F32), np.array(rows, F32), timesteps > 0)


def _ddpm_step(
    config: Mapping[str, Any], alphas: Floats, t: int, previous_t: int
) -> tuple[float, float, float]:
    """(a, b, s) of one step, from alphas' cumulative products (eq. 7 with x_0 from the prediction)."""
    one = F32(1)
    alpha = alphas[t]
    previous = alphas[previous_t] if previous_t >= 0 else one
    beta, step_alpha = one - alpha, alpha / previous
    step_beta = one - step_alpha
    to_sample = np.sqrt(previous) * step_beta / beta
    keep = np.sqrt(step_alpha) * (one - previous) / beta
    kind = config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        if not alpha > 0:
            raise CheckpointError(
                f"scheduler_config.json: rescale_betas_zero_snr leaves no signal at timestep {t}, where an "
                "epsilon prediction says nothing about the sample; it needs v_prediction, or "
                "timestep_spacing 'leading'"
            )
        a, b = to_sample / np.sqrt(alpha) + keep, -to_sample * np.sqrt(beta) / np.sqrt(alpha)
    elif kind == "sample":
        a, b = keep, to_sample
    elif kind == "v_prediction":
        a, b = to_sample * np.sqrt(alpha) + keep, -to_sample * np.sqrt(beta)
    else:
        raise CheckpointError(
            f"scheduler_config.json: prediction_type {kind!r} is none of epsilon, sample, v_prediction"
        )
    variance = max(float((one - previous) / beta * step_beta), 1e-20)
    return float(a), float(b), _noise_scale(config, variance, float(step_beta)) if t > 0 else 0.0


def _noise_scale(config: Mapping[str, Any], variance: float, step_beta: float) -> float:
    kind = config.get("variance_type", "fixed_small")
    if kind not in VARIANCES:
        reason = (
            "is the root of a negative number"
            if kind == "fixed_large_log"
            else "needs a head that predicts it"
        )
        raise CheckpointError(
            f"scheduler_config.json: variance_type {kind!r} {reason}; use one of {', '.join(VARIANCES)}"
        )
    return math.sqrt(step_beta if kind == "fixed_large" else variance)


def _timesteps(config: Mapping[str, Any], trained: int, num_steps: int) -> NDArray[np.int64]:
    """Table 2 of arXiv 2305.08891, highest first."""
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "linspace":
        steps = np.linspace(0, trained - 1, num_steps).round()[::-1]
    elif spacing == "leading":
        steps = (np.arange(num_steps) * (trained // num_steps))[::-1] + int(config.get("steps_offset", 0))
    elif spacing == "trailing":
        # Rounding may add one at 0.
        steps = np.arange(trained, 0, -trained / num_steps)[:num_steps].round() - 1
    else:
        raise CheckpointError(
            f"scheduler_config.json: timestep_spacing {spacing!r} is none of linspace, leading, trailing"
        )
    if steps.max() >= trained:
        raise UsageError(
            f"{num_steps} diffusion steps with steps_offset {config.get('steps_offset')} pass step {trained}"
        )
    return np.asarray(steps, np.int64)


def _betas(config: Mapping[str, Any], trained: int) -> Floats:
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], F32)
    elif kind == "linear":
        betas = np.linspace(first, last, trained).astype(F32)
    elif kind == "scaled_linear":
        betas = np.linspace(first**0.5, last**0.5, trained).astype(F32) ** 2
    elif kind == "squaredcos_cap_v2":
        betas = _cosine_betas(trained)
    elif kind == "sigmoid":
        betas = (1 / (1 + np.exp(-np.linspace(-6, 6, trained)))).astype(F32) * F32(last - first) + F32(first)
    else:
        raise CheckpointError(f"scheduler_config.json: beta_schedule {kind!r} is unknown")
    return _zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr", False) else betas


def _cosine_betas(trained: int) -> Floats:
    """1 - abar(t + 1) / abar(t) of abar = cos^2, capped at 0.999."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [alpha_bar((i + 1) / trained) / alpha_bar(i / trained) for i in range(trained)]
    return np.array([min(1 - ratio, 0.999) for ratio in ratios], F32)


def _zero_terminal_snr(betas: Floats) -> Floats:
    root = np.sqrt(np.cumprod(F32(1) - betas, dtype=np.float64).astype(F32))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = root**2
    return (F32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])).astype(F32)
