"""What each way to find the ranges of int8 inputs buys: SNR of the encoders on real runs.

python benchmarks/int8_methods.py BUNDLE CALIBRATION.npz

BUNDLE is in fp32, CALIBRATION what `nova-export calibrate` wrote of it. Every layer gets its range by one
method alone, without smoothing and with it; then by the least expected error among them, as `build` does.
All forms are judged in one pass of the loops, that of the gate. Prints a table, then JSON.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.ranges import SHRINKS, STEPS, Range, candidates, smoothing
from calibration.statistics import LayerInput
from nova_export.bundle import Bundle
from nova_export.export.passes.quantize import InputFormat, WeightFormat, quantize
from nova_export.export.quantization import (
    FloatSource,
    compare_on_runs,
    format_of,
    load_calibration,
    quantized_layers,
)
from nova_export.tables import markdown
from nova_export.targets import ENCODERS

Choice = Callable[[LayerInput], Range]
CHOSEN = "least expected error"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("calibration", type=click.Path(path_type=Path))
def main(bundle: Path, calibration: Path) -> None:
    """Compare the methods on the encoders of BUNDLE."""
    opened = Bundle.open(bundle)
    source = FloatSource(opened, load_calibration(calibration, opened.source["parts"]))
    chosen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for stage in (name for name in ENCODERS if name in opened.stages):
            for method, choice in CHOICES.items():
                for smooth in (False, True):
                    form = f"{method}{', smoothed' if smooth else ''}"
                    graphs[stage, form] = Path(folder) / form.replace(" ", "_") / f"{stage}.onnx"
                    graphs[stage, form].parent.mkdir(exist_ok=True)
                    made = write_graph(source, stage, graphs[stage, form], choice, smooth)
                    if method == CHOSEN:
                        chosen.update(f"{form}: {each}" for each in made)
        found = compare_on_runs(source, graphs)
    snr = {form: min(each.snr for each in outputs.values()) for form, outputs in found.items()}
    stages = list(dict.fromkeys(stage for stage, _ in snr))
    forms = list(dict.fromkeys(form for _, form in snr))
    rows = [(form, *(f"{snr[stage, form]:.1f}" for stage in stages)) for form in forms]
    click.echo(markdown(("ranges", *stages), rows))
    data = {form: {stage: snr[stage, form] for stage in stages} for form in forms}
    click.echo(json.dumps({"bundle": bundle.name, "snr_db": data, "layers": chosen}, indent=1))


def write_graph(source: FloatSource, stage: str, graph: Path, choice: Choice, smooth: bool) -> list[str]:
    """A stage in int8 with these ranges; the method that each layer got."""
    assert source.statistics is not None
    seen = source.statistics.layers_of(stage)
    model = ir.load(source.bundle.path(source.bundle.stages[stage].graph))
    inputs: dict[str, InputFormat] = {}
    methods = []
    for name, layer in quantized_layers(model).items():
        range_, factors = choice(seen[name]), None
        if smooth and (found := smoothing(seen[name], layer.matrix(), range_, symmetric=False)):
            factors, range_ = found
        inputs[name] = format_of(range_, False, factors)
        methods.append(range_.method)
    quantize(model, dict.fromkeys(inputs, WeightFormat("int8")), inputs)
    ir.save(model, graph, external_data=f"{graph.name}.data")
    return methods


def by_error(*methods: str) -> Choice:
    """Of the candidates by these methods, or of all, the one with the least expected squared error."""

    def choice(seen: LayerInput) -> Range:
        ranges = [each for each in candidates(seen, False) if each.method in methods or not methods]
        return min(ranges, key=lambda each: each.error)

    return choice


def by_entropy(seen: LayerInput) -> Range:
    """The part of min-max in which the integers keep most of the distribution (Kullback-Leibler)."""
    ranges = [each for each in candidates(seen, False) if each.method in ("min-max", "mse")]
    assert len(ranges) == len(SHRINKS)
    return min(ranges, key=lambda each: divergence(seen, each))


def divergence(seen: LayerInput, range_: Range) -> float:
    """Of the values, cut to a range, from what its steps leave of them: within a step all count alike."""
    inside = (seen.centres >= range_.low) & (seen.centres <= range_.high)
    kept = seen.counts[inside].astype(np.float64)
    cut = kept.copy()  # what lies outside comes to the ends
    cut[0] += seen.counts[seen.centres < range_.low].sum()
    cut[-1] += seen.counts[seen.centres > range_.high].sum()
    steps = ((seen.centres[inside] - range_.low) / range_.step).astype(int).clip(max=STEPS - 1)
    filled = kept > 0
    share = np.bincount(steps, kept, STEPS) / np.bincount(steps, filled, STEPS).clip(min=1)
    return relative_entropy(cut, np.where(filled, share[steps], 0.0))


def relative_entropy(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """sum p log(p / q) of two histograms; bins that only p has count as nearly empty ones of q."""
    p, q = p / p.sum(), (q / q.sum()).clip(min=1e-12)
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


CHOICES: dict[str, Choice] = {
    "min-max": by_error("min-max"),
    "percentile 99.9": by_error("percentile 99.9"),
    "percentile 99.99": by_error("percentile 99.99"),
    "percentile 99.999": by_error("percentile 99.999"),
    "mse": by_error("min-max", "mse"),
    "entropy": by_entropy,
    CHOSEN: by_error(),
}

if __name__ == "__main__":
    main()
