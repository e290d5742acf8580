"""What several commands share: their options, and the way to code that needs the export extra."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nova_export.bundle import MANIFEST
from nova_export.errors import Cancelled, DependencyError, InputError, UsageError

if TYPE_CHECKING:
    from nova_export.config import NovaConfig

EXPORT_PACKAGES = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "ml_dtypes",
    "transformers",
    "diffusers",
    "safetensors",
)

Command = Callable[..., Any]

quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")


class FiniteRange(click.FloatRange):
    """A number within bounds; NaN is within none, but compares as if it were."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        number: float = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", parameter, context)
        return number


MAX_THREADS = 1024  # more takes ONNX Runtime minutes to start, and no machine has the cores
threads_option = click.option(
    "--threads", type=click.IntRange(0, MAX_THREADS), default=0,
    help="CPU threads; 0 leaves it to ONNX Runtime.",
)  # fmt: skip
device_option = click.option(
    "--device",
    help="cpu, cuda, rtx-ep, or a target of BUNDLE's engines. If not given, its engines where a GPU is.",
)
low_memory_option = click.option(
    "--low-memory", is_flag=True, help="Keep only the stages of one phase loaded."
)
vae_tile_option = click.option(
    "--vae-tile", type=click.IntRange(min=2), metavar="LATENTS",
    help="Decode squares of so many latents a side, blended: less memory, not exact. Off if not given.",
)  # fmt: skip
cuda_graphs_option = click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=True,
    help="Engines launch the kernels of an AR step at once, where one of its shape was seen before.",
)
prompts_option = click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Text file, a prompt a line. If not given: of ShapesEval for the demo's size, else natural ones.",
)
length_option = click.option(
    "--max-latent-length",
    type=int,
    help="Latent frames to generate; if not given, as many as it was trained for.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


def generation_options(without: Collection[str] = ()) -> Callable[[Command], Command]:
    """The arguments of `Request`, as --kebab-case, named and defaulted as the published pipeline's."""
    from dataclasses import fields

    from nova_export.runtime.request import HELP, Request

    def decorate(command: Command) -> Command:
        for field in reversed(fields(Request)):
            if field.name == "prompt" or field.name in without:
                continue
            kind = {"int": int, "float": float}.get(str(field.type).removesuffix(" | None"), str)
            command = click.option(
                "--" + field.name.replace("_", "-"),
                type=kind,
                default=field.default,
                show_default=field.default is not None,
                help=HELP[field.name],
                multiple=False,
            )(command)
        return command

    return decorate


def exporter(module: str) -> Any:
    """A module that needs the export extra. Raises DependencyError where it is not installed."""
    from importlib import import_module
    from importlib.util import find_spec

    for package in EXPORT_PACKAGES:
        if find_spec(package) is None:
            raise DependencyError(
                f"this command needs {package!r}, which is not installed: pip install 'nova-export[export]'"
            )
    return import_module(module)


def is_bundle(path: Path) -> bool:
    """Whether --against names a bundle; if not, it is a checkpoint. Raises UsageError for neither."""
    if (path / MANIFEST).is_file():
        return True
    if (path / "model_index.json").is_file():
        return False
    raise UsageError(
        f"--against {path}: it holds neither a bundle's {MANIFEST} nor a checkpoint's model_index.json"
    )


def name_and_value(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    """Options of the form NAME=VALUE as a dict. Raises UsageError for others."""
    pairs = [value.partition("=") for value in values]
    for name, sign, value in pairs:
        if not (name and sign and value):
            raise UsageError(f"{parameter.opts[0]} {name + sign + value!r}: must be {parameter.metavar}")
    return {name: value for name, _, value in pairs}


@contextmanager
def resumable(kept: str) -> Iterator[None]:
    """Ctrl-C leaves work, what is `kept`, that the same command goes on with."""
    try:
        yield
    except KeyboardInterrupt:
        raise Cancelled(
            f"stopped; finished {kept} are kept, and the same command goes on from there"
        ) from None


def build_with_progress(checkpoint: Path, out: Path, quiet: bool, **options: Any) -> Path:
    """`build_bundle`, with progress on stderr; Ctrl-C leaves work that the same command goes on with."""
    build_bundle = exporter("nova_export.export.build").build_bundle
    from nova_export.progress import StageProgress, insistent_interrupt

    with resumable("stages"), insistent_interrupt(), StageProgress(quiet) as progress:
        path: Path = build_bundle(checkpoint, out, report=progress, **options)
    return path


def bundle_or_demo(bundle: Path | None, quiet: bool) -> Path:
    """The bundle given, or that of the demo, which is built at the first time."""
    if bundle is not None:
        return bundle
    from nova_export.demo import demo_bundle
    from nova_export.progress import say

    def build(checkpoint: Path, out: Path) -> None:
        if not quiet:
            say(f"no bundle given: building that of the demo, once, in {out}")
        build_with_progress(checkpoint, out, quiet, force=True)

    return demo_bundle(build)


@contextmanager
def counting(
    label: str, total: int, quiet: bool, unit: str = "prompts"
) -> Iterator[Callable[[float], object]]:
    """A bar on stderr over things that are done in parts; where that is no terminal, a line now and then."""
    from tqdm import tqdm

    from nova_export.progress import LINE_SECONDS

    pause = 0.1 if sys.stderr.isatty() else LINE_SECONDS
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} " + unit + " [{elapsed}<{remaining}]"
    with tqdm(total=total, desc=label, disable=quiet, bar_format=form, mininterval=pause, delay=pause) as bar:
        yield lambda done: bar.update(done - bar.n)


def chosen_prompts(config: NovaConfig, file: Path | None, count: int) -> list[Any]:
    """Raises InputError for a file without prompts, or that cannot be read."""
    from calibration import default_prompts

    if file is not None:
        if config.is_class_conditional:
            raise UsageError("--prompts is for text; this checkpoint is class-conditional")
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from error
        if not any(lines):
            raise InputError(f"{file}: has no prompts; write one a line")
        return [line for line in lines if line][:count]
    return default_prompts(config, count)
