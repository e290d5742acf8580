"""NovaConfig: what a checkpoint's config files say, checked and named once. Torch-free.

Everything that depends on the model's sizes (stages, exporter, runtime) reads it from here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nova_export.errors import CheckpointError
from nova_export.typed import field, read, refusal, step, wrong

MOTION_TOKENS = 2  # flow, then fps
FREQUENCIES = 256  # sin and cos of 128 frequencies: timestep, frame and motion embeddings alike
PUBLISHED_GUIDANCE_SCALE = 5.0  # of the published pipeline
GENERATION_CONFIG = "generation_config.json"  # optional; as of transformers
NUM_CLASSES = 1000  # class-conditional checkpoints; id 1000 is the null class

MAX_SIZE = 2**20  # of anything in a manifest's config
MAX_BLOCKS, MAX_LAYERS = 16, 64  # of an autoencoder, and of one of its blocks

_VIT = re.compile(r"vit_d(\d+)w(\d+)")
_MLP = re.compile(r"mlp_d(\d+)w(\d+)")


@dataclass(frozen=True)
class Vit:
    """A vision transformer `vit_d{depth}w{width}`."""

    depth: int
    width: int

    @property
    def heads(self) -> int:
        """64 wide each, but width 1536 has 16 of 96."""
        return 16 if self.width == 1536 else self.width // 64

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class Mlp:
    """The diffusion head `mlp_d{depth}w{width}`."""

    depth: int
    width: int


@dataclass(frozen=True)
class Tiling:
    """How a video VAE is decoded in time: tiles of `latent_frames`, each sharing `overlap` with the last.

    A tile of n latents gives 1 + (n - 1) * `frames_per_latent` frames; every tile after the first drops the
    first `drop` of them.
    """

    latent_frames: int
    overlap: int
    drop: int
    frames_per_latent: int


# Class of a VAE -> its tile, and in how many of its upsampling layers time doubles.
_TILES = {
    "AutoencoderKL": (1, 0, 0),
    "AutoencoderKLOpenSora": (5, 1, 1),
    "AutoencoderKLCogVideoX": (5, 0, 1),
    "AutoencoderKLLTXVideo": (32, 0, 1),
}


def vae_tiling(vae: Mapping[str, Any]) -> Tiling:
    """How the VAE of this `vae/config.json` is tiled. Raises CheckpointError for an unknown class."""
    name = vae.get("_class_name")
    if name not in _TILES:
        raise CheckpointError(f"vae/config.json: _class_name is {name!r}; known are {', '.join(_TILES)}")
    layers = len(vae.get("block_out_channels", (0,) * 4)) - 1
    doublings = {
        "AutoencoderKL": 0,
        "AutoencoderKLOpenSora": max(layers - 1, 0),
        "AutoencoderKLCogVideoX": min(layers, 2),
        "AutoencoderKLLTXVideo": 3,
    }
    return Tiling(*_TILES[name], frames_per_latent=2 ** doublings[name])


@dataclass(frozen=True)
class NovaConfig:
    """Sizes of one NOVA checkpoint. Latents are (C, h, w); N image tokens a frame.

    guidance_scale: where a caller names none.
    """

    temporal: Vit
    spatial: Vit
    head: Mlp
    latent_channels: int
    latent_size: tuple[int, int]
    image_size: tuple[int, int]
    patch: int
    text_dim: int | None
    text_len: int
    base_frames: int
    mixer_rank: int | None
    rotary: bool
    text_encoder: Mapping[str, Any] | None
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    guidance_scale: float = PUBLISHED_GUIDANCE_SCALE

    @property
    def is_video(self) -> bool:
        return self.base_frames > 1

    @property
    def video_length(self) -> int:
        """Latent frames where none are asked for: as trained, but at most 9, as published (33 frames)."""
        return min(self.base_frames, 9)

    @property
    def is_class_conditional(self) -> bool:
        return self.text_dim is None

    @property
    def tiling(self) -> Tiling:
        """How the VAE decodes a video in time."""
        return vae_tiling(self.vae)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens in a frame."""
        return self.latent_size[0] // self.patch, self.latent_size[1] // self.patch

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.token_grid[0] * self.token_grid[1]

    @property
    def temporal_grid(self) -> tuple[int, int]:
        """Rows and columns of the temporal encoder's tokens: its patches are twice as large."""
        return self.latent_size[0] // (2 * self.patch), self.latent_size[1] // (2 * self.patch)

    @property
    def frame_tokens(self) -> int:
        """Tokens of one frame in the temporal encoder."""
        return self.temporal_grid[0] * self.temporal_grid[1]

    @property
    def token_dim(self) -> int:
        """Values of one image token: p * p * C."""
        return self.patch**2 * self.latent_channels

    @property
    def condition_tokens(self) -> int:
        """Tokens that stand before the first frame: text and motion, or the class."""
        if self.is_class_conditional:
            return 1
        return self.text_len + (MOTION_TOKENS if self.is_video else 0)

    @classmethod
    def from_parts(
        cls,
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        text_encoder: Mapping[str, Any] | None,
        generation: Mapping[str, Any] | None = None,
    ) -> NovaConfig:
        """Read the parts' own configs. Raises CheckpointError on a missing or impossible value."""
        try:
            config = cls._from_parts(transformer, vae, scheduler, text_encoder)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
            raise CheckpointError(
                f"transformer/config.json {what}; is it a NOVATransformer3DModel's?"
            ) from error
        return replace(config, guidance_scale=_guidance_scale(generation or {}))

    @classmethod
    def _from_parts(
        cls,
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        text_encoder: Mapping[str, Any] | None,
    ) -> NovaConfig:
        if (name := transformer.get("_class_name", "NOVATransformer3DModel")) != "NOVATransformer3DModel":
            raise CheckpointError(f"transformer is a {name}; only NOVATransformer3DModel is known")
        temporal, spatial, head = transformer["arch"]
        stride = int(transformer["image_stride"])
        height, width = _pair(transformer["image_size"])
        rank = transformer.get("video_mixer_rank")
        text_dim = transformer.get("text_token_dim") or None
        if text_dim and text_encoder is None:
            raise CheckpointError(
                "the transformer is text-conditional, but the checkpoint has no text_encoder/config.json"
            )
        if text_dim and text_encoder is not None and text_encoder["hidden_size"] != text_dim:
            hidden = text_encoder["hidden_size"]
            raise CheckpointError(f"text_token_dim is {text_dim}, but the text encoder is {hidden} wide")
        config = cls(
            temporal=Vit(*_arch(_VIT, temporal, "vit_d{depth}w{width}")),
            spatial=Vit(*_arch(_VIT, spatial, "vit_d{depth}w{width}")),
            head=Mlp(*_arch(_MLP, head, "mlp_d{depth}w{width}")),
            latent_channels=int(transformer["image_dim"]),
            latent_size=(height // stride, width // stride),
            image_size=(height, width),
            patch=15 // stride + 1,
            text_dim=text_dim,
            text_len=int(transformer["text_token_len"]) if text_dim else 0,
            base_frames=int(transformer["video_base_size"][0]),
            mixer_rank=max(rank, 0) if rank else None,
            rotary=bool(transformer.get("rotary_pos_embed", False)),
            text_encoder=text_encoder if text_dim else None,
            vae=vae,
            scheduler=scheduler,
        )
        config._check_sizes(_pair(transformer["image_base_size"]), tuple(transformer["video_base_size"][1:]))
        return config

    def _check_sizes(self, image_base: tuple[int, int], video_base: tuple[int, ...]) -> None:
        for arch in (self.temporal, self.spatial):
            if not (arch.depth and arch.width) or arch.width % 64:
                raise CheckpointError(f"vit_d{arch.depth}w{arch.width}: width must be a multiple of 64")
        if self.base_frames < 1 or (self.text_dim and self.text_len < 1):
            raise CheckpointError(
                f"video_base_size has {self.base_frames} frames and text_token_len is {self.text_len}: "
                "both must be at least 1"
            )
        if any(size % (2 * self.patch) or not size for size in self.latent_size):
            raise CheckpointError(
                f"latents of {self.latent_size} cannot be cut into patches of {2 * self.patch}"
            )
        if image_base != self.token_grid or video_base != self.temporal_grid:
            raise CheckpointError(
                f"image_base_size {image_base} and video_base_size {video_base} do not fit latents of "
                f"{self.latent_size} in patches of {self.patch}: expected {self.token_grid}, "
                f"{self.temporal_grid}"
            )
        if self.temporal.width != self.spatial.width:
            raise CheckpointError(
                f"temporal width {self.temporal.width} and spatial {self.spatial.width} differ"
            )
        vae_tiling(self.vae)
        if (channels := self.vae.get("latent_channels", self.latent_channels)) != self.latent_channels:
            raise CheckpointError(
                f"image_dim is {self.latent_channels}, but the VAE has {channels} latent channels"
            )

    @classmethod
    def from_checkpoint(cls, folder: Path) -> NovaConfig:
        """Read `folder`'s config files. Raises CheckpointError, naming the file."""
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
        text_encoder, generation = folder / "text_encoder" / "config.json", folder / GENERATION_CONFIG
        return cls.from_parts(
            transformer=read_config(folder / "transformer" / "config.json"),
            vae=read_config(folder / "vae" / "config.json"),
            scheduler=read_config(folder / "scheduler" / "scheduler_config.json"),
            text_encoder=read_config(text_encoder) if text_encoder.exists() else None,
            generation=read_config(generation) if generation.exists() else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON for the manifest: what `from_dict` needs to make it again."""
        data = dict(self.__dict__)
        return {
            **data,
            "temporal": _values(self.temporal),
            "spatial": _values(self.spatial),
            "head": _values(self.head),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "config") -> NovaConfig:
        """The reverse of `to_dict`. Raises ValueError on another shape of data, or sizes that cannot be."""
        fields = {**read(Mapping[str, Any], data, where)}
        for key in fields.keys() & {"temporal", "spatial", "head"}:
            depth, width = field(tuple[int, int], data, key, where)
            fields[key] = {"depth": depth, "width": width}
        config: NovaConfig = read(cls, fields, where)
        config._check_ranges(where)
        config._check_vae(step(where, "vae"))
        config._check_together(where)
        return config

    def _check_ranges(self, where: str) -> None:
        pairs = ("temporal", "spatial", "head", "latent_size", "image_size")
        for key in (*pairs, "latent_channels", "patch", "text_dim", "base_frames", "text_len", "mixer_rank"):
            value = getattr(self, key)
            least = 0 if key in ("text_len", "mixer_rank") else 1
            values = {"": value}
            if key in pairs:
                each = value if isinstance(value, tuple) else _values(value)
                values = {str(index): size for index, size in enumerate(each)}
            for index, size in values.items():
                place = step(where, key)
                _check_size(size, step(place, index) if index else place, least)
        if not 0 <= self.guidance_scale < math.inf:
            raise wrong(self.guidance_scale, "a number, at least 0", step(where, "guidance_scale"))

    def _check_vae(self, where: str) -> None:
        name = self.vae.get("_class_name")
        if not any(name == known for known in _TILES):
            found = repr(name) if isinstance(name, str) else "none of them"
            raise refusal(f"_class_name is {found}; known are {', '.join(_TILES)}", where)
        if "block_out_channels" in self.vae:
            widths, place = (
                field(tuple[int, ...], self.vae, "block_out_channels", where),
                "block_out_channels",
            )
            for index, width in enumerate(widths):
                _check_size(width, step(step(where, place), str(index)), 1)
            if not 1 <= len(widths) <= MAX_BLOCKS:
                raise refusal(f"has {len(widths)} blocks, must have 1 to {MAX_BLOCKS}", step(where, place))
        for key, least in (("layers_per_block", 0), ("out_channels", 1), ("latent_channels", 1)):
            if key in self.vae:
                _check_size(field(int, self.vae, key, where), step(where, key), least)
        if (layers := self.vae.get("layers_per_block", 0)) > MAX_LAYERS:
            raise wrong(layers, f"0 to {MAX_LAYERS}", step(where, "layers_per_block"))
        if (channels := self.vae.get("latent_channels", self.latent_channels)) != self.latent_channels:
            wanted = f"but the transformer's latents have {self.latent_channels} channels"
            raise refusal(f"is {channels}, {wanted}", step(where, "latent_channels"))
        if "double_z" in self.vae:
            field(bool, self.vae, "double_z", where)

    def _check_together(self, where: str) -> None:
        for arch in (self.temporal, self.spatial):
            if arch.width % 64:
                raise refusal(f"vit_d{arch.depth}w{arch.width}: width must be a multiple of 64", where)
        if self.text_dim and self.text_len < 1:
            raise wrong(self.text_len, "at least 1 where there is a text_dim", step(where, "text_len"))
        latent, image = self.latent_size, self.image_size
        if any(size % (2 * self.patch) for size in latent):
            raise refusal(f"latents of {latent} cannot be cut into patches of {2 * self.patch}", where)
        if image[0] < latent[0] or image[1] < max(latent[1], image[0] // latent[0]):
            raise refusal(f"image_size {image} is too small for latents of {latent}", where)
        if self.temporal.width != self.spatial.width:
            widths = f"temporal width {self.temporal.width} and spatial {self.spatial.width}"
            raise refusal(f"{widths} differ", where)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is missing or no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a NOVA checkpoint folder has it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(data).__name__}")
    return data


def _arch(pattern: re.Pattern[str], name: str, form: str) -> tuple[int, int]:
    match = pattern.fullmatch(name)
    if not match:
        raise CheckpointError(f"unknown architecture {name!r} in transformer/config.json; expected {form}")
    return int(match[1]), int(match[2])


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def _guidance_scale(generation: Mapping[str, Any]) -> float:
    scale = generation.get("guidance_scale", PUBLISHED_GUIDANCE_SCALE)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < math.inf:
        raise CheckpointError(
            f"{GENERATION_CONFIG}: guidance_scale is {scale!r}; it must be a number, at least 0"
        )
    return float(scale)


def _values(arch: Vit | Mlp) -> list[int]:
    return [arch.depth, arch.width]


def _check_size(size: int | None, where: str, least: int) -> None:
    """Raises ValueError where a size of a manifest's config cannot be."""
    if size is not None and not least <= size <= MAX_SIZE:
        raise wrong(size, f"{least} to {MAX_SIZE}", where)
