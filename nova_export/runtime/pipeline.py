"""Pipeline: a bundle, opened, that makes images and videos. No torch.

pipe = nova_export.load("bundle/")
out = pipe("a red circle moving right", max_latent_length=9, seed=1)
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_export.bundle import Bundle
from nova_export.config import NovaConfig
from nova_export.errors import Cancelled, InputError
from nova_export.runtime.decode import Frames, Tile, decode_tile, decoder_of, tiles
from nova_export.runtime.generate import Floats, Plan, Step, generate_latents
from nova_export.runtime.joint import Prepared, join
from nova_export.runtime.media import load_image
from nova_export.runtime.noise import Noise, TorchGenerator
from nova_export.runtime.request import FPS, Request
from nova_export.runtime.runner import Array, Held, Runner
from nova_export.runtime.stage_runners import StageRunners
from nova_export.runtime.tokenizer import PromptTokenizer

DECODER_THREAD = "nova-export decoder"

Callback = Callable[[Step], object]


@dataclass(frozen=True)
class Output:
    """frames: uint8 (B, F, H, W, 3). latents: float32 (B, C, L, h, w), scaled as the model makes them.

    seed: what the noise was drawn from; None where latents were given.
    """

    frames: Frames
    latents: Floats
    seed: int | None


class Pipeline:
    """Text (or class, or image) to frames, over any set of runners; see `load` for one over a bundle.

    lean_decode: as in `stages`. vae_tile, low_memory: as in `decoder_of`. decodes_meanwhile: frames are
    decoded by a thread of their own while the next ones are generated; runners must allow that.
    """

    def __init__(
        self,
        config: NovaConfig,
        stage: Callable[[str], Runner],
        tokenizer: PromptTokenizer | None = None,
        close: Callable[[], None] = lambda: None,
        lean_decode: str | None = None,
        vae_tile: int | None = None,
        low_memory: bool = False,
        decodes_meanwhile: bool = False,
    ) -> None:
        self.config, self.decodes_meanwhile = config, decodes_meanwhile
        self._stage, self._tokenizer, self._close = stage, tokenizer, close
        self._decoder = decoder_of(stage, config, lean_decode, vae_tile, low_memory)

    @classmethod
    def over(
        cls,
        bundle: Bundle,
        stage: Callable[[str], Runner],
        close: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Pipeline:
        """One over any runners of a bundle's stages; options as above.

        Raises BundleError where its tokenizer was changed.
        """
        return cls(bundle.config, stage, bundle_tokenizer(bundle), close, bundle.lean_decode, **options)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free all stages. The pipeline opens them again when it is called again."""
        self._close()

    def __call__(self, prompt: Any, *, callback: Callback | None = None, **arguments: Any) -> Output:
        """Generate and decode. Arguments are those of `Request`: names and defaults as published.

        callback: called after every AR step with a `Step`; returning False cancels (raises Cancelled).
        """
        request = _request(prompt, arguments)
        seed = request.resolved_seed()
        prepared = self.prepare(request, TorchGenerator(seed))
        if not self.decodes_meanwhile:
            latents = self.latents_of(prepared, callback)
            return Output(self.decode(latents), latents, seed)
        of_frames: list[Floats] = []
        parts = [frames for _, frames in self._stream([prepared], callback, of_frames)]
        return Output(np.concatenate(parts, axis=1), np.stack(of_frames, axis=2), seed)

    def stream(self, prompt: Any, *, callback: Callback | None = None, **arguments: Any) -> Iterator[Frames]:
        """Frames uint8 (B, H, W, 3) as soon as their tile can be decoded. Arguments as in a call."""
        request = _request(prompt, arguments)
        prepared = self.prepare(request, TorchGenerator(request.resolved_seed()))
        for _, frames in self.stream_jointly([prepared], callback):
            yield from frames.swapaxes(0, 1)

    def prepare(self, request: Request, generator: Noise) -> Prepared:
        """Check a request and run what stands before the loops: errors of the request are raised here."""
        plan = request.plan(self.config)
        first_frame = self._first_frame(request, plan, generator)
        return Prepared(plan, generator, self._condition(request, plan), first_frame)

    def stream_jointly(
        self,
        prepared: Sequence[Prepared],
        callback: Callback | None = None,
        wanted: Callable[[int], bool] = lambda index: True,
    ) -> Iterator[tuple[int, Frames]]:
        """Requests of one `form`, in one loop: which it is, and its next frames uint8 (B, F, H, W, 3).

        They come as soon as their tile can be decoded. callback: as in a call, of all requests together.
        wanted: whether to decode the frames of a request.
        """
        return self._stream(prepared, callback, [], wanted)

    def _stream(
        self,
        prepared: Sequence[Prepared],
        callback: Callback | None,
        done: list[Floats],
        wanted: Callable[[int], bool] = lambda index: True,
    ) -> Iterator[tuple[int, Frames]]:
        """As `stream_jointly`. done: gets the latents of all requests (B, C, h, w), frame by frame."""
        joint = join(prepared)
        ends = np.cumsum([each.plan.batch for each in prepared])
        waiting = list(tiles(self.config.tiling, joint.plan.num_frames))
        with self._decoding() as executor:
            decoding: deque[tuple[int, Future[Frames]]] = deque()
            for latents in self._steps(joint, callback):
                if latents is not None:
                    done.append(latents)
                while waiting and waiting[0].stop <= len(done):
                    tile = waiting.pop(0)
                    for index, own in enumerate(np.split(np.stack(done, axis=2), ends[:-1])):
                        if wanted(index):
                            decoding.append((index, executor.submit(self._decode, own, tile)))
                            yield from _decoded(decoding)
                yield from _decoded(decoding)
            yield from _decoded(decoding, wait=True)

    @contextmanager
    def _decoding(self) -> Iterator[Executor]:
        """What decodes, in the order of being asked to. Left early, it drops what it has not begun."""
        executor = ThreadPoolExecutor(1, DECODER_THREAD) if self.decodes_meanwhile else AtOnce()
        try:
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)

    def latents(self, request: Request, generator: Noise, callback: Callback | None = None) -> Floats:
        """Latents (B, C, L, h, w) of a request, not decoded, from any source of noise."""
        return self.latents_of(self.prepare(request, generator), callback)

    def latents_of(self, prepared: Prepared, callback: Callback | None = None) -> Floats:
        """Latents (B, C, L, h, w) of what was prepared, or joined."""
        steps = self._steps(prepared, callback)
        return np.stack([latents for latents in steps if latents is not None], axis=2)

    def decode(self, latents: Floats) -> Frames:
        """Latents (B, C, L, h, w), scaled as the model makes them, to frames uint8 (B, F, H, W, 3)."""
        wanted = (self.config.latent_channels, *self.config.latent_size)
        if latents.ndim != 5 or (latents.shape[1], *latents.shape[3:]) != wanted:
            shape = "(B, {}, L, {}, {})".format(*wanted)
            raise InputError(f"latents have shape {latents.shape}; this checkpoint's are {shape}")
        parts = [self._decode(latents, tile) for tile in tiles(self.config.tiling, latents.shape[2])]
        return np.concatenate(parts, axis=1)

    def _decode(self, latents: Floats, tile: Tile) -> Frames:
        return decode_tile(self._decoder, latents, tile)

    def _steps(self, given: Prepared, callback: Callback | None) -> Iterator[Floats | None]:
        """Latents (B, C, h, w) of each frame as it is finished, and None after each AR step before."""
        if given.first_frame is not None:
            yield given.first_frame
        for step in generate_latents(
            given.plan, self._stage, given.condition, given.generator, given.first_frame
        ):
            if callback is not None and callback(step) is False:
                raise Cancelled(
                    f"cancelled at frame {step.frame + 1} of {step.num_frames}, step {step.step + 1}"
                )
            yield step.latents if step.is_last else None

    def _first_frame(self, request: Request, plan: Plan, generator: Noise) -> Floats | None:
        """The given image's latents, one draw of the posterior shared by every sample: (B, C, h, w)."""
        if request.image is None:
            return None
        image, notice = load_image(request.image, *self.config.image_size)
        if notice:
            warnings.warn(notice, stacklevel=2)
        pixels = (image.astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
        posterior = self._stage("vae_encoder").run({"pixels": pixels.transpose(2, 0, 1)[None]})
        latents: Floats = np.asarray(posterior["latents_mean"])
        if self.config.vae.get("double_z", True):  # without a variance the published pipeline draws nothing
            spread: Floats = np.asarray(posterior["latents_std"]) * generator.normal(latents.shape)
            latents = latents + spread
        return np.repeat(latents, plan.batch, axis=0)

    def _condition(self, request: Request, plan: Plan) -> Held:
        """What stands before the first frame (rows, tokens, D); each prompt is repeated in place."""
        prompts, negatives = request.prompts(self.config), request.negative_prompts(self.config)
        texts = (prompts, negatives)
        passes = [text for which in plan.guidance.texts for text in texts[which]]
        if self.config.is_class_conditional:
            ids = np.repeat(np.array(passes, np.int64), request.num_images_per_prompt)
            return self._stage("condition").run({"class_ids": ids})["condition"]
        states, lengths = self._text_states(passes)
        inputs: dict[str, Array] = {
            "text_states": np.repeat(states, request.num_images_per_prompt, axis=0),
            "text_lengths": np.repeat(lengths, request.num_images_per_prompt),
        }
        if self.config.is_video:
            inputs["motion"] = np.tile(np.array([request.motion_flow, FPS], np.float32), (plan.rows, 1))
        return self._stage("condition").run(inputs)["condition"]

    def _text_states(self, texts: list[str]) -> tuple[Floats, NDArray[np.int64]]:
        """Hidden states (len(texts), text_len, text dim) and lengths; each different text is encoded once.

        Each runs at its true length: the encoder is causal, so padding never changes a prompt's own tokens.
        """
        assert self._tokenizer is not None and self.config.text_dim is not None
        encoded: dict[str, Floats] = {}
        for text in dict.fromkeys(texts):
            ids, notice = self._tokenizer.encode(text)
            if notice:
                warnings.warn(notice, stacklevel=2)
            token_ids = np.array([ids], np.int64)
            encoded[text] = (
                np.asarray(self._stage("text_encoder").run({"token_ids": token_ids})["text_states"])[0]
                if ids
                else np.zeros((0, self.config.text_dim), np.float32)
            )
        states = np.zeros((len(texts), self.config.text_len, self.config.text_dim), np.float32)
        for row, text in zip(states, texts, strict=True):
            row[: len(encoded[text])] = encoded[text]
        return states, np.array([len(encoded[text]) for text in texts], np.int64)


class AtOnce(Executor):
    """Does what it is given before it returns; what goes wrong is raised where the result is asked for."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def _decoded(decoding: deque[tuple[int, Future[Frames]]], wait: bool = False) -> Iterator[tuple[int, Frames]]:
    """Those that are ready, or all, in order; they are taken out."""
    while decoding and (wait or decoding[0][1].done()):
        index, frames = decoding.popleft()
        yield index, frames.result()


def load(
    bundle: str | Path,
    *,
    device: str | None = None,
    threads: int = 0,
    low_memory: bool = False,
    vae_tile: int | None = None,
    cuda_graphs: bool = True,
) -> Pipeline:
    """Open a bundle. Stages are loaded, and their files checked, when they are first needed.

    device: "cpu", "cuda", or a target that the bundle has engines for; as in `choose_device` if not told.
    threads: of ONNX Runtime; 0 leaves their number to it. low_memory: keep only one phase's stages loaded,
    and of a lean decode only the frames that a piece needs on the GPU.
    vae_tile: decode squares of so many latents a side and blend them: less memory, and not exact. If not
    told, what engines are limited to.
    cuda_graphs: of engines, which launch an AR step's kernels at once where that was seen before.
    Raises BundleError, UsageError, DependencyError.
    """
    opened = Bundle.open(bundle)
    runners = StageRunners(opened, device, threads, low_memory, cuda_graphs)
    tile = vae_tile or runners.vae_tile
    return Pipeline.over(
        opened,
        runners,
        runners.close,
        vae_tile=tile,
        low_memory=low_memory,
        decodes_meanwhile=runners.decodes_meanwhile,
    )


def bundle_tokenizer(bundle: Bundle) -> PromptTokenizer | None:
    """The tokenizer of a bundle, its file checked; None for classes. Raises BundleError."""
    if not bundle.tokenizer:
        return None
    bundle.check(bundle.tokenizer)
    return PromptTokenizer(bundle.path(bundle.tokenizer), bundle.config.text_len)


def _request(prompt: Any, arguments: dict[str, Any]) -> Request:
    """Raises TypeError for an unknown argument, as any Python call."""
    return Request(prompt=prompt, **arguments)
