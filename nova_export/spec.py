"""Axis, Tensor and Stage: what a stage takes and gives, as plain frozen data.

This module knows nothing of NOVA, torch, ONNX or TensorRT. The exporter derives dynamic axes from it, the
engine builder optimization profiles, the verifier test inputs, the runtimes their input checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from nova_export.errors import StageError
from nova_export.typed import read, refusal, step, wrong

DTYPES = ("float32", "int64", "bool", "float16")
MAX_SIZE = 2**31 - 1  # of one dimension


class ArrayLike(Protocol):
    """What `Stage.bind` needs of a tensor: a numpy array and a torch tensor both have it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class Axis:
    """A symbolic size: its bounds, and the usual size that an optimization profile is tuned for."""

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(
                f"axis {self.name}: need 0 <= min <= opt <= max, not {self.min}, {self.opt}, {self.max}"
            )


@dataclass(frozen=True)
class Tensor:
    """A named input or output. A size is an int, or the name of an Axis.

    An output may have sizes of its own that no Axis bounds: they follow from those of the inputs.

    `alias` on an output names the input whose memory it may share: the stage writes there in place.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    alias: str | None = None


@dataclass(frozen=True)
class Stage:
    """One exported graph.

    `module` names the reference module ("package.module:Class") that computes it, made with the config and
    `arguments`; `part` the checkpoint folder and `prefixes` the weights in it that the module needs; `phase`
    says when in a run it is used.
    """

    name: str
    module: str
    part: str
    prefixes: tuple[str, ...]
    phase: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    axes: tuple[Axis, ...] = field(default=())
    arguments: tuple[str, ...] = field(default=())

    def axis(self, name: str) -> Axis:
        """The axis of that name. Raises KeyError."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(name)

    def bind(self, arrays: Mapping[str, ArrayLike]) -> dict[str, int]:
        """Check inputs by name, dtype and shape; return the size of every axis.

        Raises:
            StageError: names the stage, the tensor, what it has and what the spec allows.
        """
        wanted = {tensor.name for tensor in self.inputs}
        if missing := sorted(wanted - arrays.keys()):
            raise StageError(f"stage {self.name}: input {missing[0]!r} is missing")
        if unknown := sorted(arrays.keys() - wanted):
            raise StageError(
                f"stage {self.name}: has no input {unknown[0]!r}; it takes {', '.join(sorted(wanted))}"
            )
        sizes: dict[str, int] = {}
        for tensor in self.inputs:
            self._bind_one(tensor, arrays[tensor.name], sizes)
        return sizes

    def _bind_one(self, tensor: Tensor, array: ArrayLike, sizes: dict[str, int]) -> None:
        where = f"stage {self.name}, input {tensor.name!r}"
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype != tensor.dtype:
            raise StageError(f"{where}: is {dtype}, must be {tensor.dtype}")
        shape = tuple(array.shape)
        if len(shape) != len(tensor.shape):
            raise StageError(f"{where}: has shape {shape}, must be {_show(tensor.shape)}")
        for size, expected in zip(shape, tensor.shape, strict=True):
            if isinstance(expected, int):
                if size != expected:
                    raise StageError(f"{where}: has shape {shape}, must be {_show(tensor.shape)}")
                continue
            axis = self.axis(expected)
            if not axis.min <= size <= axis.max:
                raise StageError(
                    f"{where}: {axis.name} is {size}, must be {axis.min} to {axis.max} (shape {shape})"
                )
            if sizes.setdefault(axis.name, size) != size:
                raise StageError(f"{where}: {axis.name} is {size}, but {sizes[axis.name]} in another input")

    def shapes(self, sizes: Mapping[str, int], outputs: bool = False) -> dict[str, tuple[int, ...]]:
        """Concrete shapes of all inputs (or outputs) for the given size of every axis."""
        tensors = self.outputs if outputs else self.inputs
        return {t.name: tuple(d if isinstance(d, int) else sizes[d] for d in t.shape) for t in tensors}

    def to_dict(self) -> dict[str, Any]:
        """As JSON for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str = "") -> Stage:
        """The reverse of `to_dict`. Raises ValueError on another shape of data."""
        stage: Stage = read(cls, data, where)
        stage.check(data, where)
        return stage

    def check(self, data: Mapping[str, Any], where: str = "") -> None:
        """What types do not say, of a stage that was read from `data`. Raises ValueError."""
        if "axes" not in data:
            raise refusal("has no 'axes'", where)
        self._check_sizes(where)
        self._check_names(where)

    def _check_sizes(self, where: str) -> None:
        for kind in ("inputs", "outputs"):
            for index, tensor in enumerate(getattr(self, kind)):
                here = step(step(where, kind), str(index))
                if tensor.dtype not in DTYPES:
                    raise wrong(tensor.dtype, "float32, int64, bool or float16", step(here, "dtype"))
                for place, size in enumerate(tensor.shape):
                    if isinstance(size, int) and size > MAX_SIZE:
                        raise wrong(size, f"0 to {MAX_SIZE}", step(step(here, "shape"), str(place)))
        for index, axis in enumerate(self.axes):
            if axis.max > MAX_SIZE:
                raise wrong(axis.max, f"0 to {MAX_SIZE}", step(step(step(where, "axes"), str(index)), "max"))

    def _check_names(self, where: str) -> None:
        """That names are used once, and those that shapes and aliases use are there."""
        for kind in ("axes", "inputs", "outputs"):
            names = [each.name for each in getattr(self, kind)]
            for index, name in enumerate(names):
                if name in names[:index]:
                    raise refusal(f"has {name!r} twice", step(where, kind))
        used = {size for tensor in self.inputs for size in tensor.shape if isinstance(size, str)}
        aliases = {tensor.alias for tensor in self.outputs if tensor.alias}
        for kind, wanted in (("axes", used), ("inputs", aliases)):
            if missing := wanted - {each.name for each in getattr(self, kind)}:
                raise refusal(f"has no {min(missing)!r}", step(where, kind))


def _show(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"
