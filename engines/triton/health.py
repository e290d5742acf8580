"""Whether a server really answers: Triton says READY of a python model whose process is gone.

So a small request is made. Where it fails, unloading and loading the model starts its process anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engines.triton.client import check_address, grpc_module, stream
from nova_export.errors import ServerError

CANARY: dict[str, Any] = {"num_inference_steps": 1, "num_diffusion_steps": 1, "seed": 0}
DATA_TYPE_OF_CLASSES = 9  # TYPE_INT64 in Triton's own numbering


@dataclass(frozen=True)
class Health:
    """seconds: that the canary took. recovered: whether the model had to be loaded again for it."""

    model: str
    seconds: float
    recovered: bool


def check(
    url: str,
    model: str = "nova",
    timeout: float = 10.0,
    recover: bool = False,
    report: Callable[[str], object] = lambda message: None,
) -> Health:
    """Make one small image. recover: load the model again where that fails, and try once more.

    timeout: seconds for each of these. Raises ServerError where it does not answer in the end; why it did not
    at first is reported. Raises UsageError for another address than HOST:PORT of gRPC.
    """
    check_address(url)
    try:
        return Health(model, _canary(url, model, timeout), recovered=False)
    except ServerError as error:
        if not recover:
            raise ServerError(f"{error}; --recover loads the model again") from error
        report(f"{error}; loading {model} again")
    _reload(url, model, timeout)
    return Health(model, _canary(url, model, timeout), recovered=True)


def _canary(url: str, model: str, timeout: float) -> float:
    started = time.monotonic()
    prompt: Any = 0 if _is_class_conditional(url, model, timeout) else "a canary"
    frames = [answer.frame for answer in stream(url, model=model, timeout=timeout, prompt=prompt, **CANARY)]
    if not frames or frames[0] is None or not frames[0].size:
        raise ServerError(f"{url}: {model} answered without a frame")
    return time.monotonic() - started


def _is_class_conditional(url: str, model: str, timeout: float) -> bool:
    grpc = grpc_module()
    try:
        with grpc.InferenceServerClient(url) as client:
            config = client.get_model_config(model, client_timeout=timeout).config
    except grpc.InferenceServerException as error:
        raise ServerError(f"{url}: {error.message()}") from error
    return any(each.name == "prompt" and each.data_type == DATA_TYPE_OF_CLASSES for each in config.input)


def _reload(url: str, model: str, timeout: float) -> None:
    """Raises ServerError where the server may not (it needs --model-control-mode=explicit), or cannot."""
    grpc = grpc_module()
    try:
        with grpc.InferenceServerClient(url) as client:
            client.unload_model(model, unload_dependents=False, client_timeout=timeout)
            client.load_model(model, client_timeout=timeout)
    except grpc.InferenceServerException as error:
        raise ServerError(f"{url}: {model} cannot be loaded again: {error.message()}") from error
