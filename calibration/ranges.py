"""From statistics to formats: the range of a layer's input that 8 bits stand for, and factors that even it.

Every method gives a candidate, and the one with the least expected error is taken, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.statistics import LayerInput

STEPS = 255
PERCENTILES = (99.9, 99.99, 99.999)
SHRINKS = np.linspace(1.0, 0.3, 29)
STRENGTHS = (0.25, 0.5, 0.75)  # of smoothing: how much of a channel's width goes over to its weights
LEAST_GAIN = 0.7  # of the error that smoothing must leave at most, to be worth a Mul


@dataclass(frozen=True)
class Range:
    """low .. high in 255 steps; error: the expected squared error of a value. method: what gave it."""

    low: float
    high: float
    error: float
    method: str

    @property
    def step(self) -> float:
        return (self.high - self.low) / STEPS


def best_range(seen: LayerInput, symmetric: bool) -> Range:
    """The candidate with the least expected error. symmetric: as for signed integers, with zero at 0."""
    return min(candidates(seen, symmetric), key=lambda each: each.error)


def candidates(seen: LayerInput, symmetric: bool) -> Iterator[Range]:
    """Min-max, percentiles of both ends, and the least squared error over narrower and narrower ranges."""
    ends = [("min-max", seen.low, seen.high)]
    if total := int(seen.counts.sum()):
        below = np.cumsum(seen.counts) / total
        for percentile in PERCENTILES:
            cut = 1 - percentile / 100
            first, last = np.searchsorted(below, (cut, 1 - cut)).clip(max=len(below) - 1)
            low, high = seen.centres[first], seen.centres[last]
            ends.append((f"percentile {percentile}", max(low, seen.low), min(high, seen.high)))
        ends += [("mse", seen.low * part, seen.high * part) for part in SHRINKS[1:]]
    for method, low, high in ends:
        low, high = min(low, 0.0), max(high, 0.0)  # zero must be a number of the range
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        if high - low < 1e-12:
            low, high = -1.0, 1.0  # all zero
        yield Range(float(low), float(high), _error(seen, low, high), method)


def _error(seen: LayerInput, low: float, high: float) -> float:
    """Rounding makes a twelfth of a step's square where a value is inside, being cut what is cut off."""
    total = int(seen.counts.sum())
    if not total:
        return 0.0
    centres = seen.centres
    cut = centres - np.clip(centres, low, high)
    rounding = ((high - low) / STEPS) ** 2 / 12
    inside = (centres >= low) & (centres <= high)
    return float((seen.counts * (cut * cut + inside * rounding)).sum() / total)


def smoothing(
    seen: LayerInput, weight: NDArray[np.float32], plain: Range, symmetric: bool
) -> tuple[NDArray[np.float32], Range] | None:
    """Factors (channels,) that divide the input, and its range then; None where that gains too little.

    weight (channels, outputs). Errors are those expected of the layer's output where input and weights are
    rounded and independent: step^2 / 12 times the other side's squares.
    """
    if not seen.rows or not seen.largest.any():
        return None
    power = seen.squares / seen.rows  # (channels,): mean square
    before = _output_error(plain.error, power, weight)
    best = None
    wide, tall = seen.largest.clip(min=1e-6), np.abs(weight).max(1).clip(min=1e-6)
    for strength in STRENGTHS:
        factors = (wide**strength / tall ** (1 - strength)).astype(np.float32)
        factors /= np.exp(np.log(factors).mean())
        high = float((seen.largest / factors).max())
        low = -high if symmetric else -float((-seen.low if seen.low < 0 else 0) / factors.min())
        low = max(low, -high)
        range_ = Range(low, high, ((high - low) / STEPS) ** 2 / 12, f"smoothed {strength}")
        after = _output_error(range_.error, power / factors**2, weight * factors[:, None])
        if after < LEAST_GAIN * before and (best is None or after < best[0]):
            best = after, factors, range_
    return best and best[1:]


def _output_error(input_error: float, power: NDArray[np.float64], weight: NDArray[np.float32]) -> float:
    steps = np.abs(weight).max(0) / 127  # (outputs,)
    return float(input_error * np.square(weight).sum() + np.square(steps).sum() / 12 * power.sum())
