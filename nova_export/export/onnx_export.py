"""One stage: reference module -> ONNX file, with the spec's names and dynamic axes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import fold_constants
from torch import nn

from nova_export.errors import ExportError
from nova_export.export.passes import NAMESPACE
from nova_export.export.passes.decompose import decompose
from nova_export.spec import Stage, Tensor

OPSET = 23  # the first with Attention
ANY_SIZE = 1 << 40


def trace_sizes(stage: Stage) -> dict[str, int]:
    """A size for every axis that torch.export keeps symbolic: 0 and 1 get specialised, equal ones merged."""
    sizes: dict[str, int] = {}
    for axis in stage.axes:
        size = max(2, axis.opt)
        while size in sizes.values():
            size += 1
        sizes[axis.name] = size
    return sizes


def is_dynamic(stage: Stage, size: int | str) -> bool:
    """Whether a dimension stays symbolic: an axis that may have more than one size."""
    return isinstance(size, str) and stage.axis(size).min < stage.axis(size).max


def example_inputs(stage: Stage, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Zeros of the right names, dtypes and shapes: tracing looks at nothing else."""
    fixed = {axis.name: axis.min for axis in stage.axes if axis.min == axis.max}
    shapes = stage.shapes({**sizes, **fixed})
    return {t.name: torch.zeros(shapes[t.name], dtype=getattr(torch, t.dtype)) for t in stage.inputs}


def export_onnx(stage: Stage, module: nn.Module, path: Path, opset: int = OPSET) -> None:
    """Write `path` and, beside it, `path`.data with the weights.

    opset: OPSET, or an older one, for which late operators are decomposed.

    Raises:
        ExportError: the exporter failed, or its graph has other inputs or outputs than the spec.
    """
    inputs = example_inputs(stage, trace_sizes(stage))
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                _Positional(module, tuple(inputs)),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(dynamic_dims(stage),),
                verbose=False,
            )
        except Exception as error:
            cause = _root_cause(error)
            raise ExportError(f"stage {stage.name}: torch.onnx.export failed: {cause}") from error
    assert program is not None
    graph = program.model.graph
    _name(stage, graph.inputs, stage.inputs, "inputs")
    _name(stage, graph.outputs, stage.outputs, "outputs")
    for node in graph.all_nodes():  # of what the exporter notes, where in the model a node is from; no paths
        where = node.metadata_props.get(NAMESPACE)
        node.metadata_props.clear()
        if where:
            node.metadata_props[NAMESPACE] = where
    fold_constants(program.model, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE)  # parts of weights
    _share_constants(graph)
    for initializer in list(graph.initializers.values()):
        initializer.name = str(initializer.name).removeprefix("module.")
    if opset < OPSET:
        decompose(program.model, opset)
    program.save(path, external_data=True)
    for initializer in graph.initializers.values():
        initializer.const_value = None  # the exporter's rewrite rules keep the last graph alive


def _share_constants(graph: ir.Graph) -> None:
    """One of the constants that every copy of a module has, where a loop over it was unrolled."""
    same_place = defaultdict(list)
    for value in graph.initializers.values():
        users = [node.metadata_props.get(NAMESPACE, "") for node, _ in value.uses()]
        modules = frozenset(user.rpartition("/")[0] for user in users)  # without the operator
        same_place[value.dtype, str(value.shape), modules].append(value)
    for values in same_place.values():
        kept: dict[bytes, ir.Value] = {}
        for value in values if len(values) > 1 else ():
            assert value.const_value is not None
            first = kept.setdefault(value.const_value.tobytes(), value)
            if first is not value:
                value.replace_all_uses_with(first)
                del graph.initializers[str(value.name)]


def _root_cause(error: BaseException) -> str:
    """The innermost error in one line: what the exporter wraps around it is advice to its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


class _Positional(nn.Module):
    """Takes tensors in the spec's order: one calling convention for every stage."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.module(**dict(zip(self.names, tensors, strict=True)))


def dynamic_dims(stage: Stage) -> tuple[dict[int, Any], ...]:
    """Spec axes as torch.export wants them, one dict an input."""
    dynamic = torch.export.Dim.DYNAMIC
    return tuple(
        {i: dynamic for i, size in enumerate(tensor.shape) if is_dynamic(stage, size)}
        for tensor in stage.inputs
    )


def _name(stage: Stage, values: Any, tensors: tuple[Tensor, ...], kind: str) -> None:
    if len(values) != len(tensors):
        raise ExportError(f"stage {stage.name}: the graph has {len(values)} {kind}, the spec {len(tensors)}")
    for value, tensor in zip(values, tensors, strict=True):
        if len(value.shape) != len(tensor.shape):
            raise ExportError(
                f"stage {stage.name}: {tensor.name} came out as {value.shape}, spec {tensor.shape}"
            )
        value.name = tensor.name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns of what it does itself; keep that off the user's screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            logger.setLevel(level)
