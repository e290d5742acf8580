"""What a stage computes in, in bytes, as its runtime lays it out.

From what meter.py counts on the reference modules. The constants are measured, each on several sizes of the
published architectures: benchmarks/LOG.md. Engines are made for the largest sizes of their profile, whatever
a call has; TensorRT's figures are those of fp16.
"""

from __future__ import annotations

from collections.abc import Mapping

from nova_export.config import NovaConfig
from nova_export.export.meter import Cost
from nova_export.lean_stages import DECODER, is_piece
from nova_export.spec import Stage
from nova_export.targets import Precision, Target

Sizes = Mapping[str, int]  # by axis

UNMASKED = "spatial_encoder"  # where attention has no mask: what `to_multi_head` changes
# ONNX Runtime 1.32, over values counted
SCORES = 1.5  # its attention keeps scores, and a part of their softmax
VIDEO_DECODER, VIDEO_ENCODER = 1.35, 1.1  # windows of 3D convolutions
# TensorRT, over values counted
WORKSPACE = 1 << 23  # its figure for the smallest engine
BESIDE = 2_500_000
CONDITION = {True: (2, 1.45), False: (1, 0.5)}  # of videos, of images: workspaces, and values
TEXT, SPATIAL = 0.79, 0.65  # a GELU takes no memory beside its input
TEMPORAL = 0.585, 0.4, 1.1  # at its MLP; at its attention, with so many of a layer's keys and values
ENGINE_DECODER, ENGINE_ENCODER = 1.12, 0.92  # of a video
ENGINE_PIECE = 0.6  # of a lean decode: norm and SiLU are part of its convolution
# of a diffusion head, in vectors of its width for a token
STATISTICS = 3  # of every block, which are known before the first one runs
HEAD, LOOP = 5.3, 12.2


def activation_bytes(
    stage: Stage, cost: Cost, precision: Precision, target: Target, config: NovaConfig, sizes: Sizes
) -> int:
    """sizes: those that the cost was counted at."""
    size = 2 if precision.half in target.kernels else 4
    is_video_vae = stage.part == "vae" and config.is_video
    if target.runtime is None:
        factor = 1.0
        if is_video_vae and not is_piece(stage):  # whose convolutions are in 2D
            factor = VIDEO_DECODER if stage.name == DECODER else VIDEO_ENCODER
        in_pieces = stage.name == UNMASKED and precision.weights and target.ort_operators
        return int(size * (factor * cost.activations + (0 if in_pieces else SCORES * cost.scores)))
    if stage.name == "condition":
        workspaces, factor = CONDITION[config.is_video]
        return workspaces * WORKSPACE + int(size * factor * cost.activations)
    return max(WORKSPACE, int(size * _engine_values(stage, cost, config, sizes)) + BESIDE)


def _engine_values(stage: Stage, cost: Cost, config: NovaConfig, sizes: Sizes) -> float:
    """Values that are there at a time."""
    counted = cost.activations
    if stage.name == "temporal_encoder":
        at_mlp, at_attention, caches = TEMPORAL
        of_layer = cost.in_place / config.temporal.depth
        return max(at_mlp * counted, at_attention * counted + caches * of_layer)
    if stage.name == "diffusion_head":
        tokens = sizes["passes"] * sizes["samples"] * sizes["next"]
        steps, statistics = stage.axis("steps"), STATISTICS * config.head.depth
        if steps.min == steps.max:  # unrolled: each step has a condition of its own
            return tokens * config.head.width * (statistics + HEAD + steps.max)
        noise = steps.max * sizes["samples"] * sizes["next"] * config.token_dim
        return tokens * config.head.width * (statistics + LOOP) + noise
    if stage.part == "vae" and config.is_video:
        if is_piece(stage):
            return ENGINE_PIECE * counted
        return (ENGINE_DECODER if stage.name == DECODER else ENGINE_ENCODER) * counted
    return {"text_encoder": TEXT, "spatial_encoder": SPATIAL}.get(stage.name, 1) * counted
