"""What frames show: background, objects with colour, outline, place and size, and how an object moves.

Numpy alone, and the same answer every time. It knows the world of scene.py, and must not know what was asked
for. It takes blur and noise as a VAE leaves them (about 30 dB); a colour or outline that is nothing of the
world is None, never the nearest. Pixels as in scene.py. N: objects of all frames together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nova_export.evaluation.scene import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Floats, coverage

Frames = NDArray[np.uint8]
Masks = NDArray[np.bool_]

BORDER = 2  # pixels along the frame's edges that show the background
MIN_CONTRAST = 50.0  # RGB distance; half of the least between a colour and a background, green on gray
EDGE_REACH = 2  # pixels that a blurred edge takes to reach the object's full colour
MIN_AREA = 16  # pixels; smaller specks are no objects. The smallest triangle has 72
MAX_COLOUR_ERROR = 50.0  # RGB distance; orange and yellow, the closest two, are 87 apart
MIN_COLOUR_SHARE = 2 / 3  # of an object's interior
MIN_FIT = 0.86  # intersection over union with the outline

MIN_TRAVEL = 10.0  # pixels; 60 % of the least that training shows
MIN_GROWTH = 1.3  # factor; 60 % of the least that training shows, on a log scale
MAX_ACROSS = 1 / 3  # of the travel
MAX_BACK = 1.5  # pixels a frame against the way
MAX_STEP = 10.0  # pixels a frame along it; training's fastest takes 4.5
MAX_BACK_SIZE = 1.07  # factor a frame against the growth
MAX_DRIFT = 4.0  # pixels that something in its place may wander
MAX_STILL_GROWTH = 1.15  # factor between least and greatest size of something that stands still
MAX_MOVING_GROWTH = 1.25  # of something that moves


@dataclass(frozen=True)
class Thing:
    """One object in one frame. x, y: centre of its box, in pixels. size: square root of its area."""

    colour: str | None
    shape: str | None
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class View:
    """What one frame shows; the largest object first."""

    background: str | None
    things: tuple[Thing, ...]


def look(frames: Frames) -> list[View]:
    """What each of the frames uint8 (F, H, W, 3) shows."""
    pixels = frames.astype(np.float32)
    ground = _ground(pixels)  # (F, 3)
    masks, owners = _objects(pixels, ground)  # (N, H, W), (N,)
    things = _things(pixels[owners], masks)
    return [
        View(
            _nearest(colour, BACKGROUNDS),
            tuple(
                thing
                for thing, owner in sorted(zip(things, owners, strict=True), key=lambda pair: -pair[0].size)
                if owner == index
            ),
        )
        for index, colour in enumerate(ground)
    ]


def motion_of(things: Sequence[Thing]) -> str | None:
    """How an object moves, from what was seen of it in one frame after another; None for no clear motion."""
    if len(things) < 2:
        return None
    x, y, size = (np.array([getattr(thing, name) for thing in things]) for name in ("x", "y", "size"))
    spread = size.max() / size.min()
    if max(np.ptp(x), np.ptp(y)) <= MAX_DRIFT:
        if spread <= MAX_STILL_GROWTH:
            return "standing still"
        for name, course in (("growing", size), ("shrinking", size[::-1])):
            steady = (course[1:] * MAX_BACK_SIZE >= course[:-1]).all()
            if steady and course[-1] >= course[0] * MIN_GROWTH:
                return name
        return None
    for name, (dx, dy) in DIRECTIONS.items():
        along, across = dx * x + dy * y, np.ptp(dy * x + dx * y)
        travel, steps = along[-1] - along[0], np.diff(along)
        steady = steps.min() >= -MAX_BACK and steps.max() <= MAX_STEP and spread <= MAX_MOVING_GROWTH
        if steady and travel >= MIN_TRAVEL and across <= travel * MAX_ACROSS:
            return name
    return None


def _ground(pixels: Floats) -> Floats:
    """The dominant colour along the edges of each frame (F, 3)."""
    inner = np.zeros(pixels.shape[1:3], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    return np.median(pixels[:, ~inner], axis=1)


def _objects(pixels: Floats, ground: Floats) -> tuple[Masks, NDArray[np.intp]]:
    """Masks (N, H, W) of connected pixels that stand out from the background, and the frame of each (N,).

    An edge runs where half of the contrast is reached that lies within its blur.
    """
    contrast = np.sqrt(((pixels - ground[:, None, None]) ** 2).sum(-1))  # (F, H, W)
    labels = _label((contrast > MIN_CONTRAST) & (contrast > _greatest_near(contrast) / 2))
    names, areas = np.unique(labels, return_counts=True)
    chosen = names[(areas >= MIN_AREA) & (names > 0)]
    owners = (chosen - 1) // labels[0].size  # a label is the place of one of its pixels, from 1
    return labels[owners] == chosen[:, None, None], owners


def _greatest_near(values: Floats) -> Floats:
    """The greatest value of (F, H, W) within EDGE_REACH pixels."""
    for axis in (1, 2):
        margin = [(EDGE_REACH, EDGE_REACH) if each == axis else (0, 0) for each in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(values, margin, mode="edge"), 2 * EDGE_REACH + 1, axis
        )
        values = windows.max(-1)
    return values


def _label(mask: Masks) -> NDArray[np.intp]:
    """Every 4-connected part of (F, H, W) under a number of its own, 0 where the mask is not set."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = _spread(_spread(labels).swapaxes(1, 2)).swapaxes(1, 2)
        if (spread == labels).all():
            return labels
        labels = spread


def _spread(labels: NDArray[np.intp]) -> NDArray[np.intp]:
    """Gives each run of labels along the last axis its greatest."""
    starts = np.ones(labels.shape, bool)
    starts[..., 1:] = (labels[..., 1:] > 0) != (labels[..., :-1] > 0)
    places = np.flatnonzero(starts)
    greatest = np.maximum.reduceat(labels.ravel(), places)
    return np.repeat(greatest, np.diff(places, append=labels.size)).reshape(labels.shape)


def _things(pixels: Floats, masks: Masks) -> list[Thing]:
    """The objects of masks (N, H, W) in their frames (N, H, W, 3)."""
    if not len(masks):
        return []
    shapes = _shapes(masks)
    things = []
    for colours, mask, shape in zip(pixels, masks, shapes, strict=True):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        x, y = ((places[0] + places[-1] + 1) / 2 for places in (columns, rows))
        things.append(
            Thing(_colour(colours[_interior(mask)]), shape, float(x), float(y), float(mask.sum() ** 0.5))
        )
    return things


def _interior(mask: Masks) -> Masks:
    """The mask (H, W) without its outermost pixels, which are blended; all of it if nothing is left."""
    padded = np.pad(mask, 1)
    inner = mask & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return inner if inner.any() else mask


def _colour(pixels: Floats) -> str | None:
    """The colour that nearly all of pixels (P, 3) have."""
    distances = np.linalg.norm(pixels[:, None] - np.array(list(COLOURS.values()), np.float32), axis=-1)
    named = distances.argmin(1)[distances.min(1) <= MAX_COLOUR_ERROR]
    counts = np.bincount(named, minlength=len(COLOURS))
    best = int(counts.argmax())
    return list(COLOURS)[best] if counts[best] >= MIN_COLOUR_SHARE * len(pixels) else None


def _nearest(colour: Floats, palette: dict[str, tuple[int, int, int]]) -> str | None:
    """The name of the palette's nearest colour (3,), if it is near enough."""
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= MAX_COLOUR_ERROR else None


def _shapes(masks: Masks) -> list[str | None]:
    """The outline that fits each mask (N, H, W) best, drawn at the mask's own centroid and area."""
    fits = np.array([_fit(masks, shape) for shape in SHAPES])  # (shapes, N)
    return [
        SHAPES[best] if fit >= MIN_FIT else None
        for best, fit in zip(fits.argmax(0), fits.max(0), strict=True)
    ]


def _fit(masks: Masks, shape: str) -> Floats:
    """Intersection over union (N,) of masks with a shape of the same area and centroid."""
    fill, drop = _proportions(shape)
    x, y, area = _moments(masks)
    size = np.sqrt(area / fill)
    drawn = coverage(shape, x, y - drop * size, size, masks.shape[-1]) > 0.5
    return (masks & drawn).sum((1, 2)) / (masks | drawn).sum((1, 2))


def _proportions(shape: str) -> tuple[float, float]:
    """The share of its box that a shape fills, and how far its centroid lies below the centre, in sizes."""
    size = 40.0
    middle = np.array([32.0], np.float32)
    _, y, area = _moments(coverage(shape, middle, middle, np.array([size], np.float32)))
    return float(area[0]) / size**2, float(y[0] - 32) / size


def _moments(weights: NDArray[np.generic]) -> tuple[Floats, Floats, Floats]:
    """Centroid x, y and area of (N, H, W): (N,) each."""
    pixels = np.arange(weights.shape[-1]) + 0.5
    area = weights.sum((1, 2))
    return (weights.sum(1) * pixels).sum(1) / area, (weights.sum(2) * pixels).sum(1) / area, area
