"""One stage of a bundle: exported, changed to its precision, and judged."""

from __future__ import annotations

import ctypes
import gc
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from calibration.statistics import Statistics
from nova_export.bundle import file_entry
from nova_export.config import NovaConfig
from nova_export.errors import ExportError
from nova_export.export.onnx_export import export_onnx
from nova_export.export.precision import Verdict, change_precision, check_gate, judge, runnable_here
from nova_export.export.quantization import FloatSource, FormName, compare_on_runs, quantize_stage
from nova_export.export.sensitivity import spared_layers
from nova_export.export.speed import median_seconds
from nova_export.export.verify import PlainRunner, check_cases, reference_cases
from nova_export.export.work_folder import adopt, read_record
from nova_export.runtime.runner import OrtRunner
from nova_export.spec import Stage
from nova_export.targets import CPU, FP32, Precision, Target, contained
from reference_model.checkpoint import load_module

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
    statistics: Statistics | None = None
    source: FloatSource | None = None  # where there are stages in integers
    rankings: Path | None = None  # where rankings of layers are kept


@dataclass(frozen=True)
class Form:
    """A stage in integers: its graph, what the gate says of it, and what the manifest keeps."""

    graph: Path
    verdict: Verdict
    verified: dict[str, Any]


Forms = dict[FormName, Form]  # the second name is that of the precision


def build_stages(
    job: Job, specs: Sequence[Stage], work: Path, report: Report
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Build stages in their precisions into `work`: of each, as it is done, its name and manifest entry.

    Those in integers come first, judged all together in one pass of the loops. Raises ExportError where a
    stage cannot be had in its precision.
    """
    wanted = [
        (spec, precision)
        for spec in specs
        for precision in contained(job.precisions[spec.name])
        if precision.weights and precision.is_for(spec.name)
    ]
    with ExitStack() as stack:
        forms = {}
        if wanted:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
            forms = _integer_forms(job, wanted, folder, report)
        in_integers = {spec.name for spec, _ in wanted}
        for spec in sorted(specs, key=lambda spec: spec.name not in in_integers):
            yield spec.name, _build_stage(job, spec, forms, work, report)


def _build_stage(job: Job, spec: Stage, forms: Forms, work: Path, report: Report) -> dict[str, Any]:
    precision = job.precisions[spec.name]
    if job.source and precision.fastest_of:
        return _fastest_stage(job, job.source, spec, forms, work, report)
    if job.source and precision.weights:
        return _integer_stage(job, job.source, spec, forms[spec.name, precision.name], work)
    return _float_stage(job, spec, work, report)


def _integer_forms(
    job: Job,
    wanted: Sequence[tuple[Stage, Precision]],
    folder: Path,
    report: Report,
    spared: Sequence[str] = (),
) -> Forms:
    """Stages in integers, in `folder`. spared: layers that stay in float beside those that the job names."""
    source = job.source
    assert source is not None
    graphs: dict[FormName, Path] = {}
    changes: dict[FormName, dict[str, Any]] = {}
    for spec, precision in wanted:
        key = spec.name, precision.name
        report(spec.name, f"changing to {precision.name}")
        graphs[key] = folder / precision.name / f"{spec.name}.onnx"
        graphs[key].parent.mkdir(exist_ok=True)
        float_layers = [*job.float_layers.get(spec.name, ()), *spared]
        made = quantize_stage(source, spec.name, graphs[key], precision, job.target, float_layers)
        changes[key] = {**made, "float_layers": float_layers}
    _return_memory()  # float32 weights that the graphs were made of are mapped, and the gate loads them again
    report("gate of integers", "running the loops")
    differences = compare_on_runs(source, graphs)
    forms = {}
    for spec, precision in wanted:
        key = spec.name, precision.name
        verdict = judge(differences[key], precision)
        forms[key] = Form(graphs[key], verdict, {**verdict.to_dict(), **changes[key]})
    return forms


def _integer_stage(job: Job, source: FloatSource, spec: Stage, form: Form, work: Path) -> dict[str, Any]:
    """A stage in integers, or in float32 if it is not good enough. Raises ExportError if it was named."""
    precision = job.precisions[spec.name]
    if not form.verdict.lost:
        return _record_of_form(spec, form, precision, work)
    if spec.name in job.named:
        raise ExportError(f"stage {spec.name}: {form.verdict.lost}")
    warnings.warn(f"stage {spec.name} stays in fp32: {form.verdict.lost}", stacklevel=2)
    record = read_record(source.bundle.folder, spec.name)
    assert record is not None and adopt(record, source.bundle.folder, work)
    return {**record, "refused": {"precision": precision.name, **form.verdict.to_dict()}}


def _fastest_stage(
    job: Job, source: FloatSource, spec: Stage, forms: Forms, work: Path, report: Report
) -> dict[str, Any]:
    """The stage in the fastest of several precisions that pass their gates, timed here, side by side.

    Integers that do not pass get another chance with the layers that cost the most in float.
    """
    whole = source.bundle.folder
    records, refused = {FP32.name: read_record(whole, spec.name)}, {}
    folders = {FP32.name: whole}
    with ExitStack() as stack:
        for precision in contained(job.precisions[spec.name]):
            if precision == FP32 or not precision.is_for(spec.name):
                continue
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
            try:
                if precision.weights:
                    form = forms[spec.name, precision.name]
                    if form.verdict.lost:
                        form = _spared_form(job, source, spec, precision, form, folder, report)
                    records[precision.name] = _record_of_form(spec, form, precision, folder)
                else:
                    one = replace(job, precisions={spec.name: precision})
                    records[precision.name] = _float_stage(one, spec, folder, report)
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


def _spared_form(
    job: Job, source: FloatSource, spec: Stage, precision: Precision, form: Form, folder: Path, report: Report
) -> Form:
    """The form with as few of its costliest layers in float as let it pass. Raises ExportError."""
    assert job.rankings is not None
    told = partial(report, spec.name)
    for spared in spared_layers(source, spec.name, precision, job.target, job.rankings, told):
        [form] = _integer_forms(job, [(spec, precision)], folder, report, spared).values()
        if not form.verdict.lost:
            return form
    raise ExportError(f"stage {spec.name}: {form.verdict.lost}")


def _record_of_form(spec: Stage, form: Form, precision: Precision, work: Path) -> dict[str, Any]:
    """The entry in the manifest, with the files moved to `work`."""
    graph = _fresh_graph(spec, work)
    for path in _graph_files(form.graph):
        path.replace(graph.with_name(path.name))
    return _record(spec, graph, precision, form.verified)


def _float_stage(job: Job, spec: Stage, work: Path, report: Report) -> dict[str, Any]:
    """Export one stage into `work` and compare it with the reference. Frees its weights."""
    report(spec.name, "loading")
    module = load_module(spec, job.config, job.checkpoint)
    graph = _fresh_graph(spec, work)
    report(spec.name, "exporting")
    export_onnx(spec, module, graph, job.target.opset)
    precision = job.precisions[spec.name]
    gated = precision.half is not None  # what cannot pass its gate is not written, asked to verify or not
    checked = job.verify or gated
    cases = reference_cases(spec, job.config, module) if checked else []
    _free(module)
    changes: dict[str, Any] = {}
    if gated:
        report(spec.name, f"changing to {precision.name}")
        seen = job.statistics.largest_of(spec.name) if job.statistics else None
        changes = change_precision(spec, graph, precision, job.target, cases, seen)
        _return_memory()  # the float32 weights' file, which is replaced, was mapped
    verified = None
    if checked:
        report(spec.name, "verifying")
        check = partial(check_gate, precision=precision) if gated else check_cases
        with tempfile.TemporaryDirectory(dir=work) as folder:
            here = runnable_here(graph, precision, job.target, Path(folder))
            kind = PlainRunner if gated and job.target != CPU else OrtRunner
            with kind(spec, here) as runner:
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
