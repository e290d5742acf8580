"""Checkpoints with random weights: names and shapes, the same bytes for a seed, well-behaved outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nova_export.config import NovaConfig
from nova_export.errors import CheckpointError, OutputError, UsageError
from reference_model import parameters, random_weights
from reference_model.eager import EagerPipeline
from reference_model.init import ARCHITECTURES, init_checkpoint, resolve
from reference_model.parameters import Parameter
from reference_model.tokenizer import read_tokenizer
from tests.conftest import GOLDEN

EXTRA = sorted((GOLDEN.parent / "golden_extra").glob("*.json"))
TINY_ARCH = ["vit_d4w64", "vit_d4w64", "mlp_d2w64"]
TINY_VAE = {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}


def tiny(vae: str = "AutoencoderKL", scheduler: str = "DDPMScheduler", **transformer: Any) -> dict[str, Any]:
    """Text to image at 64x64, but for what is given."""
    return {
        "transformer": {"arch": TINY_ARCH, "image_size": [64, 64], "text_token_len": 16, **transformer},
        "vae": {"_class_name": vae, **TINY_VAE},
        "scheduler": {"_class_name": scheduler},
    }


def video(**transformer: Any) -> dict[str, Any]:
    return tiny("AutoencoderKLOpenSora", video_base_size=[4, 2, 2], **transformer)


def digests(folder: Path) -> dict[str, str]:
    """Of every file in a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", ["t2i", "t2v", "t2v-rope"])
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    checkpoint = GOLDEN / name / "checkpoint"
    config = NovaConfig.from_checkpoint(checkpoint)
    assert config.text_encoder is not None
    tables = {
        "transformer": parameters.transformer(config),
        "vae": parameters.autoencoder(config.vae),
        "text_encoder": parameters.phi(config.text_encoder),
    }
    for part, table in tables.items():
        (file,) = (checkpoint / part).glob("*.safetensors")
        stored = {key: value.shape for key, value in load_file(file).items()}
        assert {parameter.name: parameter.shape for parameter in table} == stored


@pytest.mark.parametrize("case", EXTRA, ids=lambda path: path.stem)
def test_weights_of_golden_outputs_are_made_again(case: Path, tmp_path: Path) -> None:
    data = json.loads(case.read_text())
    checkpoint = init_checkpoint(**data["init"], out=tmp_path / "checkpoint")
    made = {path.split("/")[0]: digest for path, digest in digests(checkpoint).items() if "safetens" in path}
    assert made == data["weights_sha256"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("nova-d48w768-sdxl1024", 0.3),
        ("nova-d48w1024-sdxl1024", 0.6),
        ("nova-d48w1536-sdxl1024", 1.4),
        ("nova-d48w1024-sd512", 0.6),
        ("nova-d48w1024-osp480", 0.6),
    ],
)
def test_published_sizes(name: str, billions: float) -> None:
    parts = resolve(name)
    config = NovaConfig.from_parts(**vars(parts))
    size = sum(parameter.size for parameter in parameters.transformer(config))
    assert size // 10**8 / 10 == billions  # as the model zoo gives them
    assert parts.text_encoder is not None
    assert sum(p.size for p in parameters.phi(parts.text_encoder)) / 1e9 == pytest.approx(2.78, rel=0.01)


def test_published_video_geometry() -> None:
    transformer = resolve("nova-d48w1024-osp480").transformer
    assert transformer["image_base_size"] == [30, 48]
    assert transformer["video_base_size"] == [16, 15, 24]
    assert resolve("nova-d48w1024-sdxl1024").transformer["image_base_size"] == [64, 64]


def test_a_seed_gives_the_same_files(tmp_path: Path) -> None:
    first, again, other = (
        digests(init_checkpoint(video(), tmp_path / name, text_encoder="2x64", seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}


def test_folder_has_the_published_layout(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    folder = init_checkpoint(
        video(), tmp_path / "a" / "b", text_encoder="2x64", report=lambda *x: told.append(x)
    )
    assert set(digests(folder)) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert [part for part, _ in told] == ["transformer", "vae", "text_encoder"]
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


def test_class_conditional_has_no_text(tmp_path: Path) -> None:
    folder = init_checkpoint(tiny(text_token_dim=None), tmp_path / "c2i")
    assert not (folder / "text_encoder").exists() and not (folder / "tokenizer").exists()
    assert NovaConfig.from_checkpoint(folder).is_class_conditional


def test_tokenizer_takes_any_text(tmp_path: Path) -> None:
    folder = init_checkpoint(tiny(), tmp_path / "checkpoint", text_encoder="1x32")
    text = "A red circle, moving right: Ünïcode\n\t日本 🎬 \x00"
    tokenizer = read_tokenizer(folder / "tokenizer")
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < json.loads((folder / "text_encoder" / "config.json").read_text())["vocab_size"]
    assert len(tokenizer.encode("a red circle moving right").ids) == 5
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert read_tokenizer(folder / "tokenizer").encode(text).ids == ids


@pytest.mark.parametrize("text_encoder", ["phi-3", "2x", "x64", "0x64", "2x65", "-1x64", ""])
def test_unknown_text_encoder(text_encoder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text encoder"):
        init_checkpoint(tiny(), tmp_path / "out", text_encoder=text_encoder)
    assert not list(tmp_path.iterdir())


def test_unknown_architecture_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        init_checkpoint("nova-d48w1024", tmp_path / "out")
    assert all(name in str(error.value) for name in ARCHITECTURES)


def test_impossible_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        init_checkpoint(tiny(video_base_size=[1, 3, 3]), tmp_path / "out", text_encoder="1x32")
    with pytest.raises(UsageError, match="AutoencoderKLOther"):
        init_checkpoint(tiny("AutoencoderKLOther"), tmp_path / "out", text_encoder="1x32")


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        init_checkpoint(tiny(), tmp_path / "out", text_encoder="1x32")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note.txt"]


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def fail(part: str, action: str) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        init_checkpoint(tiny(), tmp_path / "out", text_encoder="1x32", report=fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_shards_hold_the_same_values(tmp_path: Path) -> None:
    table = list(parameters.phi(resolve(tiny(), "2x64").text_encoder or {}))
    for name, limit in (("one", 10**9), ("many", 100_000)):
        (tmp_path / name).mkdir()
        random_weights.write_weights(tmp_path / name, "model", table, 0, "text_encoder", limit)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for key, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / "many" / file)[key], whole[key])


def test_values_have_their_mean_and_spread() -> None:
    parameter = Parameter("x", (3, random_weights.BLOCK), std=0.25, mean=1.0)
    values = np.concatenate(list(random_weights.draw(parameter, 0, "part"))).astype(np.float64)
    assert values.mean() == pytest.approx(1.0, abs=1e-3)
    assert values.std() == pytest.approx(0.25, rel=0.01)
    assert np.abs(values - 1).max() < 0.25 * 3.5


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        (video(video_mixer_rank=-1), {"prompt": "a red circle", "max_latent_length": 2}),
        (tiny(text_token_dim=None, rotary_pos_embed=True), {"prompt": 7}),
        (tiny(scheduler="FlowMatchEulerDiscreteScheduler"), {"prompt": "a blue square"}),
        (tiny(), {"prompt": "a red circle", "num_diffusion_steps": 100}),
    ],
    ids=["video", "class", "flow", "many steps"],
)
def test_latents_and_frames_are_well_spread(
    architecture: dict[str, Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    folder = init_checkpoint(architecture, tmp_path / "checkpoint", text_encoder="2x64")
    output = EagerPipeline.from_checkpoint(folder)(seed=0, num_inference_steps=3, **arguments)
    assert 0.1 < output.latents.std() < 2
    assert 20 < output.frames.std() < 100


def test_importing_needs_no_torch() -> None:
    code = "import sys, reference_model.init; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
