"""`run_batch`: a prompts file to a folder, whatever makes the results; it goes on with what is there.

run_batch("prompts.jsonl", "out", "bundle")               # in this process
run_batch("prompts.jsonl", "out", "bundle", ray="auto")   # on the Ray cluster that this machine is part of
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nova_export.batch.folder import SAMPLES, Folder, open_folder
from nova_export.batch.items import Item, read_items
from nova_export.batch.pools import LocalPool, Pool
from nova_export.batch.ray_pool import RayPool
from nova_export.batch.worker import Failure, PipelineWorker, Worker
from nova_export.bundle import MANIFEST, Bundle, sha256
from nova_export.progress import Report
from nova_export.runtime.media import check_writable
from nova_export.runtime.request import FPS, Request
from nova_export.runtime.stage_runners import graph_bytes

OF_ITEMS = ("prompt", "seed", "num_images_per_prompt")  # of `Request`: not the same for all

Progress = Callable[[int], AbstractContextManager[Report]]  # told how many results are to be made
Notice = Callable[[str], object]  # told of warnings and failures, a line each


@dataclass(frozen=True)
class Summary:
    """results: of the prompts file, there now. new: made by this run; kept: made by earlier ones."""

    results: int
    new: int
    kept: int
    failed: int
    seconds: float


def run_batch(
    prompts: str | Path,
    out: str | Path,
    bundle: str | Path,
    *,
    seeds: int | None = None,
    seed: int = 0,
    suffix: str = ".mp4",
    fps: float = FPS,
    ray: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    threads: int = 0,
    low_memory: bool = False,
    vae_tile: int | None = None,
    progress: Progress = lambda total: nullcontext(lambda done: None),
    notice: Notice = lambda line: None,
    **arguments: Any,
) -> Summary:
    """Make what a prompts file asks for and `out` lacks: one result a prompt and seed.

    seeds: `count` of `read_items`. ray: "local", "auto" or an address; None is this process. workers,
    threads: as in `RayPool`. device, low_memory, vae_tile: of `load`. arguments: for lines without them.
    Raises NovaExportError before anything runs, or where all must stop; single failures are in the summary.
    """
    started = time.monotonic()
    prompts, out, bundle = Path(prompts), Path(out).absolute(), Path(bundle).absolute()
    opened = Bundle.open(bundle)
    manifest = sha256(bundle / MANIFEST)
    if arguments.get("max_latent_length") is None:
        arguments["max_latent_length"] = 1 if suffix == ".png" else opened.config.video_length
    items = read_items(prompts, opened.config, count=seeds, seed=seed, suffix=suffix, **arguments)
    settings = {
        "bundle": f"{opened.source['name']}, {opened.target}, {manifest[:16]}",
        "names": "ID" if seeds is None and prompts.suffix.lower() == ".jsonl" else "ID-INDEX",
        "format": suffix,
        "fps": fps,
        "vae_tile": vae_tile,
        **{name: value for name, value in asdict(Request("", **arguments)).items() if name not in OF_ITEMS},
    }
    options = {"device": device, "low_memory": low_memory, "vae_tile": vae_tile}
    worker = PipelineWorker(bundle, manifest, out, fps, options)
    with open_folder(out, settings) as folder:
        check_writable(out / SAMPLES / f"sample{suffix}")
        missing = folder.missing(items)
        with _pool(opened, ray, workers, device, threads, low_memory) as pool:
            make_missing(folder, items, missing, pool, worker, progress, notice)
        there = sum(item.name in folder.done for item in items)
    new = there - (len(items) - len(missing))
    seconds = round(time.monotonic() - started, 3)
    return Summary(there, new, len(items) - len(missing), len(items) - there, seconds)


def make_missing(
    folder: Folder,
    items: list[Item],
    missing: list[Item],
    pool: Pool,
    worker: Worker,
    progress: Progress,
    notice: Notice,
) -> None:
    """Make the missing ones of all items, and enter each as it comes, so that a stop loses none."""
    try:
        with progress(len(missing)) as report:
            for done, (item, made) in enumerate(pool.results(worker, missing, report), 1):
                if isinstance(made, Failure):
                    folder.fail(item, made.error)
                    notice(f"error: {item.where}, seed {item.arguments['seed']}: {made.error}")
                else:
                    folder.add(item, made.seconds, made.frames, made.sha256)
                    for text in made.notices:
                        notice(f"warning: {item.where}: {text}")
                report(done)
    finally:
        folder.finish(items)


def _pool(
    bundle: Bundle, ray: str | None, workers: int | None, device: str | None, threads: int, low_memory: bool
) -> AbstractContextManager[Pool]:
    if ray is None:
        return nullcontext(LocalPool(threads))
    gpus = (
        None
        if device is None and (bundle.engines or bundle.target == "cuda")
        else device not in (None, "cpu")
    )
    sizes = graph_bytes(bundle).values()
    needed = max(sizes) if low_memory else sum(sizes)
    return RayPool(ray, gpus, threads, needed, workers)
