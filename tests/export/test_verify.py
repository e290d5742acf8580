"""nova_export.export.verify: its inputs are such as a stage takes, and it catches a wrong graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from nova_export.config import NovaConfig
from nova_export.errors import ExportError
from nova_export.runtime.runner import Array, OrtRunner
from nova_export.spec import Stage
from nova_export.stages import stages
from tests.conftest import GOLDEN
from tests.strategies import configs

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from nova_export.export.onnx_export import trace_sizes  # noqa: E402
from nova_export.export.verify import (  # noqa: E402
    TOLERANCE,
    Case,
    check_cases,
    reference_cases,
    sample_inputs,
    verify_sizes,
)
from reference_model.checkpoint import load_module  # noqa: E402

CHECKPOINT = GOLDEN / "t2v" / "checkpoint"
STAGE = "condition"


@given(configs)
@settings(deadline=None)
def test_sizes_are_within_bounds(config: NovaConfig) -> None:
    for stage in stages(config).values():
        cases = list(verify_sizes(stage, config))
        assert len(cases) == 3
        for sizes in cases:
            assert sizes.keys() == {axis.name for axis in stage.axes}
            assert all(axis.min <= sizes[axis.name] <= axis.max for axis in stage.axes)


@pytest.mark.parametrize("name", ["t2v", "t2v-rope", "t2i"])
def test_sizes_are_not_the_traced_ones(name: str) -> None:
    """What an export had baked in would pass otherwise."""
    config = NovaConfig.from_checkpoint(GOLDEN / name / "checkpoint")
    for stage in stages(config).values():
        cases = list(verify_sizes(stage, config))
        for axis in stage.axes:
            tried = {sizes[axis.name] for sizes in cases}
            assert axis.min == axis.max or tried != {trace_sizes(stage)[axis.name]}, (stage.name, axis)


@given(configs)
@settings(deadline=None)
def test_inputs_are_such_as_a_run_gives(config: NovaConfig) -> None:
    for stage in stages(config).values():
        for seed, sizes in enumerate(verify_sizes(stage, config)):
            inputs = sample_inputs(stage, config, sizes, seed)
            assert stage.bind(inputs) == sizes
            if "next_ids" in inputs:
                ids = np.concatenate([inputs["predicted_ids"], inputs["next_ids"]], axis=1)
                assert ids.min() >= 0 and ids.max() < config.num_tokens
                assert all(len(set(row)) == len(row) for row in ids.tolist())
            if "cache_length" in inputs:
                written = int(inputs["cache_length"][0]) + sizes["text"] + config.frame_tokens
                assert written <= sizes["capacity"]
            if "text_lengths" in inputs:
                assert 0 <= inputs["text_lengths"].min() <= inputs["text_lengths"].max() <= config.text_len


def test_the_same_seed_gives_the_same_inputs() -> None:
    config = NovaConfig.from_checkpoint(CHECKPOINT)
    stage = stages(config)["spatial_encoder"]
    sizes = next(verify_sizes(stage, config))
    one, same, other = (sample_inputs(stage, config, sizes, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["context"], other["context"])


@pytest.fixture(scope="module")
def spec_and_cases() -> tuple[Stage, list[Case]]:
    config = NovaConfig.from_checkpoint(CHECKPOINT)
    spec = stages(config)[STAGE]
    return spec, reference_cases(spec, config, load_module(spec, config, CHECKPOINT))


def test_a_good_graph_passes(
    golden_bundle: Callable[[str], Path], spec_and_cases: tuple[Stage, list[Case]]
) -> None:
    spec, cases = spec_and_cases
    with OrtRunner(spec, golden_bundle("t2v") / f"{STAGE}.onnx") as runner:
        found = check_cases(spec, runner, cases)
    assert (
        found["cases"] == 3
        and found["tensor"] == "condition"
        and found["sizes"] in [case[0] for case in cases]
    )
    assert 0 <= found["max_abs_diff"] < 1e-4 and found["of"] > 0.1


@pytest.mark.parametrize("change", [0.01, np.nan], ids=["one percent", "nan"])
def test_a_perturbed_graph_is_caught(
    golden_bundle: Callable[[str], Path],
    spec_and_cases: tuple[Stage, list[Case]],
    tmp_path: Path,
    change: float,
) -> None:
    """One weight of thousands is off."""
    spec, cases = spec_and_cases
    for path in golden_bundle("t2v").glob(f"{STAGE}.onnx*"):
        shutil.copy(path, tmp_path)
    model = onnx.load(tmp_path / f"{STAGE}.onnx")
    (weight,) = (t for t in model.graph.initializer if t.name == "text_embed.norm.weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[3] *= 1 + change
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "perturbed.onnx")
    with (
        OrtRunner(spec, tmp_path / "perturbed.onnx") as runner,
        pytest.raises(
            ExportError, match=rf"stage {STAGE}: condition differs from the reference by .* at \{{'rows'"
        ),
    ):
        check_cases(spec, runner, cases)


class Changed:
    """A runner that gives the reference's outputs, changed."""

    def __init__(self, stage: Stage, cases: list[Case], change: Callable[[Array], Array]) -> None:
        self.stage, self.change = stage, change
        self.answers = iter(cases)

    def __enter__(self) -> Changed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {name: self.change(array.copy()) for name, array in next(self.answers)[2].items()}


def test_another_shape_is_caught(spec_and_cases: tuple[Stage, list[Case]]) -> None:
    spec, cases = spec_and_cases
    with pytest.raises(
        ExportError, match=r"condition is float32 \(1, 17, 128\), the reference float32 \(1, 18, 128\)"
    ):
        check_cases(spec, Changed(spec, cases, lambda array: array[:, 1:]), cases)


@pytest.mark.parametrize(("factor", "is_caught"), [(0.5, False), (2.0, True)])
def test_the_tolerance_is_of_the_largest_value(
    spec_and_cases: tuple[Stage, list[Case]], factor: float, is_caught: bool
) -> None:
    spec, cases = spec_and_cases

    def off(array: Array) -> Array:
        array.flat[-1] += factor * TOLERANCE * max(1.0, np.abs(array).max())
        return array

    runner: Any = Changed(spec, cases, off)
    if is_caught:
        with pytest.raises(ExportError, match="differs"):
            check_cases(spec, runner, cases)
    else:
        assert check_cases(spec, runner, cases)["max_abs_diff"] > 0
