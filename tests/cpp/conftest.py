"""What `make test-cpp` compiled, bundles for it, and calls of both runtimes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nova_export
from nova_export.errors import NovaExportError

REPOSITORY = Path(__file__).parents[2]
PROMPT = "a red circle moving right"
Inspect = Callable[..., list[Any]]


@dataclass(frozen=True)
class Call:
    """One generation. `load` and `options` have the names of both runtimes; cancel_at: (frame, step)."""

    bundle: Path
    options: Mapping[str, Any]
    load: Mapping[str, Any] = field(default_factory=dict)
    image: np.ndarray | None = None
    stream: bool = False
    cancel_at: tuple[int, int] | None = None


@dataclass
class Answer:
    """What came of a call: arrays, or an error with its exit code. told: what callbacks got, and times."""

    latents: np.ndarray | None = None
    frames: np.ndarray | None = None
    streamed: np.ndarray | None = None
    error: str | None = None
    status: int = 0
    notices: list[str] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder is marked, and so runs only where something was compiled for it."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("cpp")


@pytest.fixture(scope="session")
def cpp() -> Path:
    """The folder of `make test-cpp`: release/, sanitized/, threads/."""
    folder = REPOSITORY / "build" / "cpp"
    assert (folder / "release" / "tests" / "nova_call").exists(), (
        "`make test-cpp` compiles what these tests run"
    )
    return folder


@pytest.fixture(scope="session")
def inspect(cpp: Path) -> Inspect:
    """What nova_inspect answers: inspect(command, arguments..., lines=values), one answer for each value."""

    def ask(*command: str, lines: Iterable[Any] = ()) -> list[Any]:
        given = "".join(json.dumps(line) + "\n" for line in lines)
        program = [cpp / "release/tests/nova_inspect", *command]
        done = subprocess.run(program, input=given, capture_output=True, text=True, timeout=300)
        assert not done.stderr, done.stderr
        return [json.loads(line) for line in done.stdout.split("\n")[:-1]]

    return ask


def with_config(bundle: Path, path: Path, **config: Any) -> Path:
    """A bundle of the same files whose config differs."""
    shutil.copytree(bundle, path, copy_function=os.link)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["config"].update(config)
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def in_cpp(program: Path, calls: Sequence[Call], folder: Path, **environment: str) -> list[Answer]:
    """The calls in one process of nova_call."""
    wanted = []
    for number, call in enumerate(calls):
        given: dict[str, Any] = {"bundle": str(call.bundle), "load": dict(call.load), "stream": call.stream}
        given["options"] = dict(call.options)
        if call.cancel_at:
            given["cancel_at"] = call.cancel_at
        if call.image is not None:
            file = folder / f"{number}.image"
            file.write_bytes(call.image.tobytes())
            height, width = call.image.shape[:2]
            given["options"]["image"] = {"file": str(file), "height": height, "width": width}
        wanted.append(given)
    (folder / "calls.json").write_text(json.dumps(wanted))
    ran = subprocess.run(
        [program, folder / "calls.json", folder],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert ran.returncode == 0, ran.stderr
    return [_answer(folder / str(number)) for number in range(len(calls))]


def _answer(name: Path) -> Answer:
    told = json.loads(name.with_suffix(".json").read_text())
    if "error" in told:
        return Answer(error=told["error"], status=told["status"], told=told)
    latents = np.fromfile(name.with_suffix(".latents"), np.float32).reshape(told["latents_shape"])
    frames = np.fromfile(name.with_suffix(".frames"), np.uint8).reshape(told["frames_shape"])
    answer = Answer(latents, frames, notices=told["notices"], told=told)
    if told["frames"]:
        samples, _, height, width, _ = frames.shape
        streamed = np.fromfile(name.with_suffix(".streamed"), np.uint8)
        answer.streamed = streamed.reshape(-1, samples, height, width, 3).swapaxes(0, 1)
    return answer


def in_python(call: Call) -> Answer:
    """The same call in the runtime that C++ has to agree with."""
    options = dict(call.options)
    prompt = options.pop("prompts", None) or options.pop("class_ids", [])
    negative = options.pop("negative_prompts", None) or options.pop("negative_class_ids", None)
    try:
        with nova_export.load(call.bundle, **call.load) as pipe, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = pipe(prompt, negative_prompt=negative, image=call.image, **options)
    except NovaExportError as error:
        return Answer(error=str(error), status=error.exit_code)
    return Answer(made.latents, made.frames, notices=[str(each.message) for each in said])
