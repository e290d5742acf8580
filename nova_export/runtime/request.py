"""What a caller asks for, checked against the checkpoint before anything runs.

Names and defaults are the published pipeline's, but that a checkpoint may name a guidance_scale of its own;
`seed` draws as torch's CPU generator.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_export.config import NUM_CLASSES, NovaConfig
from nova_export.errors import InputError, UsageError
from nova_export.runtime.generate import Plan
from nova_export.runtime.guidance import Guidance
from nova_export.runtime.schedule import make_schedule
from nova_export.stages import MAX_BATCH, MAX_FRAMES

FPS = 12  # frames a second that published checkpoints are trained and conditioned on

HELP = {  # one line an argument, for the command line and the docs
    "negative_prompt": "What to guide away from; the empty prompt if not given.",
    "image": "Image to video: a file that becomes the first frame (video checkpoints).",
    "num_images_per_prompt": "Samples of each prompt.",
    "max_latent_length": "Latent frames to generate; 1 makes an image.",
    "num_inference_steps": "Autoregressive steps of a frame.",
    "num_diffusion_steps": "Denoising steps of each autoregressive step.",
    "guidance_scale": "Classifier-free guidance; 1 or less is off. If not given, the checkpoint's own, or 5.",
    "min_guidance_scale": "Guidance at the first AR step, growing linearly to guidance_scale at the last.",
    "guidance_trunc": "Below this timestep only the conditional pass counts.",
    "guidance_renorm": "Least factor that scales a guided prediction to the conditional's norm; 1 is off.",
    "image_guidance_scale": "Guidance by the previous frames, with a third pass.",
    "spatiotemporal_guidance_scale": "Guidance against a perturbed third pass.",
    "flow_shift": "Shift of the timestep schedule (flow-matching checkpoints).",
    "motion_flow": "Mean optical-flow magnitude to ask for (video checkpoints).",
    "seed": "Draws as torch's CPU generator; a random one if not given.",
}

NUMBERS = (
    "guidance_trunc",
    "guidance_renorm",
    "image_guidance_scale",
    "spatiotemporal_guidance_scale",
    "motion_flow",
)

Prompt = str | int | Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class Request:
    """Arguments of one generation.

    prompt: a text or several; for class-conditional checkpoints class ids, 0 to 999.
    image: path, PIL image or uint8 (H, W, 3) array that becomes the first frame (video checkpoints).
    num_inference_steps: AR steps a frame; num_diffusion_steps: denoising steps of each.
    max_latent_length: latent frames; 1 makes an image.
    motion_flow: mean optical-flow magnitude asked for. seed: None draws one.
    The guidance arguments are those of `Guidance`.
    """

    prompt: Prompt
    negative_prompt: Prompt | None = None
    image: Any = None
    num_images_per_prompt: int = 1
    max_latent_length: int = 1
    num_inference_steps: int = 64
    num_diffusion_steps: int = 25
    guidance_scale: float | None = None
    min_guidance_scale: float | None = None
    guidance_trunc: float = 0.0
    guidance_renorm: float = 1.0
    image_guidance_scale: float = 0.0
    spatiotemporal_guidance_scale: float = 0.0
    flow_shift: float | None = None
    motion_flow: float = 5.0
    seed: int | None = None

    def resolved_seed(self) -> int:
        """The seed given, or a fresh one of 32 bits."""
        return secrets.randbits(32) if self.seed is None else self.seed

    def plan(self, config: NovaConfig) -> Plan:
        """Check all, decide sizes and tables. Raises UsageError or InputError naming the argument."""
        for name in (
            "num_images_per_prompt",
            "max_latent_length",
            "num_inference_steps",
            "num_diffusion_steps",
        ):
            _positive(name, getattr(self, name))
        for name in NUMBERS:
            _finite(name, getattr(self, name))
        for name in ("guidance_scale", "min_guidance_scale", "flow_shift"):
            if getattr(self, name) is not None:
                _finite(name, getattr(self, name))
        if self.max_latent_length > 1 and not config.is_video:
            raise UsageError(
                f"max_latent_length is {self.max_latent_length}, but this is an image checkpoint; use 1"
            )
        if self.max_latent_length > MAX_FRAMES:
            raise UsageError(f"max_latent_length is {self.max_latent_length}; the most is {MAX_FRAMES}")
        if self.image is not None and not config.is_video:
            raise UsageError("image to video needs a video checkpoint; this is an image checkpoint")
        guidance = self.guidance(config)
        if self.negative_prompt is not None and guidance.scale <= 1:
            raise UsageError(
                f"guidance_scale is {guidance.scale:g}, at which a negative_prompt has no effect; "
                "raise it above 1 or leave the negative_prompt out"
            )
        batch = len(self.prompts(config)) * self.num_images_per_prompt
        if batch > MAX_BATCH:
            raise UsageError(f"{batch} samples in one call; the most is {MAX_BATCH}")
        return Plan(
            config=config,
            batch=batch,
            num_frames=self.max_latent_length,
            num_inference_steps=self.num_inference_steps,
            schedule=make_schedule(config.scheduler, self.num_diffusion_steps, self.flow_shift),
            guidance=guidance,
        )

    def guidance(self, config: NovaConfig) -> Guidance:
        """The guidance arguments together, with the checkpoint's own scale if none is given."""
        return Guidance(
            scale=config.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            min_scale=self.min_guidance_scale,
            trunc=self.guidance_trunc,
            renorm=self.guidance_renorm,
            image_scale=self.image_guidance_scale,
            spatiotemporal_scale=self.spatiotemporal_guidance_scale,
        )

    def prompts(self, config: NovaConfig) -> list[Any]:
        """The prompts as a list of texts, or of class ids."""
        return _prompt_list("prompt", self.prompt, config, NUM_CLASSES - 1)

    def negative_prompts(self, config: NovaConfig) -> list[Any]:
        """As many as prompts; the empty text, or the null class, where none is given."""
        count = len(self.prompts(config))
        if self.negative_prompt is None:
            return [NUM_CLASSES if config.is_class_conditional else ""] * count
        given = _prompt_list("negative_prompt", self.negative_prompt, config, NUM_CLASSES)
        if len(given) == 1:
            return given * count
        if len(given) != count:
            raise UsageError(f"{len(given)} negative prompts for {count} prompts; give one, or one for each")
        return given


def _prompt_list(name: str, value: Any, config: NovaConfig, last_class: int) -> list[Any]:
    kind = int if config.is_class_conditional else str
    values = [value] if isinstance(value, (str, int)) else value
    if isinstance(values, (bytes, Path)) or not isinstance(values, Sequence):
        raise InputError(f"{name} must be {_kind_name(kind)} or a list of them, not {type(value).__name__}")
    if not values:
        raise InputError(f"{name} is an empty list; give at least one")
    for item in values:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise InputError(f"{name} must be {_kind_name(kind)} for this checkpoint, not {item!r}")
        if isinstance(item, str) and not _is_unicode(item):
            raise InputError(f"{name} {item!r} is no text: it has bytes that are not UTF-8")
        if isinstance(item, int) and not 0 <= item <= last_class:
            raise InputError(f"{name}: class id {item} is out of range; ids are 0 to {last_class}")
    return list(values)


def _is_unicode(text: str) -> bool:
    """False for the lone surrogates that stand for undecodable bytes of a command line."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind_name(kind: type) -> str:
    return "a class id (int)" if kind is int else "text (str)"


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} is {value!r}; it must be a whole number, at least 1")


def _finite(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{name} is {value!r}; it must be a number, at least 0")
