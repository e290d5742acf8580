"""An array in a GPU's memory, as runners on GPUs give it to one another: only numpy's reading copies it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DeviceArray:
    """C-contiguous. pointer: where it begins on the device. owner: whatever keeps that memory alive.

    fetch: copies it to the host, in any shape; called by `np.asarray`. join: as `joined`, on the device; None
    where nobody does that.
    """

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: str,
        owner: object,
        fetch: Callable[[], NDArray[Any]],
        join: Callable[[Sequence[Sequence[DeviceArray]]], DeviceArray] | None = None,
    ) -> None:
        self.pointer, self.shape, self.dtype = pointer, shape, np.dtype(dtype)
        self._owner, self._fetch, self.join = owner, fetch, join

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def reshape(self, *shape: int) -> DeviceArray:
        """The same memory in another shape; one size may be -1. Raises ValueError."""
        known = math.prod(size for size in shape if size != -1)
        sizes = tuple(self.size // max(known, 1) if size == -1 else size for size in shape)
        if math.prod(sizes) != self.size:
            raise ValueError(f"an array of shape {self.shape} has no shape {shape}")
        return DeviceArray(self.pointer, sizes, str(self.dtype), self._owner, self._fetch, self.join)

    def rows(self) -> Iterator[DeviceArray]:
        """Along the first axis, which each keeps with a size of 1; none is copied."""
        shape = (1, *self.shape[1:])
        for index in range(self.shape[0]):
            pointer = self.pointer + index * (self.nbytes // self.shape[0])
            fetch = partial(self._row, index)
            yield DeviceArray(pointer, shape, str(self.dtype), self._owner, fetch, self.join)

    def _row(self, index: int) -> NDArray[Any]:
        return self._fetch().reshape(self.shape)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an array on a GPU cannot be read without a copy")
        return self._fetch().reshape(self.shape).astype(dtype or self.dtype, copy=False)


Held = NDArray[Any] | DeviceArray  # on the host, or on a GPU


def rows_of(array: Held) -> list[Held]:
    """Along the first axis, which each keeps with a size of 1."""
    if isinstance(array, DeviceArray):
        return list(array.rows())
    return [array[index : index + 1] for index in range(len(array))]


def joined(rows: Sequence[Sequence[Held]]) -> Held:
    """Rows of parts (1, n, d): a row's behind one another, rows of equal length. They stay where they are."""
    on_device = [[part for part in row if isinstance(part, DeviceArray)] for row in rows]
    join = on_device[0][0].join if on_device[0] else None
    if join and all(len(there) == len(row) for there, row in zip(on_device, rows, strict=True)):
        return join(on_device)
    return np.concatenate([np.concatenate([np.asarray(part) for part in row], axis=1) for row in rows])
