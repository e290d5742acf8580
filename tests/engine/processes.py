"""The command line in a session of its own, and what becomes of all processes of such a session."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nova_export.child import environment


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """`nova-export ARGUMENTS`; its process id is that of the session too."""
    command = [sys.executable, "-m", "nova_export", *arguments]
    return subprocess.Popen(command, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL)


def running(session: int) -> list[int]:
    """Process ids of a session; not of what has ended and was not waited for."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(folder.name))
    return found


def wait_until_gone(session: int, seconds: float = 10.0) -> None:
    """Raises AssertionError if a process of the session still runs after `seconds`."""
    until = time.monotonic() + seconds
    while left := running(session):
        assert time.monotonic() < until, f"still running: {left}"
        time.sleep(0.02)


def compilers(session: int) -> Iterator[int]:
    """Processes of a session that compile an engine, and have loaded TensorRT for it."""
    for pid in running(session):
        with suppress(OSError):
            folder = Path("/proc", str(pid))
            program = (folder / "cmdline").read_bytes()
            if b"nova_export.engine.compiler" in program and "tensorrt" in (folder / "maps").read_text():
                yield pid


def memory(session: int) -> int:
    """Bytes that the processes of a session hold together; what they share is counted once."""
    total = 0
    for pid in running(session):
        with suppress(OSError):
            lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total
