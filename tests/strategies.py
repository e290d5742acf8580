"""Hypothesis strategies and small configs that several test modules need."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from nova_export.config import NovaConfig

SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
IMAGE_VAE = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
}
VIDEO_VAE = {
    **IMAGE_VAE,
    "_class_name": "AutoencoderKLOpenSora",
    "up_block_types": ["UpDecoderBlock3D"] * 2,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock3D"],
}
PHI = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 64,
}


def parts(
    grid: tuple[int, int] = (2, 3),
    *,
    stride: int = 8,
    frames: int = 4,
    mixer: int | None = 4,
    rotary: bool = False,
    text: bool = True,
    depth: tuple[int, int, int] = (1, 2, 1),
    channels: int = 4,
    scheduler: dict[str, Any] = SCHEDULER,
) -> dict[str, Any]:
    """Arguments of `NovaConfig.from_parts`; `grid` is that of the temporal encoder's tokens."""
    patch = 15 // stride + 1
    transformer = {
        "_class_name": "NOVATransformer3DModel",
        "arch": [f"vit_d{depth[0]}w64", f"vit_d{depth[1]}w64", f"mlp_d{depth[2]}w32"],
        "image_dim": channels,
        "image_size": [side * 2 * patch * stride for side in grid],
        "image_stride": stride,
        "text_token_dim": PHI["hidden_size"] if text else None,
        "text_token_len": 6 if text else None,
        "image_base_size": [2 * side for side in grid],
        "video_base_size": [frames, *grid],
        "video_mixer_rank": mixer,
        "rotary_pos_embed": rotary,
    }
    vae = {**(VIDEO_VAE if frames > 1 else IMAGE_VAE), "latent_channels": channels}
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": scheduler,
        "text_encoder": PHI if text else None,
    }


def tiny_config(*args: Any, **kwargs: Any) -> NovaConfig:
    """A small config of the kind that `parts` describes."""
    return NovaConfig.from_parts(**parts(*args, **kwargs))


configs = st.builds(
    tiny_config,
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.sampled_from([8, 16]),
    frames=st.sampled_from([1, 2, 4]),
    mixer=st.sampled_from([None, 0, -1, 4]),
    rotary=st.booleans(),
    text=st.booleans(),
    depth=st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(1, 2)),
    channels=st.sampled_from([4, 8]),
)
