"""A tile decoded layer by layer, frame by frame: runs what reference_model/vae/lean.py cuts the decoder into.

A tensor of the last blocks takes gigabytes, and a decoder in one graph holds several. Here the frames of a
layer stand apart, and are freed as soon as those of the next are made of them. They can wait in the machine's
own memory, for a GPU that is too small even for these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nova_export.runtime.device_array import DeviceArray
from nova_export.runtime.runner import Held, Runner

Floats = NDArray[np.float32]


def decode_lean(
    stage: Callable[[str], Runner], pieces: Sequence[str], latents: Floats, frames_on_host: bool = False
) -> Floats:
    """Latents (1, C, l, h, w) of one tile to pixels (1, 3, F, H, W).

    pieces: names of stages, in order. frames_on_host: only what a call needs is on its device.
    """
    start = dict(stage(pieces[0]).run({"latents": latents}))
    frames, statistics = _rows(start.pop("next_frames")), _over_frames([start])
    block: list[Held] = []  # the frames that the residual block at work got
    for name in pieces[1:]:
        runner = stage(name)
        takes = {tensor.name for tensor in runner.stage.inputs}
        ends = "residual" in takes
        of_frames = _between(frames) if "here" in takes else _in_order(frames, block if ends else [])
        if not ends:
            block = list(frames)
        made = []
        for arrays in of_frames:
            inputs = {name: array for name, array in {**arrays, **statistics}.items() if name in takes}
            outputs = runner.run(inputs)
            made.append(
                {name: np.asarray(array) if frames_on_host else array for name, array in outputs.items()}
            )
        frames = [outputs.pop(runner.stage.outputs[0].name) for outputs in made]
        statistics = _over_frames(made)
    return np.stack([np.asarray(frame) for frame in frames], axis=2)


def _in_order(frames: list[Held], block: list[Held]) -> Iterator[dict[str, Held]]:
    """Every frame with the two before it and the block's own; none is kept longer than it is needed."""
    past_1 = past_2 = frames[0]  # in time, the first frame is repeated in front
    while frames:
        frame = frames.pop(0)
        residual = {"residual": block.pop(0)} if block else {}
        yield {"frame": frame, "past_1": past_1, "past_2": past_2, **residual}
        past_1, past_2 = frame, past_1


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


def _rows(array: Held) -> list[Held]:
    """Along the first axis, which each keeps with a size of 1."""
    if isinstance(array, DeviceArray):
        return list(array.rows())
    return [array[index : index + 1] for index in range(len(array))]
