"""A client of the `nova` model: frames as the server sends them, over gRPC. Needs the `triton` extra.

python -m engines.triton.client "a red circle moving right" --url 127.0.0.1:8001 --seed 1 -o out.gif

for answer in stream("127.0.0.1:8001", prompt="a red circle moving right", max_latent_length=3, seed=1):
    if answer.frame is not None:
        show(answer.frame[0])
"""

from __future__ import annotations

import argparse
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.triton.tensors import DATA_TYPES, TEXT, inputs
from nova_export.errors import Cancelled, DependencyError, ServerError, UsageError
from nova_export.spec import Tensor

TRITON_TYPES = {TEXT: "BYTES"} | {
    dtype: name.removeprefix("TYPE_") for dtype, name in DATA_TYPES.items() if dtype != TEXT
}


@dataclass(frozen=True)
class Answer:
    """What the server said once. frame: uint8 (samples, H, W, 3), or None where it only tells progress.

    seed and notice (of a prompt that was cut, say) come with the first frame.
    """

    frame: NDArray[np.uint8] | None = None
    frame_index: int | None = None
    progress: float | None = None
    seed: int | None = None
    notice: str | None = None


def stream(
    url: str,
    *,
    model: str = "nova",
    timeout: float | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
    **arguments: Any,
) -> Iterator[Answer]:
    """Answers to one request; arguments are those of `nova_export.Request`, and `report_progress`.

    Stop reading, and the server stops. timeout: seconds to wait for each answer. is_cancelled: asked while
    waiting. Raises ServerError with what the server says, or where it says nothing in time.
    """
    check_address(url)
    grpc = grpc_module()
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc.InferenceServerClient(url) as client:
        ended = False
        try:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(model, _tensors(grpc, arguments), enable_empty_final_response=True)
            while not ended:
                result, error = _next(answers, url, timeout, is_cancelled)
                if error is not None:
                    raise ServerError(f"{url}: {error.message()}")
                ended = bool(result.get_response().parameters["triton_final_response"].bool_param)
                if result.get_response().outputs:
                    yield _answer(result)
        except grpc.InferenceServerException as error:
            raise ServerError(f"{url}: {error.message()}") from error
        finally:
            client.stop_stream(cancel_requests=not ended)


def check_address(url: str) -> None:
    """Raises UsageError for what is no HOST:PORT of gRPC."""
    if "/" in url or not url.rpartition(":")[2].isdecimal():
        raise UsageError(f"{url}: must be HOST:PORT of the server's gRPC, like 127.0.0.1:8001")


def _next(
    answers: queue.Queue[tuple[Any, Any]],
    url: str,
    timeout: float | None,
    is_cancelled: Callable[[], bool],
) -> tuple[Any, Any]:
    started = time.monotonic()
    while True:
        try:
            return answers.get(timeout=0.05)
        except queue.Empty:
            if is_cancelled():
                raise Cancelled("cancelled") from None
            if timeout is not None and time.monotonic() - started > timeout:
                raise ServerError(f"{url}: no answer within {timeout:g} s; is it still loading?") from None


def _tensors(grpc: Any, arguments: dict[str, Any]) -> list[Any]:
    """One row of each, but those that are None."""
    made = []
    class_conditional = isinstance(arguments.get("prompt"), int)
    known = {tensor.name: tensor for tensor in inputs(class_conditional)}
    for name, value in arguments.items():
        if name not in known:
            raise TypeError(f"there is no argument {name!r}; there are {', '.join(known)}")
        if value is not None:
            array = _array(known[name], value)
            tensor = grpc.InferInput(name, array.shape, TRITON_TYPES[known[name].dtype])
            tensor.set_data_from_numpy(array)
            made.append(tensor)
    return made


def _array(tensor: Tensor, value: Any) -> NDArray[Any]:
    if tensor.name == "image":
        return np.asarray(value, np.uint8)[None]
    if tensor.dtype == TEXT:
        return np.array([[value.encode()]], np.object_)
    return np.array([[value]], tensor.dtype)


def _answer(result: Any) -> Answer:
    arrays = {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}
    values = {name: array if name == "frame" else array.flat[0] for name, array in arrays.items()}
    if "notice" in values:
        values["notice"] = values["notice"].decode() or None
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    return Answer(**plain)


def grpc_module() -> Any:
    """`tritonclient.grpc`. Raises DependencyError where it is not installed."""
    try:
        import tritonclient.grpc as grpc
    except ImportError as error:
        raise DependencyError(
            f"tritonclient is not installed ({error}): pip install 'nova-export[triton]'"
        ) from error
    return grpc


def main() -> None:
    """The example: one video to a file."""
    from nova_export.runtime.media import save_frames

    parser = argparse.ArgumentParser(description="Ask a server for a video and write it to a file.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max-latent-length", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, default=Path("out.gif"))
    given = parser.parse_args()
    frames = []
    for answer in stream(
        given.url, prompt=given.prompt, seed=given.seed, max_latent_length=given.max_latent_length
    ):
        if answer.frame is not None:
            frames.append(answer.frame[0])
            print(f"frame {answer.frame_index}", end="\r", flush=True)
    save_frames(given.out, np.stack(frames))
    print(given.out)


if __name__ == "__main__":
    main()
