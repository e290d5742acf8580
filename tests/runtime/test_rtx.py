"""TensorRT for RTX, over doubles: the CUDA graphs that it captures itself, and the kernels that are kept."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nova_export
from nova_export.bundle import Bundle
from nova_export.runtime.stage_runners import kernel_file
from tests.runtime.fake_gpu import FOUR_FRAMES, TARGET, Machine, add_engines


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NOVA_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path, cache: Path) -> Path:
    path = Path(shutil.copytree(golden_bundle("t2v"), tmp_path / "bundle"))
    add_engines(path)
    return path


def run(bundle: Path, **options: bool) -> None:
    """One video, as on the CPU."""
    expected = nova_export.load(bundle, device="cpu")(**FOUR_FRAMES)
    with nova_export.load(bundle, **options) as pipe:  # type: ignore[arg-type]
        np.testing.assert_array_equal(pipe(**FOUR_FRAMES).latents, expected.latents)


# CUDA graphs


def test_a_shape_runs_in_the_same_place_each_time(bundle: Path, machine: Machine) -> None:
    """Else TensorRT-RTX would capture it again; and it does so where shapes take turns in one context."""
    expected = nova_export.load(bundle, device="cpu")(**FOUR_FRAMES)
    with nova_export.load(bundle) as pipe:
        for _ in range(2):
            np.testing.assert_array_equal(pipe(**FOUR_FRAMES).latents, expected.latents)
        captures, replays = machine.trt.captures, machine.trt.replays
        for _ in range(2):
            np.testing.assert_array_equal(pipe(**FOUR_FRAMES).latents, expected.latents)
        assert machine.trt.captures == captures > 0
        assert machine.trt.replays == replays + 2 * 4 * 3 * 2  # videos, frames, AR steps, stages
    assert machine.cuda.begun == 0  # it would be a capture in a capture


@pytest.mark.parametrize("options", [{"cuda_graphs": False}, {"low_memory": True}], ids=str)
def test_without_graphs(bundle: Path, machine: Machine, options: dict[str, bool]) -> None:
    run(bundle, **options)
    assert machine.trt.captures == machine.trt.replays == 0


# Kernels


def test_only_the_first_run_compiles(bundle: Path, machine: Machine, cache: Path) -> None:
    run(bundle)
    assert machine.trt.compiled
    files = {path: path.stat().st_ino for path in (cache / "kernels").iterdir()}
    assert len(files) == len(Bundle.open(bundle).stages) - 1  # text to video encodes no image
    machine.trt.compiled.clear()
    run(bundle)
    assert not machine.trt.compiled
    assert files == {path: path.stat().st_ino for path in (cache / "kernels").iterdir()}  # nor writes


def test_a_shape_is_compiled_once(bundle: Path, machine: Machine) -> None:
    """However many contexts it is run in."""
    run(bundle)
    assert len(machine.trt.compiled) == len(set(machine.trt.compiled))


def test_kernels_are_kept_though_nobody_closes(bundle: Path, machine: Machine, cache: Path) -> None:
    pipe = nova_export.load(bundle)
    pipe(**FOUR_FRAMES)
    del pipe
    gc.collect()
    assert list((cache / "kernels").iterdir())


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_damaged_kernels_are_replaced(bundle: Path, machine: Machine, cache: Path, content: bytes) -> None:
    run(bundle)
    compiled = sorted(machine.trt.compiled)
    whole = {path: path.read_bytes() for path in (cache / "kernels").iterdir()}
    for path in whole:
        path.write_bytes(content)
    machine.trt.compiled.clear()
    run(bundle)
    assert sorted(machine.trt.compiled) == compiled
    assert whole == {path: path.read_bytes() for path in (cache / "kernels").iterdir()}


def test_kernels_that_cannot_be_kept_are_no_error(bundle: Path, machine: Machine, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    run(bundle)
    cache.unlink()
    opened = Bundle.open(bundle)
    for engine in opened.engines[TARGET].values():
        kernel_file(opened, engine).mkdir(parents=True)
    run(bundle)
    assert all(path.is_dir() for path in (cache / "kernels").iterdir())  # and nothing beside them


def test_kernels_are_of_one_engine_version_and_gpu(bundle: Path, cache: Path) -> None:
    opened = Bundle.open(bundle)
    engine = opened.engines[TARGET]["condition"]
    other = opened.engines[TARGET]["diffusion_head"]
    versions = [replace(engine, made_of={**engine.made_of, key: "0"}) for key in engine.made_of]
    files = {kernel_file(opened, each) for each in (engine, other, *versions)}
    assert len(files) == 2 + len(versions) and {file.parent for file in files} == {cache / "kernels"}
