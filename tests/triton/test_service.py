"""engines.triton.service over a pipeline of fakes: who is answered what, and what one does to others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from engines.triton.service import Limits, Service, timed
from engines.triton.tensors import read
from nova_export.errors import InputError
from tests.runtime.test_pipeline import VIDEO, Fixture

SMALL = {"max_latent_length": 2, "num_inference_steps": 2, "num_diffusion_steps": 2}
FRAMES = 5  # of 2 latents


def tensors(**values: Any) -> dict[str, np.ndarray]:
    """As a client would send them, one row each."""
    made: dict[str, np.ndarray] = {}
    for name, value in values.items():
        if isinstance(value, str):
            made[name] = np.array([[value.encode()]], np.object_)
        elif isinstance(value, np.ndarray):
            made[name] = value
        else:
            kinds: dict[type, Any] = {bool: bool, int: np.int64, float: np.float32}
            made[name] = np.array([[value]], kinds[type(value)])
    return made


class Caller:
    """A client that keeps what it gets, and leaves after so many frames."""

    def __init__(self, leaves_after: int | None = None, broken: bool = False, **values: Any) -> None:
        self.values = {**SMALL, **values}
        self.leaves_after, self.broken = leaves_after, broken
        self.got: list[Mapping[str, np.ndarray]] = []
        self.ends: list[str | None] = []

    def tensors(self) -> dict[str, np.ndarray]:
        return tensors(**self.values)

    def send(self, answer: Mapping[str, np.ndarray]) -> None:
        assert not self.ends, "an answer after the last"
        if self.broken:
            raise RuntimeError("the line is dead")
        self.got.append(answer)

    def end(self, error: str | None = None) -> None:
        self.ends.append(error)

    def is_cancelled(self) -> bool:
        return self.leaves_after is not None and len(self.got) >= self.leaves_after


class Meter:
    def __init__(self) -> None:
        self.results: list[str] = []
        self.made = 0
        self.loops: list[int] = []
        self.stages: dict[str, int] = {}

    def stage(self, name: str, seconds: float) -> None:
        assert seconds >= 0
        self.stages[name] = self.stages.get(name, 0) + 1

    def ended(self, result: str) -> None:
        self.results.append(result)

    def frames(self, count: int) -> None:
        self.made += count

    def running(self, requests: int) -> None:
        self.loops.append(requests)


class Served:
    """What came of some callers."""

    def __init__(
        self,
        *callers: Caller,
        samples: int = 8,
        latent_frames: int = 9,
        prepare: Callable[[Fixture], None] = id,
    ) -> None:
        self.made, self.meter = Fixture(), Meter()
        prepare(self.made)
        self.made.pipe._stage = timed(self.made.pipe._stage, self.meter)
        service = Service(self.made.pipe, Limits(samples, latent_frames), self.meter)
        service.serve(callers)
        assert all(len(caller.ends) == 1 for caller in callers)

    @property
    def loops(self) -> list[int]:
        """How many requests went together, loop by loop."""
        return [count for count in self.meter.loops if count]


@pytest.fixture(autouse=True)
def ask_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes are done in less time than passes between two questions."""
    monkeypatch.setattr("engines.triton.service.POLL_SECONDS", 0.0)
    monkeypatch.setattr("engines.triton.service.PROGRESS_SECONDS", 0.0)


def test_frames_in_order_and_the_seed_with_the_first() -> None:
    caller = Caller(prompt="ab", seed=-3)
    served = Served(caller)
    assert [int(answer["frame_index"][0, 0]) for answer in caller.got] == list(range(FRAMES))
    assert all(answer["frame"].shape == (1, 2, 2, 3) for answer in caller.got)
    assert caller.got[0]["seed"].tolist() == [[-3]] and "seed" not in caller.got[1]
    assert caller.ends == [None] and served.meter.results == ["done"] and served.meter.made == FRAMES
    assert served.meter.stages["temporal_encoder"] == 2


def test_requests_of_one_form_share_a_loop() -> None:
    callers = [Caller(prompt=prompt, seed=1) for prompt in "abc"]
    other = Caller(prompt="d", seed=1, num_diffusion_steps=3)
    assert Served(callers[0], other, *callers[1:]).loops == [3, 1]
    assert all(len(caller.got) == FRAMES for caller in [*callers, other])


def test_a_loop_has_no_more_samples_than_it_may() -> None:
    callers = [Caller(prompt="a", num_images_per_prompt=2) for _ in range(5)]
    assert Served(*callers, samples=4).loops == [2, 2, 1]
    assert all(answer["frame"].shape[0] == 2 for caller in callers for answer in caller.got)


def test_progress_only_for_those_who_ask() -> None:
    plain, curious = Caller(prompt="a"), Caller(prompt="a", report_progress=True)
    Served(plain, curious)
    told = [float(answer["progress"][0, 0]) for answer in curious.got if "progress" in answer]
    assert told == sorted(told) and told[-1] == 1.0 and len(told) == 4
    assert not any("progress" in answer for answer in plain.got)


@pytest.mark.parametrize(
    "bad",
    [
        Caller(prompt="a", num_inference_steps=0),
        Caller(prompt="a", max_latent_length=10),
        Caller(prompt="a", num_images_per_prompt=9),
        Caller(prompt=np.array([[b"\xff"]], np.object_)),
        Caller(prompt="a", image=np.zeros((1, 2, 2, 4), np.uint8)),
    ],
    ids=["steps", "length", "samples", "text", "image"],
)
def test_a_bad_request_ends_alone(bad: Caller) -> None:
    good = [Caller(prompt="a"), Caller(prompt="b")]
    bad.ends, bad.got = [], []
    served = Served(good[0], bad, good[1])
    assert bad.ends[0] and "internal error" not in bad.ends[0] and bad.got == []
    assert served.loops == [2] and [len(caller.got) for caller in good] == [FRAMES, FRAMES]
    assert sorted(served.meter.results) == ["done", "done", "failed"]


def test_one_that_leaves_does_not_stop_the_others() -> None:
    leaving, staying = Caller(prompt="a", leaves_after=2), Caller(prompt="b")
    served = Served(leaving, staying)
    assert len(leaving.got) == 2 and len(staying.got) == FRAMES
    assert served.meter.results == ["cancelled", "done"]


def test_the_loop_ends_when_all_have_left() -> None:
    callers = [Caller(prompt=prompt, leaves_after=0, report_progress=True) for prompt in "ab"]
    served = Served(*callers)
    assert served.made.count("temporal_encoder") == 0 and served.meter.results == ["cancelled"] * 2

    late = Caller(prompt="a", leaves_after=1, report_progress=True, max_latent_length=9)
    assert Served(late).made.count("temporal_encoder") == 1


def test_answers_that_cannot_be_delivered_harm_nobody_else() -> None:
    broken, good = Caller(prompt="a", broken=True), Caller(prompt="b")
    Served(broken, good)
    assert "could not be delivered: the line is dead" in str(broken.ends[0]) and len(good.got) == FRAMES


def test_a_stage_that_fails_ends_its_loop_alone() -> None:
    """The requests of that loop are told why; those of the next are served."""

    def fail_once(made: Fixture) -> None:
        head = made.runners["diffusion_head"]
        run, failures = head.run, [RuntimeError("no memory")]

        def failing(inputs: dict[str, Any]) -> dict[str, Any]:
            if failures:
                raise failures.pop()
            return run(inputs)

        head.run = failing  # type: ignore[method-assign]

    lost = [Caller(prompt="a"), Caller(prompt="b")]
    good = Caller(prompt="a", num_diffusion_steps=3)
    served = Served(*lost, good, prepare=fail_once)
    assert all("RuntimeError: no memory" in str(caller.ends[0]) for caller in lost)
    assert len(good.got) == FRAMES and served.meter.loops[-1] == 0


# Tensors


def test_a_request_from_tensors() -> None:
    image = np.zeros((1, 4, 6, 3), np.uint8)
    asked = read(tensors(prompt="ä", seed=4, guidance_scale=2.5, image=image, report_progress=True), False)
    assert asked.report_progress and asked.request.prompt == ["ä"]
    assert (asked.request.seed, asked.request.guidance_scale) == (4, 2.5)
    assert asked.request.image.shape == (4, 6, 3) and asked.request.num_inference_steps == 64
    asked.request.plan(VIDEO)


def test_several_prompts() -> None:
    prompts = np.array([[b"a"], [b"b"]], np.object_)
    assert read({"prompt": prompts, "seed": np.array([[1], [1]])}, False).request.prompt == ["a", "b"]
    with pytest.raises(InputError, match="'seed' differs between prompts"):
        read({"prompt": prompts, "seed": np.array([[1], [2]])}, False)
    assert read({"prompt": np.array([[3], [999]])}, class_conditional=True).request.prompt == [3, 999]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "'prompt' is missing"),
        (tensors(prompt="a", sed=1), "no input 'sed'; there are prompt, negative_prompt"),
        (tensors(prompt=np.zeros((1, 1), np.float32)), "'prompt' is float32; it must be string"),
        (tensors(prompt="a", seed=np.zeros((1, 2), np.int64)), r"'seed' has shape \(1, 2\).* \(1, 1\)"),
        (tensors(prompt="a", seed=np.zeros((2, 1), np.int64)), r"'seed' has shape \(2, 1\)"),
        (tensors(prompt="a", image=np.zeros((1, 0, 2, 3), np.uint8)), "and hold something"),
        (tensors(prompt="a" * 65_537), "'prompt' has 65537 bytes"),
    ],
)
def test_tensors_that_are_wrong(given: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(given, class_conditional=False)
