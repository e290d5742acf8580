"""Checkpoint -> bundle, stage by stage: load, export, verify, free. Resumable, and atomic at the end.

Work goes on in a hidden folder beside the bundle. A stage finished there, or in the bundle being replaced, is
used again while its key (weights, config, spec, code, tools, precision) is the same. Engines are compiled
there too. One rename makes it the bundle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nova_export
from calibration.statistics import Statistics
from nova_export.bundle import FORMAT_VERSION, MANIFEST, file_entry, sha256
from nova_export.child import GB, available_memory
from nova_export.config import NovaConfig
from nova_export.engine.build import Builder, OnnxBuilder, build_engines
from nova_export.errors import BundleError, CheckpointError, MemoryShortage, UsageError
from nova_export.export.build_stage import Job, Report, build_stages
from nova_export.export.plan import export_bytes
from nova_export.export.quantization import FloatSource, load_calibration
from nova_export.export.torch_tensorrt import TorchTensorRt
from nova_export.export.work_folder import (
    adopt,
    adopt_engines,
    check_out,
    publish,
    read_record,
    work_folder,
    write_json,
)
from nova_export.lean_stages import START
from nova_export.runtime.schedule import make_schedule
from nova_export.spec import Stage
from nova_export.stages import stages
from nova_export.targets import BUILDERS, CPU, PRECISIONS, TARGETS, Precision, contained, find
from reference_model.checkpoint import Weights, check_weights
from reference_model.tokenizer import read_tokenizer

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "diffusers", "numpy")
TOKENIZER = "tokenizer.json"
BLOCKS_OPSET = 21  # the first whose DequantizeLinear takes blocks


def build_bundle(
    checkpoint: str | Path,
    out: str | Path,
    *,
    target: str = "cpu",
    precision: str = "fp32",
    stage_precisions: Mapping[str, str] | None = None,
    float_layers: Mapping[str, tuple[str, ...]] | None = None,
    calibration: str | Path | None = None,
    lean_decode: bool = False,
    head_steps: int | None = None,
    verify: bool = True,
    engines: bool = False,
    builder: str = BUILDERS[0],
    force: bool = False,
    report: Report = lambda stage, action: None,
) -> Path:
    """Write the bundle `out` of a checkpoint folder and return its path.

    precision: of all stages but those of `stage_precisions`, which name their own; stages that it is not for
    are in fp32. Stages in integers that do not pass their gate are in fp32 too, unless they were named.
    float_layers: by stage, patterns of the names of layers that integers leave in float.
    calibration: what int8 and fp16 take their ranges from (`calibration.collect`). Without it a build with
    int8 calibrates, and fp16 takes those of random inputs.
    lean_decode: the decoder in pieces that need a fraction of its memory (nova_export/lean_stages.py).
    head_steps: as in `stages`, but 0 makes it a loop; as the target has it if not told.
    engines: whether those of the target are compiled too, before the bundle is put in its place. builder: of
    BUILDERS, what compiles them.

    Raises:
        CheckpointError: the checkpoint is incomplete, corrupt, unsafe or unknown.
        ExportError: a stage cannot be exported, or differs from the reference by more than its precision may.
        OutputError: `out` exists (unless `force`) or cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = NovaConfig.from_checkpoint(checkpoint)
    lean = _frame_type(precision) if lean_decode else None
    built_for = find(TARGETS, target)
    head_steps = built_for.head_steps if head_steps is None else head_steps or None
    specs = stages(config, lean_decode=lean, head_steps=head_steps)
    job = Job(
        checkpoint=checkpoint,
        config=config,
        target=built_for,
        precisions=_precisions(specs, precision, stage_precisions or {}, float_layers or {}),
        named=frozenset(stage_precisions or {}),
        float_layers=dict(float_layers or {}),
        verify=verify,
        tools=_tool_versions(),
        code=_code_digest(),
    )
    _check_target(job)
    engine_builder: Builder = OnnxBuilder()
    if builder != engine_builder.name:
        engine_builder = TorchTensorRt.of(checkpoint, config, job.precisions, job.target)
    check_out(out, force)
    tokenizer = None if job.config.is_class_conditional else read_tokenizer(checkpoint / "tokenizer")
    _check_checkpoint(job, specs)
    sources = {
        part: fingerprint(checkpoint / part) for part in sorted({spec.part for spec in specs.values()})
    }
    statistics = load_calibration(Path(calibration), sources) if calibration else None
    with work_folder(out) as work:
        source = _float_source(job, lean_decode, head_steps, out, statistics, report)
        statistics = source.statistics if source else statistics
        job = replace(job, source=source, statistics=statistics, rankings=_float_paths(out)[2])
        folders = [work, out, *([source.bundle.folder] if source else [])]
        records = _records(job, specs, sources, folders, report)
        files = {path: entry for record in records.values() for path, entry in record["files"].items()}
        if tokenizer is not None:
            (work / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            files[TOKENIZER] = file_entry(work / TOKENIZER)
        compiled, compiled_files = adopt_engines([work, out], work, records)
        files |= compiled_files
        manifest = {
            "format": FORMAT_VERSION,
            "nova_export": nova_export.__version__,
            "target": job.target.name,
            "tools": job.tools,
            "source": {"name": checkpoint.resolve().name, "parts": sources},
            "config": job.config.to_dict(),
            "lean_decode": lean,
            "head_steps": head_steps,
            "tokenizer": TOKENIZER if tokenizer is not None else None,
            "stages": {name: {**record, "files": list(record["files"])} for name, record in records.items()},
            "engines": compiled,
            "files": files,
        }
        write_json(work / MANIFEST, manifest)
        if engines:
            made = build_engines(work, job.target.name, builder=engine_builder, report=report)
            files = dict(made.files)
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
    of_all = find(PRECISIONS, precision)
    return {name: find(PRECISIONS, own[name]) if name in own else of_all.of_stage(name) for name in specs}


def _frame_type(precision: str) -> str:
    """Of what goes between the pieces of a lean decode: as the pieces are, where numpy knows the type."""
    return "float16" if find(PRECISIONS, precision).of_stage(START).half == "float16" else "float32"


def _check_target(job: Job) -> None:
    """Raises UsageError for a precision that a target cannot have."""
    target = job.target
    for stage, precision in job.precisions.items():
        if target != CPU and precision.fastest_of:
            raise UsageError(
                f"auto takes what is fastest on this machine, which says nothing of {target.name}; name a "
                "precision"
            )
        if target.opset < BLOCKS_OPSET and precision.block:
            raise UsageError(
                f"stage {stage}: {precision.name} has scales for blocks of weights, which target "
                f"{target.name} cannot read; name fp16 or int8"
            )


def _float_paths(out: Path) -> tuple[Path, Path, Path]:
    """Of a build in integers, until it is done: the float32 bundle, the calibration, rankings of layers."""
    bundle, kept, rankings = (f".{out.name}.{what}" for what in ("fp32", "calibration.npz", "rankings"))
    return out.parent / bundle, out.parent / kept, out.parent / rankings


def _float_source(
    job: Job,
    lean_decode: bool,
    head_steps: int | None,
    out: Path,
    statistics: Statistics | None,
    report: Report,
) -> FloatSource | None:
    """What stages in integers are made from; None where there are none."""
    wanted = [each for precision in job.precisions.values() for each in contained(precision)]
    if not any(precision.weights for precision in wanted):
        return None
    bundle, kept, _ = _float_paths(out)
    build_bundle(
        job.checkpoint,
        bundle,
        target=job.target.name,
        lean_decode=lean_decode,
        head_steps=head_steps or 0,
        verify=job.verify,
        force=True,
        report=report,
    )
    inputs = any(precision.inputs for precision in wanted)
    if inputs and statistics is None:
        report("calibration", "running the loops")
    return FloatSource.open(bundle, statistics, inputs, kept)


def _check_checkpoint(job: Job, specs: dict[str, Stage]) -> None:
    """What is wrong with a checkpoint comes out now, not after an hour of exporting its other stages."""
    make_schedule(job.config.scheduler, num_steps=1)
    sizes = {name: check_weights(spec, job.config, job.checkpoint) for name, spec in specs.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    needed, there = export_bytes(sizes[largest]), available_memory()
    if there is not None and needed > there:
        raise MemoryShortage(
            f"exporting {largest} takes about {needed / GB:.1f} GB of memory, and {there / GB:.1f} GB are "
            "free; add swap, or build on a larger machine: bundles can be copied"
        )


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


def _records(
    job: Job, specs: Mapping[str, Stage], sources: Mapping[str, str], folders: Sequence[Path], report: Report
) -> dict[str, dict[str, Any]]:
    """Every stage's manifest entry: of an earlier run if it is still good, else of building it now.

    folders: the first is where stages are built, all are where they may be already.
    """
    work = folders[0]
    keys = {name: _stage_key(job, spec, sources[spec.part]) for name, spec in specs.items()}
    records: dict[str, dict[str, Any]] = {}

    def keep(name: str, record: dict[str, Any]) -> None:
        records[name] = {**record, "key": keys[name]}
        write_json(work / f"{name}.json", records[name])

    for name in specs:
        if record := _finished(name, keys[name], folders, job.verify):
            report(name, "reused")
            keep(name, record)
    missing = [spec for name, spec in specs.items() if name not in records]
    for name, record in build_stages(job, missing, work, report):
        keep(name, record)
    return {name: records[name] for name in specs}


def _finished(name: str, key: str, folders: Sequence[Path], verify: bool) -> dict[str, Any] | None:
    """A stage's record that is in one of the folders and has this key; its files are in the first then."""
    for folder in folders:
        record = read_record(folder, name)
        if (
            record
            and record.get("key") == key
            and (record.get("verified") or not verify)
            and adopt(record, folder, folders[0])
        ):
            return record
    return None


def _stage_key(job: Job, spec: Stage, part: str) -> str:
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
    if job.statistics and any(each.inputs or each.half for each in contained(precision)):
        facts.append(job.statistics.digest())
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
        package / "lean_stages.py",
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
