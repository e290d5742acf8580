"""The bundle: a folder with a manifest and the files it names, each with size and sha256. Torch-free.

Paths in a manifest are relative and stay inside the folder; files are checked before they are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from nova_export.config import NovaConfig
from nova_export.errors import BundleError, CheckpointError
from nova_export.onnx_files import external_files
from nova_export.spec import Stage
from nova_export.stages import Limits, stages

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
    engines: Mapping[str, Mapping[str, EngineEntry]] = field(default_factory=dict)
    lean_decode: str | None = None
    head_steps: int | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read the manifest and make sure that its files are there, in full length. Raises BundleError."""
        folder = Path(folder)
        data = _read_manifest(folder)
        try:
            bundle = cls(
                folder=folder,
                config=NovaConfig.from_dict(data["config"]),
                target=str(data["target"]),
                source={"name": str(data["source"]["name"]), **data["source"]},
                tools=dict(data["tools"]),
                stages={name: _stage_entry(entry) for name, entry in data["stages"].items()},
                tokenizer=data["tokenizer"],
                files={
                    path: FileEntry(int(f["size"]), str(f["sha256"])) for path, f in data["files"].items()
                },
                engines={
                    target: {name: _engine_entry(entry) for name, entry in engines.items()}
                    for target, engines in data.get("engines", {}).items()
                },
                lean_decode=data.get("lean_decode"),
                head_steps=data.get("head_steps"),
            )
            bundle._check_manifest()
        except (KeyError, TypeError, ValueError, AttributeError, CheckpointError) as error:
            raise BundleError(
                f"{folder / MANIFEST}: is damaged ({type(error).__name__}: {error}); build it again"
            ) from error
        return bundle

    def _check_manifest(self) -> None:
        root = self.folder.resolve()
        for path, entry in self.files.items():
            if not is_inside(path) or not (self.folder / path).resolve().is_relative_to(root):
                raise BundleError(
                    f"{self.folder}: the manifest names {path!r}, outside the bundle; do not trust it"
                )
            try:
                size = (self.folder / path).stat().st_size
            except OSError:
                raise BundleError(
                    f"{self.folder / path}: missing; copy the bundle again or build it again"
                ) from None
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


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(
            f"{folder}: no such bundle folder; `nova-export build CHECKPOINT -o {folder}` makes one"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{folder}: has no {MANIFEST}, so it is no bundle; `nova-export build` makes one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error}); copy the bundle again") from error
    version = data.get("format") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        way = (
            "update nova-export"
            if isinstance(version, int) and version > FORMAT_VERSION
            else "build it again"
        )
        raise BundleError(
            f"{path}: has format {version!r}; this nova-export reads format {FORMAT_VERSION}: {way}"
        )
    return dict(data)


def _engine_entry(data: Mapping[str, Any]) -> EngineEntry:
    return EngineEntry(**{**data, "spec": Stage.from_dict(data["spec"])})


def _stage_entry(data: Mapping[str, Any]) -> StageEntry:
    return StageEntry(
        spec=Stage.from_dict(data["spec"]),
        graph=str(data["graph"]),
        files=tuple(data["files"]),
        precision=str(data["precision"]),
        verified=data["verified"] and dict(data["verified"]),
    )
