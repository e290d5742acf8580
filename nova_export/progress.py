"""Progress on stderr: bars in a terminal, plain lines elsewhere, nothing when quiet. Knows no stage."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nova_export.runtime.generate import Step

LINE_SECONDS = 10.0  # between plain lines of the same work

Report = Callable[[float], object]  # prompts done so far, the current one in part


class GenerationProgress:
    """A callback for `Pipeline`: one bar over frames, one over the AR steps of the current frame."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bars: list[Any] = []
        self._said = time.monotonic()

    def __enter__(self) -> GenerationProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in reversed(self._bars):
            bar.close()
        self._bars = []

    def __call__(self, step: Step) -> None:
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._show(step)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            say(f"frame {step.frame + 1}/{step.num_frames}, step {step.step + 1}/{step.num_steps}")

    def _show(self, step: Step) -> None:
        from tqdm import tqdm

        if not self._bars:
            self._bars = [
                tqdm(total=step.num_frames, desc="frames", unit="frame", position=0, initial=step.frame),
                tqdm(total=step.num_steps, desc="steps", unit="step", position=1, leave=False),
            ]
        frames, steps = self._bars
        if step.step == 0:
            steps.reset(total=step.num_steps)
        steps.update(1)
        if step.is_last:
            frames.update(step.frame + 1 - frames.n)


def call_progress(report: Report, before: float, size: float) -> Callable[[Step], None]:
    """A callback for a call of `size` prompts, made when `before` were done."""

    def callback(step: Step) -> None:
        report(before + size * step.done)

    return callback


class StageProgress:
    """A report for `build_bundle`: a line for what each stage goes through, with the seconds it took.

    Leaving its `with` block ends the line of the last stage, done unless an exception passes through.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._stage = ""
        self._since = time.monotonic()

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end("done" if kind is None else "not finished")

    def __call__(self, stage: str, action: str) -> None:
        if self.quiet:
            return
        if stage != self._stage:
            self._end("done")
            self._stage, self._since = stage, time.monotonic()
        if action == "reused":
            say(f"{stage}: reused")
            self._stage = ""
        elif sys.stderr.isatty():
            print(f"\r\033[K{stage}: {action} …", end="", file=sys.stderr, flush=True)

    def _end(self, how: str) -> None:
        """Finish the line of the last stage."""
        if not self._stage:
            return
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        say(f"{clear}{self._stage}: {how} in {time.monotonic() - self._since:.1f} s")
        self._stage = ""


@contextmanager
def insistent_interrupt() -> Iterator[None]:
    """A Ctrl-C that falls into a destructor, where Python drops every exception, comes again at once."""
    default = sys.unraisablehook

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        else:
            default(dropped)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = default


def say(message: str) -> None:
    """A line on stderr: what a person wants to know, and no program reads."""
    print(message, file=sys.stderr, flush=True)
