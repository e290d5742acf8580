"""A stage as a model of a Triton repository, where no other backend runs its graph: ONNX Runtime in Python.

`nova-export package triton --stages models` copies this file. Beside it lie its graph and `stage.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from nova_export.errors import NovaExportError
from nova_export.runtime.ort_cuda import OrtCudaRunner
from nova_export.runtime.runner import OrtRunner
from nova_export.spec import Stage


class TritonPythonModel:
    """What the python backend calls. Requests of a batch go into one call of the graph."""

    def initialize(self, args: Mapping[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        kept = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        kind = OrtRunner if kept["device"] == "cpu" else OrtCudaRunner
        runner = kind(Stage.from_dict(kept["spec"]), folder / kept["graph"], kept["threads"])
        self._runner: Any = runner.__enter__()
        # The stage writes into these; what a request brought is not ours to write to.
        self._written = {tensor.alias for tensor in runner.stage.outputs if tensor.alias}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        try:
            return self._run(requests)
        except NovaExportError as error:
            failed = pb_utils.TritonError(str(error))
            return [pb_utils.InferenceResponse(output_tensors=[], error=failed) for _ in requests]

    def _run(self, requests: Sequence[Any]) -> list[Any]:
        each = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        inputs = each[0]
        if len(each) > 1:
            inputs = {name: np.concatenate([one[name] for one in each]) for name in inputs}
        inputs = {name: array.copy() if name in self._written else array for name, array in inputs.items()}
        outputs = {name: np.asarray(array) for name, array in self._runner.run(inputs).items()}
        ends = np.cumsum([len(next(iter(one.values()))) for one in each])[:-1]
        parts = {name: np.split(array, ends) if len(each) > 1 else [array] for name, array in outputs.items()}
        return [
            pb_utils.InferenceResponse(
                output_tensors=[pb_utils.Tensor(name, rows[index]) for name, rows in parts.items()]
            )
            for index in range(len(each))
        ]

    def finalize(self) -> None:
        self._runner.__exit__(None, None, None)
