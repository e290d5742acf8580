"""The demo's prompts and its training data."""

from __future__ import annotations

import numpy as np
import pytest

from nova_export.errors import InputError
from nova_export.evaluation.scene import (
    COLOURS,
    IMAGE_SIZE,
    MOTIONS,
    NUM_FRAMES,
    SHAPES,
    Scene,
    combinations,
    coverage,
    held_out,
    parse,
)
from reference_model.demo.data import draw, flow, sample_clip, sample_image, sample_track
from reference_model.demo.tokens import WORDS, merges
from reference_model.small_tokenizer import write_tokenizer
from reference_model.tokenizer import read_tokenizer


def test_prompts_are_read_as_they_are_written() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        for clip in (sample_clip(rng), sample_image(rng)):
            assert parse(clip.scene.prompt()) == clip.scene


def test_prompts_may_be_written_freely() -> None:
    scene = Scene((("orange", "cross"),), "moving up", "gray")
    assert scene.prompt() == "an orange cross moving up on a gray background"
    assert parse("A orange  cross moving up on a gray background.") == scene


@pytest.mark.parametrize(
    "prompt", ["a cat", "a red circle moving", "a white circle on a white background", ""]
)
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="prompt"):
        parse(prompt)


def test_one_combination_in_ten_is_held_out_evenly() -> None:
    held = held_out()
    assert len(held) == 22 and len(combinations()) == 224
    for position, values in enumerate((COLOURS, SHAPES, MOTIONS)):
        counts = [sum(combination[position] == value for combination in held) for value in values]
        assert max(counts) - min(counts) <= 1, values


def test_no_clip_is_of_a_held_out_combination() -> None:
    rng, held = np.random.default_rng(2), held_out()
    seen = {sample_clip(rng).scene.combination for _ in range(3000)}
    assert not seen & held
    assert len(seen) == 224 - 22


def test_the_same_seed_gives_the_same_clips() -> None:
    first, second = (sample_clip(np.random.default_rng(3)) for _ in range(2))
    assert first.scene == second.scene and np.array_equal(first.frames, second.frames)


@pytest.mark.parametrize("motion", MOTIONS)
def test_shapes_move_enough_and_stay_inside(motion: str) -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        track = sample_track(rng, motion)
        for centre in (track.x, track.y):
            assert (centre - track.size / 2 >= 0.9).all()
            assert (centre + track.size / 2 <= IMAGE_SIZE - 0.9).all()
        travel = np.hypot(track.x[-1] - track.x[0], track.y[-1] - track.y[0])
        growth = track.size[-1] / track.size[0]
        if motion.startswith("moving"):
            assert travel >= IMAGE_SIZE / 4 and growth == 1
        elif motion == "standing still":
            assert travel == 0 and growth == 1
        else:
            assert travel == 0 and (growth if motion == "growing" else 1 / growth) >= 1.5


def test_flow_of_a_moving_shape_is_its_speed() -> None:
    rng = np.random.default_rng(5)
    track = sample_track(rng, "moving down")
    speed = (track.y[-1] - track.y[0]) / (NUM_FRAMES - 1)
    assert flow("cross", track) == pytest.approx(speed * 100 / IMAGE_SIZE, rel=1e-4)
    assert flow("cross", sample_track(rng, "standing still")) == 0


def test_flow_of_a_growing_square_is_its_mean_distance_times_its_growth() -> None:
    track = sample_track(np.random.default_rng(6), "growing")
    # Mean distance from the centre of a square of side 1: (sqrt 2 + asinh 1) / 6.
    wanted = (np.diff(track.size) * (np.sqrt(2) + np.arcsinh(1)) / 6).mean() * 100 / IMAGE_SIZE
    assert flow("square", track) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(
    ("shape", "share"), [("circle", np.pi / 4), ("square", 1), ("triangle", 1 / 2), ("cross", 5 / 9)]
)
def test_shapes_have_their_area(shape: str, share: float) -> None:
    area = coverage(shape, np.float32(31.3), np.float32(30.8), np.float32(30)).sum()
    assert area == pytest.approx(share * 900, rel=0.02)


def test_the_triangle_points_up_and_the_cross_has_arms_of_a_third() -> None:
    triangle, cross = (
        coverage(s, np.float32(32), np.float32(32), np.float32(30)) for s in ("triangle", "cross")
    )
    widths = triangle.sum(1)[18:46]
    assert (np.diff(widths) > 0.8).all()  # wider with every row downwards
    assert cross.sum(1)[18] == pytest.approx(10) and cross.sum(1)[32] == pytest.approx(30)
    assert np.array_equal(cross, cross.T)


def test_frames_are_flat_but_for_the_outline() -> None:
    scene = Scene((("red", "square"),), "standing still", "gray")
    frames = draw(scene, [sample_track(np.random.default_rng(7), "standing still")])
    colours, counts = np.unique(frames.reshape(-1, 3), axis=0, return_counts=True)
    flat = {
        tuple(int(v) for v in colour) for colour, count in zip(colours, counts, strict=True) if count > 1000
    }
    assert flat == {(110, 110, 110), COLOURS["red"]}


def test_every_word_of_the_grammar_is_one_token(tmp_path) -> None:
    write_tokenizer(tmp_path / "tokenizer", merges())
    tokenizer = read_tokenizer(tmp_path / "tokenizer")
    for word in WORDS:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False).ids) == 1, word
    prompt = "an orange triangle and a magenta cross on a white background"
    encoded = tokenizer.encode(prompt, add_special_tokens=False)
    assert len(encoded.ids) == 11
    assert tokenizer.decode(encoded.ids) == prompt
