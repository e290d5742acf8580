"""NOVA's stages, declared once: exporter, verifier, builder and runtimes all read them from here.

Letters as in docs/model.md: B samples, G guidance passes ("rows" = G * B), C latent channels, D width, N
image tokens, P predicted, K predicted now, T diffusion steps. Cache rows are text tokens, then each frame's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nova_export.config import FREQUENCIES, MOTION_TOKENS, NovaConfig
from nova_export.lean_stages import DECODE, lean_decoder
from nova_export.spec import Axis, Stage, Tensor

MAX_BATCH = 256  # samples in one call
MAX_PASSES = 3  # guidance passes of one sample
MAX_FRAMES = 1024  # latent frames of one video
MAX_DIFFUSION_STEPS = 1000
LEAST_CACHE = 32  # rows; TensorRT-RTX 1.7 fails on caches of at most 30 ("more than one op named ... iota")

F32, I64 = "float32", "int64"


@dataclass(frozen=True)
class Limits:
    """The most that stages are made for: samples in one call, latent frames of one video.

    vae_tile: latents on a side of what the decoder gets; None for whole frames.
    """

    batch: int = MAX_BATCH
    frames: int = MAX_FRAMES
    vae_tile: int | None = None

    @property
    def rows(self) -> Axis:
        """Samples times guidance passes."""
        return Axis("rows", 1, min(2, MAX_PASSES * self.batch), MAX_PASSES * self.batch)


def stages(
    config: NovaConfig,
    limits: Limits = Limits(),
    lean_decode: str | None = None,
    head_steps: int | None = None,
) -> dict[str, Stage]:
    """Every stage of the checkpoint, in the order a run uses them.

    lean_decode: the number type of frames between the pieces of a lean decode; None decodes in one stage.
    head_steps: how many diffusion steps the head does in one call, unrolled; None makes it a loop over any
    number.
    """
    made = [
        _condition(config, limits),
        _temporal_encoder(config, limits),
        _spatial_encoder(config, limits),
        _diffusion_head(config, limits, head_steps),
    ]
    if not config.is_class_conditional:
        made.insert(0, _text_encoder(config, limits))
    if config.is_video:
        made.append(_vae_encoder(config))
    part = tuple(min(limits.vae_tile or size, size) for size in config.latent_size)
    made += lean_decoder(config, lean_decode, part) if lean_decode else [_vae_decoder(config, part)]
    return {stage.name: stage for stage in made}


def _text_encoder(config: NovaConfig, limits: Limits) -> Stage:
    """Phi's last hidden states. Causal, so tokens behind a prompt's own change nothing."""
    assert config.text_dim
    return Stage(
        name="text_encoder",
        module="reference_model.text_encoder:TextEncoder",
        part="text_encoder",
        prefixes=("model.",),
        phase="text",
        inputs=(Tensor("token_ids", I64, ("prompts", "length")),),
        outputs=(Tensor("text_states", F32, ("prompts", "length", config.text_dim)),),
        axes=(
            Axis("prompts", 1, 1, 2 * limits.batch),
            Axis("length", 1, min(32, config.text_len), config.text_len),
        ),
    )


def _condition(config: NovaConfig, limits: Limits) -> Stage:
    """What stands before the first frame: projected text (null rows where it ends) and motion, or a class."""
    common: dict[str, Any] = {"part": "transformer", "phase": "text"}
    output = Tensor("condition", F32, ("rows", config.condition_tokens, config.temporal.width))
    if config.text_dim is None:
        return Stage(
            name="condition",
            module="reference_model.condition:ClassCondition",
            prefixes=("label_embed.",),
            inputs=(Tensor("class_ids", I64, ("rows",)),),
            outputs=(output,),
            axes=(limits.rows,),
            **common,
        )
    inputs = [
        Tensor("text_states", F32, ("rows", config.text_len, config.text_dim)),
        Tensor("text_lengths", I64, ("rows",)),
    ]
    if config.is_video:
        inputs.append(Tensor("motion", F32, ("rows", MOTION_TOKENS)))
    return Stage(
        name="condition",
        module="reference_model.condition:TextCondition",
        prefixes=("text_embed.", "motion_embed."),
        inputs=tuple(inputs),
        outputs=(output,),
        axes=(limits.rows,),
        **common,
    )


def _temporal_encoder(config: NovaConfig, limits: Limits) -> Stage:
    """One frame: first frame with `text` = the condition, later ones with no text and the cache filled.

    The caches hold `capacity` rows, zero until written; the stage writes its own rows in place behind the
    first `cache_length` and attends to what is filled, so no frame copies what earlier frames left.
    """
    width = config.temporal.width
    inputs = [
        Tensor("text", F32, ("rows", "text", width)),
        Tensor("latents", F32, ("rows", config.latent_channels, *config.latent_size)),
        Tensor("is_blank", "bool", ("rows",)),
        Tensor("frame_position", F32, (1,)),
        Tensor("cache_length", I64, (1,)),
    ]
    if config.mixer_rank is not None:
        inputs.append(Tensor("first_context", F32, ("rows", config.frame_tokens, width)))
    outputs = [Tensor("context", F32, ("rows", config.frame_tokens, width))]
    for name in cache_names(config):
        inputs.append(Tensor(name, F32, ("rows", "capacity", width)))
        outputs.append(Tensor(f"new_{name}", F32, ("rows", "capacity", width), alias=name))
    least = config.condition_tokens + config.frame_tokens
    usual = config.condition_tokens + min(config.base_frames, limits.frames) * config.frame_tokens
    most = max(config.condition_tokens + limits.frames * config.frame_tokens, LEAST_CACHE)
    return Stage(
        name="temporal_encoder",
        module="reference_model.temporal:TemporalEncoder",
        part="transformer",
        prefixes=("video_encoder.", "video_pos_embed.", "mask_embed.bos_token"),
        phase="frame",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        axes=(limits.rows, Axis("text", 0, 0, config.condition_tokens), Axis("capacity", least, usual, most)),
    )


def cache_names(config: NovaConfig) -> list[str]:
    """Names of the temporal encoder's caches: keys and values of every layer."""
    return [f"{kind}_cache_{layer}" for layer in range(config.temporal.depth) for kind in ("key", "value")]


def _spatial_encoder(config: NovaConfig, limits: Limits) -> Stage:
    """Both halves: from the P tokens predicted so far to what the head needs for the next K."""
    tokens = config.num_tokens
    return Stage(
        name="spatial_encoder",
        module="reference_model.spatial:SpatialEncoder",
        part="transformer",
        prefixes=("image_encoder.", "mask_embed.mask_token"),
        phase="step",
        inputs=(
            Tensor("context", F32, ("rows", config.frame_tokens, config.temporal.width)),
            Tensor("tokens", F32, ("rows", "predicted", config.token_dim)),
            Tensor("predicted_ids", I64, ("rows", "predicted")),
            Tensor("next_ids", I64, ("rows", "next")),
        ),
        outputs=(Tensor("z", F32, ("rows", "next", config.spatial.width)),),
        axes=(limits.rows, Axis("predicted", 0, tokens // 2, tokens), _next_axis(config)),
    )


def _next_axis(config: NovaConfig) -> Axis:
    return Axis("next", 1, max(1, config.num_tokens // 40), config.num_tokens)


def _diffusion_head(config: NovaConfig, limits: Limits, unrolled: int | None) -> Stage:
    """All diffusion steps of one AR step. Per step: x' = a x + b eps + s noise, one row of `step_*` each.

    eps = renorm(sum over passes of guidance * eps_pass) + sum of extra_guidance * eps_pass; see
    runtime/schedule.py and runtime/guidance.py for how the rows are made.

    unrolled: the one number of steps of a call, and calls go on from one another: runtime/diffusion.py.
    """
    width = config.spatial.width
    steps = Axis("steps", 1, 25, MAX_DIFFUSION_STEPS)
    outputs = [Tensor("denoised", F32, ("samples", "next", config.token_dim))]
    if unrolled:
        steps = Axis("steps", unrolled, unrolled, unrolled)
        outputs.append(Tensor("next_rest", F32, ("samples", "rest")))
    return Stage(
        name="diffusion_head",
        module=f"reference_model.head:{'UnrolledHead' if unrolled else 'DiffusionHead'}",
        part="transformer",
        prefixes=("image_decoder.",),
        phase="step",
        inputs=(
            Tensor("z", F32, ("passes", "samples", "next", width)),
            Tensor("noise", F32, ("samples", "next", config.token_dim)),
            Tensor("step_noise", F32, ("steps", "samples", "next", config.token_dim)),
            Tensor("step_coefficients", F32, ("steps", 3)),
            Tensor("step_frequencies", F32, ("steps", FREQUENCIES)),
            Tensor("step_guidance", F32, ("steps", "passes")),
            Tensor("step_extra_guidance", F32, ("steps", "passes")),
            Tensor("step_renorm", F32, ("steps", 1)),
            Tensor("rest", F32, ("samples", "rest")),
            Tensor("step_rest_noise", F32, ("steps", "samples", "rest")),
        ),
        outputs=tuple(outputs),
        axes=(
            Axis("passes", 1, 2, MAX_PASSES),
            Axis("samples", 1, 1, limits.batch),
            _next_axis(config),
            steps,
            Axis("rest", 1, 1, MAX_DIFFUSION_STEPS + 1),
        ),
    )


def _vae_decoder(config: NovaConfig, largest: tuple[int, ...]) -> Stage:
    """One tile of latents, at most (h, w) large and scaled as the model makes them, to pixels in [-1, 1]."""
    height, width = largest
    return Stage(
        name="vae_decoder",
        module="reference_model.vae:VaeDecoder",
        part="vae",
        prefixes=("decoder.", "post_quant_conv."),
        phase=DECODE,
        inputs=(
            Tensor(
                "latents", F32, (1, config.latent_channels, "latent_frames", "latent_height", "latent_width")
            ),
        ),
        outputs=(Tensor("pixels", F32, (1, 3, "frames", "height", "width")),),
        axes=(
            Axis("latent_frames", 1, config.tiling.latent_frames, config.tiling.latent_frames),
            Axis("latent_height", 1, height, height),
            Axis("latent_width", 1, width, width),
        ),
    )


def _vae_encoder(config: NovaConfig) -> Stage:
    """An image to the mean and deviation of its latents' posterior, scaled as the model takes them."""
    latents = (1, config.latent_channels, "latent_height", "latent_width")
    stride = config.image_size[0] // config.latent_size[0]
    height, width = config.image_size
    return Stage(
        name="vae_encoder",
        module="reference_model.vae:VaeEncoder",
        part="vae",
        prefixes=("encoder.", "quant_conv."),
        phase="image",
        inputs=(Tensor("pixels", F32, (1, 3, "height", "width")),),
        outputs=(Tensor("latents_mean", F32, latents), Tensor("latents_std", F32, latents)),
        axes=(Axis("height", stride, height, height), Axis("width", stride, width, width)),
    )
