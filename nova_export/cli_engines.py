"""`nova-export engines`: compiles the stages of a bundle for a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from nova_export.bundle import Bundle
from nova_export.cli_options import json_option, quiet_option, resumable
from nova_export.stages import MAX_BATCH, MAX_FRAMES, Limits

COLUMNS = ("stage", "attention", "engine MB", "weights MB", "activations MB", "compile peak MB", "seconds")


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
@click.option("--stage", "only", multiple=True, metavar="NAME", help="This stage alone; may be given again.")
@quiet_option
@json_option
def engines(
    bundle: Path,
    target: str | None,
    batch: int,
    frames: int | None,
    only: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile the stages of BUNDLE with TensorRT; what is up to date is kept.

    An engine is good for one GPU architecture, one version of TensorRT and the sizes that it was made for.
    The bundle keeps its graphs: on another device this makes what is missing there.
    """
    opened = Bundle.open(bundle)
    limits = Limits(batch, frames or opened.config.video_length)
    built = engines_with_progress(bundle, target or opened.target, quiet, limits=limits, only=only)
    found = numbers(built, target or opened.target)
    click.echo(json.dumps(found) if as_json else table(found))


def engines_with_progress(bundle: Path, target: str, quiet: bool, **options: Any) -> Bundle:
    """`build_engines`, with progress on stderr; Ctrl-C leaves engines that the same command goes on with."""
    from nova_export.engine.build import build_engines
    from nova_export.progress import StageProgress, insistent_interrupt

    with resumable("engines"), insistent_interrupt(), StageProgress(quiet) as progress:
        return build_engines(bundle, target, report=progress, **options)


def numbers(bundle: Bundle, target: str) -> dict[str, dict[str, Any]]:
    """By stage what its engine takes: bytes, as TensorRT tells them, and seconds of compiling."""
    return {
        name: {
            "file": engine.file,
            "bytes": bundle.files[engine.file].size,
            "attention": engine.attention,
            "weight_bytes": engine.weight_bytes,
            "activation_bytes": engine.activation_bytes,
            "peak_bytes": engine.peak_bytes,
            "seconds": engine.seconds,
        }
        for name, engine in bundle.engines[target].items()
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """For a person."""
    from nova_export.tables import markdown

    def row(name: str, engine: dict[str, Any]) -> list[str]:
        sizes = [engine[key] for key in ("bytes", "weight_bytes", "activation_bytes", "peak_bytes")]
        shown = ["-" if size is None else f"{size / 1e6:.1f}" for size in sizes]
        return [name, engine["attention"] or "-", *shown, f"{engine['seconds']:.1f}"]

    return markdown(COLUMNS, [row(*item) for item in found.items()])
