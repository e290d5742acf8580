"""Linear layers in 8 bits as ONNX Runtime's MatMulIntegerToFloat, bias and all.

From QuantizeLinear, DequantizeLinear and MatMul ONNX Runtime makes that operator by itself, but leaves the
bias to an Add, which costs up to a tenth of the layer: the whole result goes through memory once more.
"""

from __future__ import annotations

import onnx_ir as ir

from nova_export.export.passes import NAMESPACE

DOMAIN = "com.microsoft"


def to_integer_products(model: ir.Model) -> int:
    """Change `model` in place; how many layers were changed. Those in float or of weights alone stay."""
    changed = 0
    for node in list(model.graph):
        wide = _producer(node.inputs[0], "DequantizeLinear") if node.op_type == "MatMul" else None
        weight = _producer(node.inputs[1], "DequantizeLinear") if wide else None
        if wide is None or weight is None or not _producer(wide.inputs[0], "QuantizeLinear"):
            continue
        if weight.attributes.get_int("block_size", 0):
            continue
        _replace(model.graph, node, wide, weight)
        changed += 1
    if changed:
        model.opset_imports[DOMAIN] = 1
    return changed


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _replace(graph: ir.Graph, node: ir.Node, wide: ir.Node, weight: ir.Node) -> None:
    last, bias = node, None
    if (add := bias_of(node)) is not None:
        last, bias = add
    narrow, scale, zero = wide.inputs
    integers, weight_scale = weight.inputs[:2]
    inputs = [narrow, integers, scale, weight_scale, zero, None, bias]
    product = ir.node(
        "MatMulIntegerToFloat",
        inputs if bias else inputs[:5],
        domain=DOMAIN,
        name=f"{last.outputs[0].name}_product",
    )
    product.metadata_props[NAMESPACE] = node.metadata_props.get(NAMESPACE, "")
    old, new = last.outputs[0], product.outputs[0]
    name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(last, product)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    for each in dict.fromkeys([last, node]):
        graph.remove(each, safe=True)
    for each in (wide, weight):
        if not each.outputs[0].uses():
            graph.remove(each, safe=True)
    new.name = name


def bias_of(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """What adds a constant vector to a product, if that is all that becomes of it; and the vector."""
    users = node.outputs[0].consumers()
    if len(users) != 1 or users[0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    [bias] = [value for value in users[0].inputs if value is not node.outputs[0]] or [None]
    if bias is None or bias.const_value is None or len(bias.const_value.shape) != 1:
        return None
    return users[0], bias
