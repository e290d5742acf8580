"""One stage of a checkpoint in fp32 and int8 on ONNX Runtime, and in eager torch bf16, turn by turn.

python benchmarks/int8_stage.py CHECKPOINT [--stage spatial_encoder] [--set rows=2] [--repeats 5]

int8 is ours, with ranges known beforehand, and dynamic, as ONNX Runtime's quantizer makes it: every layer
finds the range of its input anew. Our ranges come from the timed inputs: this is about time. Prints JSON,
with the SNR in dB of each against fp32, and the seconds that each kind of operator takes.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic

from calibration.collect import LayerObserver
from calibration.statistics import Statistics
from nova_export.bundle import Bundle, StageEntry
from nova_export.cli_options import name_and_value
from nova_export.config import NovaConfig
from nova_export.evaluation.difference import Difference
from nova_export.export.bench import Options, Run, interleave, machine
from nova_export.export.contenders import stage_sizes
from nova_export.export.onnx_export import export_onnx
from nova_export.export.quantization import FloatSource, quantize_stage
from nova_export.export.verify import sample_inputs
from nova_export.runtime.runner import OrtRunner
from nova_export.stages import stages
from nova_export.targets import PRECISIONS, TARGETS, find
from reference_model.checkpoint import load_module


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--stage", "name", default="spatial_encoder")
@click.option("--set", "wanted", multiple=True, metavar="AXIS=SIZE", callback=name_and_value)
@click.option("--repeats", default=5)
def main(checkpoint: Path, name: str, wanted: dict[str, str], repeats: int) -> None:
    """Time a stage of CHECKPOINT in three forms."""
    config = NovaConfig.from_checkpoint(checkpoint)
    stage = stages(config)[name]
    sizes = stage_sizes(stage, {axis: int(size) for axis, size in wanted.items()})
    inputs = sample_inputs(stage, config, sizes, seed=0)
    module = load_module(stage, config, checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / f"{name}.onnx"
        whole = graph.with_name("fp32.onnx")
        export_onnx(stage, module, whole)
        _quantize(whole, graph, stage, config, inputs)
        dynamic = graph.with_name("dynamic.onnx")
        # Left to itself it takes ONNX's Attention for its own operator of that name.
        products = {"op_types_to_quantize": ["MatMul"], "per_channel": True}
        quantize_dynamic(whole, dynamic, use_external_data_format=True, **products)
        module = module.to(torch.bfloat16)
        tensors = {key: torch.from_numpy(array) for key, array in inputs.items()}
        half = {key: t.bfloat16() if t.is_floating_point() else t for key, t in tensors.items()}

        def eager() -> None:
            with torch.no_grad():
                module(**half)

        with ExitStack() as stack:
            graphs = {"fp32": whole, "int8": graph, "int8 dynamic": dynamic}
            ours = {form: stack.enter_context(OrtRunner(stage, path)) for form, path in graphs.items()}
            runs: dict[str, Run] = {form: partial(runner.run, inputs) for form, runner in ours.items()}
            runs["torch bf16"] = eager
            [expected, *made] = ({form: runner.run(inputs) for form, runner in ours.items()}).values()
            eager()
            times = interleave(runs, Options(repeats=repeats, budget=math.inf))
        snr = {form: _snr(expected, each) for form, each in zip(list(graphs)[1:], made, strict=True)}
        parts = {form: _parts(path, inputs) for form, path in graphs.items()}
        data = {path.name: path.stat().st_size for path in Path(folder).glob("*.data")}
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


def _quantize(whole: Path, graph: Path, stage: Any, config: NovaConfig, inputs: dict[str, Any]) -> None:
    entry = StageEntry(stage, whole.name, (), "fp32", None)
    bundle = Bundle(whole.parent, config, "cpu", {}, {}, {stage.name: entry}, None, {})
    found = Statistics({}, [], 0, {})
    LayerObserver(ir.load(whole), whole.parent, stage.name, found).look(inputs)
    quantize_stage(FloatSource(bundle, found), stage.name, graph, find(PRECISIONS, "int8"), TARGETS[0])


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
