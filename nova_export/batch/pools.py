"""Who makes the items: a pool is given a worker and yields what became of each. One in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from nova_export.batch.items import Item
from nova_export.batch.worker import Failure, Result, Worker
from nova_export.progress import Report, call_progress

Made = tuple[Item, Result | Failure]


class Pool(Protocol):
    """Makes items, in any order; each is yielded once."""

    def results(self, worker: Worker, items: Sequence[Item], report: Report) -> Iterator[Made]:
        """report: called within an item, by pools that see into it.

        Raises NovaExportError where all must stop.
        """


@dataclass(frozen=True)
class LocalPool:
    """One item after another, in this process. threads: as in `load`."""

    threads: int = 0

    def results(self, worker: Worker, items: Sequence[Item], report: Report) -> Iterator[Made]:
        if items:
            worker.open(self.threads)
        for place, item in enumerate(items):
            yield item, worker.make(item, call_progress(report, place, 1))
