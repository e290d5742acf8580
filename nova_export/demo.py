"""The demo: a small trained checkpoint that comes with the package, and its bundle in the user's cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from nova_export.bundle import FORMAT_VERSION, Bundle
from nova_export.config import NovaConfig
from nova_export.errors import BundleError, OutputError
from nova_export.stages import stages

CACHE_VARIABLE = "NOVA_EXPORT_CACHE"

Build = Callable[[Path, Path], object]  # checkpoint, bundle to write or replace


def demo_checkpoint() -> Path:
    """The checkpoint folder inside the installed package."""
    return Path(str(files("reference_model.demo"))) / "checkpoint"


def cache_folder() -> Path:
    """$NOVA_EXPORT_CACHE, or nova-export in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nova-export"


def cache_file(kind: str, made_of: str, suffix: str) -> Path:
    """Where the cache keeps what is made of something: in a folder for its kind, named by a digest."""
    return cache_folder() / kind / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}{suffix}"


def make_cache_folder() -> None:
    """Raises OutputError."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be made ({error.strerror}), and the demo's bundle belongs there; name a "
            f"folder that can be written in {CACHE_VARIABLE}, or a bundle with --bundle"
        ) from error


def demo_bundle_folder() -> Path:
    """Where the demo's bundle belongs. Named by what it is made of: another version builds its own."""
    return cache_folder() / f"demo-{_fingerprint(demo_checkpoint())[:12]}"


def demo_bundle(build: Build) -> Path:
    """The demo's bundle. `build` is called if it is not in the cache, or a file of it was changed."""
    folder = demo_bundle_folder()
    try:
        Bundle.open(folder).check_all()
    except BundleError:
        make_cache_folder()
        build(demo_checkpoint(), folder)
    return folder


def _fingerprint(checkpoint: Path) -> str:
    """SHA-256 of the checkpoint's files, and of the stages that this version makes of them."""
    config = NovaConfig.from_checkpoint(checkpoint)
    digest = hashlib.sha256(f"{FORMAT_VERSION} {stages(config)}".encode())
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        digest.update(path.relative_to(checkpoint).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
