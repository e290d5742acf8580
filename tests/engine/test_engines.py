"""Engines, compiled for real: for GPUs that are not here, by the TensorRT-RTX that needs none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nova_export.bundle import MANIFEST, Bundle, file_entry
from nova_export.config import NovaConfig
from nova_export.engine import build, compatibility, compiler, flavour
from nova_export.engine.build import build_engines, profile
from nova_export.engine.compiler import CompileJob, compile_engine
from nova_export.errors import BundleError, ExportError
from nova_export.stages import LEAST_CACHE, Limits, stages
from nova_export.targets import CPU, TARGETS, find
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN
from tests.engine.processes import compilers, start, wait_until_gone

pytest.importorskip("tensorrt_rtx")  # has no wheel for aarch64

RTX_40 = "rtx-40"


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a golden bundle whose graphs, in float32, are said to be for an RTX 40."""
    path = tmp_path / "bundle"
    shutil.copytree(golden_bundle("t2i"), path)
    edit(path, target=RTX_40)
    return path


def edit(bundle: Path, **changes: Any) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest | changes))


def done(bundle: Path, **options: Any) -> dict[str, list[str]]:
    """Build engines: by stage all that was reported."""
    reported: dict[str, list[str]] = {}
    options = {"target": RTX_40, **options}
    build_engines(bundle, report=lambda stage, what: reported.setdefault(stage, []).append(what), **options)
    return reported


def compiled(reported: dict[str, list[str]]) -> dict[str, str]:
    """Stages that were compiled, and why."""
    return {stage: what[0] for stage, what in reported.items() if what != ["reused"]}


def test_profiles_are_the_axes_within_the_limits() -> None:
    config = NovaConfig.from_checkpoint(GOLDEN / "t2v" / "checkpoint")
    spec = stages(config, Limits(batch=2, frames=5))["temporal_encoder"]
    least, usual, most = profile(spec)["key_cache_0"]
    width = config.temporal.width
    assert least == (1, config.condition_tokens + config.frame_tokens, width)
    assert most == (6, max(LEAST_CACHE, config.condition_tokens + 5 * config.frame_tokens), width)
    assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
    head = stages(config, Limits(batch=2, frames=5))["diffusion_head"]
    assert profile(head)["z"][2][:2] == (3, 2) and profile(head)["step_coefficients"][2] == (1000, 3)
    wide = stages(config)
    for name, stage in stages(config, Limits(1, 1)).items():  # an engine's sizes are among the graph's
        assert all(a.max <= wide[name].axis(a.name).max for a in stage.axes)


def test_targets_are_data() -> None:
    target = find(TARGETS, RTX_40)
    assert (target.runtime, target.compute_capability) == ("tensorrt-rtx", "8.9")
    assert target.graph_form != CPU.graph_form and "bfloat16" in target.kernels
    assert len({each.name for each in TARGETS}) == len(TARGETS) > 4


def test_every_stage_compiles_and_is_kept(bundle: Path) -> None:
    """Then what was changed is compiled again, and nothing else, and the reason is told."""
    assert compiled(done(bundle)) == dict.fromkeys(Bundle.open(bundle).stages, "compiling (not there)")
    opened = Bundle.open(bundle)
    opened.check_all()
    engines = opened.engines[RTX_40]
    assert engines.keys() == opened.stages.keys()
    assert engines["spatial_encoder"].attention == "decomposed"  # no kernel fuses it in float32
    assert engines["condition"].attention is None
    for engine in engines.values():
        assert {"Float"} <= {numbers for layer in engine.layers for numbers in layer["outputs"].split("+")}
        assert engine.weight_bytes and engine.activation_bytes and engine.peak_bytes > 50e6
        assert opened.files[engine.file].size > 10_000
    assert compiled(done(bundle)) == {}

    opened.path(engines["condition"].file).write_bytes(b"no engine")
    with pytest.raises(BundleError, match="bytes"):
        Bundle.open(bundle)
    edit(bundle, files=without(bundle, engines["condition"].file))
    with pytest.raises(BundleError, match="without listing"):
        Bundle.open(bundle)


def without(bundle: Path, path: str) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())["files"]
    return {name: entry for name, entry in files.items() if name != path}


def test_what_changed_is_compiled_again_and_why(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = ("condition", "vae_decoder")
    assert compiled(done(bundle, only=two)).keys() == set(two)
    first = Bundle.open(bundle).engines[RTX_40]["condition"].file

    graph = bundle / "condition.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x32\x01x")  # a doc string: another file, the same graph
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    files[graph.name] = file_entry(graph)
    edit(bundle, files=files)
    assert compiled(done(bundle, only=two)) == {"condition": "compiling (another graph)"}

    assert compiled(done(bundle, only=two, limits=Limits(2, 1))) == {
        "condition": "compiling (another profile)"  # one tile at a time: the decoder knows no batch
    }
    real = flavour.FLAVOURS["tensorrt-rtx"].load()
    monkeypatch.setattr(real, "__version__", "9.9")
    reasons = compiled(done(bundle, only=("condition",), limits=Limits(2, 1)))
    assert reasons == {"condition": f"compiling (version was {version()!r}, is '9.9')"}

    assert compiled(done(bundle, only=("condition",), target="rtx-50")).keys() == {"condition"}
    opened = Bundle.open(bundle)
    opened.check_all()
    assert set(opened.engines) == {RTX_40, "rtx-50"}
    named = {entry.file for engines in opened.engines.values() for entry in engines.values()}
    there = {f"engines/{path.name}" for path in (bundle / "engines").iterdir()}
    assert there == named and first not in named  # those that were replaced are gone


def version() -> str:
    from importlib.metadata import version

    return version("tensorrt-rtx-cu13")


def test_a_graph_that_cannot_be_read_is_explained(bundle: Path, tmp_path: Path) -> None:
    """With the node, and the module of the PyTorch model that it comes from."""
    ir = pytest.importorskip("onnx_ir")
    model = ir.load(bundle / "spatial_encoder.onnx")
    node = next(node for node in model.graph if "blocks.1.mlp" in str(node.metadata_props.get("namespace")))
    node.op_type, node.domain = "Wobble", "unheard.of"
    ir.save(model, tmp_path / "bad.onnx", external_data="bad.data")
    spec = Bundle.open(bundle).stages["spatial_encoder"].spec
    job = CompileJob("tensorrt-rtx", str(tmp_path / "bad.onnx"), str(tmp_path / "x"), profile(spec), "8.9")
    with pytest.raises(ExportError, match=rf"node {node.name} \(Wobble\) of image_encoder\.blocks\.1\.mlp"):
        compile_engine(job)
    assert not (tmp_path / "x").exists()


def test_what_a_version_cannot_compile_for(bundle: Path, tmp_path: Path) -> None:
    spec = Bundle.open(bundle).stages["condition"].spec
    graph = str(bundle / "condition.onnx")
    with pytest.raises(ExportError, match=r"compiles for .*SM89.*, not for SM61"):
        compile_engine(CompileJob("tensorrt-rtx", graph, str(tmp_path / "x"), profile(spec), "6.1"))


def test_a_compiler_that_is_killed_is_told(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system does where memory runs out."""
    started = subprocess.Popen

    def killed(*arguments: Any, **options: Any) -> Any:
        process = started(*arguments, **options)
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # gone before it is told its job
        return process

    monkeypatch.setattr(compiler.subprocess, "Popen", killed)
    spec = Bundle.open(bundle).stages["condition"].spec
    job = CompileJob(
        "tensorrt-rtx", str(bundle / "condition.onnx"), str(tmp_path / "x"), profile(spec), "8.9"
    )
    with pytest.raises(ExportError, match=r"by signal 9.*too little memory"):
        compile_engine(job)


def test_a_compiler_ends_with_who_waits_for_it(bundle: Path) -> None:
    """It is stopped in the middle here: by itself it would neither go on nor end."""
    parent = start("engines", bundle, "-q")
    while (compiler := next(compilers(parent.pid), None)) is None:
        assert parent.poll() is None
        time.sleep(0.01)
    os.kill(compiler, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    try:
        wait_until_gone(parent.pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(compiler, signal.SIGKILL)


@pytest.mark.parametrize("after", [0.6, 1.2, 2.0])
def test_killed_builds_are_gone_on_with(bundle: Path, after: float) -> None:
    """kill -9 at some moment: the bundle opens, and what was compiled is not compiled again."""
    process = start("engines", bundle, "-q")
    time.sleep(after)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = Bundle.open(bundle).engines.get(RTX_40, {})
    reported = done(bundle)
    assert {stage for stage, what in reported.items() if what == ["reused"]} == kept.keys()
    opened = Bundle.open(bundle)
    opened.check_all()
    there = {f"engines/{path.name}" for path in (bundle / "engines").iterdir()}
    assert there == {entry.file for entry in opened.engines[RTX_40].values()}


def test_the_command(bundle: Path, golden_bundle: Callable[[str], Path]) -> None:
    made = nova_export("engines", bundle, "--stage", "condition", "-q", "--json")
    assert made.code == 0, made.err
    [(name, numbers)] = json.loads(made.out).items()
    assert name == "condition" and numbers["bytes"] > 10_000 and (bundle / numbers["file"]).exists()
    again = nova_export("engines", bundle, "--stage", "condition")
    assert "condition: reused" in again.err and "| condition | -" in again.out
    shown = nova_export("inspect", bundle, "-q").out
    assert "engines for rtx-40, by TensorRT-RTX" in shown and "| condition | -" in shown
    assert "gemm" not in shown and "| gemm" in nova_export("inspect", bundle, "-q", "--engines").out
    cpu = golden_bundle("t2i")
    only_error(nova_export("engines", cpu, "-q"), 2, "target cpu", "no engines")
    only_error(nova_export("engines", cpu, "--target", RTX_40, "-q"), 2, "others", f"--target {RTX_40}")
    only_error(nova_export("engines", bundle, "--stage", "vea", "-q"), 2, "'vea'", "vae_decoder")
    only_error(nova_export("engines", bundle, "--target", "rtx-60", "-q"), 2, "'rtx-60'", RTX_40)


def test_a_machine_without_a_gpu(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its own GPU it cannot compile; said before anything is exported."""

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(flavour.ctypes, "CDLL", missing)
    only_error(nova_export("engines", bundle, "--target", "tensorrt-rtx", "-q"), 2, "no NVIDIA GPU", RTX_40)
    command = ("build", GOLDEN / "t2i" / "checkpoint", "-o", tmp_path / "new", "-q")
    only_error(nova_export(*command, "--target", "tensorrt-rtx"), 2, "no NVIDIA GPU", RTX_40)
    assert not (tmp_path / "new").exists()


def test_another_gpu_is_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a target means the GPU of the machine, an engine still knows which one that was."""
    found = []
    for capability in ("8.9", "12.0"):
        monkeypatch.setattr(compatibility, "machine_capability", lambda capability=capability: capability)
        found.append(compatibility.made_by(find(TARGETS, "tensorrt-rtx"))["compute capability"])
    assert found == ["8.9", "12.0"]


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    missing = flavour.Flavour("TensorRT-RTX", "tensorrt_that_is_not_there", "rtx")
    monkeypatch.setitem(flavour.FLAVOURS, "tensorrt-rtx", missing)
    yield


@pytest.mark.usefixtures("no_tensorrt")
def test_without_tensorrt(bundle: Path, tmp_path: Path) -> None:
    """The build says so before it exports anything."""
    only_error(nova_export("engines", bundle, "-q"), 9, "TensorRT-RTX", "nova-export[rtx]")
    command = ("build", GOLDEN / "t2i" / "checkpoint", "-o", tmp_path / "new", "--target", RTX_40, "-q")
    only_error(nova_export(*command), 9, "TensorRT-RTX", "nova-export[rtx]")
    only_error(nova_export("build", "--target", RTX_40, "--no-engines"), 2, "--out", RTX_40)
    assert not (tmp_path / "new").exists()


def test_two_builds_at_once(bundle: Path) -> None:
    with build._locked(bundle):
        only_error(nova_export("engines", bundle, "-q"), 2, "another build")
