"""How long kernels took when TensorRT tried them for an engine, kept so that the next need not try again.

Measured by one version on one kind of GPU, and good for those alone. Engines for GPUs that are not in the
machine are made without measuring.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nova_export.demo import cache_file
from nova_export.errors import OutputError
from nova_export.runtime.media import write_whole


def timing_file(made_by: Mapping[str, str]) -> Path:
    """Where timings are kept. made_by: runtime, version and GPU, as in engine/compatibility.py."""
    return cache_file("timings", json.dumps(made_by, sort_keys=True), ".bin")


def use_timings(config: Any, path: Path) -> None:
    """Give a builder's configuration what was measured before; nothing where the file is damaged."""
    try:
        kept = path.read_bytes()
    except OSError:
        kept = b""
    for data in (kept, b""):
        with suppress(RuntimeError, TypeError):  # from the binding, where TensorRT refuses the file
            if config.set_timing_cache(config.create_timing_cache(data), ignore_mismatch=False):
                return


def keep_timings(config: Any, path: Path) -> None:
    """Write what is known now. Where that cannot be, the next build measures again."""
    cache = config.get_timing_cache()
    data = bytes(cache.serialize()) if cache else b""
    with suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write_bytes(data))
