"""Engines of the golden checkpoints and the demo, from checkpoint to bundle, as a user builds them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration import default_prompts
from calibration.collect import calibrate
from nova_export.bundle import Bundle, EngineEntry
from nova_export.demo import demo_checkpoint
from nova_export.engine.build import profile
from nova_export.engine.compiler import Compiled, CompileJob, compile_engine
from nova_export.export.precision import change_precision
from nova_export.export.quantization import FloatSource, quantize_stage
from nova_export.lean_stages import is_piece
from nova_export.spec import Stage
from nova_export.stages import Limits
from nova_export.targets import ENCODERS, HEAD_STEPS, PRECISIONS, TARGETS, find
from tests.command_line import nova_export
from tests.conftest import GOLDEN

pytest.importorskip("tensorrt_rtx")  # has no wheel for aarch64

HEAVY = pytest.mark.slow  # with these the tests would be too long for every change: make test-engines
OTHERS = ("t2i", "t2v-rope", "demo")
SHORT = {"num_inference_steps": 4, "num_diffusion_steps": 2}


def checkpoint(name: str) -> Path:
    return demo_checkpoint() if name == "demo" else GOLDEN / name / "checkpoint"


def built(name: str, out: Path, *options: str | Path) -> Bundle:
    result = nova_export("build", checkpoint(name), "-o", out, "--target", "rtx-40", "-q", *options)
    assert result.code == 0, result.err
    bundle = Bundle.open(out)
    bundle.check_all()
    return bundle


def data_bytes(bundle: Bundle, stage: str) -> int:
    return bundle.files[f"{stage}.onnx.data"].size


def fused_stages(name: str) -> set[str]:
    """Those with a fused kernel of attention; there is none for the temporal encoders of some."""
    return {"text_encoder", "spatial_encoder"} | ({"temporal_encoder"} if name in ("t2v", "demo") else set())


def compiled(spec: Stage, graph: Path) -> Compiled:
    """The engine of a graph, beside it."""
    job = CompileJob("tensorrt-rtx", str(graph), str(graph.with_suffix(".engine")), profile(spec), "8.9")
    return compile_engine(job)


def check_fp16(stage: str, engine: EngineEntry | Compiled, data: int) -> None:
    """Weights are held once, in 16 bits; attention is as the engine says. data: bytes of the weights."""
    layers = [layer for layer in engine.layers if layer["kind"] == "attention"]
    assert layers or engine.attention != "fused", stage
    assert all("Half" in layer["inputs"] and "Float" not in layer["inputs"] for layer in layers), stage
    assert engine.weight_bytes is not None and engine.weight_bytes < 1.2 * data + 50_000, stage


@pytest.mark.parametrize("name", ["t2v", *(pytest.param(each, marks=HEAVY) for each in OTHERS)])
def test_every_stage_in_fp16(name: str, tmp_path: Path) -> None:
    bundle = built(name, tmp_path / "bundle", "--precision", "fp16")
    engines = bundle.engines["rtx-40"]
    assert engines.keys() == bundle.stages.keys()
    assert {engines[stage].attention for stage in fused_stages(name)} == {"fused"}
    for stage, engine in engines.items():
        check_fp16(stage, engine, data_bytes(bundle, stage))
    head = engines["diffusion_head"].spec.axis("steps")
    assert (head.min, head.max) == (HEAD_STEPS, HEAD_STEPS)  # unrolled, so that CUDA graphs can hold it


@pytest.mark.parametrize("name", OTHERS)
def test_every_graph_in_fp16(golden_bundle: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """From graphs that other tests share, the head's with its loop: exporting takes longer than all this."""
    bundle, target = Bundle.open(golden_bundle(name)), find(TARGETS, "rtx-40")
    for stage, spec in bundle.specs(Limits(1, bundle.config.video_length)).items():
        graph = tmp_path / bundle.path(bundle.stages[stage].graph).name
        for file in bundle.stages[stage].files:
            shutil.copy(bundle.path(file), tmp_path)
        change_precision(spec, graph, find(PRECISIONS, "fp16"), target, [])
        engine = compiled(spec, graph)
        check_fp16(stage, engine, graph.with_name(f"{graph.name}.data").stat().st_size)
        assert engine.attention == "fused" or stage not in fused_stages(name), stage


@HEAVY
def test_the_pieces_of_a_lean_decode(tmp_path: Path) -> None:
    bundle = built("t2v", tmp_path / "bundle", "--precision", "fp16", "--lean-decode")
    engines = bundle.engines["rtx-40"]
    assert engines.keys() == bundle.stages.keys()
    pieces = [engine for engine in engines.values() if is_piece(engine.spec)]
    assert len(pieces) == 11
    for engine in pieces:
        assert {tensor.dtype for tensor in engine.spec.inputs} <= {"float16", "float32"}


@pytest.mark.parametrize("name", ["t2i", "t2v", "t2v-rope", "demo"])
def test_transformers_in_int8(golden_bundle: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Products of 8 bits with 8 bits, on one run's ranges; where there is no fused attention is told."""
    bundle = Bundle.open(golden_bundle(name))
    frames = min(2, bundle.config.video_length)
    prompts, short = default_prompts(bundle.config, 1), {"max_latent_length": frames, **SHORT}
    source = FloatSource(bundle, calibrate(bundle, prompts, 5, tmp_path / "c.npz", **short))
    specs = bundle.specs(Limits(1, bundle.config.video_length))
    for stage in ENCODERS:
        graph = tmp_path / f"{stage}.onnx"
        quantize_stage(source, stage, graph, find(PRECISIONS, "int8"), find(TARGETS, "rtx-40"))
        engine = compiled(specs[stage], graph)
        products = [layer for layer in engine.layers if layer["kind"] == "gemm"]
        assert [layer for layer in products if layer["inputs"] == "Int8" and "Int8" in layer["weights"]], (
            stage
        )
        assert engine.weight_bytes and engine.weight_bytes < 0.55 * data_bytes(bundle, stage), stage
        assert engine.attention in ("fused", "decomposed"), stage


@HEAVY
def test_encoders_in_int8(tmp_path: Path) -> None:
    """Weights in 8 bits are so in the engine. Building anew keeps engines whose graphs are the same."""
    whole = built("t2i", tmp_path / "whole", "--no-engines")
    calibrate(whole, default_prompts(whole.config, 6), 5, tmp_path / "c.npz", **SHORT)
    options = ("--precision", "int8", "--calibration", tmp_path / "c.npz")
    bundle = built("t2i", tmp_path / "bundle", *options)
    for stage in ("temporal_encoder", "spatial_encoder"):
        weights = bundle.engines["rtx-40"][stage].weight_bytes
        assert bundle.stages[stage].precision == "int8" and weights is not None
        assert weights < 0.45 * data_bytes(whole, stage), stage
    again = built("t2i", tmp_path / "bundle", *options, "--force")
    assert again.engines == bundle.engines
