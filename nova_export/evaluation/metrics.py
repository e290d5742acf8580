"""How alike two videos are, frame by frame, and how sure a share of successes is. Numpy alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Doubles = NDArray[np.float64]

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # pixels; SSIM's Gaussian, as Wang et al. 2004
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
LUMA = np.array([0.299, 0.587, 0.114])  # BT.601
Z95 = 1.959964  # of the normal distribution


def psnr(a: Frames, b: Frames) -> Doubles:
    """Peak signal to noise ratio in dB (F,) of frames uint8 (F, H, W, 3); infinite where they are equal."""
    error = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / error)


def ssim(a: Frames, b: Frames) -> Doubles:
    """Structural similarity (F,) of the luma of frames uint8 (F, H, W, 3), each side at least 11 pixels.

    Mean over the places where the whole window lies in the frame.
    """
    x, y = a @ LUMA, b @ LUMA  # (F, H, W)
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return (likeness / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))).mean((1, 2))


def wilson(passed: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of successes: Wilson's, sound at 0 % and 100 % too."""
    if not total:
        return 0.0, 1.0
    share, z = passed / total, Z95
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((middle + sign * reach) / (1 + z * z / total) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def _smooth(values: Doubles) -> Doubles:
    """Gaussian mean of (F, H, W) around every pixel whose window lies in the frame."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-(offsets**2) / (2 * SIGMA**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        values = np.lib.stride_tricks.sliding_window_view(values, WINDOW, axis) @ kernel
    return values
