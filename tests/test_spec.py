"""nova_export.spec: bounds of an Axis, what `Stage.bind` takes and refuses, and the way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nova_export.errors import StageError
from nova_export.spec import Axis, Stage, Tensor

DTYPES = ("float32", "float16", "int64", "bool")
names = st.text("abcdefgh_", min_size=1, max_size=6)


@st.composite
def axes_of(draw: st.DrawFn) -> tuple[Axis, ...]:
    made = []
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        low, usual, high = sorted(draw(st.lists(st.integers(0, 6), min_size=3, max_size=3)))
        made.append(Axis(name, low, usual, high))
    return tuple(made)


@st.composite
def stages_of(draw: st.DrawFn) -> Stage:
    """A stage with any inputs and outputs; the first input uses every axis, so that all have a size."""
    axes = draw(axes_of())
    size = st.one_of(st.integers(0, 4), st.sampled_from([axis.name for axis in axes]))
    shape = st.lists(size, max_size=4).map(tuple)
    tensors = st.lists(names, min_size=2, max_size=5, unique=True).flatmap(
        lambda unique: st.tuples(
            *(st.builds(Tensor, st.just(n), st.sampled_from(DTYPES), shape) for n in unique)
        )
    )
    first, *others = draw(tensors)
    inputs = (replace(first, shape=(*(axis.name for axis in axes), 3)), *others)
    outputs = tuple(
        replace(t, name=f"new_{t.name}", alias=draw(st.sampled_from([None, t.name]))) for t in inputs
    )
    return Stage("made_up", "somewhere:Module", "part", ("weights.",), "step", inputs, outputs, axes)


@st.composite
def stages_with_inputs(draw: st.DrawFn) -> tuple[Stage, dict[str, int], dict[str, np.ndarray]]:
    stage = draw(stages_of())
    sizes = {axis.name: draw(st.integers(axis.min, axis.max)) for axis in stage.axes}
    shapes = stage.shapes(sizes)
    return stage, sizes, {t.name: np.zeros(shapes[t.name], t.dtype) for t in stage.inputs}


def refused(stage: Stage, arrays: dict[str, np.ndarray], *words: str) -> None:
    """The error names the stage, and what else the user needs to see."""
    with pytest.raises(StageError) as caught:
        stage.bind(arrays)
    for word in (stage.name, *words):
        assert word in str(caught.value)


@given(stages_with_inputs())
def test_any_consistent_sizes_are_accepted(case: tuple[Stage, dict[str, int], dict[str, np.ndarray]]) -> None:
    stage, sizes, arrays = case
    assert stage.bind(arrays) == sizes


@given(stages_with_inputs(), st.data())
def test_a_wrong_dtype_is_refused(
    case: tuple[Stage, dict[str, int], dict[str, np.ndarray]], data: st.DataObject
) -> None:
    stage, _, arrays = case
    tensor = data.draw(st.sampled_from(stage.inputs))
    other = data.draw(st.sampled_from([dtype for dtype in DTYPES if dtype != tensor.dtype]))
    arrays[tensor.name] = arrays[tensor.name].astype(other)
    refused(stage, arrays, repr(tensor.name), f"is {other}", f"must be {tensor.dtype}")


@given(stages_with_inputs(), st.data())
def test_a_wrong_rank_is_refused(
    case: tuple[Stage, dict[str, int], dict[str, np.ndarray]], data: st.DataObject
) -> None:
    stage, _, arrays = case
    tensor = data.draw(st.sampled_from(stage.inputs))
    arrays[tensor.name] = arrays[tensor.name][None]
    refused(stage, arrays, repr(tensor.name), str(arrays[tensor.name].shape), *map(str, tensor.shape))


@given(stages_with_inputs(), st.integers(0, 9).filter(lambda size: size != 3))
def test_a_wrong_fixed_size_is_refused(
    case: tuple[Stage, dict[str, int], dict[str, np.ndarray]], size: int
) -> None:
    stage, _, arrays = case
    first = stage.inputs[0]  # its last size is 3
    arrays[first.name] = np.zeros((*arrays[first.name].shape[:-1], size), first.dtype)
    refused(stage, arrays, repr(first.name), str(arrays[first.name].shape), "3)")


@given(stages_with_inputs(), st.data())
def test_a_size_out_of_bounds_is_refused(
    case: tuple[Stage, dict[str, int], dict[str, np.ndarray]], data: st.DataObject
) -> None:
    stage, sizes, _ = case
    axis = data.draw(st.sampled_from(stage.axes))
    wrong = data.draw(st.sampled_from([axis.max + 1] + [axis.min - 1] * (axis.min > 0)))
    shapes = stage.shapes({**sizes, axis.name: wrong})
    arrays = {t.name: np.zeros(shapes[t.name], t.dtype) for t in stage.inputs}
    refused(stage, arrays, f"{axis.name} is {wrong}", f"{axis.min} to {axis.max}", stage.inputs[0].name)


@given(st.integers(1, 6), st.integers(1, 6))
def test_an_inconsistent_axis_is_refused(one: int, other: int) -> None:
    inputs = (Tensor("x", "float32", ("rows", 2)), Tensor("y", "float32", (1, "rows")))
    stage = Stage("pair", "m:M", "part", (), "step", inputs, (), (Axis("rows", 1, 2, 6),))
    arrays = {"x": np.zeros((one, 2), np.float32), "y": np.zeros((1, other), np.float32)}
    if one == other:
        assert stage.bind(arrays) == {"rows": one}
    else:
        refused(stage, arrays, "'y'", f"rows is {other}", f"but {one}")


def test_an_inconsistent_axis_within_one_tensor_is_refused() -> None:
    stage = Stage(
        "square", "m:M", "part", (), "step", (Tensor("x", "float32", ("n", "n")),), (), (Axis("n", 1, 1, 9),)
    )
    refused(stage, {"x": np.zeros((2, 3), np.float32)}, "'x'", "n is 3", "2")


@given(stages_with_inputs(), st.data())
def test_a_missing_or_unknown_input_is_refused(
    case: tuple[Stage, dict[str, int], dict[str, np.ndarray]], data: st.DataObject
) -> None:
    stage, _, arrays = case
    gone = data.draw(st.sampled_from(sorted(arrays)))
    refused(stage, {n: a for n, a in arrays.items() if n != gone}, repr(gone), "missing")
    refused(stage, {**arrays, "Surplus": np.zeros(1)}, "'Surplus'", *arrays)


def test_torch_tensors_are_checked_like_arrays() -> None:
    torch = pytest.importorskip("torch")
    stage = Stage(
        "one", "m:M", "part", (), "step", (Tensor("x", "float32", ("n",)),), (), (Axis("n", 1, 1, 4),)
    )
    assert stage.bind({"x": torch.zeros(4)}) == {"n": 4}
    refused(stage, {"x": torch.zeros(4, dtype=torch.int64)}, "is int64", "must be float32")


@given(stages_of())
def test_a_stage_comes_back_from_json(stage: Stage) -> None:
    assert Stage.from_dict(json.loads(json.dumps(stage.to_dict()))) == stage


@given(stages_with_inputs())
def test_shapes_put_sizes_in_the_place_of_names(
    case: tuple[Stage, dict[str, int], dict[str, np.ndarray]],
) -> None:
    stage, sizes, arrays = case
    assert stage.shapes(sizes) == {name: array.shape for name, array in arrays.items()}
    outputs = stage.shapes(sizes, outputs=True)
    assert outputs == {f"new_{name}": array.shape for name, array in arrays.items()}


@given(st.integers(-3, 5), st.integers(-3, 5), st.integers(-3, 5))
def test_axis_bounds_are_ordered_and_not_negative(low: int, usual: int, high: int) -> None:
    if 0 <= low <= usual <= high:
        assert Axis("n", low, usual, high).max == high
    else:
        with pytest.raises(ValueError, match="axis n"):
            Axis("n", low, usual, high)


def test_axis_by_name() -> None:
    stage = Stage("one", "m:M", "part", (), "step", (), (), (Axis("a", 1, 1, 1), Axis("b", 0, 1, 2)))
    assert stage.axis("b").max == 2
    with pytest.raises(KeyError):
        stage.axis("c")
