"""The stages of a lean decode: the OpenSora decoder in pieces, for where its whole tensors do not fit.

Frames that go from piece to piece are (1, C, H, W) each; mean and variance are those of a norm's groups. A
piece's `arguments` are its place in the decoder and the type of frames, "float32" or "float16".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nova_export.config import NovaConfig
from nova_export.errors import UsageError
from nova_export.spec import Axis, Stage, Tensor

FAMILY = "AutoencoderKLOpenSora"
LEAN_BLOCKS = 2  # the last ones, and what makes their frames; none of these two grows in time
GROUPS = 32  # of every norm
TAPS = 3  # frames that a convolution sees
BETWEEN = ("here", "near", "here_1", "near_1", "here_2", "near_2")
MODULE = "reference_model.vae.lean"
DECODE = "decode"  # the phase: all that it needs of the others is latents, which the host has
DECODER = "vae_decoder"  # what the names of all pieces begin with
START = f"{DECODER}_start"

F32 = "float32"
GIVEN = (Tensor("mean", F32, (GROUPS,)), Tensor("variance", F32, (GROUPS,)))  # of all frames
MADE = (Tensor("next_mean", F32, (GROUPS,)), Tensor("next_variance", F32, (GROUPS,)))  # of those made


def lean_decoder(config: NovaConfig, frame_type: str, largest: tuple[int, ...] | None = None) -> list[Stage]:
    """The pieces, in order. largest: latents (h, w) of what is decoded; whole frames if not told.

    Raises UsageError where the checkpoint's autoencoder cannot be cut so.
    """
    family = config.vae.get("_class_name")
    dims = tuple(config.vae.get("block_out_channels", (128, 256, 512, 512)))[::-1]
    first = len(dims) - LEAN_BLOCKS
    if family != FAMILY or first < 1:
        raise UsageError(
            f"a lean decode cuts an {FAMILY} of at least {LEAN_BLOCKS + 1} blocks; this checkpoint's "
            f"autoencoder is an {family} of {len(dims)}"
        )
    cut, dim = _Cut(config, frame_type, largest or config.latent_size, 2 ** (first - 1)), dims[first - 1]
    made = [cut.start(first, dim), cut.upsampler("GrowingUpsampler", first - 1, BETWEEN, dim)]
    for number, wide in enumerate(dims[first:], start=first):
        cut = cut.larger()
        for resnet in range(config.vae.get("layers_per_block", 2) + 1):
            where = f"up_blocks.{number}.resnets.{resnet}"
            made += [cut.first_convolution(where, dim, wide), cut.second_convolution(where, dim, wide)]
            dim = wide
        if number < len(dims) - 1:
            made.append(cut.upsampler("Upsampler", number, ("frame",), dim))
    return [*made, cut.last_convolution(dim, config.vae.get("out_channels", 3))]


def is_piece(stage: Stage) -> bool:
    """Whether it is called for every frame of a tile."""
    return stage.module.startswith(f"{MODULE}:") and stage.name != START


def enlarges(stage: Stage) -> bool:
    """Whether its frames are larger than those that it gets: then they are made again, each time."""
    return [tensor.name for tensor in stage.inputs] == ["frame"]


@dataclass(frozen=True)
class Kept:
    """Values of frames: of all that there are while a piece runs, and of those of one call."""

    between: int
    call: int


def kept_frames(stages: Iterable[Stage], frames: int) -> dict[str, Kept]:
    """By piece, as nova_export/runtime/lean_decode.py keeps them, for clips of so many frames of pixels.

    They are as large as the axes of `stages` allow; which may hold others too.
    """
    pieces = [stage for stage in stages if is_piece(stage)]
    sizes = [_frame_sizes(piece) for piece in pieces]
    kept: dict[str, Kept] = {}
    read = block = 0  # of what the piece reads, of what the residual block at work got
    for piece, size, following in zip(pieces, sizes, [*sizes[1:], {}], strict=False):
        read = read or (frames // 2 + 1) * size["here"]
        next_frame = following.get("frame", 0)
        call = sum(size.values()) + next_frame
        if enlarges(piece):
            kept[piece.name] = Kept(read, call)
            read += TAPS * next_frame
            continue
        if "residual" not in size:
            block = read
        made = frames * next_frame
        kept[piece.name] = Kept(read + (block if "residual" in size else made), call)
        read = made
    return kept


def _frame_sizes(piece: Stage) -> dict[str, int]:
    """Values of each frame that a call takes, at the most."""
    most = piece.shapes({axis.name: axis.max for axis in piece.axes})
    return {name: math.prod(shape) for name, shape in most.items() if len(shape) == 4}


class _Cut:
    """Pieces between which frames are `scale` times as high and wide as latents, `largest` (h, w) at most."""

    def __init__(self, config: NovaConfig, frame_type: str, largest: tuple[int, ...], scale: int) -> None:
        self.config, self.frame_type, self.largest, self.scale = config, frame_type, largest, scale

    def larger(self) -> _Cut:
        return _Cut(self.config, self.frame_type, self.largest, 2 * self.scale)

    def start(self, blocks: int, dim: int) -> Stage:
        """Latents to the frames after the first `blocks`, the upsampler of the last of them left out."""
        config = self.config
        height, width = self.largest
        parts = ("conv_in", "mid_block", *(f"up_blocks.{number}" for number in range(blocks - 1)))
        parts += (f"up_blocks.{blocks - 1}.resnets",)
        latents = (1, config.latent_channels, "latent_frames", "latent_height", "latent_width")
        return Stage(
            name=START,
            module=f"{MODULE}:Start",
            arguments=(self.frame_type,),
            part="vae",
            prefixes=("post_quant_conv.", *(f"decoder.{part}." for part in parts)),
            phase=DECODE,
            inputs=(Tensor("latents", F32, latents),),
            outputs=(
                Tensor("next_frames", self.frame_type, ("frames", dim, "frame_height", "frame_width")),
                *MADE,
            ),
            axes=(
                Axis("latent_frames", 1, config.tiling.latent_frames, config.tiling.latent_frames),
                Axis("latent_height", 1, height, height),
                Axis("latent_width", 1, width, width),
            ),
        )

    def first_convolution(self, where: str, dim: int, wide: int) -> Stage:
        weights = (f"{where}.norm1.", f"{where}.conv1.")
        return self._piece("FirstConvolution", f"{where}.conv1", weights, self._normed(dim), self._made(wide))

    def second_convolution(self, where: str, dim: int, wide: int) -> Stage:
        weights = (f"{where}.norm2.", f"{where}.conv2.", f"{where}.conv_shortcut.")
        inputs = (*self._normed(wide), self._frame("residual", dim))
        return self._piece("SecondConvolution", f"{where}.conv2", weights, inputs, self._made(wide))

    def upsampler(self, kind: str, block: int, inputs: tuple[str, ...], dim: int) -> Stage:
        path = f"up_blocks.{block}.upsamplers.0.conv"
        larger = Tensor("next_frame", self.frame_type, (1, dim, "next_height", "next_width"))
        frames = tuple(self._frame(name, dim) for name in inputs)
        return self._piece(kind, path, (f"{path}.",), frames, (larger, *MADE))

    def last_convolution(self, dim: int, colours: int) -> Stage:
        pixels = Tensor("pixels", F32, (1, colours, "frame_height", "frame_width"))
        weights = ("conv_norm_out.", "conv_out.")
        return self._piece("LastConvolution", "conv_out", weights, self._normed(dim), (pixels,))

    def _piece(
        self,
        kind: str,
        path: str,
        weights: tuple[str, ...],
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
    ) -> Stage:
        height, width = (self.scale * size for size in self.largest)
        return Stage(
            name=f"{DECODER}_{path.replace('.', '_')}",
            module=f"{MODULE}:{kind}",
            arguments=(path, self.frame_type),
            part="vae",
            prefixes=tuple(f"decoder.{each}" for each in weights),
            phase=DECODE,
            inputs=inputs,
            outputs=outputs,
            axes=(Axis("frame_height", 1, height, height), Axis("frame_width", 1, width, width)),
        )

    def _frame(self, name: str, dim: int) -> Tensor:
        return Tensor(name, self.frame_type, (1, dim, "frame_height", "frame_width"))

    def _normed(self, dim: int) -> tuple[Tensor, ...]:
        """The frame, those before it, and the statistics of all."""
        return (*(self._frame(name, dim) for name in ("frame", "past_1", "past_2")), *GIVEN)

    def _made(self, dim: int) -> tuple[Tensor, ...]:
        return (self._frame("next_frame", dim), *MADE)
