"""`nova-export verify`: how far a bundle is from another, or from its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nova_export.bundle import Bundle
from nova_export.cli_options import (
    chosen_prompts,
    counting,
    device_option,
    exporter,
    generation_options,
    is_bundle,
    json_option,
    length_option,
    low_memory_option,
    prompts_option,
    quiet_option,
    threads_option,
)
from nova_export.errors import UsageError

if TYPE_CHECKING:
    from nova_export.evaluation.verification import Side

DECIDED = ("image", "num_images_per_prompt", "max_latent_length", "seed")
COUNT = 4  # prompts, unless told


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    required=True,
    help="The bundle, or the checkpoint in eager PyTorch (needs the `export` extra), that it should be like.",
)
@prompts_option
@click.option(
    "--count", type=click.IntRange(min=1), help=f"Prompts to use, the first ones; {COUNT} if not told."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the first prompt; later ones count up."
)
@length_option
@generation_options(without=DECIDED)
@click.option(
    "--layers", is_flag=True, help="Also compare what every layer gives; both must be bundles. Takes memory."
)
@click.option(
    "--report", type=click.Path(path_type=Path), help="Also write a page with plots and pictures here."
)
@device_option
@threads_option
@low_memory_option
@quiet_option
@json_option
def verify(
    bundle: Path,
    against: Path,
    prompts: Path | None,
    count: int | None,
    seed: int,
    layers: bool,
    report: Path | None,
    device: str | None,
    threads: int,
    low_memory: bool,
    quiet: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Compare BUNDLE with what it should be like, on prompts that both get with the same seeds.

    Every stage on the same inputs, worst first; how far the loops drift when left to themselves; the frames.
    """
    from nova_export.evaluation.html_report import write_report
    from nova_export.evaluation.verification import verify as compare
    from nova_export.runtime.media import check_writable

    if report is not None:
        check_writable(report, (".html",))
    arguments = {name: value for name, value in arguments.items() if value is not None}
    with ExitStack() as stack:
        tested = bundle_side(Bundle.open(bundle), device, threads, low_memory, stack)
        reference = other_side(against, tested.lean_decode, threads, low_memory, stack)
        cut: Mapping[tuple[str, str], int] = {}
        if layers:
            tested, reference, cut = watched_sides(tested, reference, bundle, against, threads)
        chosen = chosen_prompts(tested.config, prompts, count or COUNT)
        show = stack.enter_context(counting("prompts", len(chosen), quiet))
        found = compare(reference, tested, chosen, seed, show, **arguments)
    for place, count in cut.items():
        found.tensors[place].cut += count
    if report is not None:
        write_report(report, found)
    click.echo(json.dumps(found.to_dict()) if as_json else found.table())


def bundle_side(bundle: Bundle, device: str | None, threads: int, low_memory: bool, stack: ExitStack) -> Side:
    """A bundle's stages; `stack` closes them."""
    from nova_export.evaluation.verification import Side
    from nova_export.runtime.pipeline import bundle_tokenizer
    from nova_export.runtime.stage_runners import StageRunners

    runners = StageRunners(bundle, device, threads, low_memory)
    stack.callback(runners.close)
    return Side(
        str(bundle.folder),
        bundle.config,
        runners,
        bundle_tokenizer(bundle),
        bundle.lean_decode,
        runners.vae_tile,
    )


def watched_sides(
    tested: Side, reference: Side, bundle: Path, against: Path, threads: int
) -> tuple[Side, Side, Mapping[tuple[str, str], int]]:
    """Both with the results of their layers; and how many numbers of their inputs the tested side cut off.

    Raises UsageError where one is a checkpoint.
    """
    if not is_bundle(against):
        raise UsageError(f"--layers compares graphs, and {against} is a checkpoint; build it in fp32 first")
    stages = exporter("nova_export.export.watch").WatchedStages
    first, second = Bundle.open(bundle), Bundle.open(against)
    watched = stages(first, second, threads)
    return (
        replace(tested, stage=watched),
        replace(reference, stage=stages(second, first, threads)),
        watched.cut,
    )


def other_side(path: Path, lean_decode: str | None, threads: int, low_memory: bool, stack: ExitStack) -> Side:
    """A bundle's stages, or a checkpoint's in PyTorch, decoded so. Raises UsageError for neither."""
    from nova_export.config import NovaConfig
    from nova_export.evaluation.verification import Side

    if is_bundle(path):
        return bundle_side(Bundle.open(path), "cpu", threads, low_memory, stack)
    config = NovaConfig.from_checkpoint(path)
    modules = exporter("reference_model.runner").torch_runners(config, path, lean_decode)
    return Side(str(path), config, modules.__getitem__, lean_decode=lean_decode)
