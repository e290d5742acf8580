"""kill -9 at any moment of a build with engines: no half bundle, no orphans, and the next run goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nova_export.bundle import MANIFEST, Bundle
from tests.conftest import GOLDEN
from tests.engine.processes import start, wait_until_gone

pytest.importorskip("tensorrt_rtx")  # has no wheel for aarch64

KILLS = 20
TARGET = "rtx-40"
BUILD = ("build", GOLDEN / "t2i" / "checkpoint", "--target", TARGET, "--precision", "fp16", "-q", "-o")


def finished(folder: Path) -> dict[str, int]:
    """When files of finished stages and engines were written: in a bundle, or where a build was stopped."""
    named: set[str] = set()
    for record in folder.glob("*.json"):
        named |= set(json.loads(record.read_text()).get("files", ())) - {"tokenizer.json"}
    return {name: (folder / name).stat().st_mtime_ns for name in named}


def content(bundle: Path) -> dict[str, Any]:
    """The manifest, which has the hashes of all files, without what building took.

    Of engines the sizes alone: a few bytes differ whenever TensorRT-RTX compiles.
    """
    manifest: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    for engines in manifest["engines"].values():
        for engine in engines.values():
            del engine["seconds"], engine["peak_bytes"]
            del manifest["files"][engine["file"]]["sha256"]
    return manifest


def check_whole(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.check_all()
    assert opened.engines[TARGET].keys() == opened.stages.keys()
    there = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert there == {MANIFEST, *opened.files}


@pytest.mark.slow  # some minutes: twenty starts of torch
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Now the whole group is killed, now the command alone, as a shell does and as the system does."""
    began = time.monotonic()
    undisturbed, out = tmp_path / "undisturbed" / "bundle", tmp_path / "work" / "bundle"
    for folder in (undisturbed.parent, out.parent):
        folder.mkdir()
    assert start(*BUILD, undisturbed).wait() == 0
    check_whole(undisturbed)
    half = (time.monotonic() - began) / 2  # so that a start fits in, and a few stages or engines
    work, rng, killed = out.with_name(f".{out.name}.partial"), random.Random(20), Counter[str]()
    while killed.total() < KILLS or not killed["engines"]:
        kept = finished(work)
        process = start(*BUILD, out)
        try:
            assert process.wait(rng.uniform(0, half)) == 0
        except subprocess.TimeoutExpired:
            if rng.random() < 0.5:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            killed["engines" if list(tmp_path.glob(f"work/*/{MANIFEST}")) else "stages"] += 1
        wait_until_gone(process.pid)
        now = finished(out if out.exists() else work)
        assert {name: now.get(name) for name in kept} == kept
        if out.exists():
            check_whole(out)
            assert content(out) == content(undisturbed)
            assert list(out.parent.iterdir()) == [out]
            shutil.rmtree(out)
    if work.exists():
        assert start(*BUILD, out).wait() == 0
        check_whole(out)
        assert content(out) == content(undisturbed) and list(out.parent.iterdir()) == [out]
