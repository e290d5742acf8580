"""`nova-export plan`: what a checkpoint or bundle takes on a target, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import click

from nova_export.bundle import MANIFEST, Bundle
from nova_export.child import GB, available_memory
from nova_export.cli_options import FiniteRange, exporter, json_option
from nova_export.config import NovaConfig
from nova_export.demo import demo_checkpoint
from nova_export.stages import MAX_BATCH, MAX_FRAMES
from nova_export.targets import CPU, PRECISIONS, TARGETS, find


@click.command()
@click.argument("source", type=click.Path(path_type=Path), required=False)
@click.option("--target", default="cpu", show_default=True, help="Device, or what the bundle is to run on.")
@click.option("--precision", default="fp32", show_default=True, help="Of all stages that it is for.")
@click.option(
    "--memory", type=FiniteRange(min=0, min_open=True),
    help="GB that there are for it; if not told, of the target without its system, or free in this machine.",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(1, MAX_BATCH), default=1, show_default=True, help="Samples in one call."
)
@click.option(
    "--frames", type=click.IntRange(1, MAX_FRAMES),
    help="Latent frames; those of the checkpoint's own videos if not told.",
)  # fmt: skip
@click.option(
    "--num-inference-steps", type=click.IntRange(min=1), default=64, show_default=True, help="Of a frame."
)
@click.option(
    "--num-diffusion-steps", type=click.IntRange(min=1), default=25, show_default=True,
    help="Of an autoregressive step.",
)  # fmt: skip
@click.option("--lean-decode", is_flag=True, help="As in `nova-export build`; a bundle says it itself.")
@json_option
def plan(
    source: Path | None,
    target: str,
    precision: str,
    memory: float | None,
    batch: int,
    frames: int | None,
    num_inference_steps: int,
    num_diffusion_steps: int,
    lean_decode: bool,
    as_json: bool,
) -> None:
    """Predict what SOURCE, a checkpoint or a bundle (the demo if none), takes in memory and at least in time.

    Nothing is built and no weights are read. Needs the `export` extra.
    """
    planning = exporter("nova_export.export.plan")
    chosen, wanted = find(TARGETS, target), find(PRECISIONS, precision)  # before what takes a while
    source = source or demo_checkpoint()
    bundle = Bundle.open(source) if (source / MANIFEST).is_file() else None
    config = bundle.config if bundle else NovaConfig.from_checkpoint(source)
    video = planning.Video(
        config,
        batch,
        frames or config.video_length,
        num_inference_steps,
        num_diffusion_steps,
        lean_decode or bool(bundle and bundle.lean_decode),
        bundle.head_steps if bundle else chosen.head_steps,
    )
    costs = planning.Costs.count(video)
    there = available_memory() if memory is None and chosen == CPU else memory and int(memory * GB)
    made, others = planning.make_plan(costs, chosen, wanted, there), []
    if made.verdict == "does not fit":
        others = [(option, other.verdict) for option, other in planning.fitting(costs, chosen, there)]
    if as_json:
        click.echo(json.dumps({**made.to_dict(), "fitting": dict(others)}))
        return
    click.echo(made.table())
    if made.verdict == "does not fit":
        shown = ", ".join(f"{option} {how}" for option, how in others)
        click.echo(f"what would: {shown or 'no precision'}")
