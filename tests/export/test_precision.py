"""Half precision: the passes, what stays in float32, the gate, and a build of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nova_export as package
from nova_export.bundle import Bundle
from nova_export.child import environment
from nova_export.config import NovaConfig
from nova_export.errors import ExportError
from nova_export.evaluation.metrics import psnr
from nova_export.runtime.runner import OrtRunner
from nova_export.spec import Axis, Stage, Tensor
from nova_export.stages import stages
from nova_export.targets import PRECISIONS, TARGETS, find
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")
ml_dtypes = pytest.importorskip("ml_dtypes")

from onnx_ir.passes.common import ShapeInferencePass  # noqa: E402

from nova_export.export import precision as precision_module  # noqa: E402
from nova_export.export.build import build_bundle  # noqa: E402
from nova_export.export.onnx_export import export_onnx  # noqa: E402
from nova_export.export.passes.half import sums, to_half  # noqa: E402
from nova_export.export.passes.widen import widen  # noqa: E402
from nova_export.export.precision import change_precision, check_gate  # noqa: E402
from nova_export.export.verify import reference_cases  # noqa: E402
from nova_export.export.watch import Ranges  # noqa: E402
from reference_model.checkpoint import load_module  # noqa: E402

CPU = TARGETS[0]
FP16, BF16 = (find(PRECISIONS, name) for name in ("fp16", "bf16"))
FLOAT16, BFLOAT16, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT

TINY = Stage(
    name="tiny",
    module="",
    part="",
    prefixes=(),
    phase="",
    inputs=(Tensor("x", "float32", ("rows", 8)), Tensor("state", "float32", ("rows", 8))),
    outputs=(Tensor("y", "float32", ("rows", 8)),),
    axes=(Axis("rows", 1, 3, 9),),
)


class Tiny(torch.nn.Module):
    """A product, a norm, a power, and an addition to a state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return state + self.norm(self.linear(x)) ** 3


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    export_onnx(TINY, Tiny().eval(), tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"


def typed(path: Path) -> Any:
    model = ir.load(path)
    ShapeInferencePass()(model)
    return model


def types(model: Any) -> dict[str, set[Any]]:
    """Types of the outputs of every kind of node but casts."""
    found: dict[str, set[Any]] = {}
    for node in model.graph.all_nodes():
        if node.op_type != "Cast":
            found.setdefault(node.op_type, set()).update(value.dtype for value in node.outputs)
    return found


def test_products_and_norms_are_in_half_and_powers_are_not(tiny: Path) -> None:
    model = typed(tiny)
    kept = to_half(model, FLOAT16, float_inputs={"state"})
    found = types(model)
    assert found["LayerNormalization"] == {FLOAT16} and found["Pow"] == {FLOAT}
    assert found.get("Gemm", set()) | found.get("MatMul", set()) == {FLOAT16}
    assert {node.op_type for node in model.graph if node.name in kept} == {"Pow", "Add"}
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [FLOAT] * 3
    sizes = {v.const_value.dtype for v in model.graph.initializers.values() if v.const_value.size >= 8}
    assert sizes == {FLOAT16}


def test_without_names_the_state_is_in_half_too(tiny: Path) -> None:
    model = typed(tiny)
    to_half(model, FLOAT16)
    state = next(value for value in model.graph.inputs if value.name == "state")
    assert [node.op_type for node, _ in state.uses()] == ["Add"]  # its other side is the power's, in float32
    assert types(model)["Add"] <= {FLOAT, FLOAT16}


def test_named_nodes_stay_in_float(tiny: Path) -> None:
    model = typed(tiny)
    norm = next(str(node.name) for node in model.graph if node.op_type == "LayerNormalization")
    assert norm in to_half(model, FLOAT16, {"state"}, {norm})
    assert types(model)["LayerNormalization"] == {FLOAT}


def test_what_a_graph_has_in_half_itself_stays_so() -> None:
    """A piece of a lean decode: its frame comes and goes in half, and its own casts to float are dropped."""
    text = """
        <ir_version: 10, opset_import: ["" : 23]>
        piece (float16[2, 3] frame, float[3] mean) => (float16[2, 3] next_frame, float[2] total) {
            wide = Cast <to = 1> (frame)
            centred = Sub (wide, mean)
            twice = MatMul (wide, weight)
            both = Add (centred, twice)
            next_frame = Cast <to = 10> (both)
            axes = Constant <value = int64[1] {1}> ()
            total = ReduceSum <keepdims = 0> (twice, axes)
        }"""
    model = ir.from_onnx_text(text, initializers=[ir.tensor(np.eye(3, dtype=np.float32), name="weight")])
    ShapeInferencePass()(model)
    to_half(model, FLOAT16, float_inputs={"mean"})
    graph = model.graph
    assert [value.dtype for value in (*graph.inputs, *graph.outputs)] == [FLOAT16, FLOAT, FLOAT16, FLOAT]
    types = {node.op_type: {value.dtype for value in node.inputs} for node in graph}
    assert types["MatMul"] == {FLOAT16} and types["Sub"] == {FLOAT} and types["ReduceSum"] >= {FLOAT}
    [product] = [node for node in graph if node.op_type == "MatMul"]
    assert product.inputs[0] is graph.inputs[0]


def test_a_graph_without_floats_is_left_alone() -> None:
    x = ir.Value(name="x", shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.INT64))
    node = ir.node("Add", [x, x], name="add")
    node.outputs[0].dtype = ir.DataType.INT64
    model = ir.Model(ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 23}), ir_version=10)
    assert to_half(model, FLOAT16) == [] and widen(model) == 0
    assert [each.op_type for each in model.graph] == ["Add"]


def test_widened_bfloat16_rounds_where_bfloat16_would(tiny: Path) -> None:
    module, x = Tiny().eval(), np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    state = np.ones((4, 8), np.float32)
    model = typed(tiny)
    to_half(model, BFLOAT16, {"state"})
    assert widen(model) > 0
    assert all(
        v.dtype != BFLOAT16 for n in model.graph if n.op_type != "Cast" for v in (*n.inputs, *n.outputs) if v
    )
    ir.save(model, tiny.with_name("wide.onnx"), external_data="wide.data")
    with OrtRunner(TINY, tiny.with_name("wide.onnx")) as runner:
        y = runner.run({"x": x, "state": state})["y"]

    def bf16(values: Any) -> Any:
        return values.to(torch.bfloat16).float()

    with torch.no_grad():
        linear = bf16(bf16(torch.from_numpy(x)) @ bf16(module.linear.weight).T + bf16(module.linear.bias))
        norm = bf16(
            torch.nn.functional.layer_norm(linear, (8,), bf16(module.norm.weight), bf16(module.norm.bias))
        )
        wanted = (1 + norm**3).numpy()
        exact = module(torch.from_numpy(x), torch.from_numpy(state)).numpy()
    assert np.isclose(y, exact, rtol=1e-5).mean() < 0.2
    assert np.isclose(y, wanted, rtol=1e-5).mean() > 0.9  # the rest fell on the other side of a rounding


# Overflow and the gate


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stage, Path, Any, NovaConfig]:
    """The spatial encoder of a golden checkpoint, with one hidden layer far beyond float16's range."""
    checkpoint = GOLDEN / "t2i" / "checkpoint"
    config = NovaConfig.from_checkpoint(checkpoint)
    stage = stages(config)["spatial_encoder"]
    module = load_module(stage, config, checkpoint)
    mlp = module.image_encoder.blocks[0].mlp
    with torch.no_grad():
        mlp.fc1.weight *= 3e5
        mlp.fc1.bias *= 3e5
        mlp.fc2.weight /= 3e5
    path = tmp_path_factory.mktemp("overflow") / "spatial_encoder.onnx"
    export_onnx(stage, module, path)
    return stage, path, module, config


def copy_graph(path: Path, folder: Path) -> Path:
    for each in path.parent.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    return folder / path.name


def test_what_overflows_is_named_and_stays_higher(overflowing: Any, tmp_path: Path) -> None:
    stage, path, module, config = overflowing
    graph, cases = copy_graph(path, tmp_path), reference_cases(stage, config, module)
    changes = change_precision(stage, graph, FP16, CPU, cases)
    assert "gelu" in {each["value"] for each in changes["too_large"]}
    assert all(each["largest"] > 65504 / 4 for each in changes["too_large"])
    with OrtRunner(stage, graph) as runner:
        found = check_gate(stage, runner, cases, FP16)
    assert found["snr_db"] > FP16.least_snr
    values = {value.name: value.dtype for node in typed(graph).graph for value in node.outputs}
    assert values["gelu"] == FLOAT and FLOAT16 in values.values()


def test_what_a_calibration_saw_counts_too(overflowing: Any, tmp_path: Path) -> None:
    """Real runs reach numbers that random inputs do not; a calibration of another graph is refused."""
    stage, path, module, config = overflowing
    graph, cases = copy_graph(path, tmp_path), reference_cases(stage, config, module)
    seen = dict.fromkeys(Ranges(typed(graph), graph.parent).largest, 1.0)
    with pytest.raises(ExportError, match="spatial_encoder: the calibration has no value gelu"):
        change_precision(stage, graph, FP16, CPU, cases, {n: v for n, v in seen.items() if n != "gelu"})
    changes = change_precision(stage, graph, FP16, CPU, cases, {**seen, "gelu_1": 3e4, "z": 1e3})
    found = {each["value"]: each["largest"] for each in changes["too_large"]}
    assert found["gelu_1"] == 3e4 and "z" not in found and found["gelu"] > 65504 / 4
    assert changes["ranges"] == "calibration"


def test_ranges_are_those_of_the_values(tiny: Path) -> None:
    """Over several runs, an empty one too; a value that is not finite counts."""
    ranges = Ranges(typed(tiny), tiny.parent)
    x, state = np.full((3, 8), 2, np.float32), np.full((3, 8), -1e6, np.float32)
    for rows, given in ((0, state), (3, state), (3, 0 * state)):
        ranges.look({"x": x[:rows], "state": given[:rows]})
    assert ranges.largest["y"] == pytest.approx(1e6, rel=1e-3)
    with torch.no_grad():
        linear = Tiny().linear(torch.from_numpy(x)).abs().max().item()
    assert any(value == pytest.approx(linear) for value in ranges.largest.values())
    ranges.look({"x": x, "state": np.full((3, 8), np.inf, np.float32)})
    assert ranges.largest["y"] == math.inf


DEEP = """
import sys
import numpy as np
import onnx_ir as ir
from onnx import helper, numpy_helper
from pathlib import Path
from nova_export.child import memory
from nova_export.export.watch import Ranges

names = ["x", *(f"y{i}" for i in range(40))]
nodes = [helper.make_node("Tanh", [a], [b]) for a, b in zip(names, names[1:])]
values = [helper.make_tensor_value_info(name, 1, ["rows", 1000]) for name in names]
graph = helper.make_graph(nodes, "deep", values[:1], values[-1:], value_info=values[1:-1])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
ranges = Ranges(ir.from_proto(model), Path(), threads=1)
x = np.ones((2500, 1000), np.float32)
before = memory("VmHWM")
ranges.look({"x": x})
assert len(ranges.largest) == 40
print((memory("VmHWM") - before) / x.nbytes)
"""


def test_ranges_hold_no_more_than_a_run_does() -> None:
    """Forty values of 10 MB one after the other: two at a time, not all."""
    done = subprocess.run(
        [sys.executable, "-c", DEEP], env=environment(), capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 10


def test_without_that_the_gate_refuses(
    overflowing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, path, module, config = overflowing
    graph, cases = copy_graph(path, tmp_path), reference_cases(stage, config, module)
    monkeypatch.setattr(precision_module, "HEADROOM", 1e-30)
    assert change_precision(stage, graph, FP16, CPU, cases)["too_large"] == []
    with (
        OrtRunner(stage, graph) as runner,
        pytest.raises(
            ExportError, match=r"spatial_encoder: z .*fp16.*(not finite|dB).*--stage spatial_encoder=fp32"
        ),
    ):
        check_gate(stage, runner, cases, FP16)


def test_bfloat16_has_the_range(overflowing: Any, tmp_path: Path) -> None:
    stage, path, module, config = overflowing
    graph, cases = copy_graph(path, tmp_path), reference_cases(stage, config, module)
    assert change_precision(stage, graph, BF16, CPU, cases)["too_large"] == []
    with OrtRunner(stage, graph) as runner:
        assert check_gate(stage, runner, cases, BF16)["snr_db"] > BF16.least_snr


def test_sums_stay_in_float_where_a_precision_says_so(overflowing: Any) -> None:
    """Two for every block, its residuals; what adds a bias is no sum of computed values."""
    _, path, _, config = overflowing
    model = typed(path)
    residuals, depth = sums(model), config.spatial.depth
    assert 2 * depth <= len(residuals) < sum(node.op_type == "Add" for node in model.graph)
    to_half(model, BFLOAT16, (), residuals)
    found = {v.dtype for n in model.graph if n.name in residuals for v in (*n.inputs, *n.outputs) if v}
    assert found == {FLOAT} and BFLOAT16 in types(model)["LayerNormalization"]


# A build


@pytest.mark.parametrize(
    ("name", "least"), [("fp16", 40.0), pytest.param("bf16", 32.0, marks=pytest.mark.slow)]
)
def test_a_build_in_half_precision(
    golden_bundle: Callable[[str], Path], tmp_path: Path, name: str, least: float
) -> None:
    checkpoint, out = GOLDEN / "t2i" / "checkpoint", tmp_path / name
    result = nova_export(
        "build", checkpoint, "-o", out, "--precision", name, "--stage", "vae_decoder=fp32", "-q"
    )
    assert result.code == 0, result.err
    bundle = Bundle.open(out)
    wanted = {**dict.fromkeys(bundle.stages, name), "vae_decoder": "fp32", "diffusion_head": "fp16"}
    assert {stage: entry.precision for stage, entry in bundle.stages.items()} == wanted
    for stage, entry in bundle.stages.items():
        assert entry.verified is not None
        assert stage == "vae_decoder" or (entry.verified["snr_db"] or math.inf) > 30
    whole = golden_bundle("t2i")
    sizes = [(folder / "spatial_encoder.onnx.data").stat().st_size for folder in (out, whole)]
    assert sizes[0] < 0.55 * sizes[1]
    call = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 4, "num_diffusion_steps": 4}
    with package.load(out) as ours, package.load(whole) as theirs:
        frames, expected = ours(**call).frames[0], theirs(**call).frames[0]
    assert psnr(expected, frames).min() > least
    listed = nova_export("inspect", out).out
    assert f"spatial_encoder  {name}" in listed and "SNR" in listed and "within" in listed


def test_a_worse_recipe_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a pass broke the text encoder: the build names the stage and the number, and leaves no bundle."""

    def broken(model: Any, *arguments: Any) -> list[str]:
        kept = to_half(model, *arguments)
        scale = next(v for name, v in model.graph.initializers.items() if "layernorm.weight" in name)
        scale.const_value = ir.Tensor((scale.const_value.numpy() * 1.1).astype(np.float16), name=scale.name)
        return kept

    monkeypatch.setattr(precision_module, "to_half", broken)
    checkpoint = GOLDEN / "t2i" / "checkpoint"
    with pytest.raises(
        ExportError, match=r"text_encoder: text_states .* SNR of \d+\.\d dB, and the gate is 45 dB"
    ):
        build_bundle(checkpoint, tmp_path / "bundle", precision="fp16")
    assert not (tmp_path / "bundle").exists()


def test_wrong_stage_precisions(tmp_path: Path) -> None:
    checkpoint, out = GOLDEN / "t2i" / "checkpoint", tmp_path / "bundle"
    build = ("build", checkpoint, "-o", out, "-q", "--stage")
    only_error(nova_export(*build, "vea=fp32"), 2, "'vea'", "vae_decoder")
    only_error(nova_export(*build, "vae_decoder"), 2, "NAME=PRECISION")
    only_error(nova_export(*build, "vae_decoder=fp8"), 2, "'fp8'", "bf16")
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == "[]"
