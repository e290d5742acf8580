"""Attention as ONNX Runtime's MultiHeadAttention: the same numbers, and only where there is no mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nova_export.bundle import Bundle
from nova_export.runtime.runner import OrtRunner

ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from nova_export.export.passes.multi_head import to_multi_head  # noqa: E402
from nova_export.export.verify import sample_inputs  # noqa: E402


@pytest.mark.parametrize("name", ["t2v", "t2v-rope"])
def test_the_spatial_encoder_computes_the_same(
    golden_bundle: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """With rotary positions too, which stand between the layer and attention. No transpose is left to run."""
    bundle = Bundle.open(golden_bundle(name))
    stage, path = bundle.stages["spatial_encoder"].spec, bundle.path("spatial_encoder.onnx")
    model = ir.load(path)
    assert to_multi_head(model) == bundle.config.spatial.depth
    assert to_multi_head(model) == 0
    changed = tmp_path / "changed.onnx"
    ir.save(model, changed, external_data="changed.onnx.data")
    inputs = sample_inputs(stage, bundle.config, {axis.name: axis.opt for axis in stage.axes}, seed=0)
    with OrtRunner(stage, path) as before, OrtRunner(stage, changed) as after:
        expected, made = before.run(inputs)["z"], after.run(inputs)["z"]
    np.testing.assert_allclose(made, expected, atol=2e-5 * np.abs(expected).max())
    if name == "t2v":
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        ort.InferenceSession(changed, options)
        loaded = Counter(node.op_type for node in ir.load(tmp_path / "loaded.onnx").graph)
        assert loaded["MultiHeadAttention"] and not loaded["Transpose"]


def test_a_mask_leaves_attention_as_it_is(golden_bundle: Callable[[str], Path]) -> None:
    """The temporal encoder attends to what its caches hold, the text encoder to what came before."""
    bundle = Bundle.open(golden_bundle("t2v"))
    for name in ("temporal_encoder", "text_encoder"):
        model = ir.load(bundle.path(f"{name}.onnx"))
        before = [(node.name, node.op_type) for node in model.graph]
        assert to_multi_head(model) == 0
        assert [(node.name, node.op_type) for node in model.graph] == before
        assert set(model.opset_imports) == {""}


def test_an_own_scale_is_kept(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[B, 2, L, 4] q, float[B, 2, S, 4] k) => (float[B, 2, L, 4] out)
    { out = Attention <scale: float = 0.9> (q, k, k) }"""
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal((3, 2, size, 4), np.float32) for n, size in (("q", 5), ("k", 7))}
    results = []
    for changed in (0, 1):
        model = ir.from_onnx_text(text)
        if changed:
            assert to_multi_head(model) == 1
        ir.save(model, tmp_path / "m.onnx")
        results.append(ort.InferenceSession(tmp_path / "m.onnx").run(None, inputs)[0])
    np.testing.assert_allclose(results[1], results[0], atol=1e-6)
