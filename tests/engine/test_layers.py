"""What is read out of TensorRT's list of layers."""

from __future__ import annotations

from nova_export.engine.layers import layers_of


def tensor(name: str, numbers: str) -> str:
    return f"{{ Name: {name}, Dimensions: [-1,64], Strides: [64,1], Datatype: {numbers}, Format: (Linear) }}"


def layer(name: str, kind: str, inputs: str, weights: str, outputs: str, *nodes: str) -> str:
    """As TensorRT-RTX 1.7 writes it."""
    said = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs} ], Constants: [ {weights} ], "
        f"Outputs: [ {outputs} ], TacticName: t_{name}, StreamId: 0, Metadata: {said}"
    )


def test_layers_of_a_kind_are_counted_by_what_they_compute_in() -> None:
    x, y, w, b = tensor("x", "Half"), tensor("y", "Half"), tensor("w", "Int8"), tensor("b", "Float")
    said = "\n".join(
        [
            "Layers:",
            layer("node_MatMul_1", "gemm", x, f"{w}, {b}", y, "node_MatMul_1", "node_add"),
            layer("node_MatMul_2", "gemm", y, f"{b}, {w}", x, "node_MatMul_2"),
            layer("node_MatMul_3", "gemm", x, tensor("w", "Half"), y, "node_MatMul_3"),
            layer("_gemm_mha_v2_myl0_9", "kgen", f"{x}, {y}", "", y, "node_attention"),
            layer("__mye20145", "shape_call", "", "", ""),
            "",
            "I/O Tensors:",
            " Name: x, IOMode: Input, DataType: Half",
        ]
    )
    keys = ("kind", "inputs", "weights", "outputs", "layers", "nodes")
    assert [tuple(each[key] for key in keys) for each in layers_of(said)] == [
        ("gemm", "Half", "Float+Int8", "Half", 2, 3),
        ("gemm", "Half", "Half", "Half", 1, 1),
        ("attention", "Half", "", "Half", 1, 1),
        ("shape_call", "", "", "", 1, 0),
    ]


def test_other_messages_have_none() -> None:
    assert (
        layers_of("Total Weights Memory: 1223296 bytes\nLayer: {ForeignNode[a]} Host Persistent: 80 bytes")
        == []
    )
