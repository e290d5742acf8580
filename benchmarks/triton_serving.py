"""What serving the demo with Triton costs and gives: parity, throughput, streaming, a killed process.

    .triton/venv/bin/python -m benchmarks.triton_serving demo/bundle     # make test-triton installs it

Prints one JSON object; `--parts` and `--requests` make less of it. A demo request is its own video: 3 latent
frames, 64 AR steps, 25 diffusion steps.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import nova_export
from engines.triton.client import stream
from engines.triton.health import check
from engines.triton.repository import Serving, package
from nova_export.errors import ServerError
from tests.triton.server import Server, triton

COLOURS = ("red", "blue", "green", "yellow", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
PARTS = ("serving", "streaming", "killed", "models")
PATIENCE = 60.0
AT_ONCE, LATENT_FRAMES, TILES_OF_3 = 8, 3, 13
PROMPTS = [f"a {colour} {shape} moving right" for colour in COLOURS for shape in SHAPES]


def arguments(index: int) -> dict[str, Any]:
    return {
        "prompt": PROMPTS[index % len(PROMPTS)],
        "seed": index % len(PROMPTS),
        "max_latent_length": LATENT_FRAMES,
    }


def ask(server: Server, **given: Any) -> np.ndarray:
    """Frames (B, F, H, W, 3)."""
    answers = stream(server.url, timeout=300, **given)
    return np.stack([answer.frame for answer in answers if answer.frame is not None], axis=1)


def serving(server: Server, expected: list[np.ndarray], requests: int) -> dict[str, Any]:
    alone, serial = one_after_another(server, expected)
    started = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as clients:
        answers = list(clients.map(lambda index: ask(server, **arguments(index)), range(requests)))
    together = (time.monotonic() - started) / requests
    wrong = [
        index for index, frames in enumerate(answers) if not same(frames, expected[index % len(expected)])
    ]
    return {
        **alone,
        "identical at 8 at once": f"{requests - len(wrong)} of {requests}",
        "seconds a request, 8 at once": round(together, 3),
        "throughput at 8 against serial": round(serial / together, 2),
    }


def one_after_another(server: Server, expected: list[np.ndarray]) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    alone = [ask(server, **arguments(index)) for index in range(len(PROMPTS))]
    seconds = (time.monotonic() - started) / len(PROMPTS)
    identical = f"{sum(map(same, alone, expected))} of {len(PROMPTS)}"
    return {"identical alone": identical, "seconds a request, one after another": round(seconds, 3)}, seconds


def same(frames: np.ndarray, expected: np.ndarray) -> bool:
    return frames.shape == expected.shape and bool((frames == expected).all())


def first_frame(server: Server) -> list[dict[str, float]]:
    shares = []
    for seed in range(3):
        started, first = time.monotonic(), 0.0
        for answer in stream(
            server.url, prompt=PROMPTS[seed], seed=seed, max_latent_length=TILES_OF_3, timeout=300
        ):
            if answer.frame_index == 0:
                first = time.monotonic() - started
        whole = time.monotonic() - started
        shares.append({"first": round(first, 3), "whole": round(whole, 3), "share": round(first / whole, 3)})
    return shares


def killed(server: Server) -> dict[str, Any]:
    """The python process of the model ends by SIGKILL while 8 requests are at work and 8 wait."""
    ended: list[float] = []
    how: list[str] = []

    def one(index: int) -> None:
        try:
            ask(server, **arguments(index))
            how.append("answered")
        except ServerError:
            how.append("failed")
        ended.append(time.monotonic())

    threads = [threading.Thread(target=one, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    os.kill(server.stubs()[0], signal.SIGKILL)
    moment = time.monotonic()
    for thread in threads:
        thread.join()
    begun = time.monotonic()
    with suppress(ServerError):
        check(server.url, timeout=10, recover=True)
    recovered = time.monotonic() - begun
    alive = server.process.poll() is None
    return {
        "ended": {kind: how.count(kind) for kind in sorted(set(how))},
        "seconds to the last": round(max(ended) - moment, 2),
        "seconds of health --recover": round(recovered, 2),
        "answers afterwards": alive and bool(ask(server, **arguments(0)).size),
    }


def killed_in_turn(server: Server) -> list[dict[str, Any]]:
    """Three times, or until the server itself has ended, which is a result too."""
    tries: list[dict[str, Any]] = []
    while len(tries) < 3 and all(each["answers afterwards"] for each in tries):
        tries.append(killed(server))
    return tries


def main(bundle: Path, parts: list[str], requests: int) -> None:
    result: dict[str, Any] = {"cores": os.cpu_count()}
    expected: list[np.ndarray] = []
    if {"serving", "models"} & set(parts):
        pipe = nova_export.load(bundle)
        pipe(**arguments(0))
        started = time.monotonic()
        expected = [pipe(**arguments(index)).frames for index in range(len(PROMPTS))]
        result["seconds a request, in Python"] = round((time.monotonic() - started) / len(PROMPTS), 3)
    with tempfile.TemporaryDirectory() as folder:
        repository = package(bundle, Path(folder) / "in-process", Serving())
        with triton(repository, Path(folder) / "log") as server:
            check(server.url, timeout=PATIENCE)
            if "serving" in parts:
                result["serving"] = serving(server, expected, requests)
            if "streaming" in parts:
                result["first frame of a 3-tile video"] = first_frame(server)
            if "killed" in parts:
                result["killed"] = killed_in_turn(server)
        if "models" in parts:
            repository = package(bundle, Path(folder) / "models", Serving(stages="models"))
            with triton(repository, Path(folder) / "log") as server:
                check(server.url, timeout=PATIENCE)
                result["stages as models"] = one_after_another(server, expected)[0]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=200)
    given = parser.parse_args()
    main(given.bundle, given.parts, given.requests)
