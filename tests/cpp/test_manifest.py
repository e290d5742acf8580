"""C++ and Python read the same bundles alike: what one refuses the other does, with the same words.

Every value of real manifests is removed, swapped for another kind, put out of range; files are changed as
somebody hostile would. Differences that remain, each harmless: how a document that is no JSON is described is
up to the parsers; C++ refuses documents of more than 64 MB or 100 levels, Python what its recursion forbids.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_export.bundle import MANIFEST, Bundle, sha256
from nova_export.errors import BundleError, NovaExportError
from nova_export.onnx_files import external_files
from nova_export.spec import Stage
from nova_export.stages import cache_names
from tests.cpp.conftest import Inspect
from tests.strategies import parts
from tests.test_bundle import graph_reading

Manifest = dict[str, Any]
SWAPS = (
    None,
    True,
    -1,
    0,
    1.5,
    2**31,
    2**60,
    10**30,
    "text",
    "../x",
    "",
    [],
    [1],
    [1, 2],
    ["a"],
    {},
    {"a": 1},
)
PATHS = (
    "/etc/passwd",
    "../x",
    "a/../../x",
    "..",
    ".",
    "",
    "a\\b",
    "C:x",
    "a\0b",
    "a//b",
    "./a",
    "a/",
    "ä\n'",
    "a" * 300,
)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """A bundle's folder of any manifest: a value, or text as it is. Files are there in the sizes it says."""
    root = tmp_path_factory.mktemp("bundles")

    def folder(manifest: Any) -> Path:
        made = root / str(len(list(root.iterdir())))
        made.mkdir()
        for path in ("tokenizer.json", "stage.onnx", "other.onnx"):
            (made / path).touch()
        text = manifest if isinstance(manifest, (str, bytes)) else json.dumps(manifest)
        (made / MANIFEST).write_bytes(text.encode() if isinstance(text, str) else text)
        return made

    return folder


def whole(video: bool = True, lean: bool = False) -> Manifest:
    """A manifest with all that there can be, around empty files."""
    from nova_export.config import NovaConfig
    from nova_export.stages import stages

    given = parts(frames=4 if video else 1, text=video)
    if lean:
        given["vae"] = {**given["vae"], "block_out_channels": [32, 32, 32, 32]}
    config = NovaConfig.from_parts(**given)
    empty = {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    specs = {
        name: spec.to_dict()
        for name, spec in stages(
            config, lean_decode="float16" if lean else None, head_steps=5 if lean else None
        ).items()
    }
    entry = {
        "graph": "stage.onnx",
        "files": ["stage.onnx"],
        "precision": "fp32",
        "verified": None,
        "key": "k",
    }
    engine = {
        "file": "other.onnx",
        "spec": specs["diffusion_head"],
        "made_of": {"graph": "x"},
        "attention": None,
    }
    engine |= {
        "activation_bytes": 1,
        "weight_bytes": None,
        "peak_bytes": 2,
        "seconds": 0.5,
        "layers": [{"kind": "x"}],
    }
    return {
        "format": 1,
        "nova_export": "0.1.0",
        "target": "cpu",
        "tools": {"onnx": "1.0"},
        "source": {"name": "checkpoint", "parts": {}},
        "config": json.loads(json.dumps(config.to_dict())),
        "tokenizer": "tokenizer.json" if video else None,
        "stages": {name: {"spec": spec, **entry} for name, spec in json.loads(json.dumps(specs)).items()},
        "lean_decode": "float16" if lean else None,
        "head_steps": 5 if lean else None,
        "engines": {"rtx-40": {"diffusion_head": json.loads(json.dumps(engine))}},
        "files": {path: dict(empty) for path in ("tokenizer.json", "stage.onnx", "other.onnx")},
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a document; of lists the first and the last."""
    if path:
        yield path
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        keys = sorted({0, len(value) - 1})
    for key in keys:
        yield from places(value[key], (*path, key))


def mutations(manifest: Manifest) -> Iterator[Manifest]:
    """Each with one change: a value removed, swapped, renamed or doubled."""
    for path in places(manifest):
        changes: list[Callable[[Any, Any], Any]] = [lambda holder, key: holder.pop(key)]
        changes += [lambda holder, key, swap=swap: holder.__setitem__(key, swap) for swap in SWAPS]
        changes.append(
            lambda holder, key: (
                holder.update(extra=1) if isinstance(holder, dict) else holder.append(holder[key])
            )
        )
        for change in changes:
            changed = copy.deepcopy(manifest)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            change(holder, path[-1])
            yield changed


def python_answer(folder: Path) -> Any:
    """What Python reads, as nova_inspect shows it, or the error."""
    try:
        bundle = Bundle.open(folder)
    except NovaExportError as error:
        return {"error": str(error), "code": error.exit_code}
    config = bundle.config
    shown: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    shown.pop("text_encoder")
    tiling = config.tiling
    shown["tiling"] = [tiling.latent_frames, tiling.overlap, tiling.drop, tiling.frames_per_latent]
    for name in ("video_length", "num_tokens", "frame_tokens", "token_dim", "condition_tokens"):
        shown[name] = getattr(config, name)
    shown["cache_names"] = cache_names(config)
    return {
        "ok": {
            "config": shown,
            "target": bundle.target,
            "stages": {
                name: {
                    "spec": shown_spec(stage.spec),
                    "graph": stage.graph,
                    "files": list(stage.files),
                    "precision": stage.precision,
                }
                for name, stage in bundle.stages.items()
            },
            "stage_names": list(bundle.specs()),
            "engines": {
                target: {
                    name: {"file": e.file, "spec": shown_spec(e.spec), "made_of": dict(e.made_of)}
                    for name, e in engines.items()
                }
                for target, engines in bundle.engines.items()
            },
            "tokenizer": bundle.tokenizer or "",
            "lean_decode": bundle.lean_decode or "",
            "head_steps": bundle.head_steps,
            "files": {path: [entry.size, entry.sha256] for path, entry in bundle.files.items()},
        }
    }


def shown_spec(spec: Stage) -> Any:
    data: dict[str, Any] = json.loads(json.dumps(spec.to_dict()))
    for tensor in (*data["inputs"], *data["outputs"]):
        tensor["alias"] = tensor["alias"] or None  # the empty name is none to both
    return {key: data[key] for key in ("name", "phase", "inputs", "outputs", "axes")}


def assert_alike(inspect: Inspect, folders: list[Path]) -> tuple[int, int]:
    """Both answer the same for every bundle; how many were accepted and refused."""
    answers = inspect("bundle", lines=map(str, folders))
    different = []
    for folder, answer in zip(folders, answers, strict=True):
        expected = python_answer(folder)
        if "cannot be read as JSON" in expected.get("error", ""):
            for said in (answer, expected):
                said["error"] = said.get("error", "").split(" (")[0]
        if answer != expected:
            different.append(f"C++ {str(answer)[:300]}\n  Python {str(expected)[:300]}")
    assert not different, f"{len(different)} of {len(folders)} differ\n" + "\n".join(different[:10])
    accepted = sum("ok" in answer for answer in answers)
    return accepted, len(answers) - accepted


@pytest.mark.parametrize(("video", "lean"), [(True, False), (False, False), (True, True)])
def test_whole_manifests_are_read_alike(
    inspect: Inspect, make: Callable[[Any], Path], video: bool, lean: bool
) -> None:
    assert assert_alike(inspect, [make(whole(video, lean))]) == (1, 0)


def test_every_value_changed(inspect: Inspect, make: Callable[[Any], Path]) -> None:
    """Thousands of manifests: all of the document but most stages, then one stage that is whole."""
    manifest = whole()
    general = {**manifest, "stages": {}}
    changed = []
    for mutation in mutations(general):
        if mutation.get("stages") == {}:
            mutation["stages"] = manifest["stages"]
        changed.append(mutation)
    stage = {"stages": {"vae_decoder": manifest["stages"]["vae_decoder"]}}
    for mutation in mutations(stage):
        stages = mutation.get("stages")
        if isinstance(stages, dict):
            mutation = {"stages": {**manifest["stages"], **stages}}
        changed.append({**manifest, **mutation})
    accepted, refused = assert_alike(inspect, [make(each) for each in changed])
    assert accepted > 100 and refused > 2000, (accepted, refused)


@pytest.mark.parametrize("lean", ["float16", "float32", "int8", 5, None])
@pytest.mark.parametrize("blocks", [[], [32], [32, 32], [32] * 3, [32] * 17, [0, 32, 32], "four", None])
def test_decoders_in_pieces(inspect: Inspect, make: Callable[[Any], Path], lean: Any, blocks: Any) -> None:
    manifests = []
    for layers in (0, 1, 64, 65, -1, "2", None):
        manifest = whole(lean=True)
        manifest["lean_decode"] = lean
        manifest["config"]["vae"] |= {"block_out_channels": blocks, "layers_per_block": layers}
        manifests.append(make(manifest))
    assert_alike(inspect, manifests)


@pytest.mark.parametrize("where", ["files", "graph", "tokenizer", "engine", "of a stage"])
def test_paths(inspect: Inspect, make: Callable[[Any], Path], where: str) -> None:
    folders = []
    for path in PATHS:
        for listed in (True, False):
            manifest = whole()
            if listed or where == "files":
                manifest["files"][path] = manifest["files"]["stage.onnx"]
            if where == "graph":
                manifest["stages"]["condition"]["graph"] = path
            if where == "tokenizer":
                manifest["tokenizer"] = path
            if where == "engine":
                manifest["engines"]["rtx-40"]["diffusion_head"]["file"] = path
            if where == "of a stage":
                manifest["stages"]["condition"]["files"].append(path)
            folders.append(make(manifest))
    _, refused = assert_alike(inspect, folders)
    assert refused > len(folders) // 2


def test_files_that_are_not_what_they_seem(inspect: Inspect, make: Callable[[Any], Path]) -> None:
    folders = []
    for change in (
        "missing",
        "longer",
        "folder",
        "outside",
        "inside",
        "circle",
        "behind",
        "is a link",
        "fifo",
    ):
        manifest = whole()
        if change == "behind":
            manifest["files"]["link/secret"] = manifest["files"]["stage.onnx"]
        folder = make(manifest)
        (folder.parent / "secret").touch()
        file = folder / "other.onnx"
        if change == "longer":
            file.write_bytes(b"x")
        if change == "behind":
            (folder / "link").symlink_to(folder.parent)
        if change in ("missing", "folder", "outside", "inside", "circle", "fifo"):
            file.unlink()
        if change == "folder":
            file.mkdir()
        if change in ("outside", "inside", "circle"):
            file.symlink_to({"outside": "../secret", "inside": "stage.onnx", "circle": "other.onnx"}[change])
        if change == "fifo":
            os.mkfifo(file)
        if change == "is a link":
            folder.with_name("linked").symlink_to(folder)
            folder = folder.with_name("linked")
        folders.append(folder)
    assert assert_alike(inspect, folders) == (2, 7)
    assert_alike(inspect, [folders[0] / "nowhere", folders[0].parent, folders[1] / "stage.onnx"])


BROKEN = [
    "",
    "{",
    "[" * 100_000,
    '{"a": 1, "a": 1}',
    '{"format": NaN}',
    '{"format": 1e999}',
    '"\\ud800"',
    "\ufeff{}",
]
BROKEN += [
    '{"format": 1} x',
    "{'format': 1}",
    '{"format": 1,}',
    '{"format": 01}',
    '"\x01"',
    b"\xff",
    b'"\xc0\xaf"',
]
BROKEN += ["[]", "null", "1", '"format"', "{}"]
BROKEN += [
    f'{{"format": {version}}}'
    for version in ("null", "2", "0", "true", "1.0", '"2"', "[1]", "{}", "1e0", "-1", 10**30)
]


def test_documents_that_are_none(inspect: Inspect, make: Callable[[Any], Path]) -> None:
    accepted, refused = assert_alike(inspect, [make(text) for text in BROKEN])
    assert (accepted, refused) == (0, len(BROKEN))


@pytest.mark.parametrize("name", ["t2i", "t2v"])
def test_a_built_bundle(
    inspect: Inspect, golden_bundle: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Its every file is as listed; then a byte of one, and each is told by its hash alone."""
    folder = Path(shutil.copytree(golden_bundle(name), tmp_path / "bundle"))
    assert assert_alike(inspect, [folder]) == (1, 0)
    assert "ok" in inspect("bundle", lines=[{"check": str(folder)}])[0]
    path = folder / "diffusion_head.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError) as refused:
        Bundle.open(folder).check_all()
    answer = inspect("bundle", lines=[{"check": str(folder)}])
    assert answer == [{"error": str(refused.value), "code": 4}] and path.name in str(refused.value)


@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "unlisted", "x/../../secret", "./stage.onnx"]
)
def test_external_data(
    inspect: Inspect, tmp_path: Path, make: Callable[[Any], Path], location: str, place: str
) -> None:
    model = graph_reading(location, place).SerializeToString()
    manifest = whole(video=False)
    folder = make(manifest)
    (folder / "stage.onnx").write_bytes(model)
    entry = {"size": len(model), "sha256": sha256(folder / "stage.onnx")}
    manifest["files"]["stage.onnx"] = entry
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert inspect("external", lines=[str(folder / "stage.onnx")]) == [{"ok": [location]}]
    try:
        Bundle.open(folder).check_all()
        expected: Any = None
    except BundleError as error:
        expected = {"error": str(error), "code": 4}
    answer = inspect("bundle", lines=[{"check": str(folder)}])[0]
    assert answer == expected or (expected is None and "ok" in answer)
    assert (expected is None) == (location == "./stage.onnx")


def test_a_location_behind_a_tag_of_more_than_32_bits(inspect: Inspect, tmp_path: Path) -> None:
    """ONNX Runtime takes the lower 32 bits of a tag: who does not would overlook a graph."""
    graph = graph_reading("secret").graph.SerializeToString()
    size = bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7])
    hidden = bytes([0xBA, 0x80, 0x80, 0x80, 0x70]) + size + graph  # field 7, and bits above
    plain = bytes([0x3A]) + size + graph
    (tmp_path / "plain.onnx").write_bytes(plain)
    (tmp_path / "hidden.onnx").write_bytes(hidden)
    assert external_files(tmp_path / "plain.onnx") == {"secret"}
    with pytest.raises(ValueError, match="tag is too large"):
        external_files(tmp_path / "hidden.onnx")
    answers = inspect("external", lines=[str(tmp_path / "plain.onnx"), str(tmp_path / "hidden.onnx")])
    assert answers[0] == {"ok": ["secret"]} and "tag is too large" in answers[1]["error"]


def test_any_bytes_for_a_graph(inspect: Inspect, tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    model = graph_reading("some/where", "branch").SerializeToString()
    files = []
    for number in range(1000):
        data = bytearray(model)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        files.append(tmp_path / f"{number}.onnx")
        files[-1].write_bytes(data[: rng.randint(0, len(data))] if number % 4 == 0 else data)
    for file, answer in zip(files, inspect("external", lines=map(str, files)), strict=True):
        try:
            assert answer == {"ok": sorted(external_files(file))}
        except UnicodeDecodeError:
            assert "UTF-8" in answer["error"]
        except ValueError as error:
            assert answer["error"] == str(error)


def test_inputs_are_bound_as_in_python(inspect: Inspect) -> None:
    """Wrong names, types and shapes are refused with the same words."""
    import numpy as np

    spec = Stage.from_dict(whole()["stages"]["spatial_encoder"]["spec"])
    shapes = spec.shapes({"rows": 2, "predicted": 3, "next": 5})
    right = {tensor.name: [tensor.dtype, list(shapes[tensor.name])] for tensor in spec.inputs}
    cases = [right, {**right, "more": ["float32", [1]]}]
    for name, (dtype, shape) in right.items():
        cases.append({key: value for key, value in right.items() if key != name})
        cases += [{**right, name: [other, shape]} for other in ("float32", "int64", "bool", "float16")]
        cases += [
            {**right, name: [dtype, [*shape, 1]]},
            {**right, name: [dtype, shape[1:]]},
            {**right, name: [dtype, []]},
        ]
        for axis in range(len(shape)):
            for size in (0, 1, 7, 10_000):
                cases.append({**right, name: [dtype, [*shape[:axis], size, *shape[axis + 1 :]]]})
    answers = inspect("bind", lines=[{"spec": spec.to_dict(), "inputs": case} for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        try:
            arrays = {
                name: np.broadcast_to(np.zeros((), dtype), shape) for name, (dtype, shape) in case.items()
            }
            expected: Any = {"ok": spec.bind(arrays)}
        except NovaExportError as error:
            expected = {"error": str(error), "code": error.exit_code}
        assert answer == expected
    assert sum("error" in answer for answer in answers) > 60


def test_hashes(inspect: Inspect, tmp_path: Path) -> None:
    files = []
    for number, size in enumerate((0, 1, 63, 64, 65, 2**20 - 1, 2**20, 2**20 + 1)):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(os.urandom(size))
    assert inspect("sha256", lines=map(str, files)) == [{"ok": sha256(file)} for file in files]
    assert "cannot be read" in inspect("sha256", lines=[str(tmp_path / "absent")])[0]["error"]
