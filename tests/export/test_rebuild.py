"""Building over what is there, and where nothing can be written; when a finished stage is used again."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from nova_export.bundle import MANIFEST, Bundle
from nova_export.errors import CheckpointError, ExportError, OutputError
from nova_export.export import build, build_stage
from nova_export.export.build import fingerprint
from tests.export.builds import (
    OF_TRANSFORMER,
    STAGES,
    Exports,
    change_weights,
    contents,
    fail,
    make,
    reused,
)

# Over what is there


def test_an_existing_bundle_is_not_overwritten(checkpoint: Path, out: Path, exports: Exports) -> None:
    make(checkpoint, out)
    before = contents(out)
    with pytest.raises(OutputError, match="exists; give --force"):
        make(checkpoint, out)
    assert contents(out) == before and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_no_bundle_is_never_overwritten(checkpoint: Path, out: Path, force: bool, kind: str) -> None:
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="is no bundle; choose another name"):
        make(checkpoint, out, force=force)
    assert list(out.parent.iterdir()) == [out]
    assert kind == "empty folder" or (out if kind == "file" else out / "thesis.txt").read_text() == "mine"


def test_force_uses_unchanged_stages_again(checkpoint: Path, out: Path, exports: Exports) -> None:
    make(checkpoint, out)
    first, exports.done = contents(out), []
    assert reused(make(checkpoint, out, force=True)) == STAGES
    assert contents(out) == first and list(out.parent.iterdir()) == [out]
    change_weights(checkpoint, "transformer")
    assert reused(make(checkpoint, out, force=True)) == ["text_encoder", "vae_decoder"]
    assert exports.done == OF_TRANSFORMER
    second = contents(out)
    assert {name for name in first if first[name] != second[name]} == {
        MANIFEST,
        "condition.onnx",
        "condition.onnx.data",
    }
    Bundle.open(out).check_all()


def test_a_failed_force_leaves_the_old_bundle(checkpoint: Path, out: Path, exports: Exports) -> None:
    """Also where the work folder holds links to its files, and those stages change afterwards."""
    make(checkpoint, out)
    before = contents(out)
    exports.stop["vae_decoder"] = fail(ExportError("it failed"))
    for part in ("vae", "text_encoder"):
        change_weights(checkpoint, part)
        with pytest.raises(ExportError):
            make(checkpoint, out, force=True)
        assert contents(out) == before
    exports.stop = {}
    make(checkpoint, out, force=True)
    Bundle.open(out).check_all()
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("change", ["tools", "code"])
def test_other_tools_or_code_make_stages_stale(
    checkpoint: Path, out: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    make(checkpoint, out)
    if change == "tools":
        monkeypatch.setattr(build, "_tool_versions", lambda: {"torch": "9.9"})
    else:
        monkeypatch.setattr(build, "_code_digest", lambda: "another")
    assert reused(make(checkpoint, out, force=True)) == []


def test_unverified_stages_are_not_used_by_a_verifying_build(
    checkpoint: Path, out: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"max_abs_diff": 0.0}
    monkeypatch.setattr(build_stage, "OrtRunner", lambda spec, graph: nullcontext())
    monkeypatch.setattr(build_stage, "reference_cases", lambda *_: [])
    monkeypatch.setattr(build_stage, "check_cases", lambda *_: found)
    make(checkpoint, out)
    assert reused(make(checkpoint, out, verify=True, force=True)) == []
    assert all(entry.verified == found for entry in Bundle.open(out).stages.values())
    assert reused(make(checkpoint, out, force=True)) == STAGES


def test_bundle_of_another_version_is_replaced(checkpoint: Path, out: Path, exports: Exports) -> None:
    out.mkdir()
    for text in ("{}", "[]", "{", '{"stages": {"condition": {"files": []}}, "files": {}}'):
        (out / MANIFEST).write_text(text)
        assert reused(make(checkpoint, out, force=True)) == []
        Bundle.open(out).check_all()


# Places that cannot be written


def test_no_folder(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder; make it first"):
        make(checkpoint, tmp_path / "nowhere" / "bundle")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(checkpoint: Path, out: Path) -> None:
    out.parent.chmod(0o500)
    with pytest.raises(OutputError, match="not writable; choose another place"):
        make(checkpoint, out)
    out.parent.chmod(0o700)


def test_folder_without_permission_as_told(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="not writable; choose another place"):
        make(checkpoint, out)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a /proc")
def test_folder_that_refuses_nobody_and_nothing(checkpoint: Path) -> None:
    """root may write to /proc, and then cannot."""
    with pytest.raises(OutputError, match=r"^/proc.*choose another place"):
        make(checkpoint, Path("/proc/bundle"))


# What a stage is made from


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_fingerprint_follows_content(checkpoint: Path, part: str) -> None:
    first = fingerprint(checkpoint / part)
    for path in (checkpoint / part).iterdir():
        os.utime(path, (1, 1))
    (checkpoint / part / "notes.txt").write_text("no part of it")
    assert fingerprint(checkpoint / part) == first
    change_weights(checkpoint, part)
    second = fingerprint(checkpoint / part)
    config = checkpoint / part / "config.json"
    config.write_text(config.read_text() + " ")
    assert len({first, second, fingerprint(checkpoint / part)}) == 3


def test_unreadable_weights_are_the_checkpoints_fault(checkpoint: Path) -> None:
    (checkpoint / "vae" / "folder.json").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.json: cannot be read"):
        fingerprint(checkpoint / "vae")
