"""A model's configuration as Triton reads it: protobuf's text format, of plain dicts and lists."""

from __future__ import annotations

import json
from typing import Any


class Enum(str):
    """A name that protobuf knows, written without quotes."""


def to_text(message: dict[str, Any], indent: str = "") -> str:
    """A line a value; a list repeats its key, but for numbers, which stand in one line."""
    return "".join(_field(key, value, indent) for key, value in message.items())


def _field(key: str, value: Any, indent: str) -> str:
    if isinstance(value, dict):
        return f"{indent}{key} {{\n{to_text(value, indent + '  ')}{indent}}}\n"
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "".join(_field(key, item, indent) for item in value)
    if isinstance(value, list):
        return f"{indent}{key}: [{', '.join(map(_scalar, value))}]\n"
    return f"{indent}{key}: {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return str(value)
    return json.dumps(value) if isinstance(value, str) else str(value)
