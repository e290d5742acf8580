"""nova_export.export.onnx_export: golden checkpoints become graphs of the form that runtimes count on."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from nova_export.bundle import Bundle
from nova_export.config import NovaConfig
from nova_export.errors import ExportError
from nova_export.runtime.runner import OrtRunner
from nova_export.spec import Axis, Stage, Tensor
from nova_export.stages import cache_names, stages
from tests.conftest import GOLDEN
from tests.strategies import configs

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from nova_export.export.onnx_export import OPSET, export_onnx, is_dynamic, trace_sizes  # noqa: E402
from nova_export.export.verify import check_cases, run_module, sample_inputs  # noqa: E402
from reference_model.checkpoint import load_module  # noqa: E402

BundleOf = Callable[[str], Path]
GOLDEN_NAMES = ("t2v", "t2v-rope", "t2i")
every_checkpoint = pytest.mark.parametrize("name", GOLDEN_NAMES)


def graphs(folder: Path) -> dict[str, tuple[Stage, Any]]:
    """Spec and ONNX model, without its weights, of every stage of a bundle."""
    bundle = Bundle.open(folder)
    return {
        name: (entry.spec, onnx.load(folder / entry.graph, load_external_data=False))
        for name, entry in bundle.stages.items()
    }


@every_checkpoint
def test_opset_and_domains(golden_bundle: BundleOf, name: str) -> None:
    """Standard operators of one opset only: nothing that a runtime must be taught."""
    for stage, (_, model) in graphs(golden_bundle(name)).items():
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)], stage
        assert len(model.functions) == 0, stage


@every_checkpoint
def test_nodes_name_their_module_and_no_file_of_the_machine(golden_bundle: BundleOf, name: str) -> None:
    for stage, (_, model) in graphs(golden_bundle(name)).items():
        data = model.SerializeToString()
        assert b"reference_model." in data and b".py" not in data and b"/lib/" not in data, stage


@every_checkpoint
def test_attention_stays_one_node_a_layer(golden_bundle: BundleOf, name: str) -> None:
    config = NovaConfig.from_checkpoint(GOLDEN / name / "checkpoint")
    assert config.text_encoder is not None
    layers = {
        "text_encoder": config.text_encoder["num_hidden_layers"],
        "condition": 0,
        "temporal_encoder": config.temporal.depth,
        "spatial_encoder": config.spatial.depth,
        "diffusion_head": 0,
        "vae_encoder": 1,
        "vae_decoder": 1,
    }
    for stage, (_, model) in graphs(golden_bundle(name)).items():
        kinds = Counter(node.op_type for node in model.graph.node)
        assert kinds["Attention"] == layers[stage], stage
        assert kinds["Softmax"] == 0, stage


@every_checkpoint
def test_names_types_and_sizes_are_the_spec_s(golden_bundle: BundleOf, name: str) -> None:
    types = {
        "float32": onnx.TensorProto.FLOAT,
        "int64": onnx.TensorProto.INT64,
        "bool": onnx.TensorProto.BOOL,
    }
    for spec, model in graphs(golden_bundle(name)).values():
        assert [value.name for value in model.graph.input] == [t.name for t in spec.inputs]
        assert [value.name for value in model.graph.output] == [t.name for t in spec.outputs]
        for value, tensor in zip(model.graph.input, spec.inputs, strict=True):
            assert value.type.tensor_type.elem_type == types[tensor.dtype]
            for dim, size in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
                fixed = spec.axis(size).max if isinstance(size, str) else size
                if is_dynamic(spec, size):
                    assert dim.dim_param and not dim.dim_value, (spec.name, tensor.name, size)
                else:
                    assert dim.dim_value == fixed, (spec.name, tensor.name, size)


@every_checkpoint
def test_weights_stand_beside_the_graph(golden_bundle: BundleOf, name: str) -> None:
    """Under the checkpoint's names; so a graph is small, and a weight is found again."""
    folder = golden_bundle(name)
    for stage, (_, model) in graphs(folder).items():
        assert (folder / f"{stage}.onnx.data").stat().st_size > (folder / f"{stage}.onnx").stat().st_size / 10
        assert not [tensor.name for tensor in model.graph.initializer if tensor.name.startswith("module.")]
    weights = {t.name for t in graphs(folder)["spatial_encoder"][1].graph.initializer}
    assert "image_encoder.blocks.0.mlp.fc1.bias" in weights


@every_checkpoint
def test_caches_are_written_in_place(golden_bundle: BundleOf, name: str) -> None:
    """One ScatterND a cache, straight from input to output; no Concat, which would copy more each frame."""
    spec, model = graphs(golden_bundle(name))["temporal_encoder"]
    producer = {output: node for node in model.graph.node for output in node.output}
    caches = cache_names(NovaConfig.from_checkpoint(GOLDEN / name / "checkpoint"))
    assert [t.alias for t in spec.outputs if t.alias] == caches
    for cache in caches:
        node = producer[f"new_{cache}"]
        assert node.op_type == "ScatterND" and node.input[0] == cache, cache
        readers = {other.op_type for other in model.graph.node if cache in other.input}
        assert readers <= {"ScatterND", "Shape"}, cache
    cache_sized = {*caches, *(f"new_{cache}" for cache in caches)}
    for node in model.graph.node:
        assert node.op_type != "Concat" or not cache_sized & set(node.input), node.name


@every_checkpoint
def test_diffusion_steps_are_one_scan(golden_bundle: BundleOf, name: str) -> None:
    """Its body holds the network once, whatever the number of steps."""
    _, model = graphs(golden_bundle(name))["diffusion_head"]
    assert Counter(node.op_type for node in model.graph.node)["Scan"] == 1
    (scan,) = (node for node in model.graph.node if node.op_type == "Scan")
    (body,) = (attribute.g for attribute in scan.attribute if attribute.name == "body")
    config = NovaConfig.from_checkpoint(GOLDEN / name / "checkpoint")
    products = [node for node in body.node if node.op_type in ("Gemm", "MatMul")]
    assert len(products) == 1 + 3 * config.head.depth + 2  # patches, blocks (3 each), final norm and output


SIZES = {
    "text_encoder": [{"prompts": 1, "length": 1}, {"prompts": 4, "length": 11}],
    "condition": [{"rows": 1}, {"rows": 7}],
    "temporal_encoder": [{"rows": 1, "text": 0}, {"rows": 5, "text": None}],
    "spatial_encoder": [{"rows": 1, "predicted": 0, "next": 1}, {"rows": 5, "predicted": 7, "next": 3}],
    "diffusion_head": [
        {"passes": 1, "samples": 1, "next": 1, "steps": 1, "rest": 1},
        {"passes": 3, "samples": 4, "next": 6, "steps": 2, "rest": 3},
    ],
}


@pytest.mark.parametrize("stage", SIZES)
@pytest.mark.parametrize("name", ["t2v", "t2v-rope"])
def test_dynamic_axes_are_dynamic(golden_bundle: BundleOf, name: str, stage: str) -> None:
    """Sizes that were neither traced nor verified, the smallest too: no known token, one row, no text."""
    folder, checkpoint = golden_bundle(name), GOLDEN / name / "checkpoint"
    config = NovaConfig.from_checkpoint(checkpoint)
    spec = stages(config)[stage]
    module = load_module(spec, config, checkpoint)
    cases = []
    for case, wanted in enumerate(SIZES[stage]):
        sizes = {key: config.condition_tokens if size is None else size for key, size in wanted.items()}
        if stage == "temporal_encoder":
            sizes["capacity"] = config.condition_tokens + 4 * config.frame_tokens
        inputs = sample_inputs(spec, config, sizes, seed=100 + case)
        cases.append((sizes, inputs, run_module(spec, module, inputs)))
    with OrtRunner(spec, folder / f"{stage}.onnx") as runner:
        assert check_cases(spec, runner, cases)["cases"] == len(cases)


def test_outputs_that_alias_are_the_input_itself(golden_bundle: BundleOf) -> None:
    config = NovaConfig.from_checkpoint(GOLDEN / "t2v" / "checkpoint")
    spec = stages(config)["temporal_encoder"]
    sizes = {
        "rows": 1,
        "text": config.condition_tokens,
        "capacity": config.condition_tokens + 2 * config.frame_tokens,
    }
    inputs = sample_inputs(spec, config, sizes, seed=0)
    with OrtRunner(spec, golden_bundle("t2v") / "temporal_encoder.onnx") as runner:
        outputs = runner.run(inputs)
    for cache in cache_names(config):
        assert outputs[f"new_{cache}"] is inputs[cache]


@given(configs)
def test_traced_sizes_are_told_apart(config: NovaConfig) -> None:
    """torch.export bakes 0 and 1 in, and takes axes of the same size for one axis."""
    for stage in stages(config).values():
        sizes = trace_sizes(stage)
        assert sizes.keys() == {axis.name for axis in stage.axes}
        assert min(sizes.values(), default=2) >= 2 and len(set(sizes.values())) == len(sizes)


class Doubled(torch.nn.Module):
    def forward(self, x: Any) -> tuple[Any, Any]:
        return x * 2, x.sum(1)


def stage_of(*outputs: Tensor) -> Stage:
    x = Tensor("x", "float32", ("rows", 3))
    return Stage("doubled", "m:M", "part", (), "step", (x,), outputs, (Axis("rows", 1, 2, 9),))


TWICE, SUMMED = Tensor("twice", "float32", ("rows", 3)), Tensor("summed", "float32", ("rows",))


def test_any_module_with_a_spec_is_exported(tmp_path: Path) -> None:
    stage = stage_of(TWICE, SUMMED)
    export_onnx(stage, Doubled(), tmp_path / "doubled.onnx")
    with OrtRunner(stage, tmp_path / "doubled.onnx") as runner:
        x = np.arange(9, dtype=np.float32).reshape(3, 3)
        outputs = runner.run({"x": x})
    np.testing.assert_array_equal(outputs["twice"], 2 * x)
    np.testing.assert_array_equal(outputs["summed"], [3, 12, 21])


def test_what_the_exporter_says_is_not_the_user_s(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    def talkative(*arguments: Any, **options: Any) -> Any:
        print("exporting")
        warnings.warn("deprecated", stacklevel=1)
        logging.getLogger("torch.onnx").warning("pruned")
        return original(*arguments, **options)

    original = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", talkative)
    export_onnx(stage_of(TWICE, SUMMED), Doubled(), tmp_path / "doubled.onnx")
    assert capfd.readouterr().out == "" and len(recwarn) == 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert logging.getLogger("torch.onnx").isEnabledFor(logging.WARNING)  # again


def test_a_graph_unlike_its_spec_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "doubled.onnx"
    with pytest.raises(ExportError, match="stage doubled: the graph has 2 outputs, the spec 1"):
        export_onnx(stage_of(TWICE), Doubled(), path)
    with pytest.raises(ExportError, match="stage doubled: summed came out as"):
        export_onnx(stage_of(TWICE, Tensor("summed", "float32", ("rows", 1))), Doubled(), path)
    assert not path.exists()


def test_a_module_that_cannot_be_exported_names_its_stage(tmp_path: Path) -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ExportError, match=r"stage doubled: torch.onnx.export failed"):
        export_onnx(stage_of(TWICE), Branches(), tmp_path / "doubled.onnx")
