"""CUDA without a GPU: memory is the machine's own.

As on a real one, nothing happens before the host waits for the stream, in the order in which it was asked
for; memory that was freed is overwritten.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

JUNK = 0xAB

Work = Callable[[], object]


class FakeCuda:
    """The functions of cuda.bindings.runtime that are used. live: bytes by address; uploads: their sizes.

    While a stream is captured, work is recorded and not done; what waits, allocates or frees then spoils it.
    graphs: what executables do, by handle; begun, launched, waits: how often.
    """

    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=4)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, memory: int = 1 << 40) -> None:
        self.memory = memory
        self.live: dict[int, Any] = {}
        self.mapped: set[int] = set()  # what is not freed yet, as the stream sees it
        self.freed: list[Any] = []  # kept, so that no address comes twice
        self.uploads: list[int] = []
        self.waiting: list[Work] = []
        self.kept_after_free = 0
        self.recorded: list[Work] | None = None
        self.spoiled = False
        self.captured: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.begun = self.launched = self.error = self.waits = 0
        self.instantiates = True

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory", 900: b"not permitted in a capture"}.get(status, b"failed")

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.memory - sum(map(len, list(self.live.values()))), self.memory

    def cudaGetLastError(self) -> tuple[int]:
        last, self.error = self.error, 0
        return (last,)

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
        if self.spoils():
            return self.error, 0
        if size + sum(map(len, list(self.live.values()))) > self.memory:
            return self._failed(2), 0
        memory = (ctypes.c_ubyte * size)(*([JUNK] * min(size, 64)))
        pointer = ctypes.addressof(memory)
        self.live[pointer] = memory
        self.mapped.add(pointer)
        return 0, pointer

    def cudaFreeAsync(self, pointer: int, stream: int) -> tuple[int]:
        if self.spoils():
            return (self.error,)
        memory = self.live.pop(pointer)
        self.freed.append(memory)

        def free() -> None:
            ctypes.memset(pointer, JUNK, len(memory))
            self.mapped.discard(pointer)

        self.do(free)
        return (0,)

    def cudaMemcpyAsync(self, to: int, start: int, size: int, kind: int, stream: int) -> tuple[int]:
        assert stream == 7
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice and self.recorded is None:
            self.uploads.append(size)
            staged = ctypes.string_at(start, size)
            self.do(lambda: ctypes.memmove(to, staged, size))
        else:
            self.do(lambda: ctypes.memmove(to, start, size))
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if self.spoils():
            return (self.error,)
        self.waits += 1
        while self.waiting:
            self.waiting.pop(0)()
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert (stream, mode) == (7, 1) and self.recorded is None
        self.recorded, self.spoiled = [], False
        self.begun += 1
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:
        assert stream == 7 and self.recorded is not None
        recorded, self.recorded = self.recorded, None
        if self.spoiled:
            return self._failed(901), None
        self.captured[self.begun] = recorded
        return 0, self.begun

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int | None]:
        assert flags == 0
        if not self.instantiates:
            return self._failed(2), None
        self.graphs[graph + 1000] = self.captured[graph]
        return 0, graph + 1000

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self.captured[graph]
        return (0,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[int]:
        assert stream == 7 and self.recorded is None
        self.launched += 1
        self.waiting.extend(self.graphs[executable])
        return (0,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[int]:
        del self.graphs[executable]
        return (0,)

    def do(self, work: Work) -> None:
        """When it is its turn on the stream; in a capture, whenever that is launched."""
        (self.waiting if self.recorded is None else self.recorded).append(work)

    def spoils(self) -> bool:
        """Whether a stream is being captured, which what is done now spoils."""
        if self.recorded is not None:
            self.spoiled = True
            self._failed(900)
        return self.recorded is not None

    def _failed(self, status: int) -> int:
        self.error = status
        return status
