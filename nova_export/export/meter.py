"""What a stage costs at given sizes, counted on its reference module without computing anything.

The module runs on fake tensors, which have shapes and no values: so a full-size stage takes seconds, and no
memory. Counts are of values, not bytes: what a value takes is a question of precision.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from nova_export.config import NovaConfig
from nova_export.spec import Stage
from nova_export.targets import LEAST_CHANNELS
from reference_model.checkpoint import make_module


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """From shapes, as the counter gives them."""
    return sdpa_flop_count(query, key, value)


# What attention is on CPUs, which the counter does not know.
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@dataclass(frozen=True)
class Cost:
    """weights: values of parameters and tables; linear: those of layers that can be in integers.
    activations: the most values that are there at a time, inputs and outputs too, but not what graphs write
    in place, which is in_place. scores: of the largest attention, queries times keys, which fused kernels do
    not keep. operations: of products and convolutions, two for a multiplication and its addition.
    """

    weights: int
    linear: int
    activations: int
    in_place: int
    scores: int
    operations: int


def stage_cost(stage: Stage, config: NovaConfig, sizes: Mapping[str, int]) -> Cost:
    """Of one call; sizes: of every axis."""
    with FakeTensorMode(), torch.inference_mode():
        module = make_module(stage, config).eval()
        weights = sum(tensor.numel() for tensor in module.state_dict().values())
        layers = [each.weight for each in module.modules() if isinstance(each, torch.nn.Linear)]
        linear = sum(each.numel() for each in layers if min(each.shape) >= LEAST_CHANNELS)
        shapes = stage.shapes(sizes)
        inputs = {t.name: torch.empty(shapes[t.name], dtype=getattr(torch, t.dtype)) for t in stage.inputs}
        with (
            FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops,
            Meter(inputs.values()) as meter,
        ):
            module(**inputs)
    in_place = sum(math.prod(shapes[t.alias]) for t in stage.outputs if t.alias)
    # The modules return what graphs write in place: at the most, both are there.
    return Cost(weights, linear, meter.most - 2 * in_place, in_place, meter.scores, flops.get_total_flops())


class Meter(TorchDispatchMode):
    """Follows the memory that tensors have: every storage counts from when it is made until nobody has it."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.most = self.scores = 0
        self._known: set[int] = set()
        for tensor in inputs:
            self._hold(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "scaled_dot_product" in function.name():
            query, key = args[:2]
            self.scores = max(self.scores, math.prod(query.shape[:-1]) * key.shape[-2])
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._hold(each)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if _place(tensor) in self._known:
            return
        self._known.add(_place(tensor))
        size = storage.nbytes() // tensor.element_size()
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._release, _place(tensor), size)

    def _release(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.held -= size


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
