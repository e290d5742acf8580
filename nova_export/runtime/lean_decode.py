"""A tile decoded layer by layer, frame by frame: runs what reference_model/vae/lean.py cuts the decoder into.

A tensor of the last blocks takes gigabytes, and a decoder in one graph holds several. Here the frames of a
layer stand apart, and are freed as soon as those of the next are made of them. Those that an upsampler makes
are four times as large as what it makes them of, and so are made again each time they are read. The others
can wait in the machine's own memory, for a GPU that is too small even for these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nova_export.lean_stages import enlarges
from nova_export.runtime.device_array import Held, rows_of
from nova_export.runtime.runner import Runner

Floats = NDArray[np.float32]
Arrays = Mapping[str, Held]


def decode_lean(
    stage: Callable[[str], Runner], pieces: Sequence[str], latents: Floats, frames_on_host: bool = False
) -> Floats:
    """Latents (1, C, l, h, w) of one tile to pixels (1, 3, F, H, W).

    pieces: names of stages, in order. frames_on_host: only what a call needs is on its device.
    """
    start = dict(stage(pieces[0]).run({"latents": latents}))
    frames: Iterable[Held] = rows_of(start.pop("next_frames"))
    statistics = _over_frames([start])
    block = frames  # those that the residual block at work got
    for name in pieces[1:]:
        piece = Piece(stage(name), statistics, frames_on_host)
        if enlarges(piece.stage):
            statistics = _over_frames([piece.made({"frame": frame})[1] for frame in frames])
            frames = Enlarged(piece, frames)
            continue
        if "residual" in piece.takes:
            of_frames = _in_order(_taken(frames), _taken(block))
        else:
            block = frames
            of_frames = _in_order(frames) if "frame" in piece.takes else _between(list(frames))
        frames, of_each = [], []
        for arrays in of_frames:
            frame, of_frame = piece.made(arrays)
            frames.append(frame)
            of_each.append(of_frame)
        statistics = _over_frames(of_each)
    return np.stack([np.asarray(frame) for frame in frames], axis=2)


class Piece:
    """One that runs for every frame. statistics: of what it normalises."""

    def __init__(self, runner: Runner, statistics: Arrays, frames_on_host: bool) -> None:
        self.stage, self._run = runner.stage, runner.run
        self.takes = {tensor.name for tensor in self.stage.inputs}
        self._statistics = {name: array for name, array in statistics.items() if name in self.takes}
        self._frames_on_host = frames_on_host and not enlarges(self.stage)  # those are not kept

    def made(self, arrays: Arrays) -> tuple[Held, Arrays]:
        """A frame, and its statistics."""
        outputs = dict(self._run({**arrays, **self._statistics}))
        frame = outputs.pop(self.stage.outputs[0].name)
        return np.asarray(frame) if self._frames_on_host else frame, outputs


class Enlarged:
    """Frames that an upsampler makes of smaller ones, each time that they are gone through."""

    def __init__(self, upsampler: Piece, frames: Iterable[Held]) -> None:
        self._upsampler, self._frames = upsampler, frames

    def __iter__(self) -> Iterator[Held]:
        return (self._upsampler.made({"frame": frame})[0] for frame in self._frames)


def _in_order(frames: Iterable[Held], block: Iterator[Held] | None = None) -> Iterator[Arrays]:
    """Every frame with the two before it, and the block's own if told."""
    past_1: Held | None = None
    past_2: Held | None = None
    for frame in frames:
        if past_1 is None or past_2 is None:  # in time, the first frame is repeated in front
            past_1 = past_2 = frame
        inputs = {"frame": frame, "past_1": past_1, "past_2": past_2}
        yield inputs if block is None else {**inputs, "residual": next(block)}
        past_1, past_2 = frame, past_1


def _taken(frames: Iterable[Held]) -> Iterator[Held]:
    """One by one. Those that are kept are not kept any longer."""
    if not isinstance(frames, list):
        yield from frames
        return
    while frames:
        yield frames.pop(0)


def _between(frames: Sequence[Held]) -> Iterator[dict[str, Held]]:
    """All frames but the first doubled, each half nearer to its own than to the neighbour on its side."""
    last = len(frames) - 1
    pairs = [(0, 0)]
    for here in range(1, last + 1):
        pairs += [(here, max(here - 1, 1)), (here, min(here + 1, last))]
    for index in range(len(pairs)):
        inputs: dict[str, Held] = {}
        for past, suffix in enumerate(("", "_1", "_2")):
            here, near = pairs[max(index - past, 0)]
            inputs |= {f"here{suffix}": frames[here], f"near{suffix}": frames[near]}
        yield inputs


def _over_frames(made: Sequence[Mapping[str, Held]]) -> dict[str, Floats]:
    """Mean and variance (groups,) over all frames from each one's own. The frames are waited for here.

    Empty where a piece makes none.
    """
    if "next_mean" not in made[0]:
        return {}
    means = np.array([np.asarray(each["next_mean"]) for each in made], np.float64)
    variances = np.array([np.asarray(each["next_variance"]) for each in made], np.float64)
    mean = means.mean(axis=0)
    variance = (variances + (means - mean) ** 2).mean(axis=0)
    return {"mean": mean.astype(np.float32), "variance": variance.astype(np.float32)}
