"""Casts: what the passes over number types have in common."""

from __future__ import annotations

import onnx_ir as ir


def add_cast(value: ir.Value, wanted: ir.DataType, name: str) -> ir.Value:
    """`value` in another type, as a new value `name`: behind what makes it, or first of all."""
    node = ir.node("Cast", [value], {"to": wanted}, name=f"cast_{name}")
    out = node.outputs[0]
    out.name, out.shape, out.dtype = name, value.shape, wanted
    producer, graph = value.producer(), value.graph
    assert graph is not None
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph.node(0), node)
    return out
