"""Arithmetic in float32 on values in bfloat16, for a runtime that has no kernels for bfloat16.

Every operator reads its inputs as float32 and its result is rounded, as kernels of GPUs do, which add up in
float32 too. Weights are stored in bfloat16. Slower than float32: for checking, and for small files.
"""

from __future__ import annotations

import onnx_ir as ir

from nova_export.export.passes.cast import add_cast

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
                _round(value)
            changed += bool(narrow_inputs or narrow_outputs)
    return changed


def _read(value: ir.Value, read: dict[ir.Value, ir.Value]) -> ir.Value:
    """The value as float32; cast once for all readers."""
    if value not in read:
        read[value] = add_cast(value, FLOAT, f"{value.name}_read")
    return read[value]


def _round(value: ir.Value) -> None:
    """Let its node make float32, and a cast behind it what its readers know by the value's name."""
    readers, name = list(value.uses()), str(value.name)
    value.name, value.dtype = f"{name}_exact", FLOAT
    rounded = add_cast(value, BFLOAT16, name)
    for reader, index in readers:
        reader.replace_input_with(index, rounded)
