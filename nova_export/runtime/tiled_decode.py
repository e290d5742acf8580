"""A decoder over parts of the frame, blended where they overlap: for devices on which the whole does not fit.

Not exact: a group norm's statistics are then those of a part. docs/engines.md says how far that is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

OVERLAP = 4  # neighbours share at least the side divided by this


def decode_in_tiles(decoder: Callable[[Floats], Floats], side: int, latents: Floats) -> Floats:
    """Latents (1, C, l, h, w) to pixels (1, 3, F, H, W), in squares of at most `side` latents."""
    height, width = latents.shape[-2:]
    if side >= max(height, width):
        return decoder(latents)
    blended: list[Floats] = []
    for top, left in product(starts(height, side), starts(width, side)):
        part = decoder(np.ascontiguousarray(latents[..., top : top + side, left : left + side]))
        scale = part.shape[-2] // min(side, height)
        if not blended:
            shape = (*part.shape[:-2], height * scale, width * scale)
            blended = [np.zeros(shape, np.float32), np.zeros(shape[-2:], np.float32)]
        tall, wide = part.shape[-2:]
        weight = np.outer(_tent(tall, side * scale // OVERLAP), _tent(wide, side * scale // OVERLAP))
        for total, values in zip(blended, (part * weight, weight), strict=True):
            total[..., top * scale : top * scale + tall, left * scale : left * scale + wide] += values
    pixels, weights = blended
    return pixels / weights


def starts(size: int, side: int) -> list[int]:
    """Where squares begin that cover `size` latents, spread evenly; all lie inside."""
    if size <= side:
        return [0]
    count = math.ceil((size - side) / max(1, side - max(1, side // OVERLAP))) + 1
    return [round(index * (size - side) / (count - 1)) for index in range(count)]


def _tent(size: int, ramp: int) -> Floats:
    """Weights of pixels along a side: they rise over `ramp` pixels from either end."""
    index = np.arange(size, dtype=np.float32) + np.float32(0.5)
    return np.minimum(np.minimum(index, size - index), np.float32(max(ramp, 1)))
