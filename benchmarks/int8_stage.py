"""One stage of a checkpoint in fp32 and int8 on ONNX Runtime, and in eager torch bf16, turn by turn.

python benchmarks/int8_stage.py CHECKPOINT [--stage spatial_encoder] [--set rows=2] [--repeats 5]

int8 is ours, with ranges known beforehand; the same in operators of the standard alone; and dynamic: every
layer finds the range of its input anew. Our ranges come from the timed inputs: this is about time. Prints
JSON, with the SNR in dB of each against fp32, and the seconds that each kind of operator takes. --work FOLDER
keeps the graphs and takes those that are there.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.tape import Tape

from calibration import collect
from calibration.statistics import Statistics
from nova_export.bundle import Bundle, StageEntry
from nova_export.cli_options import name_and_value
from nova_export.config import NovaConfig
from nova_export.evaluation.difference import Difference
from nova_export.export.bench import Options, Run, interleave, machine
from nova_export.export.contenders import stage_sizes
from nova_export.export.onnx_export import export_onnx
from nova_export.export.passes.multi_head import to_multi_head
from nova_export.export.passes.quantize import Linear
from nova_export.export.quantization import FloatSource, quantize_stage, quantized_layers
from nova_export.export.verify import sample_inputs
from nova_export.runtime.runner import OrtRunner
from nova_export.stages import stages
from nova_export.targets import CPU, PRECISIONS, find
from reference_model.checkpoint import load_module

FORMS = ("fp32", "int8", "int8 standard operators", "int8 dynamic")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--stage", "name", default="spatial_encoder")
@click.option("--set", "wanted", multiple=True, metavar="AXIS=SIZE", callback=name_and_value)
@click.option("--repeats", default=5)
@click.option("--work", type=click.Path(path_type=Path, file_okay=False, exists=True))
def main(checkpoint: Path, name: str, wanted: dict[str, str], repeats: int, work: Path | None) -> None:
    """Time a stage of CHECKPOINT in several forms."""
    config = NovaConfig.from_checkpoint(checkpoint)
    stage = stages(config)[name]
    sizes = stage_sizes(stage, {axis: int(size) for axis, size in wanted.items()})
    inputs = sample_inputs(stage, config, sizes, seed=0)
    module = load_module(stage, config, checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        graphs = {form: folder / f"{form.replace(' ', '_')}.onnx" for form in FORMS}
        if not graphs["fp32"].exists():
            export_onnx(stage, module, graphs["fp32"])
        if not all(path.exists() for path in graphs.values()):
            _quantize(graphs, stage, config, inputs)
            dynamic(graphs["fp32"], graphs["int8 dynamic"])
        module = module.to(torch.bfloat16)
        tensors = {key: torch.from_numpy(array) for key, array in inputs.items()}
        half = {key: t.bfloat16() if t.is_floating_point() else t for key, t in tensors.items()}

        def eager() -> None:
            with torch.no_grad():
                module(**half)

        with ExitStack() as stack:
            ours = {form: stack.enter_context(OrtRunner(stage, path)) for form, path in graphs.items()}
            runs: dict[str, Run] = {form: partial(runner.run, inputs) for form, runner in ours.items()}
            runs["torch bf16"] = eager
            [expected, *made] = ({form: runner.run(inputs) for form, runner in ours.items()}).values()
            eager()
            times = interleave(runs, Options(repeats=repeats, budget=math.inf))
        snr = {form: _snr(expected, each) for form, each in zip(list(graphs)[1:], made, strict=True)}
        parts = {form: _parts(path, inputs) for form, path in graphs.items()}
        data = {path.name: path.stat().st_size for path in folder.glob("*.data")}
    medians = {form: statistics.median(each) for form, each in times.items()}
    result = {
        "machine": machine(0),
        "checkpoint": checkpoint.name,
        "stage": name,
        "sizes": sizes,
        "seconds": times,
        "int8 faster than": {form: medians[form] / medians["int8"] for form in times if form != "int8"},
        "snr_db": snr,
        "seconds of": parts,
        "bytes": data,
    }
    click.echo(json.dumps(result, indent=1))


def _quantize(graphs: dict[str, Path], stage: Any, config: NovaConfig, inputs: dict[str, Any]) -> None:
    """Our forms, with ranges of these inputs."""
    whole = graphs["fp32"]
    entry = StageEntry(stage, whole.name, (), "fp32", None)
    bundle = Bundle(whole.parent, config, "cpu", {}, {}, {stage.name: entry}, None, {})
    found = Statistics({}, [], 0, {})
    collect.GROUP_CHANNELS = 1 << 20  # all layers in one call: some GB, but one run instead of sixteen
    collect.LayerObserver(ir.load(whole), whole.parent, stage.name, found).look(inputs)
    for form, own in (("int8", True), ("int8 standard operators", False)):
        target = replace(CPU, ort_operators=own)
        quantize_stage(FloatSource(bundle, found), stage.name, graphs[form], find(PRECISIONS, "int8"), target)


def dynamic(whole: Path, graph: Path) -> None:
    """Every product of the quantized layers as one of integers whose inputs' range is found as it runs."""
    model = ir.load(whole)
    tape = Tape()
    narrow: dict[ir.Value, Sequence[ir.Value]] = {}  # integers, scale and zero of a layer's input
    for layer in quantized_layers(model).values():
        node, old, before = layer.node, layer.node.outputs[0], len(tape.nodes)
        if node.op_type != "MatMul" or (value := node.inputs[0]) is None:
            continue
        if value not in narrow:
            narrow[value] = tape.op_multi_out("DynamicQuantizeLinear", [value], num_outputs=3)
        integers, scale, zero = narrow[value]
        scales = np.abs(layer.matrix()).max(0).clip(min=1e-12) / 127
        weight = tape.initializer(
            ir.LazyTensor(
                partial(_rounded, layer, scales),
                dtype=ir.DataType.INT8,
                shape=ir.Shape(layer.shape),
                name=f"{node.name}_weight",
            )
        )
        own = tape.initializer(ir.Tensor(scales, name=f"{node.name}_scale"))
        product = tape.op("Cast", [tape.op("MatMulInteger", [integers, weight, zero])], {"to": 1})
        new = tape.op("Mul", [product, tape.op("Mul", [scale, own])])  # the order that ONNX Runtime joins
        model.graph.insert_before(node, tape.nodes[before:])
        old.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
        if not layer.weight.uses():
            model.graph.initializers.pop(str(layer.weight.name))
    for constant in tape.initializers:
        model.graph.register_initializer(constant)
    to_multi_head(model)
    ir.save(model, graph, external_data=f"{graph.name}.data")


def _rounded(layer: Linear, scales: Any) -> ir.Tensor:
    return ir.Tensor(np.rint(layer.matrix() / scales).astype(np.int8))


def _snr(expected: dict[str, Any], made: dict[str, Any]) -> float:
    found = Difference()
    for name, reference in expected.items():
        found.add(reference, made[name])
    return found.snr


def _parts(graph: Path, inputs: dict[str, Any]) -> dict[str, float]:
    """Seconds that each kind of operator takes in one run, the largest first; those under 1 % left out."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(graph.with_suffix(""))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    session.run(None, inputs)  # the second run counts
    session.run(None, inputs)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [each for each in events if each.get("cat") == "Node" and each["name"].endswith("_kernel_time")]
    parts: Counter[str] = Counter()
    for event in kernels[len(kernels) // 2 :]:
        parts[event["args"]["op_name"]] += event["dur"] / 1e6
    return {name: seconds for name, seconds in parts.most_common() if seconds > 0.01 * parts.total()}


if __name__ == "__main__":
    main()
