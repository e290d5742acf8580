"""Weights and arithmetic in float16 or bfloat16, by casts in the graph itself: what it says is what runs.

Every float value gets one type, from the inputs on. Products (matrices, convolutions, attention) are in half
precision, and so is what works on their results: norms, additions, functions of one value. What loses much or
overflows is in float32: powers, roots, quotients and sums over a tensor, what is computed on the inputs that
the caller names, and the nodes that it names. Inputs and outputs of the graph keep their types.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir

from nova_export.export.passes.cast import add_cast

FLOAT = ir.DataType.FLOAT
NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}

IN_HALF = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "RotaryEmbedding"})
IN_FLOAT = frozenset(
    {"Pow", "Sqrt", "Reciprocal", "Div", "Exp", "Log", "Sin", "Cos", "Range"}
    | {"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "Softmax"}
)
# Inputs that stay float32 whatever the rest is: shapes and scales of a Resize are no data.
OWN_TYPE = {("Resize", 1), ("Resize", 2)}


def to_half(
    model: ir.Model,
    half: ir.DataType,
    float_inputs: Collection[str] = (),
    float_nodes: Collection[str] = (),
) -> list[str]:
    """Change `model` in place; the names of the nodes that stay in float32 although they hold float data.

    half: FLOAT16 or BFLOAT16. float_inputs: names of graph inputs that stay in float32, and with them what is
    computed on them. float_nodes: names of nodes that stay in float32. Every value must have a type.
    """
    casts = _Casts(half)
    kept = _convert(model.graph, half, frozenset(float_inputs), frozenset(float_nodes), casts)
    _narrow_weights(model.graph, half)
    return kept


def sums(model: ir.Model) -> set[str]:
    """Names of the nodes that add two computed values: in a transformer, what carries its residuals."""
    return {
        str(node.name)
        for node in model.graph.all_nodes()
        if node.op_type == "Add" and not any(value is None or value.is_initializer() for value in node.inputs)
    }


def _convert(
    graph: ir.Graph,
    half: ir.DataType,
    float_inputs: frozenset[str],
    float_nodes: frozenset[str],
    casts: _Casts,
) -> list[str]:
    kept, own_half = [], [value.dtype == half for value in graph.outputs]
    for value in graph.inputs:
        if value.dtype == FLOAT and value.name not in float_inputs:
            casts.as_half.add(value)
    for node in list(graph):
        if node.op_type == "Scan":
            kept += _convert_scan(node, half, float_nodes, casts)
            continue
        data = [value for _, value in _float_inputs(node)]
        floats = [value for value in node.outputs if value.dtype == FLOAT]
        if node.op_type == "Cast" and floats and data and data[0].dtype == half:
            floats[0].replace_all_uses_with(data[0])  # what reads it decides by itself
            graph.remove(node, safe=True)
            continue
        if not floats and not data:
            continue
        wanted = FLOAT if node.name in float_nodes else _type_of(node, data, half, casts)
        if wanted == FLOAT and floats:
            kept.append(str(node.name))
        casts.feed(node, wanted)
        for value in floats:
            if wanted == half:
                value.dtype = half
    for index, value in enumerate(graph.outputs):
        if value.dtype == half and not own_half[index]:
            name = str(value.name)
            value.name = f"{name}_half"
            graph.outputs[index] = add_cast(value, FLOAT, name)
    return kept


def _type_of(node: ir.Node, data: list[ir.Value], half: ir.DataType, casts: _Casts) -> ir.DataType:
    """In half precision: products, and what has only half precision, or weights, to work on."""
    if node.op_type in IN_FLOAT:
        return FLOAT
    if node.op_type in IN_HALF:
        return half
    return half if data and all(casts.is_half(v) or v.is_initializer() for v in data) else FLOAT


def _convert_scan(node: ir.Node, half: ir.DataType, float_nodes: frozenset[str], casts: _Casts) -> list[str]:
    """A loop's state stays in float32, where errors would add up; what it scans has its own type."""
    body = node.attributes["body"].as_graph()
    states = len(node.inputs) - node.attributes["num_scan_inputs"].as_int()
    for index, (outer, inner) in enumerate(zip(node.inputs, body.inputs, strict=True)):
        assert outer is not None
        if index < states or not casts.is_half(outer):
            casts.replace(node, index, FLOAT)
        else:
            casts.replace(node, index, half)
            inner.dtype = half
    return _convert(body, half, frozenset(str(value.name) for value in body.inputs), float_nodes, casts)


def _float_inputs(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """Place and value of the inputs that are float data."""
    for index, value in enumerate(node.inputs):
        if value is None or (node.op_type, index) in OWN_TYPE:
            continue
        if value.dtype == FLOAT or value.dtype in NUMPY:
            yield index, value


class _Casts:
    """Which values are in half precision, and the casts between the two; each cast is made once."""

    def __init__(self, half: ir.DataType) -> None:
        self.half = half
        self.as_half: set[ir.Value] = set()  # float32 graph inputs that are read in half precision
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def is_half(self, value: ir.Value) -> bool:
        return value in self.as_half or value.dtype == self.half

    def feed(self, node: ir.Node, wanted: ir.DataType) -> None:
        """Give a node its float inputs in one type."""
        for index, _ in _float_inputs(node):
            self.replace(node, index, wanted)

    def replace(self, node: ir.Node, index: int, wanted: ir.DataType) -> None:
        value = node.inputs[index]
        assert value is not None
        if value.dtype != wanted:
            node.replace_input_with(index, self._cast(value, wanted))

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if (value, wanted) not in self._made:
            suffix = "float" if wanted == FLOAT else "half"
            self._made[value, wanted] = add_cast(value, wanted, f"{value.name}_{suffix}")
        return self._made[value, wanted]


def _narrow_weights(graph: ir.Graph, half: ir.DataType) -> None:
    """Weights that are only read in half precision are stored so, one at a time as the model is saved."""
    for value in list(graph.initializers.values()):
        readers = [node for node, _ in value.uses()]
        if value.dtype != FLOAT or not readers or not all(_casts_to(node, half) for node in readers):
            continue
        tensor = value.const_value
        assert tensor is not None and value.shape is not None
        value.const_value = ir.LazyTensor(
            partial(_narrowed, tensor, half), dtype=half, shape=value.shape, name=value.name
        )
        value.dtype = half
        for node in readers:
            out = node.outputs[0]
            out.replace_all_uses_with(value)
            assert node.graph is not None
            node.graph.remove(node, safe=True)


def _narrowed(tensor: ir.TensorProtocol, half: ir.DataType) -> ir.TensorProtocol:
    with np.errstate(over="ignore"):  # the caller names what overflows, and checks what comes out
        return ir.Tensor(tensor.numpy().astype(NUMPY[half]), name=tensor.name)


def _casts_to(node: ir.Node, half: ir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == half
