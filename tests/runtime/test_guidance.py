"""nova_export.runtime.guidance: its weights against the formulas, and the head's renorm over latents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_export.errors import UsageError
from nova_export.runtime.generate import Plan, draw_noise, step_tables
from nova_export.runtime.guidance import Guidance
from nova_export.runtime.noise import TorchGenerator
from nova_export.runtime.schedule import Schedule, make_schedule
from nova_export.runtime.tokens import take, token_positions
from tests.strategies import SCHEDULER, tiny_config

torch = pytest.importorskip("torch")

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 2.0}
scales = st.floats(1.01, 30)


@st.composite
def options_of(draw: st.DrawFn) -> dict[str, Any]:
    extra = draw(st.sampled_from(["none", "image_scale", "spatiotemporal_scale"]))
    return {
        "scale": draw(scales),
        "min_scale": draw(st.one_of(st.none(), st.floats(1, 30))),
        "trunc": draw(st.sampled_from([0.0, 300.0, 500.5, 1001.0])),
        "renorm": draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        **({} if extra == "none" else {extra: draw(st.floats(0.1, 5))}),
    }


def renormed(guided: Any, cond: Any, least: float) -> Any:
    """Scaled back to the length of cond, by no less than `least`, and never up."""
    if least >= 1:
        return guided
    factor = (cond.flatten(1).norm(dim=1) / guided.flatten(1).norm(dim=1)).clamp(least, 1)
    return guided * factor[:, None, None]


def published(passes: Any, options: dict[str, Any], progress: float, timestep: float) -> Any:
    """The published combination of predictions (G, B, tokens, values), in double."""
    cond, *others = passes
    if timestep < options["trunc"]:
        return cond
    least = options["min_scale"] or options["scale"]
    scale = (options["scale"] - least) * progress + least
    if image := options.get("image_scale"):
        uncond, imagecond = others
        return renormed(uncond + scale * (cond - imagecond), cond, options["renorm"]) + image * (
            imagecond - uncond
        )
    guided = renormed(others[0] + scale * (cond - others[0]), cond, options["renorm"])
    if extra := options.get("spatiotemporal_scale"):
        return guided + extra * (cond - others[1])
    return guided


def weighted(passes: Any, tables: tuple[Any, Any, Any], step: int) -> Any:
    """What the head does with the tables, over a latent that is predicted as a whole."""
    weights, extra, renorm = (torch.from_numpy(table[step]).double() for table in tables)
    guided = (passes * weights[:, None, None, None]).sum(0)
    factor = passes[0].flatten(1).norm(dim=1) / guided.flatten(1).norm(dim=1)
    guided = guided * torch.maximum(factor.clamp(max=1), renorm)[:, None, None]
    return guided + (passes * extra[:, None, None, None]).sum(0)


@settings(deadline=None)
@given(options_of(), st.sampled_from([0.25, 0.5, 1.0]), st.integers(0, 9))
def test_weights_are_the_published_formulas(options: dict[str, Any], progress: float, seed: int) -> None:
    guidance = Guidance(**options)
    timesteps = np.array([999, 500.5, 499, 300, 0], np.float32)
    tables = guidance.weights(progress, timesteps)
    assert [table.shape for table in tables] == [(5, guidance.passes), (5, guidance.passes), (5, 1)]
    assert all(table.dtype == np.float32 for table in tables)
    random = torch.Generator().manual_seed(seed)
    passes = torch.randn(guidance.passes, 2, 3, 4, generator=random, dtype=torch.float64)
    for step, timestep in enumerate(timesteps):
        actual, expected = (
            weighted(passes, tables, step),
            published(passes, options, progress, float(timestep)),
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_trunc_compares_as_the_published_float() -> None:
    """A timestep of float32 against a Python float: 0.7 as float32 is below 0.7."""
    assert Guidance(trunc=0.7).weights(1, np.array([0.7, 0.8], np.float32))[0][:, 1].tolist() == [0, -4]


@given(st.floats(0, 1), st.sampled_from([0.0, 500.0]), st.sampled_from([0.5, 1.0]))
def test_one_pass_is_taken_as_it_is(scale: float, trunc: float, renorm: float) -> None:
    guidance = Guidance(scale=scale, trunc=trunc, renorm=renorm)
    weights, extra, least = guidance.weights(0.5, np.array([900, 100], np.float32))
    assert guidance.passes == 1 and guidance.texts == (0,) and guidance.blanks == (False,)
    assert weights.tolist() == [[1], [1]] and extra.tolist() == [[0], [0]] and least.tolist() == [[1], [1]]


@pytest.mark.parametrize(
    ("options", "texts", "blanks"),
    [
        ({}, (0, 1), (False, False)),
        ({"image_scale": 1.5}, (0, 1, 1), (False, True, False)),
        ({"spatiotemporal_scale": 1.5}, (0, 1, 0), (False, False, False)),
    ],
)
def test_what_the_passes_see(
    options: dict[str, float], texts: tuple[int, ...], blanks: tuple[bool, ...]
) -> None:
    guidance = Guidance(**options)
    assert (guidance.passes, guidance.texts, guidance.blanks) == (len(texts), texts, blanks)


def test_min_scale_grows_to_scale() -> None:
    guidance = Guidance(scale=7.0, min_scale=1.0)
    assert [guidance.scale_at((i + 1) / 3) for i in range(3)] == pytest.approx([3, 5, 7])
    assert [Guidance(scale=7.0).scale_at(p) for p in (0.1, 1)] == [7, 7]
    assert Guidance(scale=2.0, min_scale=4.0).scale_at(0.5) == 3  # falling is as good


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_scale": 1.0, "spatiotemporal_scale": 1.0}, "give one"),
        ({"image_scale": 1.0, "scale": 1.0}, "guidance_scale above 1, not 1"),
        ({"spatiotemporal_scale": 1.0, "scale": 0.5}, "guidance_scale above 1, not 0.5"),
        ({"min_scale": 0.5}, "min_guidance_scale is 0.5"),
        ({"renorm": 1.5}, "guidance_renorm is 1.5"),
        ({"renorm": -0.1}, "guidance_renorm is -0.1"),
        ({"scale": math.nan}, "guidance_scale is nan"),
        ({"trunc": math.inf}, "guidance_trunc is inf"),
        ({"min_scale": math.nan}, "min_guidance_scale is nan"),
        ({"image_scale": -1.0}, "image_guidance_scale is -1.0"),
        ({"spatiotemporal_scale": math.inf}, "spatiotemporal_guidance_scale is inf"),
        ({"scale": "5"}, "guidance_scale is '5'"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Guidance(**options)


def whole_latent(
    network: Any,
    z: Any,
    options: dict[str, Any],
    schedule: Schedule,
    draws: list[Any],
    chosen: Any,
    progress: float,
) -> Any:
    """One AR step as published: all N tokens in every diffusion step, K of them by the model.

    The others are predicted to be the sample itself, scaled by the renorm like all: (B, N, d).
    """
    sample, later = draws[0], draws[1:]
    rows = torch.arange(len(chosen))[:, None]
    condition_z = network.time_cond_embed.condition_proj(z)  # (G, B, K, width)
    for index, timestep in enumerate(schedule.timesteps):
        time = network.time_cond_embed.timestep_proj(torch.from_numpy(schedule.frequencies()[index]))
        predicted = network(sample[rows, chosen], condition_z + time)  # (G, B, K, d)
        passes = sample.expand(len(z), *sample.shape).clone()
        passes[:, rows, chosen] = predicted
        guided = published(passes, options, progress, float(timestep))
        a, b, s = (float(value) for value in schedule.coefficients[index])
        sample = a * sample + b * guided
        sample = sample + s * later.pop(0) if schedule.draws_noise[index] else sample
    return sample


@pytest.mark.parametrize("scheduler", [SCHEDULER, FLOW], ids=["ddpm", "flow"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 9.0, "renorm": 0.6},
        {"scale": 9.0, "renorm": 0.0, "trunc": 400.0},
        {"scale": 9.0, "renorm": 0.2, "image_scale": 2.0},
        {"scale": 9.0, "renorm": 1.0},
    ],
    ids=["renorm", "trunc", "image", "off"],
)
def test_renorm_is_over_the_whole_latent(scheduler: dict[str, Any], options: dict[str, Any]) -> None:
    """The head sees K tokens and a stand-in for the others, the published loop all tokens."""
    from reference_model.head import DiffusionHead

    options = {"min_scale": None, "trunc": 0.0, **options}
    config = tiny_config((1, 2), scheduler=scheduler)
    batch, steps, size, progress = 2, 4, 2, 0.5
    schedule, guidance = make_schedule(scheduler, steps), Guidance(**options)
    plan = Plan(config, batch, 1, 4, schedule, guidance)
    torch.manual_seed(1)
    head = DiffusionHead(config).eval().requires_grad_(False)
    for parameter in head.parameters():  # so large that ratios are 0.3 to 0.8, so small that the rest counts
        torch.nn.init.normal_(parameter, std=0.15)
    order = torch.stack([torch.randperm(config.num_tokens) for _ in range(batch)]).numpy()
    predicted, chosen, later = order[:, :3], order[:, 3 : 3 + size], order[:, 3 + size :]
    positions = token_positions(config, batch)
    drawn = draw_noise(plan, TorchGenerator(5), positions, chosen, later, predicted)
    z = torch.randn(guidance.passes, batch, size, config.spatial.width)
    tables = {**drawn, **step_tables(plan, progress)}
    actual = head(
        z, **{name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in tables.items()}
    )

    generator = TorchGenerator(5)
    shape = (batch, config.latent_channels, *config.latent_size)
    draws = [generator.normal(shape).ravel() for _ in range(1 + int(schedule.draws_noise.sum()))]
    everything = [torch.from_numpy(draw[positions]) for draw in draws]
    expected = whole_latent(
        head.image_decoder, z, options, schedule, everything, torch.from_numpy(chosen), progress
    )
    expected = take(expected.numpy(), chosen)
    np.testing.assert_allclose(actual.numpy(), expected, atol=3e-5 * np.abs(expected).max())
