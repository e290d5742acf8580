"""A builder of TensorRT that measures kernels, which the real one does where there is a GPU.

An engine is JSON: what it was told to be. A kernel is measured once for each input, unless a timing cache
knows it.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np


class FakeTimings:
    """A timing cache."""

    def __init__(self, data: bytes) -> None:
        self.known = set(json.loads(data.removeprefix(b"timings"))) if data else set()

    def serialize(self) -> memoryview:
        return memoryview(b"timings" + json.dumps(sorted(self.known)).encode())


class FakeConfig:
    """A builder's configuration. cache: what was set."""

    def __init__(self, trt: FakeBuilders) -> None:
        self.trt, self.flags = trt, []
        self.cache: FakeTimings | None = None

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def create_timing_cache(self, data: bytes) -> FakeTimings | None:
        if data and not data.startswith(b"timings"):
            self.trt.logger.log(1, "no timing cache")
            if self.trt.refuses == "raises":
                raise RuntimeError("no timing cache")
            return None
        return FakeTimings(data)

    def set_timing_cache(self, cache: FakeTimings | None, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache is None:
            raise TypeError("incompatible function arguments")
        self.cache = cache
        return True

    def get_timing_cache(self) -> FakeTimings | None:
        return self.cache

    def add_optimization_profile(self, profile: dict[str, Any]) -> None:
        self.profile = profile


class FakeBuilders:
    """The part of the module that building takes. measured: kernels, each time. makes: whether engines."""

    __version__ = "10.3.0"
    BuilderFlag = SimpleNamespace(REFIT="REFIT", STRIP_PLAN="STRIP_PLAN")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    ProfilingVerbosity = SimpleNamespace(DETAILED=2)
    IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    ILogger = type(
        "ILogger",
        (),
        {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=0), "__init__": lambda self: None},
    )

    def __init__(self, refuses: str = "returns") -> None:
        self.refuses = refuses
        self.measured: list[str] = []
        self.makes = True

    def Builder(self, logger: Any) -> Any:
        self.logger = logger
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(num_layers=0),
            create_builder_config=lambda: FakeConfig(self),
            create_optimization_profile=FakeProfile,
            build_serialized_network=self._build,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        return SimpleNamespace(parse_from_file=lambda path: True)

    def _build(self, network: Any, config: FakeConfig) -> Any:
        if not self.makes:
            self.logger.log(1, "no kernel for it")
            return None
        for name in config.profile.shapes:
            config.progress_monitor.phase_start("measuring", None, 1)
            if config.cache is None or name not in config.cache.known:
                self.measured.append(name)
            if config.cache is not None:
                config.cache.known.add(name)
            config.progress_monitor.step_complete("measuring", 0)
        return np.frombuffer(json.dumps({"flags": config.flags}).encode(), np.uint8)


class FakeProfile:
    """An optimization profile."""

    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes[name] = shapes
