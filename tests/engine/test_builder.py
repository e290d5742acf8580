"""What the compiler asks of TensorRT where the real one would need a GPU: timing caches, weights apart."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nova_export.bundle import MANIFEST, Bundle, file_entry
from nova_export.engine import build, compatibility, compiler
from nova_export.engine.build import build_engines
from nova_export.engine.compiler import CompileJob, _compile
from nova_export.engine.timing_cache import timing_file
from nova_export.errors import ExportError, UsageError
from nova_export.export.work_folder import adopt_engines
from tests.command_line import nova_export, only_error
from tests.engine.fake_builder import FakeBuilders

SHAPES = dict.fromkeys(("a", "b"), ((1, 4), (2, 4), (8, 4)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOVA_EXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["returns", "raises"])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeBuilders:
    """TensorRT; what its binding does with a file that is no timing cache is not documented."""
    made = FakeBuilders(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    return made


def job(out: Path, **options: Any) -> CompileJob:
    return CompileJob("tensorrt", "graph.onnx", str(out), SHAPES, None, **options)


def test_what_was_measured_is_not_measured_again(trt: FakeBuilders, tmp_path: Path) -> None:
    timings, said = tmp_path / "cache" / "timings.bin", []
    for _ in range(2):
        _compile(job(tmp_path / "engine", timings=str(timings)), said.append)
    assert trt.measured == ["a", "b"] and "measuring, 1 of 1" in said
    _compile(job(tmp_path / "engine"), said.append)
    assert trt.measured == ["a", "b"] * 2  # without the file it is


@pytest.mark.parametrize("data", [b"", b"damaged"])
def test_a_timing_cache_that_is_none_is_made_anew(trt: FakeBuilders, tmp_path: Path, data: bytes) -> None:
    timings = tmp_path / "timings.bin"
    timings.write_bytes(data)
    _compile(job(tmp_path / "engine", timings=str(timings)), lambda doing: None)
    assert trt.measured == ["a", "b"] and timings.read_bytes().startswith(b"timings")
    trt.makes = False  # what was said of the file is not why
    timings.write_bytes(data)
    with pytest.raises(ExportError, match="no kernel for it"):
        _compile(job(tmp_path / "engine", timings=str(timings)), lambda doing: None)
    assert timings.read_bytes() == data


def test_where_no_timing_cache_can_be_kept(trt: FakeBuilders, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _compile(job(tmp_path / "engine", timings=str(tmp_path / "file" / "timings.bin")), lambda doing: None)
    assert (tmp_path / "engine").exists()


def test_timings_are_of_one_version_on_one_gpu() -> None:
    made_by = {"runtime": "TensorRT", "version": "10.3", "compute capability": "8.7"}
    others = [{**made_by, "version": "10.4"}, {**made_by, "compute capability": "8.9"}]
    assert len({timing_file(each) for each in [made_by, *others]}) == 3
    assert timing_file(dict(reversed(made_by.items()))) == timing_file(made_by)


@pytest.mark.parametrize(
    ("weights", "flags"), [("kept", []), ("refittable", ["REFIT"]), ("stripped", ["STRIP_PLAN"])]
)
def test_weights_apart(trt: FakeBuilders, tmp_path: Path, weights: str, flags: list[str]) -> None:
    _compile(job(tmp_path / "engine", weights=weights), lambda doing: None)
    assert json.loads((tmp_path / "engine").read_bytes()) == {"flags": flags}


def test_a_version_that_cannot_strip_says_so(
    trt: FakeBuilders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(trt.BuilderFlag, "STRIP_PLAN")
    with pytest.raises(ExportError, match=r"this version, 10\.3\.0, .*stripped weights .*STRIP_PLAN"):
        _compile(job(tmp_path / "engine", weights="stripped"), lambda doing: None)


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """One whose graphs are said to be for TensorRT."""
    path = Path(shutil.copytree(golden_bundle("t2i"), tmp_path / "bundle"))
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "target": "tensorrt"}))
    return path


def test_other_weights_are_another_engine(
    bundle: Path, trt: FakeBuilders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled here and now: where kernels are measured, on this GPU, with a timing cache of its own."""
    jobs: list[CompileJob] = []

    def compile_here(job: CompileJob, report: Any) -> Any:
        jobs.append(job)
        return _compile(job, report)

    monkeypatch.setattr(build, "compile_engine", compile_here)
    monkeypatch.setattr(compatibility, "machine_capability", lambda: "8.7")
    said: list[str] = []
    for weights in ("kept", "kept", "stripped", "stripped", "kept"):
        build_engines(
            bundle, "tensorrt", only=["condition"], weights=weights, report=lambda _, what: said.append(what)
        )
    assert [each for each in said if "compiling" in each or each == "reused"] == [
        "compiling (not there)",
        "reused",
        "compiling (weights was 'kept', is 'stripped')",
        "reused",
        "compiling (weights was 'stripped', is 'kept')",
    ]
    assert len({job.timings for job in jobs}) == 1 and len(set(trt.measured)) == len(trt.measured)
    assert Bundle.open(bundle).engines["tensorrt"]["condition"].made_of["weights"] == "kept"


def test_rtx_strips_no_weights_without_a_gpu(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "machine_capability", lambda: None)
    for weights in ("stripped", "refittable"):
        refused = nova_export("engines", bundle, "--target", "rtx-40", "--weights", weights, "-q")
        only_error(refused, 2, f"TensorRT-RTX makes engines with {weights} weights only where there is a GPU")
    monkeypatch.setattr(build, "machine_capability", lambda: "8.9")
    with pytest.raises(UsageError, match="unknown"):  # there it would go on
        build_engines(bundle, "rtx-40", weights="stripped", only=["vea"])


def test_the_real_one_takes_and_gives_timings(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """It measures nothing without a GPU, and refuses its own file there: which does no harm."""
    pytest.importorskip("tensorrt_rtx")
    stage = Bundle.open(golden_bundle("t2i")).stages["condition"]
    graph = str(golden_bundle("t2i") / stage.graph)
    timings = tmp_path / "timings.bin"
    for _ in range(2):
        compiler.compile_engine(
            CompileJob(
                "tensorrt-rtx",
                graph,
                str(tmp_path / "engine"),
                build.profile(stage.spec),
                "8.9",
                timings=str(timings),
            )
        )
        assert timings.stat().st_size > 100 and (tmp_path / "engine").stat().st_size > 10_000


def test_engines_of_stages_that_are_gone_are_not_kept(tmp_path: Path) -> None:
    """A bundle built again with a lean decode has pieces instead of the decoder, whose engine is large."""
    before, work = tmp_path / "before", tmp_path / "work"
    (before / "engines").mkdir(parents=True)
    work.mkdir()
    files = {}
    for name in ("spatial_encoder", "vae_decoder"):
        path = before / "engines" / f"{name}.engine"
        path.write_bytes(name.encode())
        files[f"engines/{name}.engine"] = file_entry(path)
    engines = {name: {"file": f"engines/{name}.engine"} for name in ("spatial_encoder", "vae_decoder")}
    (before / MANIFEST).write_text(json.dumps({"engines": {"rtx-40": engines}, "files": files}))
    kept, of_kept = adopt_engines([before], work, ["spatial_encoder", "vae_decoder_start"])
    assert kept == {"rtx-40": {"spatial_encoder": engines["spatial_encoder"]}}
    assert list(of_kept) == ["engines/spatial_encoder.engine"]
    assert [path.name for path in work.rglob("*.engine")] == ["spatial_encoder.engine"]
