"""nova_export.runtime.joint: requests that share a loop get what they would have had alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nova_export
from nova_export import Pipeline, Request
from nova_export.config import NovaConfig
from nova_export.errors import InputError
from nova_export.runtime.joint import JointGenerator, form, join
from nova_export.runtime.noise import TorchGenerator
from tests.conftest import GOLDEN
from tests.runtime.test_pipeline import Fixture

VIDEO = NovaConfig.from_checkpoint(GOLDEN / "t2v" / "checkpoint")
SHORT: dict[str, Any] = {"max_latent_length": 2, "num_inference_steps": 4, "num_diffusion_steps": 3}
PAIR = (
    Request(["a red circle", "x"], seed=3, motion_flow=2.0, **SHORT),
    Request("many spotted jellyfish", seed=4, **SHORT),
)

# Draws


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 2**32))
def test_every_request_draws_what_it_would_alone(sizes: list[int], each: int, seed: int) -> None:
    """Tensors of fewer than 16 values too, whose draws wait in the generator."""
    joint = JointGenerator([TorchGenerator(seed + index) for index in range(len(sizes))], sizes)
    total = sum(sizes)
    chosen = np.arange(total * each).reshape(total, each)[:, ::2]  # of every sample every other value
    uniform, normal = joint.uniform((total, each, 1)), joint.normal((total, each))
    raw = joint.normal_raw(total * each).take(chosen)
    steps = joint.normal_steps(total * each, 3, chosen)
    ends = np.cumsum(sizes)
    for index, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        alone, own = TorchGenerator(seed + index), slice(end - size, end)
        positions = np.arange(size * each).reshape(size, each)[:, ::2]
        np.testing.assert_array_equal(uniform[own], alone.uniform((size, each, 1)))
        np.testing.assert_array_equal(normal[own], alone.normal((size, each)))
        np.testing.assert_array_equal(raw[own], alone.normal_raw(size * each).take(positions))
        np.testing.assert_array_equal(steps[:, own], alone.normal_steps(size * each, 3, positions))


# Whole generations


def prepared(pipe: Pipeline, requests: tuple[Request, ...]) -> list[Any]:
    return [pipe.prepare(request, TorchGenerator(request.resolved_seed())) for request in requests]


def streamed(pipe: Pipeline, requests: tuple[Request, ...], **options: Any) -> dict[int, np.ndarray]:
    """Frames (B, F, H, W, 3) of each request that has any."""
    made: dict[int, list[np.ndarray]] = {}
    for index, frames in pipe.stream_jointly(prepared(pipe, requests), **options):
        made.setdefault(index, []).append(frames)
    return {index: np.concatenate(parts, axis=1) for index, parts in made.items()}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"guidance_scale": 1.0}, {"image_guidance_scale": 2.0}, {"max_latent_length": 9}],
    ids=str,
)
def test_frames_are_those_of_each_alone(
    golden_bundle: Callable[[str], Path], arguments: dict[str, Any]
) -> None:
    pipe = nova_export.load(golden_bundle("t2v"))
    requests = tuple(replace(request, **arguments) for request in PAIR)
    together = streamed(pipe, requests)
    for index, request in enumerate(requests):
        np.testing.assert_array_equal(together[index], pipe(**vars(request)).frames)


def test_image_to_video(golden_bundle: Callable[[str], Path]) -> None:
    """Each draws its posterior before the loops."""
    pipe = nova_export.load(golden_bundle("t2v"))
    shades = [np.full((*VIDEO.image_size, 3), shade, np.uint8) for shade in (40, 200)]
    requests = tuple(replace(request, image=shade) for request, shade in zip(PAIR, shades, strict=True))
    together = streamed(pipe, requests)
    for index, request in enumerate(requests):
        np.testing.assert_array_equal(together[index], pipe(**vars(request)).frames)


def test_renorm_is_the_same_but_for_rounding(golden_bundle: Callable[[str], Path]) -> None:
    """ONNX Runtime adds up a sample's squares in another order where there are several samples."""
    pipe = nova_export.load(golden_bundle("t2v"))
    requests = tuple(replace(request, guidance_renorm=0.7) for request in PAIR)
    joint = pipe.latents_of(join(prepared(pipe, requests)))
    alone = [pipe.latents(request, TorchGenerator(request.resolved_seed())) for request in requests]
    np.testing.assert_allclose(joint, np.concatenate(alone), atol=1e-3)


def test_frames_of_one_that_is_not_wanted_are_not_decoded() -> None:
    made = Fixture()
    requests = tuple(replace(request, prompt=request.prompt[:1]) for request in PAIR)
    frames = streamed(made.pipe, requests, wanted=lambda index: index == 1)
    assert list(frames) == [1] and frames[1].shape[:2] == (1, 5)
    assert made.count("vae_decoder") == 1


def test_what_is_wrong_with_a_request_shows_before_the_loops() -> None:
    made = Fixture()
    with pytest.raises(InputError, match=r"no-image\.png does not exist"):
        made.pipe.prepare(Request("a", image="no-image.png", **SHORT), TorchGenerator(0))
    assert made.count("temporal_encoder") == 0


# Forms


def test_requests_of_one_form() -> None:
    base = Request("a", **SHORT)
    same = [
        replace(
            base, prompt=["b", "c"], negative_prompt="d", num_images_per_prompt=2, motion_flow=9.0, seed=5
        ),
        replace(base, guidance_scale=VIDEO.guidance_scale, flow_shift=0),
    ]
    assert {form(each, VIDEO) for each in [base, *same]} == {form(base, VIDEO)}


@pytest.mark.parametrize(
    "other",
    [
        {"max_latent_length": 3},
        {"num_inference_steps": 5},
        {"num_diffusion_steps": 4},
        {"flow_shift": 2.0},
        {"guidance_scale": 2.0},
        {"guidance_trunc": 100.0},
        {"guidance_renorm": 0.5},
        {"image": np.zeros((64, 96, 3), np.uint8)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_requests_of_different_forms(other: dict[str, Any]) -> None:
    base = Request("a", **SHORT)
    assert form(base, VIDEO) != form(replace(base, **other), VIDEO)
