"""Several requests in one loop: each with rows of its own in every call, and noise of its own.

A request's result is what it would have been alone: its rows see no others, and its draws come from its own
generator, in the order and of the sizes that they would have had. Sizes of loops and tables are shared, so
only requests of one `form` can go together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nova_export.config import NovaConfig
from nova_export.runtime.generate import Plan
from nova_export.runtime.noise import Noise, RawNoise
from nova_export.runtime.request import Request
from nova_export.runtime.runner import Held

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """A request, or several, as the loops take it. `first_frame` (B, C, h, w) is None without an image."""

    plan: Plan
    generator: Noise
    condition: Held  # (rows, text and motion tokens, D)
    first_frame: Floats | None = None


def form(request: Request, config: NovaConfig) -> Hashable:
    """What requests must have in common to go together: all but prompts, image, motion, seed and samples."""
    return (
        request.max_latent_length,
        request.num_inference_steps,
        request.num_diffusion_steps,
        request.flow_shift or None,
        request.guidance(config),
        request.image is None,
    )


def join(prepared: Sequence[Prepared]) -> Prepared:
    """Requests of one form as one: samples in order, in every pass."""
    if len(prepared) == 1:
        return prepared[0]
    first = prepared[0].plan
    sizes = [each.plan.batch for each in prepared]
    passes = [
        np.asarray(each.condition).reshape(first.guidance.passes, each.plan.batch, *each.condition.shape[1:])
        for each in prepared
    ]
    condition = np.concatenate(passes, axis=1)  # (G, B, tokens, D)
    first_frames = [each.first_frame for each in prepared if each.first_frame is not None]
    return Prepared(
        plan=replace(first, batch=sum(sizes)),
        generator=JointGenerator([each.generator for each in prepared], sizes),
        condition=condition.reshape(-1, *condition.shape[2:]),
        first_frame=np.concatenate(first_frames) if first_frames else None,
    )


class JointGenerator:
    """The draws of tensors whose samples belong to several requests, each drawing its own with its generator.

    sizes: samples of each. Positions of values are those in the whole tensor, the samples along their first
    axis, as `draw_noise` asks for them.
    """

    def __init__(self, generators: Sequence[Noise], sizes: Sequence[int]) -> None:
        self._generators, self._sizes = generators, sizes

    def uniform(self, shape: Sequence[int]) -> Floats:
        """(B, ...) in [0, 1)."""
        return self._in_order(lambda generator, size: generator.uniform((size, *shape[1:])))

    def normal(self, shape: Sequence[int]) -> Floats:
        """(B, ...)."""
        return self._in_order(lambda generator, size: generator.normal((size, *shape[1:])))

    def normal_raw(self, size: int) -> RawNoise:
        """The draws of one normal tensor of `size` values in all."""
        each = size // sum(self._sizes)  # values of a sample
        raws = [
            generator.normal_raw(each * samples)
            for generator, samples in zip(self._generators, self._sizes, strict=True)
        ]
        return _JointDraws(raws, self._sizes, each)

    def normal_steps(self, size: int, steps: int, flat_indices: NDArray[np.int64]) -> Floats:
        """(steps, B, ...): the values at `flat_indices` (B, ...) of `steps` normals, one after another."""
        each = size // sum(self._sizes)
        parts = [
            generator.normal_steps(each * samples, steps, indices)
            for generator, samples, indices in zip(
                self._generators, self._sizes, _own_indices(flat_indices, self._sizes, each), strict=True
            )
        ]
        return np.concatenate(parts, axis=1)

    def _in_order(self, draw: Callable[[Noise, int], Floats]) -> Floats:
        pairs = zip(self._generators, self._sizes, strict=True)
        return np.concatenate([draw(generator, size) for generator, size in pairs])


@dataclass(frozen=True)
class _JointDraws:
    """One normal tensor of several requests, of `each` values a sample, not yet transformed."""

    raws: Sequence[RawNoise]
    sizes: Sequence[int]
    each: int

    def take(self, flat_indices: NDArray[np.int64]) -> Floats:
        indices = _own_indices(flat_indices, self.sizes, self.each)
        return np.concatenate([raw.take(own) for raw, own in zip(self.raws, indices, strict=True)])


def _own_indices(flat_indices: NDArray[np.int64], sizes: Sequence[int], each: int) -> list[NDArray[np.int64]]:
    """Positions in the whole tensor (B, ...) as positions in the tensor of each request."""
    ends = np.cumsum(sizes)
    parts = np.split(flat_indices, ends[:-1])
    return [part - each * (end - size) for part, end, size in zip(parts, ends, sizes, strict=True)]
