"""Runners: one surface for whatever executes a stage.

A runner is opened with `with`, fed a dict of arrays and gives a dict back. It checks its inputs against the
stage's spec, and may write aliased outputs into the input arrays that they alias. Arrays are numpy's; a
runner on a GPU gives `DeviceArray`s, which others on it take as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nova_export.errors import BundleError, StageError
from nova_export.runtime.device_array import Held as Held
from nova_export.spec import Stage

Array = NDArray[Any]


class Runner(Protocol):
    """What the pipeline asks of ONNX Runtime, TensorRT, PyTorch or a fake."""

    stage: Stage

    def __enter__(self) -> Runner: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def run(self, inputs: Mapping[str, Held]) -> Mapping[str, Held]: ...


LentType = TypeVar("LentType", bound="Lent")


class Lent:
    """Makes a runner of what somebody else opens and closes: its `with` block does nothing."""

    def __enter__(self: LentType) -> LentType:
        return self

    def __exit__(self, *_: object) -> None:
        pass


SessionType = TypeVar("SessionType", bound="OrtSession")


class OrtSession:
    """A stage's graph in ONNX Runtime. `threads` 0 leaves their number to it."""

    provider = "CPUExecutionProvider"
    optimizes = True

    def __init__(self, stage: Stage, path: Path, threads: int = 0) -> None:
        self.stage, self.path, self.threads = stage, path, threads
        self._session: Any = None

    def __enter__(self: SessionType) -> SessionType:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors; they are raised as well
        if not self.optimizes:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Threads of one stage would spin on into the next one's time: benchmarks/LOG.md.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = self._make(ort, options)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise BundleError(
                f"{self.path}: ONNX Runtime {ort.__version__} cannot load it: {error}"
            ) from error
        return self

    def _make(self, ort: Any, options: Any) -> Any:
        """The session itself."""
        return ort.InferenceSession(str(self.path), options, providers=[self.provider])

    def __exit__(self, *_: object) -> None:
        self._session = None

    @contextmanager
    def _running(self, inputs: Mapping[str, Held]) -> Iterator[None]:
        """Raises StageError: wrong inputs, not open, or ONNX Runtime failed."""
        self.stage.bind(inputs)
        if self._session is None:
            raise StageError(f"stage {self.stage.name}: its runner is not open; use it in a with block")
        try:
            yield
        except Exception as error:
            raise StageError(f"stage {self.stage.name}: ONNX Runtime failed: {error}") from error


class OrtRunner(OrtSession):
    """A stage on ONNX Runtime's CPU provider."""

    def run(self, inputs: Mapping[str, Held]) -> dict[str, Array]:
        """Outputs by name. Raises StageError: wrong inputs, or ONNX Runtime failed."""
        with self._running(inputs):
            arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            if any(tensor.alias for tensor in self.stage.outputs):
                return self._run_in_place(arrays)
            names = [tensor.name for tensor in self.stage.outputs]
            return dict(zip(names, self._session.run(names, arrays), strict=True))

    def _run_in_place(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """Bind aliased outputs to their inputs' own memory: kernels that scatter into it copy nothing."""
        import onnxruntime as ort

        binding = self._session.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for tensor in self.stage.outputs:
            if tensor.alias:
                binding.bind_ortvalue_output(tensor.name, values[tensor.alias])
            else:
                binding.bind_output(tensor.name, "cpu")
        self._session.run_with_iobinding(binding)
        fresh = dict(zip([t.name for t in self.stage.outputs], binding.get_outputs(), strict=True))
        return {t.name: arrays[t.alias] if t.alias else fresh[t.name].numpy() for t in self.stage.outputs}
