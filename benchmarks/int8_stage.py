"""One stage of a checkpoint in fp32 and int8 on ONNX Runtime, and in eager torch bf16, turn by turn.

python benchmarks/int8_stage.py CHECKPOINT [--stage spatial_encoder] [--set rows=2] [--repeats 5]

Ranges come from the timed inputs themselves: this is about time. Prints JSON.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from calibration.collect import Observer
from calibration.statistics import Statistics
from nova_export.bundle import Bundle, StageEntry
from nova_export.cli_options import name_and_value
from nova_export.config import NovaConfig
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
        module = module.to(torch.bfloat16)
        tensors = {key: torch.from_numpy(array) for key, array in inputs.items()}
        half = {key: t.bfloat16() if t.is_floating_point() else t for key, t in tensors.items()}

        def eager() -> None:
            with torch.no_grad():
                module(**half)

        with OrtRunner(stage, whole) as fp32, OrtRunner(stage, graph) as int8:
            runs: dict[str, Run] = {
                "fp32": lambda: fp32.run(inputs),
                "int8": lambda: int8.run(inputs),
                "torch bf16": eager,
            }
            for run in runs.values():
                run()
            times = interleave(runs, Options(repeats=repeats, budget=math.inf))
        data = {path.name: path.stat().st_size for path in Path(folder).glob("*.data")}
    medians = {form: statistics.median(each) for form, each in times.items()}
    result = {
        "machine": machine(0),
        "checkpoint": checkpoint.name,
        "stage": name,
        "sizes": sizes,
        "seconds": times,
        "int8 faster than": {form: medians[form] / medians["int8"] for form in ("fp32", "torch bf16")},
        "bytes": data,
    }
    click.echo(json.dumps(result, indent=1))


def _quantize(whole: Path, graph: Path, stage: Any, config: NovaConfig, inputs: dict[str, Any]) -> None:
    entry = StageEntry(stage, whole.name, (), "fp32", None)
    bundle = Bundle(whole.parent, config, "cpu", {}, {}, {stage.name: entry}, None, {})
    found = Statistics({}, [], 0, {})
    Observer(bundle, stage.name, found).look(inputs)
    quantize_stage(FloatSource(bundle, found), stage.name, graph, find(PRECISIONS, "int8"), TARGETS[0])


if __name__ == "__main__":
    main()
