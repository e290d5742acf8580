"""Is an exported stage what its reference module computes? Random inputs, several sizes, empty ones too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from nova_export.config import FREQUENCIES, NovaConfig
from nova_export.errors import ExportError
from nova_export.runtime.runner import Array, OrtRunner, Runner
from nova_export.runtime.schedule import make_schedule
from nova_export.spec import Stage

# Of the output's largest value, and of 1: fp32 rounding is a hundredth of it, a bug a thousandfold.
TOLERANCE = 5e-4
HALF_TOLERANCE = 2e-3  # where an output is in float16: another rounding of its last bit

Case = tuple[dict[str, int], dict[str, Array], dict[str, Array]]  # sizes, inputs, reference outputs


class PlainRunner(OrtRunner):
    """A graph that is made for something else than this CPU, as it stands.

    Optimized, half precision would become float32 before it runs: all weights twice as large, and at once.
    """

    optimizes = False


def verify_sizes(stage: Stage, config: NovaConfig) -> Iterator[dict[str, int]]:
    """Three sizes of every axis, small and unlike those that were traced; the first is the least of each."""
    tokens, before, frame = config.num_tokens, config.condition_tokens, config.frame_tokens
    stride = config.image_size[0] // config.latent_size[0]
    wanted = {
        "rows": (1, 2, 3),
        "prompts": (1, 3, 1),
        "length": (1, 5, config.text_len),
        "text": (before, 0, before),
        "capacity": (before + frame, before + 2 * frame, before + frame),
        "predicted": (0, tokens // 3, tokens - 2),
        "next": (1, min(5, tokens - tokens // 3), 2),
        "passes": (1, 3, 2),
        "samples": (1, 2, 3),
        "steps": (1, 4, 9),
        "rest": (1, 5, 10),
        "latent_frames": (1, 2, 3),
        "latent_height": (4, 6, 4),
        "latent_width": (6, 4, 8),
        "height": (4 * stride, 6 * stride, 4 * stride),
        "width": (6 * stride, 4 * stride, 8 * stride),
        "frame_height": (4, 6, 4),
        "frame_width": (6, 4, 8),
    }
    for case in range(3):
        yield {axis.name: min(max(wanted[axis.name][case], axis.min), axis.max) for axis in stage.axes}


def sample_inputs(stage: Stage, config: NovaConfig, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    """Inputs as in a run: normal floats, distinct token ids, a schedule's tables, a filled cache."""
    rng = np.random.default_rng(seed)
    shapes = stage.shapes(sizes)
    inputs = {t.name: rng.standard_normal(shapes[t.name], np.float32).astype(t.dtype) for t in stage.inputs}
    special: dict[str, Any] = {}
    if "predicted_ids" in inputs:
        order = np.stack([rng.permutation(config.num_tokens) for _ in range(sizes["rows"])])
        known = sizes["predicted"]
        special = {"predicted_ids": order[:, :known], "next_ids": order[:, known : known + sizes["next"]]}
    elif "token_ids" in inputs:
        assert config.text_encoder is not None
        special = {"token_ids": rng.integers(0, config.text_encoder["vocab_size"], shapes["token_ids"])}
    elif "text_lengths" in inputs:
        special = {"text_lengths": rng.integers(0, config.text_len + 1, shapes["text_lengths"])}
        if "motion" in inputs:
            special["motion"] = rng.uniform(1, 20, shapes["motion"])
    elif "variance" in inputs:
        special = {"variance": rng.uniform(0.2, 4, shapes["variance"])}
    elif "class_ids" in inputs:
        special = {"class_ids": rng.integers(0, 1001, shapes["class_ids"])}
    elif "cache_length" in inputs:
        filled = 0 if sizes["text"] else config.condition_tokens + config.frame_tokens
        special = {
            "cache_length": [filled],
            "frame_position": [filled and 1.5],
            "is_blank": np.arange(sizes["rows"]) % 2 == 1,
        }
    elif "step_frequencies" in inputs:
        schedule = make_schedule(config.scheduler, sizes["steps"])
        special = {
            "step_coefficients": schedule.coefficients,
            "step_frequencies": schedule.frequencies().reshape(-1, FREQUENCIES),
            "step_renorm": np.full(shapes["step_renorm"], 0.7),
        }
    for name, value in special.items():
        inputs[name] = np.ascontiguousarray(value, dtype=inputs[name].dtype)
    return inputs


def reference_cases(stage: Stage, config: NovaConfig, module: nn.Module, seed: int = 0) -> list[Case]:
    """Inputs of several sizes and what the module makes of them; the module can be freed afterwards."""
    cases = []
    for case, sizes in enumerate(verify_sizes(stage, config)):
        inputs = sample_inputs(stage, config, sizes, seed + case)
        cases.append((sizes, inputs, run_module(stage, module, inputs)))
    return cases


def run_module(stage: Stage, module: nn.Module, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """A reference module on numpy arrays, outputs named as in the spec."""
    with torch.no_grad():
        outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {t.name: out.numpy() for t, out in zip(stage.outputs, outputs, strict=True)}


def check_kind(stage: Stage, name: str, actual: Array, reference: Array) -> None:
    """Whether an output has the reference's shape and type. Raises ExportError."""
    kinds = [f"{array.dtype} {array.shape}" for array in (actual, reference)]
    if kinds[0] != kinds[1]:
        raise ExportError(f"stage {stage.name}: {name} is {kinds[0]}, the reference {kinds[1]}")


def check_cases(stage: Stage, runner: Runner, cases: list[Case]) -> dict[str, Any]:
    """Run every case. Returns the largest difference and where; raises ExportError above the tolerance."""
    worst: dict[str, Any] = {"max_abs_diff": 0.0, "of": 0.0, "tensor": "", "sizes": {}}
    for sizes, inputs, expected in cases:
        outputs = runner.run(inputs)
        for name, reference in expected.items():
            actual = np.asarray(outputs[name])
            check_kind(stage, name, actual, reference)
            difference = float(np.abs(actual - reference).max(initial=0))
            scale = float(np.abs(reference).max(initial=0))
            tolerance = HALF_TOLERANCE if reference.dtype == np.float16 else TOLERANCE
            if not difference <= tolerance * max(1.0, scale):
                raise ExportError(
                    f"stage {stage.name}: {name} differs from the reference by {difference:.3g} of "
                    f"{scale:.3g} at {sizes}; the exported graph is wrong. Please report it with the "
                    "versions of torch and onnxruntime"
                )
            if difference >= worst["max_abs_diff"]:
                worst = {"max_abs_diff": difference, "of": scale, "tensor": name, "sizes": sizes}
    return {**worst, "cases": len(cases)}
