"""Values inside a graph, seen from outside: sessions with more outputs, and stages that give them too."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx import TensorProto, helper

from nova_export.bundle import Bundle
from nova_export.runtime.runner import Array, Lent
from nova_export.spec import Stage

# What the blocks of a stage are seen by: the results of its layers.
OPERATORS = frozenset({"Attention", "Conv", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Softmax"})
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def session_with(model: ir.Model, folder: Path, values: Iterable[ir.Value], threads: int = 0) -> Any:
    """An ONNX Runtime session of a model with these values as outputs too; the model is left as it was.

    folder: where its weights are.
    """
    outputs = model.graph.outputs
    own = len(outputs)
    outputs.extend(value for value in values if not value.is_graph_output())
    try:
        data = ir.to_proto(model).SerializeToString()
    finally:
        del outputs[own:]
    return _session(data, folder, threads)


class Ranges:
    """The largest magnitude of every float value that the nodes of a model's main graph make, run by run.

    Each is reduced to its two ends inside the graph: no value comes out, and memory stays that of a run. NaN
    is passed over.
    """

    def __init__(self, model: ir.Model, folder: Path, threads: int = 0) -> None:
        """folder: where the model's weights are. Every value must have a type."""
        self.largest = {
            str(value.name): 0.0
            for node in model.graph
            for value in node.outputs
            if value.dtype == ir.DataType.FLOAT
        }
        graph = (proto := ir.to_proto(model)).graph
        nodes = list(graph.node)
        del graph.output[:], graph.node[:]
        for node in nodes:  # ends right behind what they are of, which can then go
            graph.node.append(node)
            for value in filter(self.largest.__contains__, node.output):
                for operator in ("ReduceMax", "ReduceMin"):
                    end = f"{operator}/{value}"
                    graph.node.append(helper.make_node(operator, [value], [end], keepdims=0))
                    graph.output.append(helper.make_tensor_value_info(end, TensorProto.FLOAT, []))
        self._session = _session(proto.SerializeToString(), folder, threads)

    def look(self, inputs: Mapping[str, Array]) -> None:
        """Add what a run with these inputs gives."""
        ends = iter(self._session.run(None, dict(inputs)))
        for value, top, bottom in zip(self.largest, ends, ends, strict=True):  # -inf, inf if it is empty
            self.largest[value] = max(self.largest[value], float(top), -float(bottom))


def _session(model: bytes, folder: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # In the graph's order. By default what leads to an output comes last, and all values are held till then.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    # Weights are read where they lie in their file, and not copied into the order that kernels like.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def layer_values(model: ir.Model) -> dict[str, ir.Value]:
    """Results of layers in the main graph, by name."""
    return {
        str(value.name): value
        for node in model.graph
        if node.op_type in OPERATORS
        for value in node.outputs
        if value.name and (value.dtype is None or value.dtype in FLOATS)
    }


class WatchedStages:
    """Stages of a bundle that give results of their layers too: those that `other` has by the same name.

    Every stage is loaded whole, and nothing is written in place: for looking, not for speed.
    """

    def __init__(self, bundle: Bundle, other: Bundle, threads: int = 0) -> None:
        self.bundle, self.other, self.threads = bundle, other, threads
        self._open: dict[str, _Watched] = {}

    def __call__(self, name: str) -> _Watched:
        if name not in self._open:
            self.bundle.check_stage(name)
            entry, there = self.bundle.stages[name], self.other.stages[name]
            path = self.bundle.path(entry.graph)
            model = ir.load(path)
            shared = layer_values(ir.load(self.other.path(there.graph))).keys()
            values = {n: value for n, value in layer_values(model).items() if n in shared}
            session = session_with(model, path.parent, values.values(), self.threads)
            self._open[name] = _Watched(entry.spec, session, values)
        return self._open[name]


class _Watched(Lent):
    """A stage with more outputs than its spec has."""

    def __init__(self, stage: Stage, session: Any, names: Collection[str]) -> None:
        self.stage, self._session = stage, session
        self._names = list(dict.fromkeys([*(tensor.name for tensor in stage.outputs), *names]))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.stage.bind(inputs)
        return dict(zip(self._names, self._session.run(self._names, dict(inputs)), strict=True))
