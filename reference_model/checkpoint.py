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

from nova_export.config import NovaConfig
from nova_export.errors import CheckpointError
from nova_export.spec import Stage

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
IGNORED_KEYS = ("rotary_emb.inv_freq",)  # buffers that older transformers versions saved


class Weights:
    """The safetensors files of one part of a checkpoint, read lazily."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for key, path, shape in self._index():
            self.files[key], self.shapes[key] = path, shape

    def _index(self) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
        """Which file holds which tensor, of which shape: from the files' headers."""
        for path in self._paths():
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                        yield key, path, tuple(file.get_slice(key).get_shape())
            except FileNotFoundError:
                raise CheckpointError(
                    f"{path}: missing, but the index names it; copy the checkpoint again"
                ) from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: truncated or corrupt ({error}); copy the checkpoint again"
                ) from error

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: missing; a NOVA checkpoint folder has it")
        for index in sorted(self.folder.glob("*.safetensors.index.json")):
            names = sorted(set(self._weight_map(index).values()))
            if any(Path(name).name != name or name == ".." for name in names):
                raise CheckpointError(f"{index}: names a file outside its own folder")
            return [self.folder / name for name in names]
        if paths := sorted(self.folder.glob("*.safetensors")):
            return paths
        if pickles := sorted(p for p in self.folder.iterdir() if p.suffix in PICKLE_SUFFIXES):
            raise CheckpointError(
                f"{pickles[0]}: pickled weights can run code and are refused; convert them once where you "
                "trust them: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
                "'model.safetensors')"
            )
        raise CheckpointError(f"{self.folder}: has no .safetensors file")

    @staticmethod
    def _weight_map(index: Path) -> dict[str, str]:
        try:
            weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(key): str(name) for key, name in weights.items()}
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
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
    module, weights, stored = _open_module(stage, config, checkpoint)
    shapes = {name: empty.shape for name, empty in module.state_dict().items()}
    state = {name: weights.read(key).reshape(shapes[name]) for name, key in stored.items()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def check_weights(stage: Stage, config: NovaConfig, checkpoint: Path) -> int:
    """Whether `load_module` will find all it needs, from the files' headers alone. Raises as it does.

    Returns how many values the weights have.
    """
    module, *_ = _open_module(stage, config, checkpoint)
    return sum(tensor.numel() for tensor in module.state_dict().values())


def _open_module(
    stage: Stage, config: NovaConfig, checkpoint: Path
) -> tuple[nn.Module, Weights, dict[str, str]]:
    """The stage's module without weights, the weights' files, and the key of each of its tensors there."""
    weights = Weights(checkpoint / stage.part)
    try:
        with torch.device("meta"):
            module = make_module(stage, config)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{weights.folder / 'config.json'}: no {stage.name} can be made of it "
            f"({type(error).__name__}: {error})"
        ) from error
    wanted = module.state_dict()
    rename = getattr(module, "parameter_name", str)
    stored = {rename(key): key for key in weights.files if key.startswith(stage.prefixes)}
    _check_names(weights.folder, wanted, stored)
    for name, empty in wanted.items():
        shape = weights.shapes[stored[name]]
        # 1x1 convolutions stand for linear layers, and (1, 1, D) for (1, D).
        if [size for size in shape if size != 1] != [size for size in empty.shape if size != 1]:
            raise CheckpointError(
                f"{weights.folder}: {stored[name]} has shape {shape}, "
                f"but config.json asks for {tuple(empty.shape)}"
            )
    return module, weights, {name: stored[name] for name in wanted}


def make_module(stage: Stage, config: NovaConfig) -> nn.Module:
    """The module that the spec names, its weights not loaded."""
    package, name = stage.module.split(":")
    kind: type[nn.Module] = getattr(importlib.import_module(package), name)
    return kind(config.vae if stage.part == "vae" else config, *stage.arguments)


def _check_names(folder: Path, wanted: Mapping[str, Tensor], stored: Mapping[str, str]) -> None:
    if missing := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(
            f"{folder}: has no tensor {missing[0]!r} ({len(missing)} missing); config.json asks for it"
        )
    extra = sorted(key for key in stored.keys() - wanted.keys() if not key.endswith(IGNORED_KEYS))
    if extra:
        raise CheckpointError(
            f"{folder}: holds {extra[0]!r} ({len(extra)} such), which config.json has no place for"
        )
