"""Stages in integers: made from the float32 bundle of the same checkpoint, judged by its runs.

Random inputs would say nothing here: the ranges of 8 bits are those of real runs, and so is the gate.
"""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration import default_prompts
from calibration.collect import calibrate
from calibration.ranges import Range, best_range, smoothing
from calibration.statistics import LayerInput, Statistics
from nova_export.bundle import Bundle
from nova_export.demo import cache_file
from nova_export.errors import ExportError, InputError, OutputError, UsageError
from nova_export.evaluation.difference import Difference
from nova_export.evaluation.lockstep import Lockstep
from nova_export.export.passes.integer_products import to_integer_products
from nova_export.export.passes.multi_head import to_multi_head
from nova_export.export.passes.quantize import (
    Floats,
    InputFormat,
    Linear,
    WeightFormat,
    linear_layers,
    quantize,
)
from nova_export.runtime.generate import StageGetter
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.runner import OrtRunner
from nova_export.runtime.stage_runners import StageRunners
from nova_export.targets import LEAST_CHANNELS, Precision, Target

CALIBRATION_PROMPTS, CALIBRATION_SEED = 16, 10_000
GATE_PROMPTS, GATE_SEED = 2, 20_000
ALL_STEPS = 255  # of an integer of 8 bits

FormName = tuple[str, str]  # a stage, and what tells this form of it from others


@dataclass(frozen=True)
class FloatSource:
    """The float32 bundle, and what its layers see, where a precision needs to know."""

    bundle: Bundle
    statistics: Statistics | None

    @classmethod
    def open(cls, folder: Path, statistics: Statistics | None, wanted: bool, kept: Path) -> FloatSource:
        """wanted: whether statistics are; if there are none, by calibrating, kept in `kept` until it is done.

        What was found in the same graphs before is in the cache, and taken from there.
        """
        bundle = Bundle.open(folder)
        if not wanted or statistics:
            return cls(bundle, statistics)
        prompts = default_prompts(bundle.config, CALIBRATION_PROMPTS)
        cached = calibration_file(bundle, prompts)
        with suppress(InputError):  # there is none, or it is damaged
            return cls(bundle, load_calibration(cached, bundle.source["parts"]))
        with _own_prompts():
            found = calibrate(bundle, prompts, CALIBRATION_SEED, kept)
        with suppress(OSError, OutputError):  # where it cannot be kept, the next build calibrates again
            cached.parent.mkdir(parents=True, exist_ok=True)
            found.save(cached)
        return cls(bundle, found)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Of `Request`: those of the calibration, which may be shorter than a user's runs."""
        length = {"max_latent_length": self.bundle.config.video_length}
        return self.statistics.arguments if self.statistics else length


def calibration_file(bundle: Bundle, prompts: Sequence[str | int]) -> Path:
    """Where `build` keeps the calibration of a float32 bundle: named by its graphs, weights and prompts."""
    files = {path: bundle.files[path].sha256 for stage in bundle.stages.values() for path in stage.files}
    made_of = json.dumps([files, list(prompts), CALIBRATION_SEED], sort_keys=True)
    return cache_file("calibrations", made_of, ".npz")


def load_calibration(path: Path, parts: Mapping[str, str]) -> Statistics:
    """A finished calibration of the checkpoint whose parts have these digests. Raises InputError."""
    statistics = Statistics.load(path)
    if statistics.source != parts:
        raise InputError(f"{path}: is of another checkpoint; `nova-export calibrate` makes one")
    if statistics.done < len(statistics.prompts):
        raise InputError(
            f"{path}: was stopped at prompt {statistics.done} of {len(statistics.prompts)}; run the same "
            "`nova-export calibrate` again, which goes on from there"
        )
    return statistics


def quantize_stage(
    source: FloatSource,
    name: str,
    graph: Path,
    precision: Precision,
    target: Target,
    float_layers: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a stage's graph with its linear layers in integers, in the operators that the target has fastest.

    float_layers: patterns of the names of layers that stay in float. Returns what the manifest keeps of how.
    Raises ExportError where the calibration knows nothing of a layer, UsageError where a pattern has none.
    """
    model = ir.load(source.bundle.path(source.bundle.stages[name].graph))
    assert precision.weights is not None
    seen = source.statistics.layers_of(name) if source.statistics else {}
    weights: dict[str, WeightFormat] = {}
    inputs: dict[str, InputFormat] = {}
    methods: dict[str, str] = {}
    layers = quantized_layers(model)
    for pattern in float_layers:
        if not fnmatch.filter(layers, pattern):
            raise UsageError(f"stage {name} has no layer {pattern!r}; it has {', '.join(sorted(layers))}")
    for layer, linear in layers.items():
        if any(fnmatch.fnmatchcase(layer, each) for each in float_layers):
            continue
        weights[layer] = WeightFormat(precision.weights, precision.block)
        if precision.inputs:
            if layer not in seen:
                raise ExportError(f"stage {name}: the calibration has no layer {layer}; calibrate again")
            inputs[layer], methods[layer] = input_format(seen[layer], linear.matrix(), target.signed_inputs)
    quantize(model, weights, inputs)
    if target.ort_operators:
        to_multi_head(model)
        to_integer_products(model)
    ir.save(model, graph, external_data=f"{graph.name}.data")
    return {"layers": len(weights), "input_ranges": methods}


def quantized_layers(model: ir.Model) -> dict[str, Linear]:
    """The linear layers that integers are for, by name."""
    return {
        name: linear for name, linear in linear_layers(model).items() if min(linear.shape) >= LEAST_CHANNELS
    }


def input_format(seen: LayerInput, weight: Floats, signed: bool) -> tuple[InputFormat, str]:
    """The format of a layer's input, and the method that gave its range. weight (inputs, outputs)."""
    best = best_range(seen, symmetric=signed)
    if smoothed := smoothing(seen, weight, best, symmetric=signed):
        factors, best = smoothed
        return format_of(best, signed, factors), best.method
    return format_of(best, signed), best.method


def format_of(range_: Range, signed: bool, factors: Floats | None = None) -> InputFormat:
    """A range in integers of 8 bits; factors divide the input before."""
    zero = 0 if signed else round(-range_.low / range_.step)
    return InputFormat(range_.step, min(max(zero, 0), ALL_STEPS), signed, factors)


def compare_on_runs(
    source: FloatSource, graphs: Mapping[FormName, Path]
) -> dict[FormName, dict[str, Difference]]:
    """Of each graph, by output: how far it is from float32, on the inputs of its runs.

    One pass of the loops for all, also where there are several of one stage.
    """
    bundle = source.bundle
    with ExitStack() as stack:
        runners = StageRunners(bundle, "cpu")
        stack.callback(runners.close)
        stage: StageGetter = runners
        locksteps = {}
        for form, path in graphs.items():
            name = form[0]
            tested = stack.enter_context(OrtRunner(bundle.stages[name].spec, path))
            locksteps[form] = Lockstep(stage, {name: tested}.__getitem__)
            stage = _one_tested(name, locksteps[form], stage)
        pipeline = Pipeline.over(bundle, stage)
        with _own_prompts():
            for index, prompt in enumerate(default_prompts(bundle.config, GATE_PROMPTS)):
                pipeline(prompt, **{**source.arguments, "seed": GATE_SEED + index})
    return {
        form: {tensor: difference for (_, tensor), difference in lockstep.tensors.items()}
        for form, lockstep in locksteps.items()
    }


def _one_tested(name: str, lockstep: Lockstep, others: StageGetter) -> StageGetter:
    """Stages of which one is tested, by a lockstep whose reference they are."""
    return lambda asked: lockstep(asked) if asked == name else others(asked)


@contextmanager
def _own_prompts() -> Iterator[None]:
    """That a prompt is cut is no news to a user who did not give it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
