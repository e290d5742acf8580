"""The folder of a batch: what it was made with, the results that are whole, and which are missing.

    OUT/settings.json     what all results share; a run with others is refused
    OUT/results.jsonl     the truth: a line for each result, written when its file has its name
    OUT/failures.jsonl    what the last run could not make, if anything
    OUT/samples/          the files, and nothing else: VBench looks at any one entry

Knows no model. A killed run leaves at most a half last line and hidden files, which the next one drops.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nova_export.batch.items import Item
from nova_export.errors import InputError, OutputError, UsageError
from nova_export.runtime.media import drop_unfinished, output_error, write_whole

SETTINGS, RESULTS, FAILURES, SAMPLES, LOCK = (
    "settings.json", "results.jsonl", "failures.jsonl", "samples", ".lock"
)  # fmt: skip


@dataclass
class Folder:
    """A folder that this process alone writes to; made by `open_folder`. done: results by file name."""

    path: Path
    done: dict[str, dict[str, Any]]
    _journal: IO[str]
    _failures: list[dict[str, Any]] = field(default_factory=list)

    def missing(self, items: Sequence[Item]) -> list[Item]:
        """Those without a result. Raises UsageError where a name holds the result of other arguments."""
        for item in items:
            there = self.done.get(item.name)
            if there is not None and there["key"] != item.key:
                raise UsageError(
                    f"{item.where}: {self.path / SAMPLES / item.name} was made from other arguments (prompt "
                    f"{there['prompt']!r}, seed {there['seed']}); choose another id or another --out"
                )
        return [item for item in items if item.name not in self.done]

    def add(self, item: Item, seconds: float, frames: Sequence[int], sha256: str) -> None:
        """A result, whose file is whole; as in `Result`. Raises OutputError."""
        of_result = {"seconds": seconds, "frames": list(frames), "sha256": sha256}
        record = {**_of(item), "file": f"{SAMPLES}/{item.name}", **of_result, "key": item.key}
        try:
            self._journal.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._journal.flush()
        except OSError as error:
            raise output_error(self.path / RESULTS, error) from error
        self.done[item.name] = record

    def fail(self, item: Item, error: str) -> None:
        """What could not be made, and why."""
        self._failures.append({**_of(item), "where": item.where, "error": error})

    def finish(self, items: Sequence[Item]) -> None:
        """The results in the order of the items, those of earlier prompts files behind them."""
        names = [item.name for item in items if item.name in self.done]
        ordered = [self.done[name] for name in dict.fromkeys([*names, *self.done])]
        _write_lines(self.path / RESULTS, ordered)
        if self._failures:
            _write_lines(self.path / FAILURES, self._failures)
        else:
            (self.path / FAILURES).unlink(missing_ok=True)


@contextmanager
def open_folder(path: Path, settings: Mapping[str, Any]) -> Iterator[Folder]:
    """The folder of a batch, new or gone on with. settings: by name, that its results share.

    Raises OutputError, UsageError where it was made with others or another run is writing to it.
    """
    with ExitStack() as stack:
        try:
            if path.is_dir() and not (path / SETTINGS).exists() and any(path.iterdir()):
                raise OutputError(f"{path}: holds files, but is no folder of a batch; choose another --out")
            _make(path / SAMPLES)
            _lock(path, stack.enter_context((path / LOCK).open("w")))
            _check_settings(path, settings)
            drop_unfinished(path / SAMPLES)
            done = {
                name: one for name, one in _read_results(path).items() if (path / SAMPLES / name).is_file()
            }
            _write_lines(path / RESULTS, list(done.values()))
            journal = stack.enter_context((path / RESULTS).open("a", encoding="utf-8"))
        except OSError as error:
            raise output_error(Path(error.filename or path), error) from error
        try:
            yield Folder(path, done, journal)
        finally:
            with suppress(OSError):
                drop_unfinished(path / SAMPLES)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error


def _lock(path: Path, file: IO[str]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"{path}: another batch is writing to it; wait for it or stop it") from None


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    if not (path / SETTINGS).exists():
        write_whole(path / SETTINGS, lambda file: file.write_text(json.dumps(settings, indent=1)))
        return
    try:
        before = dict(json.loads((path / SETTINGS).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path / SETTINGS}: is damaged ({error}); choose another --out") from error
    for name in [*settings, *before]:
        if before.get(name) != settings.get(name):
            raise UsageError(
                f"{path}: was made with {name} {before.get(name)!r}, not {settings.get(name)!r} as now; "
                "give the same, or choose another --out"
            )


def _read_results(path: Path) -> dict[str, dict[str, Any]]:
    """By file name. Raises InputError for a damaged line that is not the last."""
    if not (path / RESULTS).exists():
        return {}
    *lines, _ = (path / RESULTS).read_bytes().split(b"\n")  # behind the last end: nothing, or half a line
    results = {}
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            results[Path(result["file"]).name] = result
            result["key"], result["prompt"], result["seed"]
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{path / RESULTS}, line {number}: is damaged; delete it, and its result is made again"
            ) from None
    return results


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _of(item: Item) -> dict[str, Any]:
    return {"id": item.id, "prompt": item.arguments["prompt"], "seed": item.arguments["seed"]}
