"""ShapesEval: the judge against the training data, the list, the batches, the score, and the command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nova_export.errors import InputError
from nova_export.evaluation import shapes_eval
from nova_export.evaluation.metrics import psnr, wilson
from nova_export.evaluation.scene import BACKGROUNDS, Scene, held_out, parse
from nova_export.evaluation.shapes_eval import (
    BATCH,
    Comparison,
    Item,
    Rate,
    Sample,
    Score,
    check_source,
    judge,
    prompt_list,
    samples_of,
)
from nova_export.evaluation.vision import Frames
from nova_export.runtime import pipeline
from nova_export.runtime.generate import Step
from nova_export.runtime.pipeline import Output
from reference_model.demo.data import Clip, Track, draw, sample_clip, sample_image, sample_track
from tests.command_line import nova_export, only_error
from tests.test_vision import blurred

# The judge against the training data


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """What the model is trained on, and the combinations that it is not."""
    rng = np.random.default_rng(1)
    return [sample_clip(rng) for _ in range(300)] + [sample_clip(rng, each) for each in sorted(held_out())]


@pytest.fixture(scope="module")
def images() -> list[Clip]:
    rng = np.random.default_rng(2)
    return [sample_image(rng) for _ in range(100)]


def accuracy(pairs: list[tuple[Scene, Frames]]) -> float:
    return sum(all(judge(scene, frames).values()) for scene, frames in pairs) / len(pairs)


def test_the_truth_is_right(clips: list[Clip], images: list[Clip]) -> None:
    for each in (clips, images):
        assert accuracy([(clip.scene, clip.frames) for clip in each]) >= 0.99


def asked(scene: Scene) -> tuple[Any, ...]:
    """Scenes that look the same are the same, whatever their words."""
    return sorted(scene.figures), scene.motion, scene.background_colour


def test_other_prompts_are_wrong(clips: list[Clip], images: list[Clip]) -> None:
    """Against a prompt of another clip: by chance only. Attributes alone are right as often as they agree."""
    for each in (clips, images):
        others = each[37:] + each[:37]
        pairs = [
            (other.scene, clip.frames)
            for clip, other in zip(each, others, strict=True)
            if asked(clip.scene) != asked(other.scene)
        ]
        assert len(pairs) > 90 and accuracy(pairs) <= 0.05
    checks = [
        judge(other.scene, clip.frames) for clip, other in zip(clips, clips[37:] + clips[:37], strict=True)
    ]
    for name, chance in (("colour", 1 / 8), ("shape", 1 / 4), ("motion", 1 / 7)):
        assert sum(check[name] for check in checks) / len(checks) == pytest.approx(chance, abs=0.07), name


def test_one_wrong_word_is_the_one_that_fails(clips: list[Clip]) -> None:
    for clip in clips[:60]:
        ((colour, shape),) = clip.scene.figures
        wrong = {
            "colour": replace(clip.scene, figures=(("blue" if colour != "blue" else "red", shape),)),
            "shape": replace(clip.scene, figures=((colour, "circle" if shape != "circle" else "cross"),)),
            "motion": replace(
                clip.scene, motion="growing" if clip.scene.motion != "growing" else "moving up"
            ),
            "background": replace(
                clip.scene, background="gray" if clip.scene.background != "gray" else "black"
            ),
        }
        for name, scene in wrong.items():
            failed = [each for each, held in judge(scene, clip.frames).items() if not held]
            assert failed == [name], (clip.scene, scene)


def test_blur_and_noise_of_a_vae_change_nothing(clips: list[Clip], images: list[Clip]) -> None:
    rng = np.random.default_rng(3)
    pairs, quality = [], []
    for clip in [*clips[::3], *images]:
        rough = blurred(clip.frames, 0.8) + rng.normal(0, 6, clip.frames.shape)
        frames = np.clip(np.rint(rough), 0, 255).astype(np.uint8)
        pairs.append((clip.scene, frames))
        quality.append(psnr(frames, clip.frames).mean())
    assert 28 < np.mean(quality) < 32  # dB
    assert accuracy(pairs) >= 0.97


# What is broken fails, and for the right reason

MOVING = Scene((("red", "circle"),), "moving right")


def moving(scene: Scene = MOVING) -> Frames:
    steps = np.arange(9, dtype=np.float32)
    return draw(scene, [Track(14 + 4 * steps, 30 + 0 * steps, 18 + 0 * steps)])


def failures(scene: Scene, frames: Frames) -> set[str]:
    return {name for name, held in judge(scene, frames).items() if not held}


def test_a_second_object() -> None:
    frames = moving()
    frames[:, 52:60, 50:58] = (45, 80, 225)
    assert failures(MOVING, frames) == {"objects"}


def test_an_object_that_vanishes() -> None:
    """One frame of nine is forgiven, two are not."""
    frames = moving()
    frames[4] = 0
    assert failures(MOVING, frames) == set()
    frames[5] = 0
    assert failures(MOVING, frames) == {"objects", "colour", "shape", "motion"}
    frames = moving()
    frames[7:] = 0  # what is seen of it does move
    assert failures(MOVING, frames) == {"objects", "colour", "shape", "motion"}


def test_an_object_that_jumps_back() -> None:
    frames = moving()
    assert failures(MOVING, frames[[0, 1, 2, 3, 2, 1, 6, 7, 8]]) == {"motion"}
    assert failures(MOVING, frames[::-1]) == {"motion"}


def test_an_object_that_changes() -> None:
    """Colour and outline must hold to the end."""
    other = moving(replace(MOVING, figures=(("orange", "square"),)))
    frames = np.concatenate([moving()[:6], other[6:]])
    assert failures(MOVING, frames) == {"colour", "shape"}
    assert failures(MOVING, np.concatenate([moving()[:8], other[8:]])) == set()


def test_a_broken_outline() -> None:
    frames = moving()
    frames[:, 30:] = 0  # the lower half
    assert failures(MOVING, frames) == {"shape"}


def test_a_background_that_was_not_asked_for() -> None:
    gray = moving(replace(MOVING, background="gray"))
    assert failures(MOVING, gray) == {"background"}  # none named is black
    assert failures(replace(MOVING, background="black"), moving()) == set()


TWO = parse("a red circle and a blue square")


def two(scene: Scene = TWO) -> Frames:
    tracks = [Track(*(np.array([value], np.float32) for value in (x, 32, 20))) for x in (16, 48)]
    return draw(scene, tracks)


def test_two_objects() -> None:
    """Wherever each of them is; but each colour on its own shape."""
    assert failures(TWO, two()) == failures(TWO, two()[:, :, ::-1]) == set()
    assert failures(TWO, two(parse("a red square and a blue circle"))) == {"pairing"}
    assert failures(TWO, two(parse("a red circle and a red square"))) == {"colour", "pairing"}
    assert failures(parse("a red circle"), two()) >= {"objects"}
    assert "motion" not in judge(TWO, two())


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_is_nothing(seed: int) -> None:
    frames = np.random.default_rng(seed).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8)
    assert failures(MOVING, frames) >= {"background", "shape", "motion"}


# The list


def test_the_list() -> None:
    items = prompt_list()
    assert Counter(item.group for item in items) == {"seen": 202, "held-out": 88, "images": 48}
    videos = Counter(item.scene.combination for item in items if item.scene.motion)
    assert len(videos) == 224
    assert {each: count for each, count in videos.items() if count > 1} == dict.fromkeys(held_out(), 4)
    assert all((item.group == "held-out") == (item.scene.combination in held_out()) for item in items)
    stills = [item.scene for item in items if item.group == "images"]
    assert Counter(len(scene.figures) for scene in stills) == {1: 24, 2: 24}
    assert all(len({colour for colour, _ in scene.figures}) == len(scene.figures) for scene in stills)
    assert len({scene.prompt() for scene in stills}) == 48
    for item in items:
        assert parse(item.prompt) == item.scene  # so all that is asked for is visible
    assert prompt_list() == items
    assert items[0].prompt == "a red circle moving right", "the list is fixed: scores compare over releases"


def test_the_first_part_of_the_list_is_a_fair_sample() -> None:
    items = prompt_list()
    for count in (40, 100, 200):
        part = items[:count]
        for kind in (
            lambda item: item.group,
            lambda item: item.scene.motion,
            lambda item: item.scene.background,
            lambda item: item.scene.figures[0][0],
        ):
            whole, found = Counter(map(kind, items)), Counter(map(kind, part))
            for name, number in whole.items():
                assert abs(found[name] - number * count / len(items)) <= 6, (count, name)


def test_backgrounds_are_varied() -> None:
    found = Counter(item.scene.background for item in prompt_list())
    assert set(found) == {None, *BACKGROUNDS} and min(found.values()) > 60


# The run


class TruthSource:
    """Makes what is asked for, from the training data's code; `wrong` prompts get another colour."""

    config: Any = SimpleNamespace(
        image_size=(64, 64), is_class_conditional=False, is_video=True, video_length=3
    )

    def __init__(self, wrong: Callable[[str], bool] = lambda prompt: False) -> None:
        self.wrong, self.calls = wrong, []

    def __call__(self, prompt: Any, *, callback: Any = None, **arguments: Any) -> Output:
        self.calls.append((prompt, arguments))
        rng = np.random.default_rng(arguments["seed"])
        if callback is not None:
            callback(Step(0, 1, 0, 2, lambda: np.zeros(1, np.float32)))
        made = [self.frames(text, arguments["max_latent_length"], rng) for text in prompt]
        return Output(np.stack(made), np.zeros((len(made), 1, 1, 1, 1), np.float32), arguments["seed"])

    def frames(self, prompt: str, length: int, rng: np.random.Generator) -> Frames:
        scene = parse(prompt)
        if self.wrong(prompt):
            others = ["green" if colour != "green" else "red" for colour, _ in scene.figures]
            figures = [(colour, shape) for colour, (_, shape) in zip(others, scene.figures, strict=True)]
            scene = replace(scene, figures=tuple(figures))
        assert (length == 1) == (scene.motion is None)
        if len(scene.figures) == 2:
            return two(scene)
        track = sample_track(rng, scene.motion or "standing still")
        return draw(scene, [track])[: 9 if scene.motion else 1]


def test_every_item_is_asked_for_once_in_fixed_batches() -> None:
    source, items, done = TruthSource(), prompt_list(), []
    made = samples_of(source, items, seed=100, report=done.append, guidance_scale=3.0)
    assert [sample.item for sample in made] == items and not any(sample.failed for sample in made)
    assert len(source.calls) == 19 + 3
    for prompts, arguments in source.calls:
        assert len(prompts) <= BATCH and arguments["guidance_scale"] == 3.0
        still = {parse(prompt).motion is None for prompt in prompts}
        assert still == {arguments["max_latent_length"] == 1} and arguments["max_latent_length"] in (1, 3)
        assert items[arguments["seed"] - 100].prompt == prompts[0]
    assert len({arguments["seed"] for _, arguments in source.calls}) == 22
    assert done == sorted(done) and done[0] == BATCH / 2 and done[-1] == len(items)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_size": (64, 96)}, "96x64 pixels, not 64x64"),
        ({"is_class_conditional": True}, "class-conditional"),
        ({"is_video": False}, "images only"),
    ],
)
def test_other_checkpoints_are_refused(change: dict[str, Any], words: str) -> None:
    config: Any = SimpleNamespace(**{**vars(TruthSource.config), **change})
    with pytest.raises(InputError, match=f"the bundle .*{words}.*--prompts FILE --out DIR"):
        check_source(config, "the bundle")


# The score


def sample(group: str, **checks: bool) -> Sample:
    return Sample(Item(MOVING, group), moving(), checks)


def test_rates() -> None:
    made = [
        sample("seen", colour=True, motion=True),
        sample("seen", colour=True, motion=False),
        sample("seen", colour=False, motion=True),
        sample("images", colour=False),
    ]
    rates = Score.of(made).rates
    assert rates["seen"] == {"colour": Rate(2, 3), "motion": Rate(2, 3), "all": Rate(1, 3)}
    assert rates["images"] == {"colour": Rate(0, 1), "all": Rate(0, 1)}
    assert rates["total"]["all"] == Rate(1, 4) and rates["total"]["motion"] == Rate(2, 3)
    assert list(rates) == ["seen", "images", "total"]
    told = Score.of(made).to_dict()["seen"]["colour"]
    assert told == {"passed": 2, "total": 3, "share": 2 / 3, "interval_95": list(wilson(2, 3))}
    assert "66.7 % (21-94)" in Score.of(made).table()


def test_comparison() -> None:
    ours = [sample("seen", colour=True), sample("seen", colour=True)]
    changed = moving()
    changed[3] += 20  # wraps nowhere: 225 + 20
    theirs = [sample("seen", colour=False), replace(ours[1], frames=changed)]
    told = Comparison.of(ours, theirs).to_dict()
    assert told["differences"]["seen"] == {"colour": -0.5, "all": -0.5}
    assert (told["samples"], told["identical"]) == (2, 1)
    decibel = 20 * np.log10(255 / 20)
    assert told["psnr"]["mean"] == told["psnr"]["min"] == pytest.approx(decibel)
    assert [value is None for value in told["psnr"]["frames"]] == [index != 3 for index in range(9)]
    assert told["ssim"]["frames"][0] == pytest.approx(1) and told["ssim"]["min"] < 0.9
    json.dumps(told, allow_nan=False)
    with pytest.raises(InputError, match="only the same size can be compared"):
        Comparison.of(ours, [replace(each, frames=each.frames[:5]) for each in theirs])


# The command


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, TruthSource]:
    """Bundles by the name of their folder; "bad" makes every square green, or red."""
    made = {"good": TruthSource(), "bad": TruthSource(lambda prompt: "square" in prompt)}
    for name in made:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    monkeypatch.setattr(pipeline, "load", lambda path, **_: made[Path(path).name])
    return made


def test_eval_prints_a_table(sources: dict[str, TruthSource], tmp_path: Path) -> None:
    result = nova_export("eval", tmp_path / "bad", "--count", "40", "--seed", "7", "-q")
    assert (result.code, result.err) == (0, "")
    assert "seed 7" in result.out and "held-out" in result.out
    lines = {line.split("|")[1].strip(): line for line in result.out.splitlines() if line.startswith("|")}
    assert "100.0 %" in lines["shape"] and lines["colour"].count("100.0 %") < 4
    assert sources["bad"].calls[0][1]["seed"] >= 7


def test_eval_as_json_against_another(sources: dict[str, TruthSource], tmp_path: Path) -> None:
    result = nova_export(
        "eval", tmp_path / "good", "--against", tmp_path / "bad", "--count", "60", "--json", "-q"
    )
    assert (result.code, result.err) == (0, "")
    told = json.loads(result.out)
    assert told["prompts"] == 60 and told["bundle"]["score"]["total"]["all"]["share"] == 1
    squares = [each for each in told["against"]["samples"] if "square" in each["prompt"]]
    assert squares and all(each["failed"] for each in squares)
    worse = told["comparison"]["differences"]["total"]["all"]
    assert worse == pytest.approx(-len(squares) / 60)
    assert told["comparison"]["identical"] == 60 - len(squares)  # same prompts, same noise
    assert sources["good"].calls == sources["bad"].calls


def test_eval_against_itself_says_so(sources: dict[str, TruthSource], tmp_path: Path) -> None:
    result = nova_export("eval", tmp_path / "good", "--against", tmp_path / "good", "--count", "20", "-q")
    assert result.code == 0 and "20 of 20 are the same bit for bit" in result.out


def test_the_contact_sheet(sources: dict[str, TruthSource], tmp_path: Path) -> None:
    """Failures first, marked in red, at most forty rows."""
    from nova_export.evaluation.contact_sheet import MAX_ROWS, RED

    sheet = tmp_path / "sheet.png"
    result = nova_export("eval", tmp_path / "bad", "--count", "60", "--sheet", sheet)
    assert result.code == 0 and str(sheet) in result.err
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened)
    rows = np.array_split(pixels[30:-12], MAX_ROWS)
    red = [bool((row[:, :300] == RED).all(-1).any()) for row in rows]
    failed = sum("square" in item.prompt for item in prompt_list()[:60])
    assert 0 < failed < MAX_ROWS and sum(red) == failed and all(red[:failed])


def test_eval_refuses(
    sources: dict[str, TruthSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tmp_path / "good"
    only_error(nova_export("eval", good, "--against", tmp_path), 2, "manifest.json", "model_index.json")
    only_error(nova_export("eval", good, "--prompts", "a.txt"), 2, "--prompts FILE and --out DIR")
    only_error(nova_export("eval", good, "-o", tmp_path), 2, "--prompts FILE and --out DIR")
    only_error(nova_export("eval", good, "--samples", "2"), 2, "--samples needs --prompts")
    only_error(
        nova_export("eval", good, "--prompts", "a.txt", "--out", tmp_path, "--sheet", "a.png"), 2, "--sheet"
    )
    only_error(nova_export("eval", good, "--sheet", tmp_path / "a.mp4"), 2, "--sheet", ".png", "a.mp4")
    only_error(nova_export("eval", good, "--sheet", tmp_path / "no" / "a.png"), 6, "does not exist")
    assert not sources["good"].calls
    wide: Any = SimpleNamespace(**{**vars(TruthSource.config), "image_size": (64, 96)})
    monkeypatch.setattr(sources["bad"], "config", wide, raising=False)
    only_error(nova_export("eval", good, "--against", tmp_path / "bad"), 5, "bad makes 96x64", "--prompts")
    assert not sources["good"].calls, "refused before anything is made"


def test_a_real_bundle_of_another_kind_is_refused(golden_bundle: Callable[[str], Path]) -> None:
    only_error(nova_export("eval", golden_bundle("t2v")), 5, "96x64 pixels, not 64x64", "demo checkpoint")


def test_batches_hold_for_a_part_of_the_list() -> None:
    """The places that a call draws from do not depend on what comes after it."""
    whole = [places for places in shapes_eval._batches(prompt_list()) if max(places) < 100]
    part = list(shapes_eval._batches(prompt_list()[:100]))
    assert len(whole) > 4 and all(places in part for places in whole)
