"""The two packages of one API that compile engines, TensorRT for RTX and TensorRT, and the GPU at hand."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nova_export.errors import DependencyError, UsageError

COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Flavour:
    """module: what is imported. extra: of this package, what brings it. strips_without_gpu: whether it makes
    engines whose weights come later where there is no GPU."""

    name: str
    module: str
    extra: str
    strips_without_gpu: bool = True

    def load(self) -> Any:
        """The module. Raises DependencyError where it is not installed, or cannot be loaded."""
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # OSError: a library of CUDA's is missing
            raise DependencyError(
                f"{self.name} is not usable here ({error}); pip install 'nova-export[{self.extra}]'. On a "
                "Jetson it comes with JetPack"
            ) from error


FLAVOURS = {
    "tensorrt-rtx": Flavour("TensorRT-RTX", "tensorrt_rtx", "rtx", strips_without_gpu=False),
    "tensorrt": Flavour("TensorRT", "tensorrt", "tensorrt"),
}


def flavour(name: str | None) -> Flavour:
    """Raises UsageError for a runtime that has no engines."""
    if name not in FLAVOURS:
        raise UsageError(f"runtime {name!r} has no engines; those that have are {', '.join(FLAVOURS)}")
    return FLAVOURS[name]


def error_logger(trt: Any, also: Callable[[str], object] = lambda message: None) -> Any:
    """A logger for this flavour's module that keeps errors. also: told every other message."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip())
            else:
                also(message)

    return Logger()


def machine_capability() -> str | None:
    """Compute capability of this machine's first GPU, like "8.9"; None where there is none."""
    numbers = [ctypes.c_int(), ctypes.c_int()]
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0)
        for number, attribute in zip(numbers, COMPUTE_CAPABILITY, strict=True):
            failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0)
    except (OSError, AttributeError):
        failed = True
    return None if failed else ".".join(str(number.value) for number in numbers)
