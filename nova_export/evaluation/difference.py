"""How far tensors are from their reference, summed up call by call: no tensor is kept. Numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HALF_MAX = 65504.0  # the largest number of float16, where overflow is cut off


def finite(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if math.isfinite(value) else None


@dataclass
class Difference:
    """Sums over everything that was added. Numbers that are not finite count apart, and in no sum."""

    count: int = 0
    not_finite: int = 0  # in the tested tensors, where the reference is finite
    saturated: int = 0  # tested numbers at float16's end or beyond, where the reference's are not
    cut: int = 0  # numbers of a tested layer's inputs beyond its integers of 8 bits; told by who looks there
    reference_power: float = 0.0
    tested_power: float = 0.0
    product: float = 0.0
    error_power: float = 0.0
    max_error: float = 0.0
    max_reference: float = 0.0

    def add(self, reference: NDArray[Any], tested: NDArray[Any]) -> None:
        """Two tensors of the same shape. Raises ValueError for others."""
        if reference.shape != tested.shape:
            raise ValueError(f"shapes {reference.shape} and {tested.shape} differ")
        a, b = reference.astype(np.float64).ravel(), tested.astype(np.float64).ravel()
        held = np.isfinite(b)
        self.count += a.size
        self.not_finite += int((~held & np.isfinite(a)).sum())
        self.saturated += int(((np.abs(b) >= HALF_MAX) & (np.abs(a) < HALF_MAX)).sum())
        held &= np.isfinite(a)
        if not held.all():
            a, b = a[held], b[held]
        error = b - a
        self.reference_power += float(a @ a)
        self.tested_power += float(b @ b)
        self.product += float(a @ b)
        self.error_power += float(error @ error)
        self.max_error = max(self.max_error, float(np.abs(error).max(initial=0)))
        self.max_reference = max(self.max_reference, float(np.abs(a).max(initial=0)))

    @property
    def cosine(self) -> float:
        """Of the angle between all reference numbers and all tested ones; 1 where both are zero."""
        scale = math.sqrt(self.reference_power * self.tested_power)
        if scale:
            return self.product / scale
        return float(self.reference_power == self.tested_power)

    @property
    def snr(self) -> float:
        """Reference power over error power, in dB; infinite where they are equal."""
        if not self.error_power:
            return math.inf
        return 10 * math.log10(self.reference_power / self.error_power) if self.reference_power else -math.inf

    def to_dict(self) -> dict[str, Any]:
        """As JSON, which has no infinity: `snr_db` is None where nothing differs (or nothing is there)."""
        return {
            "count": self.count,
            "cosine": self.cosine,
            "snr_db": finite(self.snr),
            "max_error": self.max_error,
            "max_reference": self.max_reference,
            "not_finite": self.not_finite,
            "saturated": self.saturated,
            "cut": self.cut,
        }
