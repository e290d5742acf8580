"""ONNX graph -> serialized engine, in a process of its own: this module run as a program, the job on stdin.

TensorRT keeps memory that it once had, and a Ctrl-C reaches it only between steps; a process that ends gives
all back. The job and what comes of it are JSON: lines of progress, then the result or the error.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nova_export.child import die_with_parent, environment, memory
from nova_export.engine.flavour import FLAVOURS, error_logger
from nova_export.engine.layers import layers_of
from nova_export.engine.timing_cache import keep_timings, use_timings
from nova_export.errors import ExportError, NovaExportError
from nova_export.onnx_files import module_of
from nova_export.runtime.media import write_whole

NO_KERNEL = "not supported by a dedicated kernel"  # how TensorRT says that an attention is not fused
MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")

KEPT, REFITTABLE, STRIPPED = "kept", "refittable", "stripped"
WEIGHTS = {KEPT: (), REFITTABLE: ("REFIT",), STRIPPED: ("STRIP_PLAN",)}  # in an engine, and the flags for it

Shape = tuple[int, ...]
Report = Callable[[str], object]  # what is being done


@dataclass(frozen=True)
class CompileJob:
    """profile: by input, its least, usual and largest shape. compute_capability: "8.9"; None for this GPU.
    weights: of WEIGHTS. timings: the file of engine/timing_cache.py; None without one."""

    flavour: str
    graph: str
    out: str
    profile: dict[str, tuple[Shape, Shape, Shape]]
    compute_capability: str | None
    weights: str = KEPT
    timings: str | None = None


@dataclass(frozen=True)
class Compiled:
    """attention: "fused", or "decomposed" where no kernel fuses some of it; None without any.
    activation_bytes, weight_bytes: as TensorRT says; None where it did not. peak_bytes: of the process.
    layers: as in engine/layers.py."""

    attention: str | None
    activation_bytes: int | None
    weight_bytes: int | None
    peak_bytes: int
    seconds: float
    layers: Sequence[Mapping[str, Any]]


def compile_engine(job: CompileJob, report: Report = lambda doing: None) -> Compiled:
    """Write `job.out`, whole or not at all. Raises ExportError with what TensorRT says, and where."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "nova_export.engine.compiler"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdin and process.stdout
            with suppress(BrokenPipeError):  # it was ended already; what it said of that comes below
                process.stdin.write(json.dumps(asdict(job)))
                process.stdin.close()
            for line in process.stdout:
                said = json.loads(line)
                if "doing" in said:
                    report(said["doing"])
                elif "error" in said:
                    raise ExportError(said["error"])
                else:
                    return Compiled(**said["result"])
            status = process.wait()
            errors.seek(0)
            last = (errors.read().strip() or "it said nothing").splitlines()[-1]
        finally:
            process.kill()
            process.wait()
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    hint = "; was there too little memory?" if status == -signal.SIGKILL else ""
    raise ExportError(f"compiling {job.graph} was ended {how}: {last}{hint}")


# In the process


def _main() -> None:
    die_with_parent()
    job = CompileJob(**json.load(sys.stdin))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # TensorRT prints too

    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    try:
        say(result=asdict(_compile(job, lambda doing: say(doing=doing))))
    except NovaExportError as error:
        say(error=str(error))


def _compile(job: CompileJob, report: Report) -> Compiled:
    started = time.monotonic()
    trt = FLAVOURS[job.flavour].load()
    found: dict[str, int] = {}
    layers: list[dict[str, Any]] = []

    def listen(said: str) -> None:
        found.update((each[1], int(each[2])) for each in MEMORY.finditer(said))
        layers[:] = layers_of(said) or layers

    logger = error_logger(trt, listen)
    attention: str | None = None

    def build(file: Path) -> None:
        nonlocal attention
        for decompose in (False, True):
            built, attention = _build(trt, logger, job, decompose, report, file)
            if built or not any(NO_KERNEL in error for error in logger.errors):
                break
        if not built:
            name = f"{FLAVOURS[job.flavour].name} {trt.__version__}"
            said = logger.errors[-1] if logger.errors else "it does not say why"
            raise ExportError(f"{name} cannot compile {job.graph}: {said}")

    write_whole(Path(job.out), build)
    peak, seconds = memory("VmHWM"), round(time.monotonic() - started, 2)
    return Compiled(attention, found.get("Activation"), found.get("Weights"), peak, seconds, layers)


def _build(
    trt: Any, logger: Any, job: CompileJob, decompose: bool, report: Report, file: Path
) -> tuple[bool, str | None]:
    """Whether the engine can be had, which is in `file` then, and what became of attention; None without any.

    decompose: whether attention may be made of products and a softmax where no kernel fuses it.
    """
    builder = trt.Builder(logger)
    # TensorRT 11 knows strongly typed networks alone, and older ones make them where asked.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    report("parsing")
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.graph):
        raise ExportError(_explained(parser, Path(job.graph)))
    attentions = _attentions(trt, network)
    for each in attentions:
        each.decomposable = decompose
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # it lists layers when done
    config.progress_monitor = _monitor(trt, report)
    if job.compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(trt, job.compute_capability), 0)
    for flag in WEIGHTS[job.weights]:
        config.set_flag(_flag(trt, flag, job.weights))
    if job.timings:
        use_timings(config, Path(job.timings))
        logger.errors.clear()  # timings of another driver are none
    profile = builder.create_optimization_profile()
    for name, shapes in job.profile.items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    attention = ("decomposed" if decompose else "fused") if attentions else None
    built = _serialize(trt, builder, network, config, file)
    if built and job.timings:
        keep_timings(config, Path(job.timings))
    return built, attention


def _flag(trt: Any, name: str, weights: str) -> Any:
    if not hasattr(trt.BuilderFlag, name):
        raise ExportError(
            f"this version, {trt.__version__}, makes no engines with {weights} weights (BuilderFlag.{name}); "
            "take a newer one, or leave --weights out"
        )
    return getattr(trt.BuilderFlag, name)


def _serialize(trt: Any, builder: Any, network: Any, config: Any, file: Path) -> bool:
    """Compile into a file; part by part, where this version can: else all of it is in memory once more.

    Raises OSError where it cannot be written.
    """
    if not hasattr(builder, "build_serialized_network_to_stream"):
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            file.write_bytes(memoryview(plan))
        return plan is not None
    with file.open("wb") as out:
        writer = _writer(trt, out)
        built: bool = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error:
        raise writer.error
    return built


def _writer(trt: Any, out: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Into a file. Through TensorRT no error comes out: it is kept."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                return out.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()


def _capability(trt: Any, version: str) -> Any:
    name = f"SM{version.replace('.', '')}"
    if not hasattr(trt.ComputeCapability, name):
        known = ", ".join(sorted(each for each in dir(trt.ComputeCapability) if each.startswith("SM")))
        raise ExportError(f"this version, {trt.__version__}, compiles for {known}, not for {name}")
    return getattr(trt.ComputeCapability, name)


def _explained(parser: Any, graph: Path) -> str:
    """The parser's first error, with the node and the PyTorch module that it came from."""
    error = parser.get_error(0)
    where, module = f"node {error.node_name()} ({error.node_operator()})", module_of(graph, error.node_name())
    return f"TensorRT cannot read {graph}: {where}{f' of {module}' if module else ''}: {error.desc()}"


def _attentions(trt: Any, network: Any) -> list[Any]:
    """The attentions of a network, as TensorRT 10.14 and later know them."""
    boundary = getattr(trt, "IAttentionInputLayer", None)
    found = []
    for index in range(network.num_layers if boundary else 0):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = boundary  # a layer comes as its base class
            found.append(layer.attention)
    return found


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells of phases as they begin and go on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.sizes: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.sizes[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            report(f"{phase}, {step + 1} of {self.sizes.get(phase, 0)}")
            return True

        def phase_finish(self, phase: str) -> None:
            self.sizes.pop(phase, None)

    return Monitor()


if __name__ == "__main__":
    _main()
