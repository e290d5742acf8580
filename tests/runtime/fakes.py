"""Runners and a generator that do no work, keep a record, and give results a test can recognise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_export.config import NovaConfig
from nova_export.runtime.runner import Array
from nova_export.spec import Stage
from nova_export.stages import stages

CONTEXT = 7.0  # of frame 0; one more for every frame
FRAME = 1000.0  # a token's value is FRAME * frame + its id + 1


@dataclass
class Record:
    """Every call of a stage, in order: (stage, inputs as they were)."""

    calls: list[tuple[str, dict[str, Array]]] = field(default_factory=list)

    def of(self, name: str) -> list[dict[str, Array]]:
        return [inputs for stage, inputs in self.calls if stage == name]


class FakeRunner:
    """Checks inputs against the spec, records them, and answers by the method named after the stage."""

    def __init__(self, stage: Stage, record: Record) -> None:
        self.stage, self.record = stage, record
        self.frames = 0

    def __enter__(self) -> FakeRunner:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        self.stage.bind(inputs)
        self.record.calls.append((self.stage.name, {name: np.array(array) for name, array in inputs.items()}))
        outputs: dict[str, Array] = getattr(self, self.stage.name)(inputs)
        assert {name: array.shape for name, array in outputs.items()} == self.stage.shapes(
            self.stage.bind(inputs), outputs=True
        )
        return outputs

    def temporal_encoder(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """The context is CONTEXT + the frame's number; rows written to caches are the number + 1."""
        rows = inputs["text"].shape[1] + self.stage.outputs[0].shape[1]
        start = int(inputs["cache_length"][0])
        caches = {t.name: inputs[str(t.alias)] for t in self.stage.outputs if t.alias}
        for cache in caches.values():
            assert not cache[:, start:].any(), "rows behind the filled ones were written before"
            cache[:, start : start + rows] = self.frames + 1
        shape = self.stage.shapes(self.stage.bind(inputs), outputs=True)["context"]
        context = np.full(shape, CONTEXT + self.frames, np.float32)
        self.frames += 1
        return {"context": context, **caches}

    def spatial_encoder(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """z of a token is what the token will be."""
        shape = self.stage.shapes(self.stage.bind(inputs), outputs=True)["z"]
        value = FRAME * (inputs["context"][:, :1, :1] - CONTEXT) + inputs["next_ids"][..., None] + 1
        return {"z": np.broadcast_to(value.astype(np.float32), shape).copy()}

    def diffusion_head(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return {
            "denoised": np.broadcast_to(inputs["z"][0, :, :, :1], inputs["noise"].shape).astype(np.float32)
        }


class FakeRunners:
    """A getter of fake runners for every stage of a config, and the record they share."""

    def __init__(self, config: NovaConfig) -> None:
        self.record = Record()
        self.runners = {name: FakeRunner(stage, self.record) for name, stage in stages(config).items()}

    def __call__(self, name: str) -> Any:
        return self.runners[name]


@dataclass
class RawDraw:
    """One normal tensor of a FakeGenerator: all its values are its number."""

    number: float
    size: int

    def take(self, flat_indices: NDArray[np.int64]) -> NDArray[np.float32]:
        assert flat_indices.min(initial=0) >= 0 and flat_indices.max(initial=0) < self.size
        return np.full(flat_indices.shape, self.number, np.float32)


class FakeGenerator:
    """Records its draws; the values of the n-th normal tensor are all n."""

    def __init__(self, uniform: NDArray[np.float32]) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.normals = 0
        self._uniform = uniform

    def uniform(self, shape: Sequence[int]) -> NDArray[np.float32]:
        self.calls.append(("uniform", tuple(shape)))
        return self._uniform.reshape(tuple(shape))

    def normal_raw(self, size: int) -> RawDraw:
        self.calls.append(("normal", size))
        self.normals += 1
        return RawDraw(self.normals, size)

    def normal_steps(self, size: int, steps: int, flat_indices: NDArray[np.int64]) -> NDArray[np.float32]:
        draws = [self.normal_raw(size).take(flat_indices) for _ in range(steps)]
        return np.array(draws, np.float32).reshape(steps, *flat_indices.shape)
