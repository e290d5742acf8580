"""An array in a GPU's memory, as runners on GPUs give it to one another: only numpy's reading copies it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DeviceArray:
    """C-contiguous. pointer: where it begins on the device. owner: whatever keeps that memory alive.

    fetch: copies it to the host, in any shape; called by `np.asarray`.
    """

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: str,
        owner: object,
        fetch: Callable[[], NDArray[Any]],
    ) -> None:
        self.pointer, self.shape, self.dtype = pointer, shape, np.dtype(dtype)
        self._owner, self._fetch = owner, fetch

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
        return DeviceArray(self.pointer, sizes, str(self.dtype), self._owner, self._fetch)

    def rows(self) -> Iterator[DeviceArray]:
        """Along the first axis, which each keeps with a size of 1; none is copied."""
        shape = (1, *self.shape[1:])
        for index in range(self.shape[0]):
            pointer = self.pointer + index * (self.nbytes // self.shape[0])
            yield DeviceArray(pointer, shape, str(self.dtype), self._owner, partial(self._row, index))

    def _row(self, index: int) -> NDArray[Any]:
        return self._fetch().reshape(self.shape)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an array on a GPU cannot be read without a copy")
        return self._fetch().reshape(self.shape).astype(dtype or self.dtype, copy=False)
