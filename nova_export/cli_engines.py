"""`nova-export engines`: compiles the stages of a bundle for a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from nova_export.bundle import Bundle
from nova_export.cli_options import json_option, quiet_option, resumable
from nova_export.engine.compiler import KEPT, WEIGHTS
from nova_export.inspect import describe_engine, engine_table
from nova_export.stages import MAX_BATCH, MAX_FRAMES, Limits


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", help="What to compile for; the target of the bundle if not told.")
@click.option(
    "--batch", type=click.IntRange(1, MAX_BATCH), default=1, show_default=True,
    help="The most samples in one call.",
)  # fmt: skip
@click.option(
    "--frames", type=click.IntRange(1, MAX_FRAMES),
    help="The most latent frames; those of the checkpoint's own videos if not told.",
)  # fmt: skip
@click.option(
    "--vae-tile", type=click.IntRange(min=2), metavar="LATENTS",
    help="Decoders for squares of so many latents a side; `run` blends them. Whole frames if not told.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Choice(list(WEIGHTS)), default=KEPT, show_default=True,
    help="In the engines; or exchangeable; or left out of them, and read from the graphs when loading.",
)  # fmt: skip
@click.option("--stage", "only", multiple=True, metavar="NAME", help="This stage alone; may be given again.")
@quiet_option
@json_option
def engines(
    bundle: Path,
    target: str | None,
    batch: int,
    frames: int | None,
    vae_tile: int | None,
    weights: str,
    only: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile the stages of BUNDLE with TensorRT; what is up to date is kept.

    An engine is good for one GPU architecture, one version of TensorRT and the sizes that it was made for.
    The bundle keeps its graphs: on another device this makes what is missing there.
    """
    opened = Bundle.open(bundle)
    limits = Limits(batch, frames or opened.config.video_length, vae_tile)
    options = {"limits": limits, "only": only, "weights": weights}
    built = engines_with_progress(bundle, target or opened.target, quiet, **options)
    made = built.engines[target or opened.target]
    found = {name: describe_engine(built, engine) for name, engine in made.items()}
    click.echo(json.dumps(found) if as_json else engine_table(found))


def engines_with_progress(bundle: Path, target: str, quiet: bool, **options: Any) -> Bundle:
    """`build_engines`, with progress on stderr; Ctrl-C leaves engines that the same command goes on with."""
    from nova_export.engine.build import build_engines
    from nova_export.progress import StageProgress, insistent_interrupt

    with resumable("engines"), insistent_interrupt(), StageProgress(quiet) as progress:
        return build_engines(bundle, target, report=progress, **options)
