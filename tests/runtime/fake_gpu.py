"""CUDA and TensorRT without a GPU: memory is the machine's own, and an engine's file names an ONNX graph.

As on a real one, nothing happens before the host waits for the stream, in the order in which it was asked
for; memory that was freed is overwritten.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from nova_export.bundle import MANIFEST, Bundle, EngineEntry, file_entry

VERSION, CAPABILITY, TARGET = "1.2.3", "8.9", "rtx-40"
JUNK = 0xAB


class FakeCuda:
    """The functions of cuda.bindings.runtime that are used. live: bytes by address; uploads: their sizes."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=4)

    def __init__(self, memory: int = 1 << 40) -> None:
        self.memory = memory
        self.live: dict[int, Any] = {}
        self.freed: list[Any] = []  # kept, so that no address comes twice
        self.uploads: list[int] = []
        self.waiting: list[Callable[[], object]] = []
        self.kept_after_free = 0

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory"}.get(status, b"failed")

    def cudaDeviceGetDefaultMemPool(self, device: int) -> tuple[int, str]:
        return 0, "pool"

    def cudaMemPoolSetAttribute(self, pool: str, attribute: int, value: int) -> tuple[int]:
        assert (pool, attribute) == ("pool", 4)
        self.kept_after_free = value
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:
        return 0, 7

    def cudaMallocAsync(self, size: int, stream: int) -> tuple[int, int]:
        assert stream == 7 and size > 0
        if size + sum(map(len, self.live.values())) > self.memory:
            return 2, 0
        memory = (ctypes.c_ubyte * size)(*([JUNK] * min(size, 64)))
        self.live[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaFreeAsync(self, pointer: int, stream: int) -> tuple[int]:
        memory = self.live.pop(pointer)
        self.freed.append(memory)
        self.waiting.append(lambda: ctypes.memset(pointer, JUNK, len(memory)))
        return (0,)

    def cudaMemcpyAsync(self, to: int, start: int, size: int, kind: int, stream: int) -> tuple[int]:
        assert stream == 7
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.uploads.append(size)
            staged = ctypes.string_at(start, size)
            self.waiting.append(lambda: ctypes.memmove(to, staged, size))
        else:
            self.waiting.append(lambda: ctypes.memmove(to, start, size))
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        while self.waiting:
            self.waiting.pop(0)()
        return (0,)


class FakeTensorRt:
    """The part of the module that running takes. on_host: inputs that engines read on the host."""

    __version__ = VERSION
    ILogger = type(
        "ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=0), "__init__": lambda self: None}
    )
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    TensorLocation = SimpleNamespace(HOST=1, DEVICE=0)

    def __init__(self, cuda: FakeCuda, aliases: bool = False, on_host: tuple[str, ...] = ()) -> None:
        self.cuda, self.aliases, self.on_host = cuda, aliases, on_host
        self.scratch: set[int] = set()  # addresses of what engines computed in
        self.fails = ""

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine(logger, data))

    def _engine(self, logger: Any, data: bytes) -> Any:
        if not data.startswith(b"/"):
            logger.log(1, "magic tag does not match")
            return None
        return FakeEngine(self, logger, Path(data.decode()))


class FakeEngine:
    device_memory_size_v2 = 4096

    def __init__(self, trt: FakeTensorRt, logger: Any, graph: Path) -> None:
        import onnxruntime as ort

        self.trt, self.logger = trt, logger
        self.session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    def create_execution_context(self, strategy: int) -> FakeContext:
        assert strategy == 2
        return FakeContext(self)

    def get_tensor_location(self, name: str) -> int:
        return int(name in self.trt.on_host)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.removeprefix("new_") if self.trt.aliases and name.startswith("new_") else None


class FakeContext:
    """Runs the graph with ONNX Runtime, on what lies at the addresses that it was given."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.session = engine, engine.session
        self.types = {each.name: self._dtype(each.type) for each in self._tensors()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def _tensors(self) -> list[Any]:
        return [*self.session.get_inputs(), *self.session.get_outputs()]

    @staticmethod
    def _dtype(name: str) -> np.dtype[Any]:
        return np.dtype({"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}[name])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, name
        self.addresses[name] = address
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        cuda = self.engine.trt.cuda
        assert size == self.engine.device_memory_size_v2 and len(cuda.live[memory]) >= size
        self.engine.trt.scratch.add(memory)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        feeds = {i.name: np.zeros(self.shapes[i.name], self.types[i.name]) for i in self.session.get_inputs()}
        return tuple(self.session.run([name], feeds)[0].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        if self.engine.trt.fails:
            self.engine.logger.log(1, self.engine.trt.fails)
            return False
        shapes, addresses, on_host = dict(self.shapes), dict(self.addresses), self.engine.trt.on_host
        for output in self.addresses.keys() - self.shapes.keys():
            shared = {name for name in self.shapes if self.addresses[name] == self.addresses[output]}
            assert shared <= {self.engine.get_aliased_input_tensor(output)}, f"{output} overwrites {shared}"
        now = {name: self._read(name, shapes, addresses) for name in on_host if name in shapes}

        def compute() -> None:
            feeds = {name: self._read(name, shapes, addresses) for name in shapes} | now
            names = [output.name for output in self.session.get_outputs()]
            for name, array in zip(names, self.session.run(names, feeds), strict=True):
                ctypes.memmove(addresses[name], array.ctypes.data, array.nbytes)

        self.engine.trt.cuda.waiting.append(compute)
        return True

    def _read(self, name: str, shapes: dict[str, Any], addresses: dict[str, int]) -> Any:
        size = int(np.prod(shapes[name])) * self.types[name].itemsize
        data = ctypes.string_at(addresses[name], size)
        return np.frombuffer(data, self.types[name]).reshape(shapes[name])


def add_engines(bundle: Path, **made_of: str) -> None:
    """Put engines for TARGET into a bundle, each a file that names the stage's graph."""
    opened = Bundle.open(bundle)
    manifest = json.loads((bundle / MANIFEST).read_text())
    made_of = {
        "runtime": "TensorRT-RTX", "version": VERSION, "compute capability": CAPABILITY, **made_of
    }  # fmt: skip
    engines = {}
    (bundle / "engines").mkdir()
    for name, stage in opened.stages.items():
        file = f"engines/{name}.engine"
        (bundle / file).write_text(str(bundle / stage.graph))
        manifest["files"][file] = file_entry(bundle / file)
        entry = EngineEntry(file, stage.spec, made_of, None, None, None, 0, 0.0)
        engines[name] = {**vars(entry), "spec": stage.spec.to_dict()}
    manifest["engines"] = {TARGET: engines}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
