"""Random weights straight into safetensors files, tensor by tensor, in memory of a few blocks. Torch-free.

A tensor's values depend on the seed and its own name alone, so neither order nor sharding changes them. They
are sums of four 16-bit uniforms: bell-shaped, and bounded by 3.5 standard deviations. They come from the raw
stream of PCG64, which NumPy promises never to change, as it does not of its normal draws.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reference_model.parameters import Parameter

BLOCK = 1 << 18  # values drawn at once
ITEM = 2  # bytes of an fp16 value
SHARD_BYTES = 2_000_000_000  # a larger part is written as several files and an index
UNIFORM = np.uint64(0xFFFF)


def draw(parameter: Parameter, seed: int, part: str) -> Iterator[NDArray[np.float16]]:
    """The values of a tensor, in order, flat, block by block."""
    if parameter.inverse_of is not None:
        yield _with_inverse(parameter, parameter.inverse_of, seed, part).astype(np.float16)
        return
    for block in _values(parameter, seed, part):
        yield block.astype(np.float16)


def write_weights(
    folder: Path, stem: str, parameters: Sequence[Parameter], seed: int, part: str, limit: int = SHARD_BYTES
) -> None:
    """Write `stem`.safetensors; if larger than `limit` bytes, shards and `stem`.safetensors.index.json."""
    shards = _shards(parameters, limit)
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", shards[0], seed, part)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, seed, part)
        weight_map.update({parameter.name: name for parameter in shard})
    index = {"metadata": {"total_size": _bytes(parameters)}, "weight_map": weight_map}
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _values(parameter: Parameter, seed: int, part: str) -> Iterator[NDArray[np.float32]]:
    key = hashlib.sha256(f"{seed}/{part}/{parameter.name}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(key, "little"))
    mean, scale = np.float32(parameter.mean), np.float32(parameter.std * 3**0.5 / 2**16)
    for start in range(0, parameter.size, BLOCK):
        raw = np.asarray(bits.random_raw(min(BLOCK, parameter.size - start)), dtype=np.uint64)
        total = (raw & UNIFORM) + (raw >> np.uint64(48))
        for shift in (16, 32):
            total += (raw >> np.uint64(shift)) & UNIFORM
        yield (total.astype(np.float32) - np.float32(2 * 0xFFFF)) * scale + mean


def _with_inverse(parameter: Parameter, embedding: Parameter, seed: int, part: str) -> NDArray[np.float64]:
    """Independent values plus the embedding's pseudo-inverse, in float64: fp16 then hides all rounding."""
    values = np.concatenate(list(_values(parameter, seed, part)))
    weight = np.concatenate(list(_values(embedding, seed, part))).astype(np.float64).reshape(embedding.shape)
    columns = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)  # (D, p * p * C), as patches are unfolded
    return values + parameter.inverse_gain * np.linalg.pinv(columns).reshape(-1)


def _shards(parameters: Sequence[Parameter], limit: int) -> list[list[Parameter]]:
    """Parameters in order, cut before a file would grow past the limit."""
    shards: list[list[Parameter]] = [[]]
    for parameter in parameters:
        if shards[-1] and _bytes(shards[-1]) + _bytes([parameter]) > limit:
            shards.append([])
        shards[-1].append(parameter)
    return shards


def _bytes(parameters: Sequence[Parameter]) -> int:
    return ITEM * sum(parameter.size for parameter in parameters)


def _write_file(path: Path, parameters: Sequence[Parameter], seed: int, part: str) -> None:
    """The safetensors format: length of the header (8 bytes, little endian), header (JSON), values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for parameter in parameters:
        start, end = end, end + _bytes([parameter])
        header[parameter.name] = {
            "dtype": "F16",
            "shape": list(parameter.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for parameter in parameters:
            for block in draw(parameter, seed, part):
                file.write(block.astype("<f2", copy=False).tobytes())
