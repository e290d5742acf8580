"""What the C interface tells while it works, that it stops when told to, and what it says afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.cpp.conftest import PROMPT, Call, in_cpp

OPTIONS = {"prompts": [PROMPT], "seed": 1, "num_inference_steps": 3, "num_diffusion_steps": 2}


def test_frames_come_as_soon_as_their_tile_is_made(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """Tiles of five latents: the first 17 frames after five latent frames' steps, the others at the end."""
    call = Call(
        golden_bundle("t2v"), {**OPTIONS, "max_latent_length": 7, "num_images_per_prompt": 2}, stream=True
    )
    [answer] = in_cpp(cpp / "release/tests/nova_call", [call], tmp_path)
    assert answer.told["steps"] == [[frame, 7, step, 3] for frame in range(7) for step in range(3)]
    assert [frame["index"] for frame in answer.told["frames"]] == list(range(25))
    assert [frame["after_steps"] for frame in answer.told["frames"]] == [15] * 17 + [21] * 8
    assert answer.streamed is not None and answer.frames is not None
    np.testing.assert_array_equal(answer.streamed, answer.frames)


def test_a_callback_cancels_and_the_next_call_runs(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    calls = [
        Call(golden_bundle("t2v"), {**OPTIONS, "max_latent_length": 2}, cancel_at=(1, 1)),
        Call(golden_bundle("t2v"), OPTIONS),
    ]
    cancelled, after = in_cpp(cpp / "release/tests/nova_call", calls, tmp_path)
    assert (cancelled.status, cancelled.error) == (130, "cancelled at frame 2 of 2, step 2")
    assert len(cancelled.told["steps"]) == 5
    assert after.error is None and after.frames is not None


def test_it_says_what_it_is_and_what_took_how_long(
    cpp: Path, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    [answer] = in_cpp(cpp / "release/tests/nova_call", [Call(golden_bundle("t2v"), OPTIONS)], tmp_path)
    assert answer.told["info"] == {
        "height": 64,
        "width": 96,
        "is_video": 1,
        "is_class_conditional": 0,
        "latent_frames": 4,
        "latent_shape": [4, 8, 12],
        "text_tokens": answer.told["info"]["text_tokens"],
        "guidance_scale": 5.0,
        "fps": 12.0,
        "device": "cpu",
    }
    stages = answer.told["stages"]
    assert {name: stage["calls"] for name, stage in stages.items()} == {
        "text_encoder": 1,  # the negative prompt is empty, and needs none
        "condition": 1,
        "temporal_encoder": 1,
        "spatial_encoder": 3,
        "diffusion_head": 3,
        "vae_decoder": 1,
    }
    in_stages = sum(stage["load"] + stage["run"] for stage in stages.values())
    assert 0 < in_stages <= answer.told["seconds"]
