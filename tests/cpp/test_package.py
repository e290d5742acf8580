"""The installed library as others use it: CMake, pkg-config, a C compiler; what it exports; the examples."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nova_export
from tests.cpp.conftest import PROMPT, REPOSITORY

PROGRAM = """
#include <iostream>
#include <nova_export.hpp>
int main() {
    try {
        nova_export::Pipeline pipeline("nowhere");
    } catch (const nova_export::Error& error) {
        std::cout << error.status() << " " << nova_version();
    }
}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(consumer CXX)
find_package(nova_export REQUIRED)
add_executable(shared main.cpp)
target_link_libraries(shared nova_export::nova_export)
add_executable(static main.cpp)
target_link_libraries(static nova_export::nova_export_static)
"""
SAYS = f"4 {nova_export.__version__}"


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    words = [str(word) for word in command]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})
    assert ran.returncode == 0, f"{' '.join(words)}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def installed(cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("installed")
    run("cmake", "--install", cpp / "release", "--prefix", prefix)
    return prefix


@pytest.fixture
def consumer(tmp_path: Path) -> Path:
    (tmp_path / "main.cpp").write_text(PROGRAM)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    return tmp_path


def test_cmake_finds_it_shared_and_static(cpp: Path, installed: Path, consumer: Path) -> None:
    run(
        "cmake",
        "-B",
        "build",
        f"-DCMAKE_PREFIX_PATH={installed}",
        f"-DONNXRUNTIME_ROOT={cpp / 'deps'}",
        cwd=consumer,
    )
    run("cmake", "--build", "build", cwd=consumer)
    for program in ("shared", "static"):
        assert run(consumer / "build" / program) == SAYS


def test_pkg_config_finds_it(installed: Path, consumer: Path) -> None:
    [folder] = installed.glob("lib*/**/pkgconfig")
    flags = run("pkg-config", "--cflags", "--libs", "nova_export", PKG_CONFIG_PATH=str(folder)).split()
    run("c++", "-std=c++17", "main.cpp", *flags, "-o", "program", cwd=consumer)
    assert run(consumer / "program", LD_LIBRARY_PATH=str(folder.parent)) == SAYS
    static = run("pkg-config", "--static", "--libs", "nova_export", PKG_CONFIG_PATH=str(folder)).split()
    assert "-lonnxruntime" in static and "-lcrypto" in static


def test_it_exports_its_interface_and_nothing_else(installed: Path) -> None:
    [library] = installed.rglob("libnova_export.so")
    lines = run("nm", "--dynamic", "--defined-only", "--extern-only", library).splitlines()
    exported = {line.split()[-1].split("@")[0] for line in lines} - {"NOVA_EXPORT_1"}
    header = (installed / "include" / "nova_export.h").read_text()
    declared = {
        line.split("(")[0].split()[-1].lstrip("*")
        for line in header.splitlines()
        if line.startswith("NOVA_API")
    }
    assert exported == declared and all(name.startswith("nova_") for name in exported)


def test_the_c_example_is_c_and_writes_the_first_frame(
    installed: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    [library] = installed.rglob("libnova_export.so")
    strict = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{installed / 'include'}")
    run("cc", *strict, REPOSITORY / "engines/cpp/examples/minimal.c", library, "-o", tmp_path / "minimal")
    where = {"LD_LIBRARY_PATH": str(library.parent)}
    run(tmp_path / "minimal", golden_bundle("t2v"), PROMPT, tmp_path / "out.ppm", **where)
    with nova_export.load(golden_bundle("t2v")) as pipe:
        made = pipe(PROMPT, max_latent_length=4, num_inference_steps=8, seed=1)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.ppm")), made.frames[0, 0])


@pytest.fixture(scope="module")
def made(golden_bundle: Callable[[str], Path]) -> np.ndarray:
    with nova_export.load(golden_bundle("t2v")) as pipe:
        frames: np.ndarray = pipe(
            PROMPT, max_latent_length=2, num_inference_steps=2, num_images_per_prompt=2, seed=1
        ).frames
    return frames


def generate(cpp: Path, bundle: Path, *more: object) -> subprocess.CompletedProcess[str]:
    short = ("--max-latent-length", 2, "--num-inference-steps", 2, "--num-images-per-prompt", 2, "--seed", 1)
    command = (cpp / "release/examples/generate", bundle, "--prompt", PROMPT, *short, *more)
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_the_example_writes_pictures(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path, made: np.ndarray
) -> None:
    ran = generate(cpp, golden_bundle("t2v"), "-o", tmp_path / "out.png", "--times")
    assert ran.returncode == 0 and "seed 1" in ran.stderr and "vae_decoder: 2 calls" in ran.stderr, ran.stderr
    for sample in range(2):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out-{sample}.png")), made[sample, 0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.png", "out-1.png"]


def test_the_example_writes_y4m(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path, made: np.ndarray
) -> None:
    """BT.709 in limited range and 8 bits: colours come back within three levels."""
    ran = generate(cpp, golden_bundle("t2v"), "-o", tmp_path / "out.y4m", "--quiet")
    assert ran.returncode == 0, ran.stderr
    header, *frames = (tmp_path / "out-1.y4m").read_bytes().split(b"FRAME\n")
    assert header == b"YUV4MPEG2 W96 H64 F12000:1000 Ip A1:1 C444 XCOLORRANGE=LIMITED\n"
    assert len(frames) == made.shape[1]
    y, u, v = np.frombuffer(frames[0], np.uint8).reshape(3, 64, 96).astype(float)
    luma, blue, red = (y - 16) * 255 / 219, (u - 128) * 255 / 224 * 1.8556, (v - 128) * 255 / 224 * 1.5748
    r, b = luma + red, luma + blue
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    assert np.abs(np.stack([r, g, b], axis=2).clip(0, 255) - made[1, 0]).max() <= 3


def test_the_example_pipes_frames_to_ffmpeg(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path, made: np.ndarray
) -> None:
    """A program in ffmpeg's place keeps what it is given; one that fails is reported, and leaves no file."""
    fake = tmp_path / "ffmpeg"
    fake.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" >> "$0.words"\ncat > "${last#file:}"\n')
    fake.chmod(0o755)
    ran = generate(cpp, golden_bundle("t2v"), "-o", tmp_path / "out.mp4", "--ffmpeg", fake)
    assert ran.returncode == 0, ran.stderr
    for sample in range(2):
        assert (tmp_path / f"out-{sample}.mp4").read_bytes() == made[sample].tobytes()
    assert "-video_size 96x64 -framerate 12" in (tmp_path / "ffmpeg.words").read_text()
    fake.write_text("#!/bin/sh\nexit 3\n")
    ran = generate(cpp, golden_bundle("t2v"), "-o", tmp_path / "bad.mp4", "--ffmpeg", fake)
    assert ran.returncode == 6 and "bad-0.mp4: ffmpeg" in ran.stderr
    ran = generate(cpp, golden_bundle("t2v"), "-o", tmp_path / "bad.mp4", "--ffmpeg", tmp_path / "none")
    assert ran.returncode == 6 and "install ffmpeg, name it with --ffmpeg, or write a .y4m" in ran.stderr
    assert not list(tmp_path.glob("bad*"))


def test_the_example_refuses_before_it_works(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    for more, code, text in (
        (("-o", "out.avi"), 6, "must end in one of .mp4, .y4m, .png, .ppm"),
        (("-o", tmp_path / "no" / "out.png"), 6, "No such file or directory"),
        (("-o", "out.png", "--seed", "x"), 2, "--seed is 'x'"),
        (("-o", "out.png", "--sed", "1"), 2, "unknown argument --sed"),
        (("-o", tmp_path / "o.png", "--guidance-renorm", "2"), 2, "guidance_renorm is 2; it must be 0 to 1"),
        (("-o", tmp_path / "o.png", "--image", tmp_path / "none.png"), 6, "none.png: No such file"),
    ):
        ran = generate(cpp, golden_bundle("t2v"), *more)
        assert (ran.returncode, text in ran.stderr) == (code, True), ran.stderr
    assert not list(tmp_path.iterdir())
