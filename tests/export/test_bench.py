"""Bench: its numbers exist and mean what they say. Good ones are for benchmarks/, on a calm machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nova_export.bundle import Bundle
from nova_export.errors import UsageError
from nova_export.export import bench as bench_module
from nova_export.export.bench import Options, bench, format_table, interleave
from nova_export.export.contenders import Subject, contenders, stage_sizes
from nova_export.export.peak_memory import measure
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "t2v" / "checkpoint"
QUICK = Options(repeats=1, threads=1, memory=False, arguments={"num_diffusion_steps": 2})
MiB = 1 << 20


@pytest.fixture(scope="module")
def bundle(golden_bundle: Callable[[str], Path]) -> Path:
    return golden_bundle("t2v")


def replaced(**options: Any) -> Options:
    return Options(**{**QUICK.__dict__, **options})


def test_every_stage_and_end_to_end_side_by_side(bundle: Path) -> None:
    said: list[tuple[str, str]] = []
    result = bench(bundle, CHECKPOINT, QUICK, lambda stage, action: said.append((stage, action)))
    assert [stage["stage"] for stage in result["stages"]] == list(Bundle.open(bundle).stages)
    forms = {stage["stage"]: list(stage["results"]) for stage in result["stages"]}
    assert forms["vae_decoder"] == ["onnx", "module"]
    assert forms["diffusion_head"] == forms["spatial_encoder"] == ["onnx", "module", "published"]
    for measured in [*result["stages"], result["end_to_end"]]:
        assert all(one["median_s"] >= one["min_s"] > 0 for one in measured["results"].values())
    assert ("diffusion_head", "timing") in said
    assert json.loads(json.dumps(result))["versions"]["onnxruntime"]
    table = format_table(result)
    assert "| end to end" in table and "published" in table and "ms" in table


def test_an_ar_step_is_two_calls_where_eager_has_hundreds_of_operators(bundle: Path) -> None:
    result = bench(bundle, CHECKPOINT, replaced(stages=()))["end_to_end"]["results"]
    assert result["onnx"]["calls_per_ar_step"] == 2
    assert result["published"]["calls_per_ar_step"] > 200


def test_without_a_checkpoint_only_the_bundle_is_measured(bundle: Path) -> None:
    result = bench(bundle, options=replaced(stages=("condition",)))
    assert list(result["stages"][0]["results"]) == ["onnx"]
    assert list(result["end_to_end"]["results"]) == ["onnx"]


def test_sizes_are_those_asked_for(bundle: Path) -> None:
    sizes = {"predicted": 7, "next": 5, "steps": 3, "rows": 4}
    options = replaced(stages=("spatial_encoder", "diffusion_head"), sizes=sizes, end_to_end=False)
    result = bench(bundle, CHECKPOINT, options)
    assert result["stages"][0]["sizes"] == {"rows": 4, "predicted": 7, "next": 5}
    assert result["stages"][1]["sizes"] == {"passes": 2, "samples": 2, "next": 5, "steps": 3, "rest": 1}
    assert "end_to_end" not in result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ("unet",)}, "'unet' is not in the bundle"),
        ({"stages": ("diffusion_head",), "sizes": {"next": 0}}, "next is 0; it must be 1 to"),
    ],
)
def test_impossible_wishes_are_refused(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(bundle, CHECKPOINT, replaced(**options))


def test_one_row_is_one_pass(bundle: Path) -> None:
    stage = Bundle.open(bundle).stages["diffusion_head"].spec
    sizes = stage_sizes(stage, {"rows": 1})
    assert (sizes["passes"], sizes["samples"]) == (1, 1)


@pytest.mark.parametrize("name", ["temporal_encoder", "spatial_encoder"])
def test_published_form_computes_what_the_module_does(bundle: Path, name: str) -> None:
    """On the same inputs: so that their times compare the same thing."""
    subject = Subject.of(Bundle.open(bundle), name, {}, CHECKPOINT)
    inputs = subject.inputs()
    if name == "spatial_encoder":  # published, all guidance passes share order and tokens
        for key in ("predicted_ids", "next_ids", "tokens"):
            inputs[key][1] = inputs[key][0]
    else:
        inputs["is_blank"][:] = False
        inputs["latents"][1] = inputs["latents"][0]
    with contenders(["published", "module"], subject, inputs) as runs:
        published: Any = runs["published"]()
        output: Any = runs["module"]()
    module = output[0] if isinstance(output, tuple) else output
    if name == "spatial_encoder":
        ids = torch.from_numpy(inputs["next_ids"])[..., None]
        published = published.gather(1, ids.expand(-1, -1, published.shape[-1]))
    assert np.abs(published.numpy() - module.numpy()).max() < 1e-4


def test_compile_failure_is_a_note(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: object) -> Callable[..., None]:
        def call(**_: object) -> None:
            raise RuntimeError("no C++ compiler\ndetails")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    options = replaced(stages=("condition",), compile=True, end_to_end=False)
    result = bench(bundle, CHECKPOINT, options)
    assert result["stages"][0]["notes"] == ["torch.compile: RuntimeError: no C++ compiler"]
    assert "condition: torch.compile: RuntimeError: no C++ compiler" in format_table(result)


def test_contenders_take_turns_until_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(bench_module.time, "monotonic", lambda: now[0])

    def run(name: str) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            now[0] += 4

        return call

    seconds = interleave({"a": run("a"), "b": run("b")}, Options(repeats=9, budget=15))
    assert order == ["a", "b", "a", "b"]
    assert len(seconds["a"]) == len(seconds["b"]) == 2


def test_memory_is_of_the_measured_process_alone(bundle: Path) -> None:
    ballast = np.ones(200 * MiB, np.uint8)  # ours: a child must not inherit it
    sizes = Subject.of(Bundle.open(bundle), "condition", {}).sizes
    job = {"stage": "condition", "sizes": sizes, "kind": "onnx", "bundle": str(bundle)}
    size = measure({**job, "checkpoint": None, "threads": 1})
    assert size is not None and 0 < size < 150 * MiB
    assert ballast.nbytes == 200 * MiB


def test_memory_that_cannot_be_measured_is_none(bundle: Path) -> None:
    assert measure({"arguments": {"prompt": 3}, "kind": "onnx", "bundle": str(bundle), "threads": 1}) is None
