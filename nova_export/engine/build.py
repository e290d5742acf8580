"""The engines of a bundle for one target: compiled where missing or made of something else, else kept.

A finished engine is in the manifest before the next one begins, so a build that was stopped goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from nova_export.bundle import MANIFEST, Bundle, EngineEntry, file_entry, sha256
from nova_export.engine.compatibility import changed, made_by
from nova_export.engine.compiler import KEPT, Compiled, CompileJob, Shape, compile_engine
from nova_export.engine.flavour import flavour, machine_capability
from nova_export.engine.timing_cache import timing_file
from nova_export.errors import OutputError, UsageError
from nova_export.runtime.media import write_whole
from nova_export.spec import Stage
from nova_export.stages import Limits
from nova_export.targets import BUILDERS, TARGETS, Target, find

FOLDER = "engines"

Report = Callable[[str, str], object]  # stage name, what is being done to it


class Builder(Protocol):
    """What compiles a stage: the graph that the job names, or something else that computes the same."""

    @property
    def name(self) -> str: ...
    def compile(self, job: CompileJob, stage: Stage, report: Callable[[str], object]) -> Compiled: ...


class OnnxBuilder:
    """TensorRT's own way, from the graph, in a process of its own."""

    name = BUILDERS[0]

    def compile(self, job: CompileJob, stage: Stage, report: Callable[[str], object]) -> Compiled:
        return compile_engine(job, report)


def build_engines(
    folder: Path,
    target: str,
    *,
    limits: Limits | None = None,
    only: Sequence[str] = (),
    weights: str = KEPT,
    builder: Builder | None = None,
    report: Report = lambda stage, action: None,
) -> Bundle:
    """Compile the stages of the bundle in `folder` for a target, and the bundle with them.

    limits: the largest batch and the longest video that the engines take; one sample and the checkpoint's own
    number of frames if not told. only: names of stages, all if none. weights: in the engines as always, or to
    be exchanged later (refittable), or left out and read from the graph when an engine is loaded (stripped).

    Raises:
        UsageError: the target has no engines, or none with such weights, or the bundle's graphs are for
            another form of target.
        ExportError: a stage cannot be compiled; the message names the node and the PyTorch module.
        OutputError: the bundle cannot be written to, or another build is at it.
    """
    bundle, wanted = Bundle.open(folder), find(TARGETS, target)
    if wanted.runtime is None:
        raise UsageError(f"target {target} runs the graphs as they are; it has no engines")
    made_for = find(TARGETS, bundle.target)
    if made_for.graph_form != wanted.graph_form:
        raise UsageError(
            f"{folder}: its graphs are for target {bundle.target}, those for {target} are others; "
            f"`nova-export build CHECKPOINT --target {target}` makes them"
        )
    _check_weights(wanted, weights)
    if unknown := set(only) - bundle.stages.keys():
        raise UsageError(f"stage {min(unknown)!r} is unknown; this bundle has {', '.join(bundle.stages)}")
    limits = limits or Limits(batch=1, frames=bundle.config.video_length)
    specs = bundle.specs(limits)
    builder = builder or OnnxBuilder()
    with _locked(folder):
        for name in only or bundle.stages:
            bundle = _built_or_kept(bundle, specs[name], wanted, weights, builder, report)
        _drop_unnamed(bundle)
    return bundle


def profile(stage: Stage) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The optimization profile: by input, its least, usual and largest shape."""
    least = stage.shapes({axis.name: axis.min for axis in stage.axes})
    usual = stage.shapes({axis.name: axis.opt for axis in stage.axes})
    most = stage.shapes({axis.name: axis.max for axis in stage.axes})
    return {name: (least[name], usual[name], most[name]) for name in least}


def _check_weights(target: Target, weights: str) -> None:
    """Whether engines for the target can be had without weights, or with such that can be exchanged."""
    kind = flavour(target.runtime)
    if weights != KEPT and not kind.strips_without_gpu and machine_capability() is None:
        raise UsageError(
            f"{kind.name} makes engines with {weights} weights only where there is a GPU, and this machine "
            "has none; leave --weights out, or compile on the device"
        )


def made_of(bundle: Bundle, stage: Stage, target: Target, weights: str, builder: str) -> dict[str, str]:
    """What a stage's engine depends on."""
    files = [[path, bundle.files[path].sha256] for path in sorted(bundle.stages[stage.name].files)]
    graph, shapes = _digest(files), _digest(profile(stage))
    how = {"weights": weights, "builder": builder}
    return {"graph": graph, "profile": shapes, **how, **made_by(target)}


def _built_or_kept(
    bundle: Bundle, stage: Stage, target: Target, weights: str, builder: Builder, report: Report
) -> Bundle:
    name, wanted = stage.name, made_of(bundle, stage, target, weights, builder.name)
    entry = bundle.engines.get(target.name, {}).get(name)
    why = changed(entry, wanted) if entry else "not there"
    if entry and not why:
        path = bundle.path(entry.file)
        if sha256(path) == bundle.files[entry.file].sha256:
            report(name, "reused")
            return bundle
        why = "its file was changed"
    report(name, f"compiling ({why})")
    bundle.check_stage(name)
    file = f"{FOLDER}/{name}-{_digest([target.name, wanted])[:16]}.engine"
    _make_folder(bundle.folder / FOLDER)
    assert target.runtime is not None
    job = CompileJob(
        flavour=target.runtime,
        graph=str(bundle.path(bundle.stages[name].graph)),
        out=str(bundle.path(file)),
        profile=profile(stage),
        compute_capability=target.compute_capability,
        weights=weights,
        timings=None if target.compute_capability else str(timing_file(made_by(target))),
    )
    done = builder.compile(job, stage, lambda doing: report(name, doing))
    made = EngineEntry(file=file, spec=stage, made_of=wanted, **asdict(done))
    return _listed(bundle, target.name, name, made)


def _listed(bundle: Bundle, target: str, name: str, engine: EngineEntry) -> Bundle:
    """The bundle with one engine more, or another one; its manifest is replaced at once."""
    path = bundle.folder / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    engines = manifest.setdefault("engines", {}).setdefault(target, {})
    if name in engines:
        manifest["files"].pop(engines[name]["file"], None)
    engines[name] = {**asdict(engine), "spec": engine.spec.to_dict()}
    manifest["files"][engine.file] = file_entry(bundle.path(engine.file))
    text = json.dumps(manifest, indent=1)
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    return Bundle.open(bundle.folder)


def _drop_unnamed(bundle: Bundle) -> None:
    """Engines that were replaced, and what stopped builds left."""
    for path in (bundle.folder / FOLDER).glob("*"):
        if f"{FOLDER}/{path.name}" not in bundle.files:
            path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror})") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time. The lock is on the folder itself: no file of it is left behind."""
    import os

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(
            f"{folder}: another build of its engines is running; wait for it or stop it"
        ) from None
    finally:
        os.close(handle)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
