"""The hidden folder where a build leaves its finished stages, and how it becomes the bundle: at once.

A stage's record, beside its files, is its entry in the manifest and the key of what it was made from.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from nova_export.bundle import MANIFEST, file_entry, is_inside, replace_folder
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
            _drop_unfinished(work)  # what a killed build left: whole copies of graphs may be among it
            yield work
        except BaseException as error:
            with suppress(OSError):
                if work.exists() and not _drop_unfinished(work):
                    shutil.rmtree(work, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            full = error.errno in NO_ROOM or "requested and" in str(error)  # numpy's tofile has no errno
            room = "when there is room" if full else "when that is mended"
            kept = f"; finished stages are kept in {work}" if work.exists() else ""
            raise OutputError(
                f"{error.filename or work}: {error.strerror or error}; "
                f"run the same command again {room}{kept}"
            ) from error


def _drop_unfinished(work: Path) -> bool:
    """Of a build that did not end, keep alone what is finished: stages, and with a manifest engines.

    Whether there is any.
    """
    keep = set()
    for record in work.glob("*.json"):
        data = read_record(work, record.stem)
        if data and "files" in data:
            keep |= {record.name, *_top(data["files"])}
    for path in work.iterdir():
        if path.name not in {".lock", *keep}:
            _remove(path)
    return bool(keep)


def publish(work: Path, out: Path, keep: set[str]) -> None:
    """Drop what is not part of the bundle, then put the folder in its place. keep: paths in the folder."""
    names = _top(keep)
    for path in work.iterdir():
        if path.name not in names:
            _remove(path)
    replace_folder(work, out)


def _top(paths: Iterable[str]) -> set[str]:
    """What in the folder itself holds these paths."""
    return {PurePosixPath(path).parts[0] for path in paths}


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def adopt_engines(
    folders: Sequence[Path], work: Path, names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The engines of bundles, the first that has one, as in their manifests, and their files: all in `work`.

    names: stages that there are; with another decode others were. Whether engines are still those of the new
    graphs, who builds them finds out.
    """
    engines: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for folder in folders:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            for target, stages in manifest["engines"].items():
                for stage, entry in stages.items():
                    if stage not in names:
                        continue
                    named = {entry["file"]: manifest["files"][entry["file"]]}
                    if stage not in engines.get(target, {}) and adopt({"files": named}, folder, work):
                        engines.setdefault(target, {})[stage] = entry
                        files |= named
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
        for path, entry in record["files"].items():
            if not is_inside(path) or file_entry(folder / path) != entry:
                return False
        for path in record["files"] if folder != work else ():
            (work / path).parent.mkdir(exist_ok=True)
            (work / path).unlink(missing_ok=True)
            os.link(folder / path, work / path)
    except (OSError, BundleError):
        return False
    return True
