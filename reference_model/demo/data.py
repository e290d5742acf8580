"""Training data, made as it is needed: clips of one moving shape, images of one or two. Numpy alone.

Everything comes from the generator given: same seed, same data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nova_export.evaluation.scene import (
    COLOURS,
    DEFAULT_BACKGROUND,
    DIRECTIONS,
    IMAGE_SIZE,
    MOTIONS,
    NUM_FRAMES,
    SHAPES,
    Combination,
    Figure,
    Floats,
    Scene,
    coverage,
    held_out,
    visible_backgrounds,
)

Frames = NDArray[np.uint8]

MARGIN = 1.0  # pixels between a shape and the edge of the frame
SPEED = (2.1, 4.5)  # pixels a frame
LEAST_TRAVEL = 17.0  # pixels over the clip
GROWTH = (1.55, 2.3)  # factor over the clip
BACKGROUND_SHARE = 0.5  # of prompts that name a background
EDGE_SHARE = 0.25  # of moving shapes that may reach the edge; they rest there


@dataclass(frozen=True)
class Clip:
    """frames: uint8 (F, H, W, 3). flow: mean magnitude of the shape's optical flow, in hundredths of the
    frame's width per frame; 0 for a still image."""

    scene: Scene
    frames: Frames
    flow: float

    @property
    def has_cross(self) -> bool:
        return any(shape == "cross" for _, shape in self.scene.figures)

    @property
    def is_lit(self) -> bool:
        """Whether the background is not black."""
        return any(self.scene.background_colour)

    @property
    def is_white(self) -> bool:
        """Whether the background is white."""
        return self.scene.background == "white"


@dataclass(frozen=True)
class Track:
    """Centre and size of one shape in every frame: (F,) each, in pixels."""

    x: Floats
    y: Floats
    size: Floats


def sample_clip(rng: np.random.Generator, combination: Combination | None = None) -> Clip:
    """One shape in motion over 9 frames; of a random combination that is not held out, if none is given."""
    colour, shape, motion = combination or _combination(rng)
    figures = ((colour, shape),)
    scene = Scene(figures, motion, _background(rng, figures))
    track = sample_track(rng, motion)
    return Clip(scene, draw(scene, [track]), flow(shape, track))


def sample_image(rng: np.random.Generator) -> Clip:
    """One or two shapes, apart from each other, in a single frame."""
    if rng.random() < 0.5:
        colour, shape, motion = _combination(rng)
        figure = ((colour, shape),)
        scene = Scene(figure, None, _background(rng, figure))
        track = sample_track(rng, motion)
        return Clip(scene, draw(scene, [Track(track.x[:1], track.y[:1], track.size[:1])]), 0.0)
    figures = [(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))) for _ in range(2)]
    scene = Scene(tuple(figures), None, _background(rng, figures))
    return Clip(scene, draw(scene, _two_places(rng)), 0.0)


def sample_track(rng: np.random.Generator, motion: str, frames: int = NUM_FRAMES) -> Track:
    """A way through the clip at constant speed that never leaves the frame."""
    steps = np.arange(frames, dtype=np.float32)
    if motion in ("growing", "shrinking"):
        small = float(rng.uniform(12, 16))
        large = small * rng.uniform(*GROWTH)
        last = frames - 1 if rng.random() > EDGE_SHARE else rng.integers(frames // 2, frames)
        progress = np.minimum(steps / last, 1)
        sizes = small + (large - small) * (progress if motion == "growing" else 1 - progress)
        x, y = (_anywhere(rng, large) + 0 * steps for _ in range(2))
        return Track(x, y, sizes.astype(np.float32))
    size = float(rng.uniform(16, 26))
    if motion == "standing still":
        x, y = (_anywhere(rng, size) + 0 * steps for _ in range(2))
        return Track(x, y, size + 0 * steps)
    low, high = size / 2 + MARGIN, IMAGE_SIZE - size / 2 - MARGIN
    speed = rng.uniform(*SPEED)
    travel = LEAST_TRAVEL if rng.random() < EDGE_SHARE else speed * (frames - 1)
    start = low + rng.uniform(0, max(high - low - travel, 0))
    along = np.minimum(start + speed * steps, high)
    across = _anywhere(rng, size) + 0 * steps
    dx, dy = DIRECTIONS[motion]
    along = IMAGE_SIZE - along if dx + dy < 0 else along
    x, y = (along, across) if dx else (across, along)
    return Track(x.astype(np.float32), y.astype(np.float32), size + 0 * steps)


def draw(scene: Scene, tracks: list[Track]) -> Frames:
    """Anti-aliased frames uint8 (F, H, W, 3) of a scene's figures on their tracks."""
    count = len(tracks[0].x)
    pixels = np.broadcast_to(
        np.array(scene.background_colour, np.float32), (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    )
    for (colour, shape), track in zip(scene.figures, tracks, strict=True):
        alpha = coverage(shape, track.x, track.y, track.size)[..., None]
        pixels = pixels + alpha * (np.array(COLOURS[colour], np.float32) - pixels)
    return np.rint(pixels).astype(np.uint8)


def flow(shape: str, track: Track) -> float:
    """Mean magnitude of the optical flow over the shape's pixels, in hundredths of the width per frame.

    Exact: a pixel at p moves by d + (p - c) g, with d the step of the centre c and g the relative growth.
    """
    alpha = coverage(shape, track.x[:-1], track.y[:-1], track.size[:-1])
    pixels = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    growth = (np.diff(track.size) / track.size[:-1])[:, None, None]
    dx = np.diff(track.x)[:, None, None] + (pixels - track.x[:-1, None, None]) * growth
    dy = np.diff(track.y)[:, None, None] + (pixels[:, None] - track.y[:-1, None, None]) * growth
    magnitude = (alpha * np.sqrt(dx * dx + dy * dy)).sum((1, 2)) / alpha.sum((1, 2))
    return float(magnitude.mean()) * 100 / IMAGE_SIZE


_HELD_OUT = held_out()


def _combination(rng: np.random.Generator) -> Combination:
    while True:
        combination = (str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), str(rng.choice(MOTIONS)))
        if combination not in _HELD_OUT:
            return combination


def _background(rng: np.random.Generator, figures: Iterable[Figure]) -> str | None:
    """None, or a background on which all figures are seen."""
    seen = visible_backgrounds(figures)
    assert DEFAULT_BACKGROUND in seen
    return str(rng.choice(seen)) if rng.random() < BACKGROUND_SHARE else None


def _anywhere(rng: np.random.Generator, size: float) -> float:
    return float(rng.uniform(size / 2 + MARGIN, IMAGE_SIZE - size / 2 - MARGIN))


def _two_places(rng: np.random.Generator) -> list[Track]:
    """Two shapes whose boxes do not touch."""
    while True:
        sizes = rng.uniform(16, 26, 2)
        x, y = ([_anywhere(rng, size) for size in sizes] for _ in range(2))
        if max(abs(x[0] - x[1]), abs(y[0] - y[1])) > sizes.mean() + 2:
            tracks = zip(x, y, sizes, strict=True)
            return [Track(*(np.full(1, value, np.float32) for value in track)) for track in tracks]
