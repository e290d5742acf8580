"""The bundle: a folder with a manifest and the files it names, each with size and sha256. Torch-free.

Paths in a manifest are relative and stay inside the folder; files are checked before they are used.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from nova_export.config import NovaConfig
from nova_export.errors import BundleError, NovaExportError
from nova_export.onnx_files import external_files
from nova_export.spec import Stage
from nova_export.stages import Limits, stages
from nova_export.typed import field, read, refusal, shown, step, strict_json, wrong

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHUNK = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle, as the manifest knows it."""

    size: int
    sha256: str


@dataclass(frozen=True)
class StageEntry:
    """A stage: its spec, the graph to load, all its files, its precision, and what verifying it found."""

    spec: Stage
    graph: str
    files: tuple[str, ...]
    precision: str
    verified: Mapping[str, Any] | None


@dataclass(frozen=True)
class EngineEntry:
    """A compiled stage.

    made_of: what it depends on, by name, as it is or as a digest: another value, another engine. spec: the
    stage within the engine's limits, which are tighter than the graph's. attention, bytes, layers: as in
    engine/compiler.py.
    """

    file: str
    spec: Stage
    made_of: Mapping[str, str]
    attention: str | None
    activation_bytes: int | None
    weight_bytes: int | None
    peak_bytes: int
    seconds: float
    layers: Sequence[Mapping[str, Any]] = ()


EntryType = TypeVar("EntryType", StageEntry, EngineEntry)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `check` what you are about to use.

    engines: by target, then by stage. lean_decode, head_steps: as in `stages`.
    """

    folder: Path
    config: NovaConfig
    target: str
    source: Mapping[str, Any]
    tools: Mapping[str, str]
    stages: Mapping[str, StageEntry]
    tokenizer: str | None
    files: Mapping[str, FileEntry]
    engines: Mapping[str, Mapping[str, EngineEntry]] = dataclass_field(default_factory=dict)
    lean_decode: str | None = None
    head_steps: int | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read the manifest and make sure that its files are there, in full length. Raises BundleError."""
        folder = Path(folder)
        data = _read_manifest(folder)
        try:
            bundle = cls._read(folder, data)
            bundle.specs()
        except (ValueError, NovaExportError) as error:
            raise BundleError(f"{folder / MANIFEST}: is damaged ({error}); build it again") from error
        bundle._check_manifest()
        return bundle

    @classmethod
    def _read(cls, folder: Path, data: Mapping[str, Any]) -> Bundle:
        """Raises ValueError that says where."""
        engines = read(Mapping[str, Mapping[str, Any]], data.get("engines", {}), "engines")
        return cls(
            folder=folder,
            config=NovaConfig.from_dict(field(Mapping[str, Any], data, "config")),
            target=field(str, data, "target"),
            source=_source(field(Mapping[str, Any], data, "source")),
            tools=field(Mapping[str, str], data, "tools"),
            stages={
                name: _stage_entry(name, entry, step("stages", name))
                for name, entry in field(Mapping[str, Any], data, "stages").items()
            },
            tokenizer=field(str | None, data, "tokenizer"),
            files={
                path: _file_entry(entry, step("files", path))
                for path, entry in field(Mapping[str, Any], data, "files").items()
            },
            engines={
                target: {
                    name: _engine_entry(name, entry, step(step("engines", target), name))
                    for name, entry in of_target.items()
                }
                for target, of_target in engines.items()
            },
            lean_decode=_lean_decode(data.get("lean_decode")),
            head_steps=read(int | None, data.get("head_steps"), "head_steps"),
        )

    def _check_manifest(self) -> None:
        root = self.folder.resolve()
        for path, entry in self.files.items():
            try:
                inside = is_inside(path) and (self.folder / path).resolve().is_relative_to(root)
                size = (self.folder / path).stat().st_size if inside else 0
                absent = inside and not (self.folder / path).is_file()
            except (OSError, RuntimeError):  # before Python 3.13, of links in a circle
                inside, size, absent = True, 0, True
            if not inside:
                raise BundleError(
                    f"{self.folder}: the manifest names {path!r}, outside the bundle; do not trust it"
                )
            if absent:
                raise BundleError(f"{self.folder / path}: missing; copy the bundle again or build it again")
            if size != entry.size:
                raise BundleError(
                    f"{self.folder / path}: has {size} bytes, must have {entry.size}; copy or build it again"
                )
        if missing := self.specs().keys() - self.stages.keys():
            raise BundleError(
                f"{self.folder / MANIFEST}: has no stage {min(missing)!r}; build the bundle again"
            )
        if not self.config.is_class_conditional and not self.tokenizer:
            raise BundleError(f"{self.folder / MANIFEST}: names no tokenizer; build the bundle again")
        named = [path for stage in self.stages.values() for path in (stage.graph, *stage.files)]
        named += [engine.file for engines in self.engines.values() for engine in engines.values()]
        for path in [*named, *([self.tokenizer] if self.tokenizer else [])]:
            if path not in self.files:
                raise BundleError(
                    f"{self.folder / MANIFEST}: uses {path!r} without listing it; build the bundle again"
                )

    def specs(self, limits: Limits | None = None) -> dict[str, Stage]:
        """The stages within limits, in the order a run uses them."""
        return stages(self.config, limits or Limits(), self.lean_decode, self.head_steps)

    def check(self, *paths: str) -> None:
        """Compare files with the manifest's sha256. Raises BundleError for the first that differs."""
        for path in paths:
            if sha256(self.folder / path) != self.files[path].sha256:
                raise BundleError(
                    f"{self.folder / path}: was changed after it was built (sha256 differs); build it again"
                )

    def check_stage(self, name: str) -> None:
        """`check` the files of a stage, and that its graph reads no others. Raises BundleError."""
        entry = self.stages[name]
        self.check(entry.graph, *(path for path in entry.files if path != entry.graph))
        graph = self.path(entry.graph)
        try:
            beside = {str(PurePosixPath(entry.graph).parent / file) for file in external_files(graph)}
        except (OSError, ValueError) as error:
            raise BundleError(f"{graph}: is no ONNX graph ({error}); build the bundle again") from error
        if unlisted := beside - set(entry.files):
            raise BundleError(
                f"{graph}: reads {min(unlisted)!r}, which the manifest does not list for it; do not trust it"
            )

    def check_all(self) -> None:
        """Check every file, and every stage's graph. Raises BundleError for the first that was changed."""
        for name in self.stages:
            self.check_stage(name)
        of_stages = {path for entry in self.stages.values() for path in entry.files}
        self.check(*(path for path in self.files if path not in of_stages))

    def path(self, name: str) -> Path:
        """Where a file of the bundle is."""
        return self.folder / name


def is_inside(path: str) -> bool:
    """Whether a manifest path is relative and never leaves the folder."""
    pure = PurePosixPath(path)
    return (
        bool(path)
        and not pure.is_absolute()
        and ".." not in pure.parts
        and not any(char in path for char in "\\:\0")
    )


def sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex digest of a file, read in pieces; `progress` is told the bytes of each. Raises BundleError."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
                if progress:
                    progress(len(piece))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest keeps of a file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def replace_folder(new: Path, out: Path) -> None:
    """Put a folder in the place of another, or where there is none yet. Raises OSError."""
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such bundle folder; `nova-export build CHECKPOINT -o {folder}` makes one"
        )
    try:
        data = strict_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{folder}: has no {MANIFEST}, so it is no bundle; `nova-export build` makes one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error}); copy the bundle again") from error
    version = data.get("format") if isinstance(data, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        newer = type(version) is int and version > FORMAT_VERSION
        way = "update nova-export" if newer else "build it again"
        found = repr(version) if version is None or isinstance(version, str) else shown(version)
        raise BundleError(
            f"{path}: has format {found}; this nova-export reads format {FORMAT_VERSION}: {way}"
        )
    return dict(data)


def _source(data: Mapping[str, Any]) -> Mapping[str, Any]:
    field(str, data, "name", "source")
    return data


def _file_entry(data: Any, where: str) -> FileEntry:
    entry = FileEntry(field(int, data, "size", where), field(str, data, "sha256", where))
    if not re.fullmatch("[0-9a-f]{64}", entry.sha256):
        raise wrong(entry.sha256, "64 hexadecimal digits", step(where, "sha256"))
    return entry


def _engine_entry(name: str, data: Any, where: str) -> EngineEntry:
    return _named(name, read(EngineEntry, data, where), data, where)


def _lean_decode(value: Any) -> str | None:
    if value not in (None, "float32", "float16"):
        read(str | None, value, "lean_decode")
        raise wrong(value, "float32, float16 or null", "lean_decode")
    return value


def _stage_entry(name: str, data: Any, where: str) -> StageEntry:
    known = {key.name for key in fields(StageEntry)}
    own = {key: value for key, value in read(Mapping[str, Any], data, where).items() if key in known}
    return _named(name, read(StageEntry, own, where), data, where)


def _named(name: str, entry: EntryType, data: Mapping[str, Any], where: str) -> EntryType:
    """An entry whose spec is sound and that of the stage it stands for."""
    entry.spec.check(data["spec"], step(where, "spec"))
    if entry.spec.name != name:
        raise refusal(f"its spec is that of {entry.spec.name!r}", where)
    return entry
