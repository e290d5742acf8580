"""The hidden folder where a build leaves its finished stages, and how it becomes the bundle: at once.

A stage's record, beside its files, is its entry in the manifest and the key of what it was made from.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from nova_export.bundle import MANIFEST, file_entry, is_inside
from nova_export.errors import BundleError, OutputError, UsageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_out(out: Path, force: bool) -> None:
    if not out.parent.is_dir():
        raise OutputError(
            f"{out.parent}: no such folder; make it first, or choose another place for the bundle"
        )
    if not os.access(out.parent, os.W_OK):
        raise OutputError(f"{out.parent}: is not writable; choose another place for the bundle")
    if out.exists() and not (out / MANIFEST).exists():
        raise OutputError(f"{out}: exists and is no bundle; choose another name, it will not be overwritten")
    if out.exists() and not force:
        raise OutputError(f"{out}: exists; give --force to replace it, stages that did not change are kept")


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """The hidden sibling where a build leaves its finished stages until all are there."""
    work = out.parent / f".{out.name}.partial"
    try:
        work.mkdir(exist_ok=True)
        lock = (work / ".lock").open("w")
    except OSError as error:
        raise OutputError(f"{work}: {error.strerror}; choose another place for the bundle") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{work}: another build of this bundle is running; wait for it or stop it"
            ) from None
        try:
            yield work
        except BaseException as error:
            with suppress(OSError):
                _drop_unfinished(work)
            if not isinstance(error, OSError):
                raise
            full = error.errno in NO_ROOM or "requested and" in str(error)  # numpy's tofile has no errno
            room = "when there is room" if full else "when that is mended"
            kept = f"; finished stages are kept in {work}" if work.exists() else ""
            raise OutputError(
                f"{error.filename or work}: {error.strerror or error}; "
                f"run the same command again {room}{kept}"
            ) from error


def _drop_unfinished(work: Path) -> None:
    """Of a build that did not end, keep the finished stages alone; without any, nothing."""
    if not work.exists() or (work / MANIFEST).exists():
        return  # it became the bundle, or was about to
    keep = {".lock"}
    for record in work.glob("*.json"):
        data = read_record(work, record.stem)
        if data and "files" in data and "key" in data:
            keep |= {record.name, *data["files"]}
    for path in work.iterdir():
        if path.name not in keep:
            _remove(path)
    if keep == {".lock"}:
        shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, out: Path, keep: set[str]) -> None:
    """Drop what is not part of the bundle, then put the folder in its place. keep: paths in the folder."""
    names = {PurePosixPath(path).parts[0] for path in keep}
    for path in work.iterdir():
        if path.name not in names:
            _remove(path)
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def adopt_engines(out: Path, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The engines of the bundle that is replaced, as in its manifest, and their files, linked into `work`.

    Whether they are still those of the new graphs, who builds engines finds out.
    """
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        engines = dict(manifest["engines"])
        paths = [entry["file"] for stages in engines.values() for entry in stages.values()]
        files = {path: manifest["files"][path] for path in paths if is_inside(path)}
        for path in files:
            (work / path).parent.mkdir(exist_ok=True)
            (work / path).unlink(missing_ok=True)
            os.link(out / path, work / path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, {}
    return engines, files


def write_json(path: Path, data: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    temporary.replace(path)


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """What a finished stage left in a work folder or a bundle; None where there is nothing usable."""
    try:
        if (folder / f"{name}.json").exists():
            return dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        record = manifest["stages"][name]
        return {**record, "files": {path: manifest["files"][path] for path in record["files"]}}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def adopt(record: dict[str, Any], folder: Path, work: Path) -> bool:
    """Whether the record's files are whole; links those of another folder into `work`."""
    try:
        if any(file_entry(folder / path) != entry for path, entry in record["files"].items()):
            return False
        for path in record["files"] if folder != work else ():
            (work / path).unlink(missing_ok=True)
            os.link(folder / path, work / path)
    except (OSError, BundleError):
        return False
    return True
