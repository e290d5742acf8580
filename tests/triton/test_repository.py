"""engines.triton.repository: model repositories from manifests, without a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engines.triton.config_text import Enum, to_text
from engines.triton.repository import Serving, batch_axis, package, stage_config
from nova_export.bundle import Bundle
from nova_export.errors import BundleError, OutputError, UsageError
from tests.command_line import nova_export, only_error

BATCHED = {"text_encoder", "spatial_encoder"}  # in the others an input has no axis of samples in front


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path]) -> Path:
    return golden_bundle("t2v")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_text_of_a_config() -> None:
    message = {
        "a": 'x"\n',
        "b": [1, -1],
        "c": {"d": True, "e": Enum("KIND_CPU")},
        "f": [{"g": 1.5}, {"g": 2}],
    }
    assert to_text(message) == (
        'a: "x\\"\\n"\nb: [1, -1]\nc {\n  d: true\n  e: KIND_CPU\n}\nf {\n  g: 1.5\n}\nf {\n  g: 2\n}\n'
    )


def test_in_process(bundle: Path, tmp_path: Path) -> None:
    """One model, which holds the whole bundle and knows what it may do."""
    out = package(bundle, tmp_path / "repository", Serving(loops=2, queue=5, timeout=1.5, threads=3))
    of_bundle = {f"nova/1/bundle/{path}" for path in [*Bundle.open(bundle).files, "manifest.json"]}
    assert files(out) == {"nova_repository.json", "nova/config.pbtxt", "nova/1/model.py", *of_bundle}
    text = (out / "nova" / "config.pbtxt").read_text()
    for wanted in (
        "decoupled: true", "max_batch_size: 8", "count: 2", "kind: KIND_CPU", "max_queue_size: 5",
        "default_timeout_microseconds: 1500000", 'key: "threads"\n  value {\n    string_value: "3"',
        'name: "prompt"\n  data_type: TYPE_STRING\n  dims: [1]\n}',
        'name: "motion_flow"\n  data_type: TYPE_FP32\n  dims: [1]\n  optional: true',
        'name: "image"\n  data_type: TYPE_UINT8\n  dims: [-1, -1, 3]\n  optional: true',
    ):  # fmt: skip
        assert wanted in text
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_stages_as_models(bundle: Path, tmp_path: Path) -> None:
    """A model each, with its own files and no others; those are batched that can be."""
    out = package(bundle, tmp_path / "repository", Serving(stages="models"))
    opened = Bundle.open(bundle)
    for name, entry in opened.stages.items():
        folder = out / f"nova_{name}"
        stage_files = {f"1/{path}" for path in (*entry.files, "model.py", "stage.json")}
        assert files(folder) == {"config.pbtxt", *stage_files}
        text = (folder / "config.pbtxt").read_text()
        assert ("dynamic_batching" in text) == (name in BATCHED) == (batch_axis(entry.spec) is not None)
        assert 'backend: "python"' in text
    assert files(out / "nova") == {"config.pbtxt", "1/model.py", "1/nova.json", "1/tokenizer.json"}
    kept = json.loads((out / "nova" / "1" / "nova.json").read_text())
    assert list(kept["stages"]) == list(opened.stages)


def test_platforms(bundle: Path) -> None:
    """What a GPU server reads for a stage: its graph, or its engine, and no Python."""
    opened = Bundle.open(bundle)
    spatial = opened.stages["spatial_encoder"].spec
    on_gpu = replace(Serving(device="cuda", stages="models").resolved(opened), name="nova")
    config = stage_config(spatial, on_gpu, "spatial_encoder.onnx")
    assert (config["platform"], config["default_model_filename"]) == (
        "onnxruntime_onnx",
        "spatial_encoder.onnx",
    )
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}] and "backend" not in config
    assert config["input"][1]["dims"] == [-1, opened.config.token_dim]
    temporal = stage_config(opened.stages["temporal_encoder"].spec, on_gpu, "temporal_encoder.onnx")
    assert temporal["max_batch_size"] == 0
    assert temporal["input"][0]["dims"] == [-1, -1, opened.config.temporal.width]
    engine = stage_config(spatial, replace(on_gpu, device="h100", platform="tensorrt"), "a.engine")
    assert engine["platform"] == "tensorrt_plan"


def test_what_a_bundle_cannot_serve(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    for serving, message in (
        (Serving(device="h100"), "device 'h100': this bundle runs on cpu, cuda, rtx-ep"),
        (Serving(max_batch=257), "--max-batch is 257; the stages of this bundle for cpu take 256"),
        (Serving(stages="models", platform="tensorrt"), "platform tensorrt does not run device cpu"),
        (Serving(stages="models", device="rtx-ep"), "no backend for what runs on rtx-ep"),
    ):
        with pytest.raises(UsageError, match=message):
            package(bundle, out, serving)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_bundle_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    shutil.copytree(bundle, broken)
    weights = broken / "vae_decoder.onnx.data"
    was = weights.read_bytes()
    weights.write_bytes(bytes([was[0] ^ 1]) + was[1:])
    for stages in ("in-process", "models"):
        with pytest.raises(BundleError, match=r"vae_decoder\.onnx\.data: was changed"):
            package(broken, tmp_path / "repository", Serving(stages=stages))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_only_what_it_wrote_is_replaced(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(OutputError, match="is no repository of nova-export"):
        package(bundle, out, Serving(), force=True)
    shutil.rmtree(out)
    only_error(
        nova_export("package", "triton", bundle, "-o", tmp_path / "no" / "repository"), 6, "no such folder"
    )
    assert nova_export("package", "triton", bundle, "-o", out).code == 0
    only_error(nova_export("package", "triton", bundle, "-o", out), 6, "--force")
    assert nova_export("package", "triton", bundle, "-o", out, "--name", "other", "--force").code == 0
    assert {path.name for path in out.iterdir()} == {"other", "nova_repository.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:8001", "127.0.0.1", "127.0.0.1:8001/v2", "host:grpc"])
def test_addresses_are_those_of_grpc(url: str) -> None:
    only_error(nova_export("triton", "health", url), 2, url, "must be HOST:PORT of the server's gRPC")
