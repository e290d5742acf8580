"""Reading a published checkpoint folder: configs, and weights one tensor at a time.

Only safetensors files are opened. Remote-code files that published checkpoints carry are never looked at, and
pickle files are refused, for they can run code.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nova_export.config import NovaConfig, read_config
from nova_export.errors import CheckpointError
from nova_export.spec import Stage

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
IGNORED_KEYS = ("rotary_emb.inv_freq",)  # buffers that older transformers versions saved


class Weights:
    """The safetensors files of one part of a checkpoint, read lazily."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = dict(self._index())

    def _index(self) -> Iterator[tuple[str, Path]]:
        """Which file holds which tensor."""
        for path in self._paths():
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                        yield key, path
            except FileNotFoundError:
                raise CheckpointError(f"{path}: missing, but the index names it; copy the checkpoint again") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: truncated or corrupt ({error}); copy the checkpoint again") from error

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: missing; a NOVA checkpoint folder has it")
        for index in sorted(self.folder.glob("*.safetensors.index.json")):
            names = sorted(set(self._weight_map(index).values()))
            if any(Path(name).name != name for name in names):
                raise CheckpointError(f"{index}: names a file outside its own folder")
            return [self.folder / name for name in names]
        if paths := sorted(self.folder.glob("*.safetensors")):
            return paths
        if pickles := sorted(p for p in self.folder.iterdir() if p.suffix in PICKLE_SUFFIXES):
            raise CheckpointError(
                f"{pickles[0]}: pickled weights can run code and are refused; convert them once where you trust "
                "them: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
            )
        raise CheckpointError(f"{self.folder}: has no .safetensors file")

    @staticmethod
    def _weight_map(index: Path) -> dict[str, str]:
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{index}: is no safetensors index ({error})") from error

    def read(self, key: str) -> Tensor:
        """One tensor as float32."""
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key).float()


def load_module(stage: Stage, config: NovaConfig, checkpoint: Path) -> nn.Module:
    """The reference module of a stage, in eval mode, with float32 weights from the checkpoint.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape than the config says.
    """
    weights = Weights(checkpoint / stage.part)
    with torch.device("meta"):
        module = module_class(stage)(config.vae if stage.part == "vae" else config)
    wanted = module.state_dict()
    rename = getattr(module, "parameter_name", str)
    stored = {rename(key): key for key in weights.files if key.startswith(stage.prefixes)}
    _check_names(weights.folder, wanted, stored)
    state = {}
    for name, empty in wanted.items():
        tensor = weights.read(stored[name])
        if tensor.shape != empty.shape and tensor.numel() != empty.numel():
            raise CheckpointError(
                f"{weights.folder}: {stored[name]} has shape {tuple(tensor.shape)}, "
                f"but config.json asks for {tuple(empty.shape)}"
            )
        state[name] = tensor.reshape(empty.shape)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def module_class(stage: Stage) -> type[nn.Module]:
    """The class that the spec names."""
    package, name = stage.module.split(":")
    return getattr(importlib.import_module(package), name)


def _check_names(folder: Path, wanted: Mapping[str, Tensor], stored: Mapping[str, str]) -> None:
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(f"{folder}: has no tensor {missing[0]!r} ({len(missing)} missing); config.json asks for it")
    extra = sorted(key for key in stored.keys() - wanted.keys() if not key.endswith(IGNORED_KEYS))
    if extra:
        raise CheckpointError(f"{folder}: holds {extra[0]!r} ({len(extra)} such), which config.json has no place for")


def check_complete(checkpoint: Path) -> None:
    """Refuse a checkpoint whose parts or tokenizer are missing. Raises CheckpointError."""
    index = checkpoint / "model_index.json"
    read_config(index)
