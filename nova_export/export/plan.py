"""Preflight: what a checkpoint takes on a target, in memory and at least in time, before anything is built.

Costs are counted on the reference modules (meter.py); the constants below are what runtimes add to them, each
measured (benchmarks/LOG.md); those of activations are in activations.py. Bytes throughout; GB are 10^9.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nova_export.child import GB
from nova_export.config import NovaConfig
from nova_export.errors import UsageError
from nova_export.export.activations import activation_bytes
from nova_export.export.meter import Cost, stage_cost
from nova_export.lean_stages import DECODE, Kept, is_piece, kept_frames
from nova_export.runtime.decode import tiles
from nova_export.runtime.tokens import set_sizes
from nova_export.spec import Stage
from nova_export.stages import Limits, stages
from nova_export.tables import markdown
from nova_export.targets import CPU, PRECISIONS, Hardware, Precision, Target

LOOPS = ("frame", "step")  # phases in which there are caches
PASSES = 2  # with guidance
RUNTIME = 30_000_000  # of ONNX Runtime itself, in a process
PACKED = 1.15  # weights in ONNX Runtime, some of them also in the order that its kernels read
PACKED_LOOP = 1.8  # the head's: of the diffusion loop's body nearly all
COMPILE = 3.0, GB // 4  # times the weights of the largest stage, and beside them
SCALE = 4  # of a block of weights in integers
COLUMNS = ("stage", "precision", "weights MB", "activations MB", "frames MB", "calls", "at least ms a call")


@dataclass(frozen=True)
class Video:
    """What is asked for: sizes of every axis, and how often each stage is called. frames: latent ones."""

    config: NovaConfig
    batch: int = 1
    frames: int = 1
    num_inference_steps: int = 64
    num_diffusion_steps: int = 25
    lean_decode: bool = False
    head_steps: int | None = None

    @property
    def stages(self) -> dict[str, Stage]:
        """As graphs have them, which take any size."""
        return self._stages(Limits())

    @property
    def engine_stages(self) -> dict[str, Stage]:
        """As engines made for this video have them."""
        return self._stages(Limits(self.batch, self.frames))

    def _stages(self, limits: Limits) -> dict[str, Stage]:
        lean = "float32" if self.lean_decode else None
        return stages(self.config, limits, lean_decode=lean, head_steps=self.head_steps)

    def sizes(self, stage: Stage, at_most: bool) -> Mapping[str, int]:
        """at_most: the largest of the video; else those of a call in its middle."""
        config, sets = self.config, set_sizes(self.config.num_tokens, self.num_inference_steps)
        of_call = {
            "rows": PASSES * self.batch,
            "prompts": 1,
            "length": config.text_len,
            "text": config.condition_tokens if at_most else 0,
            "capacity": config.condition_tokens + self.frames * config.frame_tokens,
            "predicted": config.num_tokens - sets[-1] if at_most else config.num_tokens // 2,
            "next": max(sets) if at_most else -(-config.num_tokens // len(sets)),
            "passes": PASSES,
            "samples": self.batch,
            "steps": self.head_steps or self.num_diffusion_steps,
            "rest": 1,
            "latent_frames": min(self.frames, config.tiling.latent_frames),
        }
        return {axis.name: of_call.get(axis.name, axis.max) for axis in stage.axes}

    def profile_sizes(self, stage: Stage) -> Mapping[str, int]:
        """The largest of the profile of an engine, whose memory is for these whatever a call has."""
        sizes = {axis.name: axis.max for axis in stage.axes}
        if "steps" in sizes:  # a loop takes the memory of one step
            sizes["steps"] = self.head_steps or self.num_diffusion_steps
        return sizes

    def calls(self, stage: Stage) -> int:
        """In one video."""
        sets = len(set_sizes(self.config.num_tokens, self.num_inference_steps))
        decodes = self.batch * len(list(tiles(self.config.tiling, self.frames)))
        of_phase = {"text": 1, "image": 0, "frame": self.frames, DECODE: decodes}
        calls = of_phase.get(stage.phase, self.frames * sets)
        if is_piece(stage):
            calls *= self.tile_frames
        if stage.name == "diffusion_head" and self.head_steps:
            calls *= -(-self.num_diffusion_steps // self.head_steps)
        return PASSES if stage.name == "text_encoder" else calls

    @property
    def tile_frames(self) -> int:
        """Of the largest tile that is decoded at a time."""
        tiling = self.config.tiling
        return 1 + (min(self.frames, tiling.latent_frames) - 1) * tiling.frames_per_latent


@dataclass(frozen=True)
class StagePlan:
    """weights, activations: as the runtime keeps them. frames: of a lean decode, all that there are while
    this piece runs; call_frames: those of one call. seconds: at least, of one call; None where the target's
    rates are unknown."""

    name: str
    phase: str
    precision: str
    weights: int
    activations: int
    frames: int
    call_frames: int
    calls: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What a video takes. caches: of keys and values. memory: what there is for it; None if unknown.

    frames_on_host: whether those of a lean decode wait in another memory, with --low-memory.
    decodes_meanwhile: whether the decoder computes beside other stages, in memory of its own.
    """

    target: str
    stages: tuple[StagePlan, ...]
    caches: int
    memory: int | None
    build: int
    frames_on_host: bool = False
    decodes_meanwhile: bool = False

    @property
    def run(self) -> int:
        """With every stage loaded."""
        return self._needs(self.stages) + self.caches

    @property
    def run_low_memory(self) -> int:
        """With the stages of one phase loaded at a time."""
        phases = {stage.phase for stage in self.stages}
        return max(
            self._needs([stage for stage in self.stages if stage.phase == phase], self.frames_on_host)
            + (self.caches if phase in LOOPS else 0)
            for phase in phases
        )

    def _needs(self, loaded: Collection[StagePlan], frames_on_host: bool = False) -> int:
        beside = RUNTIME if self.target == CPU.name else 0
        scratch: dict[bool, int] = {}  # that all of them compute in, or the decoder in one and others in one
        for stage in loaded:
            apart = self.decodes_meanwhile and stage.phase == DECODE
            scratch[apart] = max(scratch.get(apart, 0), stage.activations)
        frames = max(stage.call_frames if frames_on_host else stage.frames for stage in loaded)
        return beside + sum(scratch.values()) + frames + sum(stage.weights for stage in loaded)

    @property
    def seconds(self) -> float | None:
        """At least, of the whole video."""
        times = [(stage.seconds, stage.calls) for stage in self.stages]
        return None if any(each is None for each, _ in times) else sum(t * n for t, n in times if t)

    @property
    def verdict(self) -> str:
        if self.memory is None or self.run <= self.memory:
            return "fits" if self.memory is not None else "memory unknown"
        return "fits with --low-memory" if self.run_low_memory <= self.memory else "does not fit"

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "verdict": self.verdict,
            "memory": self.memory,
            "run": self.run,
            "run_low_memory": self.run_low_memory,
            "build": self.build,
            "caches": self.caches,
            "seconds_at_least": self.seconds,
            "stages": [vars(stage) for stage in self.stages],
        }

    def table(self) -> str:
        """For a person."""
        rows = [
            (
                stage.name,
                stage.precision,
                f"{stage.weights / 1e6:.1f}",
                f"{stage.activations / 1e6:.1f}",
                f"{stage.frames / 1e6:.1f}" if stage.frames else "-",
                str(stage.calls),
                "-" if stage.seconds is None else f"{1000 * stage.seconds:.3g}",
            )
            for stage in self.stages
        ]
        has = "" if self.memory is None else f" of {self.memory / GB:.1f} GB"
        lines = [
            markdown(COLUMNS, rows),
            "",
            f"{self.target}: {self.verdict}",
            f"run: {self.run / GB:.2f} GB{has}; with --low-memory {self.run_low_memory / GB:.2f} GB; "
            f"{self.caches / GB:.2f} GB of both are caches",
            f"build: {self.build / GB:.1f} GB of the building machine's memory",
        ]
        if self.seconds is not None:
            lines.append(f"time: at least {self.seconds:.2f} s, by arithmetic and bandwidth alone")
        return "\n".join(lines)


@dataclass(frozen=True)
class Costs:
    """What a video costs, by stage: of its largest call, and of one in its middle; of engines made for it."""

    video: Video
    largest: Mapping[str, Cost]
    usual: Mapping[str, Cost]

    @classmethod
    def count(cls, video: Video) -> Costs:
        def costs(at_most: bool) -> dict[str, Cost]:
            return {
                name: stage_cost(stage, video.config, video.sizes(stage, at_most))
                for name, stage in video.stages.items()
            }

        return cls(video, costs(at_most=True), costs(at_most=False))

    @cached_property
    def of_engines(self) -> Mapping[str, Cost]:
        video = self.video
        return {
            name: stage_cost(stage, video.config, video.profile_sizes(stage))
            for name, stage in video.engine_stages.items()
        }

    def activations(self, name: str, precision: Precision, target: Target) -> int:
        """Bytes that a stage computes in on a target."""
        video = self.video
        if target.runtime is None:
            stage, cost = video.stages[name], self.largest[name]
            sizes = video.sizes(stage, at_most=True)
        else:
            stage, cost = video.engine_stages[name], self.of_engines[name]
            sizes = video.profile_sizes(stage)
        return activation_bytes(stage, cost, precision, target, video.config, sizes)


def make_plan(costs: Costs, target: Target, precision: Precision, memory: int | None = None) -> Plan:
    """memory: bytes for it; if not told, of the target's hardware without what the system takes."""
    hardware, video = target.hardware, costs.video
    if memory is None and hardware:
        memory = int((hardware.memory - hardware.system) * GB)
    made, kept = [], kept_frames(video.stages.values(), video.tile_frames)
    for name, stage in video.stages.items():
        of_stage, cost = precision.of_stage(name), costs.largest[name]
        weights = loaded = weight_bytes(cost, of_stage)
        frames, of_frame = kept.get(name, Kept(0, 0)), 2 if of_stage.half else 4
        if target.runtime is None:
            loaded = int(weights * (PACKED_LOOP if name == "diffusion_head" else PACKED))
        made.append(
            StagePlan(
                name=name,
                phase=stage.phase,
                precision=of_stage.name,
                weights=loaded,
                activations=costs.activations(name, of_stage, target),
                frames=of_frame * frames.between,
                call_frames=of_frame * frames.call,
                calls=video.calls(stage),
                seconds=_seconds(costs.usual[name], weights, of_stage, hardware),
            )
        )
    build = export_bytes(max(cost.weights for cost in costs.largest.values()))
    if target.runtime:
        factor, beside = COMPILE
        build = max(build, int(factor * max(stage.weights for stage in made) + beside))
    in_place = 4 * sum(cost.in_place for cost in costs.largest.values())  # float32 in any precision
    caches = in_place * (2 if target.runtime else 1)  # an engine has each twice
    apart = target.runtime is not None and not (hardware and hardware.unified)
    return Plan(
        target.name,
        tuple(made),
        caches,
        memory,
        build,
        frames_on_host=apart,
        decodes_meanwhile=target.runtime is not None,
    )


def fitting(costs: Costs, target: Target, memory: int | None = None) -> Iterator[tuple[str, Plan]]:
    """Options with which a target has the memory, be it with --low-memory; the most exact precision first.

    The whole decoder's before those of a lean decode, where the checkpoint can have one.
    """
    kinds = {"": costs}
    if not costs.video.lean_decode:
        with suppress(UsageError):
            kinds["--lean-decode"] = Costs.count(replace(costs.video, lean_decode=True))
    for option, counted in kinds.items():
        for precision in PRECISIONS:
            if not precision.fastest_of and precision.half in (None, *target.kernels):
                plan = make_plan(counted, target, precision, memory)
                if plan.verdict.startswith("fits"):
                    yield f"{precision.name} {option}".strip(), plan


def weight_bytes(cost: Cost, precision: Precision) -> int:
    """Linear layers may be in integers, with a scale for each block or channel; the rest stays as it is."""
    if precision.weights is None:
        return cost.weights * (2 if precision.half else 4)
    bits = {"int8": 8, "int4": 4}[precision.weights]
    scales = SCALE / precision.block if precision.block else 0
    return int(cost.linear * (bits / 8 + scales)) + 4 * (cost.weights - cost.linear)


def export_bytes(weights: int) -> int:
    """What exporting a stage with so many weights needs at most."""
    return int(1.1 * 4 * weights) + 2 * GB


def _seconds(cost: Cost, weights: int, precision: Precision, hardware: Hardware | None) -> float | None:
    """Products at the full rate, or weights read once at the full bandwidth, whichever takes longer."""
    if hardware is None:
        return None
    rate = hardware.int8 if precision.inputs else hardware.half
    return max(cost.operations / (rate * 1e12), weights / (hardware.bandwidth * GB))
