"""The trained parts as a checkpoint folder in the published layout, in fp16: written, and read again."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nova_export.config import GENERATION_CONFIG, NovaConfig
from reference_model.demo.model import Nova
from reference_model.demo.recipe import SEED, recipe_hash
from reference_model.demo.train_nova import TRANSFORMER
from reference_model.demo.vae import Vae
from reference_model.init import Parts, model_index, write_json

MODEL_CARD = Path(__file__).parent / "MODEL_CARD.md"
GUIDANCE_SCALE = 2.0  # outlines are cleanest there: model card

FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
Runs = dict[str, list[dict[str, Any]]]  # "vae", "nova" -> of each phase: steps, seconds and the last losses


def write_checkpoint(
    out: Path, config: NovaConfig, vae: Vae, nova: Nova, tokenizer: Path, runs: Runs
) -> None:
    """Replace folder `out` by the checkpoint, whole or not at all. tokenizer: its folder."""
    parts = Parts(TRANSFORMER, dict(config.vae), dict(config.scheduler), dict(config.text_encoder or {}))
    weights = {**nova.parts(), "vae": vae.state()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        write_json(folder / "model_index.json", model_index(parts))
        write_json(folder / GENERATION_CONFIG, {"guidance_scale": GUIDANCE_SCALE})
        write_json(folder / "scheduler" / "scheduler_config.json", parts.scheduler)
        for part, name in FILES.items():
            write_json(folder / part / "config.json", getattr(parts, part))
            _write_weights(folder / part / name, weights[part])
        shutil.copytree(tokenizer, folder / "tokenizer")
        training = {"recipe_sha256": recipe_hash(), "seed": SEED, "runs": runs}
        write_json(folder / "training.json", training)
        shutil.copy(MODEL_CARD, folder / "README.md")
        if out.exists():
            shutil.rmtree(out)
        folder.replace(out)


def _write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    half = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} does not fit into fp16")
    save_file(half, path, {"format": "pt"})
    path.chmod(0o644)  # the library makes it private


def read_weights(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """The weights of a part, in float32."""
    weights = load_file(checkpoint / part / FILES[part])
    return {name: tensor.float() for name, tensor in weights.items()}


def read_runs(checkpoint: Path) -> Runs:
    """What it was trained for."""
    return dict(json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["runs"])


def last_losses(folder: Path, done: int) -> list[dict[str, Any]]:
    """Steps, seconds and the last losses of each phase trained in `folder`, but the `done` first."""
    trained = sorted(int(log.parent.name) for log in folder.glob("*/log.jsonl"))
    return [_last(folder / str(index) / "log.jsonl") for index in trained if index >= done]


def _last(log: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return next(line for line in reversed(lines) if "loss" in line)
