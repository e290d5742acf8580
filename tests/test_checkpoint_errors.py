"""Checkpoints that are incomplete, corrupt, unsafe or unknown: refused before anything is written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nova_export.bundle import file_entry
from nova_export.errors import CheckpointError
from nova_export.export import build
from nova_export.export.build import build_bundle
from reference_model.checkpoint import load_module
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN

WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMER = f"transformer/{WEIGHTS}"
Change = Callable[[Path], object]


def edit(path: str, **values: Any) -> Change:
    """Change values of a JSON file; None removes one."""

    def change(checkpoint: Path) -> None:
        data = json.loads((checkpoint / path).read_text())
        data = {**data, **values}
        (checkpoint / path).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return change


def write(path: str, content: str | bytes) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda checkpoint: (checkpoint / path).write_bytes(data)


def remove(*paths: str) -> Change:
    def change(checkpoint: Path) -> None:
        for path in paths:
            full = checkpoint / path
            shutil.rmtree(full) if full.is_dir() else full.unlink()

    return change


def tensors(path: str, update: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the tensors of a safetensors file."""

    def change(checkpoint: Path) -> None:
        state = load_file(checkpoint / path)
        update(state)
        save_file(state, checkpoint / path)

    return change


def cut(path: str, size: int) -> Change:
    def change(checkpoint: Path) -> None:
        with (checkpoint / path).open("r+b") as file:
            file.truncate(size)

    return change


def shards(index: Any) -> Change:
    """One shard and an index, instead of a single file."""

    def change(checkpoint: Path) -> None:
        folder = checkpoint / "transformer"
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        name = f"{WEIGHTS}.index.json"
        (folder / name).write_text(index if isinstance(index, str) else json.dumps(index))

    return change


def transposed(state: dict[str, torch.Tensor]) -> None:
    """As many values as before, in another order: nothing but the shape can tell."""
    key = "image_encoder.blocks.0.mlp.fc1.weight"
    state[key] = state[key].T.contiguous()


BAD: dict[str, tuple[Change, list[str]]] = {
    # Missing parts
    "no transformer": (remove("transformer"), ["transformer/config.json", "missing"]),
    "no vae": (remove("vae"), ["vae/config.json", "missing"]),
    "no scheduler": (remove("scheduler"), ["scheduler_config.json", "missing"]),
    "no text encoder": (remove("text_encoder"), ["text_encoder/config.json"]),
    "no tokenizer": (remove("tokenizer"), ["tokenizer", "tokenizer.json", "vocab.json"]),
    "no merges": (remove("tokenizer/tokenizer.json", "tokenizer/merges.txt"), ["merges.txt"]),
    "no weights": (remove(TRANSFORMER), ["transformer", "no .safetensors file"]),
    "a file for a part": (
        lambda c: (remove("vae")(c), write("vae", "x")(c)),
        ["vae/config.json"],
    ),
    # Unknown kinds
    "unknown transformer": (edit("transformer/config.json", _class_name="FluxModel"), ["FluxModel", "NOVA"]),
    "unknown vae": (edit("vae/config.json", _class_name="AutoencoderDC"), ["AutoencoderDC", "AutoencoderKL"]),
    "no vae class": (edit("vae/config.json", _class_name=None), ["None", "AutoencoderKL"]),
    "unknown scheduler": (
        edit("scheduler/scheduler_config.json", _class_name="PNDMScheduler"),
        ["PNDMScheduler", "DDPMScheduler"],
    ),
    "unknown betas": (
        edit("scheduler/scheduler_config.json", beta_schedule="steep"),
        ["beta_schedule", "'steep'"],
    ),
    "unknown arch": (
        edit("transformer/config.json", arch=["swin_t", "vit_d6w64", "mlp_d2w64"]),
        ["'swin_t'", "vit_d{depth}w{width}"],
    ),
    "two archs": (edit("transformer/config.json", arch=["vit_d4w64"]), ["transformer/config.json"]),
    "no layers": (
        edit("transformer/config.json", arch=["vit_d0w64", "vit_d6w64", "mlp_d2w64"]),
        ["vit_d0w64"],
    ),
    "odd width": (edit("transformer/config.json", arch=["vit_d4w70", "vit_d6w70", "mlp_d2w64"]), ["64"]),
    "no arch": (edit("transformer/config.json", arch=None), ["transformer/config.json", "'arch'"]),
    # Damaged files
    "config is no json": (write("vae/config.json", "{"), ["vae/config.json", "JSON"]),
    "config is a list": (write("vae/config.json", "[]"), ["vae/config.json", "list"]),
    "config is binary": (write("transformer/config.json", b"\xff\xfe"), ["transformer/config.json", "JSON"]),
    "tokenizer is no json": (write("tokenizer/tokenizer.json", "{"), ["tokenizer", "cannot be read"]),
    "truncated weights": (cut(TRANSFORMER, 100_000), [TRANSFORMER, "truncated or corrupt", "copy"]),
    "empty weights": (cut(TRANSFORMER, 0), [TRANSFORMER, "truncated or corrupt"]),
    "corrupt header": (
        write(TRANSFORMER, b"\x10" + b"\0" * 7 + b"{not json at all"),
        [TRANSFORMER, "corrupt"],
    ),
    "endless header": (write(TRANSFORMER, b"\xff" * 64), [TRANSFORMER, "corrupt"]),
    # Weights that do not fit the config
    "deeper than its weights": (
        edit("transformer/config.json", arch=["vit_d5w64", "vit_d6w64", "mlp_d2w64"]),
        ["transformer", "'video_encoder.blocks.4."],
    ),
    "shallower": (
        edit("transformer/config.json", arch=["vit_d4w64", "vit_d6w64", "mlp_d1w64"]),
        ["'image_decoder.", "no place"],
    ),
    "wider": (
        edit("transformer/config.json", arch=["vit_d4w128", "vit_d6w128", "mlp_d2w64"]),
        ["shape", "config.json asks for"],
    ),
    "transposed": (tensors(TRANSFORMER, transposed), ["fc1.weight", "(64, 256)", "(256, 64)"]),
    "a tensor too few": (
        tensors(TRANSFORMER, lambda t: t.pop("image_encoder.norm.weight")),
        ["'image_encoder.norm.weight'", "1 missing"],
    ),
    "a tensor too many": (
        tensors(TRANSFORMER, lambda t: t.update({"image_encoder.extra.weight": torch.zeros(2)})),
        ["'image_encoder.extra.weight'", "no place"],
    ),
    "vae of other sizes": (
        edit("vae/config.json", block_out_channels=[64, 64, 64, 64]),
        ["vae", "config.json"],
    ),
    "vae that cannot be": (
        edit("vae/config.json", block_out_channels=[30] * 4),
        ["vae/config.json", "vae_decoder"],
    ),
    "vae of other channels": (edit("vae/config.json", latent_channels=16), ["image_dim", "16"]),
    "text encoder of another width": (
        edit("text_encoder/config.json", hidden_size=128),
        ["64", "128", "wide"],
    ),
    "text encoder's other heads": (
        edit("text_encoder/config.json", intermediate_size=100),
        ["text_encoder", "shape"],
    ),
    "sizes that do not fit": (edit("transformer/config.json", image_base_size=[7, 7]), ["image_base_size"]),
    "patches that do not fit": (edit("transformer/config.json", image_size=[90, 96]), ["patches"]),
    # Shards
    "missing shard": (
        shards(
            {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        ),
        ["model-00002-of-00002.safetensors", "missing", "copy"],
    ),
    "shard outside": (shards({"weight_map": {"a": f"../vae/{WEIGHTS}"}}), ["index.json", "outside"]),
    "absolute shard": (shards({"weight_map": {"a": "/etc/passwd"}}), ["index.json", "outside"]),
    "shard is the folder above": (shards({"weight_map": {"a": ".."}}), ["index.json", "outside"]),
    "index is no json": (shards("{"), ["index.json", "no safetensors index"]),
    "index is a list": (shards([]), ["index.json", "no safetensors index"]),
    "index of a list": (
        shards({"weight_map": ["model-00001-of-00002.safetensors"]}),
        ["no safetensors index"],
    ),
    "index of no names": (shards({"weight_map": {"a": 1}}), ["transformer/1", "missing"]),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A published folder to damage."""
    return Path(shutil.copytree(GOLDEN / "t2i" / "checkpoint", tmp_path / "checkpoint"))


def refuse(checkpoint: Path, *words: str) -> str:
    """Library and command line refuse it with these words, and nothing stands beside it afterwards."""
    out = checkpoint.parent / "bundle"
    with pytest.raises(CheckpointError) as caught:
        build_bundle(checkpoint, out)
    assert caught.value.exit_code == 3
    for word in words:
        assert word in str(caught.value)
    result = nova_export("build", checkpoint, "-o", out)
    only_error(result, 3, *words)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    return str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoint(checkpoint: Path, name: str) -> None:
    change, words = BAD[name]
    change(checkpoint)
    refuse(checkpoint, *words)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        build_bundle(tmp_path / "nowhere", tmp_path / "bundle")
    only_error(nova_export("build", tmp_path / "nowhere", "-o", tmp_path / "bundle"), 3, "nowhere")


# Files that could run code


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"])
def test_pickled_weights_are_refused_unread(checkpoint: Path, tmp_path: Path, name: str) -> None:
    exploded = tmp_path / "checkpoint" / "exploded"
    (checkpoint / TRANSFORMER).unlink()
    (checkpoint / "transformer" / name).write_bytes(pickle.dumps({"weight": Bomb(exploded)}))
    message = refuse(checkpoint, f"transformer/{name}", "refused", "safetensors", "weights_only=True")
    assert "save_file" in message and not exploded.exists()


def test_pickles_beside_safetensors_are_left_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exploded = checkpoint / "exploded"
    for part in ("transformer", "vae", "text_encoder"):
        (checkpoint / part / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(exploded)))
    monkeypatch.setattr(build, "build_stages", built_nothing)
    build_bundle(checkpoint, checkpoint.parent / "bundle")
    assert not exploded.exists()


def test_remote_code_is_never_imported(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published checkpoints carry such files, and name them in model_index.json and auto_map."""
    exploded = checkpoint / "exploded"
    for part in ("transformer", "vae", "text_encoder", "scheduler", "tokenizer", "."):
        for name in (f"__{part}__.py", "modeling.py", "__init__.py", "config.py"):
            (checkpoint / part / name).write_text(
                f"from pathlib import Path; Path({str(exploded)!r}).touch()"
            )
    edit("model_index.json", vae=["__vae__", "AutoencoderKL"], transformer=["modeling", "NOVA"])(checkpoint)
    edit("text_encoder/config.json", auto_map={"AutoModel": "modeling.Phi"})(checkpoint)
    monkeypatch.setattr(build, "build_stages", built_nothing)
    build_bundle(checkpoint, checkpoint.parent / "bundle")
    assert not exploded.exists()


def test_index_file_is_not_needed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part says itself what it is."""
    (checkpoint / "model_index.json").unlink()
    monkeypatch.setattr(build, "build_stages", built_nothing)
    build_bundle(checkpoint, checkpoint.parent / "bundle")


def built_nothing(job: Any, specs: Any, work: Path, report: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Loads the stages' weights as a build does, and leaves empty graphs."""
    for spec in specs:
        load_module(spec, job.config, job.checkpoint)
        graph = work / f"{spec.name}.onnx"
        graph.touch()
        entry = {graph.name: file_entry(graph)}
        record = {"spec": spec.to_dict(), "graph": graph.name, "files": entry}
        yield spec.name, {**record, "precision": "fp32", "verified": None}
