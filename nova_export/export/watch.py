"""Values inside a graph, seen from outside: sessions with more outputs, and stages that give them too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from nova_export.bundle import Bundle
from nova_export.export.passes.integer_products import bias_of
from nova_export.export.passes.quantize import layer_name
from nova_export.runtime.runner import Array, Lent
from nova_export.spec import Stage

# What the blocks of a stage are seen by: the results of its layers.
PRODUCTS = frozenset({"MatMul", "MatMulIntegerToFloat"})
OPERATORS = PRODUCTS | {"Attention", "Conv", "Gelu", "Gemm", "LayerNormalization", "Softmax"}
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
    """Results of layers in the main graph, by name of the value."""
    return {
        str(value.name): value
        for node in model.graph
        if node.op_type in OPERATORS
        for value in _results(node)
        if value.name and (value.dtype is None or value.dtype in FLOATS)
    }


def _results(node: ir.Node) -> Sequence[ir.Value]:
    """What a layer gives: with its bias, where that is added apart."""
    added = bias_of(node) if node.op_type in PRODUCTS else None
    return added[0].outputs if added else node.outputs


def labels(one: Mapping[str, ir.Value], other: Mapping[str, ir.Value]) -> dict[str, str]:
    """What to call each value that both of two graphs have: the module that it is the result of.

    With the value's name where a module has several, and alone where the graphs do not agree on the module.
    """
    modules = {}
    for name in one.keys() & other.keys():
        first, second = (layer_name(node) if (node := v.producer()) else "" for v in (one[name], other[name]))
        modules[name] = first if first == second else ""
    often = Counter(modules.values())
    return {
        name: name if not module else module if often[module] == 1 else f"{module} ({name})"
        for name, module in modules.items()
    }


def cut_off(values: Array, scale: Array, zero: Array) -> int:
    """How many values QuantizeLinear cuts off, for they lie beyond what its integers of 8 bits reach."""
    ends = np.iinfo(zero.dtype)
    integers = np.rint(values / scale) + zero
    return int(((integers < ends.min) | (integers > ends.max)).sum())


class WatchedStages:
    """Stages of a bundle that give results of their layers too: those that `other` has by the same name.

    Every stage is loaded whole, and nothing is written in place: for looking, not for speed.
    cut: of layers whose inputs are in 8 bits, by stage and label, how many numbers were cut off.
    """

    def __init__(self, bundle: Bundle, other: Bundle, threads: int = 0) -> None:
        self.bundle, self.other, self.threads = bundle, other, threads
        self.cut: Counter[tuple[str, str]] = Counter()
        self._open: dict[str, _Watched] = {}

    def __call__(self, name: str) -> _Watched:
        if name not in self._open:
            self.bundle.check_stage(name)
            entry, there = self.bundle.stages[name], self.other.stages[name]
            path = self.bundle.path(entry.graph)
            model = ir.load(path)
            values = layer_values(model)
            names = labels(values, layer_values(ir.load(self.other.path(there.graph))))
            inputs = _integer_inputs(model)
            watched = [*(values[each] for each in names), *(each.value for each in inputs)]
            session = session_with(model, path.parent, dict.fromkeys(watched), self.threads)
            self._open[name] = _Watched(entry.spec, session, names, inputs, self.cut)
        return self._open[name]


@dataclass(frozen=True)
class _IntegerInput:
    """A value that becomes integers of 8 bits, and the names of what layers make of it so."""

    value: ir.Value
    scale: Array
    zero: Array
    results: tuple[str, ...]


def _integer_inputs(model: ir.Model) -> list[_IntegerInput]:
    found = []
    for node in model.graph:
        if node.op_type != "QuantizeLinear":
            continue
        value, *constants = node.inputs
        assert value is not None
        scale, zero = (each.const_value.numpy() for each in constants if each and each.const_value)
        readers = [
            reader
            for user in node.outputs[0].consumers()
            for reader in (user.outputs[0].consumers() if user.op_type == "DequantizeLinear" else [user])
        ]
        results = tuple(str(output.name) for reader in readers for output in _results(reader))
        found.append(_IntegerInput(value, scale, zero, results))
    return found


class _Watched(Lent):
    """A stage with more outputs than its spec has."""

    def __init__(
        self,
        stage: Stage,
        session: Any,
        names: Mapping[str, str],
        integer_inputs: Sequence[_IntegerInput],
        cut: Counter[tuple[str, str]],
    ) -> None:
        self.stage, self._session = stage, session
        self._outputs = {tensor.name: tensor.name for tensor in stage.outputs}
        self._outputs |= {name: label for name, label in names.items() if name not in self._outputs}
        self._inputs, self._cut = integer_inputs, cut

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.stage.bind(inputs)
        inner = {str(each.value.name) for each in self._inputs} - inputs.keys()
        names = sorted(inner | self._outputs.keys())
        values = {**inputs, **dict(zip(names, self._session.run(names, dict(inputs)), strict=True))}
        for each in self._inputs:
            count = cut_off(values[str(each.value.name)], each.scale, each.zero)
            for result in self._outputs.keys() & each.results:
                self._cut[self.stage.name, self._outputs[result]] += count
        return {label: values[name] for name, label in self._outputs.items()}
