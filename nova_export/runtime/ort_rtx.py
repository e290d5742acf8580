"""A stage's graph on ONNX Runtime's plugin of TensorRT for RTX, which compiles it for the GPU as it loads.

Memory is bound as for CUDA: ONNX Runtime knows the plugin's by that name too.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from nova_export.errors import DependencyError
from nova_export.runtime.ort_cuda import OrtCudaRunner
from nova_export.spec import Stage

PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL = "pip install 'nova-export[rtx-ep]'"

_registered: set[str] = set()  # by path; ONNX Runtime takes each once a process


class OrtRtxRunner(OrtCudaRunner):
    """Outputs stay on the device, as in `OrtCudaRunner`."""

    def __init__(self, stage: Stage, path: Path, threads: int = 0, device: str = "cuda") -> None:
        super().__init__(stage, path, threads, device)
        self._devices: list[Any] = []

    def _check_provider(self, ort: Any) -> None:
        self.provider, self._devices = plugin_devices(ort)

    def _make(self, ort: Any, options: Any) -> Any:
        options.add_provider_for_devices(self._devices, {})
        return ort.InferenceSession(str(self.path), options)


def plugin_devices(ort: Any) -> tuple[str, list[Any]]:
    """The plugin's name for itself, and the GPUs that it runs on. Raises DependencyError without either."""
    try:
        plugin = importlib.import_module(PLUGIN)
        name, library = plugin.get_ep_name(), str(plugin.get_library_path())
        register = ort.register_execution_provider_library
    except (ImportError, OSError, AttributeError) as error:
        raise DependencyError(
            f"ONNX Runtime {ort.__version__} has no plugin of TensorRT-RTX here ({error}); {INSTALL}, which "
            "needs 1.24 and no onnxruntime-gpu beside it"
        ) from error
    if library not in _registered:
        try:
            register(name, library)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise DependencyError(
                f"ONNX Runtime {ort.__version__} cannot load the plugin of TensorRT-RTX: {error}; it needs "
                "an RTX GPU and its driver: `nova-export doctor` shows them, --device cpu does without"
            ) from error
        _registered.add(library)
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise DependencyError(
            "the plugin of TensorRT-RTX finds no GPU that it runs on, an RTX 30 or later; --device cuda or "
            "--device cpu does without"
        )
    return name, devices[:1]
