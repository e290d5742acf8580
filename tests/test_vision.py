"""What is seen in frames whose content is known: drawn by the training data's own code, or by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_export.evaluation.scene import BACKGROUNDS, COLOURS, IMAGE_SIZE, MOTIONS, SHAPES, Scene, coverage
from nova_export.evaluation.vision import MIN_AREA, Frames, Thing, _label, look, motion_of
from reference_model.demo.data import Track, draw

STEPS = np.arange(9)


def still(
    shape: str,
    colour: str = "red",
    size: float = 20,
    x: float = 30,
    y: float = 34,
    background: str | None = None,
) -> Frames:
    """One frame (1, H, W, 3) of one object."""
    track = Track(*(np.array([value], np.float32) for value in (x, y, size)))
    return draw(Scene(((colour, shape),), None, background), [track])


def blurred(frames: Frames, sigma: float) -> Frames:
    """Frames under a Gaussian of so many pixels, edges repeated."""
    reach = np.arange(-6, 7)
    kernel = np.exp(-(reach**2) / (2 * sigma**2))
    values = frames.astype(np.float64)
    for axis in (1, 2):
        padded = np.pad(values, [(6, 6) if each == axis else (0, 0) for each in range(4)], mode="edge")
        values = np.lib.stride_tricks.sliding_window_view(padded, 13, axis) @ (kernel / kernel.sum())
    return np.rint(values).astype(np.uint8)


def paint(mask: np.ndarray, colour: str = "red") -> Frames:
    """One frame with this colour where the mask (H, W) is set, on black."""
    frame = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    frame[0, mask] = COLOURS[colour]
    return frame


def grid() -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel, from the centre of the frame."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5 - IMAGE_SIZE / 2
    return x, y


# One object


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    colour=st.sampled_from(list(COLOURS)),
    background=st.sampled_from(list(BACKGROUNDS)),
    size=st.floats(12, 40),
    data=st.data(),
)
def test_sees_what_was_drawn(
    shape: str, colour: str, background: str, size: float, data: st.DataObject
) -> None:
    """Every outline and colour at all sizes and places; place within a pixel."""
    if COLOURS[colour] == BACKGROUNDS[background]:
        background = "black"
    x, y = (data.draw(st.floats(size / 2 + 1, IMAGE_SIZE - size / 2 - 1)) for _ in range(2))
    (view,) = look(still(shape, colour, size, x, y, background))
    (thing,) = view.things
    assert (view.background, thing.colour, thing.shape) == (background, colour, shape)
    assert abs(thing.x - x) <= 1 and abs(thing.y - y) <= 1.5  # a triangle's tip is too thin to be seen
    area = coverage(shape, *(np.array([v], np.float32) for v in (x, y, size))).sum()
    # Whole pixels, so half of one on either side of the outline.
    outline = {"circle": np.pi, "square": 4, "triangle": 1 + np.sqrt(5), "cross": 4}[shape] * size
    assert abs(thing.size**2 - area) <= outline / 2


def test_nothing_is_seen_on_an_empty_frame() -> None:
    (view,) = look(np.full((1, 64, 64, 3), 110, np.uint8))
    assert view.background == "gray" and view.things == ()


def test_mud_has_no_colour_and_no_background_name() -> None:
    frame = still("circle")
    frame[0, frame[0, ..., 0] > 100] = (135, 130, 35)  # between red and green
    assert look(frame)[0].things[0].colour is None
    assert look(np.full((1, 64, 64, 3), (90, 40, 40), np.uint8))[0].background is None


def test_two_halves_of_different_colours_are_of_none() -> None:
    frame = still("square", "red", 24, 32, 32)
    frame[0, :, :32][frame[0, :, :32, 0] > 100] = COLOURS["blue"]
    (thing,) = look(frame)[0].things
    assert (thing.colour, thing.shape) == (None, "square")


def test_no_outline_is_stretched_to_fit() -> None:
    """Shapes that are none of the four have no name."""
    x, y = grid()
    broken = {
        "oval": (x / 16) ** 2 + (y / 9) ** 2 < 1,
        "bar": (abs(x) < 15) & (abs(y) < 8),
        "diamond": abs(x) + abs(y) < 14,
        "triangle upside down": (abs(y) < 11) & (2 * abs(x) + y < 11),
        "half a circle": (x**2 + y**2 < 15**2) & (x > 0),
        "ring": (x**2 + y**2 < 15**2) & (x**2 + y**2 > 9**2),
        "pacman": (x**2 + y**2 < 15**2) & ~((abs(y) < x) & (x > 0)),
        "L": (abs(x) < 11) & (abs(y) < 11) & ~((x > -3) & (y < 3)),
        "diagonal cross": ((abs(x - y) < 5) | (abs(x + y) < 5)) & (abs(x) < 12) & (abs(y) < 12),
    }
    seen = {name: look(paint(mask))[0].things[0].shape for name, mask in broken.items()}
    assert seen == dict.fromkeys(broken)


@pytest.mark.parametrize("size", [12, 16, 20, 28, 40])
@pytest.mark.parametrize("shape", ["circle", "square"])
def test_circle_and_square_differ_through_a_blur(shape: str, size: float) -> None:
    for place in (30, 30.25, 30.5):
        frame = blurred(still(shape, "yellow", size, place, place, "gray"), 1.0)
        assert look(frame)[0].things[0].shape == shape


# Several


def test_objects_are_counted_the_largest_first() -> None:
    frame = paint(coverage("square", *np.array([[16], [16], [12]], np.float32))[0] > 0.5)
    frame = np.maximum(frame, still("circle", "blue", 20, 44, 44))
    things = look(frame)[0].things
    assert [(thing.colour, thing.shape) for thing in things] == [("blue", "circle"), ("red", "square")]


def test_specks_are_no_objects_but_what_is_larger_is() -> None:
    for area, count in ((MIN_AREA - 1, 0), (MIN_AREA, 1)):
        mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        mask[10:14, 10:14] = True  # 16 pixels
        mask[10, 10] = area == MIN_AREA
        assert len(look(paint(mask))[0].things) == count


def test_a_faint_object_beside_a_bright_one_is_seen() -> None:
    """Green on gray has a quarter of the contrast of white beside it, 3 pixels away and blurred."""
    scene = Scene((("white", "square"), ("green", "square")), None, "gray")
    tracks = [Track(*(np.array([value], np.float32) for value in (x, 32, 18))) for x in (20, 41)]
    things = look(blurred(draw(scene, tracks), 0.8))[0].things
    assert {(thing.colour, thing.shape) for thing in things} == {("white", "square"), ("green", "square")}


def test_labels_are_the_connected_parts() -> None:
    """A spiral is one part however it winds; corners do not connect; frames never do."""
    picture = [
        "#######.#",
        "......#..",
        "#####.#.#",
        "#...#.#.#",
        "#.#.#.#..",
        "#.###.#.#",
        "#.....#.#",
        "#######..",
    ]
    mask = np.array([[letter == "#" for letter in line] for line in picture])
    labels = _label(np.stack([mask, mask]))
    assert (labels[0][0, 0] == labels[0][4, 2]) and ((labels > 0) == mask).all()
    per_frame = [set(np.unique(frame)) - {0} for frame in labels]
    assert [len(names) for names in per_frame] == [4, 4] and not per_frame[0] & per_frame[1]


# Motion


def track(x: object = 0.0, y: object = 0.0, size: object = 0.0) -> list[Thing]:
    """Something at (30, 30), 18 large, with these changes over nine frames."""
    places = (np.broadcast_to(30 + np.asarray(x), 9), np.broadcast_to(30 + np.asarray(y), 9))
    return [
        Thing("red", "circle", float(a), float(b), float(c))
        for a, b, c in zip(*places, np.broadcast_to(18 + np.asarray(size), 9), strict=True)
    ]


CLEAR = {
    "moving right": track(x=2.2 * STEPS),
    "moving left": track(x=-2.2 * STEPS),
    "moving up": track(y=-2.2 * STEPS),
    "moving down": track(y=2.2 * STEPS),
    "growing": track(size=1.3 * STEPS),
    "shrinking": track(size=-0.8 * STEPS),
    "standing still": track(x=STEPS % 2, size=STEPS % 2),
}


@pytest.mark.parametrize("motion", MOTIONS)
def test_clear_motion(motion: str) -> None:
    assert motion_of(CLEAR[motion]) == motion


def test_motion_that_comes_to_rest_at_the_edge() -> None:
    assert motion_of(track(x=np.minimum(4.4 * STEPS, 17))) == "moving right"
    assert motion_of(track(size=np.minimum(2.5 * STEPS, 10))) == "growing"


@pytest.mark.parametrize(
    "things",
    [
        track(x=0.9 * STEPS),  # too slow to be a motion, too far to stand still
        track(x=2.2 * STEPS, y=2.2 * STEPS),  # askew
        track(x=np.where(STEPS == 5, 0, 2.2 * STEPS)),  # jumps back
        track(x=np.where(STEPS < 5, 0, 17.0)),  # jumps ahead
        track(x=2.2 * STEPS, size=1.3 * STEPS),  # two motions at once
        track(x=2.2 * np.minimum(STEPS, 8 - STEPS)),  # there and back
        track(size=0.5 * STEPS),  # hardly grows
        track(size=np.where(STEPS == 4, -4, 1.3 * STEPS)),  # grows unsteadily
        track(size=4.0 * (STEPS % 2)),  # pulsates in its place
        track()[:1],
        [],
    ],
)
def test_unclear_motion_has_no_name(things: list[Thing]) -> None:
    assert motion_of(things) is None


def test_a_growing_triangle_stays_in_its_place() -> None:
    """Its centroid sinks as it grows; its box does not move."""
    places = np.full(9, 32, np.float32)
    size = np.linspace(14, 34, 9, dtype=np.float32)
    views = look(draw(Scene((("red", "triangle"),), "growing"), [Track(places, places, size)]))
    assert motion_of([view.things[0] for view in views]) == "growing"
