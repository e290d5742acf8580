"""Shared fixtures: golden checkpoints, and bundles of them, built once a test session."""

from __future__ import annotations

import json
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
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a golden checkpoint by its name. Treat it as read-only; copy it to change it."""
    from nova_export.export.build import build_bundle

    folder = tmp_path_factory.mktemp("bundles")

    def bundle(name: str) -> Path:
        path = folder / name
        return path if path.exists() else build_bundle(GOLDEN / name / "checkpoint", path)

    return bundle


def golden_calls(name: str) -> list[tuple[dict[str, Any], Any]]:
    """(arguments of the call, arrays it must give) of every recorded call of a golden checkpoint."""
    calls = json.loads((GOLDEN / name / "calls.json").read_text())
    return [
        ({k: v for k, v in call.items() if k not in EXPECTATIONS}, np.load(GOLDEN / name / call["expect"]))
        for call in calls
    ]
