"""C++ against Python: same bundle, same arguments, same seed; latents, frames, notices and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cpp.conftest import PROMPT, REPOSITORY, Answer, Call, in_cpp, in_python, with_config

EXTRA = REPOSITORY / "tests" / "golden_extra"
LATENTS_TOLERANCE = 1e-4
SHORT = {"prompts": [PROMPT], "seed": 1, "num_inference_steps": 3, "num_diffusion_steps": 4}
VIDEO = {**SHORT, "max_latent_length": 3}
IMAGE = np.random.default_rng(0).integers(0, 256, (100, 70, 3), np.uint8)  # to be cut and resized

# (bundle, what differs from a short call, how it is loaded)
CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "video": ("t2v", {"max_latent_length": 3, "num_inference_steps": 6, "num_diffusion_steps": 5}, {}),
    "two tiles": ("t2v", {"max_latent_length": 7}, {}),
    "batch": (
        "t2v",
        {"prompts": [PROMPT, "b"], "negative_prompts": ["x", "y z"], "num_images_per_prompt": 2},
        {},
    ),
    "empty prompt": ("t2v", {"prompts": [""]}, {}),
    "long prompt": ("t2v", {"prompts": ["a long prompt of many words \u00e9\u4e2d\U0001f600 " * 30]}, {}),
    "no guidance": ("t2v", {"guidance_scale": 1.0, "max_latent_length": 2}, {}),
    "min guidance": ("t2v", {"guidance_scale": 7.0, "min_guidance_scale": 2.0}, {}),
    "trunc": ("t2v", {"guidance_trunc": 400.0}, {}),
    "renorm": ("t2v", {"guidance_renorm": 0.5, "guidance_trunc": 100.0}, {}),
    "renorm, all tokens at once": ("t2v", {"guidance_renorm": 0.3, "num_inference_steps": 1}, {}),
    "spatiotemporal": ("t2v", {"spatiotemporal_guidance_scale": 1.5, "max_latent_length": 2}, {}),
    "motion": ("t2v", {"motion_flow": 11.5, "seed": 2**40 + 3}, {}),
    "image to video": ("t2v", {"image": IMAGE, "max_latent_length": 3, "num_images_per_prompt": 2}, {}),
    "low memory": ("t2v", {"max_latent_length": 2}, {"low_memory": True, "threads": 1}),
    "squares": ("t2v", {"max_latent_length": 2}, {"vae_tile": 5}),
    "picture": ("t2i", {"num_inference_steps": 6, "num_diffusion_steps": 5}, {}),
    "64 steps": ("t2i", {"num_inference_steps": 64, "num_diffusion_steps": 2}, {}),
    "rotary": ("t2v-rope", {"max_latent_length": 3, "num_inference_steps": 6}, {}),
    "rotary, image guidance": ("t2v-rope", {"max_latent_length": 2, "image_guidance_scale": 1.5}, {}),
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SCHEDULERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flow matching": (FLOW, {}),
    "flow shift": ({**FLOW, "shift": 2.0}, {"flow_shift": 3.0, "guidance_renorm": 0.5}),
    "trailing": (
        {"beta_schedule": "linear", "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {},
    ),
    "linspace": (
        {"beta_schedule": "scaled_linear", "timestep_spacing": "linspace", "prediction_type": "sample"},
        {},
    ),
    "sigmoid": ({"beta_schedule": "sigmoid", "steps_offset": 1, "variance_type": "fixed_large"}, {}),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, {}),
    "zero snr": (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {},
    ),
}


@pytest.fixture(scope="module")
def compare(cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Call], None]:
    """Run a call in both; latents within tolerance, frames and notices equal."""

    def run(call: Call) -> None:
        folder = tmp_path_factory.mktemp("call")
        [actual], expected = in_cpp(cpp / "release/tests/nova_call", [call], folder), in_python(call)
        assert_alike(actual, expected, exact="guidance_renorm" not in call.options)

    return run


def assert_alike(actual: Answer, expected: Answer, exact: bool) -> None:
    """exact: else the norms behind guidance_renorm are summed in another order; pixels may round apart."""
    assert (actual.error, actual.status) == (expected.error, expected.status)
    assert actual.latents is not None and expected.latents is not None
    assert actual.frames is not None and expected.frames is not None
    assert actual.latents.shape == expected.latents.shape and actual.frames.shape == expected.frames.shape
    apart = np.abs(actual.latents - expected.latents).max()
    assert apart <= LATENTS_TOLERANCE, f"latents are {apart:.3g} apart"
    levels = np.abs(actual.frames.astype(int) - expected.frames)
    assert levels.max() <= (0 if exact else 1) and (levels > 0).mean() <= 1e-3
    assert actual.notices == expected.notices


@pytest.mark.parametrize("name", CALLS)
def test_same_arguments_same_video(
    name: str, golden_bundle: Callable[[str], Path], compare: Callable[[Call], None]
) -> None:
    of, options, load = CALLS[name]
    options = {**SHORT, **options}
    compare(Call(golden_bundle(of), options, load, image=options.pop("image", None)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_schedule(
    name: str, golden_bundle: Callable[[str], Path], compare: Callable[[Call], None], tmp_path: Path
) -> None:
    config, options = SCHEDULERS[name]
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, **config}
    changed = with_config(golden_bundle("t2v"), tmp_path / "bundle", scheduler=scheduler)
    compare(Call(changed, {**SHORT, "num_diffusion_steps": 7, **options}))


@pytest.mark.slow
def test_demo(golden_bundle: Callable[..., Path], compare: Callable[[Call], None]) -> None:
    compare(Call(golden_bundle("demo"), {"prompts": [PROMPT], "seed": 1, "max_latent_length": 9}))


def test_the_decoder_in_pieces(golden_bundle: Callable[..., Path], compare: Callable[[Call], None]) -> None:
    """Seven latents: two tiles, and pieces that lie between doubled frames."""
    compare(Call(golden_bundle("t2v", lean_decode=True), {**SHORT, "max_latent_length": 7}))


@pytest.mark.slow
def test_classes(compare: Callable[[Call], None], tmp_path: Path) -> None:
    from nova_export.export.build import build_bundle
    from reference_model.init import init_checkpoint

    case = json.loads((EXTRA / "class_conditional_negative.json").read_text())
    checkpoint = init_checkpoint(**case["init"], out=tmp_path / "checkpoint")
    made = build_bundle(checkpoint, tmp_path / "bundle", verify=False)
    classes = {**SHORT, "prompts": [], "class_ids": [7, 0], "num_images_per_prompt": 2}
    compare(Call(made, classes))
    compare(Call(made, {**classes, "negative_class_ids": [3, 5], "min_guidance_scale": 2.0}))


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": []},
        {"prompts": None, "class_ids": [7]},
        {"num_inference_steps": 0},
        {"num_diffusion_steps": 2000},
        {"max_latent_length": 5000},
        {"guidance_renorm": 1.5},
        {"min_guidance_scale": 0.5},
        {"motion_flow": -1.5},
        {"flow_shift": 2.0},
        {"image_guidance_scale": 1.0, "spatiotemporal_guidance_scale": 1.0},
        {"image_guidance_scale": 1.0, "guidance_scale": 1.0},
        {"negative_prompts": ["x"], "guidance_scale": 0.5},
        {"prompts": ["a", "b"], "negative_prompts": ["x", "y", "z"]},
    ],
    ids=lambda options: ", ".join(options),
)
def test_same_refusal(
    options: dict[str, Any], cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    given = {key: value for key, value in {**VIDEO, **options}.items() if value is not None}
    call = Call(golden_bundle("t2v"), given)
    [actual], expected = in_cpp(cpp / "release/tests/nova_call", [call], tmp_path), in_python(call)
    assert expected.error is not None
    assert (actual.error, actual.status) == (expected.error, expected.status)


def test_image_checkpoints_make_no_videos(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    calls = [Call(golden_bundle("t2i"), VIDEO), Call(golden_bundle("t2i"), SHORT, image=IMAGE)]
    for actual, call in zip(in_cpp(cpp / "release/tests/nova_call", calls, tmp_path), calls, strict=True):
        expected = in_python(call)
        assert actual.error and (actual.error, actual.status) == (expected.error, expected.status)


def test_a_damaged_bundle_is_refused_as_by_python(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = with_config(golden_bundle("t2v"), tmp_path / "bundle")
    weights = copy / "spatial_encoder.onnx.data"
    damaged = bytearray(weights.read_bytes())
    damaged[100] ^= 1
    weights.unlink()  # the file itself is shared with the bundle
    weights.write_bytes(damaged)
    unknown = Call(golden_bundle("t2v"), SHORT, {"device": "abacus"})
    for call in (Call(copy, SHORT), Call(tmp_path / "nowhere", SHORT), unknown):
        [actual], expected = in_cpp(cpp / "release/tests/nova_call", [call], tmp_path), in_python(call)
        assert actual.error and (actual.error, actual.status) == (expected.error, expected.status)
