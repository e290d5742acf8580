"""The two packages of one API that compile engines: TensorRT for RTX, and TensorRT."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from nova_export.errors import DependencyError, UsageError


@dataclass(frozen=True)
class Flavour:
    """module: what is imported. extra: of this package, what brings it."""

    name: str
    module: str
    extra: str

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
    "tensorrt-rtx": Flavour("TensorRT-RTX", "tensorrt_rtx", "rtx"),
    "tensorrt": Flavour("TensorRT", "tensorrt", "tensorrt"),
}


def flavour(name: str | None) -> Flavour:
    """Raises UsageError for a runtime that has no engines."""
    if name not in FLAVOURS:
        raise UsageError(f"runtime {name!r} has no engines; those that have are {', '.join(FLAVOURS)}")
    return FLAVOURS[name]
