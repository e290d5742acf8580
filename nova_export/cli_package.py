"""`nova-export package`: a bundle in the form that another program wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nova_export.cli_options import FiniteRange, threads_option
from nova_export.stages import MAX_BATCH, MAX_FRAMES


@click.group()
def package() -> None:
    """Write a bundle in the form that another program wants."""


@package.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--device",
    help="Of the stages: cpu, cuda, or a target it has engines for. If not given, what it was built for.",
)
@click.option(
    "--stages", type=click.Choice(["in-process", "models"]), default="in-process", show_default=True,
    help="Whether stages run in the process of the model that streams, or as models of their own.",
)  # fmt: skip
@click.option(
    "--platform", type=click.Choice(["python", "onnxruntime", "tensorrt"]),
    help="Backend of stage models. If not given: python for cpu, onnxruntime for cuda, tensorrt for engines.",
)  # fmt: skip
@click.option("--name", default="nova", show_default=True, help="Of the model that streams.")
@click.option(
    "--loops", type=click.IntRange(min=1), default=1, show_default=True,
    help="Loops at a time, each in a process with weights of its own.",
)  # fmt: skip
@click.option(
    "--max-batch", type=click.IntRange(1, MAX_BATCH),
    help="Samples that share a loop. If not given, 8, or what engines take.",
)  # fmt: skip
@click.option(
    "--max-latent-length", type=click.IntRange(1, MAX_FRAMES),
    help="Latent frames that a request may ask for. If not given, 32, or what engines take.",
)  # fmt: skip
@click.option(
    "--queue", type=click.IntRange(min=1), default=64, show_default=True,
    help="Requests that may wait; more are refused.",
)  # fmt: skip
@click.option(
    "--timeout", type=FiniteRange(min=0, min_open=True), default=120.0, show_default=True,
    help="Seconds that a request may wait before it is refused.",
)  # fmt: skip
@click.option(
    "--gather", type=FiniteRange(min=0), default=0.02, show_default=True,
    help="Seconds that a request waits for others to share its loop.",
)  # fmt: skip
@threads_option
@click.option("--force", is_flag=True, help="Replace a repository that this command wrote.")
def triton(bundle: Path, out: Path, force: bool, **options: Any) -> None:
    """Write a model repository for Triton Inference Server that serves BUNDLE."""
    from engines.triton.repository import Serving, package

    click.echo(package(bundle, out, Serving(**options), force))
