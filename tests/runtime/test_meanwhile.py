"""Frames decoded by a thread of their own, while the next ones are generated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nova_export.errors import Cancelled, StageError
from nova_export.runtime.generate import Step
from nova_export.runtime.noise import TorchGenerator
from nova_export.runtime.pipeline import DECODER_THREAD, Pipeline
from nova_export.runtime.request import Request
from nova_export.runtime.tokens import set_sizes
from tests.runtime.test_pipeline import SHORT, VIDEO, Fixture, Runner, Tokenizer

PATIENCE = 20.0  # seconds
FIRST_TILE = 5  # latents


class Meanwhile(Fixture):
    """before: what is done before a stage runs, by its name."""

    def __init__(self, **before: Callable[[], object]) -> None:
        super().__init__()

        class Hooked(Runner):
            def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
                before.get(self.stage.name, lambda: None)()
                return super().run(inputs)

        runners = {name: Hooked(each.stage, self.record) for name, each in self.runners.items()}
        self.pipe = Pipeline(VIDEO, runners.__getitem__, Tokenizer(), decodes_meanwhile=True)


def decoders() -> int:
    """Their threads, once they had time to end."""
    until = time.monotonic() + PATIENCE
    while True:
        count = sum(each.name.startswith(DECODER_THREAD) for each in threading.enumerate())
        if not count or time.monotonic() > until:
            return count
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 5, 6, 9, 10])
def test_it_is_the_same_video(count: int) -> None:
    prompts = ["a", "b"]
    expected = Fixture().pipe(prompts, max_latent_length=count, **SHORT)
    made = Meanwhile().pipe(prompts, max_latent_length=count, **SHORT)
    np.testing.assert_array_equal(made.frames, expected.frames)
    np.testing.assert_array_equal(made.latents, expected.latents)
    streamed = list(Meanwhile().pipe.stream(prompts, max_latent_length=count, **SHORT))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), expected.frames)
    assert decoders() == 0


def test_the_next_frame_is_generated_meanwhile() -> None:
    """The first tile is not done before the latent after it is begun."""
    begun, made = threading.Event(), 0

    def temporal_encoder() -> None:
        nonlocal made
        made += 1
        if made == FIRST_TILE + 1:
            begun.set()

    def vae_decoder() -> None:
        assert begun.wait(PATIENCE)

    pipe = Meanwhile(temporal_encoder=temporal_encoder, vae_decoder=vae_decoder).pipe
    assert pipe("a", max_latent_length=9, **SHORT).frames.shape[1] == 33


def test_frames_are_given_between_ar_steps() -> None:
    """Not first when another frame is whole."""
    begun, decoded = threading.Event(), threading.Event()

    def vae_decoder() -> None:
        assert begun.wait(PATIENCE)

    def diffusion_head() -> None:
        if len(made.record.of("temporal_encoder")) > FIRST_TILE:
            begun.set()
            assert decoded.wait(PATIENCE)
            time.sleep(0.1)  # until the thread has handed over what it made

    made = Meanwhile(diffusion_head=diffusion_head, vae_decoder=vae_decoder)
    decode = made.pipe._decode

    def decode_and_tell(*arguments: Any) -> Any:
        try:
            return decode(*arguments)
        finally:
            decoded.set()

    made.pipe._decode = decode_and_tell
    next(made.pipe.stream("a", max_latent_length=9, **{**SHORT, "num_inference_steps": 20}))
    steps = len(set_sizes(VIDEO.num_tokens, 20))
    assert FIRST_TILE * steps < made.count("diffusion_head") < (FIRST_TILE + 1) * steps


def test_what_fails_there_is_raised_here() -> None:
    def vae_decoder() -> None:
        raise StageError("no memory for it")

    for run in (lambda pipe: pipe("a", max_latent_length=9, **SHORT),
                lambda pipe: list(pipe.stream("a", max_latent_length=9, **SHORT))):  # fmt: skip
        with pytest.raises(StageError, match="no memory for it"):
            run(Meanwhile(vae_decoder=vae_decoder).pipe)
    assert decoders() == 0


@pytest.mark.parametrize("how", ["cancelled", "left"])
def test_who_leaves_early_leaves_no_thread(how: str) -> None:
    last = 7 if how == "cancelled" else 9
    frames = Meanwhile().pipe.stream(
        "a", max_latent_length=9, callback=lambda step: step.frame < last, **SHORT
    )
    if how == "left":
        next(frames)
        frames.close()
    else:
        with pytest.raises(Cancelled):
            list(frames)
    assert decoders() == 0


def test_what_was_not_begun_is_dropped() -> None:
    """Of three requests' tiles, where all are cancelled while the first is decoded."""
    cancelled = threading.Event()

    def vae_decoder() -> None:
        assert cancelled.wait(PATIENCE)
        time.sleep(0.5)  # until it is known

    def callback(step: Step) -> bool:
        if step.frame == FIRST_TILE + 1:
            cancelled.set()
        return not cancelled.is_set()

    made = Meanwhile(vae_decoder=vae_decoder)
    prepared = [
        made.pipe.prepare(Request(prompt=prompt, max_latent_length=9, **SHORT), TorchGenerator(0))
        for prompt in "abc"
    ]
    with pytest.raises(Cancelled):
        list(made.pipe.stream_jointly(prepared, callback))
    assert decoders() == 0 and made.count("vae_decoder") == 1
