"""Every extra golden of the published pipeline through init, export and the torch-free runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import nova_export
from nova_export.export.build import build_bundle
from reference_model.init import init_checkpoint

CASES = Path(__file__).parents[1] / "golden_extra"
QUICK = ("class_conditional",)  # the eager reference has all of them in every run
NAMES = sorted(path.stem for path in CASES.glob("*.json"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,)) for name in NAMES]
)
def test_the_bundle_gives_the_published_latents(name: str, tmp_path: Path) -> None:
    case = json.loads((CASES / f"{name}.json").read_text())
    expected = np.load(CASES / f"{name}.npz")
    checkpoint = init_checkpoint(**case["init"], out=tmp_path / "checkpoint")
    arguments = {**case["call"], **({"image": expected["image"]} if case.get("image") else {})}
    with nova_export.load(build_bundle(checkpoint, tmp_path / "bundle", verify=False)) as pipe:
        output = pipe(arguments.pop("prompt"), **arguments)
    assert output.latents.shape == expected["latents"].shape
    difference = np.abs(output.latents - expected["latents"])
    assert difference.max() <= 5e-4, f"{name}: max {difference.max():.2e}, mean {difference.mean():.2e}"
    if "frames" in expected:
        frames = expected["frames"].reshape(output.frames.shape)
        levels = np.abs(output.frames.astype(int) - frames)
        assert (levels <= 1).mean() >= 0.999, f"{name}: {(levels > 1).mean():.2%} of values differ by over 1"
