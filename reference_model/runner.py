"""A reference module behind the runner surface of nova_export/runtime/runner.py: numpy in, numpy out.

With it the torch-free pipeline runs on torch: what differs from ONNX Runtime then is the backend alone, and
what differs from the eager pipeline is the loop alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nova_export.config import NovaConfig
from nova_export.errors import StageError
from nova_export.runtime.runner import Array
from nova_export.spec import Stage
from nova_export.stages import stages
from reference_model.checkpoint import load_module


class TorchRunner:
    """A stage on its own reference module. Outputs that alias an input are written into it."""

    def __init__(self, stage: Stage, module: nn.Module) -> None:
        self.stage, self.module = stage, module

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # the module is the caller's

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Raises StageError: wrong inputs, or the module failed."""
        self.stage.bind(inputs)
        # Writable, though nothing is written: torch warns of arrays that are not.
        arrays = {name: np.require(array, requirements=("C", "W")) for name, array in inputs.items()}
        try:
            with torch.inference_mode():
                outputs = self.module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        except Exception as error:
            raise StageError(f"stage {self.stage.name}: torch failed: {error}") from error
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        named = {t.name: out.numpy() for t, out in zip(self.stage.outputs, outputs, strict=True)}
        for tensor in self.stage.outputs:
            if tensor.alias:
                np.copyto(inputs[tensor.alias], named[tensor.name])
                named[tensor.name] = inputs[tensor.alias]
        return named


def torch_runners(
    config: NovaConfig, checkpoint: Path, lean_decode: str | None = None
) -> dict[str, TorchRunner]:
    """Every stage of a checkpoint on torch; lean_decode as in `stages`. Raises CheckpointError."""
    specs = stages(config, lean_decode=lean_decode)
    return {name: TorchRunner(spec, load_module(spec, config, checkpoint)) for name, spec in specs.items()}
