"""A batch without a model: a worker that makes noise in milliseconds, and dies where a prompt says so."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nova_export.batch.folder import SAMPLES
from nova_export.batch.items import Item
from nova_export.batch.worker import Failure, Result
from nova_export.errors import OutputError
from nova_export.runtime.media import write_whole


@dataclass
class NoiseWorker:
    """Writes prompt and seed to an item's file, and notes that it did in calls.txt; dies as the prompt says.

    poison: whenever it is made. once: the first time, with its file half written. slow: takes a while.
    """

    out: Path
    dies_opening: bool = False
    threads: int | None = None

    def open(self, threads: int) -> None:
        if self.dies_opening:
            os.kill(os.getpid(), signal.SIGKILL)
        self.threads = threads

    def make(self, item: Item, callback: Any = None) -> Result | Failure:
        prompt, seed = item.arguments["prompt"], item.arguments["seed"]
        with (self.out / "calls.txt").open("a") as calls:
            calls.write(f"{prompt} {seed} {os.getpid()} {self.threads}\n")
        if prompt == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "once" and not (self.out / "died").exists():
            (self.out / "died").touch()
            (self.out / SAMPLES / ".nova-export-0123456789ab.tmp").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "slow":
            time.sleep(0.3)
        if prompt == "wrong":
            return Failure("no such thing")
        if prompt == "full disk":
            raise OutputError("no space left")
        path = self.out / SAMPLES / item.name
        assert not path.exists(), "made twice"
        write_whole(path, lambda file: file.write_text(f"{prompt} {seed}"))
        return Result(0.0, (1, 1, 1, 3), f"{prompt} {seed}", ("cut",) if prompt == "long" else ())


def item(prompt: str, seed: int = 0, where: str = "line 1") -> Item:
    name = f"{prompt}-{seed}"
    return Item(where, name, f"{name}.mp4", {"prompt": prompt, "seed": seed}, f"{np.uint32(seed)}{prompt}")


def calls(out: Path) -> list[list[str]]:
    """What workers were asked to make: prompt, seed, process, threads."""
    path = out / "calls.txt"
    return [line.rsplit(" ", 3) for line in path.read_text().splitlines()] if path.exists() else []
