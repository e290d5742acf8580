"""Time and memory of a bundle, stage by stage and end to end, side by side with PyTorch given a checkpoint.

Everything that is compared runs in one process, turn by turn, so that a slow minute of the machine hits all
alike; memory is measured in fresh processes. Returns plain data; `format_table` shows it.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nova_export.bundle import Bundle
from nova_export.config import NovaConfig
from nova_export.errors import Cancelled
from nova_export.export.contenders import Run, Subject, TorchDevice, contenders
from nova_export.export.peak_memory import measure
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.runner import Held, Lent, Runner
from nova_export.runtime.stage_runners import StageRunners
from nova_export.spec import Stage
from nova_export.tables import markdown
from reference_model.eager import EagerPipeline

TOOLS = ("nova-export", "onnxruntime", "torch", "numpy")
PAUSE = 0.05  # seconds between runs: thread pools spin on for a while, into the next one's time
AR_STEPS = 4  # of the end-to-end call, unless it is told

Report = Callable[[str, str], object]  # stage name, what is being done


@dataclass(frozen=True)
class Options:
    """What to measure, and how long.

    sizes: axis name -> size, such as predicted, next, steps, rows; the other axes as their spec is tuned.
    stages: None for all. arguments: of the end-to-end call, over one image of AR_STEPS steps.
    budget: seconds for the timed runs of one stage, and of end to end; each contender has two runs at least,
    one of them not counted. threads: 0 leaves their number to each library. device, cuda_graphs: as of
    `StageRunners`; memory is measured on the CPU alone.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    stages: tuple[str, ...] | None = None
    end_to_end: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 7
    budget: float = 60.0
    threads: int = 0
    device: str = "cpu"
    cuda_graphs: bool = True
    compile: bool = False
    memory: bool = True


def bench(
    bundle: str | Path,
    against: str | Path | None = None,
    options: Options | None = None,
    report: Report = lambda stage, action: None,
) -> dict[str, Any]:
    """Measure a bundle, and the checkpoint `against` in PyTorch where one is given.

    Raises BundleError or CheckpointError for what cannot be loaded, UsageError for an impossible size.
    """
    options = options or Options()
    opened, checkpoint = Bundle.open(bundle), Path(against) if against else None
    names = list(opened.stages) if options.stages is None else options.stages
    subjects = [Subject.of(opened, name, options.sizes, checkpoint) for name in names]
    result = {
        "date": date.today().isoformat(),
        "versions": dict(_versions()),
        "machine": machine(options.threads, options.device),
        "bundle": {"name": opened.folder.resolve().name, "target": opened.target},
        "options": asdict(options),
        "stages": [bench_stage(subject, options, report) for subject in subjects],
    }
    if options.end_to_end:
        result["end_to_end"] = bench_end_to_end(opened, checkpoint, options, report)
    return result


def bench_stage(subject: Subject, options: Options, report: Report) -> dict[str, Any]:
    """Every form of one stage on the same sizes. Only this stage is in memory."""
    name = subject.stage.name
    results, notes = _time_forms(subject, options, report)
    gc.collect()  # before other processes want memory
    if options.memory and options.device == "cpu":
        report(name, "measuring memory")
        for kind in results:
            job = {"stage": name, "sizes": subject.sizes}
            results[kind]["memory_bytes"] = measure({**job, **_job(kind, subject, options)})
    return {"stage": name, "sizes": dict(subject.sizes), "results": results, "notes": notes}


def _time_forms(
    subject: Subject, options: Options, report: Report
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Timings by form, and a line for torch.compile where it fails."""
    kinds = [kind for kind in subject.kinds if kind != "compiled" or options.compile]
    notes = []
    report(subject.stage.name, "loading")
    inputs, where = subject.inputs(), (options.threads, options.device, options.cuda_graphs)
    with contenders(kinds, subject, inputs, *where) as runs:
        for kind, run in list(runs.items()):
            try:
                run()  # not counted: the first run allocates, and compiles
            except Exception as error:
                if kind != "compiled":
                    raise
                notes.append(f"torch.compile: {_first_line(error)}")
                del runs[kind]
        report(subject.stage.name, "timing")
        seconds = interleave(runs, options)
    return {kind: _timing(each) for kind, each in seconds.items()}, notes


def bench_end_to_end(
    bundle: Bundle, checkpoint: Path | None, options: Options, report: Report
) -> dict[str, Any]:
    """A whole call, prompt to frames, by the bundle and by the published pipeline; calls of an AR step."""
    arguments = {**call_arguments(bundle.config), **options.arguments}
    report("end to end", "loading")
    runners = StageRunners(bundle, options.device, options.threads, cuda_graphs=options.cuda_graphs)
    counter = CountingStages(runners)
    pipeline = Pipeline.over(bundle, counter, counter.stages.close, vae_tile=runners.vae_tile)
    calls = {"onnx": _per_step(pipeline, arguments, counter)}
    runs: dict[str, Run] = {"onnx": lambda: pipeline(**arguments)}
    if checkpoint is not None:
        if options.threads:
            torch.set_num_threads(options.threads)
        where = TorchDevice.of(options.device)
        eager = EagerPipeline.from_checkpoint(checkpoint).to(where.device, where.dtype)
        with CountOperators() as operators:
            calls["published"] = _per_step(eager, arguments, operators)
        runs["published"] = lambda: eager(**arguments)
    for run in runs.values():
        run()
    report("end to end", "timing")
    results = {kind: _timing(seconds) for kind, seconds in interleave(runs, options).items()}
    pipeline.close()
    for kind in results:
        results[kind]["calls_per_ar_step"] = calls[kind]
        if options.memory and options.device == "cpu":
            report("end to end", f"measuring memory of {kind}")
            subject = Subject(bundle, next(iter(bundle.stages.values())).spec, {}, checkpoint)
            job = {"arguments": arguments, **_job(kind, subject, options)}
            results[kind]["memory_bytes"] = measure(job)
    return {"arguments": arguments, "results": results}


def call_arguments(config: NovaConfig) -> dict[str, Any]:
    """One image, in few AR steps: a full-size frame of 64 takes minutes on a CPU."""
    prompt: Any = 1 if config.is_class_conditional else "a red circle moving right"
    return {"prompt": prompt, "num_inference_steps": AR_STEPS, "seed": 1}


def interleave(runs: Mapping[str, Run], options: Options) -> dict[str, list[float]]:
    """Seconds of each, in turns, `repeats` times or until the budget is spent, once at least."""
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    end = time.monotonic() + options.budget
    for turn in range(options.repeats):
        if turn and time.monotonic() > end:
            break
        for kind, run in runs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            seconds[kind].append(time.perf_counter() - start)
    return seconds


class CountingStages:
    """Stages of a pipeline; counts the calls of their runners."""

    def __init__(self, stages: StageRunners) -> None:
        self.stages, self.count = stages, 0

    def __call__(self, name: str) -> Runner:
        return CountingRunner(self, self.stages(name))


class CountingRunner(Lent):
    """A runner that tells its counter of every call."""

    def __init__(self, counter: CountingStages, runner: Runner) -> None:
        self.counter, self.runner = counter, runner
        self.stage: Stage = runner.stage

    def run(self, inputs: Mapping[str, Held]) -> Mapping[str, Held]:
        self.counter.count += 1
        return self.runner.run(inputs)


class CountOperators(TorchDispatchMode):
    """Counts the operators that torch dispatches: each is a call of a kernel on a GPU, or a few."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _per_step(
    pipeline: Pipeline | EagerPipeline, arguments: Mapping[str, Any], counter: CountingStages | CountOperators
) -> int:
    """What `counter` counts in one AR step: the second, where there is one; the first has the frame's too."""
    counts: list[int] = []

    def stop_at_second(step: object) -> bool:
        counts.append(counter.count)
        return len(counts) < 2

    with suppress(Cancelled):
        pipeline(**arguments, callback=stop_at_second)
    return counts[-1] - (counts[0] if len(counts) > 1 else 0)


def _timing(seconds: list[float]) -> dict[str, Any]:
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "runs": len(seconds)}


def _job(kind: str, subject: Subject, options: Options) -> dict[str, Any]:
    checkpoint = str(subject.checkpoint) if subject.checkpoint else None
    return {
        "kind": kind,
        "bundle": str(subject.bundle.folder),
        "checkpoint": checkpoint,
        "threads": options.threads,
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _versions() -> Iterable[tuple[str, str]]:
    for tool in TOOLS:
        try:
            yield tool, version(tool)
        except PackageNotFoundError:
            continue


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """CPU and GPU, how many threads measurements may use, and how busy the CPU is with other work."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2] for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0].strip() if models else cpu
    return {
        "cpu": cpu,
        "device": device if device == "cpu" else f"{device}, {torch.cuda.get_device_name()}",
        "cores": os.cpu_count(),
        "threads": threads or "default",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
    }


# --- showing it ---


def format_table(result: Mapping[str, Any]) -> str:
    """A markdown table of a result; `times`: how much longer it takes than the bundle."""
    head = ("what", "form", "median", "times", "memory", "calls an AR step", "runs")
    rows = [row for stage in result["stages"] for row in _rows(_label(stage), stage["results"])]
    if "end_to_end" in result:
        rows += _rows("end to end", result["end_to_end"]["results"])
    notes = [f"{stage['stage']}: {note}" for stage in result["stages"] for note in stage["notes"]]
    return "\n".join([markdown(head, rows), *notes])


def _label(stage: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in stage["sizes"].items())
    return f"{stage['stage']} ({sizes})" if sizes else stage["stage"]


def _rows(label: str, results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    base = results["onnx"]["median_s"]
    return [
        (
            label,
            kind,
            _seconds(one["median_s"]),
            f"{one['median_s'] / base:.2f}",
            f"{one['memory_bytes'] / 1e6:.0f} MB" if one.get("memory_bytes") else "-",
            str(one.get("calls_per_ar_step", "-")),
            str(one["runs"]),
        )
        for kind, one in results.items()
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
