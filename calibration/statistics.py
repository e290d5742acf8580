"""What is kept of a calibration: of a layer's input a histogram and two numbers a channel, of every other
value its largest magnitude. Numpy alone.

Memory does not grow with what is added. Statistics are saved as .npz, without pickle.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_export.errors import InputError, OutputError

BINS = 2048  # from -limit to limit
FORMAT = 2
NUMBERS = ("channels", "limit", "low", "high", "rows")  # of a LayerInput, as saved
ARRAYS = ("counts", "largest", "squares")

Place = tuple[str, str]  # stage, and a layer or a value in it


@dataclass
class LayerInput:
    """Of all inputs x (..., channels) of one layer that were added.

    counts (BINS,): how many values lie in each part of -limit .. limit. largest, squares (channels,): the
    largest magnitude and the sum of squares of each channel; rows: how many vectors were added.
    """

    channels: int
    limit: float = 2.0**-10
    low: float = 0.0
    high: float = 0.0
    rows: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    largest: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0, np.float64))

    def __post_init__(self) -> None:
        if not self.largest.size:
            self.largest = np.zeros(self.channels, np.float32)
            self.squares = np.zeros(self.channels, np.float64)

    def add(self, x: NDArray[np.float32]) -> None:
        """x (..., channels). The histogram's range doubles until it holds every value: none is cut off."""
        x = x.reshape(-1, self.channels)
        if not len(x):
            return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        while max(self.high, -self.low) > self.limit:
            self._double()
        self.counts += np.histogram(x, bins=BINS, range=(-self.limit, self.limit))[0]
        np.maximum(self.largest, np.abs(x).max(0), out=self.largest)
        self.squares += np.square(x, dtype=np.float64).sum(0)
        self.rows += len(x)

    def _double(self) -> None:
        pairs = self.counts.reshape(-1, 2).sum(1)
        self.counts = np.pad(pairs, BINS // 4)
        self.limit *= 2

    @property
    def centres(self) -> NDArray[np.floating[Any]]:
        """The middle of every bin: (BINS,)."""
        width = 2 * self.limit / BINS
        return (np.arange(BINS) + 0.5) * width - self.limit


@dataclass
class Statistics:
    """What was seen in the stages of a checkpoint, and what it comes from.

    source: digests of the parts of the checkpoint. arguments: of `Request`, as the loops ran. done: how many
    of the prompts. layers: inputs of linear layers. largest: the largest magnitude of every float value.
    """

    source: Mapping[str, str]
    prompts: list[str | int]
    seed: int
    arguments: Mapping[str, Any]
    done: int = 0
    layers: dict[Place, LayerInput] = field(default_factory=dict)
    largest: dict[Place, float] = field(default_factory=dict)

    def layers_of(self, stage: str) -> dict[str, LayerInput]:
        """The layers of one stage."""
        return {layer: found for (name, layer), found in self.layers.items() if name == stage}

    def largest_of(self, stage: str) -> dict[str, float]:
        """The largest magnitudes in one stage."""
        return {value: largest for (name, value), largest in self.largest.items() if name == stage}

    def save(self, path: Path) -> None:
        """Write `path`, whole or not at all. Raises OutputError."""
        head = {
            "format": FORMAT,
            **self._origin(),
            "done": self.done,
            "layers": [
                [*place, *(getattr(each, name) for name in NUMBERS)] for place, each in self.layers.items()
            ],
            "largest": [[*place, number] for place, number in self.largest.items()],
        }
        arrays: dict[str, NDArray[Any]] = {"head": np.array(json.dumps(head))}
        for index, each in enumerate(self.layers.values()):
            arrays |= {f"{name}{index}": getattr(each, name) for name in ARRAYS}
        partial = path.with_name(f".{path.name}.partial.npz")
        try:
            np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Raises InputError for a file that is none of `save`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                if head["format"] != FORMAT:
                    raise InputError(f"{path}: has format {head['format']!r}; calibrate again")
                layers = {
                    (stage, layer): LayerInput(
                        **dict(zip(NUMBERS, numbers, strict=True)),
                        **{name: file[f"{name}{i}"] for name in ARRAYS},
                    )
                    for i, (stage, layer, *numbers) in enumerate(head["layers"])
                }
                largest = {(stage, value): float(number) for stage, value, number in head["largest"]}
            origin = {name: head[name] for name in ("source", "prompts", "seed", "arguments", "done")}
            return cls(**origin, layers=layers, largest=largest)
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            reason = "no .npz" if "pickle" in str(error) else error  # numpy would advise to trust the file
            raise InputError(
                f"{path}: holds no calibration ({reason}); `nova-export calibrate` makes one"
            ) from error

    def digest(self) -> str:
        """SHA-256 of all of it."""
        largest = [[*place, number] for place, number in self.largest.items()]
        digest = hashlib.sha256(json.dumps([self._origin(), self.done, largest]).encode())
        for (stage, layer), each in self.layers.items():
            digest.update(f"{stage} {layer} {each.limit} {each.low} {each.high} {each.rows}".encode())
            for array in (each.counts, each.largest, each.squares):
                digest.update(array.tobytes())
        return digest.hexdigest()

    def same_origin(self, other: Statistics) -> bool:
        """Whether both are of the same checkpoint, prompts, seed and arguments."""
        return json.dumps(self._origin()) == json.dumps(other._origin())

    def _origin(self) -> dict[str, Any]:
        return {
            "source": dict(self.source),
            "prompts": list(self.prompts),
            "seed": self.seed,
            "arguments": dict(self.arguments),
        }
