"""Operators that came into ONNX late, in terms of older ones: for parsers such as TensorRT 10.3's (opset 20).

Attention becomes two products around a softmax, RotaryEmbedding products and sums, GroupNormalization, whose
weights are per channel only from opset 21 on, an InstanceNormalization of its groups. What the operators
compute is in https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from nova_export.errors import ExportError

MASKED = -30000.0  # a score that leaves nothing after the softmax, and that float16 holds


def decompose(model: ir.Model, opset: int) -> Counter[str]:
    """Change `model` in place to an older opset; how many operators of each kind were rewritten.

    Raises ExportError for a form of an operator that NOVA's stages do not have.
    """
    done: Counter[str] = Counter()
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if rewrite := REWRITES.get(node.op_type):
                tape = Tape()
                value = rewrite(node, tape)
                _put_in_place(graph, node, tape, value)
                done[node.op_type] += 1
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
    model.opset_imports[""] = opset
    return done


def _attention(node: ir.Node, tape: Tape) -> ir.Value:
    query, key, value, mask = (*node.inputs, None)[:4]
    _only(node, 4, softcap=0.0, qk_matmul_output_mode=0)
    assert query is not None and key is not None and value is not None
    if query.shape is None or len(query.shape) != 4 or not isinstance(width := query.shape[3], int):
        raise ExportError(f"node {node.name}: an Attention of {query.shape} cannot be decomposed")
    given = node.attributes.get("scale")
    scale = given.as_float() if given else 1 / math.sqrt(width)
    scaled = tape.op("Mul", [query, _constant(tape, node, "scale", scale)])
    scores = tape.op("MatMul", [scaled, tape.op("Transpose", [key], {"perm": [0, 1, 3, 2]})])
    masks = [mask] if mask is not None else []
    if "is_causal" in node.attributes and node.attributes["is_causal"].as_int():
        masks.append(_causal(node, tape, query, key))
    masked = _constant(tape, node, "masked", MASKED)
    for each in masks:
        if each.dtype == ir.DataType.BOOL:
            scores = tape.op("Where", [each, scores, masked])
        else:
            scores = tape.op("Add", [scores, each])
    return tape.op("MatMul", [tape.op("Softmax", [scores], {"axis": -1}), value])


def _causal(node: ir.Node, tape: Tape, query: ir.Value, key: ir.Value) -> ir.Value:
    """(L, S): each query attends to keys no further on."""
    none = _constant(tape, node, "none", 0, np.int64)
    one = _constant(tape, node, "one", 1, np.int64)
    places = []
    for of, axis in ((query, 1), (key, 0)):
        count = tape.op("Squeeze", [tape.op("Shape", [of], {"start": 2, "end": 3})])
        at = _constant(tape, node, f"axis_{axis}", [axis], np.int64)
        places.append(tape.op("Unsqueeze", [tape.op("Range", [none, count, one]), at]))
    seen = tape.op("GreaterOrEqual", places)
    seen.dtype = ir.DataType.BOOL
    return seen


def _rotary_embedding(node: ir.Node, tape: Tape) -> ir.Value:
    """Halves a, b of each head's channels: (a cos - b sin, b cos + a sin)."""
    x, cos, sin = (*node.inputs, None)[:3]
    _only(node, 3, interleaved=0, rotary_embedding_dim=0)
    assert x is not None and cos is not None and sin is not None
    axis = _constant(tape, node, "axis", [1], np.int64)
    cos, sin = (tape.op("Unsqueeze", [each, axis]) for each in (cos, sin))  # the same for all heads
    a, b = tape.op_multi_out("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    first = tape.op("Sub", [tape.op("Mul", [a, cos]), tape.op("Mul", [b, sin])])
    second = tape.op("Add", [tape.op("Mul", [b, cos]), tape.op("Mul", [a, sin])])
    return tape.op("Concat", [first, second], {"axis": -1})


def _group_normalization(node: ir.Node, tape: Tape) -> ir.Value:
    x, scale, bias = node.inputs
    assert x is not None and x.shape is not None
    groups = node.attributes["num_groups"].as_int()
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    grouped = tape.op("Reshape", [x, _constant(tape, node, "grouped", [0, groups, -1], np.int64)])
    ones, zeros = (_constant(tape, node, f"all_{v}", [float(v)] * groups) for v in (1, 0))
    normal = tape.op("InstanceNormalization", [grouped, ones, zeros], {"epsilon": epsilon})
    normal = tape.op("Reshape", [normal, tape.op("Shape", [x])])
    per_channel = [-1] + [1] * (len(x.shape) - 2)
    factor, summand = (_reshaped(tape, node, weight, per_channel) for weight in (scale, bias))
    return tape.op("Add", [tape.op("Mul", [normal, factor]), summand])


REWRITES: dict[str, Callable[[ir.Node, Tape], ir.Value]] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary_embedding,
    "GroupNormalization": _group_normalization,
}


def _only(node: ir.Node, inputs: int, **attributes: float) -> None:
    """Refuse further inputs, outputs in use, and attributes other than these."""
    further = [value for value in node.inputs[inputs:] if value is not None]
    if further or any(value.uses() for value in node.outputs[1:]):
        raise ExportError(f"node {node.name}: {node.op_type} with a cache or positions cannot be decomposed")
    for name, value in attributes.items():
        if name in node.attributes and (given := node.attributes[name].value) != value:
            raise ExportError(f"node {node.name}: {node.op_type} with {name} {given} cannot be decomposed")


def _constant(
    tape: Tape, node: ir.Node, what: str, value: float | list[float] | list[int], dtype: type = np.float32
) -> ir.Value:
    return tape.initializer(ir.Tensor(np.array(value, dtype), name=f"{node.name}_{what}"))


def _reshaped(tape: Tape, node: ir.Node, weight: ir.Value | None, shape: list[int]) -> ir.Value:
    assert weight is not None and weight.const_value is not None
    array = weight.const_value.numpy().reshape(shape)
    return tape.initializer(ir.Tensor(array, name=f"{weight.name}_per_channel"))


def _put_in_place(graph: ir.Graph, node: ir.Node, tape: Tape, value: ir.Value) -> None:
    """The tape's nodes instead of a node, under its names and with what is known of it."""
    old = node.outputs[0]
    for index, each in enumerate(tape.nodes):
        each.name = f"{node.name}_{index}_{each.op_type}"
        each.metadata_props.update(node.metadata_props)
        for place, out in enumerate(each.outputs):
            out.name = f"{each.name}_{place}"
    for constant in tape.initializers:
        graph.register_initializer(constant)
    graph.insert_before(node, tape.nodes)
    assert old.dtype is not None
    value.shape, value.dtype, name = old.shape, old.dtype, old.name
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name = name
