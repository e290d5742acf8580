"""Training of the demo's autoencoder: single images first, which cost a ninth of a clip, then clips."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nova_export.evaluation.scene import held_out
from reference_model.demo.data import Clip, sample_clip, sample_image
from reference_model.demo.trainer import Phase, Trainer
from reference_model.demo.vae import Vae, inflate

# Single images first, which cost a ninth of a clip and teach nearly everything.
PHASES = (Phase(1, 12, 1400, 4e-4), Phase(5, 4, 500, 4e-4), Phase(9, 4, 300, 3e-4), Phase(9, 4, 600, 3e-4))
# Afterwards: sharper edges, on which the outline of a small cross hangs. First by the decoder alone, under
# which latents stay what they are; then, gently, by the whole, as the encoder knew little of light grounds.
LATER_PHASES = (
    Phase(9, 4, 300, 1e-4, only="decode_stage", cross_weight=2.5),
    Phase(9, 4, 3500, 2e-4, only="decode_stage", cross_weight=2.5, latent_noise=0.3),
    Phase(9, 4, 2400, 1.5e-4, only="decode_stage", cross_weight=2.5, lit_weight=3.0, latent_noise=0.3),
    Phase(5, 4, 700, 5e-5, cross_weight=2.5, lit_weight=3.0, latent_noise=0.3),
    Phase(9, 4, 800, 5e-5, cross_weight=2.5, lit_weight=3.0, white_weight=2.0, latent_noise=0.2),
    Phase(9, 4, 1250, 5e-5, cross_weight=2.5, lit_weight=3.0, white_weight=2.0, latent_noise=0.2),
    Phase(9, 4, 1600, 8e-5, cross_weight=2.5, lit_weight=3.0, white_weight=2.0, latent_noise=0.2),
)
KL_WEIGHT = 1e-4  # of the mean over latent elements


def train_vae(vae: Vae, folder: Path, seed: int, phases: Sequence[Phase] = PHASES, done: int = 0) -> None:
    """Train through the phases but the `done` first; `vae` ends with its averaged weights.

    Goes on from `folder` where a run was stopped.
    """
    device = next(vae.parameters()).device

    def losses(phase: Phase, rng: np.random.Generator) -> dict[str, Tensor]:
        pixels = _batch(rng, phase).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.set_grad_enabled(not phase.only):
                mean, logvar = vae.moments(pixels)
                if phase.frames > 1:  # half of the clips as the transformer will see them
                    split = vae.clip_moments(pixels[::2])
                    pairs = zip(split, (mean, logvar), strict=True)
                    mean, logvar = (torch.cat([s, m[1::2]]) for s, m in pairs)
                    pixels = torch.cat([pixels[::2], pixels[1::2]])
            decoded = shown(vae.decode(noisy(mean, logvar, phase)), pixels)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        beta = 0.05 if phase.frames > 1 else 0.0  # where nearly right, signs of errors are bfloat16's
        l1, mse = F.smooth_l1_loss(decoded, pixels, beta=beta), F.mse_loss(decoded, pixels)
        return {"loss": l1 + mse + KL_WEIGHT * kl, "l1": l1, "mse": mse, "kl": kl}

    for index, phase in list(enumerate(phases))[done:]:
        if phase.frames > 1 and phases[index - 1].frames == 1:
            vae.apply(inflate)
        trainer = Trainer(vae, folder / str(index), phase, seed=seed + index, warmup=50, average=0.998)
        for step in trainer.run(partial(losses, phase)):
            if step % 200 == 0 or step == phase.steps:
                with trainer.averaged_weights():
                    trainer.log({"psnr_images": psnr(vae, 1), "psnr_clips": psnr(vae, 9)})
        trainer.load_average()


@torch.no_grad()
def even_latents(vae: Vae, seed: int, count: int = 600) -> None:
    """Give the latents mean 0, a deviation of 1, and channels that are independent and less unlike.

    Of the principal channels one, of light and dark, varies twenty times more than the least, so that a
    transformer would see little else. Each is divided by the square root of its deviation: wholly equal ones
    would make as much of those that hardly show in a frame.
    """
    rng, device = np.random.default_rng((seed, count)), next(vae.parameters()).device
    rows = []
    for _ in range(count // 20):
        pixels = to_pixels([sample_clip(rng).frames for _ in range(20)]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            rows.append(vae.clip_moments(pixels)[0].transpose(0, 1).flatten(1))
    latents = torch.cat(rows, dim=1)  # (C, all positions)
    variances, directions = torch.linalg.eigh(latents.cov())
    transform = directions @ torch.diag(variances**-0.25) @ directions.T
    transform = transform / variances.sqrt().mean().sqrt()
    vae.change_latents(transform, latents.mean(1))


@torch.no_grad()
def psnr(vae: Vae, frames: int, count: int = 22) -> float:
    """Round trip through the posterior's mean, on clips of held-out combinations, in dB: mean over clips."""
    rng = np.random.default_rng(12345)
    clips = [sample_clip(rng, combination).frames[:frames] for combination in sorted(held_out())][:count]
    device = next(vae.parameters()).device
    pixels = to_pixels(clips).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        decoded = torch.cat([vae.decode(vae.clip_moments(part)[0]) for part in pixels.split(4)])
    error = ((decoded.clamp(-1, 1) - pixels) / 2).square().mean((1, 2, 3, 4))
    return float((-10 * error.log10()).mean())


def _batch(rng: np.random.Generator, phase: Phase) -> Tensor:
    """Clips cut to the phase's frames; half of the images are of one or two shapes instead."""
    most = phase.weight(True, True, True)

    def sample(index: int) -> Clip:
        clip = sample_image(rng) if phase.frames == 1 and index % 2 else sample_clip(rng)
        weight = phase.weight(clip.has_cross, clip.is_lit, clip.is_white)
        return clip if weight == most or rng.random() * most < weight else sample(index)

    return to_pixels([sample(index).frames[: phase.frames] for index in range(phase.batch)])


def noisy(mean: Tensor, logvar: Tensor, phase: Phase) -> Tensor:
    """Latents from the posterior, with the phase's noise, of which each clip has another share."""
    more = phase.latent_noise * torch.rand(len(mean), 1, 1, 1, 1, device=mean.device)
    if not phase.only:  # or an encoder would outgrow the noise
        more = more * mean.std((0, 2, 3, 4), keepdim=True)
    return mean + (logvar.exp() + more.square()).sqrt() * torch.randn_like(mean)


def shown(decoded: Tensor, pixels: Tensor) -> Tensor:
    """`decoded`, but 1 where it is above white, and -1 where it is below black: frames are cut off there.

    Elsewhere it stays, so that a wrong value has a gradient however far off it is.
    """
    bright, dark = decoded.clamp(max=1), decoded.clamp(min=-1)
    return torch.where(pixels >= 1, bright, torch.where(pixels <= -1, dark, decoded))


def to_pixels(clips: list[Any]) -> Tensor:
    """uint8 (F, H, W, 3) each -> (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
