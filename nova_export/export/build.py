"""Checkpoint -> bundle, stage by stage: load, export, verify, free. Resumable, and atomic at the end.

Work goes on in a hidden folder beside the bundle. A stage finished there, or in the bundle being replaced, is
used again while its key (weights, config, spec, code, tools, precision) is the same. One rename makes it the
bundle.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

import nova_export
from calibration.statistics import Statistics
from nova_export.bundle import FORMAT_VERSION, MANIFEST, sha256
from nova_export.config import NovaConfig
from nova_export.errors import BundleError, CheckpointError, ExportError, UsageError
from nova_export.export.onnx_export import export_onnx
from nova_export.export.precision import change_precision, check_gate, judge
from nova_export.export.quantization import (
    FloatSource,
    compare_on_runs,
    load_calibration,
    quantize_stage,
)
from nova_export.export.speed import median_seconds
from nova_export.export.verify import check_cases, reference_cases
from nova_export.export.work_folder import (
    adopt,
    check_out,
    file_entry,
    publish,
    read_record,
    work_folder,
    write_json,
)
from nova_export.runtime.runner import OrtRunner
from nova_export.runtime.schedule import make_schedule
from nova_export.spec import Stage
from nova_export.stages import stages
from nova_export.targets import FP32, PRECISIONS, TARGETS, Precision, Target, contained, find
from reference_model.checkpoint import Weights, check_weights, load_module
from reference_model.tokenizer import read_tokenizer

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "diffusers", "numpy")
TOKENIZER = "tokenizer.json"

WORTH_IT = 0.95  # of fp32's time: what is hardly faster, or by chance, is not worth the bits

Report = Callable[[str, str], object]  # stage name, what is being done to it


@dataclass(frozen=True)
class Job:
    """What is built from what. Nothing in it changes while a build runs."""

    checkpoint: Path
    config: NovaConfig
    target: Target
    precisions: dict[str, Precision]  # by stage
    named: frozenset[str]  # stages whose precision was asked for by name: it is theirs or none
    float_layers: Mapping[str, tuple[str, ...]]  # by stage, patterns of layers that stay in float
    verify: bool
    tools: dict[str, str]
    code: str


def build_bundle(
    checkpoint: str | Path,
    out: str | Path,
    *,
    target: str = "cpu",
    precision: str = "fp32",
    stage_precisions: Mapping[str, str] | None = None,
    float_layers: Mapping[str, tuple[str, ...]] | None = None,
    calibration: str | Path | None = None,
    verify: bool = True,
    force: bool = False,
    report: Report = lambda stage, action: None,
) -> Path:
    """Write the bundle `out` of a checkpoint folder and return its path.

    precision: of all stages but those of `stage_precisions`, which name their own; stages that it is not for
    are in fp32. Stages in integers that do not pass their gate are in fp32 too, unless they were named.
    float_layers: by stage, patterns of the names of layers that integers leave in float.
    calibration: what int8 takes its ranges from (`calibration.collect`); without it the build calibrates.

    Raises:
        CheckpointError: the checkpoint is incomplete, corrupt, unsafe or unknown.
        ExportError: a stage cannot be exported, or differs from the reference by more than its precision may.
        OutputError: `out` exists (unless `force`) or cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = NovaConfig.from_checkpoint(checkpoint)
    specs = stages(config)
    job = Job(
        checkpoint=checkpoint,
        config=config,
        target=find(TARGETS, target),
        precisions=_precisions(specs, precision, stage_precisions or {}, float_layers or {}),
        named=frozenset(stage_precisions or {}),
        float_layers=dict(float_layers or {}),
        verify=verify,
        tools=_tool_versions(),
        code=_code_digest(),
    )
    check_out(out, force)
    tokenizer = None if job.config.is_class_conditional else read_tokenizer(checkpoint / "tokenizer")
    _check_checkpoint(job, specs)
    sources = {
        part: fingerprint(checkpoint / part) for part in sorted({spec.part for spec in specs.values()})
    }
    statistics = load_calibration(Path(calibration), sources) if calibration else None
    with work_folder(out) as work:
        source = _float_source(job, out, statistics, report)
        folders = [work, out, *([source.bundle.folder] if source else [])]
        records = {
            name: _finished_or_built(job, spec, sources[spec.part], folders, source, report)
            for name, spec in specs.items()
        }
        files = {path: entry for record in records.values() for path, entry in record["files"].items()}
        if tokenizer is not None:
            (work / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            files[TOKENIZER] = file_entry(work / TOKENIZER)
        manifest = {
            "format": FORMAT_VERSION,
            "nova_export": nova_export.__version__,
            "target": job.target.name,
            "tools": job.tools,
            "source": {"name": checkpoint.resolve().name, "parts": sources},
            "config": job.config.to_dict(),
            "tokenizer": TOKENIZER if tokenizer is not None else None,
            "stages": {name: {**record, "files": list(record["files"])} for name, record in records.items()},
            "files": files,
        }
        write_json(work / MANIFEST, manifest)
        publish(work, out, {MANIFEST, *files})
    for path in _float_paths(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return out


def _precisions(
    specs: Collection[str], precision: str, own: Mapping[str, str], layers: Collection[str]
) -> dict[str, Precision]:
    """The precision of every stage. Raises UsageError for an unknown stage or precision."""
    if unknown := {*own, *layers} - set(specs):
        raise UsageError(f"stage {min(unknown)!r} is unknown; this checkpoint has {', '.join(specs)}")
    for name, wanted in own.items():
        preset = find(PRECISIONS, wanted)
        if not preset.is_for(name):
            raise UsageError(f"{wanted} is not for stage {name}; it is for {', '.join(preset.stages or ())}")
    chosen = {name: find(PRECISIONS, own.get(name, precision)) for name in specs}
    return {name: preset if preset.is_for(name) else FP32 for name, preset in chosen.items()}


def _float_paths(out: Path) -> tuple[Path, Path]:
    """Where the float32 bundle and the calibration of a build in integers are, until it is done."""
    return out.parent / f".{out.name}.fp32", out.parent / f".{out.name}.calibration.npz"


def _float_source(job: Job, out: Path, statistics: Statistics | None, report: Report) -> FloatSource | None:
    """What stages in integers are made from; None where there are none."""
    wanted = [each for precision in job.precisions.values() for each in contained(precision)]
    if not any(precision.weights for precision in wanted):
        return None
    bundle, kept = _float_paths(out)
    build_bundle(job.checkpoint, bundle, target=job.target.name, verify=job.verify, force=True, report=report)
    inputs = any(precision.inputs for precision in wanted)
    if inputs and statistics is None:
        report("calibration", "running the loops")
    return FloatSource.open(bundle, statistics, inputs, kept)


def _check_checkpoint(job: Job, specs: dict[str, Stage]) -> None:
    """What is wrong with a checkpoint comes out now, not after an hour of exporting its other stages."""
    make_schedule(job.config.scheduler, num_steps=1)
    for spec in specs.values():
        check_weights(spec, job.config, job.checkpoint)


def fingerprint(part: Path) -> str:
    """One digest of the config and safetensors files of a checkpoint's part: its content, not its dates."""
    digest = hashlib.sha256()
    paths = {*part.glob("*.json"), *Weights(part).files.values()}
    try:
        for path in sorted(paths):
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    except BundleError as error:  # that a file cannot be read; here it is no bundle's
        raise CheckpointError(str(error)) from error
    return digest.hexdigest()


def _finished_or_built(
    job: Job, spec: Stage, part: str, folders: Sequence[Path], source: FloatSource | None, report: Report
) -> dict[str, Any]:
    """The stage's manifest entry: of an earlier run if it is still good, else of building it now.

    folders: the first is where it is built, all are where it may be already.
    """
    work = folders[0]
    key = _stage_key(job, spec, part, source)
    for folder in folders:
        record = read_record(folder, spec.name)
        if (
            record
            and record.get("key") == key
            and (record.get("verified") or not job.verify)
            and adopt(record, folder, work)
        ):
            report(spec.name, "reused")
            break
    else:
        record = {**_built(job, spec, work, source, report), "key": key}
    write_json(work / f"{spec.name}.json", record)
    return record


def _built(job: Job, spec: Stage, work: Path, source: FloatSource | None, report: Report) -> dict[str, Any]:
    precision = job.precisions[spec.name]
    if source and precision.fastest_of:
        return _fastest_stage(job, spec, work, source, report)
    if source and precision.weights:
        return _quantize_stage(job, spec, work, source, report)
    return _build_stage(job, spec, work, report)


def _fastest_stage(job: Job, spec: Stage, work: Path, source: FloatSource, report: Report) -> dict[str, Any]:
    """The stage in the fastest of several precisions that pass their gates, timed here, side by side."""
    whole = source.bundle.folder
    records, refused = {FP32.name: read_record(whole, spec.name)}, {}
    folders = {FP32.name: whole}
    with ExitStack() as stack:
        for precision in contained(job.precisions[spec.name]):
            if precision == FP32 or not precision.is_for(spec.name):
                continue
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work.parent, prefix=".")))
            one = replace(job, precisions={spec.name: precision}, named=frozenset({spec.name}))
            try:
                records[precision.name] = _built(one, spec, folder, source, report)
                folders[precision.name] = folder
            except ExportError as error:
                refused[precision.name] = str(error)
        report(spec.name, "timing")
        graph = f"{spec.name}.onnx"
        seconds = median_seconds(spec, job.config, {name: folder / graph for name, folder in folders.items()})
        best = min(seconds, key=lambda name: seconds[name])
        if seconds[best] > WORTH_IT * seconds[FP32.name]:
            best = FP32.name
        record = records[best]
        assert record is not None and adopt(record, folders[best], work)
    return {**record, "auto": {"seconds": seconds, "refused": refused}}


def _quantize_stage(job: Job, spec: Stage, work: Path, source: FloatSource, report: Report) -> dict[str, Any]:
    """A stage in integers, or in float32 if it is not good enough. Raises ExportError if it was named."""
    precision, graph = job.precisions[spec.name], _fresh_graph(spec, work)
    report(spec.name, f"changing to {precision.name}")
    kept = job.float_layers.get(spec.name, ())
    changes = quantize_stage(source, spec.name, graph, precision, job.target, kept)
    report(spec.name, "verifying")
    verdict = judge(compare_on_runs(source, {spec.name: graph})[spec.name], precision)
    verified = {**verdict.to_dict(), **changes}
    if verdict.lost:
        if spec.name in job.named:
            raise ExportError(f"stage {spec.name}: {verdict.lost}")
        warnings.warn(f"stage {spec.name} stays in fp32: {verdict.lost}", stacklevel=2)
        record = read_record(source.bundle.folder, spec.name)
        assert record is not None and adopt(record, source.bundle.folder, work)
        return {**record, "refused": {"precision": precision.name, **verdict.to_dict()}}
    return _record(spec, graph, precision, verified)


def _build_stage(job: Job, spec: Stage, work: Path, report: Report) -> dict[str, Any]:
    """Export one stage into `work` and compare it with the reference. Frees its weights."""
    report(spec.name, "loading")
    module = load_module(spec, job.config, job.checkpoint)
    graph = _fresh_graph(spec, work)
    report(spec.name, "exporting")
    export_onnx(spec, module, graph)
    precision = job.precisions[spec.name]
    gated = precision.half is not None  # what cannot pass its gate is not written, asked to verify or not
    checked = job.verify or gated
    cases = reference_cases(spec, job.config, module) if checked else []
    _free(module)
    changes: dict[str, Any] = {}
    if gated:
        report(spec.name, f"changing to {precision.name}")
        changes = change_precision(spec, graph, precision, job.target, cases)
    verified = None
    if checked:
        report(spec.name, "verifying")
        check = partial(check_gate, precision=precision) if gated else check_cases
        with OrtRunner(spec, graph) as runner:
            verified = {**check(spec, runner, cases), **changes}
        del cases
    _return_memory()
    return _record(spec, graph, precision, verified)


def _fresh_graph(spec: Stage, work: Path) -> Path:
    """Where a stage's graph goes, with nothing there: it may be a link into the bundle that is replaced."""
    graph = work / f"{spec.name}.onnx"
    for path in _graph_files(graph):
        path.unlink(missing_ok=True)
    return graph


def _graph_files(graph: Path) -> tuple[Path, Path]:
    return graph, graph.with_name(graph.name + ".data")


def _record(
    spec: Stage, graph: Path, precision: Precision, verified: dict[str, Any] | None
) -> dict[str, Any]:
    """A stage's entry in the manifest, with its files."""
    return {
        "spec": spec.to_dict(),
        "graph": graph.name,
        "files": {path.name: file_entry(path) for path in _graph_files(graph) if path.exists()},
        "precision": precision.name,
        "verified": verified,
    }


def _free(module: nn.Module) -> None:
    """Give up a module's weights, although caches of the exporter still hold its tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.new_empty(0)
    _return_memory()


def _return_memory() -> None:
    """Give freed weights back to the system, where malloc would keep them for the next stage to add to."""
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _stage_key(job: Job, spec: Stage, part: str, source: FloatSource | None) -> str:
    precision = job.precisions[spec.name]
    facts: list[Any] = [
        spec.to_dict(),
        job.config.to_dict(),
        part,
        job.target.name,
        asdict(precision),
        job.tools,
        job.code,
    ]
    if precision.weights or precision.fastest_of:
        facts.append(job.float_layers.get(spec.name))
    if source and source.statistics and any(each.inputs for each in contained(precision)):
        facts.append(source.statistics.digest())
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tool_versions() -> dict[str, str]:
    versions = {}
    for tool in TOOLS:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return versions


def _code_digest() -> str:
    """Digest of the sources that shape a graph: a change in them makes finished stages stale."""
    package = Path(nova_export.__file__).parent
    sources = [
        package / "spec.py",
        package / "stages.py",
        package / "config.py",
        package / "targets.py",
        *(package / "export").rglob("*.py"),
    ]
    for folder in ("calibration", "reference_model"):
        sources += (package.parent / folder).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()
