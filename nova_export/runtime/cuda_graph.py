"""A stage's kernels launched all at once: CUDA graphs, one for each shape that its inputs have.

A graph repeats what was captured, at the addresses of then: so inputs are copied to where they always are,
and outputs from there. AR steps have a shape each, the same ones in every frame and every request: the first
time a shape runs plainly, the second time plainly and is captured, from then on it is replayed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nova_export.errors import StageError
from nova_export.runtime.cuda import Arena, Gpu, Graph
from nova_export.runtime.device_array import DeviceArray
from nova_export.runtime.runner import Held
from nova_export.spec import Stage

GRAPHS = 128  # of a stage, those used last: two kinds of requests, of the published 64 AR steps each

Shape = tuple[int, ...]


class Context:
    """An execution context of an engine. failed: makes the error of what could not be done."""

    def __init__(
        self, context: Any, stage: Stage, gpu: Gpu, scratch: int, failed: Callable[[str], StageError]
    ) -> None:
        self._context, self._stage, self._gpu, self._failed = context, stage, gpu, failed
        self.scratch = scratch  # bytes that it computes in

    def set_inputs(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> dict[str, Shape]:
        """Shapes of the outputs. Raises StageError."""
        for name, shape in shapes.items():
            if not (
                self._context.set_input_shape(name, shape)
                and self._context.set_tensor_address(name, addresses[name])
            ):
                raise self._failed(f"does not take input {name!r} of shape {shape}")
        names = [tensor.name for tensor in self._stage.outputs]
        return {name: tuple(self._context.get_tensor_shape(name)) for name in names}

    def set_addresses(self, addresses: Mapping[str, int], scratch: int) -> None:
        """Of tensors by name, and of the scratch memory."""
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        self._context.set_device_memory(scratch, self.scratch)

    def enqueue(self) -> None:
        """Put one run on the stream. Raises StageError."""
        if not self._context.execute_async_v3(self._gpu.stream):
            raise self._failed("failed")

    def capture(self) -> Graph:
        """One run as a graph, after one that was enqueued plainly. Raises StageError where there is none."""
        ask = getattr(self._context, "is_stream_capturable", None)  # older versions find out by trying
        if ask and not ask(self._gpu.stream):
            raise self._failed("says that it cannot be captured")
        return self._gpu.capture(self.enqueue)


@dataclass
class Bound:
    """A context, what it is bound to, and the graph that was captured of that. Both change together."""

    context: Context
    outputs: dict[str, Shape] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    scratch: int = 0
    graph: Graph | None = None


class StageGraphs:
    """Runs a stage whose inputs are all read on the GPU. context: for shapes seen once.

    new_context: makes those of shapes that came again, one each: what a graph was captured of must not be
    changed. captures: whether graphs are captured here; if not, each context does that for itself, at the
    second run in the same place (TensorRT-RTX).
    """

    def __init__(
        self, stage: Stage, gpu: Gpu, context: Context, new_context: Callable[[], Context], captures: bool
    ) -> None:
        self.stage, self.gpu, self.captures = stage, gpu, captures
        self._context, self._new_context = context, new_context
        self._bound: dict[tuple[int, ...], Bound | None] = {}  # by sizes of axes, those used last at the end
        # One place a tensor for all shapes, as large as the largest: a frame's AR steps would take 64 each.
        self._places = {tensor.name: Arena(gpu) for tensor in (*stage.inputs, *stage.outputs)}
        self._gave_up = False

    def run(self, inputs: Mapping[str, Held], sizes: Mapping[str, int]) -> dict[str, DeviceArray]:
        """Outputs by name, in memory of their own. sizes: of the stage's axes, which say all shapes."""
        addresses = {name: self._places[name].at_least(array.nbytes) for name, array in inputs.items()}
        for name, array in inputs.items():
            self.gpu.write(addresses[name], array)
        bound = self._find(tuple(sizes.values()))
        if not bound.outputs:
            shapes = {name: tuple(array.shape) for name, array in inputs.items()}
            bound.outputs = bound.context.set_inputs(shapes, addresses)
        for tensor in self.stage.outputs:
            size = math.prod(bound.outputs[tensor.name]) * np.dtype(tensor.dtype).itemsize
            addresses[tensor.name] = self._places[tensor.name].at_least(size)
        scratch = self.gpu.arena(bound.context.scratch)
        if (addresses, scratch) != (bound.addresses, bound.scratch):  # new, or memory has grown and moved
            self._run_anew(bound, addresses, scratch)
        elif bound.graph:
            bound.graph.launch()
        else:
            bound.context.enqueue()
        return {
            tensor.name: self.gpu.read(addresses[tensor.name], bound.outputs[tensor.name], tensor.dtype)
            for tensor in self.stage.outputs
        }

    def _find(self, key: tuple[int, ...]) -> Bound:
        again = key in self._bound and not self._gave_up
        bound = self._bound.pop(key, None)
        if again and bound is None:
            try:
                bound = Bound(self._new_context())
            except StageError as error:
                self._give_up(error)
        self._bound[key] = bound
        if len(self._bound) > GRAPHS:
            del self._bound[next(iter(self._bound))]
        return bound or Bound(self._context)

    def _run_anew(self, bound: Bound, addresses: dict[str, int], scratch: int) -> None:
        bound.graph = None
        bound.context.set_addresses(addresses, scratch)
        bound.context.enqueue()
        bound.addresses, bound.scratch = addresses, scratch
        if self.captures and bound.context is not self._context:
            try:
                bound.graph = bound.context.capture()
            except StageError as error:
                self._give_up(error)

    def _give_up(self, error: StageError) -> None:
        """Every run is a plain one from now on: what fails once fails again, and costs a run each time."""
        self._gave_up = True
        self._bound.clear()
        warnings.warn(f"no CUDA graphs, kernels are launched one by one: {error}", stacklevel=2)
