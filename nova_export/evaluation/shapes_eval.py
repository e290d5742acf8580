"""ShapesEval: does a model show what it was asked for? One fixed list of prompts, seen and judged by rules.

    ours = samples_of(pipe, prompt_list())   # generated in fixed batches, and judged
    Score.of(ours)                           # shares with 95 % intervals, group by group
    Comparison.of(ours, theirs)              # two sources of the same prompts and noise

Knows nothing of bundles: a source is any callable that makes frames from prompts, and `judge` takes frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nova_export.config import NovaConfig
from nova_export.errors import InputError
from nova_export.evaluation.metrics import psnr, ssim, wilson
from nova_export.evaluation.scene import (
    COLOURS,
    DEFAULT_BACKGROUND,
    IMAGE_SIZE,
    NUM_FRAMES,
    SHAPES,
    Combination,
    Figure,
    Scene,
    combinations,
    held_out,
    visible_backgrounds,
)
from nova_export.evaluation.vision import Frames, look, motion_of
from nova_export.progress import Report, call_progress
from nova_export.runtime.generate import Step
from nova_export.runtime.pipeline import Output
from nova_export.tables import markdown

SEEN, HELD_OUT, IMAGES = GROUPS = ("seen", "held-out", "images")
TOTAL = "total"
ATTRIBUTES = ("objects", "background", "colour", "shape", "pairing", "motion")
ALL = "all"
HELD_OUT_REPEATS = 4  # of each held-out combination
NUM_IMAGES = 48  # half of them of two objects
STRIDE = 233  # of the list's order; the one under which any first part of it is the fairest sample
BATCH = 16  # prompts of one call; noise depends on it, so it is fixed

Checks = dict[str, bool]


class Source(Protocol):
    """What makes frames: a Pipeline, or the eager reference."""

    @property
    def config(self) -> NovaConfig: ...

    def __call__(
        self, prompt: Any, *, callback: Callable[[Step], object] | None = None, **arguments: Any
    ) -> Output: ...


@dataclass(frozen=True)
class Item:
    """One line of the prompt list."""

    scene: Scene
    group: str

    @property
    def prompt(self) -> str:
        return self.scene.prompt()

    @classmethod
    def of(cls, scene: Scene) -> Item:
        """A scene in its group."""
        if scene.motion is None:
            return cls(scene, IMAGES)
        return cls(scene, HELD_OUT if scene.combination in held_out() else SEEN)


@dataclass(frozen=True)
class Sample:
    """What was made of an item, and which of the attributes that it asks for are there."""

    item: Item
    frames: Frames
    checks: Checks

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(name for name, held in self.checks.items() if not held)


# The list


def prompt_list() -> list[Item]:
    """Every seen combination once, every held-out one four times, 48 still images; in a fixed order."""
    unseen = held_out()
    seen = [combination for combination in combinations() if combination not in unseen]
    repeated = [combination for combination in sorted(unseen) for _ in range(HELD_OUT_REPEATS)]
    items = [_video(combination, index, SEEN) for index, combination in enumerate(seen)]
    items += [_video(combination, index, HELD_OUT) for index, combination in enumerate(repeated)]
    items += [_image(index) for index in range(NUM_IMAGES)]
    return [items[place * STRIDE % len(items)] for place in range(len(items))]


def _video(combination: Combination, index: int, group: str) -> Item:
    colour, shape, motion = combination
    return Item(_scene([(colour, shape)], motion, index), group)


def _image(index: int) -> Item:
    """Colours and outlines in turn, each pair of them once; in the second half another object beside it."""
    first = _figure(index % (NUM_IMAGES // 2))
    second = [_figure(3 * index + 2 * (index // len(COLOURS)) + 1)] if index >= NUM_IMAGES // 2 else []
    return Item(_scene([first, *second], None, index // 3), IMAGES)


def _figure(index: int) -> Figure:
    return list(COLOURS)[index % len(COLOURS)], SHAPES[(index + index // len(COLOURS)) % len(SHAPES)]


def _scene(figures: list[Figure], motion: str | None, index: int) -> Scene:
    """On no named background, or on one of those on which all figures are seen, in turn."""
    choices = [None, *visible_backgrounds(figures)]
    return Scene(tuple(figures), motion, choices[index % len(choices)])


# The judgement


def judge(scene: Scene, frames: Frames) -> Checks:
    """Which attributes that a scene asks for do frames uint8 (F, H, W, 3) show? In the order of ATTRIBUTES.

    objects: as many as asked. colour, shape: those of the objects, whichever has which; pairing, asked of two
    objects only: each colour is on its own shape. Each must hold in all frames but one in nine.
    """
    views, count = look(frames), len(scene.figures)
    seen = [view.things[:count] for view in views]  # the largest
    asked_colours, asked_shapes = (Counter(part) for part in zip(*scene.figures, strict=True))

    def holds(frame_by_frame: Iterable[bool]) -> bool:
        return sum(frame_by_frame) >= len(views) - len(views) // NUM_FRAMES

    checks = {
        "objects": holds(len(view.things) == count for view in views),
        "background": holds(view.background == (scene.background or DEFAULT_BACKGROUND) for view in views),
        "colour": holds(Counter(thing.colour for thing in things) == asked_colours for things in seen),
        "shape": holds(Counter(thing.shape for thing in things) == asked_shapes for things in seen),
    }
    if count > 1:
        asked = Counter(scene.figures)
        checks["pairing"] = holds(Counter((t.colour, t.shape) for t in things) == asked for things in seen)
    if scene.motion is not None:
        track = [things[0] for things in seen if things]
        checks["motion"] = holds(map(bool, seen)) and motion_of(track) == scene.motion
    return checks


# The run


def check_source(config: NovaConfig, name: str) -> None:
    """Raises InputError for a checkpoint that does not speak of this world."""
    height, width = config.image_size
    problem = ""
    if config.is_class_conditional:
        problem = "is class-conditional"
    elif (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        problem = f"makes {width}x{height} pixels, not {IMAGE_SIZE}x{IMAGE_SIZE}"
    elif not config.is_video:
        problem = "makes images only"
    if problem:
        raise InputError(
            f"{name} {problem}: ShapesEval is for the demo checkpoint; for others, --prompts FILE --out DIR "
            "writes samples for the GenEval and VBench evaluators"
        )


def samples_of(
    source: Source,
    items: Sequence[Item],
    seed: int = 0,
    report: Report = lambda done: None,
    **arguments: Any,
) -> list[Sample]:
    """Generate every item and judge it; in the order of the items.

    Videos and images go in batches of their own. Each batch draws from seed + the place of its first item, so
    two sources get the same noise. arguments: of `Request`.
    """
    made: dict[int, Sample] = {}
    for places in _batches(items):
        still = items[places[0]].scene.motion is None
        output = source(
            [items[place].prompt for place in places],
            callback=call_progress(report, len(made), len(places)),
            max_latent_length=1 if still else source.config.video_length,
            seed=seed + places[0],
            **arguments,
        )
        for place, frames in zip(places, output.frames, strict=True):
            made[place] = Sample(items[place], frames, judge(items[place].scene, frames))
        report(len(made))
    return [made[place] for place in range(len(items))]


def _batches(items: Sequence[Item]) -> Iterator[list[int]]:
    """Places of the items of each call."""
    for still in (False, True):
        places = [place for place, item in enumerate(items) if (item.scene.motion is None) is still]
        for start in range(0, len(places), BATCH):
            yield places[start : start + BATCH]


# The score


@dataclass(frozen=True)
class Rate:
    """How many of those asked for it have it."""

    passed: int
    total: int

    @property
    def share(self) -> float:
        return self.passed / self.total

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "share": self.share, "interval_95": list(wilson(self.passed, self.total))}

    def __str__(self) -> str:
        low, high = wilson(self.passed, self.total)
        return f"{100 * self.share:.1f} % ({100 * low:.0f}-{100 * high:.0f})"


@dataclass(frozen=True)
class Score:
    """rates: by group, then by attribute, `all` of them together last; none where nothing asked for it."""

    rates: dict[str, dict[str, Rate]]

    @classmethod
    def of(cls, made: Sequence[Sample]) -> Score:
        rates: dict[str, dict[str, Rate]] = {}
        for group in (*GROUPS, TOTAL):
            checks = [sample.checks for sample in made if group in (sample.item.group, TOTAL)]
            if not checks:
                continue
            held = {name: [each[name] for each in checks if name in each] for name in ATTRIBUTES}
            held[ALL] = [all(each.values()) for each in checks]
            rates[group] = {name: Rate(sum(each), len(each)) for name, each in held.items() if each}
        return cls(rates)

    def to_dict(self) -> dict[str, Any]:
        return {
            group: {name: rate.to_dict() for name, rate in rates.items()}
            for group, rates in self.rates.items()
        }

    def table(self) -> str:
        """For a person: a line an attribute, a column a group; percent, and the 95 % interval."""
        return _table({group: {n: str(r) for n, r in rates.items()} for group, rates in self.rates.items()})


@dataclass(frozen=True)
class Comparison:
    """Two sources, sample by sample. differences: share of the second less that of the first, as in Score.

    psnr: dB, (F,) of each sample. ssim alike.
    """

    differences: dict[str, dict[str, float]]
    psnr: list[list[float]]
    ssim: list[list[float]]

    @classmethod
    def of(cls, first: Sequence[Sample], second: Sequence[Sample]) -> Comparison:
        """Raises InputError where the two make another number of frames."""
        ours, theirs = Score.of(first).rates, Score.of(second).rates
        for a, b in zip(first, second, strict=True):
            if a.frames.shape != b.frames.shape:
                shapes = f"{a.frames.shape} and {b.frames.shape}"
                raise InputError(f"{a.item.prompt!r} has frames {shapes}: only the same size can be compared")
        differences = {
            group: {name: theirs[group][name].share - rate.share for name, rate in rates.items()}
            for group, rates in ours.items()
        }
        pairs = [(a.frames, b.frames) for a, b in zip(first, second, strict=True)]
        return cls(
            differences, [psnr(a, b).tolist() for a, b in pairs], [ssim(a, b).tolist() for a, b in pairs]
        )

    @property
    def identical(self) -> int:
        """Samples whose every frame is the same, bit for bit."""
        return sum(bool(np.isinf(values).all()) for values in self.psnr)

    def to_dict(self) -> dict[str, Any]:
        return {
            "differences": self.differences,
            "samples": len(self.psnr),
            "identical": self.identical,
            "psnr": _summary(self.psnr),
            "ssim": _summary(self.ssim),
        }

    def table(self) -> str:
        shown = {
            group: {name: f"{100 * value:+.1f}" for name, value in values.items()}
            for group, values in self.differences.items()
        }
        psnr, ssim = _summary(self.psnr), _summary(self.ssim)
        lines = [f"{self.identical} of {len(self.psnr)} are the same bit for bit"]
        if psnr["mean"] is not None:
            lines.append(
                f"PSNR of frames that differ: mean {psnr['mean']:.1f} dB, least {psnr['min']:.1f} dB"
            )
            lines.append(f"SSIM: mean {ssim['mean']:.4f}, least {ssim['min']:.4f}")
        return "\n".join([_table(shown), "", *lines])


def _summary(values: list[list[float]]) -> dict[str, Any]:
    """Mean and least, over all frames and frame by frame (F,). Infinities, frames without a difference, are
    left out of the means; None where nothing else is there, as JSON has no infinity."""

    def finite(numbers: list[float]) -> list[float]:
        return [number for number in numbers if np.isfinite(number)]

    def mean(numbers: list[float]) -> float | None:
        return float(np.mean(numbers)) if numbers else None

    frames = max(map(len, values), default=0)
    by_frame = [finite([each[index] for each in values if len(each) > index]) for index in range(frames)]
    everything = finite([number for each in values for number in each])
    return {
        "mean": mean(everything),
        "min": min(everything, default=None),
        "frames": [mean(each) for each in by_frame],
    }


def _table(columns: dict[str, dict[str, str]]) -> str:
    """Markdown: a line an attribute, a column a group."""
    names = [name for name in (*ATTRIBUTES, ALL) if any(name in cells for cells in columns.values())]
    rows = [[name, *(cells.get(name, "-") for cells in columns.values())] for name in names]
    return markdown(["", *columns], rows)
