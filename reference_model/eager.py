"""The eager pipeline: NOVA as the published PyTorch package computes it. Oracle, and honest baseline.

Loop, guidance and schedulers are written apart from nova_export/runtime, in the published form: draws of
the full latent, every diffusion step and the spatial encoder over all N tokens and guidance passes, caches by
concatenation. Only the last partial VAE tile differs: it is decoded too. Shared with the runtime are the
checks of a request, and which latents make a VAE tile.
Letters: B samples, G guidance passes, rows = G * B, N tokens of a frame, P predicted, K predicted now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from nova_export.config import FREQUENCIES, NovaConfig
from nova_export.errors import Cancelled
from nova_export.runtime.decode import tiles
from nova_export.runtime.generate import Step
from nova_export.runtime.media import load_image
from nova_export.runtime.pipeline import Output
from nova_export.runtime.request import FPS, Request
from nova_export.stages import stages
from reference_model.checkpoint import load_module
from reference_model.guidance import Guider
from reference_model.head import DiffusionHead
from reference_model.layers import rotate
from reference_model.schedulers import Draw, Scheduler, make_scheduler
from reference_model.spatial import SpatialEncoder
from reference_model.temporal import TemporalEncoder
from reference_model.tokenizer import read_tokenizer

Observe = Callable[[str, Tensor], object]  # name of an intermediate tensor, and the tensor
Callback = Callable[[Step], object]


class Draws:
    """Random numbers of one torch CPU generator, drawn as `dtype`, then made what the model computes in."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        model_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.generator, self.dtype = torch.Generator("cpu").manual_seed(seed), dtype
        self.device, self.model_dtype = device, model_dtype

    def uniform(self, shape: Sequence[int]) -> Tensor:
        # Never cast: only the order of its values counts.
        drawn = torch.rand(tuple(shape), generator=self.generator, dtype=self.dtype, device="cpu")
        return drawn.to(self.device)

    def normal(self, shape: Sequence[int]) -> Tensor:
        drawn = torch.randn(tuple(shape), generator=self.generator, dtype=self.dtype, device="cpu")
        return drawn.to(self.device, self.model_dtype)


@dataclass
class Memory:
    """What the temporal encoder keeps between frames: every layer's (key, value), and frame 0's context."""

    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    first_context: Tensor | None = None


@dataclass(frozen=True)
class EagerPipeline:
    """All weights at once, as the published pipeline holds them.

    draw_dtype: float64 replays videos that were made while torch's default dtype was float64. device, dtype:
    where the modules are, and their number type; see `to`.
    """

    config: NovaConfig
    modules: dict[str, Any]  # by stage
    tokenizer: Tokenizer | None = None
    draw_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_checkpoint(cls, folder: str | Path, draw_dtype: torch.dtype = torch.float32) -> EagerPipeline:
        """Load a published checkpoint folder. Raises CheckpointError."""
        folder = Path(folder)
        config = NovaConfig.from_checkpoint(folder)
        modules = {name: load_module(stage, config, folder) for name, stage in stages(config).items()}
        tokenizer = None if config.is_class_conditional else read_tokenizer(folder / "tokenizer")
        return cls(config, modules, tokenizer, draw_dtype)

    def to(self, device: str, dtype: torch.dtype) -> EagerPipeline:
        """On another device, in another number type; its modules are moved."""
        modules = {name: module.to(device, dtype) for name, module in self.modules.items()}
        return replace(self, modules=modules, device=device, dtype=dtype)

    def __call__(
        self,
        prompt: Any,
        *,
        callback: Callback | None = None,
        observe: Observe = lambda *_: None,
        **arguments: Any,
    ) -> Output:
        """Generate and decode. Arguments are those of `Request`; `callback` as in nova_export's Pipeline.

        observe: told "condition", for every frame "context", and for every AR step "pred_ids", "z", "noise"
        and "denoised" (tokens), as they are made.
        """
        return self.run(Request(prompt=prompt, **arguments), callback, observe)

    @torch.inference_mode()
    def run(
        self, request: Request, callback: Callback | None = None, observe: Observe = lambda *_: None
    ) -> Output:
        """The same for a `Request`. Raises UsageError or InputError as it does, and Cancelled."""
        request.plan(self.config)  # checks all arguments
        seed = request.resolved_seed()
        draws = Draws(seed, self.draw_dtype, self.device, self.dtype)
        with torch.device(self.device):
            frames = list(self._frames(request, draws, callback, observe))
            latents = torch.stack(frames, dim=2)  # (B, C, L, h, w)
            return Output(self.decode(latents), _numpy(latents), seed)

    def _frames(
        self, request: Request, draws: Draws, callback: Callback | None, observe: Observe
    ) -> Iterator[Tensor]:
        """Latents (B, C, h, w) of every frame."""
        config, guider, num_frames = self.config, Guider.of(request, self.config), request.max_latent_length
        scheduler = make_scheduler(config.scheduler, request.num_diffusion_steps, request.flow_shift)
        given = None if request.image is None else self.encode_image(request.image, draws)
        condition = guider.expand_text(self.condition(request))  # (rows, tokens, D)
        observe("condition", condition)
        batch = len(request.prompts(config)) * request.num_images_per_prompt
        shape = batch, config.latent_channels, *config.latent_size
        latents = torch.zeros(shape, dtype=self.dtype)
        memory, order = Memory(), None
        for t in range(num_frames):
            # 1. What the frames before say about this one.
            time = torch.tensor([float(t)], dtype=self.dtype)
            time = time / (1 if config.rotary else num_frames / config.base_frames)
            context = encode_frame(self.modules["temporal_encoder"], guider, memory, latents, condition, time)
            observe("context", context)
            if t == 0 and given is not None:
                latents = given.expand(latents.shape)
                yield latents
                continue
            # 2. One random order for the whole video, drawn at the first step of the first generated frame.
            if order is None:
                order = draws.uniform((batch, config.num_tokens, 1)).argsort(dim=1)
            # 3. The frame, set by set.
            sets, latents = split(order, request.num_inference_steps), torch.zeros_like(latents)
            for i, now in enumerate(sets):
                earlier = torch.cat([order[:, :0], *sets[:i]], dim=1)
                grown = guider.at((i + 1) / len(sets))
                latents = latents + self.predict(
                    latents, context, earlier, now, grown, scheduler, draws.normal, observe
                )
                step = Step(t, num_frames, i, len(sets), partial(_numpy, latents))
                if callback is not None and callback(step) is False:
                    raise Cancelled(f"cancelled at frame {t + 1} of {num_frames}, step {i + 1}")
            yield latents

    def predict(
        self,
        latents: Tensor,  # (B, C, h, w), zero where not predicted yet
        context: Tensor,  # (rows, M, D)
        earlier: Tensor,  # (B, P, 1)
        now: Tensor,  # (B, K, 1)
        guider: Guider,
        scheduler: Scheduler,
        draw: Draw,
        observe: Observe = lambda *_: None,
    ) -> Tensor:
        """One AR step: what it adds to the latents, (B, C, h, w), zero but at the K tokens of `now`."""
        spatial: SpatialEncoder = self.modules["spatial_encoder"]
        patches = spatial.image_encoder.patch_embed
        z = encode_tokens(spatial, guider, latents, context, earlier)
        noise = draw(latents.shape)
        for name, tensor in (("pred_ids", now), ("z", z), ("noise", noise)):
            observe(name, tensor)
        sample = denoise(self.modules["diffusion_head"], guider, scheduler, z, noise, now, draw)
        tokens = patches.patchify(sample)
        observe("denoised", tokens)
        chosen = torch.zeros_like(tokens[..., :1]).scatter(1, now, 1)
        return patches.unpatchify(tokens * chosen, self.config.token_grid)

    def condition(self, request: Request) -> Tensor:
        """What stands before the first frame (B or 2 B, tokens, D): prompts, then negative ones if guided."""
        texts = request.prompts(self.config)
        if request.guidance(self.config).scale > 1:
            texts = texts + request.negative_prompts(self.config)
        module = self.modules["condition"]
        if self.config.is_class_conditional:
            return module(torch.tensor(texts).repeat_interleave(request.num_images_per_prompt))
        encoded = self.encode_text(texts)
        states, lengths = (x.repeat_interleave(request.num_images_per_prompt, dim=0) for x in encoded)
        if not self.config.is_video:
            return module(states, lengths)
        motion = torch.tensor([float(request.motion_flow), FPS], dtype=self.dtype).expand(len(states), 2)
        return module(states, lengths, motion)

    def encode_text(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (texts, len, text dim) of padded prompts, and their lengths (texts,)."""
        assert self.tokenizer is not None
        length = self.config.text_len
        ids = [self.tokenizer.encode(text, add_special_tokens=False).ids[:length] for text in texts]
        # The encoder is causal: with what a row is padded changes nothing.
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        return self.modules["text_encoder"](padded), torch.tensor([len(row) for row in ids])

    def encode_image(self, image: Any, draws: Draws) -> Tensor:
        """One draw of an image's posterior (1, C, h, w), scaled."""
        array, _ = load_image(image, *self.config.image_size)
        pixels = torch.from_numpy(np.array(array)).float().sub(127.5).div(127.5).permute(2, 0, 1)[None]
        mean, std = self.modules["vae_encoder"](pixels.to(self.device, self.dtype))
        if not self.config.vae.get("double_z", True):
            return mean  # no variance: nothing is drawn
        return mean + std * draws.normal(mean.shape)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """(B, C, L, h, w) -> uint8 (B, F, H, W, 3), sample by sample, tile by tile."""
        decoder, cuts = self.modules["vae_decoder"], list(tiles(self.config.tiling, latents.shape[2]))
        videos = []
        for sample in latents.split(1):
            parts = [decoder(sample[:, :, cut.start : cut.stop])[:, :, cut.drop :] for cut in cuts]
            videos.append(torch.cat(parts, dim=2))
        pixels = torch.cat(videos).permute(0, 2, 3, 4, 1)
        return pixels.mul(127.5).add(127.5).clamp(0, 255).byte().cpu().numpy()


def _numpy(latents: Tensor) -> np.ndarray:
    return latents.float().cpu().numpy()


def split(order: Tensor, num_steps: int) -> list[Tensor]:
    """The order (B, N, 1) cut into each AR step's tokens: i steps leave round(N cos(pi i / 2S))."""
    tokens = order.shape[1]
    left = [round(tokens * float(np.cos(np.pi / 2 * i / num_steps))) for i in range(num_steps + 1)]
    cuts = [tokens - count for count in left]
    return [order[:, start:stop] for start, stop in pairwise(cuts) if stop > start]


def encode_frame(
    module: TemporalEncoder, guider: Guider, memory: Memory, previous: Tensor, condition: Tensor, time: Tensor
) -> Tensor:
    """Context (rows, M, D) of the next frame, from the latents before it (B, C, h, w). Adds to `memory`.

    time (1,): the frame's number, in units of the trained clip where positions are absolute.
    """
    encoder, is_first = module.video_encoder, not memory.caches
    blank = module.mask_embed.bos_token
    x = encoder.patch_embed(previous)  # (B, M, D)
    x = blank.expand_as(x) if is_first else x
    if not module.config.rotary:
        x = x + module.video_pos_embed(time) + module.table
    x = guider.expand(x, blank)
    text = condition if is_first else condition[:, :0]
    rotary = module.rotary(text.shape[1], time) if module.config.rotary else None
    x, caches = torch.cat([text, x], dim=1), []
    for layer, block in enumerate(encoder.blocks):
        q, k, v = (block.attn.split_heads(part) for part in block.attn.qkv(x).chunk(3, dim=-1))
        q, k = (q, k) if rotary is None else (rotate(q, *rotary), rotate(k, *rotary))
        if not is_first:
            k, v = (torch.cat(pair, dim=2) for pair in zip(memory.caches[layer], (k, v), strict=True))
        caches.append((k, v))
        x = block.feed_forward(x + block.norm1(block.attn.attend(q, k, v)))
    memory.caches = caches
    x = encoder.norm(x[:, text.shape[1] :])
    if memory.first_context is None:
        memory.first_context = x
        return x
    return x if module.config.mixer_rank is None else module.mix(memory.first_context, x)


def encode_tokens(
    module: SpatialEncoder, guider: Guider, latents: Tensor, context: Tensor, earlier: Tensor
) -> Tensor:
    """z (rows, N, D) of all tokens, from context (rows, M, D) and latents (B, C, h, w).

    earlier (B, P, 1): the tokens that the latents already hold.
    """
    encoder, length = module.image_encoder, context.shape[1]
    half = len(encoder.blocks) // 2
    x = encoder.patch_embed(latents)  # (B, N, D)
    masked = torch.ones_like(x[..., :1]).scatter(1, earlier, 0)
    x = guider.expand(x * (1 - masked) + module.mask_embed.mask_token * masked)
    ids = guider.expand(earlier)  # (rows, P, 1)
    some = every = None
    if module.config.rotary:
        some = module.rotary(ids[..., 0], length)
        every = module.rotary(torch.arange(module.config.num_tokens)[None], length)
    else:
        x = x + module.table
    known = torch.cat([context, x.gather(1, ids.expand(-1, -1, x.shape[-1]))], dim=1)
    for block in encoder.blocks[:half]:
        known = block(known, some)
    context, known = known[:, :length], known[:, length:]
    x = torch.cat([context, x.scatter(1, ids.expand_as(known), known)], dim=1)
    for block in encoder.blocks[half:]:
        x = block(x, every)
    return encoder.norm(x[:, length:])


def denoise(
    module: DiffusionHead,
    guider: Guider,
    scheduler: Scheduler,
    z: Tensor,  # (rows, N, D)
    sample: Tensor,  # (B, C, h, w): noise
    now: Tensor,  # (B, K, 1)
    draw: Draw,
) -> Tensor:
    """All diffusion steps of an AR step over the whole latent (B, C, h, w), of which the K tokens count."""
    network = module.image_decoder
    grid = (sample.shape[2] // network.patch_embed.patch, sample.shape[3] // network.patch_embed.patch)
    ids = guider.expand(now)
    for index, timestep in enumerate(scheduler.timesteps):
        if guider.is_over(float(timestep)):
            z, ids = (x.chunk(guider.passes)[0] for x in (z, ids))
            guider = guider.conditional()
        predictions = predict_noise(module, guider.expand(sample), timestep.expand(len(z)), z, ids)
        guided = network.patch_embed.unpatchify(guider.combine(predictions), grid)
        sample = scheduler.step(index, guided, sample, draw)
    return sample


def predict_noise(module: DiffusionHead, noisy: Tensor, timesteps: Tensor, z: Tensor, ids: Tensor) -> Tensor:
    """noisy (rows, C, h, w), timesteps (rows,), z (rows, N, D), ids (rows, K, 1) -> (rows, N, p * p * C).

    Tokens that are not predicted now come out as they are.
    """
    network = module.image_decoder
    x, tokens = network.patch_embed(noisy), network.patch_embed.patchify(noisy)
    x, z = (each.gather(1, ids.expand(-1, -1, each.shape[-1])) for each in (x, z))  # (rows, K, width)
    embed = network.time_cond_embed
    condition = embed.condition_proj(z) + embed.timestep_proj(timestep_features(timesteps).to(z))[:, None]
    for block in network.blocks:
        x = block(x, condition)
    scale, shift = network.norm.statistics(condition)
    x = network.head(network.norm.norm(x) * (1 + scale) + shift)
    return tokens.scatter(1, ids.expand_as(x), x)


def timestep_features(timesteps: Tensor) -> Tensor:
    """(rows,) -> (rows, 256): cos, then sin, of 128 frequencies 10000^(-i/128)."""
    half = FREQUENCIES // 2
    rates = torch.exp(torch.arange(half) * (-np.log(10000) / half))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
