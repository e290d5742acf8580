"""An exported graph in another precision: which nodes cannot have it, the passes, and the gate."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from nova_export.errors import ExportError
from nova_export.evaluation.difference import HALF_MAX, Difference, finite
from nova_export.export.passes.half import sums, to_half
from nova_export.export.passes.widen import widen
from nova_export.export.verify import Case, check_kind
from nova_export.export.watch import Ranges
from nova_export.runtime.runner import Runner
from nova_export.spec import Stage
from nova_export.targets import CPU, Precision, Target, float_inputs

HEADROOM = 4.0  # values may be this much larger than those that were seen
TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
LARGEST = {"float16": HALF_MAX, "bfloat16": math.inf}  # bfloat16 has float32's range


@dataclass(frozen=True)
class TooLarge:
    """A value that the precision's range cannot hold, and the largest number seen in it."""

    value: str
    largest: float


def change_precision(
    stage: Stage,
    graph: Path,
    precision: Precision,
    target: Target,
    cases: list[Case],
    seen: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Rewrite an exported float32 graph, and its weights beside it, in another precision.

    What overflows is known from the values that the inputs of `cases` lead to, and from `seen`: the largest
    magnitude of every value in a calibration. Returns what the manifest keeps: the values that are too large
    for the precision, where that is known from, and how many nodes stay in float32. Raises ExportError where
    the calibration lacks a value.
    """
    assert precision.half is not None
    half = TYPES[precision.half]
    model = ir.load(graph)
    ShapeInferencePass()(model)  # gives every value a type; the exporter leaves some out
    too_large = list(_too_large(stage, model, graph, LARGEST[precision.half] / HEADROOM, cases, seen or {}))
    names = {each.value for each in too_large}
    touching = {
        str(node.name)
        for node in model.graph.all_nodes()
        if any(value is not None and value.name in names for value in (*node.inputs, *node.outputs))
    }
    in_float = touching | sums(model) if precision.float_sums else touching
    kept = to_half(model, half, float_inputs(stage), in_float)
    if precision.half not in target.kernels:
        widen(model)
    _replace(model, graph)
    return {
        "too_large": [{"value": each.value, "largest": each.largest} for each in too_large],
        "ranges": "calibration" if seen else "random inputs",
        "float_nodes": len(kept),
    }


def runnable_here(graph: Path, precision: Precision, target: Target, folder: Path) -> Path:
    """The graph, or one in `folder` that computes the same on a CPU, which lacks kernels of the target's."""
    if precision.half is None or precision.half in CPU.kernels or precision.half not in target.kernels:
        return graph
    model = ir.load(graph)
    ShapeInferencePass()(model)
    widen(model)
    ir.save(model, folder / graph.name, external_data=f"{graph.name}.data")
    return folder / graph.name


def check_gate(stage: Stage, runner: Runner, cases: list[Case], precision: Precision) -> dict[str, Any]:
    """Compare with the float32 reference. Raises ExportError below the precision's gate."""
    found = {tensor.name: Difference() for tensor in stage.outputs}
    for _, inputs, expected in cases:
        outputs = runner.run(inputs)
        for name, reference in expected.items():
            actual = np.asarray(outputs[name])
            check_kind(stage, name, actual, reference)
            found[name].add(reference, actual)
    verdict = judge(found, precision)
    if verdict.lost:
        raise ExportError(
            f"stage {stage.name}: {verdict.lost}. Keep the stage higher with --stage {stage.name}=fp32"
        )
    return verdict.to_dict()


@dataclass(frozen=True)
class Verdict:
    """The worst tensor of a stage, its SNR in dB, and what is wrong with it; empty where it passes."""

    tensor: str
    snr: float
    lost: str

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"tensor": self.tensor, "snr_db": finite(self.snr)}


def judge(found: Mapping[str, Difference], precision: Precision) -> Verdict:
    """The gate: every output of a stage must be finite, and near enough to float32."""
    assert precision.least_snr is not None
    worst = min(found, key=lambda name: (-found[name].not_finite, found[name].snr))
    difference, lost = found[worst], ""
    if difference.not_finite:
        lost = f"{difference.not_finite} of {difference.count} numbers are not finite"
    elif difference.snr < precision.least_snr:
        lost = f"it has an SNR of {difference.snr:.1f} dB, and the gate is {precision.least_snr:.0f} dB"
    return Verdict(worst, difference.snr, lost and f"{worst} is not good enough in {precision.name}: {lost}")


def _too_large(
    stage: Stage, model: ir.Model, graph: Path, limit: float, cases: list[Case], seen: Mapping[str, float]
) -> Iterator[TooLarge]:
    """Weights, inputs and values of the main graph that hold larger numbers than `limit`."""
    if limit == math.inf:
        return
    for name, value in model.graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            largest = float(np.abs(value.const_value.numpy()).max(initial=0))
            if largest > limit:
                yield TooLarge(name, largest)
    for name, largest in _ranges(stage, model, graph, cases, seen).items():
        if not largest <= limit:
            yield TooLarge(name, largest)


def _ranges(
    stage: Stage, model: ir.Model, graph: Path, cases: list[Case], seen: Mapping[str, float]
) -> dict[str, float]:
    """Largest magnitude of every float value of the main graph, inputs too, over all cases and as seen."""
    ranges = Ranges(model, graph.parent)
    inputs: dict[str, float] = {}
    for _, arrays, _ in cases:
        ranges.look(arrays)
        for name, array in arrays.items():
            if array.dtype == np.float32:
                inputs[name] = max(inputs.get(name, 0.0), float(np.abs(array).max(initial=0)))
    if seen and (unknown := ranges.largest.keys() - seen.keys()):
        raise ExportError(f"stage {stage.name}: the calibration has no value {min(unknown)}; calibrate again")
    return inputs | {name: max(value, seen.get(name, 0.0)) for name, value in ranges.largest.items()}


def _replace(model: ir.Model, graph: Path) -> None:
    """Write the model in the place of the graph that its weights are still read from."""
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        new = Path(folder) / graph.name
        ir.save(model, new, external_data=f"{graph.name}.data")
        for path in Path(folder).iterdir():
            shutil.move(path, graph.with_name(path.name))
