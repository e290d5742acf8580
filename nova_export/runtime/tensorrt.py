"""A stage's engine on TensorRT, or TensorRT for RTX: through cuda-python, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nova_export.engine.flavour import error_logger, flavour
from nova_export.errors import BundleError, StageError
from nova_export.runtime.cuda import Gpu
from nova_export.runtime.device_array import DeviceArray
from nova_export.runtime.runner import Held
from nova_export.spec import Stage


class TensorRtRunner:
    """Outputs stay on the GPU. stage: the spec within the engine's limits. runtime: of `FLAVOURS`.

    The engine computes in the scratch memory that all stages of `gpu` share.
    """

    def __init__(self, stage: Stage, path: Path, runtime: str, gpu: Gpu) -> None:
        self.stage, self.path, self.gpu = stage, path, gpu
        self._flavour = flavour(runtime)
        self._engine: Any = None
        self._context: Any = None

    def __enter__(self) -> TensorRtRunner:
        trt = self._flavour.load()
        self._logger = error_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is not None:
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self._context = self._engine.create_execution_context(strategy)
        if self._context is None:
            raise BundleError(
                f"{self.path}: {self._flavour.name} {trt.__version__} cannot load it: {self._said()}; "
                "`nova-export engines BUNDLE` compiles it again, --device cpu does without"
            )
        self._on_host = {
            tensor.name
            for tensor in self.stage.inputs
            if self._engine.get_tensor_location(tensor.name) == trt.TensorLocation.HOST
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context = self._engine = self._runtime = None  # in this order: each needs the next

    def run(self, inputs: Mapping[str, Held]) -> dict[str, DeviceArray]:
        """Outputs by name, before they are computed: reading one waits. Raises StageError."""
        self.stage.bind(inputs)
        if self._context is None:
            raise StageError(f"stage {self.stage.name}: its runner is not open; use it in a with block")
        held: dict[str, Any] = {}
        for name, array in inputs.items():
            held[name], address = self._place(name, array)
            if not (
                self._context.set_input_shape(name, tuple(array.shape))
                and self._context.set_tensor_address(name, address)
            ):
                raise self._failed(f"does not take input {name!r} of shape {tuple(array.shape)}")
        outputs: dict[str, DeviceArray] = {}
        for tensor in self.stage.outputs:
            # Graphs write aliased outputs in place; engines only where they say so themselves.
            shape = tuple(self._context.get_tensor_shape(tensor.name))
            alias = self._aliased(tensor.name)
            made = held[alias] if alias else self.gpu.empty(shape, tensor.dtype)
            self._context.set_tensor_address(tensor.name, made.pointer)
            outputs[tensor.name] = made
        size = self._engine.device_memory_size_v2
        self._context.set_device_memory(self.gpu.arena(size), size)
        if not self._context.execute_async_v3(self.gpu.stream):
            raise self._failed("failed")
        return outputs

    def _place(self, name: str, array: Held) -> tuple[Any, int]:
        """The input where the engine reads it, and its address. Few are read on the host: sizes of others."""
        if name in self._on_host:
            host = np.ascontiguousarray(array)
            return host, host.ctypes.data
        place = array if isinstance(array, DeviceArray) else self.gpu.upload(array)
        return place, place.pointer

    def _aliased(self, output: str) -> str | None:
        """The input whose memory the engine writes this output to; versions before 10.15 know of none."""
        ask = getattr(self._engine, "get_aliased_input_tensor", None)
        return ask(output) if ask else None

    def _failed(self, how: str) -> StageError:
        return StageError(f"stage {self.stage.name}: {self._flavour.name} {how}: {self._said()}")

    def _said(self) -> str:
        return self._logger.errors[-1] if self._logger.errors else "it does not say why"
