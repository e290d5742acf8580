"""What the `nova` model does with requests: groups them, runs each group through the loops, streams answers.

Knows nothing of Triton: a `Caller` stands for whoever waits for answers, and all is tested without it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from engines.triton.tensors import Array, Asked, answer, read
from nova_export.errors import Cancelled, InputError, NovaExportError, UsageError
from nova_export.runtime.generate import Step
from nova_export.runtime.joint import Prepared, form
from nova_export.runtime.noise import TorchGenerator
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.runner import Held, Lent, Runner

PROGRESS_SECONDS = 0.1  # between answers that say nothing but how far it is
POLL_SECONDS = 0.2  # between questions whether a caller is there: each takes a lock that the server shares
SEED_BITS = 64


class Caller(Protocol):
    """One request: its tensors, and where its answers go."""

    def tensors(self) -> Mapping[str, Array]: ...
    def send(self, tensors: Mapping[str, Array]) -> None: ...
    def end(self, error: str | None = None) -> None: ...
    def is_cancelled(self) -> bool: ...


class Meter(Protocol):
    """Where times and counts go."""

    def stage(self, name: str, seconds: float) -> None: ...
    def ended(self, result: str) -> None: ...
    def frames(self, count: int) -> None: ...
    def running(self, requests: int) -> None: ...


@dataclass(frozen=True)
class Limits:
    """samples: in one loop. latent_frames: of one video."""

    samples: int
    latent_frames: int


class Timed(Lent):
    """A runner that tells a meter how long each call took."""

    def __init__(self, runner: Runner, meter: Meter) -> None:
        self.stage, self._runner, self._meter = runner.stage, runner, meter

    def run(self, inputs: Mapping[str, Held]) -> Mapping[str, Held]:
        started = time.monotonic()
        outputs = self._runner.run(inputs)
        self._meter.stage(self.stage.name, time.monotonic() - started)
        return outputs


@dataclass
class Job:
    """A request at work. `ended` once it has its last answer, or nobody waits for more."""

    caller: Caller
    asked: Asked
    seed: int
    prepared: Prepared
    notice: str
    frames: int = 0
    ended: bool = False
    said: float = field(default_factory=time.monotonic)
    polled: float = 0.0

    @property
    def samples(self) -> int:
        return self.prepared.plan.batch


class Service:
    """Requests to answers, over a pipeline. One thread calls it."""

    def __init__(self, pipe: Pipeline, limits: Limits, meter: Meter) -> None:
        self.pipe, self.limits, self.meter = pipe, limits, meter

    def serve(self, callers: Sequence[Caller]) -> None:
        """Answer all. What is wrong with one ends that one, with the reason."""
        jobs = [job for caller in callers if (job := self._job(caller))]
        groups: dict[Any, list[Job]] = {}
        for job in jobs:
            groups.setdefault(form(job.asked.request, self.pipe.config), []).append(job)
        for group in groups.values():
            for part in self._within_limits(group):
                self._generate(part)

    def _job(self, caller: Caller) -> Job | None:
        """None where the request cannot be served, which its caller has been told then."""
        try:
            if caller.is_cancelled():
                raise Cancelled("cancelled before it began")
            asked = read(caller.tensors(), self.pipe.config.is_class_conditional)
            self._check_limits(asked)
            seed = asked.request.resolved_seed()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                prepared = self.pipe.prepare(asked.request, TorchGenerator(seed))
            return Job(caller, asked, seed, prepared, "; ".join(str(each.message) for each in caught))
        except NovaExportError as error:
            self._end(caller, error)
        except Exception as error:  # whatever it is, it is this request's alone
            self._end(caller, NovaExportError(f"internal error: {type(error).__name__}: {error}"))
        return None

    def _check_limits(self, asked: Asked) -> None:
        """Before anything is made for the request."""
        request = asked.request
        if request.max_latent_length > self.limits.latent_frames:
            raise UsageError(
                f"max_latent_length is {request.max_latent_length}; this server makes at most "
                f"{self.limits.latent_frames} (package triton --max-latent-length)"
            )
        samples = request.plan(self.pipe.config).batch
        if samples > self.limits.samples:
            raise InputError(
                f"{samples} samples in one request; this server makes at most {self.limits.samples} at once "
                "(package triton --max-batch)"
            )

    def _within_limits(self, group: list[Job]) -> Iterator[list[Job]]:
        part: list[Job] = []
        for job in group:
            if sum(each.samples for each in part) + job.samples > self.limits.samples:
                yield part
                part = []
            part.append(job)
        yield part

    def _generate(self, jobs: list[Job]) -> None:
        """One loop for all. It goes on while anybody waits."""
        self.meter.running(len(jobs))
        try:
            stream = self.pipe.stream_jointly(
                [job.prepared for job in jobs],
                callback=lambda step: self._progress(jobs, step),
                wanted=lambda index: not self._has_ended(jobs[index]),
            )
            for index, frames in stream:
                for frame in frames.swapaxes(0, 1):
                    self._send_frame(jobs[index], frame)
            error = None
        except NovaExportError as failed:
            error = failed
        except Exception as failed:
            error = NovaExportError(f"internal error: {type(failed).__name__}: {failed}")
        for job in jobs:
            if not job.ended:
                self._end_job(job, error)
        self.meter.running(0)

    def _progress(self, jobs: list[Job], step: Step) -> bool:
        """Between AR steps: tell those who want to know. False where nobody waits any more."""
        for job in jobs:
            late = time.monotonic() - job.said >= PROGRESS_SECONDS
            if not self._has_ended(job) and job.asked.report_progress and late:
                self._send(job, answer(progress=step.done))
                job.said = time.monotonic()
        return not all(job.ended for job in jobs)

    def _has_ended(self, job: Job) -> bool:
        if not job.ended and time.monotonic() - job.polled >= POLL_SECONDS:
            job.polled = time.monotonic()
            if job.caller.is_cancelled():
                self._end_job(job, Cancelled(f"cancelled after {job.frames} frames"))
        return job.ended

    def _send_frame(self, job: Job, frame: Array) -> None:
        if self._has_ended(job):
            return
        first = {"seed": _signed(job.seed), "notice": job.notice} if job.frames == 0 else {}
        self._send(job, answer(frame=frame, frame_index=job.frames, **first))
        job.frames += 1
        self.meter.frames(len(frame))

    def _send(self, job: Job, tensors: Mapping[str, Array]) -> None:
        """What cannot be delivered ends the request."""
        try:
            job.caller.send(tensors)
        except Exception as error:
            self._end_job(job, Cancelled(f"an answer could not be delivered: {error}"))

    def _end_job(self, job: Job, error: Exception | None) -> None:
        job.ended = True
        self._end(job.caller, error)

    def _end(self, caller: Caller, error: Exception | None) -> None:
        cancelled = isinstance(error, Cancelled)
        self.meter.ended("cancelled" if cancelled else "failed" if error else "done")
        with suppress(Exception):  # nobody may be there any more
            caller.end(str(error) if error else None)


def timed(stage: Callable[[str], Runner], meter: Meter) -> Callable[[str], Runner]:
    """A getter of the same stages, each call of which is timed."""
    return lambda name: Timed(stage(name), meter)


def _signed(seed: int) -> int:
    """Seeds at and above 2^63 as the int64 of the same bits, which draws the same."""
    return seed - (1 << SEED_BITS) if seed >= 1 << (SEED_BITS - 1) else seed
