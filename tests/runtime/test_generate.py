"""nova_export.runtime.generate: what stages are fed at each frame and step, and the order of draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_export.config import NovaConfig
from nova_export.runtime.generate import Plan, Step, compress, generate_latents
from nova_export.runtime.guidance import Guidance
from nova_export.runtime.noise import TorchGenerator
from nova_export.runtime.schedule import make_schedule
from nova_export.runtime.tokens import patchify, set_sizes
from nova_export.stages import cache_names
from tests.runtime.fakes import CONTEXT, FRAME, FakeGenerator, FakeRunners, Record
from tests.strategies import SCHEDULER, tiny_config

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}


@dataclass
class Ran:
    """One generation with fakes."""

    plan: Plan
    condition: np.ndarray
    record: Record
    generator: FakeGenerator
    steps: list[Step]

    @property
    def config(self) -> NovaConfig:
        return self.plan.config


def generate(
    config: NovaConfig | None = None,
    *,
    frames: int = 3,
    batch: int = 2,
    inference_steps: int = 4,
    diffusion_steps: int = 3,
    first_frame: np.ndarray | None = None,
    uniform: np.ndarray | None = None,
    **guidance: Any,
) -> Ran:
    config = config or tiny_config()
    schedule = make_schedule(config.scheduler, diffusion_steps)
    plan = Plan(config, batch, frames, inference_steps, schedule, Guidance(**guidance))
    rng = np.random.default_rng(0)
    width = config.temporal.width
    condition = rng.standard_normal((plan.rows, config.condition_tokens, width), np.float32)
    if uniform is None:
        uniform = rng.random((batch, config.num_tokens), np.float32)
    runners, generator = FakeRunners(config), FakeGenerator(uniform)
    steps = list(generate_latents(plan, runners, condition, generator, first_frame))
    return Ran(plan, condition, runners.record, generator, steps)


KINDS = [
    {},
    {"image_scale": 1.5},
    {"spatiotemporal_scale": 1.5},
    {"scale": 1.0},
    {"scale": 9.0, "renorm": 0.5},
]


@pytest.mark.parametrize("guidance", KINDS, ids=str)
def test_the_stages_run_in_order(guidance: dict[str, float]) -> None:
    ran = generate(**guidance)
    sets = len(set_sizes(ran.config.num_tokens, 4))
    frame = ["temporal_encoder", *["spatial_encoder", "diffusion_head"] * sets]
    assert [stage for stage, _ in ran.record.calls] == frame * 3


def test_text_is_fed_at_frame_0_only() -> None:
    ran = generate()
    first, *later = ran.record.of("temporal_encoder")
    np.testing.assert_array_equal(first["text"], ran.condition)
    for inputs in later:
        assert inputs["text"].shape == (ran.plan.rows, 0, ran.config.temporal.width)


def test_cache_length_counts_the_rows_written() -> None:
    ran = generate()
    calls, config = ran.record.of("temporal_encoder"), ran.config
    before, frame = config.condition_tokens, config.frame_tokens
    assert [inputs["cache_length"].tolist() for inputs in calls] == [
        [0],
        [before + frame],
        [before + 2 * frame],
    ]
    for index, inputs in enumerate(calls):
        for name in cache_names(config):
            cache = inputs[name]
            assert cache.shape[1] == before + 3 * frame
            written = (
                [1] * (before + frame) + [2] * frame if index == 2 else [1] * (before + frame) * (index > 0)
            )
            assert cache[0, :, 0].tolist() == written + [0] * (cache.shape[1] - len(written))


@pytest.mark.parametrize(
    ("guidance", "blanks"),
    [
        ({"scale": 1.0}, [False, False]),
        ({}, [False] * 4),
        ({"image_scale": 1.5}, [False, False, True, True, False, False]),
        ({"spatiotemporal_scale": 1.5}, [False] * 6),
    ],
    ids=str,
)
def test_is_blank_in_pass_1_of_image_guidance(guidance: dict[str, float], blanks: list[bool]) -> None:
    """At every frame; that frame 0 has no frame before it, the stage sees by its empty cache."""
    for inputs in generate(**guidance).record.of("temporal_encoder"):
        assert inputs["is_blank"].tolist() == blanks


@pytest.mark.parametrize(("frames", "base"), [(3, 4), (9, 4), (1, 4), (5, 2)])
def test_frame_position(frames: int, base: int) -> None:
    """Absolute: t * T0 / L, in units of the trained clip. Rotary: t."""
    absolute = generate(tiny_config((1, 1), frames=base), frames=frames).record.of("temporal_encoder")
    rotary = generate(tiny_config((1, 1), frames=base, rotary=True), frames=frames).record.of(
        "temporal_encoder"
    )
    for t in range(frames):
        assert absolute[t]["frame_position"] == pytest.approx([t * base / frames], rel=1e-6)
        assert rotary[t]["frame_position"].tolist() == [t]


def test_first_context_is_frame_0_s() -> None:
    calls = generate(tiny_config(mixer=-1)).record.of("temporal_encoder")
    assert [np.unique(inputs["first_context"]).tolist() for inputs in calls] == [[0], [CONTEXT], [CONTEXT]]
    assert "first_context" not in generate(tiny_config(mixer=None)).record.of("temporal_encoder")[0]


def test_the_frame_before_is_fed_to_every_pass() -> None:
    ran = generate()
    calls = ran.record.of("temporal_encoder")
    whole = [step.latents for step in ran.steps if step.is_last]
    assert not calls[0]["latents"].any()
    for index in (1, 2):
        np.testing.assert_array_equal(calls[index]["latents"], np.tile(whole[index - 1], (2, 1, 1, 1)))


def test_ids_are_disjoint_and_complete_and_the_same_for_all_frames() -> None:
    ran = generate()
    calls, sizes = ran.record.of("spatial_encoder"), set_sizes(ran.config.num_tokens, 4)
    assert len(calls) == 3 * len(sizes)
    frames = [calls[i : i + len(sizes)] for i in range(0, len(calls), len(sizes))]
    for frame in frames:
        for size, inputs in zip(sizes, frame, strict=True):
            assert inputs["next_ids"].shape == (ran.plan.rows, size)
        order = np.concatenate([inputs["next_ids"] for inputs in frame], axis=1)
        assert (np.sort(order, axis=1) == np.arange(ran.config.num_tokens)).all()
        for known, inputs in zip(np.cumsum([0, *sizes]), frame, strict=False):
            np.testing.assert_array_equal(inputs["predicted_ids"], order[:, :known])
        np.testing.assert_array_equal(order[:2], order[2:])  # both passes of both samples
        assert (order[0] != order[1]).any()  # samples have orders of their own
    for one, other in zip(frames[0], frames[2], strict=True):
        np.testing.assert_array_equal(one["next_ids"], other["next_ids"])


def test_the_order_is_that_of_the_uniform_draws_and_ties_are_stable() -> None:
    config = tiny_config((1, 1))  # 4 tokens
    uniform = np.array([[0.5, 0.2, 0.5, 0.2], [0, 0, 0, 0]], np.float32)
    calls = generate(config, frames=1, inference_steps=1, uniform=uniform).record.of("spatial_encoder")
    assert calls[0]["next_ids"].tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]] * 2
    uniform = np.tile(np.arange(24) % 2, (2, 1)).astype(np.float32)  # so many that an unstable sort shows
    calls = generate(frames=1, uniform=uniform).record.of("spatial_encoder")
    order = np.concatenate([inputs["next_ids"][0] for inputs in calls])
    assert order.tolist() == [*range(0, 24, 2), *range(1, 24, 2)]


def test_tokens_of_earlier_steps_are_fed_back_in_their_order() -> None:
    ran = generate()
    sets = len(set_sizes(ran.config.num_tokens, 4))
    for index, inputs in enumerate(ran.record.of("spatial_encoder")):
        expected = FRAME * (index // sets) + inputs["predicted_ids"] + 1
        tokens = inputs["tokens"]
        assert tokens.shape == (*expected.shape, ran.config.token_dim)
        np.testing.assert_array_equal(tokens, np.broadcast_to(expected[..., None], tokens.shape))
        np.testing.assert_array_equal(
            inputs["context"], np.full_like(inputs["context"], CONTEXT + index // sets)
        )


def test_steps_show_the_frame_so_far() -> None:
    ran = generate()
    sizes = set_sizes(ran.config.num_tokens, 4)
    events = [(s.frame, s.num_frames, s.step, s.num_steps, s.is_last) for s in ran.steps]
    sets = len(sizes)
    assert events == [(t, 3, i, sets, i == sets - 1) for t in range(3) for i in range(sets)]
    known = 0
    for step in ran.steps[:sets]:
        known += sizes[step.step]
        assert step.latents.shape == (2, 4, 8, 12)
        tokens = patchify(step.latents, ran.config.patch)
        assert (tokens != 0).all(axis=2).sum(axis=1).tolist() == [known, known]
        assert ((tokens == 0).all(axis=2) | (tokens != 0).all(axis=2)).all()
    for step in ran.steps:
        if step.is_last:
            ids = FRAME * step.frame + np.arange(ran.config.num_tokens) + 1
            np.testing.assert_array_equal(patchify(step.latents, ran.config.patch)[0, :, 0], ids)


def test_steps_that_predict_nothing_are_no_events() -> None:
    ran = generate(tiny_config((1, 1)), frames=1, inference_steps=50)
    assert 1 < len(ran.steps) <= 4 and ran.steps[-1].is_last


def test_image_to_video_starts_at_frame_1_with_the_given_latents() -> None:
    first = np.random.default_rng(1).standard_normal((2, 4, 8, 12), np.float32)
    ran = generate(first_frame=first)
    sets = len(set_sizes(ran.config.num_tokens, 4))
    assert [stage for stage, _ in ran.record.calls[:2]] == ["temporal_encoder", "temporal_encoder"]
    assert {step.frame for step in ran.steps} == {1, 2} and len(ran.steps) == 2 * sets
    np.testing.assert_array_equal(
        ran.record.of("temporal_encoder")[1]["latents"], np.tile(first, (2, 1, 1, 1))
    )
    assert ran.generator.calls[0][0] == "uniform"


def test_an_image_alone_generates_nothing() -> None:
    ran = generate(frames=1, first_frame=np.ones((2, 4, 8, 12), np.float32))
    assert ran.steps == [] and ran.generator.calls == []


@pytest.mark.parametrize("guidance", [{}, {"scale": 1.0}, {"renorm": 0.5}], ids=str)
@pytest.mark.parametrize("scheduler", [SCHEDULER, FLOW], ids=["ddpm", "flow"])
@pytest.mark.parametrize("is_given", [False, True], ids=["text", "image"])
def test_draws_come_in_the_published_order(
    guidance: dict[str, float], scheduler: dict[str, Any], is_given: bool
) -> None:
    """The order once; then for every AR step the noise, and one draw for every DDPM step but the last."""
    first = np.ones((2, 4, 8, 12), np.float32) if is_given else None
    ran = generate(tiny_config(scheduler=scheduler), first_frame=first, **guidance)
    size = 2 * 4 * 8 * 12  # always the full latent
    sets = (3 - is_given) * len(set_sizes(ran.config.num_tokens, 4))
    per_set = 3 if scheduler is SCHEDULER else 1
    assert ran.generator.calls == [("uniform", (2, 24, 1)), *[("normal", size)] * (sets * per_set)]


@pytest.mark.parametrize("renorm", [1.0, 0.5])
def test_each_draw_goes_where_it_belongs(renorm: float) -> None:
    """The n-th normal tensor is all n: an AR step has its first, each step that draws the next."""
    ran = generate(renorm=renorm)
    for index, inputs in enumerate(ran.record.of("diffusion_head")):
        first = 3 * index + 1
        assert (inputs["noise"] == first).all()
        assert [np.unique(noise).tolist() for noise in inputs["step_noise"]] == [
            [first + 1],
            [first + 2],
            [0],
        ]


def test_noise_is_that_of_the_chosen_tokens() -> None:
    config = tiny_config((1, 2))
    plan = Plan(config, 2, 1, 3, make_schedule(SCHEDULER, 2), Guidance())
    runners = FakeRunners(config)
    condition = np.zeros((4, config.condition_tokens, config.temporal.width), np.float32)
    list(generate_latents(plan, runners, condition, TorchGenerator(3)))
    generator, shape = TorchGenerator(3), (2, config.latent_channels, *config.latent_size)
    generator.uniform((2, config.num_tokens, 1))
    record = runners.record
    for spatial, head in zip(record.of("spatial_encoder"), record.of("diffusion_head"), strict=True):
        ids = spatial["next_ids"][:2]
        whole, later = (patchify(generator.normal(shape), config.patch) for _ in range(2))
        for sample in range(2):
            np.testing.assert_array_equal(head["noise"][sample], whole[sample, ids[sample]])
            np.testing.assert_array_equal(head["step_noise"][0, sample], later[sample, ids[sample]])


def test_the_head_is_fed_tables_of_the_step() -> None:
    ran = generate(tiny_config(), frames=1, scale=7.0, min_scale=1.0)
    calls = ran.record.of("diffusion_head")
    for index, inputs in enumerate(calls):
        np.testing.assert_array_equal(inputs["step_coefficients"], ran.plan.schedule.coefficients)
        np.testing.assert_array_equal(inputs["step_frequencies"], ran.plan.schedule.frequencies())
        g = 1 + 6 * (index + 1) / len(calls)
        np.testing.assert_allclose(inputs["step_guidance"], [[g, 1 - g]] * 3, rtol=1e-6)
        assert inputs["z"].shape[:2] == (2, 2)


def test_other_tokens_noise_is_short_and_only_there_for_renorm() -> None:
    for inputs in generate().record.of("diffusion_head"):
        assert (
            inputs["rest"].shape == (2, 1)
            and not inputs["rest"].any()
            and not inputs["step_rest_noise"].any()
        )
    *calls, last = generate(renorm=0.5).record.of("diffusion_head")
    assert last["rest"].shape == (2, 4) and last["step_rest_noise"].shape == (3, 2, 4)
    for index, inputs in enumerate(calls):  # n in each of `others` values
        others = 2 * 4 * 8 * 12 // 2 - inputs["noise"][0].size
        length = (3 * index + 1) * np.sqrt(others)
        np.testing.assert_allclose(np.linalg.norm(inputs["rest"], axis=1), length, rtol=1e-5)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 40), st.integers(0, 99))
def test_compressed_noise_has_the_same_inner_products(n: int, batch: int, values: int, seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal((n, batch, values)).astype(np.float32)
    short = compress(noise)
    assert short.shape == (n, batch, n) and short.dtype == np.float32
    for sample in range(batch):
        expected = noise[:, sample] @ noise[:, sample].T
        np.testing.assert_allclose(
            short[:, sample] @ short[:, sample].T, expected, atol=1e-4 * max(values, 1)
        )
