"""Layers in integers: the pass, the builds that use it, and the gate that they must pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nova_export.bundle import Bundle
from nova_export.errors import ExportError, InputError, UsageError
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from calibration.collect import calibrate  # noqa: E402
from calibration.statistics import Statistics  # noqa: E402
from nova_export.export import build, build_stage, quantization, sensitivity  # noqa: E402
from nova_export.export.build import build_bundle  # noqa: E402
from nova_export.export.onnx_export import export_onnx  # noqa: E402
from nova_export.export.passes.quantize import (  # noqa: E402
    InputFormat,
    WeightFormat,
    linear_layers,
    quantize,
)
from nova_export.export.quantization import FloatSource, compare_on_runs, quantize_stage  # noqa: E402
from nova_export.export.sensitivity import rank_layers  # noqa: E402
from nova_export.export.watch import WatchedStages  # noqa: E402
from nova_export.spec import Axis, Stage, Tensor  # noqa: E402
from nova_export.targets import ENCODERS, PRECISIONS, TARGETS, find  # noqa: E402

CHECKPOINT = GOLDEN / "t2i" / "checkpoint"
TINY = Stage(
    name="tiny",
    module="",
    part="",
    prefixes=(),
    phase="",
    inputs=(Tensor("x", "float32", ("rows", 3, 64)), Tensor("flat", "float32", ("rows", 64))),
    outputs=(Tensor("y", "float32", ("rows", 3, 96)), Tensor("z", "float32", ("rows", 3, 96))),
    axes=(Axis("rows", 1, 2, 9),),
)


class Tiny(torch.nn.Module):
    """Two layers that read one value, and one on vectors, which the exporter makes a Gemm of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.flat = (torch.nn.Linear(64, 96) for _ in range(3))

    def forward(self, x: torch.Tensor, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(x), self.right(x) + self.flat(flat)[:, None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    export_onnx(TINY, Tiny().eval(), path)
    return path


INPUTS = {
    "x": np.random.default_rng(0).standard_normal((4, 3, 64)).astype(np.float32),
    "flat": np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32),
}


def outputs_of(model: Any, folder: Path) -> list[Any]:
    ir.save(model, folder / "changed.onnx", external_data="changed.onnx.data")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # as the graph says it
    return ort.InferenceSession(folder / "changed.onnx", options).run(None, INPUTS)


def snr(expected: list[Any], made: list[Any]) -> float:
    power, error = (
        sum(float(np.square(x).sum()) for x in arrays)
        for arrays in (expected, [a - b for a, b in zip(expected, made, strict=True)])
    )
    return 10 * np.log10(power / error)


@pytest.mark.parametrize(
    ("format", "least", "most", "size"),
    [
        (WeightFormat("int8"), 38, 55, 1.1),
        (WeightFormat("int8", 32), 40, 55, 1.3),
        (WeightFormat("int4"), 14, 26, 0.6),
        (WeightFormat("int4", 32), 18, 28, 0.8),
    ],
)
def test_weights_are_as_near_as_their_bits(
    tiny: Path, tmp_path: Path, format: WeightFormat, least: float, most: float, size: float
) -> None:
    """And stored in as many: three matrices of 64 x 96, biases, scales."""
    model = ir.load(tiny)
    expected = outputs_of(ir.load(tiny), tmp_path)
    assert sorted(quantize(model, dict.fromkeys(linear_layers(model), format))) == ["flat", "left", "right"]
    assert least < snr(expected, outputs_of(model, tmp_path)) < most
    assert (tmp_path / "changed.onnx.data").stat().st_size < size * 3 * 64 * 96 + 3 * 4 * 96 + 4096
    kinds = {v.const_value.dtype for v in model.graph.initializers.values() if v.const_value.size > 64 * 90}
    assert kinds == {ir.DataType.INT8 if format.number == "int8" else ir.DataType.INT4}


def test_the_scale_of_int4_is_the_best_of_several(tiny: Path, tmp_path: Path) -> None:
    """A weight far beyond all others may be cut, for the sake of the others."""
    model = ir.load(tiny)
    weight = linear_layers(model)["left"].matrix()
    scale = next(
        v.const_value.numpy()
        for name, v in (quantize(model, {"left": WeightFormat("int4")}), model)[1].graph.initializers.items()
        if name.endswith("_scale")
    )
    plain = np.abs(weight).max(0) / 7

    def error(scale: Any) -> float:
        return float(np.square(np.clip(np.rint(weight / scale), -8, 7) * scale - weight).sum())

    assert error(scale) < 0.98 * error(plain)


@pytest.mark.parametrize("signed", [False, True])
def test_inputs_in_eight_bits(tiny: Path, tmp_path: Path, signed: bool) -> None:
    model = ir.load(tiny)
    expected = outputs_of(ir.load(tiny), tmp_path)
    layers = linear_layers(model)
    given = InputFormat(8 / 255, 0 if signed else 128, signed)
    quantize(model, dict.fromkeys(layers, WeightFormat("int8")), dict.fromkeys(layers, given))
    assert 30 < snr(expected, outputs_of(model, tmp_path)) < 45
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("QuantizeLinear") == 2  # left and right share the integers of x
    stored = {node.outputs[0].dtype for node in model.graph if node.op_type == "QuantizeLinear"}
    assert stored == {ir.DataType.INT8 if signed else ir.DataType.UINT8}


def test_smoothing_changes_no_product(tiny: Path, tmp_path: Path) -> None:
    """Factors apart leave the result as good as its bits; one without the other would not."""
    model = ir.load(tiny)
    expected = outputs_of(ir.load(tiny), tmp_path)
    factors = np.geomspace(0.4, 2.5, 64).astype(np.float32)
    given = InputFormat(20 / 255, 128, False, factors)
    quantize(model, {"left": WeightFormat("int8")}, {"left": given})
    made = outputs_of(model, tmp_path)
    assert snr(expected[:1], made[:1]) > 22
    np.testing.assert_array_equal(made[1], expected[1])
    assert [node.op_type for node in model.graph].count("Mul") == 1


@pytest.mark.parametrize("signed", [False, True])
def test_numbers_that_integers_cut_off_are_counted(tiny: Path, tmp_path: Path, signed: bool) -> None:
    """By layer: left and right share their input's integers, which end at about 1; flat reaches all."""
    model = ir.load(tiny)
    narrow, wide = (InputFormat(end / 128, 0 if signed else 128, signed) for end in (1, 8))
    inputs = {"left": narrow, "right": narrow, "flat": wide}
    quantize(model, dict.fromkeys(inputs, WeightFormat("int8")), inputs)
    expected = outputs_of(model, tmp_path)
    stages = WatchedStages(*(bundle_of(path) for path in (tmp_path / "changed.onnx", tiny)))
    for _ in range(2):
        made = stages("tiny").run(INPUTS)
    np.testing.assert_allclose(made["y"], expected[0], atol=1e-5)
    integers = np.rint(INPUTS["x"] * 128)
    cut = 2 * int(((integers < -128) | (integers > 127)).sum())
    assert cut > 200
    assert stages.cut == {("tiny", "y"): cut, ("tiny", "right"): cut, ("tiny", "flat"): 0}
    assert {"y", "right", "flat"} <= made.keys()  # left's result is y


def bundle_of(graph: Path) -> Any:
    """As much of a bundle as those who look into its stages ask for."""
    entry = SimpleNamespace(graph=graph.name, spec=TINY)
    return SimpleNamespace(
        stages={"tiny": entry}, path=lambda name: graph.parent / name, check_stage=lambda name: None
    )


def test_layers_that_are_not_named_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    model = ir.load(tiny)
    assert quantize(model, {}) == []
    for a, b in zip(outputs_of(ir.load(tiny), tmp_path), outputs_of(model, tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not {node.op_type for node in model.graph} & {"QuantizeLinear", "DequantizeLinear"}


# Builds


SHORT: dict[str, Any] = {"num_inference_steps": 6, "num_diffusion_steps": 3, "max_latent_length": 1}


@pytest.fixture(scope="module")
def calibration(golden_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "t2i.npz"
    calibrate(Bundle.open(golden_bundle("t2i")), ["a red circle", "the sea"], 1, out, **SHORT)
    return out


@pytest.fixture
def out(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """Where to build; the float32 bundle is there already, as after a build that was stopped."""
    shutil.copytree(golden_bundle("t2i"), tmp_path / ".bundle.fp32")
    return tmp_path / "bundle"


def test_a_build_in_int8(golden_bundle: Callable[[str], Path], calibration: Path, out: Path) -> None:
    options = ("--precision", "int8", "--calibration", calibration, "-q")
    result = nova_export("build", CHECKPOINT, "-o", out, *options)
    assert result.code == 0, result.err
    bundle, whole = Bundle.open(out), golden_bundle("t2i")
    bundle.check_all()
    assert {name for name, entry in bundle.stages.items() if entry.precision == "int8"} == set(ENCODERS)
    for name in ENCODERS:
        verified = bundle.stages[name].verified
        assert verified is not None and 20 < verified["snr_db"] < 60 and verified["layers"] > 3
    sizes = [(folder / "spatial_encoder.onnx.data").stat().st_size for folder in (out, whole)]
    assert sizes[0] < 0.32 * sizes[1]
    kinds = {node.op_type for node in ir.load(bundle.path("spatial_encoder.onnx")).graph}
    assert "MultiHeadAttention" in kinds and "Attention" not in kinds
    made = json.loads(
        nova_export(
            "verify",
            out,
            "--against",
            whole,
            "--count",
            "1",
            "-q",
            "--json",
            "--num-inference-steps",
            "4",
            "--num-diffusion-steps",
            "2",
        ).out
    )
    worst = {each["stage"]: each["snr_db"] for each in reversed(made["tensors"])}
    assert worst["spatial_encoder"] > 20 and worst["vae_decoder"] is None  # in fp32, to the last bit
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    assert "int8" in nova_export("inspect", out).out


@pytest.mark.parametrize(("name", "stages"), [("int8-weights", ENCODERS), ("int4-weights", ["text_encoder"])])
def test_a_build_of_weights_alone(out: Path, name: str, stages: Any) -> None:
    bundle = Bundle.open(build_bundle(CHECKPOINT, out, precision=name))
    assert {each for each, entry in bundle.stages.items() if entry.precision == name} == set(stages)
    text = bundle.stages["text_encoder"].verified
    assert text is not None and text["snr_db"] > (25 if name == "int8-weights" else 12)


def worse(seen: Any, weight: Any, signed: bool) -> tuple[InputFormat, str]:
    """A recipe that cuts off nearly everything."""
    return InputFormat(1e-4, 128, signed), "worse"


def test_a_worse_recipe_is_refused_where_it_was_named(
    calibration: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "input_format", worse)
    with pytest.raises(
        ExportError, match=r"spatial_encoder: z .* int8: .* SNR of -?\d+\.\d dB, and the gate is"
    ):
        build_bundle(CHECKPOINT, out, stage_precisions={"spatial_encoder": "int8"}, calibration=calibration)
    assert not out.exists()


def test_and_elsewhere_the_stage_stays_in_fp32(
    calibration: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three were judged in one pass of the loops."""
    passes: list[set[str]] = []
    compare = build_stage.compare_on_runs
    monkeypatch.setattr(
        build_stage,
        "compare_on_runs",
        lambda source, graphs: (passes.append({name for name, _ in graphs}), compare(source, graphs))[1],
    )
    monkeypatch.setattr(quantization, "input_format", worse)
    with pytest.warns(UserWarning, match="stage spatial_encoder stays in fp32: z is not good enough in int8"):
        build_bundle(CHECKPOINT, out, precision="int8", calibration=calibration)
    assert passes == [set(ENCODERS)]
    assert {entry.precision for entry in Bundle.open(out).stages.values()} == {"fp32"}
    refused = json.loads((out / "manifest.json").read_text())["stages"]["spatial_encoder"]["refused"]
    assert refused["precision"] == "int8" and refused["tensor"] == "z"
    assert refused["snr_db"] < find(PRECISIONS, "int8").least_snr


def test_a_calibration_of_another_checkpoint(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is said before anything is built."""
    monkeypatch.setattr(build, "build_stages", None)
    other = GOLDEN / "t2v" / "checkpoint"
    with pytest.raises(InputError, match="another checkpoint"):
        build_bundle(other, tmp_path / "b", precision="int8", calibration=calibration)
    command = ("build", CHECKPOINT, "-o", tmp_path / "c", "-q", "--stage")
    only_error(nova_export(*command, "vae_decoder=int8"), 2, "vae_decoder", "spatial_encoder")


def test_a_calibration_is_done_once(
    golden_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same graphs; a damaged file is none, and a cache that cannot be written is no error."""
    monkeypatch.setenv("NOVA_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantization, "CALIBRATION_PROMPTS", 1)
    calls: list[Path] = []

    def counted(bundle: Bundle, prompts: Any, seed: int, kept: Path) -> Statistics:
        calls.append(kept)
        return calibrate(bundle, prompts, seed, kept, **SHORT)

    monkeypatch.setattr(quantization, "calibrate", counted)

    def digest(name: str = "t2i") -> str:
        kept = tmp_path / f"{name}.{len(calls)}.npz"
        statistics = FloatSource.open(golden_bundle(name), None, True, kept).statistics
        assert statistics is not None
        return statistics.digest()

    first = digest()
    assert digest() == first and len(calls) == 1
    assert digest("t2v-rope") != first and len(calls) == 2
    (file, _) = sorted((tmp_path / "cache" / "calibrations").iterdir(), key=lambda path: path.stat().st_mtime)
    file.write_bytes(file.read_bytes()[:-40])
    assert digest() == first and len(calls) == 3
    assert digest() == first and len(calls) == 3
    monkeypatch.setenv("NOVA_EXPORT_CACHE", str(file))
    assert digest() == first and len(calls) == 4


def test_layers_that_a_recipe_keeps(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    source = FloatSource(Bundle.open(golden_bundle("t2i")), None)
    weights, cpu = find(PRECISIONS, "int8-weights"), TARGETS[0]

    def layers(*patterns: str) -> Any:
        graph = tmp_path / "spatial_encoder.onnx"
        return quantize_stage(source, "spatial_encoder", graph, weights, cpu, patterns)["layers"]

    blocks = source.bundle.config.spatial.depth
    assert layers() - layers("*.fc2") == blocks
    with pytest.raises(UsageError, match=r"no layer '\*\.fc3'; it has .*image_encoder\.blocks\.0\.mlp\.fc1"):
        layers("*.fc3")


def test_forms_are_judged_together_as_each_alone(
    golden_bundle: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    """Two of one stage, which writes its caches in place, and one of another."""
    source = FloatSource(Bundle.open(golden_bundle("t2i")), Statistics.load(calibration))
    weights = find(PRECISIONS, "int8-weights")
    graphs = {}
    for name, form, patterns in (
        ("temporal_encoder", "all", ()),
        ("temporal_encoder", "some", ("*.fc1", "*.fc2")),
        ("spatial_encoder", "all", ()),
    ):
        graphs[name, form] = tmp_path / form / f"{name}.onnx"
        graphs[name, form].parent.mkdir(exist_ok=True)
        quantize_stage(source, name, graphs[name, form], weights, TARGETS[0], patterns)
    together = compare_on_runs(source, graphs)
    for form, path in graphs.items():
        assert together[form] == compare_on_runs(source, {form: path})[form]
    all_, some = (together["temporal_encoder", form]["context"].snr for form in ("all", "some"))
    assert some > all_ + 0.5


def test_the_ranking_finds_the_layer_that_costs_the_most(
    golden_bundle: Callable[[str], Path], calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's input is cut to a tenth of its range. A ranking that is stopped goes on."""
    bad = "image_encoder.blocks.1.mlp.fc1"

    def one_worse(seen: Any, weight: Any, signed: bool) -> tuple[InputFormat, str]:
        format, method = input_format(seen, weight, signed)
        if seen is source.statistics.layers_of("spatial_encoder")[bad]:
            format = InputFormat(format.scale / 10, format.zero, format.signed, format.smooth)
        return format, method

    input_format = quantization.input_format
    monkeypatch.setattr(quantization, "input_format", one_worse)
    source = FloatSource(Bundle.open(golden_bundle("t2i")), Statistics.load(calibration))
    assert source.statistics is not None
    out, int8, ranked = tmp_path / "ranking.json", find(PRECISIONS, "int8"), []

    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank_layers(source, "spatial_encoder", int8, TARGETS[0], out, stop)
    changed = quantization.quantize_stage
    monkeypatch.setattr(sensitivity, "quantize_stage", lambda *args: (ranked.append(args), changed(*args))[1])
    found = rank_layers(source, "spatial_encoder", int8, TARGETS[0], out)
    assert found.costliest[0] == bad and found.without[bad] > found.snr + 3
    assert len(ranked) == len(found.without) + 1 - 4  # all of them, and before: none, and three layers
    with pytest.raises(InputError, match="holds no ranking of this"):
        rank_layers(source, "temporal_encoder", int8, TARGETS[0], out)


def test_auto_takes_the_fastest_that_passes(
    calibration: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are given here: int8 is the fastest, but of the spatial encoder, where it does not pass."""
    seconds = {"fp32": 3.0, "fp16": 2.0, "int8-weights": 1.5, "int8": 1.0}

    def timed(spec: Stage, config: Any, graphs: Any) -> dict[str, float]:
        return {n: 2.95 if n == "fp16" and spec.name == "condition" else seconds[n] for n in graphs}

    monkeypatch.setattr(build_stage, "median_seconds", timed)
    input_format = quantization.input_format
    source = Statistics.load(calibration)
    spatial = [(each.low, each.high) for each in source.layers_of("spatial_encoder").values()]
    monkeypatch.setattr(
        quantization,
        "input_format",
        lambda seen, *rest: (worse if (seen.low, seen.high) in spatial else input_format)(seen, *rest),
    )
    build_bundle(CHECKPOINT, out, precision="auto", calibration=calibration)
    made = json.loads((out / "manifest.json").read_text())["stages"]
    assert made["temporal_encoder"]["precision"] == "int8" and made["vae_decoder"]["precision"] == "fp16"
    assert made["spatial_encoder"]["precision"] in ("fp16", "int8-weights")
    assert made["condition"]["precision"] == "fp32"  # 2 % is not worth it
    auto = made["spatial_encoder"]["auto"]
    assert "int8" not in auto["seconds"] and "z is not good enough in int8" in auto["refused"]["int8"]
    Bundle.open(out).check_all()
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_auto_leaves_the_costliest_layers_in_float(
    calibration: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's input is cut to next to nothing: without that layer the stage passes."""
    bad = Statistics.load(calibration).layers_of("spatial_encoder")["image_encoder.blocks.1.mlp.fc1"]
    input_format = quantization.input_format
    monkeypatch.setattr(
        quantization,
        "input_format",
        lambda seen, *rest: (worse if seen.high == bad.high else input_format)(seen, *rest),
    )
    monkeypatch.setattr(
        build_stage,
        "median_seconds",
        lambda spec, config, graphs: {n: 1.0 if n == "int8" else 2.0 for n in graphs},
    )
    build_bundle(CHECKPOINT, out, stage_precisions={"spatial_encoder": "auto"}, calibration=calibration)
    entry = Bundle.open(out).stages["spatial_encoder"]
    assert entry.precision == "int8" and entry.verified is not None
    assert entry.verified["float_layers"] == ["image_encoder.blocks.1.mlp.fc1"]
    assert entry.verified["snr_db"] > find(PRECISIONS, "int8").least_snr
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
