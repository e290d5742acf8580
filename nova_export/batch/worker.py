"""A worker: opens a bundle and makes one result after another. Runs in this process or in one of Ray's.

What is the item's own fault becomes a Failure, and the next one is made; what would hit all (a full disk, a
damaged bundle) is raised.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nova_export.batch.folder import SAMPLES, SETTINGS
from nova_export.batch.items import Item
from nova_export.bundle import MANIFEST, sha256
from nova_export.errors import BundleError, InputError, NovaExportError, OutputError, StageError, UsageError
from nova_export.runtime.media import save_outputs
from nova_export.runtime.pipeline import Callback, Pipeline, load

OWN_FAULTS = (InputError, StageError, UsageError)


@dataclass(frozen=True)
class Result:
    """A file that is whole. frames: uint8 (F, H, W, 3), their shape; sha256: of their bytes in that order."""

    seconds: float
    frames: tuple[int, ...]
    sha256: str
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why an item has no result."""

    error: str


class Worker(Protocol):
    """What pools run; it is pickled on its way, before `open`."""

    def open(self, threads: int) -> None:
        """Get ready, once in each process. threads: CPU threads to use; 0 is for the library to say.

        Raises NovaExportError for what no item could be made with.
        """

    def make(self, item: Item, callback: Callback | None = None) -> Result | Failure:
        """Write an item's file."""


@dataclass
class PipelineWorker:
    """One over a bundle. manifest: the sha256 that its manifest must have; options: of `load`."""

    bundle: Path
    manifest: str
    out: Path
    fps: float
    options: Mapping[str, Any]
    _pipe: Pipeline | None = field(default=None, repr=False)

    def open(self, threads: int) -> None:
        """Raises BundleError, OutputError: also where another machine does not see the same files."""
        if not (self.out / SETTINGS).exists():
            raise OutputError(
                f"{self.out}: a worker does not see it; it must be on a file system that all machines share"
            )
        if sha256(self.bundle / MANIFEST) != self.manifest:
            raise BundleError(f"{self.bundle}: a worker sees another bundle there; copy it to all machines")
        self._pipe = load(self.bundle, threads=threads, **self.options)

    def make(self, item: Item, callback: Callback | None = None) -> Result | Failure:
        assert self._pipe is not None
        started = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module="nova_export")
            try:
                output = self._pipe(callback=callback, **item.arguments)
            except OWN_FAULTS as error:
                return Failure(str(error))
            except NovaExportError:
                raise
            except MemoryError as error:
                return Failure(f"out of memory ({error}); try --low-memory, or a shorter or smaller video")
            except Exception as error:  # a bug that one prompt met must not cost the others
                return Failure(f"internal error: {type(error).__name__}: {error}; `run` shows more of it")
        save_outputs(self.out / SAMPLES / item.name, output.frames, output.latents, self.fps)
        notices = tuple(str(one.message) for one in caught)
        frames = output.frames[0]
        digest = hashlib.sha256(frames.tobytes()).hexdigest()
        return Result(round(time.monotonic() - started, 3), frames.shape, digest, notices)
