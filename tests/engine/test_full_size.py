"""Engines of published architectures in full size, with random weights; the text encoder alone is small."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nova_export.bundle import Bundle
from nova_export.inspect import describe_engine, engine_table
from reference_model.checkpoint import check_weights
from reference_model.init import init_checkpoint
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
        time.sleep(0.1)
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
    assert compiled[1] < 12 * GB
