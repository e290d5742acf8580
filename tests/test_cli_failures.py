"""The command line when it is stopped, when a package is missing, and when there is a bug."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nova_export import cli, progress
from nova_export.errors import ExportError
from nova_export.export import build_stage
from nova_export.runtime import pipeline
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN
from tests.export.builds import STAGES, Exports

ROOT = Path(__file__).parents[1]
CHECKPOINT = GOLDEN / "t2i" / "checkpoint"
MAIN = "from nova_export.cli import main; main()"
# Says when the first AR step is done.
TELLING = """
from nova_export.progress import GenerationProgress
GenerationProgress.__call__ = lambda self, step: print("running", flush=True)
"""


def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, which gets Ctrl-C as a terminal sends it."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error after Ctrl-C."""
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


# Ctrl-C


def test_interrupted_run_writes_nothing(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ("run", "a", "--bundle", golden_bundle("t2v"), "--max-latent-length", "500")
    process = start(
        TELLING + MAIN, *arguments, "-o", tmp_path / "a.mp4", "--save-latents", tmp_path / "a.npz"
    )
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    code, err = interrupt(process)
    assert (code, err.strip()) == (130, "stopped; nothing was written")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_build_keeps_finished_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a real export; the same command then uses what was finished."""
    out, work = tmp_path / "bundle", tmp_path / ".bundle.partial"
    process = start(MAIN, "build", CHECKPOINT, "-o", out)
    wait_for(process, work / "text_encoder.json")
    time.sleep(0.5)
    code, err = interrupt(process)
    assert code == 130 and "Traceback" not in err
    assert err.endswith("error: stopped; finished stages are kept, and the same command goes on from there\n")
    assert not out.exists()
    kept = [path.stem for path in work.glob("*.json")]
    assert "text_encoder" in kept and len(kept) < len(STAGES)
    named = {f"{stage}{suffix}" for stage in kept for suffix in (".json", ".onnx", ".onnx.data")}
    assert {path.name for path in work.iterdir()} == {*named, ".lock"}
    exports = Exports()
    monkeypatch.setattr(build_stage, "export_onnx", exports)
    result = nova_export("build", CHECKPOINT, "-o", out, "--no-verify")
    assert (result.code, result.out) == (0, f"{out}\n")
    assert sorted(exports.done) == sorted(set(STAGES) - set(kept))
    assert [line for line in result.err.splitlines() if line.endswith(": reused")] == [
        f"{stage}: reused" for stage in STAGES if stage in kept
    ]


def test_interrupted_while_it_starts() -> None:
    """Importing takes half a second, in which people change their minds too."""
    code = """
import sys

class Stop:
    def find_spec(self, name, *_):
        if name == "nova_export.runtime.request":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
from nova_export.__main__ import main; main()
"""
    process = start(code, "--version")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "stopped; nothing was written\n")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, cli.click.Abort])
def test_interrupted_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: type[Exception]) -> None:
    monkeypatch.setattr(pipeline, "load", raising(stop()))
    result = nova_export("run", "a", "--bundle", "b", "-o", tmp_path / "a.png")
    assert (result.code, result.out, result.err.strip()) == (130, "", "stopped; nothing was written")


# Numbers that compare like others


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "a", "--fps"),
        ("plan", "--memory"),
        ("batch", "p.txt", "--out", "o", "--fps"),
        ("bench", "b", "--budget"),
        ("package", "triton", "b", "--out", "o", "--timeout"),
        ("package", "triton", "b", "--out", "o", "--gather"),
        ("triton", "health", "127.0.0.1:1", "--timeout"),
    ],
    ids=lambda arguments: " ".join((arguments[0], arguments[-1])),
)
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_numbers_that_are_not_finite(arguments: tuple[str, ...], number: str) -> None:
    result = nova_export(*arguments, number)
    assert result.code == 2 and arguments[-1] in result.err and "Traceback" not in result.err


def test_too_many_threads() -> None:
    """ONNX Runtime would start them all, for minutes."""
    result = nova_export("run", "a", "--threads", "100000")
    assert result.code == 2 and "0<=x<=1024" in result.err


# Missing packages


@pytest.mark.parametrize("package", ["torch", "onnx", "transformers"])
def test_missing_extra(tmp_path: Path, package: str) -> None:
    """As in a plain installation: sys.modules says that the package is not there."""
    code = f"import sys; sys.modules[{package!r}] = None\n" + MAIN
    process = start(code, "build", CHECKPOINT, "-o", tmp_path / "bundle")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (9, "")
    assert err == (
        f"error: this command needs {package!r}, which is not installed: pip install 'nova-export[export]'\n"
    )
    assert list(tmp_path.iterdir()) == []


# Bugs


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


@pytest.fixture
def buggy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    monkeypatch.setattr(pipeline, "load", raising(RuntimeError("two and two is five")))
    return ["run", "a", "--bundle", "b", "-o", tmp_path / "a.png"]


def test_internal_error(buggy: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOVA_EXPORT_DEBUG", raising=False)
    result = nova_export(*buggy)
    assert (result.code, result.out) == (70, "") and result.err.count("\n") == 1
    assert result.err.startswith("internal error: RuntimeError: two and two is five. This is a bug")
    assert "NOVA_EXPORT_DEBUG=1" in result.err


def test_internal_error_when_debugging(buggy: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOVA_EXPORT_DEBUG", "1")
    with pytest.raises(RuntimeError, match="two and two"):
        cli.main([str(argument) for argument in buggy])


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pipeline, "load", raising(MemoryError("Unable to allocate 9 GiB")))
    result = nova_export("run", "a", "--bundle", "b", "-o", tmp_path / "a.png")
    only_error(result, 10, "out of memory", "9 GiB", "--low-memory")


# What a build says


def test_build_tells_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_stage, "export_onnx", Exports())
    result = nova_export("build", CHECKPOINT, "-o", tmp_path / "bundle", "--no-verify")
    assert (result.code, result.out) == (0, f"{tmp_path / 'bundle'}\n")
    assert [line.split(":")[0] for line in result.err.splitlines()] == STAGES
    assert all(": done in " in line for line in result.err.splitlines())
    again = ("build", CHECKPOINT, "-o", tmp_path / "bundle", "--no-verify")
    only_error(nova_export(*again), 6, "exists; give --force")
    result = nova_export(*again, "--force", "--quiet")
    assert (result.code, result.err) == (0, "")


def test_a_stage_that_failed_is_not_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_stage, "export_onnx", raising(ExportError("stage text_encoder: no")))
    result = nova_export("build", CHECKPOINT, "-o", tmp_path / "bundle")
    assert result.code == 7 and "done" not in result.err
    assert result.err.splitlines()[1] == "error: stage text_encoder: no"


def test_a_terminal_gets_one_line_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with progress.StageProgress() as report:
        report("first", "loading")
        report("first", "exporting")
        report("second", "reused")
    lines = capsys.readouterr().err.split("\n")
    assert lines[0].split("\r\033[K")[1:3] == ["first: loading …", "first: exporting …"]
    assert "first: done in 0.0 s" in lines[0] and lines[1:] == ["second: reused", ""]


def test_interrupt_in_a_destructor_is_not_lost() -> None:
    """torch's weak references swallow one Ctrl-C in ten during an export."""

    class Owner:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), progress.insistent_interrupt():
        Owner()
        time.sleep(10)


def test_other_errors_in_destructors_are_shown_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Owner:
        def __del__(self) -> None:
            raise ValueError

    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    with progress.insistent_interrupt():
        Owner()
    assert seen[0].exc_type is ValueError
