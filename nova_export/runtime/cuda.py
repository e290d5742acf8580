"""CUDA through cuda-python: a GPU's memory, and the one stream in whose order everything happens there."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_export.errors import DependencyError, StageError
from nova_export.runtime.device_array import DeviceArray

MODULE = "cuda.bindings.runtime"
MIB = 1 << 20


class Gpu:
    """The machine's first GPU. Memory is allocated and freed in the order of the stream, so never waited for.

    Raises DependencyError without cuda-python, StageError where CUDA fails.
    """

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module(MODULE)
        except ImportError as error:
            raise DependencyError(
                f"engines run through cuda-python, which is not usable here ({error}); "
                "pip install 'cuda-bindings>=12.8'"
            ) from error
        self._keep_freed_memory()
        self.stream = int(self._call("cudaStreamCreate"))
        self._arena: DeviceArray | None = None

    def _keep_freed_memory(self) -> None:
        """Else all that is free goes back to the driver whenever the host waits for the GPU."""
        pool = self._call("cudaDeviceGetDefaultMemPool", 0)
        everything = importlib.import_module("cuda.bindings.driver").cuuint64_t(2**64 - 1)
        which = self._cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        self._call("cudaMemPoolSetAttribute", pool, which, everything)

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

        return DeviceArray(pointer, shape, dtype, owner, fetch)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """A copy on the GPU. The array may be changed or freed afterwards: pageable memory is staged."""
        held = self.empty(array.shape, str(array.dtype))
        array = np.ascontiguousarray(array)
        self._copy(held.pointer, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        return held

    def arena(self, size: int) -> int:
        """Where `size` bytes of scratch begin that all stages share: one runs at a time."""
        if self._arena is None or self._arena.nbytes < size:
            self._arena = None  # freed before the larger one is there
            self._arena = self.empty((size,), "uint8")
        return self._arena.pointer

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
        return values[0] if values else None


class _Memory:
    """Stands for memory of the GPU: it is freed with this."""
