"""CUDA graphs of engines, over doubles of CUDA and TensorRT: what is captured when, replayed, and dropped."""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nova_export
from nova_export.bundle import Bundle, StageEntry
from nova_export.config import NovaConfig
from nova_export.export.verify import sample_inputs
from nova_export.runtime import cuda_graph
from nova_export.runtime.cuda import Gpu
from nova_export.runtime.runner import Array, OrtRunner
from nova_export.runtime.tensorrt import TensorRtRunner
from tests.runtime.fake_gpu import FOUR_FRAMES, Machine, add_engines

TARGET = "tensorrt"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, TARGET)


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    path = Path(shutil.copytree(golden_bundle("t2v"), tmp_path / "bundle"))
    add_engines(path, TARGET)
    return path


class StageRuns:
    """Runs of one stage by its engine, each with other values, and what ONNX Runtime makes of them."""

    def __init__(self, runner: TensorRtRunner, config: NovaConfig, reference: OrtRunner) -> None:
        self.runner, self.config, self.reference = runner, config, reference
        self.seed = 0

    def inputs(self, **sizes: int) -> dict[str, Array]:
        self.seed += 1
        small = {axis.name: max(axis.min, min(2, axis.max)) for axis in self.runner.stage.axes}
        return sample_inputs(self.runner.stage, self.config, {**small, **sizes}, self.seed)

    def expect(self, actual: Any, inputs: dict[str, Array]) -> None:
        for name, expected in self.reference.run(inputs).items():
            np.testing.assert_array_equal(np.asarray(actual[name]), expected)

    def check(self, **sizes: int) -> None:
        inputs = self.inputs(**sizes)
        self.expect(self.runner.run(inputs), inputs)


Opener = Callable[[str], StageRuns]


@pytest.fixture
def opened(golden_bundle: Callable[[str], Path], tmp_path: Path, machine: Machine) -> Any:
    bundle = Bundle.open(golden_bundle("t2v"))
    entered: list[Any] = []

    def open_stage(name: str) -> StageRuns:
        entry: StageEntry = bundle.stages[name]
        engine = tmp_path / f"{name}.engine"
        engine.write_text(str(bundle.path(entry.graph)))
        pair = TensorRtRunner(entry.spec, engine, Gpu()), OrtRunner(entry.spec, bundle.path(entry.graph))
        entered.extend(pair)
        return StageRuns(pair[0].__enter__(), bundle.config, pair[1].__enter__())

    yield open_stage
    for runner in entered:
        runner.__exit__(None, None, None)


# Videos


@pytest.mark.parametrize("options", [{}, {"aliases": True}, {"capturable": True}], ids=str)
def test_videos_are_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    machine = Machine(monkeypatch, TARGET, **options)
    calls = [
        FOUR_FRAMES,
        {**FOUR_FRAMES, "max_latent_length": 2, "seed": 4},
        {**FOUR_FRAMES, "num_inference_steps": 2},
    ]
    expected = [nova_export.load(bundle, device="cpu")(**call) for call in calls]
    with nova_export.load(bundle) as pipe:
        for call, reference in zip(calls, expected, strict=True):
            actual = pipe(**call)
            np.testing.assert_array_equal(actual.latents, reference.latents)
            np.testing.assert_array_equal(actual.frames, reference.frames)
    # All frames but the first two, and all of the second video, whose shapes are those of the first.
    assert machine.cuda.launched >= 2 * 3 * (2 + 2)
    assert not machine.cuda.graphs and not machine.cuda.captured
    del pipe
    gc.collect()
    assert not machine.cuda.live and not machine.trt.contexts


@pytest.mark.parametrize("options", [{"cuda_graphs": False}, {"low_memory": True}], ids=str)
def test_without_graphs(bundle: Path, machine: Machine, options: dict[str, bool]) -> None:
    expected = nova_export.load(bundle, device="cpu")(**FOUR_FRAMES)
    actual = nova_export.load(bundle, **options)(**FOUR_FRAMES)  # type: ignore[arg-type]
    np.testing.assert_array_equal(actual.latents, expected.latents)
    assert machine.cuda.begun == 0


# When


@pytest.mark.parametrize("name", ["spatial_encoder", "diffusion_head"])
def test_a_shape_is_run_then_captured_then_replayed(opened: Opener, machine: Machine, name: str) -> None:
    runs = opened(name)
    counts = []
    for _ in range(4):
        runs.check()
        counts.append((machine.cuda.begun, machine.cuda.launched, len(machine.trt.contexts)))
    assert counts == [(0, 0, 1), (1, 0, 2), (1, 1, 2), (1, 2, 2)]


def test_other_stages_are_not_captured(opened: Opener, machine: Machine) -> None:
    runs = opened("condition")
    for _ in range(3):
        runs.check()
    assert machine.cuda.begun == 0


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        *(("spatial_encoder", axis) for axis in ("rows", "predicted", "next")),
        *(("diffusion_head", axis) for axis in ("passes", "samples", "next", "steps", "rest")),
    ],
)
@pytest.mark.parametrize(
    ("sizes", "captured", "replayed"),
    [
        ([1, 3] * 4, 2, 4),
        ([3, 3, 3, 1, 1, 1, 3], 2, 3),
        ([1, 1, 1, 3, 3, 3, 1, 1], 3, 3),  # inputs have grown, and moved: the first is captured again
    ],
)
def test_every_shape_has_a_graph_of_its_own(
    opened: Opener, machine: Machine, name: str, axis: str, sizes: list[int], captured: int, replayed: int
) -> None:
    runs = opened(name)
    for size in sizes:
        runs.check(**{axis: size})
    assert (machine.cuda.begun, machine.cuda.launched) == (captured, replayed)
    assert len(machine.cuda.graphs) == 2


def test_the_first_shape_has_no_predicted_tokens(opened: Opener, machine: Machine) -> None:
    runs = opened("spatial_encoder")
    for predicted in (0, 2, 0, 2, 0, 2):
        runs.check(predicted=predicted)
    assert machine.cuda.launched == 2


# What is copied


def test_inputs_may_be_anywhere(opened: Opener, machine: Machine) -> None:
    """On the host or the GPU, and elsewhere each time; what was given is neither kept nor changed."""
    runs = opened("spatial_encoder")
    for turn in range(6):
        inputs = runs.inputs()
        held = {
            name: runs.runner.gpu.upload(array) if (turn + place) % 2 else array.copy()
            for place, (name, array) in enumerate(inputs.items())
        }
        outputs = runs.runner.run(held)
        for name, array in held.items():
            if isinstance(array, np.ndarray):
                array[...] = 0
            else:
                np.testing.assert_array_equal(np.asarray(array), inputs[name])
        del held
        runs.expect(outputs, inputs)
    assert machine.cuda.launched == 4


def test_outputs_stay_what_they_are(opened: Opener, machine: Machine) -> None:
    runs = opened("spatial_encoder")
    made = []
    for _ in range(5):
        inputs = runs.inputs()
        made.append((runs.runner.run(inputs), inputs))
    for outputs, inputs in made:
        runs.expect(outputs, inputs)
    assert machine.cuda.launched == 3


# What makes a graph invalid


@pytest.mark.parametrize("name", ["spatial_encoder", "diffusion_head"])
def test_scratch_memory_that_grows_takes_its_graphs_along(
    opened: Opener, machine: Machine, name: str
) -> None:
    """Another stage needed more, so what the graph computes in was freed: it is captured again."""
    runs = opened(name)
    for _ in range(3):
        runs.check()
    runs.runner.gpu.arena(1 << 16)
    for _ in range(3):
        runs.check()
    assert (machine.cuda.begun, machine.cuda.launched) == (2, 3)
    assert len(machine.cuda.graphs) == 1 and len(machine.trt.contexts) == 2


def test_the_shapes_used_last_keep_their_graphs(
    opened: Opener, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "GRAPHS", 2)
    runs = opened("spatial_encoder")
    for predicted in (1, 2, 1, 2, 1, 2, 3, 3, 3, 2, 1):
        runs.check(predicted=predicted)
        assert len(machine.cuda.graphs) <= 2 and len(machine.trt.contexts) <= 3
    launched = machine.cuda.launched
    runs.check(predicted=2)
    assert machine.cuda.launched == launched + 1
    runs.check(predicted=3)  # forgotten: it counts as new
    assert machine.cuda.launched == launched + 1


def test_what_is_read_on_the_host_is_not_captured(machine: Machine, opened: Opener) -> None:
    machine.trt.on_host = ("next_ids",)
    runs = opened("spatial_encoder")
    for _ in range(4):
        runs.check()
    assert machine.cuda.begun == 0


# What cannot be captured


def allocates(machine: Machine) -> None:
    machine.trt.in_capture = lambda: machine.cuda.cudaMallocAsync(1, 7)


def waits(machine: Machine) -> None:
    machine.trt.in_capture = lambda: machine.cuda.cudaStreamSynchronize(7)


def says_no(machine: Machine) -> None:
    machine.trt.capturable = False


def has_no_memory(machine: Machine) -> None:
    machine.cuda.instantiates = False


def has_no_context(machine: Machine) -> None:
    machine.trt.most_contexts = 1


@pytest.mark.parametrize("fails", [allocates, waits, says_no, has_no_memory, has_no_context])
def test_a_capture_that_fails_is_tried_once(
    opened: Opener, machine: Machine, fails: Callable[[Machine], None]
) -> None:
    fails(machine)
    runs = opened("diffusion_head")
    runs.check()
    words = r"no CUDA graphs.*(CUDA failed in|stage diffusion_head: )"
    with pytest.warns(UserWarning, match=words) as caught:
        runs.check()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (2, 2, 3, 3, 3):
            runs.check(steps=steps)
    assert machine.cuda.begun <= 1 and machine.cuda.launched == 0
    assert not machine.cuda.graphs and not machine.cuda.captured and len(machine.trt.contexts) == 1


def test_garbage_is_not_collected_in_a_capture(opened: Opener, machine: Machine) -> None:
    runs = opened("spatial_encoder")
    held = [runs.runner.gpu.upload(np.zeros(8))]

    def make_garbage() -> None:
        """Memory of the GPU that only a collection frees, and enough objects for one to take place."""
        cycle: list[Any] = [held.pop()]
        cycle.append(cycle)
        del cycle
        assert len([[] for _ in range(100_000)]) == 100_000

    machine.trt.in_capture = make_garbage
    for _ in range(3):
        runs.check()
    assert machine.cuda.launched == 1 and gc.isenabled()
