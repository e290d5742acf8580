"""Fixtures of builds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nova_export.export import build_stage
from tests.conftest import GOLDEN
from tests.export.builds import Exports


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Exports:
    fake = Exports()
    monkeypatch.setattr(build_stage, "export_onnx", fake)
    monkeypatch.setattr("gc.collect", lambda: 0)  # a quarter of a second each time
    return fake


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return Path(shutil.copytree(GOLDEN / "t2i" / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "work" / "bundle"
