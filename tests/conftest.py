"""Shared fixtures: golden checkpoints, and bundles of them, built once a test run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# A job in the background of a shell starts with Ctrl-C ignored, and its children inherit that; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
# What was built for tests stays, and is built again by the stages that a change touched: as of any bundle.
BUNDLES = Path(__file__).parents[1] / "build" / "bundles"
EXPECTATIONS = ("latents_shape", "frames_shape", "latents_std", "frames_std", "expect")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, the same in all its processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def golden_bundle(shared: Path) -> Callable[..., Path]:
    """The bundle of a golden checkpoint, or of the demo, by its name and options of the build.

    Read-only; copy it to change it.
    """
    from nova_export.demo import demo_checkpoint
    from nova_export.export.build import build_bundle

    def bundle(name: str, **options: Any) -> Path:
        path = BUNDLES / "-".join([name, *options])
        path.parent.mkdir(parents=True, exist_ok=True)
        built = shared / f"{path.name}.built"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first process builds, others wait for it
            if not built.exists():
                if options and not path.exists():  # for stages that options leave as they are
                    shutil.copytree(bundle(name), path)
                checkpoint = demo_checkpoint() if name == "demo" else GOLDEN / name / "checkpoint"
                build_bundle(checkpoint, path, force=True, **options)
                built.touch()
        return path

    return bundle


def golden_calls(name: str) -> list[tuple[dict[str, Any], Any]]:
    """(arguments of the call, arrays it must give) of every recorded call of a golden checkpoint."""
    calls = json.loads((GOLDEN / name / "calls.json").read_text())
    return [
        ({k: v for k, v in call.items() if k not in EXPECTATIONS}, np.load(GOLDEN / name / call["expect"]))
        for call in calls
    ]
