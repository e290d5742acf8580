"""NOVA's loops: frames, sets of tokens within a frame, and what each call of a stage is fed.

The caller gives runners; nothing here knows which backend they are. Both loops are one generator, so the
caller shows progress, streams finished frames, frees stages between phases, or just stops.
Letters: B samples, G guidance passes, rows = G * B, N tokens of a frame, P predicted, K predicted now,
T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from nova_export.config import NovaConfig
from nova_export.runtime.device_array import joined, rows_of
from nova_export.runtime.diffusion import denoise
from nova_export.runtime.guidance import Guidance
from nova_export.runtime.noise import Noise
from nova_export.runtime.runner import Held, Runner
from nova_export.runtime.schedule import Schedule
from nova_export.runtime.tokens import set_sizes, take, token_positions, unpatchify
from nova_export.stages import cache_names

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
StageGetter = Callable[[str], Runner]


@dataclass(frozen=True)
class Step:
    """One finished AR step; `is_last` when the frame is whole. read: gives the latents, see there."""

    frame: int
    num_frames: int
    step: int
    num_steps: int
    read: Callable[[], Floats]

    @cached_property
    def latents(self) -> Floats:
        """The frame so far (B, C, h, w). On a GPU, who asks waits for it."""
        return self.read()

    @property
    def is_last(self) -> bool:
        return self.step + 1 == self.num_steps

    @property
    def done(self) -> float:
        """The share of all AR steps that are done, 0 to 1."""
        return (self.frame + (self.step + 1) / self.num_steps) / self.num_frames


@dataclass(frozen=True)
class Plan:
    """A request as the loops need it: sizes, tables and choices, all decided before the first stage runs."""

    config: NovaConfig
    batch: int
    num_frames: int
    num_inference_steps: int
    schedule: Schedule
    guidance: Guidance

    @property
    def rows(self) -> int:
        return self.batch * self.guidance.passes


@dataclass
class TemporalState:
    """What the temporal encoder keeps between frames: caches, how many rows are filled, frame 0's context."""

    caches: dict[str, Held]
    filled: int = 0
    first_context: Held | None = None
    empty_text: Floats = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))

    @classmethod
    def empty(cls, plan: Plan) -> TemporalState:
        config, width = plan.config, plan.config.temporal.width
        capacity = config.condition_tokens + plan.num_frames * config.frame_tokens
        shape = plan.rows, capacity, width
        caches: dict[str, Held] = {name: np.zeros(shape, np.float32) for name in cache_names(config)}
        return cls(caches, empty_text=np.zeros((plan.rows, 0, width), np.float32))


def generate_latents(
    plan: Plan,
    stage: StageGetter,
    condition: Held,  # (rows, text and motion tokens, D), passes in the order of plan.guidance
    generator: Noise,
    first_frame: Floats | None = None,  # (B, C, h, w): given latents, frame 0 of image to video
) -> Iterator[Step]:
    """Every AR step of every generated frame, in order. Frame t's latents are whole at its last step."""
    state = TemporalState.empty(plan)
    latents = np.zeros((plan.batch, plan.config.latent_channels, *plan.config.latent_size), np.float32)
    order: Ints | None = None
    for frame in range(plan.num_frames):
        # 1. What the frames before say about this one.
        context = encode_frame(plan, stage("temporal_encoder"), state, frame, condition, latents)
        if frame == 0 and first_frame is not None:
            latents = first_frame
            continue
        # 2. One random order for the whole video, drawn at the first step of the first generated frame.
        if order is None:
            uniform = generator.uniform((plan.batch, plan.config.num_tokens, 1))
            order = np.argsort(uniform[..., 0], axis=1, kind="stable")
        # 3. The frame, set by set.
        for step in generate_frame(plan, stage, context, order, generator, frame):
            yield step
            if step.is_last:
                latents = step.latents


def encode_frame(
    plan: Plan, runner: Runner, state: TemporalState, frame: int, condition: Held, previous: Floats
) -> Held:
    """The frame's context (rows, M, D). Advances `state` by the rows that this call wrote to the caches."""
    config, passes = plan.config, plan.guidance.passes
    position = (
        frame if config.rotary else np.float32(frame) / np.float32(plan.num_frames / config.base_frames)
    )
    text = condition if frame == 0 else state.empty_text
    inputs: dict[str, Held] = {
        "text": text,
        "latents": np.tile(previous, (passes, 1, 1, 1)),
        "is_blank": np.repeat(np.array(plan.guidance.blanks), plan.batch),
        "frame_position": np.array([position], np.float32),
        "cache_length": np.array([state.filled], np.int64),
        **state.caches,
    }
    if config.mixer_rank is not None:
        first = state.first_context
        inputs["first_context"] = (
            np.zeros((plan.rows, config.frame_tokens, config.temporal.width), np.float32)
            if first is None
            else first
        )
    outputs = runner.run(inputs)
    state.caches = {name: outputs[f"new_{name}"] for name in state.caches}
    state.filled += text.shape[1] + config.frame_tokens
    context = outputs["context"]
    if frame == 0:
        state.first_context = context
    return context


def generate_frame(
    plan: Plan, stage: StageGetter, context: Held, order: Ints, generator: Noise, frame: int
) -> Iterator[Step]:
    """The AR steps of one frame. Every frame starts from zero latents with all N tokens masked.

    Tokens stand in the order in which they are predicted, so each step's go behind those before, and what
    the head makes on a GPU stays there until the frame is whole.
    """
    config, passes = plan.config, plan.guidance.passes
    sizes = set_sizes(config.num_tokens, plan.num_inference_steps)
    positions = token_positions(config, plan.batch)
    tokens: Held = np.zeros((plan.rows, 0, config.token_dim), np.float32)
    known = 0
    for index, size in enumerate(sizes):
        predicted, chosen = order[:, :known], order[:, known : known + size]
        # 1. z of the next K tokens, from the P known ones.
        z = stage("spatial_encoder").run(
            {
                "context": context,
                "tokens": tokens,
                "predicted_ids": np.tile(predicted, (passes, 1)),
                "next_ids": np.tile(chosen, (passes, 1)),
            }
        )["z"]
        # 2. All diffusion steps of these tokens.
        draws = draw_noise(plan, generator, positions, chosen, order[:, known + size :], predicted)
        inputs = {"z": z.reshape(passes, plan.batch, size, -1), **draws}
        tables = step_tables(plan, (index + 1) / len(sizes))
        denoised = denoise(stage("diffusion_head"), {**inputs, **tables})["denoised"]
        # 3. Into the frame.
        tokens = with_tokens(tokens, denoised, passes)
        known += size
        read = partial(frame_latents, config, tokens, order[:, :known])
        yield Step(frame, plan.num_frames, index, len(sizes), read)


def with_tokens(known: Held, made: Held, passes: int) -> Held:
    """Tokens (rows, P, d), and behind them those just made (B, K, d), which all passes share."""
    parts = zip(rows_of(known), rows_of(made) * passes, strict=True)
    return joined([[part for part in row if part.shape[1]] for row in parts])


def frame_latents(config: NovaConfig, tokens: Held, ids: Ints) -> Floats:
    """Latents (B, C, h, w) of the tokens that there are, which are the frame's `ids` (B, P); else zeros."""
    placed = np.zeros((len(ids), config.num_tokens, config.token_dim), np.float32)
    placed[np.arange(len(ids))[:, None], ids] = np.asarray(tokens)[: len(ids)]
    return unpatchify(placed, config)


def step_tables(plan: Plan, progress: float) -> dict[str, Floats]:
    """The head's tables but noise: one row a diffusion step."""
    weights, extra, renorm = plan.guidance.weights(progress, plan.schedule.timesteps)
    return {
        "step_coefficients": plan.schedule.coefficients,
        "step_frequencies": plan.schedule.frequencies(),
        "step_guidance": weights,
        "step_extra_guidance": extra,
        "step_renorm": renorm,
    }


def draw_noise(
    plan: Plan, generator: Noise, positions: Ints, chosen: Ints, later: Ints, predicted: Ints
) -> dict[str, Floats]:
    """Noise as the published pipeline draws it: of the full latent shape, though only K chosen tokens use it.

    `rest` and `step_rest_noise` stand for all other tokens' noise, where guidance_renorm takes their norm.
    """
    shape = (plan.batch, plan.config.latent_channels, *plan.config.latent_size)
    size = int(np.prod(shape))
    steps = len(plan.schedule.timesteps)
    where = take(positions, chosen)  # (B, K, d)
    needs_rest = plan.guidance.passes > 1 and plan.guidance.renorm < 1
    rest = take(positions, np.concatenate([predicted, later], axis=1)) if needs_rest else where[:, :0]
    values = np.concatenate([where.reshape(plan.batch, -1), rest.reshape(plan.batch, -1)], axis=1)
    draws = np.zeros((steps + 1, *values.shape), np.float32)
    draws[0] = generator.normal_raw(size).take(values)
    drawn = np.flatnonzero(plan.schedule.draws_noise)
    draws[1 + drawn] = generator.normal_steps(size, len(drawn), values)
    used = where[0].size
    rest_noise = (
        compress(draws[:, :, used:]) if needs_rest else np.zeros((steps + 1, plan.batch, 1), np.float32)
    )
    return {
        "noise": draws[0, :, :used].reshape(where.shape),
        "step_noise": draws[1:, :, :used].reshape(steps, *where.shape),
        "rest": rest_noise[0],
        "step_rest_noise": rest_noise[1:],
    }


def compress(noise: Floats) -> Floats:
    """Short vectors (n, B, n) with the inner products of the given ones (n, B, values).

    The head only wants norms of sums of them: those depend on nothing else, and the values are many.
    """
    rows = noise.swapaxes(0, 1)  # (B, n, values)
    size, axes = np.linalg.eigh((rows @ rows.swapaxes(1, 2)).astype(np.float64))
    short = axes * np.sqrt(size.clip(min=0))[:, None]  # (B, n, n): short @ short.T is the product again
    return short.swapaxes(0, 1).astype(np.float32)
