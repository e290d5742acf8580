"""nova_export.config: what the published config files say, and which of them are refused, saying why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from nova_export.config import NovaConfig, Tiling, Vit, read_config, vae_tiling
from nova_export.errors import CheckpointError
from tests.conftest import GOLDEN
from tests.strategies import configs, parts, tiny_config

OSP480 = {  # the sizes of nova-d48w1024-osp480
    "arch": ["vit_d16w1024", "vit_d32w1024", "mlp_d3w1280"],
    "image_base_size": [30, 48],
    "image_dim": 4,
    "image_size": [480, 768],
    "image_stride": 8,
    "rotary_pos_embed": False,
    "text_token_dim": 2560,
    "text_token_len": 256,
    "video_base_size": [9, 15, 24],
    "video_mixer_rank": 24,
}


def osp480(**changes: Any) -> NovaConfig:
    vae = {"_class_name": "AutoencoderKLOpenSora", "latent_channels": 4}
    return NovaConfig.from_parts({**OSP480, **changes}, vae, {}, {"hidden_size": 2560})


def test_the_published_video_checkpoint() -> None:
    config = osp480()
    assert config.temporal == Vit(16, 1024) and config.spatial == Vit(32, 1024)
    assert (config.temporal.heads, config.temporal.head_dim) == (16, 64)
    assert (config.head.depth, config.head.width) == (3, 1280)
    assert config.latent_size == (60, 96) and config.patch == 2
    assert (config.token_grid, config.num_tokens) == ((30, 48), 1440)
    assert (config.temporal_grid, config.frame_tokens) == ((15, 24), 360)
    assert config.token_dim == 16
    assert config.condition_tokens == 256 + 2
    assert config.mixer_rank == 24 and config.is_video and not config.is_class_conditional
    assert config.tiling == Tiling(latent_frames=5, overlap=1, drop=1, frames_per_latent=4)


def test_width_1536_has_16_heads() -> None:
    assert [(Vit(1, width).heads, Vit(1, width).head_dim) for width in (768, 1024, 1536)] == [
        (12, 64),
        (16, 64),
        (16, 96),
    ]


@pytest.mark.parametrize(("rank", "read"), [(None, None), (0, None), (-1, 0), (8, 8)])
def test_mixer_rank(rank: int | None, read: int | None) -> None:
    assert osp480(video_mixer_rank=rank).mixer_rank == read


def test_an_image_checkpoint_has_no_motion_tokens() -> None:
    assert tiny_config(frames=1).condition_tokens == 6
    assert tiny_config(frames=2).condition_tokens == 8


@pytest.mark.parametrize("frames", [1, 2])
def test_a_class_is_one_token(frames: int) -> None:
    config = tiny_config(text=False, frames=frames)
    assert config.is_class_conditional and config.condition_tokens == 1 and config.text_encoder is None


def test_patches_follow_the_stride() -> None:
    assert [tiny_config(stride=stride).patch for stride in (8, 16)] == [2, 1]


def test_one_number_is_both_sides() -> None:
    made = parts((2, 2))
    made["transformer"].update(image_size=64, image_base_size=4)
    assert NovaConfig.from_parts(**made) == tiny_config((2, 2))


@given(configs)
def test_a_config_comes_back_from_json(config: NovaConfig) -> None:
    assert NovaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["t2v", "t2v-rope", "t2i"])
def test_golden_checkpoints_are_read(name: str) -> None:
    config = NovaConfig.from_checkpoint(GOLDEN / name / "checkpoint")
    assert NovaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
        ("transformer", {"arch": ["resnet50", "vit_d2w64", "mlp_d1w32"]}, "resnet50"),
        ("transformer", {"arch": ["vit_d2w64", "vit_d2w64"]}, "transformer/config.json"),
        ("transformer", {"arch": ["vit_d1w64", "vit_d2w128", "mlp_d1w32"]}, "64.*128"),
        ("transformer", {"arch": ["vit_d1w32", "vit_d2w32", "mlp_d1w32"]}, "vit_d1w32.*64"),
        ("transformer", {"image_stride": 0}, "transformer/config.json"),
        ("transformer", {"image_stride": None}, "transformer/config.json"),
        ("transformer", {"image_size": [36, 60]}, "cannot be cut"),
        ("transformer", {"image_size": [0, 96]}, "cannot be cut"),
        ("transformer", {"image_base_size": [5, 6]}, r"image_base_size \(5, 6\)"),
        ("transformer", {"video_base_size": [4, 9, 9]}, r"video_base_size \(9, 9\)"),
        ("transformer", {"video_base_size": [0, 2, 3]}, "video_base_size"),
        ("transformer", {"text_token_dim": 64}, "text_token_dim is 64.*32 wide"),
        ("transformer", {"text_token_len": None}, "transformer/config.json"),
        ("transformer", {"text_token_len": 0}, "text_token_len is 0"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny.*AutoencoderKLOpenSora"),
        ("vae", {"latent_channels": 16}, "image_dim is 4.*16 latent channels"),
    ],
)
def test_what_cannot_be_used_is_refused(part: str, changes: dict[str, Any], words: str) -> None:
    made = parts()
    made[part] = {**made[part], **changes}
    with pytest.raises(CheckpointError, match=words):
        NovaConfig.from_parts(**made)


def test_a_checkpoint_may_bring_its_own_guidance(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(GOLDEN / "t2v" / "checkpoint", tmp_path / "checkpoint"))
    assert NovaConfig.from_checkpoint(checkpoint).guidance_scale == 5.0  # as published
    file = checkpoint / "generation_config.json"
    file.write_text('{"guidance_scale": 2.5}')
    assert NovaConfig.from_checkpoint(checkpoint).guidance_scale == 2.5
    for wrong in ("-1", "NaN", "true", '"3"'):
        file.write_text('{"guidance_scale": ' + wrong + "}")
        with pytest.raises(CheckpointError, match=r"generation_config\.json: guidance_scale is"):
            NovaConfig.from_checkpoint(checkpoint)


@pytest.mark.parametrize("key", ["arch", "image_dim", "image_size", "image_stride", "video_base_size"])
def test_a_missing_value_is_named(key: str) -> None:
    made = parts()
    del made["transformer"][key]
    with pytest.raises(CheckpointError, match=f"has no '{key}'"):
        NovaConfig.from_parts(**made)


def test_text_needs_a_text_encoder() -> None:
    with pytest.raises(CheckpointError, match=r"text_encoder/config.json"):
        NovaConfig.from_parts(**{**parts(), "text_encoder": None})


def test_frames_of_a_latent() -> None:
    """Four blocks: the published video VAE turns 9 latents into 33 frames."""
    for name, frames in {"AutoencoderKL": 1, "AutoencoderKLOpenSora": 4, "AutoencoderKLCogVideoX": 4}.items():
        assert vae_tiling({"_class_name": name}).frames_per_latent == frames
    assert vae_tiling({"_class_name": "AutoencoderKLLTXVideo"}).frames_per_latent == 8


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        NovaConfig.from_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"transformer.config.json: missing"):
        NovaConfig.from_checkpoint(tmp_path)
    for text, words in (("{", "JSON"), ("[1]", "must hold a JSON object, not list")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_config(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="JSON"):
        read_config(tmp_path / "x.json")
