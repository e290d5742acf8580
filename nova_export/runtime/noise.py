"""The draws of torch's CPU generator, made with numpy: same seed, same noise as the PyTorch pipeline.

Knows torch's random streams (`torch.Generator("cpu").manual_seed(seed)`, float32 tensors); must not know
what the noise is for. One 32-bit MT19937 stream feeds everything:

- uniform: the low 24 bits of one draw, over 2^24.
- normal, 16 values or more: blocks of 16 uniforms u, Box-Muller across the block's halves:
  x[j] = r cos(a) and x[j + 8] = r sin(a), with r = sqrt(-2 ln(1 - u[j])), a = 2 pi u[j + 8]. A size that
  16 does not divide draws 16 more for its last 16 values, over what the whole blocks had put there.
- normal, fewer than 16 values: Box-Muller in double on 53-bit uniforms, one pair at a time; the second
  value of a pair waits in the generator, across calls, for the next such draw.

Uniforms and blocks equal torch 2.13 on Linux x86 with AVX2 or later bit for bit: every radius, every sine
and every cosine that 2^24 draws allow was compared. Fewer than 16 values: the same formula in double, so at
most one float32 step apart. torch itself moves by up to 2.9e-6 without AVX2 (`ATEN_CPU_CAPABILITY=default`).

Speed, one core of an AMD EPYC with AVX-512: 1.7 ns a draw, 2.3 ns with the transform of 1.6 % of the values,
as in 64-step generation: 0.75 s for the 331 million draws of a 33 x 768 x 480 video.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nova_export.errors import InputError

Floats = NDArray[np.float32]

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1
BLOCK = 16  # values that torch's vector kernel makes together; fewer take the scalar path
CHUNK_DRAWS = 1 << 16  # draws in flight in `normal_steps`: 256 KiB stays in the L2 cache


class RawNoise(Protocol):
    """One normal tensor, drawn; `take` gives values of it by their flat indices."""

    def take(self, flat_indices: NDArray[np.int64]) -> Floats: ...


class Noise(Protocol):
    """What the loops ask of a source of noise: `TorchGenerator` says what each means."""

    def uniform(self, shape: Sequence[int]) -> Floats: ...
    def normal(self, shape: Sequence[int]) -> Floats: ...
    def normal_raw(self, size: int) -> RawNoise: ...
    def normal_steps(self, size: int, steps: int, flat_indices: NDArray[np.int64]) -> Floats: ...


@dataclass(frozen=True)
class RawNormal:
    """The draws of one normal tensor, not yet transformed.

    draws: the uint32s of a tensor of `size` >= 16 values, 16 more than `size` when 16 does not divide it.
    values: a smaller tensor's values, which torch makes one by one; then there are no `draws`.
    """

    size: int
    draws: NDArray[np.uint32]
    values: Floats | None = None

    def take(self, flat_indices: NDArray[np.int64]) -> Floats:
        """`normal(shape).ravel()[flat_indices]`, transforming those values only.

        Raises IndexError for an index outside 0..size - 1.
        """
        indices = _checked(flat_indices, self.size)
        if self.values is not None:
            return self.values[indices]
        radius_at, angle_at, is_sine = _block_positions(indices, self.size)
        return _box_muller(self.draws[radius_at], self.draws[angle_at], is_sine)


class TorchGenerator:
    """`torch.Generator("cpu").manual_seed(seed)`, without torch.

    seed: any integer torch takes, -2^63 to 2^64 - 1, of which MT19937 uses the low 32 bits (two's
    complement). Raises InputError for anything else.
    """

    def __init__(self, seed: int) -> None:
        try:
            self.seed = operator.index(seed)
        except TypeError:
            raise InputError(f"seed must be an integer, not {seed!r}") from None
        if not SEED_MIN <= self.seed <= SEED_MAX:
            raise InputError(f"seed {self.seed} is outside {SEED_MIN}..{SEED_MAX}: choose one in that range")
        bits = np.random.MT19937()
        # RandomState seeds MT19937 as Matsumoto's init_genrand does, and torch too; MT19937(seed) does not.
        seeded = np.random.RandomState(self.seed & 0xFFFFFFFF)
        bits.state = seeded.get_state(legacy=False)  # type: ignore[assignment]
        self._generator = np.random.Generator(bits)
        self._second: float | None = None  # the waiting half of a scalar Box-Muller pair

    def uniform(self, shape: Sequence[int]) -> Floats:
        """`torch.rand(shape)`: float32 in [0, 1), bit exact."""
        return _unit(self._draw(_size(shape))).reshape(tuple(shape))

    def normal(self, shape: Sequence[int]) -> Floats:
        """`torch.randn(shape)`: float32, blocks bit exact (module docstring)."""
        size = _size(shape)
        return self.normal_raw(size).take(np.arange(size)).reshape(tuple(shape))

    def normal_raw(self, size: int) -> RawNormal:
        """Draw for `size` normals (1.7 ns a value) and leave the transform to `RawNormal.take`."""
        if size < BLOCK:
            values = np.array([self._scalar_normal() for _ in range(size)], np.float32)
            return RawNormal(size, np.empty(0, np.uint32), values)
        return RawNormal(size, self._draw(_draws_of(size)))

    def normal_steps(self, size: int, steps: int, flat_indices: NDArray[np.int64]) -> Floats:
        """The values at `flat_indices` of each of `steps` normals of `size` values drawn one after another.

        Returns float32 (steps, *flat_indices.shape). Memory follows the result, not steps x size.
        """
        indices = _checked(flat_indices, size)
        if size < BLOCK:
            small = [self.normal_raw(size).take(indices) for _ in range(steps)]
            return np.array(small, np.float32).reshape(steps, *indices.shape)
        radius_at, angle_at, is_sine = _block_positions(indices, size)
        radius = np.empty((steps, *indices.shape), np.uint32)
        angle = np.empty_like(radius)
        draws_of_step = _draws_of(size)
        chunk = max(1, CHUNK_DRAWS // draws_of_step)
        for first in range(0, steps, chunk):
            here = slice(first, min(first + chunk, steps))
            draws = self._draw((here.stop - first) * draws_of_step).reshape(-1, draws_of_step)
            radius[here] = draws[:, radius_at]
            angle[here] = draws[:, angle_at]
        return _box_muller(radius, angle, is_sine)

    def _draw(self, count: int) -> NDArray[np.uint32]:
        # The full range takes each 32-bit output as it is: the fastest way numpy has to the raw stream.
        return self._generator.integers(0, 2**32, size=count, dtype=np.uint32)

    def _scalar_normal(self) -> float:
        if self._second is not None:
            value, self._second = self._second, None
            return value
        words = self._draw(4).astype(np.uint64)  # (high, low) of the angle, then of the radius
        angle, radius = ((words[0::2] << np.uint64(32) | words[1::2]) & np.uint64(2**53 - 1)) * 2.0**-53
        length = np.sqrt(-2.0 * np.log1p(-radius))
        self._second = float(length * np.sin(2.0 * np.pi * angle))
        return float(length * np.cos(2.0 * np.pi * angle))


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= int(extent)
    return size


def _draws_of(size: int) -> int:
    return size if size % BLOCK == 0 else size + BLOCK


def _checked(flat_indices: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    indices = np.asarray(flat_indices, np.int64)
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"indices {indices.min()}..{indices.max()} are outside a tensor of {size} values")
    return indices


def _block_positions(
    indices: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """For each value: where its radius and its angle were drawn, and whether it is the sine of its pair."""
    redrawn = (indices >= size - BLOCK) & (size % BLOCK != 0)
    # The last partial block: values size - 16 .. size - 1 come from draws size .. size + 15.
    lane = np.where(redrawn, indices - (size - BLOCK), indices % BLOCK)
    block = np.where(redrawn, size, indices - lane)
    radius_at = block + lane % (BLOCK // 2)
    return radius_at, radius_at + BLOCK // 2, lane >= BLOCK // 2


def _unit(draws: NDArray[np.uint32]) -> Floats:
    return (draws & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(
    radius_draws: NDArray[np.uint32], angle_draws: NDArray[np.uint32], is_sine: NDArray[np.bool_]
) -> Floats:
    radius: Floats = np.sqrt(np.float32(-2.0) * _log(np.float32(1.0) - _unit(radius_draws)))
    return radius * _sine_or_cosine(np.float32(2.0 * np.pi) * _unit(angle_draws), is_sine)


# torch's vector kernel takes ln, sin and cos from the single-precision polynomials of Cephes (S. Moshier:
# logf.c, sinf.c), multiply-adds fused. All are basic IEEE operations: in its order, its bits on any CPU.
LOG_TERMS = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LOG2_PARTS = (0.693359375, -2.12194440e-4)  # ln 2, the first part exact when multiplied by an exponent
QUARTER_PI_PARTS = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # -pi / 4, likewise


def _fma(a: Floats, b: Floats | float, c: Floats | float) -> Floats:
    """a * b + c rounded once: in double the product of two float32s is exact. Constants are float32 too."""
    product = np.multiply(a, np.asarray(b, np.float32), dtype=np.float64)
    return (product + np.asarray(c, np.float32)).astype(np.float32)


def _log(x: Floats) -> Floats:
    """ln x for x in (0, 1]: x = m 2^e with m in [sqrt(1/2), sqrt(2)), then a polynomial in m - 1."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < np.float32(0.5**0.5)
    e = (exponent - small).astype(np.float32)
    m = (mantissa - np.float32(1.0)) + np.where(small, mantissa, np.float32(0.0))
    square = m * m
    y = _fma(m, LOG_TERMS[0], LOG_TERMS[1])
    for term in LOG_TERMS[2:]:
        y = _fma(y, m, term)
    y = _fma(y * m, square, e * np.float32(LOG2_PARTS[1]))
    y = _fma(square, -0.5, y)
    return _fma(e, LOG2_PARTS[0], m + y)


def _sine_or_cosine(angle: Floats, is_sine: NDArray[np.bool_]) -> Floats:
    """sin or cos of angles in [0, 2 pi): x = angle - q pi / 2, q the nearest, picks polynomial and sign."""
    quarter = ((angle * np.float32(4.0 / np.pi)).astype(np.int32) + 1) >> 1
    eighths = (2 * quarter).astype(np.float32)
    x = angle
    for part in QUARTER_PI_PARTS:
        x = _fma(eighths, part, x)
    square = x * x
    cos = _fma(_fma(square, 2.443315711809948e-5, -1.388731625493765e-3), square, 4.166664568298827e-2)
    cos = _fma(cos * square, square, np.float32(-0.5) * square) + np.float32(1.0)
    sin = _fma(_fma(square, -1.9515295891e-4, 8.3321608736e-3), square, -1.6666654611e-1)
    sin = _fma(sin * square, x, x)
    turn = quarter + ~is_sine  # cos(a) = sin(a + pi / 2), so one table: sin, cos, -sin, -cos
    value: Floats = np.where(turn & 1, cos, sin)
    np.negative(value, where=(turn & 2) != 0, out=value)
    return value
