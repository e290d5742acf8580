"""Guidance as the published pipeline writes it: passes stacked along the batch, predictions combined after.

For the eager pipeline, and on purpose apart from nova_export/runtime/guidance.py, which turns every option
into weights of a sum. Passes stand in the order conditional, unconditional, extra.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nova_export.config import NovaConfig
from nova_export.runtime.request import Request


@dataclass(frozen=True)
class Guider:
    """The guidance options of a request, and the `scale` of the moment: it may grow over AR steps."""

    scale: float
    final: float
    least: float
    trunc: float
    renorm: float
    image: float
    spatiotemporal: float

    @classmethod
    def of(cls, request: Request, config: NovaConfig) -> Guider:
        scale = request.guidance(config).scale
        return cls(
            scale=scale,
            final=scale,
            least=request.min_guidance_scale or scale,
            trunc=request.guidance_trunc,
            renorm=request.guidance_renorm,
            image=request.image_guidance_scale,
            spatiotemporal=request.spatiotemporal_guidance_scale,
        )

    @property
    def passes(self) -> int:
        """G, as things stand."""
        if self.scale <= 1:
            return 1
        return 3 if self.image or self.spatiotemporal else 2

    def at(self, progress: float) -> Guider:
        """In an AR step of a frame; `progress` is (step + 1) / steps."""
        return replace(self, scale=self.least + (self.final - self.least) * progress)

    def is_over(self, timestep: float) -> bool:
        """Whether from this diffusion step on only the conditional pass runs."""
        return self.scale > 1 and timestep < self.trunc

    def conditional(self) -> Guider:
        """The conditional pass alone."""
        return replace(self, scale=1)

    def expand(self, x: Tensor, blank: Tensor | None = None) -> Tensor:
        """x (B, ...) for every pass: (G * B, ...). With image guidance pass 1 gets `blank`, where given."""
        passes = [x] * self.passes
        if self.image and blank is not None:
            passes[1] = blank.expand_as(x)
        return torch.cat(passes)

    def expand_text(self, c: Tensor) -> Tensor:
        """c (2 B, ...), prompts then negative prompts, or (B, ...) without guidance -> (G * B, ...)."""
        if self.passes < 3:
            return c
        text, null = c.chunk(2)
        return torch.cat([text, null, null if self.image else text])

    def combine(self, predictions: Tensor) -> Tensor:
        """(G * B, N, d) -> (B, N, d)."""
        if self.passes == 1:
            return predictions
        cond, uncond, *extra = predictions.chunk(self.passes)
        if self.image:
            guided = self._renormed(uncond + self.scale * (cond - extra[0]), cond)
            return guided + self.image * (extra[0] - uncond)
        guided = self._renormed(uncond + self.scale * (cond - uncond), cond)
        return guided + self.spatiotemporal * (cond - extra[0]) if extra else guided

    def _renormed(self, guided: Tensor, cond: Tensor) -> Tensor:
        """No longer than `cond`, but at least `renorm` of itself; norms per sample over the whole latent."""
        if self.renorm >= 1:
            return guided
        lengths = [torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for x in (cond, guided)]
        return guided * (lengths[0] / lengths[1]).clamp(self.renorm, 1)
