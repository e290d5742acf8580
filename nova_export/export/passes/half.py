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


def _convert(
    graph: ir.Graph,
    half: ir.DataType,
    float_inputs: frozenset[str],
    float_nodes: frozenset[str],
    casts: _Casts,
) -> list[str]:
    kept = []
    for value in graph.inputs:
        if value.dtype == FLOAT and value.name not in float_inputs:
            casts.as_half.add(value)
    for node in list(graph):
        if node.op_type == "Scan":
            kept += _convert_scan(node, half, float_nodes, casts)
            continue
        data = list(_float_inputs(node))
        floats = [value for value in node.outputs if value.dtype == FLOAT]
        if not floats and not data:
            continue
        wanted = FLOAT if node.name in float_nodes else _type_of(node, data, half, casts)
        if wanted == FLOAT and floats:
            kept.append(str(node.name))
        casts.feed(node, wanted)
        for value in floats:
            if wanted == half:
                casts.made_half(value)
    for index, value in enumerate(graph.outputs):
        if value.dtype == half:
            graph.outputs[index] = casts.output(value, graph)
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
            casts.born_half.add(inner)
    return _convert(body, half, frozenset(str(value.name) for value in body.inputs), float_nodes, casts)


def _float_inputs(node: ir.Node) -> Iterator[ir.Value]:
    for index, value in enumerate(node.inputs):
        if value is None or (node.op_type, index) in OWN_TYPE:
            continue
        if value.dtype == FLOAT or value.dtype in NUMPY:
            yield value


class _Casts:
    """Which values are in half precision, and the casts between the two; each cast is made once."""

    def __init__(self, half: ir.DataType) -> None:
        self.half = half
        self.as_half: set[ir.Value] = set()  # float32 graph inputs that are read in half precision
        self.born_half: set[ir.Value] = set()
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def is_half(self, value: ir.Value) -> bool:
        return value in self.as_half or value in self.born_half

    def made_half(self, value: ir.Value) -> None:
        value.dtype = self.half
        self.born_half.add(value)

    def feed(self, node: ir.Node, wanted: ir.DataType) -> None:
        """Give a node its float inputs in one type."""
        for index, value in enumerate(node.inputs):
            if (
                value is not None
                and (node.op_type, index) not in OWN_TYPE
                and value.dtype in (FLOAT, self.half)
            ):
                self.replace(node, index, wanted)

    def replace(self, node: ir.Node, index: int, wanted: ir.DataType) -> None:
        value = node.inputs[index]
        assert value is not None
        if value.dtype != wanted:
            node.replace_input_with(index, self._cast(value, wanted, node))

    def output(self, value: ir.Value, graph: ir.Graph) -> ir.Value:
        """A graph output in half precision, cast back under its own name."""
        name = str(value.name)
        value.name = f"{name}_half"
        node = ir.node("Cast", [value], {"to": FLOAT}, name=f"cast_{name}")
        out = node.outputs[0]
        out.name, out.shape, out.dtype = name, value.shape, FLOAT
        graph.append(node)
        return out

    def _cast(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node) -> ir.Value:
        """Behind what makes the value; for an input or a weight, before its first reader in that graph."""
        key = value, wanted
        if key not in self._made:
            suffix = "float" if wanted == FLOAT else "half"
            node = ir.node("Cast", [value], {"to": wanted}, name=f"cast_{value.name}_{suffix}")
            out = node.outputs[0]
            out.name, out.shape, out.dtype = f"{value.name}_{suffix}", value.shape, wanted
            producer = value.producer()
            if producer is not None:
                assert producer.graph is not None
                producer.graph.insert_after(producer, node)
            else:
                owner = value.graph
                assert owner is not None
                owner.insert_before(owner.node(0), node)
            self._made[key] = out
        return self._made[key]


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
