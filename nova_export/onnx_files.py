"""Which files beside itself an ONNX graph reads, and where a node is from, found without the onnx package.

Knows the few protobuf messages on the way there. ONNX Runtime 1.23 reads whatever path
a graph names, later versions whatever lies in its folder: whoever opens a bundle must look first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Message -> its fields that lead to tensors (numbers as in onnx.proto3), and what they hold.
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {1: "key", 2: "value"},
}
FIXED_BYTES = {1: 8, 5: 4}  # wire type -> size
VARINT, LENGTH = 0, 2


def external_files(path: Path) -> set[str]:
    """Every location of external data in the model, as written. Raises OSError; ValueError: no model."""
    locations = set()
    waiting = [("model", memoryview(path.read_bytes()))]
    while waiting:
        kind, data = waiting.pop()
        parts = [(FIELDS[kind][number], part) for number, part in _fields(data) if number in FIELDS[kind]]
        if kind != "entry":
            waiting += parts
            continue
        entry = {name: bytes(part) for name, part in parts}
        if entry.get("key") == b"location":
            locations.add(entry.get("value", b"").decode("utf-8"))
    return locations


def module_of(path: Path, node: str) -> str | None:
    """The name of the PyTorch module that a node of the main graph was exported from, inside its stage's own.

    None where the graph does not say. Raises OSError, ValueError as `external_files`.
    """
    graph = _only(memoryview(path.read_bytes()), 7)
    for number, content in _fields(graph):
        if number != 1 or bytes(_only(content, 3)).decode() != node:
            continue
        for entry in (part for number, part in _fields(content) if number == 9):
            if bytes(_only(entry, 1)) == b"namespace":
                # ": wrapper/module: Stage/module.blocks.0: Block/.../op: aten.linear"; an op is no module
                *modules, _ = bytes(_only(entry, 2)).decode().split("/")
                name = modules[-1].split(":")[0].removeprefix("module") if modules else ""
                return name.lstrip(".") or None
    return None


def _only(data: memoryview, wanted: int) -> memoryview:
    """The content of a field that a message has once; empty where it has none."""
    return next((content for number, content in _fields(data) if number == wanted), memoryview(b""))


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of a message's fields that have a length; numbers and fixed sizes are skipped."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag >> 32:  # readers that take what fits into 32 bits would see another field
            raise ValueError(f"a field's tag is too large at byte {at}")
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            _, at = _varint(data, at)
            continue
        if wire == LENGTH:
            size, at = _varint(data, at)
        elif wire in FIXED_BYTES:
            size = FIXED_BYTES[wire]
        else:
            raise ValueError(f"protobuf wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(data)}")
        if wire == LENGTH:
            yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        if shift == 63 and byte > 1:
            break
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number without end at byte {at}")
