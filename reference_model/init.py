"""Checkpoints of published architectures with random weights, in the published folder layout. Torch-free.

For trying, timing and testing the whole toolchain where the trained weights are not at hand: sizes, names and
layout are the published ones, the pictures mean nothing. What the parameters are is parameters.py's
business, how they are drawn and stored random_weights.py's.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_export.config import NovaConfig
from nova_export.errors import OutputError, UsageError
from reference_model import parameters
from reference_model.random_weights import write_weights
from reference_model.small_tokenizer import common_merges, write_tokenizer

Config = Mapping[str, Any]
Report = Callable[[str, str], object]  # part of the checkpoint, what is being done to it

VAES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"scaling_factor": 0.13025, "sample_size": 1024, "double_z": True},
    "AutoencoderKLOpenSora": {"scaling_factor": 0.18215, "sample_size": 256},
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
    },
    "DDPMScheduler": {
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "variance_type": "fixed_small",
    },
}


def _image_model(width: int, pixels: int, scheduler: str, scaling: float) -> dict[str, Config]:
    return {
        "transformer": {
            "arch": [f"vit_d16w{width}", f"vit_d32w{width}", f"mlp_d6w{width}"],
            "image_size": [pixels, pixels],
        },
        "vae": {"_class_name": "AutoencoderKL", "scaling_factor": scaling, "sample_size": pixels},
        "scheduler": {"_class_name": scheduler},
    }


# What sets each published checkpoint apart; sizes as in the training configs beside the published code.
ARCHITECTURES: dict[str, dict[str, Config]] = {
    "nova-d48w768-sdxl1024": _image_model(768, 1024, "FlowMatchEulerDiscreteScheduler", 0.13025),
    "nova-d48w1024-sdxl1024": _image_model(1024, 1024, "FlowMatchEulerDiscreteScheduler", 0.13025),
    "nova-d48w1536-sdxl1024": _image_model(1536, 1024, "FlowMatchEulerDiscreteScheduler", 0.13025),
    "nova-d48w1024-sd512": _image_model(1024, 512, "DDPMScheduler", 0.18215),
    "nova-d48w1024-osp480": {
        "transformer": {
            "arch": ["vit_d16w1024", "vit_d32w1024", "mlp_d3w1280"],
            "image_size": [480, 768],
            "video_base_size": [16, 15, 24],
        },
        "vae": {"_class_name": "AutoencoderKLOpenSora"},
        "scheduler": {"_class_name": "DDPMScheduler"},
    },
}

PHI_2 = "phi-2"
PHI_2_SIZE = (32, 2560)
PHI_2_VOCABULARY = 51200
SMALL_VOCABULARY = 512


@dataclass(frozen=True)
class Parts:
    """The config.json of every part; `text_encoder` is None for class-conditional checkpoints."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    text_encoder: dict[str, Any] | None


def init_checkpoint(
    architecture: str | Mapping[str, Config],
    out: str | Path,
    *,
    text_encoder: str = PHI_2,
    seed: int = 0,
    report: Report = lambda part, action: None,
) -> Path:
    """Write a checkpoint folder of random fp16 weights and return its path. Small memory, at any size.

    Args:
        architecture: a name of ARCHITECTURES, or what differs from the defaults in the config files of
            "transformer", "vae" and "scheduler". The transformer's `arch` and `image_size` must be there; a
            `text_token_dim` of None makes it class-conditional.
        out: must not exist, or be empty.
        text_encoder: "phi-2", or LAYERSxWIDTH for a smaller Phi, such as "2x64".
        seed: the same seed gives the same files.

    Raises:
        UsageError: unknown architecture or text encoder. CheckpointError: a configuration that cannot be.
        OutputError: `out` is taken, or cannot be written.
    """
    out = Path(out)
    parts = resolve(architecture, text_encoder)
    config = NovaConfig.from_parts(**vars(parts))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists and is not empty; remove it or give another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            _write(work, parts, config, seed, report)
            work.chmod(0o755)
            work.replace(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})") from error
    return out


def resolve(architecture: str | Mapping[str, Config], text_encoder: str = PHI_2) -> Parts:
    """Complete configs of all parts. Arguments and UsageError as in `init_checkpoint`."""
    if isinstance(architecture, str):
        if architecture not in ARCHITECTURES:
            raise UsageError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[architecture]
    vae = _vae(architecture.get("vae", {}))
    phi = _phi(text_encoder)
    transformer = _transformer(architecture["transformer"], vae["latent_channels"], phi["hidden_size"])
    return Parts(
        transformer=transformer,
        vae=vae,
        scheduler=_complete(SCHEDULERS, "DDPMScheduler", architecture.get("scheduler", {})),
        text_encoder=phi if transformer["text_token_dim"] else None,
    )


def _transformer(given: Config, channels: int, text_dim: int) -> dict[str, Any]:
    stride = given.get("image_stride", 8)
    patch = 15 // stride + 1
    rows, columns = (pixels // stride // patch for pixels in given["image_size"])
    return {
        "_class_name": "NOVATransformer3DModel",
        "image_dim": channels,
        "image_stride": stride,
        "text_token_dim": text_dim,
        "text_token_len": 256,
        "image_base_size": [rows, columns],
        "video_base_size": [1, rows // 2, columns // 2],
        "video_mixer_rank": None,
        "rotary_pos_embed": False,
        **given,
    }


def _vae(given: Config) -> dict[str, Any]:
    vae = _complete(VAES, "AutoencoderKL", given)
    blocks = len(vae.setdefault("block_out_channels", [128, 256, 512, 512]))
    flat = vae["_class_name"] == "AutoencoderKL"
    down = ["2D"] * (blocks if flat else blocks // 2) + ["3D"] * (0 if flat else blocks - blocks // 2)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "down_block_types": [f"DownEncoderBlock{kind}" for kind in down],
        "up_block_types": [f"UpDecoderBlock{'2D' if flat else '3D'}"] * blocks,
        **vae,
    }


def _complete(templates: Mapping[str, Config], default: str, given: Config) -> dict[str, Any]:
    """The class's defaults under what is given."""
    name = given.get("_class_name", default)
    if name not in templates:
        raise UsageError(f"class {name!r} cannot be initialized; known are {', '.join(templates)}")
    return {"_class_name": name, **templates[name], **given}


def _phi(text_encoder: str) -> dict[str, Any]:
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text_encoder)
    if size is None and text_encoder != PHI_2:
        raise UsageError(f"text encoder {text_encoder!r} must be {PHI_2!r} or LAYERSxWIDTH, such as 2x64")
    depth, width = (int(size[1]), int(size[2])) if size else PHI_2_SIZE
    if width % 32:
        raise UsageError(f"text encoder {text_encoder!r}: the width must be a multiple of 32")
    heads = width // (80 if width % 80 == 0 else 32)
    return {
        "architectures": ["PhiEncoderModel"],
        "model_type": "phi",
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "float16",
        "embd_pdrop": 0.0,
        "eos_token_id": None,
        "hidden_act": "gelu_new",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": depth,
        "num_key_value_heads": heads,
        "pad_token_id": None,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": SMALL_VOCABULARY if size else PHI_2_VOCABULARY,
    }


def _write(folder: Path, parts: Parts, config: NovaConfig, seed: int, report: Report) -> None:
    """All files of the checkpoint. The text encoder, which may be most of it, comes last."""
    write_json(folder / "model_index.json", model_index(parts))
    write_json(folder / "scheduler" / "scheduler_config.json", parts.scheduler)
    weights = [
        ("transformer", parts.transformer, "diffusion_pytorch_model", parameters.transformer(config)),
        ("vae", parts.vae, "diffusion_pytorch_model", parameters.autoencoder(parts.vae)),
    ]
    if parts.text_encoder is not None:
        write_tokenizer(folder / "tokenizer", common_merges())
        weights.append(("text_encoder", parts.text_encoder, "model", parameters.phi(parts.text_encoder)))
    for part, values, stem, table in weights:
        report(part, "writing")
        write_json(folder / part / "config.json", values)
        write_weights(folder / part, stem, list(table), seed, part)


def model_index(parts: Parts) -> dict[str, Any]:
    """model_index.json: which class each part is."""
    vae = {"AutoencoderKL": "autoencoder_kl", "AutoencoderKLOpenSora": "autoencoder_kl_opensora"}
    scheduler = {"DDPMScheduler": "ddpm", "FlowMatchEulerDiscreteScheduler": "cfm"}
    vae_class, scheduler_class = parts.vae["_class_name"], parts.scheduler["_class_name"]
    index: dict[str, Any] = {
        "_class_name": "NOVAC2IPipeline" if parts.text_encoder is None else "NOVAPipeline",
        "scheduler": [f"diffnext.schedulers.scheduling_{scheduler[scheduler_class]}", scheduler_class],
        "transformer": ["diffnext.models.transformers.transformer_nova", "NOVATransformer3DModel"],
        "vae": [f"diffnext.models.autoencoders.{vae[vae_class]}", vae_class],
    }
    if parts.text_encoder is not None:
        index["text_encoder"] = ["diffnext.models.text_encoders.phi", "PhiEncoderModel"]
        index["tokenizer"] = ["transformers", "CodeGenTokenizerFast"]
    return index


def write_json(path: Path, values: Config) -> None:
    """`values`, indented; makes the folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
