"""Targets and precisions as named presets: what a bundle is built for. Frozen data, read by the build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from nova_export.errors import UsageError


@dataclass(frozen=True)
class Target:
    """Where a bundle runs. `opset` of its graphs; 23 has Attention, which ONNX Runtime fuses."""

    name: str
    opset: int


@dataclass(frozen=True)
class Precision:
    """What the weights and the arithmetic of a bundle are."""

    name: str


TARGETS = (Target("cpu", opset=23),)
PRECISIONS = (Precision("fp32"),)

Preset = TypeVar("Preset", Target, Precision)


def find(presets: tuple[Preset, ...], name: str) -> Preset:
    """The preset of that name. Raises UsageError naming those there are."""
    for preset in presets:
        if preset.name == name:
            return preset
    kind = type(presets[0]).__name__.lower()
    raise UsageError(f"{kind} {name!r} is unknown; there is {', '.join(p.name for p in presets)}")
