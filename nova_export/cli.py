"""The command line: parses and prints, nothing else. Every command calls one function of the library."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import click

from nova_export import __version__
from nova_export.__main__ import EXIT_INTERRUPTED
from nova_export.cli_batch import batch
from nova_export.cli_calibrate import calibrate
from nova_export.cli_doctor import doctor
from nova_export.cli_engines import engines as engines_command
from nova_export.cli_eval import evaluate
from nova_export.cli_options import (
    MAX_THREADS,
    FiniteRange,
    build_with_progress,
    bundle_or_demo,
    cuda_graphs_option,
    device_option,
    exporter,
    generation_options,
    json_option,
    low_memory_option,
    name_and_value,
    quiet_option,
    threads_option,
    vae_tile_option,
)
from nova_export.cli_package import package
from nova_export.cli_plan import plan
from nova_export.cli_sensitivity import sensitivity
from nova_export.cli_triton import triton
from nova_export.cli_verify import verify
from nova_export.errors import BundleError, MemoryShortage, NovaExportError, UsageError
from nova_export.stages import MAX_DIFFUSION_STEPS
from nova_export.targets import BUILDERS

EXIT_BUG = 70

BENCH_ARGUMENTS = ("max_latent_length", "num_inference_steps", "num_diffusion_steps")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """A NOVA checkpoint to a deployable bundle, and videos from it without PyTorch."""


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the bundle to write.")
@click.option(
    "--target", default="cpu", show_default=True, help="What the bundle runs on: cpu, rtx-40, tensorrt, …"
)
@click.option(
    "--precision",
    help="fp32 (the default), fp16, bf16, int8, int8-weights, int4-weights or auto: the fastest that passes.",
)
@click.option("--recipe", help="Precisions by stage and layer: cpu, small, or a .toml file.")
@click.option(
    "--stage", "stage_precisions", multiple=True, metavar="NAME=PRECISION", callback=name_and_value,
    help="Precision of one stage; may be given again. `nova-export inspect` shows their names.",
)  # fmt: skip
@click.option(
    "--calibration", type=click.Path(path_type=Path),
    help="What `nova-export calibrate` wrote, for int8, which calibrates by itself without it, and fp16.",
)  # fmt: skip
@click.option(
    "--lean-decode", is_flag=True,
    help="The video decoder in pieces, frame by frame: exact, a fraction of the memory, more launches.",
)  # fmt: skip
@click.option(
    "--head-steps", type=click.IntRange(0, MAX_DIFFUSION_STEPS), metavar="N",
    help="Diffusion steps that a call of the head does, unrolled; 0 makes it a loop. As the target has it.",
)  # fmt: skip
@click.option("--engines/--no-engines", default=True, help="Compile engines too, where the target has them.")
@click.option(
    "--builder", type=click.Choice(BUILDERS), default=BUILDERS[0], show_default=True,
    help="What compiles engines: TensorRT from the graphs, or torch-tensorrt, on the GPU of the machine.",
)  # fmt: skip
@click.option("--verify/--no-verify", default=True, help="Check each exported stage against the reference.")
@click.option("--force", is_flag=True, help="Replace an existing bundle; unchanged stages are used again.")
@quiet_option
def build(
    checkpoint: Path | None,
    out: Path | None,
    precision: str | None,
    recipe: str | None,
    stage_precisions: dict[str, str],
    engines: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Export CHECKPOINT (a published NOVA folder) to a bundle. Needs the `export` extra.

    Without CHECKPOINT it is the demo that comes with the package, and without --out its bundle goes where
    `run` looks for it. A build that was stopped goes on where it was when the same command is run again.
    Precisions on the command line go before those of a recipe. Engines are compiled in default sizes;
    `nova-export engines` makes them in others, and on the device itself.
    """
    from calibration.recipe import Recipe
    from nova_export.demo import demo_bundle_folder, demo_checkpoint, make_cache_folder
    from nova_export.engine.compatibility import made_by
    from nova_export.targets import CPU, TARGETS, find

    chosen = Recipe.load(recipe) if recipe else Recipe()
    options["precision"] = precision or chosen.precision
    options["stage_precisions"] = {**chosen.stages, **stage_precisions}
    options["float_layers"] = chosen.float_layers
    target = find(TARGETS, options["target"])
    compiling = engines and target.runtime is not None
    if compiling:
        made_by(target)  # what it lacks is said now, not after the export
    if out is None and (checkpoint is not None or target != CPU):
        what = f"{checkpoint or 'the demo'} for {target.name}"
        raise UsageError(f"--out FOLDER is missing: where to write the bundle of {what}")
    if out is None:
        out, options["force"] = demo_bundle_folder(), True
        make_cache_folder()
    click.echo(build_with_progress(checkpoint or demo_checkpoint(), out, quiet, engines=compiling, **options))


@cli.command()
@click.argument("name")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint to write."
)
@click.option(
    "--text-encoder", default="phi-2", show_default=True, help="Its size: phi-2, or LAYERSxWIDTH like 2x64."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same weights.")
def init(name: str, out: Path, text_encoder: str, seed: int) -> None:
    """Write a checkpoint of the published architecture NAME with random weights. Needs the `export` extra.

    For trying, testing and timing at full size without a download; its pictures mean nothing.
    """
    init_checkpoint = exporter("reference_model.init").init_checkpoint
    click.echo(init_checkpoint(name, out, text_encoder=text_encoder, seed=seed))


@cli.command()
@click.argument("prompt", nargs=-1)
@click.option(
    "--bundle", type=click.Path(path_type=Path),
    help="Bundle folder, made by `nova-export build`; that of the demo if not given.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("out.mp4"), show_default=True,
    help="File to write: .mp4, .gif, .png (first frame) or .npz (frames and latents).",
)  # fmt: skip
@click.option(
    "--max-latent-length", type=int,
    help="Latent frames to generate; 1 makes an image. If not given: an image for a .png, else a video "
    "of the length that the checkpoint was trained for.",
)  # fmt: skip
@generation_options(without=("max_latent_length",))
@click.option(
    "--fps",
    type=FiniteRange(min=1, max=240),
    default=12,
    show_default=True,
    help="Frames a second of the file.",
)
@click.option("--save-latents", type=click.Path(path_type=Path), help="Also write the latents to this .npz.")
@click.option(
    "--from-latents", type=click.Path(path_type=Path), help="Decode the latents of this .npz; no PROMPT."
)
@device_option
@threads_option
@low_memory_option
@vae_tile_option
@cuda_graphs_option
@quiet_option
@json_option
def run(
    prompt: tuple[str, ...],
    bundle: Path | None,
    out: Path,
    fps: float,
    save_latents: Path | None,
    from_latents: Path | None,
    device: str | None,
    threads: int,
    low_memory: bool,
    vae_tile: int | None,
    cuda_graphs: bool,
    quiet: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Generate from PROMPT (several make a batch; class ids for class-conditional ones) and write a file."""
    from nova_export.progress import say
    from nova_export.runtime.media import check_writable, save_outputs
    from nova_export.runtime.pipeline import load

    started = time.monotonic()
    if save_latents is not None and save_latents.suffix.lower() != ".npz":
        raise UsageError(f"--save-latents writes an .npz, not {save_latents.name!r}")
    if not prompt and from_latents is None:
        raise UsageError('no PROMPT given; nova-export run "a red circle moving right"')
    for path in (out, save_latents):
        if path is not None:
            check_writable(path)
    pipe = load(
        bundle_or_demo(bundle, quiet),
        device=device,
        threads=threads,
        low_memory=low_memory,
        vae_tile=vae_tile,
        cuda_graphs=cuda_graphs,
    )
    if from_latents is not None:
        output = _decode(pipe, from_latents, prompt)
    else:
        if arguments["max_latent_length"] is None:
            arguments["max_latent_length"] = 1 if out.suffix.lower() == ".png" else pipe.config.video_length
        output = _generate(pipe, prompt, arguments, quiet)
    written = save_outputs(out, output.frames, output.latents, fps)
    if save_latents is not None:
        written += save_outputs(save_latents, output.frames, output.latents, fps)
    seconds = time.monotonic() - started
    if as_json:
        files = [str(path) for path in written]
        shape = list(output.frames.shape)
        click.echo(
            json.dumps({"files": files, "seed": output.seed, "frames": shape, "seconds": round(seconds, 3)})
        )
        return
    for path in written:
        click.echo(path)
    if not quiet:
        batch, count, height, width, _ = output.frames.shape
        seed = "" if output.seed is None else f", seed {output.seed}"
        say(f"{batch} x {count} frames of {width}x{height}{seed}, {seconds:.1f} s")


def _generate(pipe: Any, prompts: tuple[str, ...], arguments: dict[str, Any], quiet: bool) -> Any:
    from nova_export.progress import GenerationProgress

    class_conditional = pipe.config.is_class_conditional
    texts = [_class_id(text) for text in prompts] if class_conditional else list(prompts)
    if class_conditional and arguments["negative_prompt"] is not None:
        arguments["negative_prompt"] = _class_id(arguments["negative_prompt"])
    with GenerationProgress(quiet) as progress:
        return pipe(texts, callback=progress, **arguments)


def _decode(pipe: Any, path: Path, prompts: tuple[str, ...]) -> Any:
    from nova_export.runtime.media import load_latents
    from nova_export.runtime.pipeline import Output

    if prompts:
        raise UsageError("--from-latents decodes what was generated before; leave the PROMPT out")
    latents = load_latents(path)
    return Output(pipe.decode(latents), latents, seed=None)


def _class_id(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is no class id; this bundle is class-conditional and takes 0 to 999"
        ) from None


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--hash/--no-hash", "check", default=True, help="Compare every file with its sha256.")
@click.option("--engines", is_flag=True, help="Also list the layers of engines, and what they compute in.")
@quiet_option
@json_option
def inspect(bundle: Path, check: bool, engines: bool, quiet: bool, as_json: bool) -> None:
    """Print the stages of BUNDLE, their shapes, sizes and precision, and check its files."""
    from nova_export.bundle import Bundle
    from nova_export.inspect import describe, format_table

    opened = Bundle.open(bundle)
    described = describe(opened)
    if check:
        opened.check_all()
        described["hashes"] = "match"
    click.echo(json.dumps(described, indent=1) if as_json else format_table(described, engines))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), help="Checkpoint to compare with, in eager PyTorch."
)
@click.option("--stage", "names", multiple=True, help="Measure this stage only; may be given again.")
@click.option(
    "--size", "sizes", multiple=True, help="Size of an axis, like predicted=720; may be given again."
)
@click.option("--end-to-end/--no-end-to-end", default=True, help="Also a whole generation.")
@click.option("--max-latent-length", type=int, help="Of the whole generation.")
@click.option("--num-inference-steps", type=int, help="Of the whole generation.")
@click.option("--num-diffusion-steps", type=int, help="Of the whole generation.")
@click.option(
    "--repeats", type=click.IntRange(min=2), default=7, show_default=True, help="Timed runs of each."
)
@click.option(
    "--budget",
    type=FiniteRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds for the runs of one stage.",
)
@click.option(
    "--threads",
    type=click.IntRange(0, MAX_THREADS),
    default=0,
    help="CPU threads; 0 leaves it to the library.",
)
@click.option("--compile/--no-compile", default=False, help="Also torch.compile, where it works.")
@click.option("--memory/--no-memory", default=True, help="Also peak memory on the CPU, in fresh processes.")
@click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda, rtx-ep, or a target of BUNDLE's engines."
)
@cuda_graphs_option
@quiet_option
@json_option
def bench(
    bundle: Path,
    against: Path | None,
    names: tuple[str, ...],
    sizes: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure BUNDLE, side by side with PyTorch if --against is given: a table, then JSON. Needs `export`."""
    library = exporter("nova_export.export.bench")
    from nova_export.progress import StageProgress

    arguments = {name: options.pop(name) for name in BENCH_ARGUMENTS}
    chosen = library.Options(
        sizes=dict(map(_size, sizes)),
        stages=names or None,
        arguments={name: value for name, value in arguments.items() if value is not None},
        **options,
    )
    with StageProgress(quiet) as progress:
        result = library.bench(bundle, against, chosen, report=progress)
    if not as_json:
        click.echo(library.format_table(result) + "\n")
    click.echo(json.dumps(result))


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not size.isdigit():
        raise UsageError(f"--size {text!r}: give AXIS=NUMBER, like predicted=720")
    return name, int(size)


cli.add_command(batch)
cli.add_command(calibrate)
cli.add_command(doctor)
cli.add_command(engines_command)
cli.add_command(evaluate)
cli.add_command(package)
cli.add_command(plan)
cli.add_command(sensitivity)
cli.add_command(triton)
cli.add_command(verify)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and exits with the code of what went wrong (see nova_export/errors.py)."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module="nova_export")
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    try:
        cli.main(arguments, prog_name="nova-export", standalone_mode=False)
    except NovaExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("stopped; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BundleError.exit_code
    except MemoryError as error:
        print(
            f"error: out of memory ({error}); try --low-memory, --vae-tile 24, or a shorter or smaller video",
            file=sys.stderr,
        )
        return MemoryShortage.exit_code
    except Exception as error:
        if os.environ.get("NOVA_EXPORT_DEBUG"):
            raise
        print(
            f"internal error: {type(error).__name__}: {error}. This is a bug: please report it with the "
            "output of the same command under NOVA_EXPORT_DEBUG=1",
            file=sys.stderr,
        )
        return EXIT_BUG
    return 0
