"""`nova-export calibrate`: what the layers of a checkpoint see in its runs, for precisions that need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from nova_export.bundle import Bundle
from nova_export.cli_options import (
    chosen_prompts,
    counting,
    exporter,
    generation_options,
    json_option,
    length_option,
    prompts_option,
    quiet_option,
    resumable,
    threads_option,
)

COUNT = 16  # prompts, unless told


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write, .npz; goes on if stopped.",
)
@prompts_option
@click.option(
    "--count", type=click.IntRange(min=1), help=f"Prompts to use, the first ones; {COUNT} if not told."
)
@click.option(
    "--seed", type=int, default=10_000, show_default=True, help="Of the first prompt; later ones count up."
)
@length_option
@generation_options(without=("image", "num_images_per_prompt", "max_latent_length", "seed"))
@threads_option
@quiet_option
@json_option
def calibrate(
    bundle: Path,
    out: Path,
    prompts: Path | None,
    count: int | None,
    seed: int,
    threads: int,
    quiet: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Run the fp32 BUNDLE over prompts and write what its layers see, for `build --calibration`.

    `build --precision int8` does this by itself, with whole runs; on a large checkpoint without a GPU that
    takes hours, and fewer prompts, frames or steps do. For fp16 it tells what overflows in real runs. Needs
    the `export` extra.
    """
    collect = exporter("calibration.collect")
    opened = Bundle.open(bundle)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    chosen = chosen_prompts(opened.config, prompts, count or COUNT)
    with resumable("prompts"), counting("calibration", len(chosen), quiet) as show:
        found = collect.calibrate(opened, chosen, seed, out, show, threads, **arguments)
    summary = {"out": str(out), "prompts": found.done, "layers": len(found.layers)}
    click.echo(json.dumps(summary) if as_json else out)
