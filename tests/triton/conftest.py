"""One server for the tests that leave it as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.triton.repository import Serving, package
from nova_export import Pipeline, load
from tests.triton.server import ROOT, Server, triton

BUNDLE = Path(os.environ.get("NOVA_EXPORT_TEST_BUNDLE", ROOT / "demo" / "bundle"))


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demo: one loop of 8 samples, 32 requests wait, frames for a video of 3 tiles."""
    serving = Serving(threads=1, queue=32, max_latent_length=13)
    return package(BUNDLE, tmp_path_factory.mktemp("triton") / "repository", serving)


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[Server]:
    with triton(repository, repository.parent / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    """The Python runtime, of the same packages that the server's process has."""
    return load(BUNDLE, threads=1)
