"""CUDA through cuda-python: a GPU's memory, and a stream in whose order everything happens there."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_export.errors import DependencyError, StageError
from nova_export.runtime.device_array import DeviceArray
from nova_export.runtime.runner import Held

MODULE = "cuda.bindings.runtime"
MIB = 1 << 20


class Gpu:
    """The machine's first GPU. Memory is allocated and freed in the order of the stream, so never waited for.

    Each has a stream and a scratch memory of its own, and what is in the memory of one is not for another's
    stream. yields: its kernels wait where those of others are ready.
    Raises DependencyError without cuda-python, StageError where CUDA fails.
    """

    def __init__(self, yields: bool = False) -> None:
        try:
            self._cuda: Any = importlib.import_module(MODULE)
        except ImportError as error:
            raise DependencyError(
                f"engines run through cuda-python, which is not usable here ({error}); "
                "pip install 'cuda-bindings>=12.8'"
            ) from error
        self._keep_freed_memory()
        least, most = self._call("cudaDeviceGetStreamPriorityRange")
        flags = self._cuda.cudaStreamDefault
        self.stream = int(self._call("cudaStreamCreateWithPriority", flags, least if yields else most))
        self._arena = Arena(self)

    def _keep_freed_memory(self) -> None:
        """Else all that is free goes back to the driver whenever the host waits for the GPU."""
        pool = self._call("cudaDeviceGetDefaultMemPool", 0)
        everything = importlib.import_module("cuda.bindings.driver").cuuint64_t(2**64 - 1)
        which = self._cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        self._call("cudaMemPoolSetAttribute", pool, which, everything)

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that nobody has."""
        free, _ = self._call("cudaMemGetInfo")
        return int(free)

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Memory of its own, freed when nothing refers to it any more."""
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)  # empty ones need an address too
        pointer = int(
            self._call("cudaMallocAsync", size, self.stream, doing=f"allocating {size / MIB:.0f} MiB")
        )
        owner = _Memory()
        weakref.finalize(owner, self._cuda.cudaFreeAsync, pointer, self.stream).atexit = False

        def fetch() -> NDArray[Any]:
            host = np.empty(shape, dtype)
            self._copy(host.ctypes.data, pointer, host.nbytes, "cudaMemcpyDeviceToHost")
            self._call("cudaStreamSynchronize", self.stream)
            return host

        return DeviceArray(pointer, shape, dtype, owner, fetch, self.join)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """A copy on the GPU. The array may be changed or freed afterwards: pageable memory is staged."""
        held = self.empty(array.shape, str(array.dtype))
        self.write(held.pointer, array)
        return held

    def write(self, to: int, array: Held) -> None:
        """Copy an array, of the host or the GPU, to an address of the GPU."""
        if isinstance(array, DeviceArray):
            self._copy(to, array.pointer, array.nbytes, "cudaMemcpyDeviceToDevice")
        else:
            array = np.ascontiguousarray(array)
            self._copy(to, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def join(self, rows: Sequence[Sequence[DeviceArray]]) -> DeviceArray:
        """Rows of parts (1, n, d) as one array: a row's behind one another, rows of equal length."""
        first = rows[0][0]
        shape = (len(rows), sum(part.shape[1] for part in rows[0]), *first.shape[2:])
        held = self.empty(shape, str(first.dtype))
        to = held.pointer
        for part in chain.from_iterable(rows):
            self.write(to, part)
            to += part.nbytes
        return held

    def read(self, start: int, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """A copy, in memory of its own, of what lies at an address of the GPU."""
        held = self.empty(shape, dtype)
        self._copy(held.pointer, start, held.nbytes, "cudaMemcpyDeviceToDevice")
        return held

    def arena(self, size: int) -> int:
        """Where `size` bytes of scratch begin that all stages share: one runs at a time."""
        return self._arena.at_least(size)

    def free_arena(self) -> None:
        """Its next use makes another one."""
        self._arena.free()

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` puts on the stream, as a graph that was not run. Raises StageError."""
        try:
            with _no_garbage_collection():
                return self._capture(enqueue)
        except StageError:
            self._cuda.cudaGetLastError()  # forgets it: else who asks after a later call hears of this one
            raise

    def _capture(self, enqueue: Callable[[], None]) -> Graph:
        # Thread-local: what other threads ask of the GPU meanwhile is none of this.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        except BaseException:
            self._cuda.cudaStreamEndCapture(self.stream)  # else the stream runs nothing any more
            raise
        captured = self._call("cudaStreamEndCapture", self.stream)
        try:
            executable = self._call("cudaGraphInstantiate", captured, 0)
        finally:
            self._cuda.cudaGraphDestroy(captured)
        graph = Graph(lambda: self._call("cudaGraphLaunch", executable, self.stream))
        weakref.finalize(graph, self._cuda.cudaGraphExecDestroy, executable).atexit = False
        return graph

    def _copy(self, to: int, start: int, size: int, kind: str) -> None:
        if size:
            direction = getattr(self._cuda.cudaMemcpyKind, kind)
            self._call("cudaMemcpyAsync", to, start, size, direction, self.stream)

    def _call(self, name: str, *arguments: Any, doing: str = "") -> Any:
        """What a function of the CUDA runtime gives, without its status."""
        status, *values = getattr(self._cuda, name)(*arguments)
        if int(status) != 0:
            _, text = self._cuda.cudaGetErrorString(status)
            said = text.decode() if isinstance(text, bytes) else str(text)
            hint = ". Smaller batches, shorter videos, --low-memory and --vae-tile need less" if doing else ""
            raise StageError(f"CUDA failed {doing or f'in {name}'}: {said}{hint}")
        return values[0] if len(values) == 1 else tuple(values)


class Graph:
    """Work that was captured; `launch` puts all of it on the stream. Destroyed with this, once it has run."""

    def __init__(self, launch: Callable[[], object]) -> None:
        self.launch = launch


class Arena:
    """Memory that is used again and again, as large as its largest use. It moves where it grows."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._held: DeviceArray | None = None

    def at_least(self, size: int) -> int:
        """Where `size` bytes begin."""
        if self._held is None or self._held.nbytes < size:
            self.free()  # before the larger one is there
            self._held = self._gpu.empty((size,), "uint8")
        return self._held.pointer

    def free(self) -> None:
        self._held = None


class _Memory:
    """Stands for memory of the GPU: it is freed with this."""


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What it frees would be freed within a capture, and spoil that."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
