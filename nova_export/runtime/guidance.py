"""Guidance as weights: a guided prediction is a weighted sum of the passes' predictions.

Passes stand along the batch, in the order conditional, unconditional, extra. Pure functions of the arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nova_export.errors import UsageError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Guidance:
    """Every guidance option of the published pipeline."""

    scale: float = 5.0
    min_scale: float | None = None
    trunc: float = 0.0
    renorm: float = 1.0
    image_scale: float = 0.0
    spatiotemporal_scale: float = 0.0

    def __post_init__(self) -> None:
        given = {
            "guidance_scale": self.scale,
            "min_guidance_scale": 1.0 if self.min_scale is None else self.min_scale,
            "guidance_trunc": self.trunc,
            "guidance_renorm": self.renorm,
            "image_guidance_scale": self.image_scale,
            "spatiotemporal_guidance_scale": self.spatiotemporal_scale,
        }
        for name, value in given.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise UsageError(f"{name} is {value!r}; it must be a number, at least 0")
        if self.image_scale and self.spatiotemporal_scale:
            raise UsageError(
                "image_guidance_scale and spatiotemporal_guidance_scale both need the third pass; give one"
            )
        if (self.image_scale or self.spatiotemporal_scale) and self.scale <= 1:
            raise UsageError(f"a third guidance pass needs guidance_scale above 1, not {self.scale:g}")
        if self.min_scale is not None and self.min_scale < 1:
            raise UsageError(f"min_guidance_scale is {self.min_scale:g}; it must be at least 1")
        if not 0 <= self.renorm <= 1:
            raise UsageError(f"guidance_renorm is {self.renorm:g}; it must be 0 to 1")

    @property
    def passes(self) -> int:
        """G: 1 without guidance, 2 with it, 3 with image or spatiotemporal guidance."""
        if self.scale <= 1:
            return 1
        return 3 if self.image_scale or self.spatiotemporal_scale else 2

    @property
    def texts(self) -> tuple[int, ...]:
        """Which text each pass sees: 0 the prompt, 1 the negative prompt."""
        return (0, 1, 1 if self.image_scale else 0)[: self.passes]

    @property
    def blanks(self) -> tuple[bool, ...]:
        """Which passes see begin-of-video tokens instead of the previous frame, at every frame."""
        return (False, bool(self.image_scale), False)[: self.passes]

    def scale_at(self, progress: float) -> float:
        """Linear from min_scale to scale over a frame's AR steps; `progress` is (step + 1) / steps."""
        least = self.min_scale or self.scale
        return (self.scale - least) * progress + least

    def weights(self, progress: float, timesteps: Floats) -> tuple[Floats, Floats, Floats]:
        """Per diffusion step: weights (T, G) under the renorm, weights (T, G) added behind it, renorm (T, 1).

        Plain: u + g (c - u). Image: u + g (c - i), then + image_scale (i - u), i the pass with neither text
        nor start token. Spatiotemporal: plain, then + scale (c - p). Below `trunc` the conditional pass alone
        counts.
        """
        g = self.scale_at(progress)
        if self.passes == 1:
            under, behind = [1.0], [0.0]
        elif self.image_scale:
            under, behind = [g, 1.0, -g], [0.0, -self.image_scale, self.image_scale]
        elif self.spatiotemporal_scale:
            under, behind = [g, 1.0 - g, 0.0], [self.spatiotemporal_scale, 0.0, -self.spatiotemporal_scale]
        else:
            under, behind = [g, 1.0 - g], [0.0, 0.0]
        steps = len(timesteps)
        weights = np.tile(np.array(under, np.float32), (steps, 1))
        extra = np.tile(np.array(behind, np.float32), (steps, 1))
        renorm = np.full((steps, 1), self.renorm if self.passes > 1 else 1.0, np.float32)
        if self.passes > 1 and self.trunc:
            plain = timesteps.astype(np.float64) < self.trunc
            weights[plain], extra[plain], renorm[plain] = 0, 0, 1
            weights[plain, 0] = 1
        return weights, extra, renorm
