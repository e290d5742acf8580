"""The world of the demo checkpoint: its prompts, colours and outlines, and how they are drawn.

Training data (reference_model/demo) and evaluator read the same tables. Pixels: x to the right, y down, the
centre of the first pixel at 0.5. Every shape fills a square box of side `size`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import product

import numpy as np
from numpy.typing import NDArray

from nova_export.errors import InputError

Floats = NDArray[np.float32]

IMAGE_SIZE = 64
NUM_FRAMES = 9

COLOURS = {
    "red": (225, 35, 35),
    "green": (40, 175, 60),
    "blue": (45, 80, 225),
    "yellow": (245, 225, 45),
    "magenta": (220, 55, 205),
    "cyan": (45, 210, 225),
    "white": (255, 255, 255),
    "orange": (245, 140, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = (
    "moving right",
    "moving left",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "standing still",
)
BACKGROUNDS = {"black": (0, 0, 0), "gray": (110, 110, 110), "white": (255, 255, 255)}
DEFAULT_BACKGROUND = "black"
DIRECTIONS = {"moving right": (1, 0), "moving left": (-1, 0), "moving up": (0, -1), "moving down": (0, 1)}

Figure = tuple[str, str]  # colour, shape
Combination = tuple[str, str, str]  # colour, shape, motion

GRAMMAR = (
    f"a {{{'|'.join(COLOURS)}}} {{{'|'.join(SHAPES)}}} [{{{'|'.join(MOTIONS)}}}] "
    f"[and a COLOUR SHAPE] [on a {{{'|'.join(BACKGROUNDS)}}} background]"
)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one figure that moves, or a still image (`motion` None) of one or two.

    background: None where the prompt names none; it is black then.
    """

    figures: tuple[Figure, ...]
    motion: str | None = None
    background: str | None = None

    @property
    def background_colour(self) -> tuple[int, int, int]:
        return BACKGROUNDS[self.background or DEFAULT_BACKGROUND]

    @property
    def combination(self) -> Combination | None:
        """(colour, shape, motion) of a scene that moves."""
        return None if self.motion is None else (*self.figures[0], self.motion)

    def prompt(self) -> str:
        """The scene in words; `parse` is the reverse."""
        words = " and ".join(f"{article(colour)} {colour} {shape}" for colour, shape in self.figures)
        if self.motion:
            words += f" {self.motion}"
        return words + (f" on a {self.background} background" if self.background else "")


def visible_backgrounds(figures: Iterable[Figure]) -> list[str]:
    """The backgrounds on which every one of the figures is seen."""
    colours = {COLOURS[colour] for colour, _ in figures}
    return [name for name, value in BACKGROUNDS.items() if value not in colours]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


_FIGURE = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PROMPT = re.compile(
    rf"{_FIGURE}(?: and {_FIGURE}| ({'|'.join(MOTIONS)}))?(?: on an? ({'|'.join(BACKGROUNDS)}) background)?"
)


def parse(prompt: str) -> Scene:
    """The scene that a prompt describes. Raises InputError for a prompt outside the grammar."""
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if match is None:
        raise InputError(f"prompt {prompt!r} is outside the grammar of ShapesEval: {GRAMMAR}")
    colour, shape, second_colour, second_shape, motion, background = match.groups()
    second = ((second_colour, second_shape),) if second_colour else ()
    scene = Scene(((colour, shape), *second), motion, background)
    for figure_colour, _ in scene.figures:
        if COLOURS[figure_colour] == scene.background_colour:
            raise InputError(f"prompt {prompt!r}: nothing {figure_colour} is seen on {scene.background}")
    return scene


def combinations() -> list[Combination]:
    """Every (colour, shape, motion)."""
    return list(product(COLOURS, SHAPES, MOTIONS))


def held_out() -> frozenset[Combination]:
    """The combinations that training never sees, from held_out.txt."""
    lines = files("nova_export.evaluation").joinpath("held_out.txt").read_text(encoding="utf-8").splitlines()
    scenes = (parse(line) for line in lines if line and not line.startswith("#"))
    return frozenset(scene.combination for scene in scenes if scene.combination)


def coverage(shape: str, x: Floats, y: Floats, size: Floats, image_size: int = IMAGE_SIZE) -> Floats:
    """How much of each pixel a shape covers, 0 to 1: centres x, y and sizes (...) -> (..., H, W).

    From the distance to the outline, negative inside: half a pixel either side of it is blended.
    """
    half = np.asarray(size, np.float32)[..., None, None] * np.float32(0.5)
    pixels = np.arange(image_size, dtype=np.float32) + 0.5
    dx = pixels - np.asarray(x, np.float32)[..., None, None]
    dy = pixels[:, None] - np.asarray(y, np.float32)[..., None, None]
    return np.clip(0.5 - _distance(shape, dx, dy, half), 0, 1).astype(np.float32)


def _distance(shape: str, dx: Floats, dy: Floats, half: Floats) -> Floats:
    """Distance to the outline, exact along flat edges; a lower bound behind corners."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - half
    dx = np.abs(dx)
    if shape == "square":
        return np.maximum(dx - half, np.abs(dy) - half)
    if shape == "triangle":  # apex above, base below; a slope of 2 on either side
        slope = (2 * dx - dy - half) / np.float32(np.sqrt(5))
        return np.maximum(slope, dy - half)
    dy = np.abs(dy)  # cross: two bars, a third as thick as long
    return np.minimum(np.maximum(dx - half, dy - half / 3), np.maximum(dx - half / 3, dy - half))
