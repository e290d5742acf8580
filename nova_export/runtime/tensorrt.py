"""A stage's engine on TensorRT: through cuda-python, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from nova_export.engine.flavour import error_logger, flavour
from nova_export.errors import BundleError, StageError
from nova_export.runtime.cuda import Gpu
from nova_export.runtime.cuda_graph import Context, StageGraphs
from nova_export.runtime.device_array import DeviceArray
from nova_export.runtime.runner import Held
from nova_export.spec import Stage

GRAPHED_PHASE = "step"  # hundreds of runs a video, of small kernels; others run a few times, and take caches

RunnerType = TypeVar("RunnerType", bound="TensorRtRunner")


class Renamed:
    """An execution context whose tensors go by other names. names: the engine's, by ours."""

    def __init__(self, context: Any, names: Mapping[str, str]) -> None:
        self._context, self._names = context, names

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return bool(self._context.set_input_shape(self._names.get(name, name), shape))

    def set_tensor_address(self, name: str, address: int) -> bool:
        return bool(self._context.set_tensor_address(self._names.get(name, name), address))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(self._names.get(name, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class TensorRtRunner:
    """Outputs stay on the GPU. stage: the spec within the engine's limits.

    The engine computes in the scratch memory that all stages of `gpu` share. cuda_graphs: launch the kernels
    of an AR step's stages all at once, see `StageGraphs`. weights: the graph that the engine was made of,
    where it was made without weights.
    """

    runtime = "tensorrt"  # of FLAVOURS
    captures = True  # graphs are captured by `StageGraphs`

    def __init__(
        self, stage: Stage, path: Path, gpu: Gpu, cuda_graphs: bool = True, weights: Path | None = None
    ) -> None:
        self.stage, self.path, self.gpu, self.cuda_graphs = stage, path, gpu, cuda_graphs
        self.weights = weights
        self._flavour = flavour(self.runtime)
        self._engine: Any = None
        self._context: Context | None = None
        self._graphs: StageGraphs | None = None

    def __enter__(self: RunnerType) -> RunnerType:
        trt = self._trt = self._flavour.load()
        self._logger = error_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(self.path.read_bytes())
        try:
            if self._engine is None:
                raise self._failed("does not load it")
            if self.weights is not None:
                self._refit(self.weights)
            self._open()
        except StageError as error:
            self.__exit__(None, None, None)
            raise BundleError(
                f"{self.path}: {self._flavour.name} {trt.__version__} cannot load it: {self._said()}; "
                "`nova-export engines BUNDLE` compiles it again, --device cpu does without"
            ) from error
        return self

    def _refit(self, graph: Path) -> None:
        """Give a stripped engine its weights. Raises StageError."""
        refitter = self._trt.Refitter(self._engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
            raise self._failed(f"does not take the weights of {graph}")

    def _open(self) -> None:
        # torch-tensorrt names tensors its own way; inputs, then outputs, are in order.
        engine, tensors = self._engine, (*self.stage.inputs, *self.stage.outputs)
        theirs = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        ours = [tensor.name for tensor in tensors]
        if len(theirs) != len(ours):
            raise self._failed(f"has tensors {', '.join(theirs)}, the stage {', '.join(ours)}")
        self._names = {} if set(theirs) == set(ours) else dict(zip(ours, theirs, strict=True))
        self._on_host = {
            tensor.name
            for tensor in self.stage.inputs
            if engine.get_tensor_location(self._names.get(tensor.name, tensor.name))
            == self._trt.TensorLocation.HOST
        }
        self._context = self._new_context()
        # What is read on the host is part of a graph: it would stay what it was at the capture.
        if self.cuda_graphs and self.stage.phase == GRAPHED_PHASE and not self._on_host:
            new = partial(self._new_context, graphs=True)
            self._graphs = StageGraphs(self.stage, self.gpu, self._context, new, self.captures)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # In this order: each needs the next.
        self._graphs = self._context = self._engine = self._runtime = None

    def run(self, inputs: Mapping[str, Held]) -> dict[str, DeviceArray]:
        """Outputs by name, before they are computed: reading one waits. Raises StageError."""
        sizes = self.stage.bind(inputs)
        if self._context is None:
            raise StageError(f"stage {self.stage.name}: its runner is not open; use it in a with block")
        if self._graphs:
            return self._graphs.run(inputs, sizes)
        return self._run(self._context, inputs)

    def _run(self, context: Context, inputs: Mapping[str, Held]) -> dict[str, DeviceArray]:
        """In whatever memory the inputs are, and new memory."""
        placed = {name: self._place(name, array) for name, array in inputs.items()}
        addresses = {name: address for name, (_, address) in placed.items()}
        shapes = context.set_inputs({name: tuple(each.shape) for name, each in inputs.items()}, addresses)
        outputs: dict[str, DeviceArray] = {}
        for tensor in self.stage.outputs:
            # Graphs write aliased outputs in place; engines only where they say so themselves.
            alias = self._aliased(tensor.name)
            made = placed[alias][0] if alias else self.gpu.empty(shapes[tensor.name], tensor.dtype)
            outputs[tensor.name] = made
            addresses[tensor.name] = made.pointer
        context.set_addresses(addresses, self.gpu.arena(context.scratch))
        context.enqueue()
        return outputs

    def _place(self, name: str, array: Held) -> tuple[Any, int]:
        """The input where the engine reads it, and its address. Few are read on the host: sizes of others."""
        if name in self._on_host:
            host = np.ascontiguousarray(array)
            return host, host.ctypes.data
        place = array if isinstance(array, DeviceArray) else self.gpu.upload(array)
        return place, place.pointer

    def _aliased(self, output: str) -> str | None:
        """The input whose memory the engine writes this output to; versions before 10.15 know of none."""
        ask = getattr(self._engine, "get_aliased_input_tensor", None)
        return ask(output) if ask and not self._names else None

    def _new_context(self, graphs: bool = False) -> Context:
        """graphs: it will run one shape alone. Raises StageError where TensorRT makes none."""
        context = self._create_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED, graphs)
        if context is None:
            raise self._failed("makes no execution context")
        size = self._engine.device_memory_size_v2
        return Context(Renamed(context, self._names), self.stage, self.gpu, size, self._failed)

    def _create_context(self, strategy: Any, graphs: bool) -> Any:
        return self._engine.create_execution_context(strategy)

    def _failed(self, how: str) -> StageError:
        return StageError(f"stage {self.stage.name}: {self._flavour.name} {how}: {self._said()}")

    def _said(self) -> str:
        return self._logger.errors[-1] if self._logger.errors else "it does not say why"
