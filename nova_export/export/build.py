"""Checkpoint -> bundle, stage by stage: load, export, verify, free. Resumable, and atomic at the end.

Work goes on in a hidden folder beside the bundle. A stage finished there, or in the bundle being replaced, is
used again while its key (weights, config, spec, code, tools, precision) is the same. One rename makes it the
bundle.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

import nova_export
from nova_export.bundle import FORMAT_VERSION, MANIFEST, sha256
from nova_export.config import NovaConfig
from nova_export.errors import BundleError, CheckpointError, OutputError, UsageError
from nova_export.export.onnx_export import export_onnx
from nova_export.export.precision import change_precision, check_gate
from nova_export.export.verify import check_cases, reference_cases
from nova_export.runtime.runner import OrtRunner
from nova_export.runtime.schedule import make_schedule
from nova_export.spec import Stage
from nova_export.stages import stages
from nova_export.targets import PRECISIONS, TARGETS, Precision, Target, find
from reference_model.checkpoint import Weights, check_weights, load_module
from reference_model.tokenizer import read_tokenizer

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "diffusers", "numpy")
TOKENIZER = "tokenizer.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Report = Callable[[str, str], object]  # stage name, what is being done to it


@dataclass(frozen=True)
class Job:
    """What is built from what. Nothing in it changes while a build runs."""

    checkpoint: Path
    config: NovaConfig
    target: Target
    precisions: dict[str, Precision]  # by stage
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
    verify: bool = True,
    force: bool = False,
    report: Report = lambda stage, action: None,
) -> Path:
    """Write the bundle `out` of a checkpoint folder and return its path.

    precision: of all stages but those of `stage_precisions`, which name their own.

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
        precisions=_precisions(specs, precision, stage_precisions or {}),
        verify=verify,
        tools=_tool_versions(),
        code=_code_digest(),
    )
    _check_out(out, force)
    tokenizer = None if job.config.is_class_conditional else read_tokenizer(checkpoint / "tokenizer")
    _check_checkpoint(job, specs)
    sources = {
        part: fingerprint(checkpoint / part) for part in sorted({spec.part for spec in specs.values()})
    }
    with _work_folder(out) as work:
        records = {
            name: _finished_or_built(job, spec, sources[spec.part], work, out, report)
            for name, spec in specs.items()
        }
        files = {path: entry for record in records.values() for path, entry in record["files"].items()}
        if tokenizer is not None:
            (work / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            files[TOKENIZER] = _entry(work / TOKENIZER)
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
        _write_json(work / MANIFEST, manifest)
        _publish(work, out, {MANIFEST, *files})
    return out


def _precisions(specs: Collection[str], precision: str, own: Mapping[str, str]) -> dict[str, Precision]:
    """The precision of every stage. Raises UsageError for an unknown stage or precision."""
    if unknown := own.keys() - set(specs):
        raise UsageError(f"stage {min(unknown)!r} is unknown; this checkpoint has {', '.join(specs)}")
    return {name: find(PRECISIONS, own.get(name, precision)) for name in specs}


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
    job: Job, spec: Stage, source: str, work: Path, out: Path, report: Report
) -> dict[str, Any]:
    """The stage's manifest entry: of an earlier run if it is still good, else of building it now."""
    key = _stage_key(job, spec, source)
    for folder in (work, out):
        record = _read_record(folder, spec.name)
        if (
            record
            and record.get("key") == key
            and (record.get("verified") or not job.verify)
            and _adopt(record, folder, work)
        ):
            report(spec.name, "reused")
            break
    else:
        record = {"key": key, **_build_stage(job, spec, work, report)}
    _write_json(work / f"{spec.name}.json", record)
    return record


def _build_stage(job: Job, spec: Stage, work: Path, report: Report) -> dict[str, Any]:
    """Export one stage into `work` and compare it with the reference. Frees its weights."""
    report(spec.name, "loading")
    module = load_module(spec, job.config, job.checkpoint)
    graph = work / f"{spec.name}.onnx"
    paths = [graph, graph.with_name(graph.name + ".data")]
    for path in paths:
        path.unlink(missing_ok=True)  # it may be a link to the file of the bundle that is being replaced
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
    return {
        "spec": spec.to_dict(),
        "graph": graph.name,
        "files": {path.name: _entry(path) for path in paths if path.exists()},
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


def _stage_key(job: Job, spec: Stage, source: str) -> str:
    facts = [
        spec.to_dict(),
        job.config.to_dict(),
        source,
        job.target.name,
        asdict(job.precisions[spec.name]),
        job.tools,
        job.code,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """What a finished stage left in a work folder or a bundle; None where there is nothing usable."""
    try:
        if (folder / f"{name}.json").exists():
            return dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        record = manifest["stages"][name]
        return {**record, "files": {path: manifest["files"][path] for path in record["files"]}}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _adopt(record: dict[str, Any], folder: Path, work: Path) -> bool:
    """Whether the record's files are whole; links those of another folder into `work`."""
    try:
        if any(_entry(folder / path) != entry for path, entry in record["files"].items()):
            return False
        for path in record["files"] if folder != work else ():
            (work / path).unlink(missing_ok=True)
            os.link(folder / path, work / path)
    except (OSError, BundleError):
        return False
    return True


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _check_out(out: Path, force: bool) -> None:
    if not out.parent.is_dir():
        raise OutputError(
            f"{out.parent}: no such folder; make it first, or choose another place for the bundle"
        )
    if not os.access(out.parent, os.W_OK):
        raise OutputError(f"{out.parent}: is not writable; choose another place for the bundle")
    if out.exists() and not (out / MANIFEST).exists():
        raise OutputError(f"{out}: exists and is no bundle; choose another name, it will not be overwritten")
    if out.exists() and not force:
        raise OutputError(f"{out}: exists; give --force to replace it, stages that did not change are kept")


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """The hidden sibling where a build leaves its finished stages until all are there."""
    work = out.parent / f".{out.name}.partial"
    try:
        work.mkdir(exist_ok=True)
        lock = (work / ".lock").open("w")
    except OSError as error:
        raise OutputError(f"{work}: {error.strerror}; choose another place for the bundle") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{work}: another build of this bundle is running; wait for it or stop it"
            ) from None
        try:
            yield work
        except BaseException as error:
            with suppress(OSError):
                _drop_unfinished(work)
            if not isinstance(error, OSError):
                raise
            room = "when there is room" if error.errno in NO_ROOM else "when that is mended"
            kept = f"; finished stages are kept in {work}" if work.exists() else ""
            raise OutputError(
                f"{error.filename or work}: {error.strerror or error}; "
                f"run the same command again {room}{kept}"
            ) from error


def _drop_unfinished(work: Path) -> None:
    """Of a build that did not end, keep the finished stages alone; without any, nothing."""
    if not work.exists() or (work / MANIFEST).exists():
        return  # it became the bundle, or was about to
    keep = {".lock"}
    for record in work.glob("*.json"):
        data = _read_record(work, record.stem)
        if data and "files" in data and "key" in data:
            keep |= {record.name, *data["files"]}
    for path in work.iterdir():
        if path.name not in keep:
            path.unlink(missing_ok=True)
    if keep == {".lock"}:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, out: Path, keep: set[str]) -> None:
    """Drop what is not part of the bundle, then put the folder in its place."""
    for path in work.iterdir():
        if path.name not in keep:
            path.unlink()
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, data: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    temporary.replace(path)


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
    sources += (package.parent / "reference_model").rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()
