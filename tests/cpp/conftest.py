"""The C++ library's test programs, which `make test-cpp` builds."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
Inspect = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def cpp_build() -> Path:
    """The folder that CMake built in: $NOVA_CPP_BUILD, or build/cpp."""
    folder = Path(os.environ.get("NOVA_CPP_BUILD", REPOSITORY / "build" / "cpp"))
    if not any(folder.rglob("nova_inspect")):
        pytest.fail(f"{folder} has no nova_inspect; `make test-cpp` builds it, then runs these tests")
    return folder


@pytest.fixture(scope="session")
def inspect(cpp_build: Path) -> Inspect:
    """What nova_inspect answers: inspect(command, arguments..., lines=values), one answer for each value."""
    program = next(cpp_build.rglob("nova_inspect"))

    def ask(*command: str, lines: Iterable[Any] = ()) -> list[Any]:
        given = "".join(json.dumps(line) + "\n" for line in lines)
        done = subprocess.run([program, *command], input=given, capture_output=True, text=True, timeout=300)
        assert not done.stderr, done.stderr
        return [json.loads(line) for line in done.stdout.split("\n")[:-1]]

    return ask
