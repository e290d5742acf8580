"""Programs of this package in processes of their own, and the memory that they came to need."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

GB = 10**9
MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
PR_SET_PDEATHSIG = 1


def environment() -> dict[str, str]:
    """In which `python -m nova_export...` finds this package, installed or not."""
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths}


def die_with_parent() -> None:
    """Be killed when the process that started this one ends, by a signal too: nobody waits any more."""
    with suppress(OSError, AttributeError):  # a C library other than Linux's
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def memory(key: str) -> int:
    """A value of /proc/self/status in bytes. Unlike getrusage's, VmHWM starts anew with the program."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def system_memory(meminfo: Path = MEMINFO) -> dict[str, int]:
    """What the system tells of its memory, in bytes; empty where it does not."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def available_memory() -> int | None:
    """Bytes that programs can still have, swap too; None where the system does not tell."""
    sizes = system_memory()
    return sizes["MemAvailable"] + sizes.get("SwapFree", 0) if "MemAvailable" in sizes else None
