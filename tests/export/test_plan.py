"""What a stage costs, counted by hand beside it; what a plan makes of it; and refusals before the work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nova_export.config import NovaConfig
from nova_export.export import build
from nova_export.export.activations import SCORES, activation_bytes
from nova_export.export.meter import stage_cost
from nova_export.export.plan import (
    GB,
    RUNTIME,
    Costs,
    Plan,
    Video,
    fitting,
    make_plan,
    weight_bytes,
)
from nova_export.runtime import stage_runners
from nova_export.spec import Axis, Stage
from nova_export.spec import Tensor as Spec
from nova_export.stages import stages
from nova_export.targets import PRECISIONS, TARGETS, Target, find
from reference_model.checkpoint import Weights
from reference_model.init import resolve
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN

WIDTH = 128
T2V = GOLDEN / "t2v" / "checkpoint"


class Layers(nn.Module):
    """Two layers with a wide middle, and attention of one head; a table besides."""

    def __init__(self, config: NovaConfig) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.small = nn.Linear(WIDTH, 8, bias=False)
        self.register_buffer("table", torch.zeros(7, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.relu(self.up(x)))
        heads = x[:, None]
        return self.small(F.scaled_dot_product_attention(heads, heads, heads)[:, 0])


def layers(rows: int = 5) -> Stage:
    return Stage(
        name="layers",
        module="tests.export.test_plan:Layers",
        part="transformer",
        prefixes=(),
        phase="step",
        inputs=(Spec("x", "float32", ("batch", rows, WIDTH)),),
        outputs=(Spec("y", "float32", ("batch", rows, 8)),),
        axes=(Axis("batch", 1, 1, 9),),
    )


COUNTED: dict[str, Costs] = {}


def counted(video: Video) -> Costs:
    """Costs, which take seconds to count, counted once."""
    if repr(video) not in COUNTED:
        COUNTED[repr(video)] = Costs.count(video)
    return COUNTED[repr(video)]


def planned(config: NovaConfig, target: str | Target = "cpu", precision: str = "fp32", **video: Any) -> Plan:
    costs = counted(Video(config, **{"frames": config.video_length, **video}))
    chosen = find(TARGETS, target) if isinstance(target, str) else target
    return make_plan(costs, chosen, find(PRECISIONS, precision))


@pytest.fixture(scope="module")
def config() -> NovaConfig:
    return NovaConfig.from_checkpoint(T2V)


def test_costs_are_those_counted_by_hand(config: NovaConfig) -> None:
    cost = stage_cost(layers(), config, {"batch": 3})
    wide = 4 * WIDTH * WIDTH
    assert cost.linear == 2 * wide  # the small one has too few outputs
    assert cost.weights == 2 * wide + 5 * WIDTH + 8 * WIDTH + 7 * WIDTH
    rows = 3 * 5
    assert cost.activations == rows * (WIDTH + 4 * WIDTH + 4 * WIDTH)  # the input, and both sides of the relu
    assert cost.scores == 3 * 5 * 5
    assert cost.operations == 2 * rows * (2 * wide + 8 * WIDTH) + 2 * 2 * 3 * 5 * 5 * WIDTH


def test_nothing_is_computed(config: NovaConfig) -> None:
    """Ten million rows would take 400 GB."""
    cost = stage_cost(layers(10**7), config, {"batch": 9})
    assert cost.activations == 9 * 10**7 * 9 * WIDTH


def test_caches_are_no_activations(config: NovaConfig) -> None:
    """They are counted apart, once: graphs write them in place."""
    stage = stages(config)["temporal_encoder"]
    sizes = {"rows": 2, "text": 0, "capacity": 100}
    short, long = (stage_cost(stage, config, {**sizes, "capacity": capacity}) for capacity in (100, 10_000))
    one = 2 * 10_000 * config.temporal.width
    assert short.activations < long.activations < one  # a mask and the like, not the caches


@pytest.mark.parametrize("kind", ["t2v", "t2i", "t2v-rope"])
def test_weights_are_those_of_the_checkpoint(kind: str) -> None:
    checkpoint = GOLDEN / kind / "checkpoint"
    config = NovaConfig.from_checkpoint(checkpoint)
    costs = counted(Video(config))
    for name, stage in stages(config).items():
        shapes = Weights(checkpoint / stage.part).shapes
        stored = sum(torch.Size(shapes[key]).numel() for key in shapes if key.startswith(stage.prefixes))
        tables = (
            costs.largest[name].weights - stored
        )  # of positions: they are weights too, though no file has them
        assert 0 <= tables <= config.num_tokens * config.spatial.width * 2, name


def test_a_video_takes_what_its_stages_and_caches_take(config: NovaConfig) -> None:
    plan = planned(config, batch=2, frames=5)
    depth, width = config.temporal.depth, config.temporal.width
    assert plan.caches == 4 * 2 * depth * 4 * (config.condition_tokens + 5 * config.frame_tokens) * width
    assert plan.run == RUNTIME + plan.caches + sum(s.weights for s in plan.stages) + max(
        s.activations for s in plan.stages
    )
    assert plan.run_low_memory < plan.run
    encoder = next(s for s in plan.stages if s.name == "spatial_encoder")
    assert plan.run_low_memory >= plan.caches + encoder.weights + encoder.activations
    assert {s.name: s.calls for s in plan.stages if s.phase == "frame"} == {"temporal_encoder": 5}
    assert planned(config, "rtx-4090", "fp16", batch=2, frames=5).caches == 2 * plan.caches


def test_precisions_take_less(config: NovaConfig) -> None:
    cost = stage_cost(layers(), config, {"batch": 1})
    taken = {each.name: weight_bytes(cost, each) for each in PRECISIONS if not each.fastest_of}
    rest = cost.weights - cost.linear
    assert taken["fp32"] == 4 * cost.weights and taken["fp16"] == taken["bf16"] == 2 * cost.weights
    assert taken["int8"] == cost.linear + 4 * rest
    assert taken["int4-weights"] == cost.linear * (0.5 + 4 / 32) + 4 * rest


def test_scores_that_are_never_held_take_nothing(config: NovaConfig) -> None:
    """ONNX Runtime's MultiHeadAttention, which stages in integers have where there is no mask."""
    plans = [planned(config, target, p) for target in ("cpu", "rtx-4090") for p in ("fp32", "int8-weights")]
    whole, pieces, *engines = ({s.name: s.activations for s in plan.stages} for plan in plans)
    video = Video(config, frames=config.video_length)
    stage = video.stages["spatial_encoder"]
    scores = 4 * SCORES * stage_cost(stage, config, video.sizes(stage, at_most=True)).scores
    assert scores > 0 and whole["spatial_encoder"] - pieces["spatial_encoder"] == scores
    assert whole["temporal_encoder"] == pieces["temporal_encoder"]
    assert engines[0]["spatial_encoder"] == engines[1]["spatial_encoder"]


def test_the_verdict_follows_the_memory(config: NovaConfig) -> None:
    plan = planned(config, "l4")
    assert plan.verdict == "fits" and plan.memory == int((24 - 0.6) * GB) and plan.seconds
    assert replace(plan, memory=plan.run - 1).verdict == "fits with --low-memory"
    assert replace(plan, memory=plan.run_low_memory - 1).verdict == "does not fit"
    assert planned(config).verdict == "memory unknown" and planned(config).seconds is None


def test_an_unrolled_head_is_called_so_often(config: NovaConfig) -> None:
    looped = Video(config, num_inference_steps=4, num_diffusion_steps=11)
    unrolled = replace(looped, head_steps=5)
    head, whole = (video.stages["diffusion_head"] for video in (unrolled, looped))
    assert unrolled.calls(head) == 3 * looped.calls(whole)
    assert unrolled.sizes(head, at_most=True)["steps"] == 5
    assert unrolled.calls(unrolled.stages["spatial_encoder"]) == looped.calls(
        looped.stages["spatial_encoder"]
    )


def test_time_is_bound_by_weights_or_by_arithmetic(config: NovaConfig) -> None:
    target = find(TARGETS, "l4")
    assert target.hardware
    slow = replace(target, hardware=replace(target.hardware, bandwidth=1e-9))
    stage = {s.name: s for s in planned(config, slow, "fp16").stages}["spatial_encoder"]
    assert stage.seconds == pytest.approx(stage.weights)  # a byte a second
    slow = replace(target, hardware=replace(target.hardware, half=1e-12))
    [usual] = [
        stage_cost(stages(config)["diffusion_head"], config, {
            "passes": 2, "samples": 1, "next": 1, "steps": 25, "rest": 1
        })
    ]  # fmt: skip
    stage = {s.name: s for s in planned(config, slow, "fp16").stages}["diffusion_head"]
    assert stage.seconds == pytest.approx(usual.operations)


# The command, and refusals


def test_the_command_says_what_would_fit() -> None:
    small = ("plan", T2V, "--target", "jetson-orin-nano-8gb", "--precision", "fp32")
    assert "fits" in nova_export(*small).out and "time: at least" in nova_export(*small).out
    table = nova_export(*small, "--memory", "0.02").out
    assert "does not fit" in table and "what would: " in table
    found = json.loads(nova_export(*small, "--memory", "0.02", "--json").out)
    assert found["verdict"] == "does not fit" and {s["name"] for s in found["stages"]} >= {"vae_decoder"}
    assert all(how.startswith("fits") for how in found["fitting"].values())


def test_a_lean_decode_is_offered_where_the_whole_does_not_fit(config: NovaConfig) -> None:
    target, half = find(TARGETS, "rtx-4090"), find(PRECISIONS, "fp16")
    costs = [counted(Video(config, frames=5, lean_decode=lean)) for lean in (False, True)]
    whole, lean = (make_plan(each, target, half) for each in costs)
    assert lean.run_low_memory < whole.run_low_memory
    options = dict(fitting(costs[0], target, lean.run_low_memory))
    assert "fp16" not in options and options["fp16 --lean-decode"].verdict == "fits with --low-memory"
    assert {option.partition(" ")[2] for option, _ in fitting(costs[1], target)} == {""}


def test_an_exact_decode_at_full_size_fits_a_jetson_of_8_gb() -> None:
    """Frames between pieces are the machine's with --low-memory: of a Jetson that is the same memory."""
    full = NovaConfig.from_parts(**vars(resolve("nova-d48w1024-osp480", "2x64")))
    costs = Costs.count(Video(full, frames=9, lean_decode=True))
    jetson, apart = (
        make_plan(costs, find(TARGETS, name), find(PRECISIONS, "fp16"))
        for name in ("jetson-orin-nano-8gb", "rtx-4090")
    )
    assert jetson.verdict == "fits with --low-memory" and 4.5 * GB < jetson.run_low_memory < 5.5 * GB
    assert apart.run_low_memory < 3.5 * GB
    assert jetson.run == apart.run  # both keep frames where they are, else
    decode = [stage for stage in jetson.stages if stage.phase == "decode"]
    scratch, frames = max(s.activations for s in decode), max(s.frames for s in decode)
    assert scratch < 1.5 * GB and frames < 3.3 * GB
    assert jetson.run_low_memory == scratch + frames + sum(s.weights for s in decode)


# TensorRT-RTX 1.7.1's own figures in MB, in fp16 for SM89: benchmarks/LOG.md
OSP480 = {
    "condition": 21.1, "temporal_encoder": 70.2, "spatial_encoder": 89, "diffusion_head": 214,
    "vae_encoder": 443, "vae_decoder": 13_242,
}  # fmt: skip
SDXL1024 = {"condition": 9.9, "temporal_encoder": 66.6, "spatial_encoder": 252, "vae_decoder": 1636}
SMALL = "2x64"  # a text encoder


@pytest.mark.parametrize(
    ("name", "frames", "head_steps", "said"),
    [
        ("nova-d48w1024-osp480", 9, 5, OSP480),
        ("nova-d48w1024-osp480", 1, 1, {"temporal_encoder": 35.6, "diffusion_head": 170}),
        ("nova-d48w1024-osp480", 3, 10, {"temporal_encoder": 40.9, "diffusion_head": 269}),
        ("nova-d48w1024-osp480", 1, None, {"diffusion_head": 279}),
        ("nova-d48w1024-sdxl1024", 1, 2, {**SDXL1024, "diffusion_head": 630}),
        ("nova-d48w1024-sdxl1024", 1, None, {"diffusion_head": 897}),
        ("nova-d48w768-sdxl1024", 1, None, {"temporal_encoder": 52.8}),
    ],
)
def test_engines_compute_in_what_tensorrt_says(
    name: str, frames: int, head_steps: int | None, said: dict[str, float]
) -> None:
    full = NovaConfig.from_parts(**vars(resolve(name, SMALL)))
    video = Video(full, frames=frames, head_steps=head_steps)
    target, half = find(TARGETS, "rtx-40"), find(PRECISIONS, "fp16")
    made = video.engine_stages
    for stage, megabytes in said.items():
        sizes = video.profile_sizes(made[stage])
        cost = stage_cost(made[stage], full, sizes)
        actual = activation_bytes(made[stage], cost, half, target, full, sizes)
        assert actual / 1e6 == pytest.approx(megabytes, rel=0.1), stage


def test_engines_are_for_their_largest_sizes(config: NovaConfig) -> None:
    """Whatever a call has: memory is of the profile."""
    few, many = (
        {s.name: s.activations for s in planned(config, "rtx-4090", "fp16", num_inference_steps=steps).stages}
        for steps in (1, 64)
    )
    assert few == many
    on_cpu = [
        {s.name: s.activations for s in planned(config, num_inference_steps=steps).stages}
        for steps in (1, 64)
    ]
    assert on_cpu[0]["diffusion_head"] > on_cpu[1]["diffusion_head"]


def test_the_decoder_of_engines_computes_beside_the_others(config: NovaConfig) -> None:
    plan = planned(config, "rtx-4090", "fp16")
    decode = max(s.activations for s in plan.stages if s.phase == "decode")
    others = max(s.activations for s in plan.stages if s.phase != "decode")
    assert plan.run == plan.caches + sum(s.weights for s in plan.stages) + decode + others


def test_a_bundle_is_planned_as_its_checkpoint(golden_bundle: Callable[[str], Path]) -> None:
    both = [nova_export("plan", path, "--memory", "1", "--json").out for path in (T2V, golden_bundle("t2v"))]
    assert both[0] == both[1]


def test_building_is_refused_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "available_memory", lambda: 10**9)
    only_error(nova_export("build", T2V, "-o", tmp_path / "new", "-q"), 10, "exporting", "1.0 GB are free")
    assert not list(tmp_path.iterdir())


def test_running_is_refused_where_memory_is_short(
    golden_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(golden_bundle("t2i"), tmp_path / "bundle"))
    sizes: dict[str, int] = {}
    entries: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    for name, stage in entries["stages"].items():
        sizes[name] = sum(entries["files"][file]["size"] for file in stage["files"])
    command = ("run", "a", "--bundle", path, "-o", tmp_path / "out.png", "-q")
    monkeypatch.setattr(stage_runners, "available_memory", lambda: sum(sizes.values()) - 1)
    only_error(nova_export(*command), 10, "its weights take", "--low-memory needs")
    short = ("--num-inference-steps", "1", "--num-diffusion-steps", "1")
    assert nova_export(*command, "--low-memory", *short).code == 0
    monkeypatch.setattr(stage_runners, "available_memory", lambda: 10)
    only_error(nova_export(*command, "--low-memory"), 10, "its weights take", "int8")
