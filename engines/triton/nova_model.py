"""The `nova` model of a Triton repository: a decoupled python model that streams frames.

`nova-export package triton` copies this file. Beside it lies a bundle, or what is left of one when the
stages are models of their own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from engines.triton.service import Limits, Service, timed
from engines.triton.tensors import Array
from nova_export.bundle import Bundle
from nova_export.config import NovaConfig
from nova_export.errors import StageError
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.runner import Held, Lent, Runner
from nova_export.runtime.stage_runners import StageRunners
from nova_export.runtime.tokenizer import PromptTokenizer
from nova_export.spec import Stage


class TritonPythonModel:
    """What the python backend calls. `execute` answers a batch and returns when it has all its answers.

    So as many loops run as the model has instances, and Triton's queue holds back the rest.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        meter = self._meter = Metrics(args["model_name"])
        if given["stages"] == "models":
            self._pipe = pipeline_over_models(folder, args["model_name"], lambda get: timed(get, meter))
        else:
            self._pipe = pipeline_over_bundle(folder, given, lambda get: timed(get, meter))
        limits = Limits(int(config["max_batch_size"]), int(given["max_latent_length"]))
        self._service = Service(self._pipe, limits, meter)

    def execute(self, requests: Sequence[Any]) -> None:
        self._service.serve([TritonCaller(request) for request in requests])
        self._meter.tell()

    def finalize(self) -> None:
        self._pipe.close()


Wrap = Callable[[Callable[[str], Runner]], Callable[[str], Runner]]


def pipeline_over_bundle(folder: Path, given: Mapping[str, str], wrap: Wrap) -> Pipeline:
    """Stages in this process. All are opened now: what is wrong with one is said when the model loads."""
    bundle = Bundle.open(folder / "bundle")
    runners = StageRunners(bundle, given["device"], int(given["threads"]))
    for name in bundle.stages:
        runners(name)
    return Pipeline.over(bundle, wrap(runners), runners.close, vae_tile=runners.vae_tile)


def pipeline_over_models(folder: Path, model: str, wrap: Wrap) -> Pipeline:
    """Every call of a stage is a call of another model of the repository."""
    kept = json.loads((folder / "nova.json").read_text(encoding="utf-8"))
    config = NovaConfig.from_dict(kept["config"])
    runners = {
        name: StageModel(Stage.from_dict(spec), f"{model}_{name}") for name, spec in kept["stages"].items()
    }
    tokenizer = PromptTokenizer(folder / "tokenizer.json", config.text_len) if kept["tokenizer"] else None
    return Pipeline(
        config,
        wrap(runners.__getitem__),
        tokenizer,
        lean_decode=kept["lean_decode"],
        vae_tile=kept["vae_tile"],
    )


class StageModel(Lent):
    """A runner whose stage is a model of the same server."""

    def __init__(self, stage: Stage, model: str) -> None:
        self.stage, self.model = stage, model

    def run(self, inputs: Mapping[str, Held]) -> dict[str, Array]:
        """Raises StageError: wrong inputs, or the model failed."""
        self.stage.bind(inputs)
        request = pb_utils.InferenceRequest(
            model_name=self.model,
            requested_output_names=[tensor.name for tensor in self.stage.outputs],
            inputs=[
                pb_utils.Tensor(name, np.ascontiguousarray(np.asarray(array)))
                for name, array in inputs.items()
            ],
        )
        response = request.exec()
        if response.has_error():
            raise StageError(f"stage {self.stage.name}: {response.error().message()}")
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


class TritonCaller:
    """One request of a client."""

    def __init__(self, request: Any) -> None:
        self._request, self._sender = request, request.get_response_sender()

    def tensors(self) -> dict[str, Array]:
        return {tensor.name(): tensor.as_numpy() for tensor in self._request.inputs()}

    def send(self, tensors: Mapping[str, Array]) -> None:
        made = [pb_utils.Tensor(name, array) for name, array in tensors.items()]
        self._sender.send(pb_utils.InferenceResponse(output_tensors=made))

    def end(self, error: str | None = None) -> None:
        if error is None:
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return
        response = pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(error))
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


FAMILIES = {
    "nova_stage_seconds": "Time in calls of a stage",
    "nova_stage_calls": "Calls of a stage",
    "nova_requests": "Requests that ended, by how",
    "nova_frames": "Frames sent",
    "nova_running": "Requests in the loops now",
}
GAUGES = ("nova_running",)


class Metrics:
    """Times and counts, among the server's own at /metrics.

    They are kept here while a loop runs, and told at its begin and end: telling takes locks in memory that
    the server shares, and a process that is killed while it holds one takes the server with it.
    """

    def __init__(self, model: str) -> None:
        self._labels = {"model": model}
        self._families = {
            name: pb_utils.MetricFamily(
                name=name,
                description=text,
                kind=pb_utils.MetricFamily.GAUGE if name in GAUGES else pb_utils.MetricFamily.COUNTER,
            )
            for name, text in FAMILIES.items()
        }
        self._metrics: dict[tuple[str, str], Any] = {}
        self._untold: dict[tuple[str, str], float] = defaultdict(float)

    def stage(self, name: str, seconds: float) -> None:
        self._untold["nova_stage_seconds", name] += seconds
        self._untold["nova_stage_calls", name] += 1

    def ended(self, result: str) -> None:
        self._untold["nova_requests", result] += 1

    def frames(self, count: int) -> None:
        self._untold["nova_frames", ""] += count

    def running(self, requests: int) -> None:
        """The gauge last: where it says 0, all that ran has been told."""
        self.tell()
        self._of("nova_running", "").set(requests)

    def tell(self) -> None:
        for key, value in self._untold.items():
            self._of(*key).increment(value)
        self._untold.clear()

    def _of(self, family: str, label: str) -> Any:
        if (family, label) not in self._metrics:
            kind = {"nova_requests": "result"}.get(family, "stage")
            labels = {**self._labels, **({kind: label} if label else {})}
            self._metrics[family, label] = self._families[family].Metric(labels=labels)
        return self._metrics[family, label]
