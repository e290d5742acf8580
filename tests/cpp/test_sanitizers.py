"""The library compiled with AddressSanitizer and UBSan does real work; two pipelines share a process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.cpp.conftest import PROMPT, REPOSITORY, Call, in_cpp

SHORT = {"prompts": [PROMPT], "seed": 1, "num_inference_steps": 3, "num_diffusion_steps": 3}
# ONNX Runtime is not instrumented, and keeps some memory until the process ends.
ENVIRONMENT = {
    "LSAN_OPTIONS": f"suppressions={REPOSITORY / 'engines/cpp/tests/leaks.txt'}:print_suppressions=0"
}


def test_no_report_and_the_same_video(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever a sanitizer finds ends the process with a report."""
    image = np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8)
    video = {**SHORT, "max_latent_length": 6}
    of = golden_bundle("t2v")
    calls = [
        Call(of, {**video, "guidance_renorm": 0.5, "num_images_per_prompt": 2}, stream=True),
        Call(of, {**video, "max_latent_length": 2}, image=image),
        Call(of, video, cancel_at=(0, 1)),
        Call(of, {**video, "guidance_renorm": 7.0}),
        Call(
            of, {**SHORT, "prompts": ["\u4e2d\U0001f600 e\u0301 " * 300]}, {"low_memory": True, "vae_tile": 5}
        ),
        Call(tmp_path / "nowhere", SHORT),
    ]
    kinds = ("release", "sanitized")
    answers = []
    for kind in kinds:
        folder = tmp_path / kind
        folder.mkdir()
        answers.append(in_cpp(cpp / kind / "tests/nova_call", calls, folder, **ENVIRONMENT))
    for plain, sanitized in zip(*answers, strict=True):
        assert (plain.error, plain.status) == (sanitized.error, sanitized.status)
        if plain.latents is not None and sanitized.latents is not None:
            np.testing.assert_allclose(plain.latents, sanitized.latents, atol=1e-4)


def test_two_pipelines_in_two_threads(cpp: Path, golden_bundle: Callable[[str], Path]) -> None:
    program = cpp / "sanitized/tests/nova_threads"
    ran = subprocess.run(
        [program, golden_bundle("t2v")], capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}
    )
    assert ran.returncode == 0, ran.stderr
