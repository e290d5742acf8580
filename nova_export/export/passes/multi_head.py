"""Attention without a mask as ONNX Runtime's own MultiHeadAttention, whose CPU kernel never holds the scores.

The kernel of ONNX's Attention writes all queries times all keys to memory, 200 MB at full size, and takes the
softmax there; the other goes through them in pieces that stay in a core's cache. Both compute the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

DOMAIN = "com.microsoft"
SWAP = {"perm": [0, 2, 1, 3]}  # heads and tokens


def to_multi_head(model: ir.Model) -> int:
    """Change `model` in place; how many operators were changed. Those with a mask or a cache stay.

    Around each are transposes that undo those of the graph; ONNX Runtime removes both when it loads it.
    """
    changed = 0
    for node in list(model.graph):
        if node.op_type != "Attention" or not _is_plain(node):
            continue
        query = node.inputs[0]
        shape = query.shape if query is not None else None
        if shape is None or len(shape) != 4:
            continue
        heads, width = shape[1], shape[3]
        if isinstance(heads, int) and isinstance(width, int):
            _replace(model.graph, node, heads, width)
            changed += 1
    if changed:
        model.opset_imports[DOMAIN] = 1
    return changed


def _is_plain(node: ir.Node) -> bool:
    """Whether it is softmax(q k^T scale) v and nothing else."""
    flags = {name: attribute.value for name, attribute in node.attributes.items() if name != "scale"}
    further = [value for value in node.inputs[3:] if value is not None]
    return not further and not any(flags.values()) and not any(value.uses() for value in node.outputs[1:])


def _replace(graph: ir.Graph, node: ir.Node, heads: int, width: int) -> None:
    tape, old = Tape(), node.outputs[0]
    joined = tape.initializer(ir.Tensor(np.array([0, 0, heads * width]), name=f"{node.name}_joined"))
    split = tape.initializer(ir.Tensor(np.array([0, 0, heads, width]), name=f"{node.name}_split"))
    flat = [tape.op("Reshape", [tape.op("Transpose", [value], SWAP), joined]) for value in node.inputs[:3]]
    attributes: dict[str, int | float] = {"num_heads": heads}
    if scale := node.attributes.get("scale"):
        attributes["scale"] = scale.as_float()
    attended = tape.op("MultiHeadAttention", flat, attributes, domain=DOMAIN)
    value = tape.op("Transpose", [tape.op("Reshape", [attended, split])], SWAP)
    for index, each in enumerate(tape.nodes):
        each.name = f"{node.name}_{index}_{each.op_type}"
        each.metadata_props.update(node.metadata_props)
        each.outputs[0].name = each.name
        if old.dtype is not None:
            each.outputs[0].dtype = old.dtype
    for constant in tape.initializers:
        graph.register_initializer(constant)
    graph.insert_before(node, tape.nodes)
    name, value.shape = old.name, old.shape
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name = name
