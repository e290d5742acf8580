"""Runs the loops over prompts and looks into the stages, at a sample of the AR steps.

Of the linear layers of the encoders it keeps what they see, of every value of every stage how large it gets.

The sample is stratified: of every frame the same number of steps, one from each equal part of them, as
visible length and mask ratio change what layers see. Few layers are looked at in one call, so that memory
stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from calibration.statistics import LayerInput, Statistics
from nova_export.bundle import Bundle
from nova_export.errors import InputError
from nova_export.evaluation.lockstep import Position
from nova_export.export.passes.quantize import linear_layers
from nova_export.export.watch import Ranges, session_with
from nova_export.progress import Report, call_progress
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.request import Request
from nova_export.runtime.runner import Array, Held, Lent, Runner
from nova_export.runtime.stage_runners import StageRunners
from nova_export.runtime.tokens import set_sizes
from nova_export.targets import ENCODERS

STEPS_PER_FRAME = 8
GROUP_CHANNELS = 16_384  # inputs looked at in one call: some hundred MB at full size


def calibrate(
    bundle: Bundle,
    prompts: Sequence[str | int],
    seed: int,
    out: Path,
    report: Report = lambda done: None,
    threads: int = 0,
    **arguments: Any,
) -> Statistics:
    """Statistics of a float32 bundle's stages, written to `out` after every prompt.

    Goes on from `out` where it was stopped. Prompt i has seed + i. arguments: of `Request`. report: told how
    many prompts are done, in parts.

    Raises:
        InputError: the bundle is not in float32, or `out` holds another calibration.
    """
    for name in bundle.stages:
        if bundle.stages[name].precision != "fp32":
            raise InputError(
                f"{bundle.folder}: stage {name} is in {bundle.stages[name].precision}; calibrate the fp32 "
                "bundle of the checkpoint"
            )
    arguments = {"max_latent_length": bundle.config.video_length, **arguments}
    found = Statistics(bundle.source["parts"], list(prompts), seed, arguments)
    if out.exists():
        earlier = Statistics.load(out)
        if not earlier.same_origin(found):
            raise InputError(
                f"{out}: holds a calibration of another checkpoint, or with other prompts, seed or "
                "arguments; give another --out, or remove it"
            )
        found = earlier
    runners = StageRunners(bundle, "cpu", threads)
    observers = Observers(bundle, found, threads)
    try:
        for index in range(found.done, len(prompts)):
            request = Request(prompt=prompts[index], **{**arguments, "seed": seed + index})
            chosen = _Sample(request, bundle, seed + index)

            def stage(name: str, chosen: _Sample = chosen) -> Runner:
                return _Observed(runners(name), observers, chosen)

            pipeline = Pipeline.over(bundle, stage)
            pipeline(
                prompts[index],
                callback=call_progress(report, index, 1),
                **{**arguments, "seed": seed + index},
            )
            found.done = index + 1
            found.save(out)
            report(index + 1)
    finally:
        runners.close()
    return found


class Observers:
    """What looks into the stages of a bundle, opened as they are called, and adds to the statistics."""

    def __init__(self, bundle: Bundle, found: Statistics, threads: int = 0) -> None:
        self.bundle, self.found, self.threads = bundle, found, threads
        self._open: dict[str, tuple[Ranges, LayerObserver | None]] = {}

    def look(self, name: str, inputs: Mapping[str, Array]) -> None:
        """Add what a call of a stage with these inputs shows."""
        if name not in self._open:
            self.bundle.check_stage(name)
            path = self.bundle.path(self.bundle.stages[name].graph)
            model = ir.load(path)
            ShapeInferencePass()(model)  # gives every value a type; the exporter leaves some out
            layers = None
            if name in ENCODERS:
                layers = LayerObserver(model, path.parent, name, self.found, self.threads)
            self._open[name] = Ranges(model, path.parent, self.threads), layers
        ranges, layers = self._open[name]
        ranges.look(inputs)
        for value, largest in ranges.largest.items():
            place = name, value
            self.found.largest[place] = max(self.found.largest.get(place, 0.0), largest)
        if layers is not None:
            layers.look(inputs)


class LayerObserver:
    """A stage's graph with the inputs of its linear layers as outputs, added to the statistics."""

    def __init__(self, model: ir.Model, folder: Path, name: str, found: Statistics, threads: int = 0) -> None:
        import onnxruntime as ort

        self.name, self.found = name, found
        read: dict[str, ir.Value] = {}
        channels: dict[str, int] = {}
        for layer, linear in linear_layers(model).items():
            value = linear.node.inputs[0]
            assert value is not None
            read[layer], channels[layer] = value, linear.shape[0]
            found.layers.setdefault((name, layer), LayerInput(channels[layer]))
        self._inputs = {layer: str(value.name) for layer, value in read.items()}
        self._graph_inputs = {str(value.name) for value in model.graph.inputs}
        self._groups = _groups(channels)
        inner = dict.fromkeys(value for value in read.values() if not value.is_graph_input())
        self._session = session_with(model, folder, inner, threads)
        self._only_needed = ort.RunOptions()
        self._only_needed.only_execute_path_to_fetches = True

    def look(self, inputs: Mapping[str, Array]) -> None:
        """Add what the layers see in a call with these inputs."""
        for group in self._groups:
            names = sorted({self._inputs[layer] for layer in group} - self._graph_inputs)
            values = dict(inputs)
            if names:
                outputs = self._session.run(names, dict(inputs), self._only_needed)
                values |= dict(zip(names, outputs, strict=True))
            for layer in group:
                self.found.layers[self.name, layer].add(values[self._inputs[layer]])


def _groups(channels: Mapping[str, int]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for layer, width in channels.items():
        if size and size + width > GROUP_CHANNELS:
            groups.append([])
            size = 0
        groups[-1].append(layer)
        size += width
    return groups


class _Sample:
    """The AR steps of a run that are looked at: one of each part of every frame, drawn from the seed."""

    def __init__(self, request: Request, bundle: Bundle, seed: int) -> None:
        rng = np.random.default_rng(seed)
        steps = len(set_sizes(bundle.config.num_tokens, request.num_inference_steps))
        ends = np.linspace(0, steps, min(STEPS_PER_FRAME, steps) + 1).round().astype(int)
        self._chosen: list[Collection[int]] = [
            {int(rng.integers(a, b)) for a, b in pairwise(ends)} for _ in range(request.max_latent_length)
        ]
        self._position = Position()

    def __call__(self, stage: str) -> bool:
        """Whether to look at this call. Calls come in the order of a run."""
        self._position.call(stage)
        if stage in ("spatial_encoder", "diffusion_head"):
            return self._position.step in self._chosen[self._position.frame]
        return True


class _Observed(Lent):
    """A stage that observers look at."""

    def __init__(self, runner: Runner, observers: Observers, chosen: Callable[[str], bool]) -> None:
        self.runner, self.observers, self.chosen = runner, observers, chosen
        self.stage = runner.stage

    def run(self, inputs: Mapping[str, Held]) -> Mapping[str, Held]:
        if self.chosen(self.stage.name):
            self.observers.look(self.stage.name, {name: np.asarray(held) for name, held in inputs.items()})
        return self.runner.run(inputs)
