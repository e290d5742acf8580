"""TensorRT without a GPU, over `FakeCuda`: an engine's file names an ONNX graph, which ONNX Runtime runs."""

from __future__ import annotations

import ctypes
import json
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nova_export.bundle import MANIFEST, Bundle, EngineEntry, file_entry
from nova_export.engine import compatibility
from nova_export.runtime import stage_runners
from tests.runtime.fake_cuda import JUNK, FakeCuda, Work

VERSION, CAPABILITY, TARGET = "1.2.3", "8.9", "rtx-40"
STRIPPED = b"an engine without weights"
FOUR_FRAMES = {  # a call in which each shape of an AR step comes four times
    "prompt": "a red circle moving right",
    "max_latent_length": 4,
    "num_inference_steps": 3,
    "num_diffusion_steps": 2,
    "seed": 3,
}


class FakeTensorRt:
    """The part of the module that running takes. on_host: inputs that engines read on the host.

    numbers_tensors: as engines of torch-tensorrt do.
    capturable: what contexts answer when asked; None for versions without the question. in_capture: done by
    engines within a capture. contexts: those that are alive.
    """

    __version__ = VERSION
    ILogger = type(
        "ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=0), "__init__": lambda self: None}
    )
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    TensorLocation = SimpleNamespace(HOST=1, DEVICE=0)

    def __init__(
        self,
        cuda: FakeCuda,
        aliases: bool = False,
        on_host: tuple[str, ...] = (),
        capturable: bool | None = None,
        numbers_tensors: bool = False,
    ) -> None:
        self.numbers_tensors = numbers_tensors
        self.cuda, self.aliases, self.on_host, self.capturable = cuda, aliases, on_host, capturable
        self.scratch: set[int] = set()  # addresses of what engines computed in
        self.ran_on: dict[int, set[str]] = {}  # by stream, first outputs of the engines
        self.fails = ""
        self.in_capture: Work = lambda: None
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.most_contexts = 1 << 20

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine(logger, data))

    def Refitter(self, engine: FakeEngine, logger: Any) -> FakeRefitter:
        return FakeRefitter(engine)

    def OnnxParserRefitter(self, refitter: FakeRefitter, logger: Any) -> Any:
        return SimpleNamespace(refit_from_file=partial(refitter.read, logger))

    def _engine(self, logger: Any, data: bytes) -> Any:
        if data == STRIPPED:
            return FakeEngine(self, logger, None)
        if not data.startswith(b"/"):
            logger.log(1, "magic tag does not match")
            return None
        return FakeEngine(self, logger, Path(data.decode()))


class FakeRtx(FakeTensorRt):
    """TensorRT for RTX: compiles a kernel for each shape, and captures graphs itself, if told so.

    compiled: kernels, each time; captures, replays: runs of contexts that took a graph or launched it.
    """

    CudaGraphStrategy = SimpleNamespace(DISABLED=0, WHOLE_GRAPH_CAPTURE=1)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.compiled: list[str] = []
        self.captures = self.replays = 0


class FakeKernels:
    """A runtime cache."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.kernels: set[str] = set()

    def serialize(self) -> memoryview:
        return memoryview(b"kernels" + json.dumps(sorted(self.kernels)).encode())

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            self.logger.log(1, "not a runtime cache")
            return False
        self.kernels = set(json.loads(blob.removeprefix(b"kernels")))
        return True


class FakeConfig:
    """A runtime config."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.strategy, self.cuda_graph_strategy = 0, 0
        self.cache: FakeKernels | None = None

    def create_runtime_cache(self) -> FakeKernels:
        return FakeKernels(self.logger)

    def set_runtime_cache(self, cache: FakeKernels) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy


class FakeRefitter:
    """Gives an engine its weights, in two steps as the real one: they are read, then they are there."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.graph: Path | None = None

    def read(self, logger: Any, path: str) -> bool:
        if not Path(path).name.endswith(".onnx"):
            logger.log(1, f"{path} is no graph")
            return False
        self.graph = Path(path)
        return True

    def refit_cuda_engine(self) -> bool:
        assert self.graph
        self.engine.load(self.graph)
        return True


class FakeEngine:
    """graph: None for one without weights."""

    device_memory_size_v2 = 4096

    def __init__(self, trt: FakeTensorRt, logger: Any, graph: Path | None) -> None:
        self.trt, self.logger = trt, logger
        self.session: Any = None
        if graph is not None:
            self.load(graph)
        if isinstance(trt, FakeRtx):
            self.create_runtime_config = lambda: FakeConfig(logger)

    def load(self, graph: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    def create_execution_context(self, how: int | FakeConfig) -> FakeContext | None:
        assert self.session, "an engine without weights"
        config = how if isinstance(how, FakeConfig) else FakeConfig(self.logger)
        assert config.strategy == 2 if config is how else how == 2
        if len(self.trt.contexts) >= self.trt.most_contexts:
            self.logger.log(1, "no memory for a context")
            return None
        context = FakeContext(self, config)
        self.trt.contexts.add(context)
        return context

    @property
    def tensors(self) -> list[str]:
        """Their names, inputs first."""
        return [each.name for each in (*self.session.get_inputs(), *self.session.get_outputs())]

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return f"arg_{index}" if self.trt.numbers_tensors else self.tensors[index]

    def own_name(self, name: str) -> str:
        """Of a tensor of the graph, by its name in the engine."""
        return self.tensors[int(name.removeprefix("arg_"))] if self.trt.numbers_tensors else name

    def get_tensor_location(self, name: str) -> int:
        return int(self.own_name(name) in self.trt.on_host)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.removeprefix("new_") if self.trt.aliases and name.startswith("new_") else None


class FakeContext:
    """Runs the graph with ONNX Runtime, on what lies at the addresses that it was given."""

    def __init__(self, engine: FakeEngine, config: FakeConfig) -> None:
        self.engine, self.session, self.config = engine, engine.session, config
        self.types = {each.name: self._dtype(each.type) for each in self._tensors()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0
        self.is_new = True  # it has to run once with its shapes before it can be captured
        self.ran_in: tuple[Any, int] = None, 0  # the same place, so often in a row
        if engine.trt.capturable is not None:
            self.is_stream_capturable = lambda stream: engine.trt.capturable

    def _tensors(self) -> list[Any]:
        return [*self.session.get_inputs(), *self.session.get_outputs()]

    @staticmethod
    def _dtype(name: str) -> np.dtype[Any]:
        return np.dtype({"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}[name])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        name = self.engine.own_name(name)
        self.is_new |= self.shapes.get(name) != shape
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, name
        self.addresses[self.engine.own_name(name)] = address
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        cuda = self.engine.trt.cuda
        assert size == self.engine.device_memory_size_v2 and len(cuda.live[memory]) >= size
        self.memory = memory
        self.engine.trt.scratch.add(memory)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape(self.engine.own_name(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        feeds = {i.name: np.zeros(self.shapes[i.name], self.types[i.name]) for i in self.session.get_inputs()}
        return tuple(self.session.run([name], feeds)[0].shape)

    def execute_async_v3(self, stream: int) -> bool:
        trt, cuda = self.engine.trt, self.engine.trt.cuda
        captures = cuda.captures(stream)
        if captures:
            trt.in_capture()
            if self.is_new and cuda.spoils(stream):
                return self._refuses("shapes were not updated before the capture")
        trt.ran_on.setdefault(stream, set()).add(self.session.get_outputs()[0].name)
        if trt.fails or cuda.error:
            return self._refuses(trt.fails or f"CUDA error {cuda.error}")
        self.is_new = False
        place = self._place()
        for address in (self.memory, *(at for name, at in self.addresses.items() if name not in trt.on_host)):
            cuda.check_owner(address, stream)
        for output in self.addresses.keys() - self.shapes.keys():
            shared = {name for name in self.shapes if self.addresses[name] == self.addresses[output]}
            assert shared <= {self.engine.get_aliased_input_tensor(output)}, f"{output} overwrites {shared}"
        on_host = {name: self._read(name, *place[:2]) for name in trt.on_host if name in self.shapes}
        if not captures:
            self._compile_and_count(place)
            cuda.do(stream, lambda: self._compute(place, on_host))
        else:
            cuda.do(stream, partial(replay, weakref.ref(self), place, on_host, self._sizes(place[0])))
        return True

    def _refuses(self, why: str) -> bool:
        self.engine.logger.log(1, why)
        return False

    def _place(self) -> tuple[dict[str, tuple[int, ...]], dict[str, int], int]:
        return dict(self.shapes), dict(self.addresses), self.memory

    def _sizes(self, shapes: dict[str, Any]) -> dict[str, int]:
        """Bytes of the outputs."""
        names = [output.name for output in self.session.get_outputs()]
        return {n: int(np.prod(self._shape(n))) * self.types[n].itemsize for n in names}

    def _compile_and_count(self, place: Any) -> None:
        """As TensorRT-RTX does: each shape's kernel once; a graph at the second run in the same place."""
        trt, cache = self.engine.trt, self.config.cache
        if not isinstance(trt, FakeRtx):
            return
        kernel = f"{self.session.get_outputs()[0].name} {sorted(self.shapes.items())}"
        if cache is None or kernel not in cache.kernels:
            trt.compiled.append(kernel)
        if cache is not None:
            cache.kernels.add(kernel)
        before, times = self.ran_in
        self.ran_in = place, times + 1 if place == before else 1
        if self.config.cuda_graph_strategy:
            trt.captures += self.ran_in[1] == 2
            trt.replays += self.ran_in[1] > 2

    def _compute(self, place: Any, on_host: dict[str, Any]) -> None:
        shapes, addresses, memory = place
        assert memory in self.engine.trt.cuda.mapped, "the scratch memory was freed"
        feeds = {name: self._read(name, shapes, addresses) for name in shapes} | on_host
        names = [output.name for output in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            ctypes.memmove(addresses[name], array.ctypes.data, array.nbytes)

    def _read(self, name: str, shapes: dict[str, Any], addresses: dict[str, int]) -> Any:
        size = int(np.prod(shapes[name])) * self.types[name].itemsize
        data = ctypes.string_at(addresses[name], size)
        return np.frombuffer(data, self.types[name]).reshape(shapes[name])


def replay(
    reference: weakref.ref[FakeContext], place: Any, on_host: dict[str, Any], sizes: dict[str, int]
) -> None:
    """What was captured of a context, which must be as it was then: else it computes anything."""
    context = reference()
    if context is not None and context._place() == place:
        context._compute(place, on_host)
    else:
        for name, size in sizes.items():
            ctypes.memset(place[1][name], JUNK, size)


class Machine:
    """A machine with a GPU, TensorRT and TensorRT for RTX; `trt` is the one of `target`'s engines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: str = TARGET, **options: Any) -> None:
        self._patch = monkeypatch
        self.cuda = FakeCuda()
        rtx = target == TARGET
        self.trt: Any = (FakeRtx if rtx else FakeTensorRt)(self.cuda, **options)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", SimpleNamespace(cuuint64_t=int))
        monkeypatch.setitem(sys.modules, "tensorrt_rtx" if rtx else "tensorrt", self.trt)
        self.has(CAPABILITY)

    def has(self, capability: str | None) -> None:
        for module in (compatibility, stage_runners):
            self._patch.setattr(module, "machine_capability", lambda: capability)


def add_engines(bundle: Path, target: str = TARGET, **made_of: str) -> None:
    """Put engines for a target into a bundle, each a file that names the stage's graph."""
    opened = Bundle.open(bundle)
    manifest = json.loads((bundle / MANIFEST).read_text())
    runtime = "TensorRT-RTX" if target == TARGET else "TensorRT"
    made_of = {"runtime": runtime, "version": VERSION, "compute capability": CAPABILITY, **made_of}
    engines = {}
    (bundle / "engines").mkdir()
    for name, stage in opened.stages.items():
        file = f"engines/{name}.engine"
        stripped = made_of.get("weights") == "stripped"
        (bundle / file).write_bytes(STRIPPED if stripped else str(bundle / stage.graph).encode())
        manifest["files"][file] = file_entry(bundle / file)
        entry = EngineEntry(file, stage.spec, made_of, None, None, None, 0, 0.0)
        engines[name] = {**vars(entry), "spec": stage.spec.to_dict()}
    manifest["engines"] = {target: engines}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
