"""JSON to frozen dataclasses, each value checked against its annotation; errors say where.

The C++ library reads the same documents by the same rules and refuses them with the same texts:
engines/cpp/src/json.hpp.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

MAX_WHOLE_NUMBER = 2**53  # what every JSON reader holds exactly
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def strict_json(text: str) -> Any:
    """A document. Raises ValueError: no JSON, a key twice, NaN, infinity, text that is no Unicode."""
    data = json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    return data


def read(kind: Any, value: Any, where: str = "") -> Any:
    """`value` as the annotated type; of a dataclass all its fields and no others. Raises ValueError."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_record(kind, value, where)
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        for each in arguments:
            if _is(each, value):
                return read(each, value, where)
        raise wrong(value, _name(kind), where)
    if not _is(kind, value):
        raise wrong(value, _name(kind), where)
    if kind is int and not 0 <= value <= MAX_WHOLE_NUMBER:
        raise wrong(value, f"0 to {MAX_WHOLE_NUMBER}", where)
    if kind is float:
        return float(value)
    if origin is tuple and arguments[-1] is not ...:
        return tuple(
            read(each, item, step(where, str(index)))
            for index, (each, item) in enumerate(zip(arguments, value, strict=True))
        )
    if origin in (tuple, Sequence):
        return tuple(read(arguments[0], item, step(where, str(index))) for index, item in enumerate(value))
    if origin is Mapping and arguments[1] is not Any:
        return {key: read(arguments[1], item, step(where, key)) for key, item in value.items()}
    return value


def field(kind: Any, data: Any, key: str, where: str = "") -> Any:
    """One value of an object that may have others. Raises ValueError, also where it is missing."""
    if key not in read(Mapping[str, Any], data, where):
        raise refusal(f"has no {key!r}", where)
    return read(kind, data[key], step(where, key))


def wrong(value: Any, wanted: str, where: str = "") -> ValueError:
    """The error of a value that is not what it must be."""
    return refusal(f"is {shown(value)}, must be {wanted}", where)


def refusal(what: str, where: str = "") -> ValueError:
    """An error that says where."""
    return ValueError(f"{where}: {what}" if where else what)


def shown(value: Any) -> str:
    """A value as JSON; of lists and objects only that they are."""
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)


def step(where: str, key: str) -> str:
    """The place of a key within a place."""
    plain = key if re.fullmatch(r"[a-zA-Z0-9_-]+", key) else repr(key)
    return f"{where}.{plain}" if where else plain


def _read_record(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise wrong(value, "an object", where)
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := value.keys() - fields.keys():
        raise refusal(f"has {min(unknown)!r}, which is unknown", where)
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise refusal(f"has no {name!r}", where)
    made = {name: read(hints[name], item, step(where, name)) for name, item in value.items()}
    try:
        return kind(**made)
    except ValueError as error:
        raise refusal(str(error), where) from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is(kind: Any, value: Any) -> bool:
    """Whether a value is of the type, its parts left aside."""
    origin = get_origin(kind) or kind
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is tuple and get_args(kind)[-1] is not ...:
        return isinstance(value, list) and len(value) == len(get_args(kind))
    if origin in (tuple, Sequence):
        return isinstance(value, list)
    if origin is Mapping or dataclasses.is_dataclass(origin):
        return isinstance(value, Mapping)
    return type(value) is origin


def _name(kind: Any) -> str:
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_name, arguments))
    if origin is tuple and arguments[-1] is not ...:
        return f"a list of {len(arguments)}"
    if origin in (tuple, Sequence):
        return "a list"
    return "an object" if origin is Mapping or dataclasses.is_dataclass(origin) else NAMES[origin]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"has the key {key!r} twice")
        made[key] = value
    return made


def _whole(digits: str) -> int | float:
    """What 64 bits do not hold is no whole number: in C++ it is none either."""
    number = int(digits) if len(digits) < 25 else float(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)
