"""A head that does a fixed number of steps a call, against one that does any number, and recorded latents."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from nova_export.bundle import Bundle
from nova_export.config import NovaConfig
from nova_export.evaluation.lockstep import Lockstep
from nova_export.export.onnx_export import export_onnx
from nova_export.export.verify import check_cases, reference_cases, sample_inputs
from nova_export.runtime.diffusion import denoise
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.runner import Held, OrtRunner, Runner
from nova_export.runtime.stage_runners import StageRunners
from nova_export.runtime.tokenizer import PromptTokenizer
from nova_export.stages import stages
from reference_model.checkpoint import load_module
from reference_model.init import init_checkpoint
from reference_model.runner import TorchRunner, torch_runners
from tests.conftest import GOLDEN, golden_calls

EXTRA = GOLDEN.parent / "golden_extra"
HEAD = "diffusion_head"
TOLERANCE = 5e-4  # of golden latents, as their README says


class Counted:
    """A runner that keeps the inputs of its calls."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.stage = runner, runner.stage
        self.calls: list[dict[str, np.ndarray]] = []

    def run(self, inputs: Mapping[str, Held]) -> Mapping[str, Held]:
        self.calls.append({name: np.array(array) for name, array in inputs.items()})
        return self.runner.run(inputs)


def head(config: NovaConfig, checkpoint: Path, steps: int | None) -> TorchRunner:
    stage = stages(config, head_steps=steps)[HEAD]
    return TorchRunner(stage, load_module(stage, config, checkpoint))


@cache
def looped(checkpoint: Path) -> tuple[NovaConfig, dict[str, TorchRunner]]:
    config = NovaConfig.from_checkpoint(checkpoint)
    return config, torch_runners(config, checkpoint)


def with_head(checkpoint: Path, steps: int) -> tuple[Pipeline, Counted]:
    """The checkpoint's stages on torch, with a head of so many steps."""
    config, runners = looped(checkpoint)
    counted = Counted(head(config, checkpoint, steps))
    every = {**runners, HEAD: counted}
    tokenizer = PromptTokenizer(checkpoint / "tokenizer" / "tokenizer.json", config.text_len)
    return Pipeline(config, every.__getitem__, tokenizer), counted  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "calls"), [(1, 6), (4, 2), (6, 1), (9, 1)])
def test_recorded_latents_in_any_number_of_steps_a_call(steps: int, calls: int) -> None:
    """Six are asked for: fewer, as many and more."""
    arguments, recorded = golden_calls("t2i")[0]
    pipeline, ran = with_head(GOLDEN / "t2i" / "checkpoint", steps)
    latents = pipeline(**arguments).latents
    assert np.abs(latents - recorded["latents"]).max() <= TOLERANCE
    assert len(ran.calls) == calls * arguments["num_inference_steps"]
    assert {len(call["step_coefficients"]) for call in ran.calls} == {steps}


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_recorded_latents_with_guidance_trunc_and_renorm(
    tmp_path_factory: pytest.TempPathFactory, steps: int
) -> None:
    """Three passes, guidance that changes from step to step, and the norm of the rest carried on."""
    told = json.loads((EXTRA / "image_guidance_trunc_renorm.json").read_text())
    checkpoint = extra_checkpoint(tmp_path_factory.getbasetemp())
    assert told["call"]["num_diffusion_steps"] == 4
    pipeline, ran = with_head(checkpoint, steps)
    latents = pipeline(**told["call"]).latents
    recorded = np.load(EXTRA / "image_guidance_trunc_renorm.npz")["latents"]
    assert np.abs(latents - recorded).max() <= TOLERANCE
    assert any(np.ptp(call["step_renorm"]) for call in ran.calls)  # it does change within a call
    assert all(np.abs(call["rest"]).max() > 0 for call in ran.calls)


@cache
def extra_checkpoint(folder: Path) -> Path:
    told = json.loads((EXTRA / "image_guidance_trunc_renorm.json").read_text())["init"]
    architecture, encoder = told["architecture"], told["text_encoder"]
    return init_checkpoint(architecture, folder / "trunc_renorm", text_encoder=encoder, seed=told["seed"])


def test_steps_that_fill_up_change_nothing() -> None:
    """Whatever the network makes of them: noise and rest come out as they went in."""
    config, checkpoint = NovaConfig.from_checkpoint(GOLDEN / "t2i" / "checkpoint"), GOLDEN / "t2i/checkpoint"
    inputs = head_inputs(config, steps=2)
    exact, filled = Counted(head(config, checkpoint, 2)), Counted(head(config, checkpoint, 7))
    wanted, made = denoise(exact, inputs), denoise(filled, inputs)
    assert wanted.keys() == {"denoised", "next_rest"}
    for name, array in wanted.items():
        np.testing.assert_allclose(made[name], array, rtol=0, atol=1e-6)
        assert (
            np.abs(np.asarray(array) - inputs[{"denoised": "noise", "next_rest": "rest"}[name]]).max() > 0.1
        )
    [call] = filled.calls
    assert call["step_coefficients"][2:].tolist() == [[1, 0, 0]] * 5
    assert not call["step_noise"][2:].any() and not call["step_rest_noise"][2:].any()


def head_inputs(config: NovaConfig, steps: int) -> dict[str, Any]:
    sizes = {"passes": 2, "samples": 2, "next": 3, "steps": steps, "rest": 4}
    return sample_inputs(stages(config)[HEAD], config, sizes, seed=0)


def test_the_exported_head_in_recorded_latents(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """As a graph: no loop in it, each weight once, and what the published pipeline recorded."""
    bundle, graph = Bundle.open(golden_bundle("t2i")), tmp_path / "head.onnx"
    checkpoint, steps = GOLDEN / "t2i" / "checkpoint", 4
    spec = stages(bundle.config, head_steps=steps)[HEAD]
    module = load_module(spec, bundle.config, checkpoint)
    export_onnx(spec, module, graph)
    kinds = Counter(node.op_type for node in onnx.load(graph, load_external_data=False).graph.node)
    products = 1 + 3 * bundle.config.head.depth + 2  # patches, blocks (3 each), final norm and output
    assert kinds["Scan"] == 0 and kinds["Gemm"] + kinds["MatMul"] >= steps * products
    weights = 4 * sum(each.numel() for each in module.parameters())
    assert graph.with_name("head.onnx.data").stat().st_size < 1.05 * weights + 20_000
    with OrtRunner(spec, graph) as runner:
        check_cases(spec, runner, reference_cases(spec, bundle.config, module))
        runners = StageRunners(bundle, "cpu")

        def stage(name: str) -> Runner:
            return runner if name == HEAD else runners(name)

        arguments, recorded = golden_calls("t2i")[0]
        latents = Pipeline.over(bundle, stage)(**arguments).latents
        assert np.abs(latents - recorded["latents"]).max() <= TOLERANCE
        runners.close()


@pytest.mark.parametrize("unrolled", ["reference", "tested"])
def test_both_kinds_of_head_compare(unrolled: str) -> None:
    """A bundle for a CPU with one for a GPU: the tested head does the steps of the reference's call."""
    config, checkpoint = NovaConfig.from_checkpoint(GOLDEN / "t2i" / "checkpoint"), GOLDEN / "t2i/checkpoint"
    sides = [head(config, checkpoint, 4), head(config, checkpoint, None)]
    reference, tested = sides if unrolled == "reference" else sides[::-1]
    both = Lockstep(lambda name: reference, lambda name: tested)
    inputs = head_inputs(config, steps=6)
    alone = denoise(head(config, checkpoint, None), inputs)["denoised"]
    np.testing.assert_allclose(denoise(both(HEAD), inputs)["denoised"], alone, rtol=0, atol=1e-5)
    assert both.tensors.keys() == {(HEAD, "denoised")}
    assert both.tensors[HEAD, "denoised"].snr > 100
