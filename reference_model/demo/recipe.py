"""What the demo checkpoint was trained on and how, as data, and its hash, which ships with the weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np

from nova_export.evaluation.scene import held_out
from reference_model.demo import train_nova, train_vae
from reference_model.demo.data import sample_clip, sample_image
from reference_model.demo.model import LOSS_REPEAT
from reference_model.demo.vae import CONFIG as VAE_CONFIG

SEED = 2412


def recipe() -> dict[str, Any]:
    """Configs, phases and constants of both trainings, what is held out, and a digest of the data."""
    return {
        "seed": SEED,
        "data_sha256": data_digest(),
        "held_out": sorted(" ".join(combination) for combination in held_out()),
        "vae": {
            "config": VAE_CONFIG,
            "phases": [asdict(phase) for phase in train_vae.PHASES],
            "later_phases": [asdict(phase) for phase in train_vae.LATER_PHASES],
            "kl_weight": train_vae.KL_WEIGHT,
        },
        "nova": {
            "transformer": train_nova.TRANSFORMER,
            "text_encoder": train_nova.TEXT_ENCODER,
            "clips": train_nova.CLIPS,
            "images": train_nova.IMAGES,
            "phases": [asdict(phase) for phase in train_nova.PHASES],
            "loss_repeat": LOSS_REPEAT,
            "image_share": train_nova.IMAGE_SHARE,
            "text_dropout": train_nova.TEXT_DROPOUT,
            "default_flow": [train_nova.DEFAULT_FLOW, train_nova.DEFAULT_FLOW_SHARE],
            "longer": [train_nova.LONGER_SHARE, train_nova.LONGEST],
            "paper_mask_share": train_nova.PAPER_MASK_SHARE,
        },
    }


def recipe_hash() -> str:
    """SHA-256 of the recipe. It changes when anything that shapes the weights does."""
    return hashlib.sha256(json.dumps(recipe(), sort_keys=True).encode()).hexdigest()


def data_digest(count: int = 200) -> str:
    """SHA-256 of the prompts and pixels of the first clips and images that seed 0 gives."""
    digest, rng = hashlib.sha256(), np.random.default_rng(0)
    for i in range(count):
        clip = sample_clip(rng) if i % 2 else sample_image(rng)
        digest.update(clip.scene.prompt().encode() + clip.frames.tobytes())
    return digest.hexdigest()
