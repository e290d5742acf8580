"""`nova-export sensitivity`: which layers of a stage cost the most in integers."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nova_export.bundle import Bundle
from nova_export.cli_options import counting, exporter, json_option, quiet_option, resumable
from nova_export.errors import UsageError
from nova_export.targets import PRECISIONS, TARGETS, find


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--stage", default="spatial_encoder", show_default=True, help="Whose layers to rank.")
@click.option("--precision", default="int8", show_default=True, help="One in integers.")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="What `nova-export calibrate` wrote, for int8."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write, or to go on with: .json.",
)
@quiet_option
@json_option
def sensitivity(
    bundle: Path, stage: str, precision: str, calibration: Path | None, out: Path, quiet: bool, as_json: bool
) -> None:
    """Rank the layers of a stage of the fp32 BUNDLE by what leaving each of them in float would gain.

    Two runs a layer; what is known is kept in --out, and a stopped ranking goes on. Needs the `export` extra.
    """
    preset, target = find(PRECISIONS, precision), TARGETS[0]
    if not preset.weights or not preset.is_for(stage):
        chosen = [each.name for each in PRECISIONS if each.weights and each.is_for(stage)]
        raise UsageError(
            f"{precision} is not in integers for stage {stage}; there is {', '.join(chosen) or 'none'}"
        )
    if preset.inputs and calibration is None:
        raise UsageError(
            f"--calibration FILE is missing: {precision} needs what `nova-export calibrate` writes"
        )
    quantization = exporter("nova_export.export.quantization")
    opened = Bundle.open(bundle)
    statistics = calibration and quantization.load_calibration(calibration, opened.source["parts"])
    source = quantization.FloatSource(opened, statistics)
    ranking = exporter("nova_export.export.sensitivity")
    layers = len(ranking.layer_names(source, stage))
    with resumable("layers"), counting("ranking", layers, quiet, "layers") as show:
        found = ranking.rank_layers(source, stage, preset, target, out, show)
    data = {"stage": stage, "precision": precision, "snr_db": found.snr, "without": found.without}
    click.echo(json.dumps(data) if as_json else found.table())
