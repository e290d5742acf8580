"""The tensors of the `nova` model: what a request may bring, and what its answers hold.

Inputs are the arguments of `Request`, one a tensor; all but the prompt may be missing. The first axis of each
counts prompts: an argument that is one for all prompts is the same in every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nova_export.errors import InputError
from nova_export.runtime.request import Request
from nova_export.spec import Tensor

Array = NDArray[Any]

TEXT = "string"  # the other number types are numpy's
MAX_PROMPT_BYTES = 65_536  # far above what the model reads, and what a tokenizer does in a moment
MAX_IMAGE_PIXELS = 4096 * 4096
PER_PROMPT = ("prompt", "negative_prompt")

DATA_TYPES = {
    TEXT: "TYPE_STRING",
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
}

OUTPUTS = (
    Tensor("frame", "uint8", (-1, -1, 3)),  # (samples, H, W, 3)
    Tensor("frame_index", "int32", (1,)),
    Tensor("progress", "float32", (1,)),  # 0 to 1: of the AR steps
    Tensor("seed", "int64", (1,)),
    Tensor("notice", TEXT, (1,)),
)
PROGRESS = Tensor("report_progress", "bool", (1,))  # whether to send answers between frames


def inputs(class_conditional: bool) -> tuple[Tensor, ...]:
    """Of the model, without the axis of prompts. -1 is a size that a request chooses."""
    kinds = {"int": "int64", "float": "float32"}
    prompt = "int64" if class_conditional else TEXT
    special = {
        **dict.fromkeys(PER_PROMPT, Tensor("", prompt, (1,))),
        "image": Tensor("", "uint8", (-1, -1, 3)),
    }
    arguments = []
    for field in fields(Request):
        kind = kinds.get(str(field.type).removesuffix(" | None"), TEXT)
        like = special.get(field.name, Tensor("", kind, (1,)))
        arguments.append(Tensor(field.name, like.dtype, like.shape))
    return (*arguments, PROGRESS)


@dataclass(frozen=True)
class Asked:
    """A request, and whether its client wants progress between frames."""

    request: Request
    report_progress: bool = False


def read(tensors: Mapping[str, Array], class_conditional: bool) -> Asked:
    """The request that tensors mean. Raises InputError naming the tensor, its value and what it must be."""
    known = {tensor.name: tensor for tensor in inputs(class_conditional)}
    if unknown := sorted(tensors.keys() - known.keys()):
        raise InputError(f"there is no input {unknown[0]!r}; there are {', '.join(known)}")
    if "prompt" not in tensors:
        raise InputError("input 'prompt' is missing")
    arguments: dict[str, Any] = {}
    for name, array in tensors.items():
        _check(known[name], array, len(tensors["prompt"]))
        if name in PER_PROMPT:
            arguments[name] = [_value(name, row[0]) for row in array]
        else:
            row = _common_row(name, array)
            arguments[name] = row if name == "image" else _value(name, row[0])
    report_progress = arguments.pop(PROGRESS.name, False)
    return Asked(Request(**arguments), report_progress)


def _check(wanted: Tensor, array: Array, prompts: int) -> None:
    sizes = ", ".join("any" if size == -1 else str(size) for size in wanted.shape)
    fits = array.ndim == 1 + len(wanted.shape) and all(
        size in (-1, given) for size, given in zip(wanted.shape, array.shape[1:], strict=True)
    )
    if not fits or not array.size or len(array) != prompts:
        raise InputError(
            f"input {wanted.name!r} has shape {array.shape}; with {prompts} prompts it must be "
            f"({prompts}, {sizes}) and hold something"
        )
    if (kind := TEXT if array.dtype == np.object_ else str(array.dtype)) != wanted.dtype:
        raise InputError(f"input {wanted.name!r} is {kind}; it must be {wanted.dtype}")
    if wanted.name == "image" and array[0, ..., 0].size > MAX_IMAGE_PIXELS:
        size = "x".join(map(str, array.shape[1:3]))
        raise InputError(f"input 'image' is {size} pixels; the most is {MAX_IMAGE_PIXELS} in all")


def _common_row(name: str, array: Array) -> Array:
    if len(array) > 1 and not (array == array[:1]).all():
        raise InputError(f"input {name!r} differs between prompts of one request; send them one by one")
    row: Array = array[0]
    return row


def _value(name: str, item: Any) -> Any:
    if isinstance(item, bytes):
        if len(item) > MAX_PROMPT_BYTES:
            raise InputError(f"input {name!r} has {len(item)} bytes; the most is {MAX_PROMPT_BYTES}")
        try:
            return item.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"input {name!r} is no text: it is not UTF-8 ({error})") from None
    return item.item() if isinstance(item, np.generic) else item


def answer(**values: Any) -> dict[str, Array]:
    """Outputs as arrays, of those that are given."""
    made: dict[str, Array] = {}
    for tensor in OUTPUTS:
        if tensor.name in values:
            value = values[tensor.name]
            if tensor.name == "frame":
                made[tensor.name] = np.ascontiguousarray(value)
            elif tensor.dtype == TEXT:
                made[tensor.name] = np.array([[value.encode()]], np.object_)
            else:
                made[tensor.name] = np.array([[value]], tensor.dtype)
    return made
