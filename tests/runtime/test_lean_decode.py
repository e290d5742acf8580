"""The decoder in pieces: exact, frame by frame, and nothing kept that is not needed."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nova_export
from nova_export.bundle import Bundle
from nova_export.config import NovaConfig
from nova_export.errors import UsageError
from nova_export.evaluation.metrics import psnr
from nova_export.export.build import build_bundle
from nova_export.lean_stages import START, enlarges, is_piece, kept_frames, lean_decoder
from nova_export.runtime.decode import Decoder, decoder_of
from nova_export.runtime.lean_decode import decode_lean
from nova_export.spec import Stage
from reference_model.checkpoint import load_module
from reference_model.runner import TorchRunner
from tests.command_line import nova_export as command
from tests.command_line import only_error
from tests.conftest import GOLDEN
from tests.runtime.fake_gpu import add_engines
from tests.runtime.test_gpu import Machine

T2V = GOLDEN / "t2v" / "checkpoint"
CALL = {
    "prompt": "a red circle moving right",
    "max_latent_length": 6,  # two tiles
    "num_inference_steps": 2,
    "num_diffusion_steps": 2,
    "seed": 3,
}


@pytest.fixture(scope="module")
def config() -> NovaConfig:
    return NovaConfig.from_checkpoint(T2V)


@pytest.fixture(scope="module")
def lean_bundle(golden_bundle: Callable[..., Path]) -> Path:
    return golden_bundle("t2v", lean_decode=True)


def in_torch(config: NovaConfig, lean_decode: str | None) -> Decoder:
    from nova_export.stages import stages

    specs = stages(config, lean_decode=lean_decode)
    runners = {
        name: TorchRunner(spec, load_module(spec, config, T2V))
        for name, spec in specs.items()
        if spec.phase == "decode"
    }
    return decoder_of(runners.__getitem__, config, lean_decode)


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 5])
def test_the_pieces_are_the_decoder(config: NovaConfig, latent_frames: int) -> None:
    """Pixels of the size that the published decoder gives, for clips of any length, equal up to rounding."""
    shape = (1, config.latent_channels, latent_frames, *config.latent_size)
    latents = np.random.default_rng(latent_frames).standard_normal(shape, np.float32)
    whole, lean = in_torch(config, None)(latents), in_torch(config, "float32")(latents)
    assert whole.shape == lean.shape == (1, 3, 4 * (latent_frames - 1) + 1, *config.image_size)
    np.testing.assert_allclose(lean, whole, atol=2e-5)
    assert np.abs(whole).max() > 0.1
    half = in_torch(config, "float16")(latents)
    error = float(np.square(half - whole).mean() / np.square(whole).mean())
    assert 0 < error < 1e-5  # 50 dB


def test_a_bundle_makes_the_same_video(golden_bundle: Callable[[str], Path], lean_bundle: Path) -> None:
    bundle = Bundle.open(lean_bundle)
    assert bundle.lean_decode == "float32" and "vae_decoder" not in bundle.stages
    bundle.check_all()
    whole, lean = (
        nova_export.load(path, device="cpu")(**CALL) for path in (golden_bundle("t2v"), lean_bundle)
    )
    np.testing.assert_array_equal(lean.latents, whole.latents)
    assert lean.frames.shape == whole.frames.shape
    assert np.abs(lean.frames.astype(int) - whole.frames).max() <= 1
    streamed = list(nova_export.load(lean_bundle, device="cpu", low_memory=True).stream(**CALL))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), lean.frames)


@pytest.mark.slow  # exports all stages once more, a minute
def test_frames_go_in_half_precision_where_the_bundle_is(lean_bundle: Path, tmp_path: Path) -> None:
    half = build_bundle(T2V, tmp_path / "bundle", precision="fp16", lean_decode=True)
    bundle = Bundle.open(half)
    assert bundle.lean_decode == "float16"
    for entry in bundle.stages.values():
        frames = [
            t for t in (*entry.spec.inputs, *entry.spec.outputs) if "frame" in t.name or "past" in t.name
        ]
        if is_piece(entry.spec):
            assert frames and {tensor.dtype for tensor in frames} == {"float16"}
    latents = nova_export.load(lean_bundle, device="cpu")(**CALL).latents
    exact, rounded = (nova_export.load(path, device="cpu").decode(latents) for path in (lean_bundle, half))
    assert 40 < psnr(exact[0], rounded[0]).mean() < 90


def test_engines_of_pieces_run(lean_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one array on the GPU are handed on as they lie there; all memory is given back."""
    path = Path(shutil.copytree(lean_bundle, tmp_path / "bundle"))
    add_engines(path)
    expected = nova_export.load(path, device="cpu")(**CALL)
    machine = Machine(monkeypatch)
    pipe = nova_export.load(path)
    np.testing.assert_array_equal(pipe(**CALL).frames, expected.frames)
    largest = max(size for size in machine.cuda.uploads)
    assert largest < 4 * expected.frames[0, 0].size * 8  # no frame of a layer went by way of the host
    pipe.close()
    del pipe
    gc.collect()
    assert not machine.cuda.live


def test_with_low_memory_frames_wait_on_the_host(
    lean_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(lean_bundle, tmp_path / "bundle"))
    add_engines(path)
    peaks, frames = [], []
    for low_memory in (False, True):
        machine, most = Machine(monkeypatch), [0]
        allocate = machine.cuda.cudaMallocAsync

        def counted(size: int, stream: int) -> tuple[int, int]:
            made = allocate(size, stream)  # noqa: B023 (called in this round alone)
            most[0] = max(most[0], sum(map(len, machine.cuda.live.values())))  # noqa: B023
            return made

        machine.cuda.cudaMallocAsync = counted  # type: ignore[method-assign]
        with nova_export.load(path, low_memory=low_memory) as pipe:
            frames.append(pipe.decode(np.ones((1, 4, 5, *pipe.config.latent_size), np.float32)))
        peaks.append(most[0])
    np.testing.assert_array_equal(*frames)
    assert peaks[1] < 0.4 * peaks[0]


class Counting:
    """A piece that makes frames of nothing, and knows how many values those of all pieces would have.

    size: of one of its frames. most: of all that are alive at a time, by the piece that runs.
    """

    def __init__(self, stage: Stage, size: int, alive: list[int], most: dict[str, int]) -> None:
        self.stage, self.size, self.alive_now, self.most = stage, size, alive, most

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {tensor.name: np.zeros(32, np.float32) for tensor in self.stage.outputs}
        count = 2 * inputs["latents"].shape[2] - 1 if "latents" in inputs else 1
        frames = made[self.stage.outputs[0].name] = np.zeros((count, 1, 1, 1), np.float32)
        self.alive_now[0] += count * self.size
        weakref.finalize(frames, self._gone, count * self.size)
        self.most[self.stage.name] = max(self.most.get(self.stage.name, 0), self.alive_now[0])
        return made

    def _gone(self, size: int) -> None:
        self.alive_now[0] -= size


def test_frames_are_freed_as_soon_as_nothing_needs_them(config: NovaConfig) -> None:
    """As many are there as `kept_frames` says, but for the one that is made and those that it is made of."""
    pieces = lean_decoder(config, "float32")
    sizes = [frame_size(piece) for piece in pieces[1:]]
    alive, most = [0], {}
    runners = {
        stage.name: Counting(stage, size, alive, most)
        for stage, size in zip(pieces, [*sizes, 0], strict=True)
    }
    decode_lean(runners.__getitem__, [stage.name for stage in pieces], np.zeros((1, 4, 3, 1, 1), np.float32))
    kept = kept_frames(pieces, 9)
    assert kept.keys() == {stage.name for stage in pieces if is_piece(stage)}
    for piece, size, made in zip(pieces[1:], sizes, [*sizes[1:], 0], strict=True):
        there = most[piece.name]
        assert kept[piece.name].between <= there + size, piece.name
        if not enlarges(piece):  # which runs again for those behind it
            assert there <= kept[piece.name].between + 2 * size + made, piece.name
    gc.collect()
    assert alive == [0]


def frame_size(piece: Stage) -> int:
    """Values of a frame that it takes."""
    shapes = piece.shapes({axis.name: axis.max for axis in piece.axes})
    return int(np.prod(shapes["frame" if "frame" in shapes else "here"]))


def test_other_autoencoders_are_refused() -> None:
    checkpoint = GOLDEN / "t2i" / "checkpoint"
    with pytest.raises(UsageError, match=r"AutoencoderKLOpenSora of at least 3 blocks; .* AutoencoderKL of"):
        build_bundle(checkpoint, Path("nowhere"), lean_decode=True)
    only_error(command("build", checkpoint, "-o", "nowhere", "--lean-decode"), 2, "lean decode")


def test_verify_takes_both_forms(golden_bundle: Callable[[str], Path], lean_bundle: Path) -> None:
    """Piece by piece against a checkpoint, which is cut as the bundle is; else by frames."""
    options = ("--count", "1", "--num-inference-steps", "2", "--num-diffusion-steps", "2", "--json", "-q")
    for against, pieces in ((T2V, True), (golden_bundle("t2v"), False)):
        result = command("verify", lean_bundle, "--against", against, *options)
        assert result.code == 0, result.err
        found = json.loads(result.out)
        compared = {tensor["stage"] for tensor in found["tensors"]}
        assert (START in compared) is pieces and "spatial_encoder" in compared
        assert found["frames"]["least_psnr"] is None or found["frames"]["least_psnr"] > 50
