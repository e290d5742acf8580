"""TOML, in the standard library from Python 3.11 on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """Raises OSError, or ValueError for a file that is no TOML."""
    return tomllib.loads(path.read_text(encoding="utf-8"))
