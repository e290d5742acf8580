"""Writes the trained parts as a checkpoint folder in the published layout, weights in fp16."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nova_export.config import NovaConfig
from reference_model.demo.model import Nova
from reference_model.demo.recipe import SEED, recipe_hash
from reference_model.demo.train_nova import TRANSFORMER
from reference_model.demo.vae import Vae
from reference_model.init import Parts, model_index, write_json

MODEL_CARD = Path(__file__).parent / "MODEL_CARD.md"


def write_checkpoint(
    out: Path, config: NovaConfig, vae: Vae, nova: Nova, tokenizer: Path, logs: Sequence[Path]
) -> None:
    """Replace folder `out` by the checkpoint, whole or not at all. logs: folders of the training runs."""
    assert config.text_encoder is not None
    text_encoder = dict(config.text_encoder)
    parts = Parts(TRANSFORMER, dict(config.vae), dict(config.scheduler), text_encoder)
    weights = {**nova.parts(), "vae": vae.state()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        write_json(folder / "model_index.json", model_index(parts))
        write_json(folder / "scheduler" / "scheduler_config.json", parts.scheduler)
        for part, values in (
            ("transformer", parts.transformer),
            ("vae", parts.vae),
            ("text_encoder", text_encoder),
        ):
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            write_json(folder / part / "config.json", values)
            _write_weights(folder / part / f"{stem}.safetensors", weights[part])
        shutil.copytree(tokenizer, folder / "tokenizer")
        write_json(
            folder / "training.json", {"recipe_sha256": recipe_hash(), "seed": SEED, "runs": _runs(logs)}
        )
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


def _runs(logs: Sequence[Path]) -> dict[str, list[Any]]:
    """Of each training and phase: steps, seconds and the last losses, from its log."""
    return {log.name: [_last(phase / "log.jsonl") for phase in sorted(log.iterdir())] for log in logs}


def _last(log: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return next(line for line in reversed(lines) if "loss" in line)
