"""Training of the demo's text encoder and transformer, on latents made once: images first, then clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from nova_export.config import NovaConfig
from nova_export.evaluation.scene import IMAGE_SIZE, NUM_FRAMES
from nova_export.runtime.request import FPS
from nova_export.runtime.tokenizer import PromptTokenizer
from reference_model.demo.data import Clip, sample_clip, sample_image
from reference_model.demo.model import Nova
from reference_model.demo.train_vae import to_pixels
from reference_model.demo.trainer import Phase, Trainer
from reference_model.demo.vae import CONFIG as VAE_CONFIG
from reference_model.demo.vae import Vae
from reference_model.init import SCHEDULERS
from reference_model.schedulers import DDPM

TEXT_LENGTH = 16
LATENT_FRAMES = (NUM_FRAMES - 1) // 4 + 1
TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["PhiEncoderModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "float16",
    "embd_pdrop": 0.0,
    "eos_token_id": 0,
    "hidden_act": "gelu_new",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 512,
    "model_type": "phi",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.0,
    "rope_parameters": {"partial_rotary_factor": 0.4, "rope_theta": 10000.0, "rope_type": "default"},
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "NOVATransformer3DModel",
    "_diffusers_version": "0.42.1",
    "arch": ["vit_d3w192", "vit_d5w192", "mlp_d3w160"],
    "image_base_size": [4, 4],
    "image_dim": VAE_CONFIG["latent_channels"],
    "image_size": [IMAGE_SIZE, IMAGE_SIZE],
    "image_stride": 8,
    "rotary_pos_embed": False,
    "text_token_dim": TEXT_ENCODER["hidden_size"],
    "text_token_len": TEXT_LENGTH,
    "video_base_size": [LATENT_FRAMES, 2, 2],
    "video_mixer_rank": 16,
}
SCHEDULER = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.42.1", **SCHEDULERS["DDPMScheduler"]}

CLIPS, IMAGES = 32_000, 32_000  # latents made before training
IMAGE_SHARE = (0.5, 0.2)  # of steps on images alone, in a phase of single frames and in one of clips
TEXT_DROPOUT = 0.1
DEFAULT_FLOW, DEFAULT_FLOW_SHARE = 5.0, 0.5  # the pipeline's default, to mean any speed
LONGER_SHARE, LONGEST = 0.4, 2  # clips placed in time as the start of one up to twice as long
PAPER_MASK_SHARE = 0.25  # of steps with the paper's mask ratios; see `visible_tokens`


# Text to image first, then video from its weights. Frames are latent ones.
PHASES = (
    Phase(1, 128, 2000, 2e-3),
    Phase(LATENT_FRAMES, 64, 13_500, 2e-3),
    Phase(LATENT_FRAMES, 64, 11_500, 1.5e-3, muon=True, most_snr=10.0),
    Phase(LATENT_FRAMES, 64, 12_000, 1.5e-3, muon=True, most_snr=10.0, cross_weight=2.5),
    Phase(LATENT_FRAMES, 64, 6000, 1.2e-3, muon=True, most_snr=10.0, cross_weight=2.5, lit_weight=2.5),
    Phase(
        LATENT_FRAMES, 64, 6500, 1e-3, muon=True, most_snr=10.0,
        cross_weight=2.5, lit_weight=2.5, white_weight=2.0,
    ),
    # After each of the autoencoder's last two phases, on latents made anew.
    *2 * (Phase(
        LATENT_FRAMES, 64, 4200, 1e-3, muon=True, most_snr=10.0,
        cross_weight=2.5, lit_weight=2.5, white_weight=2.0,
    ),),
)  # fmt: skip


@dataclass(frozen=True)
class Latents:
    """What training reads: latents (n, C, l, h, w), prompts (n, TEXT_LENGTH), their lengths, flow (n,), and
    which show a cross (n,), are lit (n,) and stand before white (n,), 0 or 1."""

    latents: Tensor
    token_ids: Tensor
    lengths: Tensor
    flow: Tensor
    crosses: Tensor
    lit: Tensor
    white: Tensor


def make_latents(
    vae: Vae, tokenizer: PromptTokenizer, file: Path, seed: int, count: int, frames: int
) -> Latents:
    """Samples of the posteriors of `count` clips (images, if `frames` is 1), kept in `file`."""
    if not file.exists():
        device = next(vae.parameters()).device
        rows: list[Latents] = []
        for start in tqdm(range(0, count, 100), desc=file.stem, leave=False):
            rng = np.random.default_rng((seed, frames, start))
            torch.manual_seed(int(rng.integers(2**62)))
            clips = [sample_clip(rng) if frames > 1 else sample_image(rng) for _ in range(100)]
            pixels = to_pixels([clip.frames for clip in clips]).to(device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                mean, logvar = vae.clip_moments(pixels) if frames > 1 else vae.moments(pixels)
            latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            rows.append(Latents(latents.cpu(), *_conditions(clips, tokenizer)))
        parts = zip(*(vars(row).values() for row in rows), strict=True)
        whole = dict(zip(vars(rows[0]), (torch.cat(part) for part in parts), strict=True))
        partial = file.with_suffix(".partial")
        save_file(whole, partial)
        partial.replace(file)
    return Latents(**load_file(file))


def nova_config(vocabulary: int) -> NovaConfig:
    """The sizes of the demo."""
    return NovaConfig.from_parts(
        TRANSFORMER, VAE_CONFIG, SCHEDULER, {**TEXT_ENCODER, "vocab_size": vocabulary}
    )


def train_nova(
    nova: Nova,
    folder: Path,
    images: Latents,
    clips: Latents,
    seed: int,
    phases: Sequence[Phase] = PHASES,
    done: int = 0,
) -> None:
    """Train through the phases but the `done` first; `nova` ends with its averaged weights.

    Goes on from `folder` where a run was stopped.
    """
    device, config = next(nova.parameters()).device, nova.config

    def losses(phase: Phase, rng: np.random.Generator) -> dict[str, Tensor]:
        alone = rng.random() < IMAGE_SHARE[phase.frames > 1]
        data, frames = (images, 1) if alone else (clips, phase.frames)
        weights = phase.weight(data.crosses.numpy(), data.lit.numpy(), data.white.numpy())
        rows = torch.from_numpy(rng.choice(len(weights), phase.batch, p=weights / weights.sum()))
        told, kept = (torch.from_numpy(rng.random(phase.batch)) for _ in range(2))
        lengths = data.lengths[rows] * (kept >= TEXT_DROPOUT)
        flow = data.flow[rows].where(told >= DEFAULT_FLOW_SHARE, DEFAULT_FLOW)
        order = rng.random((phase.batch * frames, config.num_tokens)).argsort(1)
        # The fused attention's gradient on CPUs takes a third of a step at these few tokens.
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            errors = nova.losses(
                data.token_ids[rows].to(device),
                lengths.to(device),
                torch.stack([flow, torch.full_like(flow, FPS)], dim=1).to(device),
                data.latents[rows, :, :frames].to(device),
                torch.from_numpy(frame_positions(rng, frames)).to(device),
                torch.from_numpy(order).to(device),
                visible_tokens(rng, config.num_tokens),
                phase.most_snr,
            )
        return {"loss": errors.mean(), "images" if alone else "clips": errors.mean()}

    for index, phase in list(enumerate(phases))[done:]:
        trainer = Trainer(
            nova,
            folder / str(index),
            phase,
            seed=seed + index,
            warmup=min(300, phase.steps // 5),
            weight_decay=0.02,
            average=0.999,
            matrices=nova.matrices(),
        )
        for _ in trainer.run(partial(losses, phase)):
            pass
        trainer.load_average()


def frame_positions(rng: np.random.Generator, frames: int) -> NDArray[np.float32]:
    """Times t * T0 / L of the first frames of a video of L frames, L at random from `frames` up."""
    length = rng.integers(frames + 1, LONGEST * frames + 1) if rng.random() < LONGER_SHARE else frames
    return np.arange(frames, dtype=np.float32) * np.float32(LATENT_FRAMES / length)


def visible_tokens(rng: np.random.Generator, num_tokens: int) -> int:
    """How many tokens of each frame are seen in a step.

    In the paper the share of masked ones is a normal around 1 with deviation 0.25, cut to 0.7 .. 1. Frames of
    so few tokens are finished one by one, so the other steps see any number of them.
    """
    if rng.random() >= PAPER_MASK_SHARE:
        return int(rng.integers(num_tokens))
    masked = 0.0
    while not 0.7 <= masked <= 1:
        masked = rng.normal(1, 0.25)
    return min(round((1 - masked) * num_tokens), num_tokens - 1)


def alpha_bars() -> Tensor:
    """Products of 1 - beta of the checkpoint's schedule (squaredcos_cap_v2): (1000,)."""
    return DDPM.of(SCHEDULER, 25).alpha_bars.float()


def _conditions(clips: Sequence[Clip], tokenizer: PromptTokenizer) -> tuple[Tensor, ...]:
    """Token ids (n, TEXT_LENGTH), lengths (n,), flow (n,); crosses, lit and white (n,) each."""
    ids = [tokenizer.encode(clip.scene.prompt())[0] for clip in clips]
    padded = torch.zeros(len(clips), TEXT_LENGTH, dtype=torch.int64)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    flows = torch.tensor([clip.flow if clip.scene.motion else DEFAULT_FLOW for clip in clips])
    lengths = torch.tensor([len(tokens) for tokens in ids])
    kinds = [(clip.has_cross, clip.is_lit, clip.is_white) for clip in clips]
    return padded, lengths, flows, *torch.tensor(kinds).float().unbind(1)
