"""A stage's engine on TensorRT for RTX, which compiles kernels as it runs and captures CUDA graphs itself."""

from __future__ import annotations

import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from nova_export.errors import OutputError
from nova_export.runtime.cuda import Gpu
from nova_export.runtime.media import write_whole
from nova_export.runtime.tensorrt import TensorRtRunner
from nova_export.spec import Stage


class RtxRunner(TensorRtRunner):
    """kernels: the file that keeps what is compiled for this engine on this machine."""

    runtime = "tensorrt-rtx"
    captures = False

    def __init__(
        self,
        stage: Stage,
        path: Path,
        gpu: Gpu,
        kernels: Path,
        cuda_graphs: bool = True,
        weights: Path | None = None,
    ) -> None:
        super().__init__(stage, path, gpu, cuda_graphs, weights)
        self.kernels = kernels
        self._compiled: Kernels | None = None

    def _open(self) -> None:
        self._compiled = Kernels(self._engine.create_runtime_config().create_runtime_cache(), self.kernels)
        self._logger.errors.clear()  # a file of another machine is none
        # Closed or not, and at the program's end: the first run is the one that compiles.
        self._save = weakref.finalize(self, self._compiled.save)
        super()._open()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._compiled:
            self._save()
        super().__exit__(kind, value, trace)
        self._compiled = None  # after the contexts that use it

    def _create_context(self, strategy: Any, graphs: bool) -> Any:
        assert self._compiled
        strategies = self._trt.CudaGraphStrategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
        config.set_runtime_cache(self._compiled.cache)
        return self._engine.create_execution_context(config)


class Kernels:
    """What TensorRT-RTX compiled, kept in a file. Where that cannot be, the next run compiles again."""

    def __init__(self, cache: Any, path: Path) -> None:
        self.cache, self.path = cache, path
        self._kept = self._read()

    def _read(self) -> bytes:
        """What was in the file; nothing if TensorRT-RTX refuses it: damaged, or of another driver."""
        try:
            data = self.path.read_bytes()
            return data if data and self.cache.deserialize(data) else b""
        except (OSError, RuntimeError):
            return b""

    def save(self) -> None:
        """Write the file, unless nothing was compiled since it was read."""
        serialized = self.cache.serialize()
        data = b"" if serialized is None else bytes(serialized)
        if data and data != self._kept:
            with suppress(OSError, OutputError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.path, lambda file: file.write_bytes(data))
