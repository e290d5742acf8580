"""Products of 8 bits as ONNX Runtime's own operator: the same numbers, and the bias among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from nova_export.export.passes.integer_products import to_integer_products  # noqa: E402

WIDTH, ROWS = 64, 5
# left has a bias; right's product is read twice, so its bias cannot go into it; half is in weights alone.
GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[1, R, 64] x, int8[64, 96] w, float[96] w_scale, float[96] bias)
=> (float[1, R, 96] left, float[1, R, 96] right, float[1, R, 96] bare, float[1, R, 96] half)
<float scale = {0.03}, uint8 zero = {120}> {
    narrow = QuantizeLinear (x, scale, zero)
    wide = DequantizeLinear (narrow, scale, zero)
    weight = DequantizeLinear <axis: int = 1> (w, w_scale)
    a = MatMul (wide, weight)
    left = Add (bias, a)
    bare = MatMul (wide, weight)
    right = Add (bare, bias)
    half = MatMul (x, weight)
}"""


@pytest.fixture
def model() -> Any:
    made = ir.from_onnx_text(GRAPH)
    rng = np.random.default_rng(0)
    values = {
        "w": rng.integers(-127, 128, (WIDTH, 96), np.int8),
        "w_scale": rng.uniform(0.001, 0.02, 96).astype(np.float32),
        "bias": rng.standard_normal(96).astype(np.float32),
    }
    for value in list(made.graph.inputs)[1:]:
        value.const_value = ir.Tensor(values[value.name], name=value.name)
        made.graph.inputs.remove(value)
        made.graph.register_initializer(value)
    return made


def run(model: Any, folder: Path, x: Any) -> list[Any]:
    ir.save(model, folder / "model.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(folder / "model.onnx", options).run(None, {"x": x})


def test_the_same_to_rounding_and_where_it_may(model: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((1, ROWS, WIDTH), np.float32)
    expected = run(model, tmp_path, x)
    assert to_integer_products(model) == 2
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("MatMulIntegerToFloat") == 2 and kinds.count("MatMul") == 1 and kinds.count("Add") == 1
    assert kinds.count("DequantizeLinear") == 1  # the weights', which `half` still reads
    for made, wanted in zip(run(model, tmp_path, x), expected, strict=True):
        np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    assert to_integer_products(model) == 0


def test_floats_and_blocks_stay(model: Any) -> None:
    """A scale for a block of weights is none that the operator has."""
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 2:
            node.attributes["block_size"] = ir.AttrInt64("block_size", 32)
    before = [node.op_type for node in model.graph]
    assert to_integer_products(model) == 0
    assert [node.op_type for node in model.graph] == before and set(model.opset_imports) == {""}
