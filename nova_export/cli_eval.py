"""`nova-export eval`: parses, and chooses between the score and samples for the evaluators of others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nova_export.cli_options import (
    bundle_or_demo,
    counting,
    device_option,
    exporter,
    generation_options,
    is_bundle,
    json_option,
    low_memory_option,
    quiet_option,
    resumable,
    threads_option,
)
from nova_export.errors import UsageError
from nova_export.progress import say

if TYPE_CHECKING:
    from nova_export.evaluation.shapes_eval import Sample, Source

# Of `Request`: decided by the list or file of prompts.
DECIDED = ("image", "num_images_per_prompt", "max_latent_length", "seed")


@click.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--against", type=click.Path(path_type=Path),
    help="Compare with this bundle, or with this checkpoint in eager PyTorch (needs the `export` extra).",
)  # fmt: skip
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write this .png: frames and failures.")
@click.option(
    "--count", type=click.IntRange(min=1), help="Only the first prompts of the list, a fair sample."
)
@click.option(
    "--prompts", type=click.Path(path_type=Path),
    help="Write samples of these prompts to --out: GenEval's .jsonl, or VBench's .txt or .json.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the samples of --prompts.")
@click.option(
    "--samples", type=click.IntRange(min=1), help="Samples of each of --prompts; 4 for GenEval, 5 for VBench."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the first call; later ones count up."
)
@generation_options(without=DECIDED)
@device_option
@threads_option
@low_memory_option
@quiet_option
@json_option
def evaluate(
    bundle: Path | None,
    against: Path | None,
    sheet: Path | None,
    count: int | None,
    prompts: Path | None,
    out: Path | None,
    samples: int | None,
    device: str | None,
    threads: int,
    low_memory: bool,
    quiet: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Score BUNDLE (or the demo) with ShapesEval, or write samples for the evaluators of GenEval and VBench.

    ShapesEval is for the demo checkpoint: a fixed list of prompts, and rules that say whether object, colour,
    shape, motion and background are as asked. With --prompts nothing is scored; a run that was stopped goes
    on when the same command is run again.
    """
    from nova_export.evaluation.contact_sheet import save_contact_sheet
    from nova_export.evaluation.samples import read_tasks, write_samples
    from nova_export.evaluation.shapes_eval import check_source, prompt_list, samples_of
    from nova_export.runtime.media import check_writable
    from nova_export.runtime.pipeline import load

    started = time.monotonic()
    _check_options(prompts, out, samples, {"--against": against, "--sheet": sheet, "--count": count})
    bundle = bundle_or_demo(bundle, quiet)
    if prompts is not None and out is not None:
        tasks = read_tasks(prompts, out, samples)
        pipe = load(bundle, device=device, threads=threads, low_memory=low_memory)
        with resumable("files"), counting("samples", len(tasks), quiet) as report:
            written = write_samples(pipe, tasks, report=report, **arguments)
        click.echo(json.dumps({"out": str(out), **vars(written)}) if as_json else out)
        if not quiet and not as_json:
            say(f"{written.new} files written, {written.kept} were there before")
        return
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise UsageError(f"--sheet writes a .png, not {sheet.name!r}")
        check_writable(sheet)
    pipe = load(bundle, device=device, threads=threads, low_memory=low_memory)
    sources: list[tuple[str, Source]] = [(str(bundle), pipe)]
    if against is not None:
        sources.append((str(against), _other(against, threads, low_memory)))
    for name, source in sources:
        check_source(source.config, name)
    items, made = prompt_list()[:count], []
    for name, source in sources:
        with counting(name, len(items), quiet) as report:
            made.append((name, samples_of(source, items, report=report, **arguments)))
    if sheet is not None:
        save_contact_sheet(sheet, made[0][1])
    seconds = time.monotonic() - started
    click.echo(_as_json(made, arguments["seed"], seconds) if as_json else _as_text(made, arguments["seed"]))
    if not quiet and not as_json:
        say(f"{len(items)} prompts, {seconds:.1f} s" + (f"; {sheet} shows them" if sheet else ""))


def _check_options(
    prompts: Path | None, out: Path | None, samples: int | None, of_score: dict[str, object]
) -> None:
    """Raises UsageError for options of the score with those of samples."""
    if (prompts is None) is not (out is None):
        raise UsageError("--prompts FILE and --out DIR go together: one names the prompts, one the samples")
    if prompts is None and samples is not None:
        raise UsageError("--samples needs --prompts; each prompt of ShapesEval has one sample")
    given = [name for name, value in of_score.items() if value is not None]
    if prompts is not None and given:
        raise UsageError(
            f"{given[0]} belongs to ShapesEval, and with --prompts nothing is scored; leave it out"
        )


def _other(path: Path, threads: int, low_memory: bool) -> Source:
    """A bundle, or a checkpoint in eager PyTorch."""
    from nova_export.runtime.pipeline import load

    if is_bundle(path):
        return load(path, device="cpu", threads=threads, low_memory=low_memory)
    eager: Source = exporter("reference_model.eager").EagerPipeline.from_checkpoint(path)
    return eager


def _as_text(made: list[tuple[str, list[Sample]]], seed: int) -> str:
    from nova_export.evaluation.shapes_eval import Comparison, Score

    parts = [
        f"{name}, seed {seed}: as asked, with 95 % intervals\n{Score.of(each).table()}" for name, each in made
    ]
    if len(made) > 1:
        (name, ours), (other, theirs) = made
        parts.append(f"{other} less {name}, in percentage points\n{Comparison.of(ours, theirs).table()}")
    return "\n\n".join(parts)


def _as_json(made: list[tuple[str, list[Sample]]], seed: int, seconds: float) -> str:
    from nova_export.evaluation.shapes_eval import Comparison, Score

    result: dict[str, Any] = {"seed": seed, "prompts": len(made[0][1]), "seconds": round(seconds, 3)}
    for key, (name, each) in zip(("bundle", "against"), made, strict=False):
        samples = [{"prompt": one.item.prompt, "group": one.item.group, "failed": one.failed} for one in each]
        result[key] = {"name": name, "score": Score.of(each).to_dict(), "samples": samples}
    if len(made) > 1:
        result["comparison"] = Comparison.of(made[0][1], made[1][1]).to_dict()
    return json.dumps(result)
