"""A pool of Ray actors, each with a worker of its own: one a GPU, or a share of the CPU cores each.

A new actor takes the place of one that died, and its item goes to the next that is free; after DEATHS it has
failed. Ray's own restarts do not serve: they retry on the same actor or not at all, and a call of one that is
being restarted fails as if it had died again.
"""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from nova_export.batch.items import Item
from nova_export.batch.pools import Made
from nova_export.batch.worker import Failure, Result, Worker
from nova_export.errors import DependencyError, NovaExportError, StageError, UsageError
from nova_export.progress import Report

LOCAL = "local"  # address that starts Ray on this machine
DEATHS = 3  # of workers, after which their item has failed
OBJECT_STORE = 100 * 2**20  # bytes; items and results are small
CONNECT_SECONDS = 10


class Actor:
    """What runs in Ray's process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def open(self, threads: int) -> None:
        self.worker.open(threads)

    def make(self, item: Item) -> Result | Failure:
        return self.worker.make(item)


@dataclass
class RayPool:
    """Actors on the cluster at an address; use it in a `with` block, which connects if nobody has.

    gpus: whether each actor takes a GPU; None is for the cluster to say, which may have none. Without, each
    takes `threads` CPU cores: if 0, its share of them, or one where `workers` is not told either. memory:
    bytes that an actor needs. workers: how many actors; None is as many as there is room for.
    """

    address: str
    gpus: bool | None = False
    threads: int = 0
    memory: int = 0
    workers: int | None = None
    _ray: Any = field(default=None, init=False, repr=False)
    _connected: bool = field(default=False, init=False, repr=False)

    def __enter__(self) -> RayPool:
        self._ray, self._connected = _connect(self.address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connected:
            self._ray.shutdown()

    def results(self, worker: Worker, items: Sequence[Item], report: Report) -> Iterator[Made]:
        """As in `Pool`: a loop over what actors finish, until every item is made or has failed."""
        ray = self._ray
        share = self._share(worker)
        queue, deaths = deque(items), Counter[str | None]()  # by name; None: before the first item
        idle: list[Any] = []
        running: dict[Any, tuple[Any, Item | None]] = {}  # by Ray's reference; no item: an actor gets ready

        def start() -> None:
            actor = share.start()
            running[actor.open.remote(share.threads)] = actor, None

        for _ in range(min(share.count, len(items))):
            start()
        left = len(items)
        while left:
            while queue and idle:
                free, next_item = idle.pop(0), queue.popleft()
                running[free.make.remote(next_item)] = free, next_item
            [reference], _ = ray.wait(list(running), num_returns=1)
            actor, item = running.pop(reference)
            made: Result | Failure
            try:
                made = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            except ray.exceptions.RayError as error:  # it died, or its machine, or it is out of reach
                ray.kill(actor)
                start()
                name = item.name if item else None
                deaths[name] += 1
                if deaths[name] < DEATHS:
                    queue.extendleft([item] if item else [])
                    continue
                if item is None:
                    raise StageError(f"{DEATHS} workers died, opening the bundle: {_brief(error)}") from error
                made = Failure(f"{DEATHS} workers died over it: {_brief(error)}")
            else:
                idle.append(actor)
            if item is None:
                del deaths[None]
            else:
                left -= 1
                yield item, made

    def _share(self, worker: Worker) -> _Share:
        """Of the cluster, what each actor takes. Raises UsageError where there is no room for one."""
        there = self._ray.cluster_resources()
        gpus = there.get("GPU", 0) >= 1 if self.gpus is None else self.gpus
        part = int(there.get("CPU", 0) // self.workers) if self.workers else 1
        threads = self.threads or max(1, part)
        wants = {"GPU": 1} if gpus else {"CPU": threads, "memory": self.memory}
        wants = {kind: amount for kind, amount in wants.items() if amount}
        room = min(int(there.get(kind, 0) // amount) for kind, amount in wants.items())
        if room < 1:
            has = ", ".join(f"{there.get(kind, 0):g} {kind}" for kind in wants)
            needs = ", ".join(f"{amount:g} {kind}" for kind, amount in wants.items())
            raise UsageError(f"the Ray cluster at {self.address} has {has}, and a worker needs {needs}")
        actor = self._ray.remote(Actor).options(
            num_cpus=wants.get("CPU", 0), num_gpus=wants.get("GPU", 0), memory=wants.get("memory")
        )
        count = min(self.workers or room, room)
        return _Share(count, self.threads if gpus else threads, lambda: actor.remote(worker))


@dataclass(frozen=True)
class _Share:
    """How many actors, the threads of each, and what starts one."""

    count: int
    threads: int
    start: Callable[[], Any]


def _cause(error: Any) -> BaseException:
    """What an actor raised, as it was there."""
    return error.cause if isinstance(error.cause, NovaExportError) else error


def _brief(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _connect(address: str) -> tuple[Any, bool]:
    """The ray module, and whether this connected it. Raises DependencyError, UsageError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise DependencyError(
            f"--ray needs Ray, which is not installed ({error}): pip install 'nova-export[ray]'"
        ) from error
    if ray.is_initialized():
        return ray, False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        ray.init(address=LOCAL, include_dashboard=False, object_store_memory=OBJECT_STORE, **options)
        return ray, True
    _check_address(address)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--ray {address}: cannot connect ({error}); --ray local starts one here") from error
    return ray, True


def _check_address(address: str) -> None:
    """Raises UsageError where nobody listens; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        return
    except (ValueError, OverflowError):
        reason = "it must be local, auto, HOST:PORT or ray://HOST:PORT"
    except OSError as error:
        reason = f"nobody answers there ({error.strerror or error}); --ray local starts one here"
    raise UsageError(f"--ray {address}: {reason}")
