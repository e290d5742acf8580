"""Bundles that were changed, cut short, made by someone hostile, or by another version: each is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import nova_export
from nova_export.bundle import FORMAT_VERSION, MANIFEST, Bundle, is_inside, sha256
from nova_export.errors import BundleError
from nova_export.onnx_files import external_files

GRAPH = "diffusion_head.onnx"
Manifest = dict[str, Any]


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(golden_bundle("t2i"), tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[Manifest], Any]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def relist(bundle: Path, name: str, as_name: str | None = None) -> None:
    """Give a file an honest entry, as one who makes a hostile bundle would."""
    entry = {"size": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
    edit(bundle, lambda manifest: manifest["files"].update({as_name or name: entry}))


def refuse(opens: Callable[[], object], *words: str) -> None:
    """It raises BundleError, whose text has all these words."""
    with pytest.raises(BundleError) as caught:
        opens()
    assert caught.value.exit_code == 4
    for word in words:
        assert word in str(caught.value)


def test_a_whole_bundle_passes(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.check_all()
    assert set(opened.files) == {path.name for path in bundle.iterdir()} - {MANIFEST}


def test_changed_byte(bundle: Path) -> None:
    """Same size, so only the hash tells; found when the stage is first used, and by `check_all`."""
    path = bundle / f"{GRAPH}.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refuse(Bundle.open(bundle).check_all, path.name, "sha256", "build it again")
    pipe = nova_export.load(bundle)
    refuse(lambda: pipe("a prompt", num_inference_steps=1, num_diffusion_steps=1), path.name, "sha256")


def test_changed_tokenizer(bundle: Path) -> None:
    path = bundle / "tokenizer.json"
    path.write_text(path.read_text().replace("1", "2", 1))
    refuse(lambda: nova_export.load(bundle), "tokenizer.json", "sha256")


@pytest.mark.parametrize("name", [GRAPH, f"{GRAPH}.data", "tokenizer.json"])
def test_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refuse(lambda: Bundle.open(bundle), name, "missing", "copy the bundle again")


def test_truncated_file(bundle: Path) -> None:
    path = bundle / f"{GRAPH}.data"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    refuse(lambda: Bundle.open(bundle), path.name, f"{size - 1} bytes", str(size), "copy")


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret", "a/../../secret", "..", "", "..\\secret", "C:secret", "C:\\secret", "a\0b"],
)
def test_paths_that_leave_the_folder(bundle: Path, path: str) -> None:
    (bundle.parent / "secret").write_bytes(b"x")
    entry = {"size": 1, "sha256": "0" * 64}
    edit(bundle, lambda manifest: manifest["files"].update({path: entry}))
    assert not is_inside(path)
    refuse(lambda: Bundle.open(bundle), repr(path), "outside the bundle", "do not trust it")


@pytest.mark.parametrize("target", ["../secret", "absolute"])
def test_symlink_that_leaves_the_folder(bundle: Path, target: str) -> None:
    secret = bundle.parent / "secret"
    secret.write_bytes((bundle / GRAPH).read_bytes())
    (bundle / GRAPH).unlink()
    (bundle / GRAPH).symlink_to(secret if target == "absolute" else target)
    refuse(lambda: Bundle.open(bundle), GRAPH, "outside the bundle")


def test_folder_behind_a_symlink(bundle: Path) -> None:
    (bundle / "folder").symlink_to(bundle.parent)
    (bundle.parent / "secret").write_bytes(b"x")
    relist(bundle, "folder/secret")
    refuse(lambda: Bundle.open(bundle), "folder/secret", "outside the bundle")


def test_a_bundle_may_itself_be_a_symlink(bundle: Path) -> None:
    link = bundle.parent / "link"
    link.symlink_to(bundle)
    Bundle.open(link).check_all()


@pytest.mark.parametrize(
    ("version", "way_out"),
    [
        (FORMAT_VERSION + 1, "update nova-export"),
        (FORMAT_VERSION - 1, "build it again"),
        (None, "build it again"),
        ("2", "build it again"),
    ],
)
def test_other_format_version(bundle: Path, version: Any, way_out: str) -> None:
    edit(bundle, lambda manifest: manifest.update(format=version))
    refuse(lambda: Bundle.open(bundle), MANIFEST, repr(version), str(FORMAT_VERSION), way_out)


def test_absent_format_version(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.pop("format"))
    refuse(lambda: Bundle.open(bundle), MANIFEST, "None", "build it again")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x80", "\udcff"])
def test_manifest_is_no_json(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("latin-1", "surrogateescape"))
    refuse(lambda: Bundle.open(bundle), MANIFEST, "JSON", "again")


@pytest.mark.parametrize("text", ["[]", "null", '"format"', "1"])
def test_manifest_is_no_object(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    refuse(lambda: Bundle.open(bundle), MANIFEST, "build it again")


@pytest.mark.parametrize("key", ["config", "target", "source", "tools", "stages", "tokenizer", "files"])
def test_manifest_without_a_key(bundle: Path, key: str) -> None:
    edit(bundle, lambda manifest: manifest.pop(key))
    refuse(lambda: Bundle.open(bundle), MANIFEST, repr(key), "build it again")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("config",), []),
        (("config", "temporal"), 5),
        (("config", "latent_size"), None),
        (("config", "vae"), {"_class_name": "Unknown"}),
        (("source",), []),
        (("tools",), 5),
        (("stages",), []),
        (("stages", "condition"), None),
        (("stages", "condition", "spec"), {}),
        (("stages", "condition", "files"), 5),
        (("stages", "condition", "verified"), 5),
        (("files",), []),
        (("files", GRAPH), {}),
        (("files", GRAPH, "size"), "many"),
    ],
)
def test_manifest_with_another_kind_of_value(bundle: Path, keys: tuple[str, ...], value: Any) -> None:
    def change(manifest: Manifest) -> None:
        *path, last = keys
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    edit(bundle, change)
    refuse(lambda: Bundle.open(bundle), MANIFEST, "build it again")


def test_missing_stage(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest["stages"].pop("spatial_encoder"))
    refuse(lambda: Bundle.open(bundle), MANIFEST, "'spatial_encoder'", "build the bundle again")


def test_no_tokenizer(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(tokenizer=None))
    refuse(lambda: Bundle.open(bundle), MANIFEST, "tokenizer", "build the bundle again")


@pytest.mark.parametrize("key", ["graph", "files", "tokenizer"])
def test_unlisted_file(bundle: Path, key: str) -> None:
    def change(manifest: Manifest) -> None:
        if key == "tokenizer":
            manifest["tokenizer"] = "other"
        else:
            manifest["stages"]["condition"][key] = "other" if key == "graph" else ["other"]

    edit(bundle, change)
    refuse(lambda: Bundle.open(bundle), MANIFEST, "'other'", "build the bundle again")


def test_not_a_bundle(tmp_path: Path) -> None:
    refuse(lambda: Bundle.open(tmp_path / "nowhere"), "nowhere", "no such bundle folder", "nova-export build")
    refuse(lambda: Bundle.open(tmp_path), str(tmp_path), MANIFEST, "nova-export build")
    (tmp_path / "file").write_text("x")
    refuse(lambda: Bundle.open(tmp_path / "file"), "file", "no such bundle folder")


def test_tokenizer_that_is_none(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_text("{}")
    relist(bundle, "tokenizer.json")
    refuse(lambda: nova_export.load(bundle), "tokenizer.json", "no tokenizer")


# Files that a graph reads by itself


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph_reading(location: str, place: str = "initializer") -> onnx.ModelProto:
    """y = x + w, with w in another file: as an initializer, a constant, or deep in a branch."""
    tensor = external("w", location)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    constant = helper.make_node("Constant", [], ["w"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    if place == "initializer":
        graph = helper.make_graph([add], "g", [x], [y], [tensor])
    elif place == "constant":
        graph = helper.make_graph([constant, add], "g", [x], [y])
    else:
        inner = helper.make_graph([constant, add], "branch", [], [y])
        always = helper.make_tensor("c", TensorProto.BOOL, [], [True])
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        graph = helper.make_graph([node], "g", [x], [y], [always])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
@pytest.mark.parametrize("location", ["../secret", "absolute", "link", "unlisted", "x/../../secret"])
def test_external_data_that_is_not_the_bundles(bundle: Path, location: str, place: str) -> None:
    """An honest manifest around a graph that asks ONNX Runtime for another file: 1.23 would read it."""
    secret = bundle.parent / "secret"
    secret.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (bundle / "link").symlink_to(secret)
    (bundle / "unlisted").write_bytes(secret.read_bytes())
    (bundle / "x").mkdir()
    location = str(secret) if location == "absolute" else location
    (bundle / GRAPH).write_bytes(graph_reading(location, place).SerializeToString())
    relist(bundle, GRAPH)
    opened = Bundle.open(bundle)
    refuse(lambda: opened.check_stage("diffusion_head"), GRAPH, location, "do not trust it")
    refuse(opened.check_all, GRAPH)
    pipe = nova_export.load(bundle)
    refuse(lambda: pipe("a prompt", num_inference_steps=1, num_diffusion_steps=1), GRAPH, location)


@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
def test_external_files_are_found(tmp_path: Path, place: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(graph_reading("some/where", place).SerializeToString())
    assert external_files(path) == {"some/where"}


def test_external_files_of_a_function(tmp_path: Path) -> None:
    model = graph_reading("outer")
    constant = helper.make_node("Constant", [], ["o"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(external("w", "inner"))
    function = helper.make_function("own", "F", [], ["o"], [constant], model.opset_import)
    model.functions.append(function)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert external_files(path) == {"outer", "inner"}


@pytest.mark.parametrize("data", [b"\xff", b"\x3a\x05abc", b"\x3b", b"no model at all", b"\xff" * 12])
def test_garbage_for_a_graph(bundle: Path, data: bytes) -> None:
    (bundle / GRAPH).write_bytes(data)
    relist(bundle, GRAPH)
    refuse(lambda: Bundle.open(bundle).check_stage("diffusion_head"), GRAPH, "no ONNX graph")


def test_graph_that_onnx_runtime_cannot_load(bundle: Path) -> None:
    """Well-formed protobuf, and no model."""
    (bundle / GRAPH).write_bytes(b"")
    relist(bundle, GRAPH)
    pipe = nova_export.load(bundle)
    refuse(
        lambda: pipe("a prompt", num_inference_steps=1, num_diffusion_steps=1), GRAPH, "ONNX Runtime", "load"
    )
