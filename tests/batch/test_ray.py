"""The same on Ray, for real: workers killed in the middle, items that kill them, clusters that are not there.

`make test-batch` runs these. Ray listens on all interfaces, so they leave the network first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from nova_export.batch.folder import open_folder
from nova_export.batch.ray_pool import RayPool
from nova_export.batch.run import make_missing, run_batch
from nova_export.errors import OutputError, StageError, UsageError
from tests.batch.alone import leave_the_network
from tests.batch.test_run import LINES, OPTIONS, STEPS, digests, results
from tests.batch.worlds import NoiseWorker, calls, item
from tests.command_line import nova_export

pytestmark = pytest.mark.batch


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    """Ray on two CPU cores for all tests here; pools find it connected."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        leave_the_network()
    import ray

    folder = tempfile.mkdtemp(prefix="ray")  # a short name: it is part of a socket's
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder,
        object_store_memory=100 * 2**20,
    )  # fmt: skip
    yield ray
    ray.shutdown()
    shutil.rmtree(folder)


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path]) -> Path:
    return golden_bundle("t2i")


def make(out: Path, *prompts: str, workers: int | None = None) -> list[str]:
    """Make noise of prompts on Ray; the notices."""
    items, notices = [item(prompt, n, f"line {n}") for n, prompt in enumerate(prompts, 1)], []
    nothing: Any = nullcontext(lambda done: None)
    with open_folder(out, {}) as folder, RayPool("local", workers=workers) as pool:
        missing = folder.missing(items)
        make_missing(folder, items, missing, pool, NoiseWorker(out), lambda total: nothing, notices.append)
    return notices


def once_each(out: Path, *names: str) -> None:
    """These results, one line and one file each, and no others."""
    assert sorted(line["id"] for line in results(out)) == sorted(names)
    assert sorted(path.stem for path in (out / "samples").iterdir()) == sorted(names)


def test_a_worker_dies_once(tmp_path: Path) -> None:
    """Its item, half written, goes to another; all are there, none twice."""
    assert make(tmp_path, "a", "once", *["slow"] * 6, "b") == []
    once_each(tmp_path, "a-1", "once-2", *(f"slow-{n}" for n in range(3, 9)), "b-9")
    tries = Counter(f"{prompt} {seed}" for prompt, seed, *_ in calls(tmp_path))
    assert tries.pop("once 2") == 2 and set(tries.values()) == {1}
    first, second = (process for prompt, _, process, _ in calls(tmp_path) if prompt == "once")
    assert first != second


def test_an_item_that_kills_workers(tmp_path: Path) -> None:
    [notice] = make(tmp_path, "a", "poison", "b", "c")
    assert re.match(r"error: line 2, seed 2: 3 workers died over it: ", notice) and "\n" not in notice
    once_each(tmp_path, "a-1", "b-3", "c-4")
    assert Counter(prompt for prompt, *_ in calls(tmp_path)) == {"a": 1, "poison": 3, "b": 1, "c": 1}
    assert json.loads((tmp_path / "failures.jsonl").read_text())["id"] == "poison-2"


def test_one_worker_that_dies_is_enough(tmp_path: Path) -> None:
    make(tmp_path, "once", "poison", "a", workers=1)
    once_each(tmp_path, "once-1", "a-3")
    assert {threads for *_, threads in calls(tmp_path)} == {"2"}  # both cores are its own


def test_cores_are_shared(tmp_path: Path) -> None:
    make(tmp_path, *["slow"] * 4)
    assert len({process for _, _, process, _ in calls(tmp_path)}) == 2
    assert {threads for *_, threads in calls(tmp_path)} == {"1"}


def test_failures_stop_no_others_but_a_full_disk_does(tmp_path: Path) -> None:
    assert make(tmp_path / "own", "wrong", "a") == ["error: line 1, seed 1: no such thing"]
    once_each(tmp_path / "own", "a-2")
    with pytest.raises(OutputError, match=r"^no space left$"):
        make(tmp_path / "all", "a", "full disk", "b", workers=1)
    once_each(tmp_path / "all", "a-1")


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (RayPool("local", threads=3), "has 2 CPU, and a worker needs 3 CPU"),
        (RayPool("local", gpus=True), "has 0 GPU, and a worker needs 1 GPU"),
        (RayPool("local", memory=10**15), "a worker needs 1 CPU, 1e+15 memory"),
    ],
    ids=["cores", "GPUs", "memory"],
)
def test_no_room(pool: RayPool, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)), pool:
        list(pool.results(NoiseWorker(Path()), [item("a")], lambda done: None))


def test_workers_that_die_before_they_make_anything() -> None:
    with RayPool("local") as pool, pytest.raises(StageError, match="3 workers died, opening the bundle"):
        list(pool.results(NoiseWorker(Path(), dies_opening=True), [item("a")], lambda done: None))


# With a bundle


def worker_processes() -> list[int]:
    """Of Ray's in this network, those that make something now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mine = (folder / "ns/net").readlink() == Path("/proc/self/ns/net").readlink()
            if mine and (folder / "cmdline").read_bytes().startswith(b"ray::Actor.make"):
                found.append(int(folder.name))
    return found


def test_a_real_worker_killed_midway(bundle: Path, tmp_path: Path) -> None:
    """All results, none twice, with the frames of `run`."""
    lines = [{"id": f"n{seed}", "prompt": "a cat", "seed": seed} for seed in range(16)]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    killed: list[int] = []

    @contextmanager
    def progress(total: int) -> Iterator[Callable[[float], object]]:
        def report(done: float) -> None:
            if done >= 4 and not killed and (now := worker_processes()):
                os.kill(now[0], signal.SIGKILL)
                killed.append(now[0])

        yield report

    summary = run_batch(prompts, out, bundle, suffix=".png", ray="local", progress=progress, **STEPS)
    assert killed and (summary.results, summary.new, summary.failed) == (16, 16, 0)
    once_each(out, *(line["id"] for line in lines))
    assert [line["sha256"] for line in results(out)] == digests(bundle, lines)


def test_the_command(bundle: Path, tmp_path: Path) -> None:
    """The one of a folder that a batch without Ray began."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    common = (
        "batch",
        prompts,
        "--out",
        out,
        "--bundle",
        bundle,
        "--format",
        ".png",
        *OPTIONS,
        "--json",
        "-q",
    )
    prompts.write_text("\n".join(map(json.dumps, LINES[:2])))
    assert nova_export(*common).code == 0
    prompts.write_text("\n".join(map(json.dumps, LINES)))
    result = nova_export(*common, "--ray", "local", "--workers", "1")
    told = json.loads(result.out)
    assert (result.code, result.err, told["new"], told["kept"]) == (0, "", 4, 2)
    assert [line["sha256"] for line in results(out)] == digests(bundle, LINES)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "nobody answers there (Connection refused)"),
        ("ray://127.0.0.1:1", "nobody answers there"),
        ("here", "it must be local, auto, HOST:PORT"),
    ],
)
def test_no_cluster_there(address: str, words: str, monkeypatch: pytest.MonkeyPatch, ray: Any) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match=re.escape(f"--ray {address}: {words}")), RayPool(address):
        pass
