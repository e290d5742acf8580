"""Builds that take milliseconds: an export that writes a few bytes stands in the place of the real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nova_export.config import NovaConfig
from nova_export.export import build
from nova_export.export.build import build_bundle
from nova_export.stages import stages
from tests.conftest import GOLDEN

STAGES = list(stages(NovaConfig.from_checkpoint(GOLDEN / "t2i" / "checkpoint")))
OF_TRANSFORMER = ["condition", "temporal_encoder", "spatial_encoder", "diffusion_head"]
Stop = Callable[[Path], object]


class Exports:
    """Stands for export_onnx: an ONNX file that holds the sum of the weights alone, and data beside it."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.stop: dict[str, Stop] = {}  # what to do at a stage, instead of finishing it

    def __call__(self, spec: Any, module: torch.nn.Module, path: Path, opset: int = 23) -> None:
        text = f"{spec.name} {sum(float(p.double().sum()) for p in module.state_dict().values())!r}".encode()
        path.write_bytes(b"\x32" + bytes([len(text)]) + text)  # ModelProto.doc_string
        if spec.name in self.stop:
            self.stop[spec.name](path)
        path.with_name(path.name + ".data").write_bytes(text * 100)
        self.done.append(spec.name)


def fail(error: BaseException) -> Stop:
    def stop(path: Path) -> None:
        raise error

    return stop


def make(checkpoint: Path, out: Path, **options: Any) -> list[tuple[str, str]]:
    """Build without verifying; what was reported."""
    reported: list[tuple[str, str]] = []
    options = {"verify": False, "report": lambda *args: reported.append(args), **options}
    assert build_bundle(checkpoint, out, **options) == out
    return reported


def reused(reported: list[tuple[str, str]]) -> list[str]:
    return [stage for stage, action in reported if action == "reused"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_weights(checkpoint: Path, part: str) -> None:
    [path] = (checkpoint / part).glob("*.safetensors")
    state = load_file(path)
    prefix = {"vae": "decoder.", "text_encoder": "model.", "transformer": "text_embed."}[part]
    key = next(key for key in state if key.startswith(prefix))
    state[key] = state[key] + 1
    save_file(state, path)


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Build these stages alone."""
    monkeypatch.setattr(build, "stages", lambda config, **_: {name: stages(config)[name] for name in names})
