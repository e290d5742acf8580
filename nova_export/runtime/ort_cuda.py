"""A stage's graph on ONNX Runtime's CUDA provider, bound to memory on the GPU, where its outputs stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nova_export.errors import DependencyError, StageError
from nova_export.runtime.device_array import DeviceArray
from nova_export.runtime.runner import Held, OrtSession
from nova_export.spec import Stage

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "rtx-ep": "NvTensorRTRTXExecutionProvider",
}


class OrtCudaRunner(OrtSession):
    """Outputs stay on the device. device "cpu" does the same in the machine's own memory."""

    def __init__(self, stage: Stage, path: Path, threads: int = 0, device: str = "cuda") -> None:
        super().__init__(stage, path, threads)
        self.device, self.provider = device, PROVIDERS[device]

    def __enter__(self) -> OrtCudaRunner:
        import onnxruntime as ort

        self._check_provider(ort)
        super().__enter__()
        # Where the provider cannot start, ONNX Runtime says so on stderr and takes the CPU.
        if self.provider not in (used := self._session.get_providers()):
            self._session = None
            raise StageError(
                f"stage {self.stage.name}: ONNX Runtime cannot use the GPU and would take {', '.join(used)}; "
                "`nova-export doctor` shows driver and versions, --device cpu does without"
            )
        return self

    def _check_provider(self, ort: Any) -> None:
        """Raises DependencyError where ONNX Runtime does not have it."""
        if self.provider not in ort.get_available_providers():
            raise DependencyError(
                f"this ONNX Runtime {ort.__version__} is not for CUDA: pip install 'nova-export[cuda]', then "
                "pip install --force-reinstall --no-deps onnxruntime-gpu"
            )

    def run(self, inputs: Mapping[str, Held]) -> dict[str, DeviceArray]:
        """Outputs by name. Raises StageError: wrong inputs, or ONNX Runtime failed."""
        with self._running(inputs):
            return self._run(inputs)

    def _run(self, inputs: Mapping[str, Held]) -> dict[str, DeviceArray]:
        import onnxruntime as ort

        binding = self._session.io_binding()
        held: dict[str, DeviceArray] = {}
        for name, array in inputs.items():
            if not isinstance(array, DeviceArray):
                value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)
                array = _of(value)
            held[name] = array
            binding.bind_input(name, self.device, 0, array.dtype.type, array.shape, array.pointer)
        for tensor in self.stage.outputs:
            if tensor.alias:
                place = held[tensor.alias]
                where = place.dtype.type, place.shape, place.pointer
                binding.bind_output(tensor.name, self.device, 0, *where)
            else:
                binding.bind_output(tensor.name, self.device, 0)
        self._session.run_with_iobinding(binding)
        made = dict(zip([t.name for t in self.stage.outputs], binding.get_outputs(), strict=True))
        return {t.name: held[t.alias] if t.alias else _of(made[t.name]) for t in self.stage.outputs}


def _of(value: Any) -> DeviceArray:
    """An OrtValue, which owns its memory."""
    dtype = value.data_type().removeprefix("tensor(").removesuffix(")")
    return DeviceArray(
        value.data_ptr(), tuple(value.shape()), {"float": "float32"}.get(dtype, dtype), value, value.numpy
    )
