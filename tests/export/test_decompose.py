"""passes.decompose: graphs for parsers that do not know young operators compute what the others do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nova_export.bundle import Bundle
from nova_export.errors import ExportError
from nova_export.runtime.runner import OrtRunner
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

from nova_export.export.passes.decompose import REWRITES, decompose  # noqa: E402
from nova_export.export.verify import sample_inputs, verify_sizes  # noqa: E402

BundleOf = Callable[[str], Path]


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


@pytest.mark.parametrize("name", ["t2v-rope", "t2i"])
def test_every_stage_computes_the_same(golden_bundle: BundleOf, tmp_path: Path, name: str) -> None:
    bundle = Bundle.open(golden_bundle(name))
    rewritten: Counter[str] = Counter()
    for stage, entry in bundle.stages.items():
        model = ir.load(bundle.path(entry.graph))
        before = kinds(model)
        done = decompose(model, 20)
        assert done == {kind: before[kind] for kind in REWRITES if before[kind]}
        assert not REWRITES.keys() & kinds(model).keys()
        rewritten += done
        graph = tmp_path / entry.graph
        ir.save(model, graph, external_data=f"{entry.graph}.data")
        onnx.checker.check_model(str(graph), full_check=True)
        for sizes in verify_sizes(entry.spec, bundle.config):
            found = []
            for path in (bundle.path(entry.graph), graph):
                with OrtRunner(entry.spec, path, threads=1) as runner:
                    outputs = runner.run(sample_inputs(entry.spec, bundle.config, sizes, seed=1))
                    found.append({key: value.copy() for key, value in outputs.items()})
            for key, expected in found[0].items():
                np.testing.assert_allclose(found[1][key], expected, atol=2e-4, err_msg=f"{stage} {sizes}")
    assert rewritten.keys() == REWRITES.keys()


def test_what_has_no_young_operator_stays_as_it_is(golden_bundle: BundleOf) -> None:
    model = ir.load(golden_bundle("t2i") / "diffusion_head.onnx")
    before = [(node.op_type, node.name) for node in model.graph.all_nodes()]
    assert not decompose(model, 20)
    assert [(node.op_type, node.name) for node in model.graph.all_nodes()] == before
    assert model.opset_imports == {"": 20}


def test_a_float_mask_is_added_and_a_given_scale_used(tmp_path: Path) -> None:
    """Forms that no stage has today, against ONNX Runtime's own operator."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[B, 2, L, 4] q, float[B, 2, S, 4] k, float[B, 2, S, 4] v, float[B, 1, L, S] mask)
        => (float[B, 2, L, 4] out) { out = Attention <scale: float = 0.9> (q, k, v, mask) }"""
    model = ir.from_onnx_text(text)
    ir.save(model, tmp_path / "young.onnx")
    decompose(model, 20)
    ir.save(model, tmp_path / "old.onnx")
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 2, 3, 4), "k": (2, 2, 5, 4), "v": (2, 2, 5, 4), "mask": (2, 1, 3, 5)}
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    import onnxruntime

    paths = (tmp_path / f"{name}.onnx" for name in ("young", "old"))
    young, old = (onnxruntime.InferenceSession(path).run(None, inputs)[0] for path in paths)
    np.testing.assert_allclose(old, young, atol=1e-6)


def test_other_forms_are_refused() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[1, 2, L, 4] q) => (float[1, 2, L, 4] out) { out = Attention <softcap: float = 5.0> (q, q, q) }"""
    with pytest.raises(ExportError, match=r"Attention with softcap 5\.0 cannot be decomposed"):
        decompose(ir.from_onnx_text(text), 20)


@pytest.mark.slow  # exports and verifies all stages once more
def test_a_bundle_for_a_jetson(tmp_path: Path) -> None:
    """Built and verified here; with its graphs of opset 20 it runs on a CPU."""
    out, checkpoint = tmp_path / "bundle", GOLDEN / "t2i" / "checkpoint"
    build = ("build", checkpoint, "-o", out, "--target", "jetson-orin", "--no-engines", "-q")
    only_error(
        nova_export(*build, "--precision", "int4-weights"), 2, "text_encoder", "int4-weights", "jetson-orin"
    )
    assert nova_export(*build, "--precision", "fp16").code == 0
    for entry in Bundle.open(out).stages.values():
        model = onnx.load(out / entry.graph, load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
        assert entry.verified
    made = nova_export("run", "a red circle", "--bundle", out, "-o", tmp_path / "out.png", "-q")
    assert made.code == 0, made.err
