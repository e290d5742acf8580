"""Building a bundle: whole or not at all, resumed where it stopped, verified."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nova_export.bundle import MANIFEST, Bundle, EngineEntry
from nova_export.engine.build import _listed
from nova_export.errors import ExportError, OutputError, UsageError
from nova_export.export import build, build_stage
from tests.export.builds import (
    STAGES,
    Exports,
    contents,
    fail,
    make,
    only,
    partial,
    reused,
)

ROOT = Path(__file__).parents[2]
ENDS = (".json", ".onnx", ".onnx.data")


# Whole, or not at all


def test_a_bundle_and_nothing_else(checkpoint: Path, out: Path, exports: Exports) -> None:
    reported = make(checkpoint, out)
    assert reported[:2] == [("text_encoder", "loading"), ("text_encoder", "exporting")]
    assert exports.done == STAGES and list(out.parent.iterdir()) == [out]
    opened = Bundle.open(out)
    opened.check_all()
    assert set(contents(out)) == {MANIFEST, *opened.files}
    assert opened.source["name"] == "checkpoint" and opened.target == "cpu"


KILLED = """
import os, signal, sys
from pathlib import Path
from nova_export.export import build, build_stage
from tests.export.builds import Exports
fake = build_stage.export_onnx = Exports()
fake.stop["temporal_encoder"] = lambda path: os.kill(os.getpid(), signal.SIGKILL)
build.build_bundle(sys.argv[1], sys.argv[2], verify=False)
"""


def test_killed_build_is_resumed(checkpoint: Path, out: Path, exports: Exports) -> None:
    """Killed while the third stage was written: no bundle; the next run exports that and what follows."""
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(out)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -signal.SIGKILL
    assert list(out.parent.iterdir()) == [partial(out)]
    assert (partial(out) / "temporal_encoder.onnx").exists()  # the half-written one
    assert reused(make(checkpoint, out)) == STAGES[:2]
    assert exports.done == STAGES[2:] and list(out.parent.iterdir()) == [out]
    Bundle.open(out).check_all()
    make(checkpoint, out.with_name("at-once"))
    assert contents(out) == contents(out.with_name("at-once"))


@pytest.mark.parametrize("moment", ["manifest written", "records gone"])
def test_killed_before_the_last_rename(
    checkpoint: Path, out: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Killed(BaseException):
        pass

    def publish(work: Path, out: Path, keep: set[str]) -> None:
        if moment == "records gone":
            for path in [path for path in work.iterdir() if path.name not in keep]:
                path.unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(build, "publish", publish)
        make(checkpoint, out)
    assert not out.exists() and (partial(out) / MANIFEST).exists()
    assert reused(make(checkpoint, out)) == STAGES and exports.done == STAGES
    Bundle.open(out).check_all()


def test_damaged_leftovers_are_built_again(checkpoint: Path, out: Path, exports: Exports) -> None:
    exports.stop["vae_decoder"] = fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make(checkpoint, out)
    (partial(out) / "condition.onnx.data").write_bytes(b"changed")
    (partial(out) / "spatial_encoder.json").write_text("{")
    (partial(out) / "diffusion_head.json").write_text("[]")
    exports.stop, exports.done = {}, []
    assert reused(make(checkpoint, out)) == ["text_encoder", "temporal_encoder"]
    assert exports.done == ["condition", "spatial_encoder", "diffusion_head", "vae_decoder"]
    Bundle.open(out).check_all()


def test_what_a_killed_build_left_goes_first(checkpoint: Path, out: Path, exports: Exports) -> None:
    """Half-written graphs, and whole copies that were to be verified: the next run may need their room."""
    exports.stop["condition"] = fail(ExportError("it failed"))
    with pytest.raises(ExportError):
        make(checkpoint, out)
    (partial(out) / "tmpcopy").mkdir()
    (partial(out) / "tmpcopy" / "condition.onnx").touch()
    (partial(out) / "condition.onnx").touch()
    left: list[set[str]] = []
    exports.stop["condition"] = lambda path: left.append(set(contents(path.parent))) or path.touch()
    make(checkpoint, out)
    assert left == [{".lock", "condition.onnx", *(f"text_encoder{end}" for end in ENDS)}]


def test_engines_are_part_of_the_bundle(
    checkpoint: Path, out: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while they are compiled there is no bundle yet, and the next run finds what was finished."""
    found: list[list[str]] = []

    def compile_next(folder: Path, target: str, **options: Any) -> Bundle:
        """One engine more; interrupted after the first."""
        opened = Bundle.open(folder)
        there = opened.engines.get(target, {})
        found.append(sorted(there))
        name = STAGES[len(there)]
        (folder / "engines").mkdir(exist_ok=True)
        (folder / "engines" / name).write_text(name)
        entry = EngineEntry(f"engines/{name}", opened.stages[name].spec, {}, None, None, None, 0, 0.0)
        opened = _listed(opened, target, name, entry)
        if not there:
            raise KeyboardInterrupt
        return opened

    monkeypatch.setattr(build, "build_engines", compile_next)
    with pytest.raises(KeyboardInterrupt):
        make(checkpoint, out, engines=True)
    assert not out.exists()
    assert reused(make(checkpoint, out, engines=True)) == STAGES
    assert found == [[], STAGES[:1]] and list(out.parent.iterdir()) == [out]
    Bundle.open(out).check_all()
    assert list(Bundle.open(out).engines["cpu"]) == STAGES[:2]
    make(checkpoint, out, engines=True, force=True)
    assert found[-1] == sorted(STAGES[:2])


@pytest.mark.parametrize(("number", "way_out"), [(errno.ENOSPC, "when there is room"), (errno.EIO, "mended")])
def test_disk_trouble(checkpoint: Path, out: Path, exports: Exports, number: int, way_out: str) -> None:
    """Says what is kept and what to do; the half-written stage goes, for its space may be needed."""
    exports.stop["spatial_encoder"] = fail(OSError(number, os.strerror(number), "spatial_encoder.onnx"))
    with pytest.raises(OutputError, match=way_out) as caught:
        make(checkpoint, out)
    for word in ("spatial_encoder.onnx", os.strerror(number), str(partial(out)), "same command"):
        assert word in str(caught.value)
    assert not out.exists() and not list(partial(out).glob("spatial_encoder*"))
    exports.stop = {}
    assert reused(make(checkpoint, out)) == STAGES[:3]


def test_no_room_for_the_manifest(
    checkpoint: Path, out: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found half-written, it would hide the finished stages."""
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        if not path.name.startswith(MANIFEST):
            return write(path, text, **options)
        write(path, text[:100], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(Path, "write_text", full)
        make(checkpoint, out)
    assert not out.exists() and not list(partial(out).glob(f"{MANIFEST}*"))
    assert reused(make(checkpoint, out)) == STAGES


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file over 20 kB can be written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_under_the_real_export(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, small_files: None
) -> None:
    only(monkeypatch, "condition")
    cause = r"(File too large|\d+ requested and \d+ written)"
    with pytest.raises(OutputError, match=cause + "; run the same command again when there is room$"):
        make(checkpoint, out)
    assert list(out.parent.iterdir()) == []


def test_a_failure_before_the_first_stage_leaves_nothing(
    checkpoint: Path, out: Path, exports: Exports
) -> None:
    exports.stop["text_encoder"] = fail(ExportError("stage text_encoder: it failed"))
    with pytest.raises(ExportError):
        make(checkpoint, out)
    assert list(out.parent.iterdir()) == []


def test_one_build_at_a_time(checkpoint: Path, out: Path, exports: Exports) -> None:
    exports.stop["condition"] = fail(ExportError("it failed"))
    with pytest.raises(ExportError):
        make(checkpoint, out)
    before = contents(partial(out))
    with (partial(out) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # the weakest there is
        with pytest.raises(UsageError, match="another build of this bundle is running"):
            make(checkpoint, out)
    assert contents(partial(out)) == before and exports.done == ["text_encoder"]


# The real export, of the smallest stage


def test_real_exports_are_reproducible_and_verified(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "condition")
    other = out.with_name("other")
    assert make(checkpoint, out, verify=True)[-1] == ("condition", "verifying")
    make(checkpoint, other, verify=True)
    assert contents(out) == contents(other)
    [stage] = json.loads((out / MANIFEST).read_text())["stages"].values()
    assert stage["verified"]["cases"] == 3 and 0 <= stage["verified"]["max_abs_diff"] < 1e-4


@pytest.mark.parametrize("by", [0.01, float("nan")])
def test_verifying_catches_a_graph_with_another_weight(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    real = build_stage.export_onnx

    def broken(spec: Any, module: Any, path: Path, opset: int) -> None:
        weight = module.text_embed.norm.bias
        kept = weight.clone()
        weight[0] += by
        real(spec, module, path, opset)
        weight.copy_(kept)

    only(monkeypatch, "condition")
    monkeypatch.setattr(build_stage, "export_onnx", broken)
    with pytest.raises(
        ExportError, match="stage condition: condition differs from the reference by"
    ) as caught:
        make(checkpoint, out, verify=True)
    assert caught.value.exit_code == 7
    assert list(out.parent.iterdir()) == []
    make(checkpoint, out)  # not asked to look, it does not
