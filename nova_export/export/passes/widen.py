"""Arithmetic in float32 on values in bfloat16, for a runtime that has no kernels for bfloat16.

Every operator reads its inputs as float32 and its result is rounded, as kernels of GPUs do, which add up in
float32 too. Weights are stored in bfloat16. Slower than float32: for checking, and for small files.
"""

from __future__ import annotations

import onnx_ir as ir

FLOAT, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


def widen(model: ir.Model) -> int:
    """Change `model` in place; how many nodes were changed. Casts stay as they are."""
    changed = 0
    read: dict[ir.Value, ir.Value] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if node.op_type in ("Cast", "Scan"):
                continue
            narrow_inputs = [i for i, v in enumerate(node.inputs) if v is not None and v.dtype == BFLOAT16]
            narrow_outputs = [value for value in node.outputs if value.dtype == BFLOAT16]
            for index in narrow_inputs:
                value = node.inputs[index]
                assert value is not None
                node.replace_input_with(index, _read(value, read))
            for value in narrow_outputs:
                _round(node, value)
            changed += bool(narrow_inputs or narrow_outputs)
    return changed


def _read(value: ir.Value, read: dict[ir.Value, ir.Value]) -> ir.Value:
    """The value as float32; the cast stands where the value is made."""
    if value not in read:
        node = _cast(value, FLOAT, f"{value.name}_read")
        producer, owner = value.producer(), value.graph
        if producer is not None and producer.graph is not None:
            producer.graph.insert_after(producer, node)
        else:
            assert owner is not None
            owner.insert_before(owner.node(0), node)
        read[value] = node.outputs[0]
    return read[value]


def _round(node: ir.Node, value: ir.Value) -> None:
    """Let the node make float32, and a cast behind it what its readers know by the value's name."""
    readers, name = list(value.uses()), value.name
    value.name, value.dtype = f"{name}_exact", FLOAT
    cast = _cast(value, BFLOAT16, str(name))
    assert node.graph is not None
    node.graph.insert_after(node, cast)
    for reader, index in readers:
        reader.replace_input_with(index, cast.outputs[0])


def _cast(value: ir.Value, wanted: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": wanted}, name=f"cast_{name}")
    out = node.outputs[0]
    out.name, out.shape, out.dtype = name, value.shape, wanted
    return node
