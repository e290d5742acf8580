"""The pipeline over runners that do no work: what it runs, in which order, and what it frees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nova_export.config import NovaConfig
from nova_export.errors import Cancelled, InputError, StageError, UsageError
from nova_export.runtime import stage_runners
from nova_export.runtime.generate import Step
from nova_export.runtime.noise import TorchGenerator
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.request import NUMBERS, Request
from nova_export.runtime.stage_runners import StageRunners
from nova_export.stages import stages
from tests.conftest import GOLDEN
from tests.runtime.fakes import FakeRunner, Record
from tests.strategies import parts

VIDEO = NovaConfig.from_checkpoint(GOLDEN / "t2v" / "checkpoint")
SHORT = {"num_inference_steps": 2, "num_diffusion_steps": 2, "seed": 0}
MEAN, STD = 5.0, 0.25  # of the fake image's latents


class Runner(FakeRunner):
    """Also those stages that only the pipeline calls."""

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not self.stage.name.startswith("vae_"):  # whose outputs have sizes that the inputs do not have
            return super().run(inputs)
        self.stage.bind(inputs)
        self.record.calls.append((self.stage.name, dict(inputs)))
        outputs: dict[str, Any] = getattr(self, self.stage.name)(inputs)
        return outputs

    def vae_decoder(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # One frame for the first latent, four for each other; every pixel is the latent's first value.
        values = inputs["latents"][0, 0, :, 0, 0]
        frames = np.concatenate([values[:1], np.repeat(values[1:], 4)])
        pixels = np.broadcast_to(
            ((frames + 0.5) / 127.5 - 1)[None, None, :, None, None], (1, 3, len(frames), 2, 2)
        )
        return {"pixels": pixels.astype(np.float32)}

    def text_encoder(self, inputs: dict[str, Any]) -> dict[str, Any]:
        shape = self.stage.shapes(self.stage.bind(inputs), outputs=True)["text_states"]
        return {"text_states": np.broadcast_to(inputs["token_ids"][..., None], shape).astype(np.float32)}

    def condition(self, inputs: dict[str, Any]) -> dict[str, Any]:
        shape = self.stage.shapes(self.stage.bind(inputs), outputs=True)["condition"]
        return {"condition": np.zeros(shape, np.float32)}

    def vae_encoder(self, inputs: dict[str, Any]) -> dict[str, Any]:
        shape = (1, VIDEO.latent_channels, *VIDEO.latent_size)
        return {
            "latents_mean": np.full(shape, MEAN, np.float32),
            "latents_std": np.full(shape, STD, np.float32),
        }


class Tokenizer:
    """A token a letter: a is 1, b is 2."""

    def encode(self, prompt: str) -> tuple[list[int], str | None]:
        return [ord(letter) - 96 for letter in prompt[:16]], "cut" if len(prompt) > 16 else None


class Fixture:
    """A pipeline over fakes, and what they recorded."""

    def __init__(self, config: NovaConfig = VIDEO) -> None:
        self.record = Record()
        self.runners = {name: Runner(stage, self.record) for name, stage in stages(config).items()}
        self.pipe = Pipeline(config, self.runners.__getitem__, Tokenizer())  # type: ignore[arg-type]

    def count(self, stage: str) -> int:
        return len(self.record.of(stage))


# Frames and tiles


@pytest.mark.parametrize("count", range(1, 12))
def test_every_latent_frame_is_decoded(count: int) -> None:
    """1 + (L - 1) * 4 frames, in order, none twice: also where the last tile is short, or of one latent."""
    latents = np.zeros((2, 4, count, *VIDEO.latent_size), np.float32)
    latents += 10 * np.arange(count, dtype=np.float32)[:, None, None]
    frames = Fixture().pipe.decode(latents)
    assert frames.shape == (2, 1 + (count - 1) * 4, 2, 2, 3) and frames.dtype == np.uint8
    expected = [10 * ((frame + 3) // 4) for frame in range(frames.shape[1])]
    assert frames[0, :, 0, 0, 0].tolist() == expected == frames[1, :, 0, 0, 2].tolist()


@pytest.mark.parametrize("count", [6, 11])
def test_a_last_latent_alone_loses_no_frames(count: int) -> None:
    """Tiles that share no latent: one of a single latent would lose its frame to `drop`."""
    vae = {"_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [32] * 4}
    latents = np.zeros((1, 4, count, *VIDEO.latent_size), np.float32)
    latents += 10 * np.arange(count, dtype=np.float32)[:, None, None]
    frames = Fixture(replace(VIDEO, vae=vae)).pipe.decode(latents)[0, :, 0, 0, 0]
    assert frames[-4:].tolist() == [10 * (count - 1)] * 4


@pytest.mark.parametrize("shape", [(1, 4, 3, 8), (1, 5, 3, 8, 12), (1, 4, 3, 12, 8)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(B, 4, L, 8, 12\)"):
        Fixture().pipe.decode(np.zeros(shape, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_no_numbers(value: float) -> None:
    """Of guidance beyond all measure, or of an overflow in half precision: no grey frames without a word."""
    latents = np.zeros((1, 4, 3, 8, 12), np.float32)
    latents[0, 1, 2, 3, 4] = value
    with pytest.raises(StageError, match="latent frames 1 to 3 hold NaN or infinity"):
        Fixture().pipe.decode(latents)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9, 10])
def test_stream_gives_the_frames_of_a_call(count: int) -> None:
    prompts = ["a", "b"]
    called = Fixture().pipe(prompts, max_latent_length=count, **SHORT).frames
    streamed = list(Fixture().pipe.stream(prompts, max_latent_length=count, **SHORT))
    assert all(frame.shape == called[:, 0].shape for frame in streamed)
    np.testing.assert_array_equal(np.stack(streamed, axis=1), called)


def test_stream_yields_a_tile_before_later_latents_are_made() -> None:
    """5 latents make the first tile: at its frames neither the sixth latent nor another tile was begun."""
    made = Fixture()
    frames = made.pipe.stream("a", max_latent_length=9, **SHORT)
    assert made.record.calls == []  # nothing runs before the first frame is asked for
    for number in range(17):
        next(frames)
        assert (made.count("temporal_encoder"), made.count("vae_decoder")) == (5, 1), number
    next(frames)
    assert (made.count("temporal_encoder"), made.count("vae_decoder")) == (9, 2)
    assert len(list(frames)) == 33 - 18


# Cancelling


def test_callback_that_returns_false_cancels() -> None:
    made, seen = Fixture(), []

    def callback(step: Step) -> bool:
        seen.append((step.frame, step.step))
        return len(seen) < 3

    with pytest.raises(Cancelled, match="frame 2 of 3, step 1") as caught:
        made.pipe("a", max_latent_length=3, callback=callback, **SHORT)
    assert caught.value.exit_code == 130
    assert seen == [(0, 0), (0, 1), (1, 0)]
    assert made.count("diffusion_head") == 3 and made.count("vae_decoder") == 0


@pytest.mark.parametrize("answer", [None, True, 0, 1])
def test_any_other_answer_goes_on(answer: object) -> None:
    assert Fixture().pipe("a", callback=lambda _: answer, **SHORT).frames.shape[1] == 1


def test_stream_is_cancelled_too() -> None:
    frames = Fixture().pipe.stream("a", max_latent_length=9, callback=lambda step: step.frame < 7, **SHORT)
    with pytest.raises(Cancelled):
        for number, _ in enumerate(frames, 1):
            assert number <= 17


# Text


def test_each_text_is_encoded_once_at_its_own_length() -> None:
    made = Fixture()
    made.pipe(["ab", "abc", "ab"], negative_prompt="abc", num_images_per_prompt=2, **SHORT)
    encoded = [inputs["token_ids"].tolist() for inputs in made.record.of("text_encoder")]
    assert encoded == [[[1, 2]], [[1, 2, 3]]]


def test_the_empty_prompt_is_not_encoded() -> None:
    made = Fixture()
    made.pipe("", **SHORT)
    assert made.count("text_encoder") == 0
    assert made.record.of("condition")[0]["text_lengths"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("guidance", "lengths"),
    [
        ({"guidance_scale": 1}, [1, 1, 2, 2]),
        ({}, [1, 1, 2, 2, 3, 3, 3, 3]),
        ({"image_guidance_scale": 2}, [1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]),
        ({"spatiotemporal_guidance_scale": 2}, [1, 1, 2, 2, 3, 3, 3, 3, 1, 1, 2, 2]),
    ],
)
def test_rows_are_passes_of_prompts_of_images(guidance: dict[str, float], lengths: list[int]) -> None:
    """Every pass holds each prompt `num_images_per_prompt` times in place; so does the video."""
    made = Fixture()
    negative = None if guidance.get("guidance_scale") == 1 else "abc"
    output = made.pipe(["a", "bb"], negative_prompt=negative, num_images_per_prompt=2, **guidance, **SHORT)
    [inputs] = made.record.of("condition")
    assert inputs["text_lengths"].tolist() == lengths
    assert [len(set(row[row > 0])) for row in inputs["text_states"][..., 0]] == [
        {1: 1, 2: 1, 3: 3}[n] for n in lengths
    ]
    assert inputs["motion"].tolist() == [[5.0, 12.0]] * len(lengths)
    assert output.latents.shape[0] == output.frames.shape[0] == 4


@pytest.mark.parametrize(("own", "asked", "used"), [(2.5, None, 2.5), (2.5, 4.0, 4.0), (5.0, None, 5.0)])
def test_guidance_is_the_checkpoints_own_where_none_is_asked_for(own: float, asked: Any, used: float) -> None:
    made = Fixture(replace(VIDEO, guidance_scale=own))
    made.pipe("a", guidance_scale=asked, **SHORT)
    weights = made.record.of("diffusion_head")[0]["step_guidance"]  # eps = e_0 + scale * (e_1 - e_0)
    np.testing.assert_allclose(weights[0], [used, 1 - used])


def test_one_negative_prompt_for_each_prompt() -> None:
    made = Fixture()
    made.pipe(["a", "bb"], negative_prompt=["ccc", "dddd"], motion_flow=7.5, **SHORT)
    assert made.record.of("condition")[0]["text_lengths"].tolist() == [1, 2, 3, 4]
    assert made.record.of("condition")[0]["motion"][:, 0].tolist() == [7.5] * 4
    with pytest.raises(UsageError, match="3 negative prompts for 2 prompts"):
        made.pipe(["a", "b"], negative_prompt=["c", "d", "e"])


def test_a_prompt_that_is_cut_warns() -> None:
    with pytest.warns(UserWarning, match="cut"):
        Fixture().pipe("a" * 17, **SHORT)


def test_classes() -> None:
    config = NovaConfig.from_parts(**parts(text=False, frames=1))
    made = Fixture(config)
    made.pipe([3, 999], num_images_per_prompt=2, **SHORT)
    made.pipe([3, 4], negative_prompt=1000, **SHORT)
    ids = [inputs["class_ids"].tolist() for inputs in made.record.of("condition")]
    assert ids == [[3, 3, 999, 999, 1000, 1000, 1000, 1000], [3, 4, 1000, 1000]]


# Image to video


class Counting(TorchGenerator):
    """Keeps the shapes of what is drawn, in order."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.shapes: list[Any] = []

    def uniform(self, shape: Sequence[int]) -> Any:
        self.shapes.append(("uniform", tuple(shape)))
        return super().uniform(shape)

    def normal(self, shape: Sequence[int]) -> Any:
        self.shapes.append(("normal", tuple(shape)))
        return super().normal(shape)


def image() -> np.ndarray:
    return np.zeros((*VIDEO.image_size, 3), np.uint8)


def test_one_posterior_draw_is_shared_and_comes_first() -> None:
    made, generator = Fixture(), Counting(0)
    request = Request(["a", "b"], image=image(), max_latent_length=3, num_images_per_prompt=2, **SHORT)
    latents = made.pipe.latents(request, generator)
    size = (4, *VIDEO.latent_size)
    assert generator.shapes[:2] == [("normal", (1, *size)), ("uniform", (4, VIDEO.num_tokens, 1))]
    drawn = TorchGenerator(0).normal((1, *size))
    np.testing.assert_allclose(latents[:, :, 0], np.repeat(MEAN + STD * drawn, 4, axis=0), rtol=1e-6)
    assert made.record.of("vae_encoder")[0]["pixels"].min() == -1 and made.count("vae_encoder") == 1
    assert made.count("temporal_encoder") == 3 and latents.shape[2] == 3


def test_vae_without_variance_draws_nothing() -> None:
    made, generator = Fixture(replace(VIDEO, vae={**VIDEO.vae, "double_z": False})), Counting(0)
    latents = made.pipe.latents(Request("a", image=image(), max_latent_length=2, **SHORT), generator)
    assert generator.shapes[0][0] == "uniform"
    assert (latents[:, :, 0] == MEAN).all()


def test_image_of_another_size_gives_a_notice() -> None:
    with pytest.warns(UserWarning, match="resized to 96x64"):
        Fixture().pipe("a", image=np.zeros((128, 192, 3), np.uint8), max_latent_length=2, **SHORT)


def test_image_needs_a_video_checkpoint() -> None:
    config = NovaConfig.from_parts(**parts(frames=1))
    with pytest.raises(UsageError, match="needs a video checkpoint"):
        Fixture(config).pipe("a", image=image())


# Seeds and arguments


def test_a_seed_that_was_drawn_gives_the_same_again() -> None:
    arguments = {**SHORT, "seed": None}
    first = Fixture().pipe("a", **arguments)
    assert first.seed is not None and 0 <= first.seed < 2**32
    assert first.seed != Fixture().pipe("a", **arguments).seed
    np.testing.assert_array_equal(Fixture().pipe("a", **{**SHORT, "seed": first.seed}).latents, first.latents)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "3"])
@pytest.mark.parametrize("name", [*NUMBERS, "guidance_scale", "min_guidance_scale", "flow_shift"])
def test_numbers_that_are_none(name: str, value: Any) -> None:
    config = NovaConfig.from_parts(**parts(scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    with pytest.raises(UsageError, match=name.removesuffix("_guidance_scale")):
        Fixture(config).pipe("a", **{name: value})


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="guidance_scales"):
        Fixture().pipe("a", guidance_scales=3)


# Opening and closing of runners


class Sessions:
    """Stands for OrtRunner and Bundle: knows which stages are open, and which files were checked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open: list[str] = []
        self.opened: list[str] = []
        self.checked: list[str] = []
        self.together: list[set[str]] = []  # phases that were open while a stage ran
        self.fail = ""
        monkeypatch.setitem(stage_runners.RUNNERS, "cpu", self.runner)
        entries = {
            name: SimpleNamespace(spec=stage, graph=name, files=(name,))
            for name, stage in stages(VIDEO).items()
        }
        self.bundle: Any = SimpleNamespace(
            stages=entries,
            files={name: SimpleNamespace(size=1) for name in entries},
            check_stage=self.checked.append,
            path=Path,
        )

    def runner(self, stage: Any, path: Path, threads: int) -> Any:
        sessions = self

        class Session(Runner):
            def __enter__(self) -> Any:
                sessions.open.append(stage.name)
                sessions.opened.append(stage.name)
                return self

            def __exit__(self, *_: object) -> None:
                sessions.open.remove(stage.name)

            def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
                sessions.together.append({stages(VIDEO)[name].phase for name in sessions.open})
                if stage.name == sessions.fail:
                    raise StageError("it failed")
                if stage.name == "temporal_encoder":  # reopened for every frame in low memory
                    self.frames = int(inputs["cache_length"][0] > 0)
                return super().run(inputs)

        return Session(stage, Record())

    def pipe(self, **options: Any) -> Pipeline:
        runners = StageRunners(self.bundle, "cpu", **options)
        return Pipeline(VIDEO, runners, Tokenizer(), runners.close)  # type: ignore[arg-type]


def test_runners_stay_open_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(monkeypatch)
    with sessions.pipe() as pipe:
        for _ in range(2):
            pipe("a", max_latent_length=2, **SHORT)
        assert len(sessions.opened) == len(set(sessions.opened)) == len(sessions.open) == 6
    assert sessions.open == []


def test_low_memory_keeps_one_phase_open(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(monkeypatch)
    with sessions.pipe(low_memory=True) as pipe:
        pipe("a", image=image(), max_latent_length=3, **SHORT)
    assert all(len(phases) == 1 for phases in sessions.together)
    assert set().union(*sessions.together) == {"image", "text", "frame", "step", "decode"}
    assert (
        sessions.opened.count("temporal_encoder") == 2
    )  # for the given frame and the next, then for the last
    assert sessions.open == []
    assert sorted(sessions.checked) == sorted(stages(VIDEO))  # hashed once, however often they are opened


@pytest.mark.parametrize("stage", ["text_encoder", "temporal_encoder", "diffusion_head", "vae_decoder"])
def test_runners_are_closed_after_an_exception(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    sessions = Sessions(monkeypatch)
    sessions.fail = stage
    pipe = sessions.pipe()
    with pytest.raises(StageError, match="it failed"), pipe:
        pipe("a", **SHORT)
    assert stage in sessions.opened and sessions.open == []
    sessions.fail = ""
    assert pipe("a", **SHORT).frames.shape[1] == 1  # and it opens them again
