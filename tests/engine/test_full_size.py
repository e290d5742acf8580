"""Engines of published architectures in full size, with random weights; Phi-2 by itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nova_export.bundle import Bundle
from nova_export.export.plan import Costs, Video, make_plan
from nova_export.inspect import describe_engine, engine_table
from nova_export.targets import HEAD_STEPS, PRECISIONS, TARGETS, find
from reference_model.checkpoint import check_weights
from reference_model.init import init_checkpoint
from tests.conftest import GOLDEN
from tests.engine.processes import memory, start

pytest.importorskip("tensorrt_rtx")  # has no wheel for aarch64

GB = 10**9
TARGET = "rtx-40"
FUSED = {"temporal_encoder", "spatial_encoder"}


def measured(*arguments: str | Path) -> tuple[float, int]:
    """Seconds that a command takes, and the most bytes that all its processes hold at once."""
    began, peak = time.monotonic(), 0
    process = start(*arguments)
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.5)  # reading the maps of a process stops it for a while
    assert process.returncode == 0
    return time.monotonic() - began, peak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nova-d48w1024-osp480", "nova-d48w1024-sdxl1024"])
def test_every_stage_in_fp16(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = init_checkpoint(name, tmp_path / "checkpoint", text_encoder="2x64"), tmp_path / "bundle"
    exported = measured(
        "build", checkpoint, "-o", out, "--target", TARGET, "--precision", "fp16", "--no-engines"
    )
    compiled = measured("engines", out)
    bundle = Bundle.open(out)
    engines = bundle.engines[TARGET]
    with capsys.disabled():
        print(f"\n{name}, fp16 for {TARGET}")
        for what, (seconds, peak) in {"graphs": exported, "engines": compiled}.items():
            print(f"{what}: {seconds:.0f} s, {peak / GB:.1f} GB at the most")
        print(engine_table({stage: describe_engine(bundle, engine) for stage, engine in engines.items()}))

    bundle.check_all()
    assert engines.keys() == bundle.stages.keys()
    assert {engines[stage].attention for stage in FUSED} == {"fused"}
    for stage, engine in engines.items():
        half = 2 * check_weights(bundle.stages[stage].spec, bundle.config, checkpoint)
        assert engine.weight_bytes is not None
        assert engine.weight_bytes < 1.2 * half + 50_000, stage  # held once, in 16 bits
        assert bundle.files[engine.file].size < 1.2 * half + 15_000_000, stage  # kernels besides
    planned = make_plan(
        Costs.count(Video(bundle.config, frames=bundle.config.video_length, head_steps=HEAD_STEPS)),
        find(TARGETS, TARGET),
        find(PRECISIONS, "fp16"),
    )
    for each in planned.stages:
        said = engines[each.name]
        assert each.activations == pytest.approx(said.activation_bytes, rel=0.1), each.name
        assert each.weights == pytest.approx(said.weight_bytes, rel=0.1, abs=50_000), each.name
    assert compiled[0] < 300 and compiled[1] < 12 * GB
    if bundle.config.is_video:
        lean_decode(checkpoint, out)


def lean_decode(checkpoint: Path, out: Path) -> None:
    """The same bundle again with its decoder in pieces: stages that have not changed are kept."""
    measured(
        *("build", checkpoint, "-o", out, "--target", TARGET, "--precision", "fp16"),
        *("--lean-decode", "--force"),
    )
    engines = Bundle.open(out).engines[TARGET].values()
    scratch = [engine.activation_bytes for engine in engines if engine.spec.phase == "decode"]
    assert len(scratch) == 16 and max(size for size in scratch if size) < 1.5 * GB


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int4-weights"])
def test_phi_2(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text encoder of the published checkpoints, beside small stages."""
    small = GOLDEN / "t2v" / "checkpoint"
    configs = {
        part: json.loads((small / part / "config.json").read_text()) for part in ("transformer", "vae")
    }
    kept = ("arch", "image_size", "image_stride", "image_dim")
    configs["transformer"] = {key: configs["transformer"][key] for key in kept}
    checkpoint, out = init_checkpoint(configs, tmp_path / "checkpoint"), tmp_path / "bundle"
    options = ("--target", TARGET, "--stage", f"text_encoder={precision}", "--no-engines")
    exported = measured("build", checkpoint, "-o", out, *options)
    compiled = measured("engines", out, "--stage", "text_encoder")
    bundle = Bundle.open(out)
    engine = bundle.engines[TARGET]["text_encoder"]
    with capsys.disabled():
        print(f"\nPhi-2, {precision} for {TARGET}")
        for what, (seconds, peak) in {"graphs": exported, "engine": compiled}.items():
            print(f"{what}: {seconds:.0f} s, {peak / GB:.1f} GB at the most")
        print(engine_table({"text_encoder": describe_engine(bundle, engine)}))
    # Beside integers the rest is in float32, which no fused kernel takes.
    assert engine.attention == ("fused" if precision == "fp16" else "decomposed")
    assert max(exported[1], compiled[1], engine.peak_bytes) < 16 * GB
