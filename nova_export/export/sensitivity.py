"""Which layers of a stage cost the most in integers: what leaving each of them in float gains, measured.

Takes two runs a layer. What is known is kept after every layer, and a stopped ranking goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nova_export.bundle import sha256
from nova_export.errors import InputError
from nova_export.export.precision import judge
from nova_export.export.quantization import FloatSource, compare_on_runs, quantize_stage, quantized_layers
from nova_export.runtime.media import write_whole
from nova_export.targets import Precision, Target

Report = Callable[[int], object]  # layers done


@dataclass(frozen=True)
class Ranking:
    """snr: of the stage with all its layers in integers, in dB against fp32. without: by layer, what it is
    with that one in float."""

    stage: str
    precision: str
    snr: float
    without: dict[str, float]

    @property
    def costliest(self) -> list[str]:
        """Layers, those that gain the most first."""
        return sorted(self.without, key=lambda layer: -self.without[layer])

    def table(self) -> str:
        """For a person."""
        from nova_export.tables import markdown

        rows = [
            (layer, f"{self.without[layer]:.1f}", f"{self.without[layer] - self.snr:+.2f}")
            for layer in self.costliest
        ]
        head = ("left in float", "SNR dB", "gain")
        return f"{self.stage} in {self.precision}: {self.snr:.1f} dB\n" + markdown(head, rows)


def rank_layers(
    source: FloatSource,
    name: str,
    precision: Precision,
    target: Target,
    kept: Path,
    report: Report = lambda done: None,
) -> Ranking:
    """Rank the layers of a stage; `kept` is the .json that it is written to, layer by layer.

    Raises InputError where `kept` holds another ranking.
    """
    origin = _origin(source, name, precision, target)
    found: dict[str, float] = _read(kept, origin)
    graph = source.bundle.path(source.bundle.stages[name].graph)
    layers = ["", *layer_names(source, name)]  # "": none is left in float
    for done, layer in enumerate(layers):
        if layer not in found:
            with tempfile.TemporaryDirectory() as folder:
                changed = Path(folder) / graph.name
                quantize_stage(source, name, changed, precision, target, [layer] if layer else [])
                [differences] = compare_on_runs(source, {(name, layer): changed}).values()
            snr = judge(differences, precision).snr
            found[layer] = snr if math.isfinite(snr) else math.copysign(1e3, snr)
            _write(kept, {"origin": origin, "snr_db": found})
        report(done)
    return Ranking(name, precision.name, found[""], {layer: found[layer] for layer in layers[1:]})


def spared_layers(
    source: FloatSource,
    name: str,
    precision: Precision,
    target: Target,
    folder: Path,
    report: Callable[[str], object],
) -> Iterator[list[str]]:
    """More and more of a stage's layers to leave in float, the costliest first: 1, 2, 4, up to half of them.

    folder: where the ranking is kept. report: told what is being done.
    """
    folder.mkdir(exist_ok=True)
    kept = folder / f"{_origin(source, name, precision, target)}.json"
    total = len(layer_names(source, name))
    ranking = rank_layers(
        source, name, precision, target, kept, lambda done: report(f"ranking layers, {done} of {total}")
    )
    count = 1
    while count <= total // 2:
        yield ranking.costliest[:count]
        count *= 2


def layer_names(source: FloatSource, name: str) -> list[str]:
    """The layers of a stage that integers are for."""
    return [*quantized_layers(ir.load(source.bundle.path(source.bundle.stages[name].graph)))]


def _origin(source: FloatSource, name: str, precision: Precision, target: Target) -> str:
    entry = source.bundle.stages[name]
    facts: list[Any] = [name, asdict(precision), asdict(target)]
    facts += [sha256(source.bundle.path(path)) for path in entry.files]
    facts.append(source.statistics.digest() if source.statistics else None)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _read(path: Path, origin: str) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["origin"] == origin:
            return {str(layer): float(snr) for layer, snr in data["snr_db"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(
        f"{path}: holds no ranking of this stage, precision and calibration; give another --out, or remove it"
    )


def _write(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=1)
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
