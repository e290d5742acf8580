"""Latents to frames: video VAEs decode tiles of latent frames, each as soon as its latents are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from nova_export.config import NovaConfig, Tiling
from nova_export.errors import StageError
from nova_export.lean_stages import lean_decoder
from nova_export.runtime.lean_decode import decode_lean
from nova_export.runtime.runner import Runner
from nova_export.runtime.tiled_decode import decode_in_tiles

Floats = NDArray[np.float32]
Frames = NDArray[np.uint8]
Decoder = Callable[[Floats], Floats]  # of one tile: (1, C, l, h, w) -> pixels (1, 3, F, H, W)


@dataclass(frozen=True)
class Tile:
    """Latent frames start..stop, of whose output the first `drop` frames belong to the tile before."""

    start: int
    stop: int
    drop: int


def tiles(tiling: Tiling, num_latents: int) -> Iterator[Tile]:
    """Tiles that cover all latents. The last may be shorter, where the published pipeline drops its frames.

    A last tile of one latent would lose its only frame to `drop`: it takes the latent before it along.
    """
    start = 0
    while True:
        stop = min(start + tiling.latent_frames, num_latents)
        if start and tiling.drop and stop - start == 1:
            start -= 1
        yield Tile(start, stop, tiling.drop if start else 0)
        if stop == num_latents:
            return
        start += tiling.latent_frames - tiling.overlap


def decode_tile(decoder: Decoder, latents: Floats, tile: Tile) -> Frames:
    """(B, C, L, h, w) -> the tile's frames, uint8 (B, F, H, W, 3).

    One sample at a time: decoding is what needs memory. Raises StageError for what are no numbers.
    """
    samples = []
    if not np.isfinite(latents[:, :, tile.start : tile.stop]).all():
        raise StageError(
            f"latent frames {tile.start + 1} to {tile.stop} hold NaN or infinity: lower guidance_scale and "
            "other numbers given, or build the bundle in a precision that does not overflow"
        )
    for sample in latents[:, :, tile.start : tile.stop]:
        samples.append(to_uint8(decoder(sample[None])[0, :, tile.drop :]))
    return np.stack(samples)


def decoder_of(
    stage: Callable[[str], Runner],
    config: NovaConfig,
    lean_decode: str | None = None,
    vae_tile: int | None = None,
    low_memory: bool = False,
) -> Decoder:
    """The autoencoder's decoder: in one stage, or in the pieces of a lean decode.

    vae_tile: over squares of so many latents a side, blended; None, and exact, over whole frames. low_memory:
    the frames between pieces are kept by the host.
    """
    if lean_decode:
        pieces = [piece.name for piece in lean_decoder(config, lean_decode)]
        decoder: Decoder = partial(decode_lean, stage, pieces, frames_on_host=low_memory)
    else:

        def decoder(latents: Floats) -> Floats:
            return np.asarray(stage("vae_decoder").run({"latents": latents})["pixels"])

    return partial(decode_in_tiles, decoder, vae_tile) if vae_tile else decoder


def to_uint8(pixels: Floats) -> Frames:
    """[-1, 1] (3, F, H, W) -> (F, H, W, 3), truncated as the published pipeline does."""
    scaled = np.clip(pixels * np.float32(127.5) + np.float32(127.5), 0, 255)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(1, 2, 3, 0))
