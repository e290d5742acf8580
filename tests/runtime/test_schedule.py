"""nova_export.runtime.schedule against diffusers' schedulers, step by step, and the papers' formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_export.errors import CheckpointError, UsageError
from nova_export.runtime.schedule import Schedule, make_schedule

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def ddpm(**options: Any) -> dict[str, Any]:
    """A config as published: clipping is on in it, and NOVA never clips."""
    return {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "clip_sample": True, **options}


def published_ddpm(config: dict[str, Any], steps: int) -> Any:
    """diffusers' without clipping, and with NOVA's step before t: t - 1000 // T, whatever the spacing."""
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    scheduler = diffusers.DDPMScheduler(**{**options, "clip_sample": False})
    scheduler.set_timesteps(steps)
    scheduler.previous_timestep = lambda t: t - 1000 // steps
    return scheduler


def applied(schedule: Schedule, index: int, x: Any, prediction: Any, noise: Any) -> Any:
    a, b, s = (float(value) for value in schedule.coefficients[index])
    return a * x + b * prediction + s * noise


def assert_close(actual: Any, expected: Any) -> None:
    scale = max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= 1e-5 * scale


def check_against_diffusers(config: dict[str, Any], steps: int) -> None:
    schedule, scheduler = make_schedule(config, steps), published_ddpm(config, steps)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    random = torch.Generator().manual_seed(0)
    for index, t in enumerate(scheduler.timesteps):
        x, prediction = (torch.randn(4, 5, generator=random) for _ in range(2))
        before = random.get_state()
        expected = scheduler.step(prediction, int(t), x, generator=random).prev_sample
        has_drawn = not torch.equal(before, random.get_state())
        assert has_drawn == schedule.draws_noise[index] == (t > 0)
        random.set_state(before)
        noise = torch.randn(4, 5, generator=random) if has_drawn else torch.full((4, 5), 1e9)
        if not has_drawn:
            assert schedule.coefficients[index, 2] == 0
        assert_close(applied(schedule, index, x, prediction, noise), expected)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("betas", BETAS[:3])
def test_every_kind_of_ddpm(betas: str, spacing: str, prediction: str, variance: str) -> None:
    config = ddpm(
        beta_schedule=betas, timestep_spacing=spacing, prediction_type=prediction, variance_type=variance
    )
    check_against_diffusers(config, 7)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(BETAS), st.sampled_from(SPACINGS), st.integers(1, 60), st.integers(0, 3))
def test_any_number_of_steps_and_offset(betas: str, spacing: str, steps: int, offset: int) -> None:
    config = ddpm(beta_schedule=betas, timestep_spacing=spacing, steps_offset=offset)
    check_against_diffusers(config, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_betas_rescaled_to_zero_snr(prediction: str, spacing: str) -> None:
    config = ddpm(rescale_betas_zero_snr=True, prediction_type=prediction, timestep_spacing=spacing)
    check_against_diffusers(config, 9)


def test_epsilon_needs_a_signal() -> None:
    """Zero SNR at the last step: published, x_0 is a division by zero there."""
    zero_snr = ddpm(rescale_betas_zero_snr=True)
    check_against_diffusers({**zero_snr, "timestep_spacing": "leading"}, 9)  # which never takes the last step
    with pytest.raises(CheckpointError, match=r"timestep 999.*v_prediction"):
        make_schedule({**zero_snr, "timestep_spacing": "trailing"}, 9)


def test_betas_given_as_numbers() -> None:
    check_against_diffusers(ddpm(trained_betas=np.linspace(0.001, 0.01, 1000).tolist()), 5)


def test_the_paper_s_equation() -> None:
    """Eq. 7 of arXiv 2006.11239 with x_0 of eq. 15, in double, from cosine betas made here."""
    abar = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    kept = torch.tensor([1 - min(1 - b / a, 0.999) for a, b in itertools.pairwise(abar)])
    bar = torch.cumprod(kept.double(), 0)
    schedule = make_schedule(ddpm(beta_schedule="squaredcos_cap_v2"), 25)
    assert schedule.timesteps.tolist() == list(range(960, -1, -40))
    for index, t in enumerate(range(960, -1, -40)):
        now, before = bar[t], bar[t - 40] if t else torch.tensor(1.0).double()
        beta = 1 - now / before
        x, eps = torch.randn(2, 3, 4).double()
        x_0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        mean = before.sqrt() * beta / (1 - now) * x_0 + (now / before).sqrt() * (1 - before) / (1 - now) * x
        assert_close(applied(schedule, index, x, eps, torch.zeros_like(x)), mean)
        deviation = ((1 - before) / (1 - now) * beta).sqrt() if t else 0.0
        assert schedule.coefficients[index, 2] == pytest.approx(float(deviation), rel=1e-4)


def test_never_clips() -> None:
    config = ddpm(clip_sample=True, clip_sample_range=0.1, thresholding=True)
    np.testing.assert_array_equal(
        make_schedule(config, 5).coefficients, make_schedule(ddpm(), 5).coefficients
    )


@pytest.mark.parametrize("steps", [61, 103, 999, 1000])
def test_trailing_steps_are_as_many_as_asked_for(steps: int) -> None:
    """For some numbers rounding gives np.arange one element more, which would be timestep -1."""
    timesteps = make_schedule(ddpm(timestep_spacing="trailing"), steps).timesteps
    assert len(timesteps) == steps and timesteps.min() >= 0


def published_flow(steps: int, trained: float, shift: float) -> tuple[list[float], list[float]]:
    """Sigmas, then 0, and timesteps. The bounds of sigmas were shifted once when it was made."""

    def shifted(sigma: float, by: float) -> float:
        return by * sigma / (1 + (by - 1) * sigma)

    first, last = shifted(1.0, trained), shifted(0.001, trained)
    spaced = [first + (last - first) * i / max(steps - 1, 1) for i in range(steps)]
    sigmas = [shifted(sigma, shift) for sigma in spaced]
    return [*sigmas, 0.0], [sigma * 1000 for sigma in sigmas]


shifts = st.floats(0.5, 12)


@settings(deadline=None)
@given(st.integers(1, 60), shifts, st.one_of(st.none(), shifts))
def test_flow_matching(steps: int, trained: float, asked: float | None) -> None:
    schedule = make_schedule({**FLOW, "shift": trained}, steps, asked)
    sigmas, timesteps = published_flow(steps, trained, asked or trained)
    np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=1e-5)
    assert not schedule.draws_noise.any()
    for index in range(steps):
        x, velocity = torch.randn(2, 3, 4)
        expected = x + (sigmas[index + 1] - sigmas[index]) * velocity
        assert_close(applied(schedule, index, x, velocity, torch.full_like(x, 1e9)), expected)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_flow_matching_unshifted_is_diffusers(steps: int) -> None:
    """With shift 1 nothing is shifted twice, and both schedulers are the same."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(steps)
    schedule = make_schedule({**FLOW, "shift": 1.0}, steps)
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    for index, t in enumerate(scheduler.timesteps):
        x, velocity = torch.randn(2, 3, 4)
        expected = scheduler.step(velocity, t, x).prev_sample
        assert_close(applied(schedule, index, x, velocity, torch.zeros_like(x)), expected)


def test_flow_shift_0_is_the_checkpoint_s_own() -> None:
    own = make_schedule({**FLOW, "shift": 3.0}, 4)
    for shift in (None, 0, 0.0, 3.0):
        assert np.array_equal(make_schedule({**FLOW, "shift": 3.0}, 4, shift).coefficients, own.coefficients)


def test_frequencies() -> None:
    schedule = make_schedule(ddpm(), 4)
    rates = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = torch.tensor(schedule.timesteps)[:, None] * rates
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert schedule.frequencies().dtype == np.float32
    # An angle of 750 in float32 is known to 6e-5.
    np.testing.assert_allclose(schedule.frequencies(), expected, atol=2e-4)


def test_tables_are_float32() -> None:
    for config in (ddpm(), FLOW):
        schedule = make_schedule(config, 3)
        assert schedule.timesteps.dtype == schedule.coefficients.dtype == np.float32
        assert schedule.coefficients.shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variance_type": "learned"}, "variance_type 'learned' needs a head"),
        ({"variance_type": "learned_range"}, "variance_type 'learned_range' needs a head"),
        ({"variance_type": "fixed_large_log"}, "fixed_large_log.*negative.*fixed_small"),
        ({"beta_schedule": "laplace"}, "beta_schedule 'laplace'"),
        ({"prediction_type": "noise"}, "prediction_type 'noise'.*epsilon"),
        ({"timestep_spacing": "even"}, "timestep_spacing 'even'.*leading"),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler.*DDPMScheduler"),
        ({"_class_name": None}, "None"),
    ],
)
def test_what_the_published_pipeline_cannot_run_either(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        make_schedule(ddpm(**options), 5)


def test_dynamic_shifting_is_refused() -> None:
    with pytest.raises(CheckpointError, match="use_dynamic_shifting"):
        make_schedule({**FLOW, "use_dynamic_shifting": True}, 5)


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("config", [ddpm(), FLOW], ids=["ddpm", "flow"])
def test_too_many_or_too_few_steps(config: dict[str, Any], steps: int) -> None:
    with pytest.raises(UsageError, match=f"num_diffusion_steps is {steps}; it must be 1 to 1000"):
        make_schedule(config, steps)


def test_an_offset_past_the_last_step() -> None:
    with pytest.raises(UsageError, match="steps_offset 2 pass step 1000"):
        make_schedule(ddpm(steps_offset=2), 1000)


def test_flow_shift_is_for_flow_matching() -> None:
    with pytest.raises(UsageError, match="flow_shift is for flow-matching"):
        make_schedule(ddpm(), 5, 3.0)
    for shift in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="flow_shift is"):
            make_schedule(FLOW, 5, shift)
