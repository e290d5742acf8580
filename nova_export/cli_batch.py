"""`nova-export batch`: parses, and prints what became of many prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from nova_export.cli_options import (
    MAX_THREADS,
    FiniteRange,
    bundle_or_demo,
    counting,
    device_option,
    generation_options,
    json_option,
    low_memory_option,
    quiet_option,
    resumable,
    vae_tile_option,
)
from nova_export.errors import BatchError, UsageError
from nova_export.progress import say

OF_LINES = ("num_images_per_prompt", "max_latent_length", "seed")  # of `Request`: said by other options


@click.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@click.option(
    "--bundle", type=click.Path(path_type=Path),
    help="Bundle folder, made by `nova-export build`; that of the demo if not given.",
)  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(min=1),
    help="Results of each prompt, with seeds that count up; 1 for a line of a .jsonl, else VBench's 5.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="The first seed of prompts without one.")
@click.option(
    "--format", "suffix", type=click.Choice([".mp4", ".gif", ".png", ".npz"]), default=".mp4",
    show_default=True, help="Files to write; .png is the first frame, .npz frames and latents.",
)  # fmt: skip
@click.option(
    "--fps", type=FiniteRange(min=1, max=240), default=12, show_default=True, help="Frames a second."
)
@click.option(
    "--max-latent-length", type=int,
    help="Latent frames to generate. If not given: an image for .png, else a video of the length that the "
    "checkpoint was trained for.",
)  # fmt: skip
@generation_options(without=OF_LINES)
@click.option(
    "--ray", metavar="ADDRESS",
    help="Run on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local to start one on this machine.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(min=1),
    help="At most so many on the cluster. If not given: one a GPU, or as many as cores and memory allow.",
)  # fmt: skip
@device_option
@click.option(
    "--threads", type=click.IntRange(0, MAX_THREADS), default=0,
    help="CPU threads of a worker; 0 leaves it to ONNX Runtime, on a cluster to its share of the cores.",
)  # fmt: skip
@low_memory_option
@vae_tile_option
@quiet_option
@json_option
def batch(
    prompts: Path,
    out: Path,
    bundle: Path | None,
    workers: int | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate what the file PROMPTS asks for into a folder: one result for each prompt and seed.

    PROMPTS is a .jsonl with an object a line (`prompt`; optional `id`, `seed` and any argument of `run`), a
    .txt with a prompt a line, or VBench's .json. All lines are checked before anything runs. A batch that was
    stopped goes on when the same command is run again.
    """
    from nova_export.batch.run import run_batch

    if workers is not None and options["ray"] is None:
        raise UsageError("--workers is for --ray; without it there is one, in this process")
    if options["image"] is not None:
        options["image"] = str(Path(options["image"]).absolute())
    bundle = bundle_or_demo(bundle, quiet)
    with resumable("results"):
        summary = run_batch(
            prompts,
            out,
            bundle,
            workers=workers,
            progress=lambda total: counting("results", total, quiet, unit="results"),
            notice=_above_the_bar,
            **options,
        )
    click.echo(json.dumps({"out": str(out), **vars(summary)}) if as_json else out)
    if not quiet and not as_json:
        say(f"{summary.new} results made, {summary.kept} were there before, {summary.seconds:.1f} s")
    if summary.failed:
        raise BatchError(
            f"{summary.failed} of {summary.results + summary.failed} results could not be made; "
            f"{out / 'failures.jsonl'} says why, and the same command tries them again"
        )


def _above_the_bar(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
