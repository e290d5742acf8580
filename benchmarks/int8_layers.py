"""Single linear layers in fp32 and int8, turn by turn: with ranges known beforehand, or found as they run.

python benchmarks/int8_layers.py [--width 1024] [--rows 2 --rows 256 --rows 2048] [--repeats 15]

The four kinds of layers of a transformer block on ONNX Runtime, with that many tokens a call. static: of
standard operators; built: as `build` has it on CPUs. Prints JSON: medians in milliseconds, and the SNR
against fp32.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import torch
from int8_stage import dynamic

from calibration.statistics import LayerInput
from nova_export.evaluation.difference import Difference
from nova_export.export.bench import Options, interleave, machine
from nova_export.export.onnx_export import export_onnx
from nova_export.export.passes.integer_products import to_integer_products
from nova_export.export.passes.quantize import WeightFormat, linear_layers, quantize
from nova_export.export.quantization import input_format
from nova_export.runtime.runner import OrtRunner
from nova_export.spec import Axis, Stage, Tensor

FORMS = ("fp32", "static", "built", "dynamic")
KINDS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # inputs and outputs, in widths


class Layer(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layer(x)
        return made


@click.command()
@click.option("--width", default=1024)
@click.option("--rows", default=(2, 256, 2048), multiple=True)
@click.option("--repeats", default=15)
def main(width: int, rows: tuple[int, ...], repeats: int) -> None:
    """Time linear layers of WIDTH channels."""
    measured = [
        {"layer": kind, "rows": count, **_measured(width * inputs, width * outputs, count, repeats)}
        for kind, (inputs, outputs) in KINDS.items()
        for count in rows
    ]
    click.echo(json.dumps({"machine": machine(0), "width": width, "layers": measured}, indent=1))


def _measured(inputs: int, outputs: int, rows: int, repeats: int) -> dict[str, Any]:
    stage = Stage(
        name="layer",
        module="",
        part="",
        prefixes=(),
        phase="",
        inputs=(Tensor("x", "float32", (1, "rows", inputs)),),
        outputs=(Tensor("y", "float32", (1, "rows", outputs)),),
        axes=(Axis("rows", 1, 2, 1 << 16),),
    )
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((1, rows, inputs), np.float32)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        graphs = {form: Path(temporary) / f"{form}.onnx" for form in FORMS}
        export_onnx(stage, Layer(inputs, outputs).eval(), graphs["fp32"])
        _static(graphs["fp32"], graphs["static"], x)
        model = ir.load(graphs["static"])
        to_integer_products(model)
        ir.save(model, graphs["built"], external_data="built.onnx.data")
        dynamic(graphs["fp32"], graphs["dynamic"])
        runners = {form: stack.enter_context(OrtRunner(stage, path)) for form, path in graphs.items()}
        made = {form: runner.run({"x": x})["y"] for form, runner in runners.items()}
        runs = {form: partial(runner.run, {"x": x}) for form, runner in runners.items()}
        times = interleave(runs, Options(repeats=repeats, budget=math.inf))
    difference = {form: Difference() for form in FORMS[1:]}
    for form, found in difference.items():
        found.add(made["fp32"], made[form])
    return {
        "ms": {form: round(1000 * statistics.median(each), 3) for form, each in times.items()},
        "snr_db": {form: round(found.snr, 1) for form, found in difference.items()},
    }


def _static(whole: Path, graph: Path, x: np.ndarray) -> None:
    """In standard operators, with ranges of this input."""
    model = ir.load(whole)
    [(name, layer)] = linear_layers(model).items()
    seen = LayerInput(layer.shape[0])
    seen.add(x)
    given, _ = input_format(seen, layer.matrix(), signed=False)
    quantize(model, {name: WeightFormat("int8")}, {name: given})
    ir.save(model, graph, external_data=f"{graph.name}.data")


if __name__ == "__main__":
    main()
