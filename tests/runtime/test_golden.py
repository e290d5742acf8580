"""Bundles against what the published pipeline recorded: whole calls, and each stage fed what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nova_export
from nova_export import Pipeline, Request
from nova_export.bundle import Bundle
from nova_export.runtime.decode import decode_tile, decoder_of, tiles
from nova_export.runtime.generate import TemporalState, draw_noise, encode_frame, step_tables
from nova_export.runtime.noise import RawNormal, TorchGenerator
from nova_export.runtime.runner import OrtRunner
from nova_export.runtime.tokens import set_sizes, take, token_positions, unpatchify
from tests.conftest import GOLDEN, golden_calls

CALLS = [("t2v", 0), ("t2v", 1), ("t2i", 0), ("t2v-rope", 0)]
IN_FLOAT64 = ("t2v", 1)  # recorded while torch's default dtype was float64: order and noise are drawn so
FLOAT32_LATENTS = Path(__file__).parents[1] / "golden_extra" / "t2v_call1_float32.npz"
LATENTS_TOLERANCE = 5e-4  # of a whole call, through every AR step
STAGE_TOLERANCE = 5e-5  # of one stage on recorded inputs; outputs are up to 5
# Rotary checkpoints were recorded with frequencies whose exponents had gone through float16.
ROTARY_TOLERANCE = 1e-3
FRAMES_ALIKE = 0.999  # of all values within one level


class DoubleGenerator:
    """torch's generator, drawing in float64 as that one call did."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(self, shape: tuple[int, ...]) -> np.ndarray:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64).numpy()

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return drawn.numpy().astype(np.float32)

    def normal_raw(self, size: int) -> RawNormal:
        return RawNormal(size, np.empty(0, np.uint32), self.normal((size,)))

    def normal_steps(self, size: int, steps: int, flat_indices: np.ndarray) -> np.ndarray:
        values = [self.normal((size,))[flat_indices] for _ in range(steps)]
        return np.array(values, np.float32).reshape(steps, *flat_indices.shape)


def generator_of(name: str, call: int, seed: int) -> Any:
    return DoubleGenerator(seed) if (name, call) == IN_FLOAT64 else TorchGenerator(seed)


def assert_close(
    actual: np.ndarray, expected: np.ndarray, stage: str, step: str, tolerance: float = STAGE_TOLERANCE
) -> None:
    """Equal within `tolerance`, or the message says where and how far apart."""
    assert actual.shape == expected.shape, f"{stage}, {step}: shape {actual.shape}, recorded {expected.shape}"
    difference = np.abs(actual.astype(np.float64) - expected)
    at = np.unravel_index(np.argmax(difference), difference.shape) if difference.size else ()
    assert difference.max(initial=0) <= tolerance, (
        f"{stage}, {step}: max difference {difference.max():.3g} at {tuple(map(int, at))}, "
        f"mean {difference.mean():.3g}; tolerance {tolerance:g}"
    )


def assert_frames_alike(actual: np.ndarray, recorded: np.ndarray) -> None:
    recorded = recorded[:, None] if recorded.ndim == 4 else recorded  # an image's file has no frame axis
    assert actual.shape == recorded.shape and actual.dtype == np.uint8
    difference = np.abs(actual.astype(int) - recorded)
    alike = float((difference <= 1).mean())
    assert alike >= FRAMES_ALIKE, f"{alike:.4%} of the values are within one level, max {difference.max()}"


# Whole calls


@pytest.mark.parametrize(("name", "call"), [call for call in CALLS if call != IN_FLOAT64])
def test_call_gives_recorded_video(golden_bundle: Callable[[str], Path], name: str, call: int) -> None:
    arguments, recorded = golden_calls(name)[call]
    output = nova_export.load(golden_bundle(name))(**arguments)
    assert output.seed == arguments["seed"] and output.latents.dtype == np.float32
    assert_close(output.latents, recorded["latents"], "all stages", "last step", LATENTS_TOLERANCE)
    assert_frames_alike(output.frames, recorded["frames"])


@pytest.fixture(scope="module")
def float64_call(golden_bundle: Callable[[str], Path]) -> tuple[Pipeline, Request, Any]:
    arguments, recorded = golden_calls("t2v")[1]
    return nova_export.load(golden_bundle("t2v")), Request(**arguments), recorded


def test_float64_draws_give_recorded_video(float64_call: tuple[Pipeline, Request, Any]) -> None:
    """Any source of noise will do: with that call's own the recorded latents come out."""
    pipe, request, recorded = float64_call
    assert request.seed is not None
    latents = pipe.latents(request, DoubleGenerator(request.seed))  # type: ignore[arg-type]
    assert_close(latents, recorded["latents"], "all stages", "last step", LATENTS_TOLERANCE)
    assert_frames_alike(pipe.decode(latents), recorded["frames"])


def test_same_call_with_float32_draws(float64_call: tuple[Pipeline, Request, Any]) -> None:
    """As everyone calls the published pipeline: recorded a second time, in torch's default float32."""
    pipe, request, recorded = float64_call
    assert request.seed is not None
    latents = pipe.latents(request, TorchGenerator(request.seed))
    expected = np.load(FLOAT32_LATENTS)["latents"]
    assert_close(latents, expected, "all stages", "last step", LATENTS_TOLERANCE)
    assert np.abs(latents - recorded["latents"]).max() > 0.1  # the two recordings do differ


# Stage by stage, each fed with what was recorded before it


class Recorded:
    """A recorded call as the stages saw it: rows of every AR step, counted through all frames."""

    def __init__(self, bundle: Bundle, name: str, call: int) -> None:
        arguments, self.arrays = golden_calls(name)[call]
        self.name, self.request = name, Request(**arguments)
        self.bundle, self.plan = bundle, self.request.plan(bundle.config)
        self.tolerance = ROTARY_TOLERANCE if bundle.config.rotary else STAGE_TOLERANCE
        self.sizes = set_sizes(bundle.config.num_tokens, self.plan.num_inference_steps)
        steps = range(self.plan.num_frames * len(self.sizes))
        self.ids = [self.arrays[f"pred_ids.{step}"][..., 0] for step in steps]
        self.generator = generator_of(name, call, arguments["seed"])

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """(step counted through all frames, frame, step of the frame)."""
        for step in range(len(self.ids)):
            yield step, step // len(self.sizes), step % len(self.sizes)

    def before(self, step: int, within: int) -> np.ndarray:
        """Ids (B, P) of the tokens that the frame's earlier steps predicted."""
        earlier = self.ids[step - within : step]
        return np.concatenate([np.zeros((self.plan.batch, 0), np.int64), *earlier], axis=1)

    def tokens_of(self, frame: int, steps: int) -> np.ndarray:
        """(B, N, p * p * C) of a frame after some of its AR steps, zero where nothing is predicted yet."""
        config = self.bundle.config
        tokens = np.zeros((self.plan.batch, config.num_tokens, config.token_dim), np.float32)
        for step in range(frame * len(self.sizes), frame * len(self.sizes) + steps):
            rows = np.arange(self.plan.batch)[:, None]
            tokens[rows, self.ids[step]] = take(self.arrays["denoised_tokens"][step], self.ids[step])
        return tokens

    def latents_of(self, frame: int) -> np.ndarray:
        return unpatchify(self.tokens_of(frame, len(self.sizes)), self.bundle.config)

    def contexts(self) -> list[np.ndarray]:
        """What each frame is predicted from: recorded in front of the mixer, mixed by the reference."""
        first, *later = self.arrays["temporal_out"]
        if self.bundle.config.mixer_rank is None:
            return [first, *later]
        from reference_model.checkpoint import load_module

        stage = self.bundle.stages["temporal_encoder"].spec
        module = load_module(stage, self.bundle.config, GOLDEN / self.name / "checkpoint")
        return [first, *(module.mix(*map(torch.from_numpy, (first, frame))).numpy() for frame in later)]

    def runner(self, stage: str) -> OrtRunner:
        entry = self.bundle.stages[stage]
        return OrtRunner(entry.spec, self.bundle.path(entry.graph))

    def condition(self) -> np.ndarray:
        """The recorded text tokens; the motion tokens behind them, which are not recorded, from our stage."""
        text = self.arrays["text_tokens"][0]
        if not self.bundle.config.is_video:
            return text
        inputs = {
            "text_states": self.arrays["prompt_embeds"][0],
            "text_lengths": np.full(self.plan.rows, self.bundle.config.text_len),
            "motion": np.tile(np.array([self.request.motion_flow, 12], np.float32), (self.plan.rows, 1)),
        }
        with self.runner("condition") as runner:
            return np.concatenate([text, runner.run(inputs)["condition"][:, text.shape[1] :]], axis=1)


@pytest.fixture(scope="module", params=CALLS, ids=lambda call: f"{call[0]}-{call[1]}")
def recorded(request: pytest.FixtureRequest, golden_bundle: Callable[[str], Path]) -> Recorded:
    name, call = request.param
    return Recorded(Bundle.open(golden_bundle(name)), name, call)


def test_text_encoder(recorded: Recorded) -> None:
    pipe = nova_export.load(recorded.bundle.folder)
    texts = recorded.request.prompts(pipe.config) + recorded.request.negative_prompts(pipe.config)
    states, lengths = pipe._text_states(texts)
    assert lengths[0] > 0
    for row, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        expected = recorded.arrays["prompt_embeds"][0, row, :length]
        assert_close(states[row, :length], expected, "text_encoder", repr(text))


def test_condition(recorded: Recorded) -> None:
    """True lengths: what stands behind them in `text_states` must not matter."""
    pipe = nova_export.load(recorded.bundle.folder)
    expected = recorded.arrays["text_tokens"][0]
    actual = pipe._condition(recorded.request, recorded.plan)
    assert actual.shape[1] == recorded.bundle.config.condition_tokens
    assert_close(actual[:, : expected.shape[1]], expected, "condition", "text")


def test_temporal_encoder(recorded: Recorded) -> None:
    """Frames in order: caches are our own, latents of earlier frames the recorded ones."""
    condition, plan = recorded.condition(), recorded.plan
    state = TemporalState.empty(plan)
    previous = np.zeros_like(recorded.latents_of(0))
    with recorded.runner("temporal_encoder") as runner:
        for frame, expected in enumerate(recorded.contexts()):
            context = encode_frame(plan, runner, state, frame, condition, previous)
            assert_close(context, expected, "temporal_encoder", f"frame {frame}", recorded.tolerance)
            previous = recorded.latents_of(frame)


def test_spatial_encoder(recorded: Recorded) -> None:
    passes, contexts = recorded.plan.guidance.passes, recorded.contexts()
    with recorded.runner("spatial_encoder") as runner:
        for step, frame, within in recorded.steps():
            chosen, predicted = recorded.ids[step], recorded.before(step, within)
            tokens = take(recorded.tokens_of(frame, within), predicted)
            inputs = {
                "context": contexts[frame],
                "tokens": np.tile(tokens, (passes, 1, 1)),
                "predicted_ids": np.tile(predicted, (passes, 1)),
                "next_ids": np.tile(chosen, (passes, 1)),
            }
            expected = take(recorded.arrays["spatial_out"][step], inputs["next_ids"])
            z = runner.run(inputs)["z"]
            assert_close(z, expected, "spatial_encoder", f"step {step}", recorded.tolerance)


def test_order_noise_and_diffusion_head(recorded: Recorded) -> None:
    """Draws in the published order; then every AR step's T diffusion steps from the recorded z."""
    plan, config = recorded.plan, recorded.bundle.config
    uniform = recorded.generator.uniform((plan.batch, config.num_tokens, 1))
    order = np.argsort(uniform[..., 0], axis=1, kind="stable")
    positions = token_positions(config, plan.batch)
    with recorded.runner("diffusion_head") as runner:
        for step, frame, within in recorded.steps():
            chosen, predicted = recorded.ids[step], recorded.before(step, within)
            known = predicted.shape[1]
            assert (order[:, known : known + chosen.shape[1]] == chosen).all(), f"step {step}: other tokens"
            later = order[:, known + chosen.shape[1] :]
            draws = draw_noise(plan, recorded.generator, positions, chosen, later, predicted)
            noise = recorded.arrays["noise"][step].ravel()[take(positions, chosen)]
            assert_close(draws["noise"], noise, "noise", f"step {step}", 1e-6)
            z = take(recorded.arrays["spatial_out"][step], np.tile(chosen, (plan.guidance.passes, 1)))
            inputs = {
                "z": z.reshape(plan.guidance.passes, plan.batch, chosen.shape[1], -1),
                **draws,
                **step_tables(plan, (within + 1) / len(recorded.sizes)),
            }
            expected = take(recorded.arrays["denoised_tokens"][step], chosen)
            assert_close(
                runner.run(inputs)["denoised"], expected, "diffusion_head", f"step {step} (frame {frame})"
            )


def test_vae_decoder(recorded: Recorded) -> None:
    latents = recorded.arrays["latents"].astype(np.float32)
    with recorded.runner("vae_decoder") as runner:
        config = recorded.bundle.config
        decoder, cut = decoder_of(lambda name: runner, config), tiles(config.tiling, latents.shape[2])
        frames = np.concatenate([decode_tile(decoder, latents, tile) for tile in cut], axis=1)
    assert_frames_alike(frames, recorded.arrays["frames"])


def test_recorded_latents_are_the_recorded_tokens(recorded: Recorded) -> None:
    """The reconstruction that feeds the stages above is right."""
    for frame in range(recorded.plan.num_frames):
        expected = recorded.arrays["latents"][:, :, frame]
        assert_close(recorded.latents_of(frame), expected, "unpatchify", f"frame {frame}", 1e-6)


def test_a_failure_names_stage_step_and_differences() -> None:
    far = np.zeros((2, 3), np.float32)
    far[1, 2] = 0.5
    with pytest.raises(AssertionError, match=r"head, step 3: max difference 0\.5 at \(1, 2\), mean 0\.0833"):
        assert_close(far, np.zeros((2, 3), np.float32), "head", "step 3")
