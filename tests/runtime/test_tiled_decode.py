"""Decoding in squares: every pixel is there, seams are blended, and the error is what the docs say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import nova_export
from nova_export.bundle import MANIFEST
from nova_export.config import NovaConfig
from nova_export.evaluation.metrics import psnr
from nova_export.runtime.tiled_decode import OVERLAP, Floats, decode_in_tiles, starts
from nova_export.stages import Limits, stages
from tests.command_line import nova_export as command
from tests.conftest import GOLDEN
from tests.runtime.fake_gpu import TARGET, add_engines
from tests.runtime.test_gpu import Machine

SCALE = 8


@pytest.mark.parametrize("size", [1, 5, 8, 9, 60, 96])
@pytest.mark.parametrize("side", [2, 3, 8, 24])
def test_squares_cover_all_and_overlap(size: int, side: int) -> None:
    begin = starts(size, side)
    covered = {index for start in begin for index in range(start, min(start + side, size))}
    assert covered == set(range(size)) and begin[-1] + side <= max(size, side)
    for one, following in pairwise(begin):
        assert 0 < following - one <= side - side // OVERLAP


def enlarged(latents: Floats) -> Floats:
    """A decoder whose pixels depend on their own latent alone."""
    return latents[:, :3].repeat(SCALE, axis=-1).repeat(SCALE, axis=-2)


def test_what_parts_agree_on_is_kept_and_jumps_are_blended() -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 2, 11, 7), np.float32)
    seen: list[tuple[int, ...]] = []

    def decoder(part: Floats) -> Floats:
        seen.append(part.shape[-2:])
        return enlarged(part)

    np.testing.assert_allclose(decode_in_tiles(decoder, 5, latents), enlarged(latents), rtol=1e-5)
    assert set(seen) == {(5, 5)} and len(seen) == 3 * 2

    calls = iter(range(2))
    flat = np.zeros((1, 4, 1, 4, 7), np.float32)
    steps = decode_in_tiles(lambda part: enlarged(part) + np.float32(next(calls)), 4, flat)[0, 0, 0]
    assert steps[:, 0].max() == 0 and steps[:, -1].min() == 1
    assert np.diff(steps[0]).min() >= 0 and np.diff(steps[0]).max() < 0.2  # a ramp, no edge


def test_parts_as_large_as_the_frame_are_the_frame() -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 2, 4, 6), np.float32)
    np.testing.assert_array_equal(decode_in_tiles(enlarged, 6, latents), enlarged(latents))


def test_a_video_in_squares_is_nearly_the_same(golden_bundle: Callable[[str], Path]) -> None:
    path = golden_bundle("t2v")
    call = {"max_latent_length": 2, "num_inference_steps": 2, "num_diffusion_steps": 2, "seed": 1}
    whole = nova_export.load(path, device="cpu")("a red circle", **call)
    tiled = nova_export.load(path, device="cpu", vae_tile=8)("a red circle", **call)
    np.testing.assert_array_equal(tiled.latents, whole.latents)
    assert 20 < psnr(whole.frames[0], tiled.frames[0]).mean() < 60


def test_engines_for_squares_are_run_so(
    golden_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without being told: what their limits are stands in the manifest."""
    path = Path(shutil.copytree(golden_bundle("t2v"), tmp_path / "bundle"))
    add_engines(path)
    manifest = json.loads((path / MANIFEST).read_text())
    for axis in manifest["engines"][TARGET]["vae_decoder"]["spec"]["axes"]:
        if axis["name"] in ("latent_height", "latent_width"):
            axis["max"] = axis["opt"] = 8
    (path / MANIFEST).write_text(json.dumps(manifest))
    latents = np.random.default_rng(0).standard_normal((1, 4, 2, 8, 12), np.float32)
    expected = nova_export.load(path, device="cpu", vae_tile=8).decode(latents)
    Machine(monkeypatch)
    np.testing.assert_array_equal(nova_export.load(path).decode(latents), expected)
    options = ("--count", "1", "--num-inference-steps", "2", "--num-diffusion-steps", "2", "-q")
    verified = command("verify", path, "--against", golden_bundle("t2v"), "--device", TARGET, *options)
    assert verified.code == 0, verified.err


def test_engines_can_be_limited_to_squares() -> None:
    config = NovaConfig.from_checkpoint(GOLDEN / "t2v" / "checkpoint")
    for lean_decode in (None, "float16"):
        limited = stages(config, Limits(1, 9, vae_tile=6), lean_decode)
        axes = {a.name: a.max for s in limited.values() if s.phase == "decode" for a in s.axes}
        assert axes["latent_height"] == axes["latent_width"] == 6
        assert axes.get("frame_width") in (None, 6 * 8)
