"""A real server: answers, cancelling, what is refused, and a process that is killed.

A small request takes a tenth of a second: 2 AR steps of 2 diffusion steps. A long one takes half a minute.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.triton.client import Answer, stream
from engines.triton.health import check
from engines.triton.repository import Serving, package
from nova_export import Pipeline
from nova_export.errors import Cancelled, ServerError
from tests.command_line import nova_export
from tests.triton.conftest import BUNDLE
from tests.triton.server import PATIENCE, RUNNING, Server, triton, wait_until

pytestmark = pytest.mark.triton

SMALL: dict[str, Any] = {"num_inference_steps": 2, "num_diffusion_steps": 2}
STEPS = 13 * 16  # AR steps of the longest video, each a call of the head
LONG: dict[str, Any] = {"prompt": "a red circle", "num_diffusion_steps": 1000, "max_latent_length": 13}
PENDING = 'nv_inference_pending_request_count{model="nova",version="1"}'


def answers(server: Server, **arguments: Any) -> list[Answer]:
    return list(stream(server.url, timeout=PATIENCE, **arguments))


def frames_of(found: list[Answer]) -> np.ndarray:
    """(B, F, H, W, 3)"""
    return np.stack([answer.frame for answer in found if answer.frame is not None], axis=1)


# Answers


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "a red circle moving right", "seed": 1, "max_latent_length": 3},
        {"prompt": "a blue square", "seed": -5, "num_images_per_prompt": 2, **SMALL},
        {
            "prompt": "x", "negative_prompt": "a cross", "seed": 2, "guidance_scale": 3.0,
            "min_guidance_scale": 2.0, "guidance_trunc": 200.0, "guidance_renorm": 0.7,
            "image_guidance_scale": 1.5, "motion_flow": 9.0, "max_latent_length": 2, **SMALL,
        },
    ],
    ids=["defaults", "samples", "all guidance"],
)  # fmt: skip
def test_frames_are_those_of_python(server: Server, pipe: Pipeline, arguments: dict[str, Any]) -> None:
    found = answers(server, **arguments)
    np.testing.assert_array_equal(frames_of(found), pipe(**arguments).frames)
    assert found[0].seed == arguments["seed"]


def test_image_to_video(server: Server, pipe: Pipeline) -> None:
    """An image of another size is fitted, and the answer says so."""
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    arguments = {"prompt": "x", "image": image, "seed": 3, "max_latent_length": 2, **SMALL}
    found = answers(server, **arguments)
    with pytest.warns(UserWarning, match="resized to 64x64") as warned:
        expected = pipe(**arguments).frames
    np.testing.assert_array_equal(frames_of(found), expected)
    assert found[0].notice == str(warned[0].message)


def test_frames_come_in_order_and_tile_by_tile(server: Server) -> None:
    """Progress grows, and says of the first tile that most is still to be made."""
    arguments = {"prompt": "x", "seed": 1, "max_latent_length": 13, "num_inference_steps": 16}
    found = answers(server, report_progress=True, **arguments)
    numbers = [answer.frame_index for answer in found if answer.frame is not None]
    progress = [answer.progress for answer in found if answer.progress is not None]
    assert numbers == list(range(49)) and progress == sorted(progress) and len(progress) > 3
    first = next(index for index, answer in enumerate(found) if answer.frame is not None)
    assert any(answer.progress for answer in found[first:]), "nothing was made after the first tile"


def test_a_seed_that_was_drawn_is_told(server: Server) -> None:
    found = answers(server, prompt="x", **SMALL)
    again = answers(server, prompt="x", seed=found[0].seed, **SMALL)
    np.testing.assert_array_equal(frames_of(found), frames_of(again))


def test_32_at_once_get_what_each_would_alone(server: Server, pipe: Pipeline) -> None:
    """Of two forms, so that they do not all go together; they do share loops."""
    before = server.settled_metrics()
    asked = [
        {"prompt": f"a {index} x", "seed": index, **SMALL, "num_diffusion_steps": 2 + index % 2}
        for index in range(32)
    ]
    with ThreadPoolExecutor(32) as clients:
        found = list(clients.map(lambda arguments: frames_of(answers(server, **arguments)), asked))
    for arguments, frames in zip(asked, found, strict=True):
        np.testing.assert_array_equal(frames, pipe(**arguments).frames)
    done = 'nova_requests{model="nova",result="done"}'
    calls = 'nova_stage_calls{model="nova",stage="diffusion_head"}'
    after = server.settled_metrics()
    assert after[done] - before.get(done, 0) == 32
    assert 0 < after[calls] - before.get(calls, 0) < 32 * 2, "no two shared a loop"
    assert after['nova_stage_seconds{model="nova",stage="vae_decoder"}'] > 0


# Cancelling, waiting


def test_cancelling_frees_the_slot(server: Server) -> None:
    """The only loop is taken by a long video; it ends when nobody reads it any more."""
    cancelled = 'nova_requests{model="nova",result="cancelled"}'
    calls = 'nova_stage_calls{model="nova",stage="diffusion_head"}'
    before = server.settled_metrics()
    running = stream(server.url, report_progress=True, timeout=PATIENCE, **LONG)
    next(running)
    running.close()
    answers(server, prompt="x", **SMALL)
    after = server.settled_metrics()
    assert after[cancelled] - before.get(cancelled, 0) == 1
    assert after[calls] - before.get(calls, 0) < STEPS / 2, "the loop went on"


def test_a_full_queue_refuses(server: Server) -> None:
    """A loop or two of 8 begin, 32 wait, the others are told at once; then all are cancelled."""
    stop, refused = threading.Event(), []

    def one(index: int) -> None:
        try:
            list(stream(server.url, timeout=PATIENCE, is_cancelled=stop.is_set, seed=index, **LONG))
        except ServerError as error:
            refused.append(str(error))
        except Cancelled:
            pass

    with ThreadPoolExecutor(64) as clients:
        running = [clients.submit(one, index) for index in range(64)]
        wait_until(lambda: len(refused) >= 64 - 32 - 2 * 8)
        stop.set()
        for each in running:
            each.result()
    assert all("Exceeds maximum queue size" in message for message in refused)
    wait_until(lambda: server.metrics()[PENDING] == 0)
    assert not check(server.url, timeout=PATIENCE).recovered


def test_a_request_that_waits_too_long_is_refused(server: Server) -> None:
    """A fifth of a second of its own choice, while the only loop is taken."""
    running = stream(server.url, report_progress=True, timeout=PATIENCE, **LONG)
    next(running)
    inputs = [tensor("prompt", np.array([["x"]], np.object_), "BYTES")]
    assert "timeout expired" in error_of(server, inputs, timeout=200_000)
    running.close()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"max_latent_length": 14}, "max_latent_length is 14; this server makes at most 13"),
        ({"num_images_per_prompt": 9}, "9 samples in one request; this server makes at most 8"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"negative_prompt": "y", "guidance_scale": 1.0}, "negative_prompt has no effect"),
        ({"prompt": "x" * 65_537}, "input 'prompt' has 65537 bytes; the most is 65536"),
        (
            {"image": np.zeros((4, 4, 3), np.uint8), "image_guidance_scale": -1.0},
            "image_guidance_scale is -1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_says_why(server: Server, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError) as caught:
        answers(server, **{"prompt": "x", **SMALL, **arguments})
    assert message in str(caught.value) and "internal error" not in str(caught.value)


def test_a_prompt_that_is_too_long_is_cut_with_a_notice(server: Server, pipe: Pipeline) -> None:
    arguments = {"prompt": "a red circle " * 100, "seed": 1, **SMALL}
    found = answers(server, **arguments)
    assert found[0].notice and "cut after" in found[0].notice
    with pytest.warns(UserWarning, match="cut after"):
        np.testing.assert_array_equal(frames_of(found), pipe(**arguments).frames)


def tensor(name: str, array: np.ndarray, kind: str) -> Any:
    import tritonclient.grpc as grpc

    made = grpc.InferInput(name, array.shape, kind)
    made.set_data_from_numpy(array)
    return made


def error_of(server: Server, inputs: list[Any], **options: Any) -> str:
    """What the server says to tensors as they are; it must be an error."""
    import tritonclient.grpc as grpc

    said: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(server.url) as client:
        client.start_stream(lambda result, error: said.put(error))
        client.async_stream_infer("nova", inputs, **options)
        error = said.get(timeout=PATIENCE)
    assert error is not None, inputs
    return str(error.message())


def test_malformed_tensors(server: Server) -> None:
    """Wrong in type, shape, rows, bytes: each is told; a good request beside them is served."""
    text = np.array([["x"]], np.object_)
    prompt = tensor("prompt", text, "BYTES")
    bad = [
        [],
        [tensor("seed", np.zeros((1, 1), np.int64), "INT64")],
        [tensor("prompt", np.zeros((1, 1), np.float32), "FP32")],
        [tensor("prompt", np.array([["x", "y"]], np.object_), "BYTES")],
        [tensor("prompt", np.array([[b"\xff\xfe"]], np.object_), "BYTES")],
        [prompt, tensor("seed", np.zeros((2, 1), np.int64), "INT64")],
        [prompt, tensor("image", np.zeros((1, 0, 5, 3), np.uint8), "UINT8")],
        [prompt, tensor("image", np.zeros((1, 5, 5, 4), np.uint8), "UINT8")],
        [prompt, tensor("unknown", np.zeros((1, 1), np.int64), "INT64")],
        [
            tensor("prompt", np.array([["x"], ["y"]], np.object_), "BYTES"),
            tensor("seed", np.array([[1], [2]], np.int64), "INT64"),
        ],
    ]
    good = threading.Thread(target=answers, args=(server,), kwargs={"prompt": "x", "seed": 1, **SMALL})
    good.start()
    for inputs in bad:
        message = error_of(server, inputs)
        assert message and "internal error" not in message
    good.join()
    assert not check(server.url, timeout=PATIENCE).recovered


# Health


def test_health_by_the_command_line(server: Server) -> None:
    result = nova_export("triton", "health", server.url, "--json", "--timeout", str(PATIENCE))
    assert result.code == 0 and '"recovered": false' in result.out, result.err


def test_health_of_a_server_that_is_not_there() -> None:
    result = nova_export("triton", "health", "127.0.0.1:1", "--timeout", "2")
    assert result.code == 12 and result.err.startswith("error: 127.0.0.1:1: "), result.err


@pytest.fixture
def own_server(repository: Path, tmp_path: Path) -> Iterator[Server]:
    """One to break."""
    with triton(repository, tmp_path / "server.log") as running:
        yield running


def test_a_killed_process_and_recovery(own_server: Server) -> None:
    """Requests at work and waiting end within seconds; the server says that it is ready; --recover helps."""
    errors: list[float] = []

    def one(index: int) -> None:
        with pytest.raises(ServerError, match="not healthy"):
            answers(own_server, **{**LONG, "seed": index})
        errors.append(time.monotonic())

    with ThreadPoolExecutor(12) as clients:
        running = [clients.submit(one, index) for index in range(12)]
        wait_until(lambda: own_server.metrics().get(RUNNING, 0) > 0)
        os.kill(own_server.stubs()[0], signal.SIGKILL)
        killed = time.monotonic()
        for each in running:
            each.result()
    assert max(errors) - killed < PATIENCE / 2
    assert own_server.is_ready()
    assert nova_export("triton", "health", own_server.url).code == 12
    result = nova_export("triton", "health", own_server.url, "--recover", "--timeout", str(PATIENCE))
    assert result.code == 0 and "loaded again" in result.out, result.err
    assert len(frames_of(answers(own_server, prompt="x", **SMALL))) == 1


# Loading, and stages as models


def test_a_model_that_cannot_be_loaded_says_why(repository: Path, tmp_path: Path) -> None:
    """A file of its bundle was changed: the server's own message names it."""
    import tritonclient.grpc as grpc

    broken = tmp_path / "repository"
    shutil.copytree(repository, broken)
    weights = broken / "nova" / "1" / "bundle" / "vae_decoder.onnx.data"
    was = weights.read_bytes()
    weights.write_bytes(bytes([was[0] ^ 1]) + was[1:])
    with triton(broken, tmp_path / "server.log", models=()) as running:
        with (
            grpc.InferenceServerClient(running.url) as client,
            pytest.raises(grpc.InferenceServerException) as caught,
        ):
            client.load_model("nova")
        assert "vae_decoder.onnx.data: was changed after it was built" in str(caught.value.message())


def test_stages_as_models_give_the_same_frames(pipe: Pipeline, tmp_path: Path) -> None:
    path = package(BUNDLE, tmp_path / "repository", Serving(stages="models", threads=1))
    arguments = {"prompt": "a red circle", "seed": 1, "max_latent_length": 3, **SMALL}
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with triton(path, tmp_path / "server.log") as running:
        for given in (arguments, {**arguments, "image": image}):
            np.testing.assert_array_equal(frames_of(answers(running, **given)), pipe(**given).frames)
        assert running.metrics()['nv_inference_exec_count{model="nova_spatial_encoder",version="1"}'] > 0
