"""CUDA without a GPU: memory is the machine's own.

As on a real one, nothing happens before the host waits for the stream, in the order in which it was asked
for; memory that was freed is overwritten. Streams know nothing of each other: what one of them allocated is
for it alone.
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

    streams: what waits on each; priorities: of each. While one is captured, work is recorded and not done;
    what waits, allocates or frees then spoils it. graphs: what executables do, by handle; begun, launched,
    waits: how often.
    """

    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=4)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamDefault = 0

    def __init__(self, memory: int = 1 << 40) -> None:
        self.memory = memory
        self.live: dict[int, Any] = {}
        self.mapped: set[int] = set()  # what is not freed yet, as the stream sees it
        self.freed: list[Any] = []  # kept, so that no address comes twice
        self.uploads: list[int] = []
        self.streams: dict[int, list[Work]] = {}
        self.priorities: dict[int, int] = {}
        self.of_stream: dict[int, int] = {}  # by address
        self.kept_after_free = 0
        self.recorded: list[Work] | None = None
        self.recording = 0  # the stream
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

    def cudaDeviceGetStreamPriorityRange(self) -> tuple[int, int, int]:
        return 0, 0, -5

    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[int, int]:
        stream = 7 + len(self.streams)
        self.streams[stream], self.priorities[stream] = [], priority
        return 0, stream

    def cudaMallocAsync(self, size: int, stream: int) -> tuple[int, int]:
        assert size > 0
        if self.spoils(stream):
            return self.error, 0
        if size + sum(map(len, list(self.live.values()))) > self.memory:
            return self._failed(2), 0
        memory = (ctypes.c_ubyte * size)(*([JUNK] * min(size, 64)))
        pointer = ctypes.addressof(memory)
        self.live[pointer] = memory
        self.of_stream[pointer] = stream
        self.mapped.add(pointer)
        return 0, pointer

    def cudaFreeAsync(self, pointer: int, stream: int) -> tuple[int]:
        if self.spoils(stream):
            return (self.error,)
        assert self.of_stream.pop(pointer) == stream
        memory = self.live.pop(pointer)
        self.freed.append(memory)

        def free() -> None:
            ctypes.memset(pointer, JUNK, len(memory))
            self.mapped.discard(pointer)

        self.do(stream, free)
        return (0,)

    def cudaMemcpyAsync(self, to: int, start: int, size: int, kind: int, stream: int) -> tuple[int]:
        kinds = self.cudaMemcpyKind
        if kind != kinds.cudaMemcpyDeviceToHost:
            self.check_owner(to, stream)
        if kind != kinds.cudaMemcpyHostToDevice:
            self.check_owner(start, stream)
        if kind == kinds.cudaMemcpyHostToDevice and not self.captures(stream):
            self.uploads.append(size)
            staged = ctypes.string_at(start, size)
            self.do(stream, lambda: ctypes.memmove(to, staged, size))
        else:
            self.do(stream, lambda: ctypes.memmove(to, start, size))
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if self.spoils(stream):
            return (self.error,)
        self.waits += 1
        waiting = self.streams[stream]
        while waiting:
            waiting.pop(0)()
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert mode == 1 and self.recorded is None
        self.recorded, self.recording, self.spoiled = [], stream, False
        self.begun += 1
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:
        assert self.recorded is not None and stream == self.recording
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
        assert self.recorded is None
        self.launched += 1
        self.streams[stream].extend(self.graphs[executable])
        return (0,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[int]:
        del self.graphs[executable]
        return (0,)

    def do(self, stream: int, work: Work) -> None:
        """When it is its turn on the stream; in a capture, whenever that is launched."""
        if self.recorded is not None and self.captures(stream):
            self.recorded.append(work)
        else:
            self.streams[stream].append(work)

    def captures(self, stream: int) -> bool:
        return self.recorded is not None and stream == self.recording

    def spoils(self, stream: int) -> bool:
        """Whether it is being captured, which what is done now spoils."""
        if self.captures(stream):
            self.spoiled = True
            self._failed(900)
        return self.captures(stream)

    def check_owner(self, address: int, stream: int) -> None:
        """Of memory that work on a stream uses."""
        inside = [start for start, held in list(self.live.items()) if start <= address < start + len(held)]
        assert [self.of_stream[start] for start in inside] == [stream], "memory of another stream"

    def _failed(self, status: int) -> int:
        self.error = status
        return status
