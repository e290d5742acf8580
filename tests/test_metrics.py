"""PSNR, SSIM and intervals against values worked out another way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nova_export.evaluation.metrics import C1, C2, LUMA, Frames, psnr, ssim, wilson


def noise(seed: int, shape: tuple[int, ...] = (2, 16, 14, 3)) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_psnr_by_hand() -> None:
    black = np.zeros((3, 8, 8, 3), np.uint8)
    other = black.copy()
    other[1] = 255
    other[2, 0, 0, 0] = 255
    pixels = 8 * 8 * 3
    np.testing.assert_allclose(psnr(black, other), [math.inf, 0, 10 * math.log10(pixels)])
    np.testing.assert_allclose(psnr(other, black), psnr(black, other))  # uint8 must not wrap


def slow_ssim(a: Frames, b: Frames) -> float:
    """Of one frame: the formula of Wang et al., window by window."""
    x, y = (frame.astype(float) @ LUMA for frame in (a, b))
    weights = np.array([[math.exp(-(i * i + j * j) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)])
    weights /= weights.sum()
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            p, q = (image[top : top + 11, left : left + 11] for image in (x, y))
            mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
            var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
            both = (weights * (p - mean_p) * (q - mean_q)).sum()
            top_line = (2 * mean_p * mean_q + C1) * (2 * both + C2)
            found.append(top_line / ((mean_p**2 + mean_q**2 + C1) * (var_p + var_q + C2)))
    return float(np.mean(found))


def test_ssim_is_the_formula() -> None:
    a = noise(1)
    b = np.clip(a + np.random.default_rng(2).normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    found = ssim(a, b)
    np.testing.assert_allclose(found, [slow_ssim(p, q) for p, q in zip(a, b, strict=True)], rtol=1e-9)
    assert (found > 0.5).all() and (found < 0.99).all()


def test_ssim_of_equals_and_of_flat_frames() -> None:
    np.testing.assert_allclose(ssim(noise(1), noise(1)), 1)
    black, white = np.zeros((1, 12, 12, 3), np.uint8), np.full((1, 12, 12, 3), 255, np.uint8)
    np.testing.assert_allclose(ssim(black, white), C1 / (255**2 + C1))


@pytest.mark.parametrize(
    "passed, total, interval",  # from Newcombe 1998, table I
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_as_published(passed: int, total: int, interval: tuple[float, float]) -> None:
    assert wilson(passed, total) == pytest.approx(interval, abs=5e-5)
    low, high = wilson(total - passed, total)
    assert (1 - high, 1 - low) == pytest.approx(interval, abs=5e-5)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0, 1)
