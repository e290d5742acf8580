"""The folder: what is refused, what killed runs leave, and that its truth is the journal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nova_export.batch.folder import open_folder
from nova_export.errors import InputError, NovaExportError, OutputError, UsageError
from tests.batch.worlds import item

SETTINGS: dict[str, Any] = {"bundle": "b", "fps": 12.0}
A, B, C = item("a"), item("b"), item("c")


def add(path: Path, *items: Any) -> None:
    with open_folder(path, SETTINGS) as folder:
        for one in items:
            (path / "samples" / one.name).write_text("x")
            folder.add(one, 0.5, (1, 2, 2, 3), "00")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "results.jsonl").read_text("utf-8").splitlines()]


def test_results_are_entered_and_found(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    add(out, B)
    [line] = lines(out)
    assert line == {
        "id": "b-0", "prompt": "b", "seed": 0, "file": "samples/b-0.mp4", "seconds": 0.5,
        "frames": [1, 2, 2, 3], "sha256": "00", "key": B.key,
    }  # fmt: skip
    with open_folder(out, SETTINGS) as folder:
        assert folder.missing([A, B, C]) == [A, C]


def test_the_end_puts_them_in_order(tmp_path: Path) -> None:
    add(tmp_path, C, B, A)
    with open_folder(tmp_path, SETTINGS) as folder:
        folder.finish([A, B])
    assert [line["prompt"] for line in lines(tmp_path)] == ["a", "b", "c"]


def test_failures_are_told_until_they_are_mended(tmp_path: Path) -> None:
    with open_folder(tmp_path, SETTINGS) as folder:
        folder.fail(A, "no")
        folder.finish([A])
    failure = json.loads((tmp_path / "failures.jsonl").read_text())
    assert failure == {"id": "a-0", "prompt": "a", "seed": 0, "where": "line 1", "error": "no"}
    with open_folder(tmp_path, SETTINGS) as folder:
        folder.finish([A])
    assert not (tmp_path / "failures.jsonl").exists()


def test_what_a_killed_run_left_is_dropped(tmp_path: Path) -> None:
    add(tmp_path, A, B, C)
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(text[:-20])  # half of C's line
    (tmp_path / "samples" / B.name).unlink()
    (tmp_path / "samples" / ".nova-export-0123456789ab.tmp").write_text("half")
    with open_folder(tmp_path, SETTINGS) as folder:
        assert folder.missing([A, B, C]) == [B, C]
        folder.add(C, 1, (1,), "")
    assert [line["prompt"] for line in lines(tmp_path)] == ["a", "c"]
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {A.name, C.name}


def refused(path: Path, kind: type[NovaExportError], words: str, settings: Any = SETTINGS) -> None:
    with pytest.raises(kind, match=re.escape(words)), open_folder(path, settings):
        pass


def test_other_settings(tmp_path: Path) -> None:
    add(tmp_path, A)
    refused(tmp_path, UsageError, "was made with fps 12.0, not 24", {**SETTINGS, "fps": 24})
    refused(tmp_path, UsageError, "was made with vae_tile None, not 8", {**SETTINGS, "vae_tile": 8})
    refused(tmp_path, UsageError, "was made with fps 12.0, not None", {"bundle": "b"})


def test_a_name_of_other_arguments(tmp_path: Path) -> None:
    add(tmp_path, A)
    changed = item("other")
    changed = type(A)("line 9", "a", A.name, changed.arguments, changed.key)
    with open_folder(tmp_path, SETTINGS) as folder, pytest.raises(UsageError, match=r"line 9: .*prompt 'a'"):
        folder.missing([changed])


def test_two_at_once(tmp_path: Path) -> None:
    with open_folder(tmp_path, SETTINGS):
        refused(tmp_path, UsageError, "another batch is writing to it")
    add(tmp_path, A)


def test_folders_that_are_none_of_a_batch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path, OutputError, "is no folder of a batch")
    refused(tmp_path / "file", OutputError, "file/samples: cannot be made (Not a directory); choose another")
    refused(tmp_path / "file" / "in", OutputError, "cannot be made (Not a directory)")


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"file": 3}', '{"file": "samples/a"}', "3"])
def test_damaged_lines(line: str, tmp_path: Path) -> None:
    add(tmp_path, A, B)
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(f"{line}\n{text}")
    refused(tmp_path, InputError, "line 1: is damaged; delete it")
    assert lines_of(tmp_path) == 3


def lines_of(path: Path) -> int:
    return (path / "results.jsonl").read_text().count("\n")


@pytest.mark.parametrize("text", ["{", "3", "[]"])
def test_damaged_settings(text: str, tmp_path: Path) -> None:
    add(tmp_path, A)
    (tmp_path / "settings.json").write_text(text)
    refused(tmp_path, InputError, "settings.json: is damaged") if text != "[]" else refused(
        tmp_path, UsageError, "was made with bundle None"
    )
