"""Shared fixtures: golden checkpoints, and bundles of them, built once a test run."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# A job in the background of a shell starts with Ctrl-C ignored, and its children inherit that; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
EXPECTATIONS = ("latents_shape", "frames_shape", "latents_std", "frames_std", "expect")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, the same in all its processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def golden_bundle(shared: Path) -> Callable[[str], Path]:
    """The bundle of a golden checkpoint, or of the demo, by its name. Read-only; copy it to change it."""
    from nova_export.demo import demo_checkpoint
    from nova_export.export.build import build_bundle

    def bundle(name: str) -> Path:
        path = shared / name
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first process builds, others wait for it
            checkpoint = demo_checkpoint() if name == "demo" else GOLDEN / name / "checkpoint"
            return path if path.exists() else build_bundle(checkpoint, path)

    return bundle


def golden_calls(name: str) -> list[tuple[dict[str, Any], Any]]:
    """(arguments of the call, arrays it must give) of every recorded call of a golden checkpoint."""
    calls = json.loads((GOLDEN / name / "calls.json").read_text())
    return [
        ({k: v for k, v in call.items() if k not in EXPECTATIONS}, np.load(GOLDEN / name / call["expect"]))
        for call in calls
    ]
