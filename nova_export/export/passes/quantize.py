"""Linear layers with weights in int8 or int4, and inputs in 8 bits where their ranges are given: Q/DQ nodes.

Weights are stored as integers behind a DequantizeLinear, with a scale per output channel or per block of
input channels. An input goes through QuantizeLinear and DequantizeLinear: runtimes join the three to one
product of integers. A layer may have its input channels divided by factors, by an explicit Mul, and its
weights multiplied by them: wide channels then take less of the others' bits (SmoothQuant, arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nova_export.export.passes import NAMESPACE

Floats = NDArray[np.float32]
BITS = {"int8": 8, "int4": 4}
STORED = {"int8": (np.dtype(np.int8), ir.DataType.INT8), "int4": (np.dtype(ml_dtypes.int4), ir.DataType.INT4)}
# What part of the largest weight a scale may end at, where rounding all others finer is worth cutting it.
CUTS = np.linspace(1.0, 0.7, 13, dtype=np.float32)


@dataclass(frozen=True)
class WeightFormat:
    """number: "int8" or "int4". block: input channels that share a scale; None: all of an output channel."""

    number: str
    block: int | None = None


@dataclass(frozen=True)
class InputFormat:
    """x is about scale * (q - zero), q an integer of 8 bits. smooth: factors (D,) that divide x before."""

    scale: float
    zero: int
    signed: bool
    smooth: Floats | None = None


@dataclass(frozen=True)
class Linear:
    """A product with a matrix of weights. transposed: stored as (outputs, inputs), as some Gemm's are."""

    node: ir.Node
    weight: ir.Value
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Input and output channels."""
        rows, columns = self._tensor.shape.numpy()
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self) -> Floats:
        """(inputs, outputs); read from its file when it is asked for."""
        array = np.asarray(self._tensor.numpy(), np.float32)
        return array.T if self.transposed else array

    @property
    def _tensor(self) -> ir.TensorProtocol:
        assert self.weight.const_value is not None
        return self.weight.const_value


def linear_layers(model: ir.Model) -> dict[str, Linear]:
    """Products with weights, by the name of the module that they are from."""
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        flags = {name: attribute.value for name, attribute in node.attributes.items()}
        if flags.pop("transA", 0) or any(value != 1 for value in flags.values() if value):
            continue
        found[layer_name(node)] = Linear(node, weight, bool(flags.get("transB")))
    return found


def layer_name(node: ir.Node) -> str:
    """Of the innermost torch module that a node is from, as in the checkpoint: blocks.0.attn.qkv.

    What the stage computes itself has the name of its operator.
    """
    names = [part.split(":")[0].strip() for part in node.metadata_props.get(NAMESPACE, "").split("/")]
    *modules, operator = names
    inner = modules[-1].removeprefix("module") if modules else ""
    return inner.removeprefix(".") or operator or str(node.name)


def quantize(
    model: ir.Model,
    weights: Mapping[str, WeightFormat],
    inputs: Mapping[str, InputFormat] | None = None,
) -> list[str]:
    """Change `model` in place; the names of the layers that were changed, which are those of `weights`.

    inputs: of layers whose input is in 8 bits too; it may name layers that `weights` does not.
    """
    shared: dict[tuple[ir.Value, float, int], ir.Value] = {}
    changed = []
    for name, layer in linear_layers(model).items():
        if name not in weights:
            continue
        given = (inputs or {}).get(name)
        _quantize_weight(layer, weights[name], given.smooth if given else None)
        if given:
            _quantize_input(layer.node, given, shared)
        changed.append(name)
    return changed


def _quantize_weight(layer: Linear, format: WeightFormat, smooth: Floats | None) -> None:
    node, weight, graph = layer.node, layer.weight, layer.node.graph
    assert isinstance(graph, ir.Graph)
    block = format.block if format.block and layer.shape[0] % format.block == 0 else None
    name = f"{node.name}_weight"
    scales = _scales(_smoothed(layer, smooth), format.number, block)  # (blocks, outputs)
    stored, shape = STORED[format.number][1], weight.shape
    assert shape is not None
    quantized = ir.Value(
        name=name,
        shape=shape,
        type=ir.TensorType(stored),
        const_value=ir.LazyTensor(
            partial(_rounded, layer, smooth, scales, format.number, name),
            dtype=stored,
            shape=shape,
            name=name,
        ),
    )
    graph.register_initializer(quantized)
    if block:
        kept = scales.T if layer.transposed else scales
        attributes = {"axis": int(layer.transposed), "block_size": block}
    else:
        kept, attributes = scales[0], {"axis": int(not layer.transposed)}
    scale = _constant(graph, f"{name}_scale", np.ascontiguousarray(kept))
    wide = ir.node("DequantizeLinear", [quantized, scale], attributes, name=f"{name}_wide")
    _describe(wide.outputs[0], f"{name}_wide", ir.DataType.FLOAT, shape)
    graph.insert_before(node, wide)
    node.replace_input_with(1, wide.outputs[0])
    if not weight.uses():
        graph.initializers.pop(str(weight.name))


def _quantize_input(
    node: ir.Node, format: InputFormat, shared: dict[tuple[ir.Value, float, int], ir.Value]
) -> None:
    """Layers that read one value in the same format share its integers."""
    value, graph, name = node.inputs[0], node.graph, str(node.name)
    assert value is not None and graph is not None
    key = value, format.scale, format.zero
    if format.smooth is not None or key not in shared:
        source = value
        if format.smooth is not None:
            factors = _constant(graph, f"{name}_smooth", (1 / format.smooth).astype(np.float32))
            product = ir.node("Mul", [value, factors], name=f"{name}_smoothed")
            graph.insert_before(node, product)
            source = product.outputs[0]
            _describe(source, f"{name}_smoothed", ir.DataType.FLOAT, value.shape)
        number = np.int8 if format.signed else np.uint8
        stored = ir.DataType.INT8 if format.signed else ir.DataType.UINT8
        scale = _constant(graph, f"{name}_input_scale", np.array(format.scale, np.float32))
        zero = _constant(graph, f"{name}_input_zero", np.array(format.zero, number))
        narrow = ir.node("QuantizeLinear", [source, scale, zero], name=f"{name}_input_narrow")
        _describe(narrow.outputs[0], f"{name}_input_narrow", stored, value.shape)
        wide = ir.node("DequantizeLinear", [narrow.outputs[0], scale, zero], name=f"{name}_input_wide")
        _describe(wide.outputs[0], f"{name}_input_wide", ir.DataType.FLOAT, value.shape)
        graph.insert_before(node, [narrow, wide])
        shared[key] = wide.outputs[0]
    node.replace_input_with(0, shared[key])


def _scales(weight: Floats, number: str, block: int | None) -> Floats:
    """Of each output channel (1, N), or block of input channels (K / block, N): the best of some cuts."""
    rows, columns = weight.shape
    blocks = weight.reshape(-1, block or rows, columns)
    end = 2 ** (BITS[number] - 1) - 1
    largest = np.abs(blocks).max(1)
    best, least = largest / end, np.full_like(largest, np.inf)
    for cut in CUTS if number == "int4" else CUTS[:1]:
        scale = np.where(largest > 0, largest * cut / end, 1).astype(np.float32)
        kept = np.clip(np.rint(blocks / scale[:, None]), -end - 1, end) * scale[:, None]
        error = np.square(kept - blocks).sum(1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best.astype(np.float32)


def _rounded(
    layer: Linear, smooth: Floats | None, scales: Floats, number: str, name: str
) -> ir.TensorProtocol:
    """The weights as integers; run when they are saved, one matrix at a time."""
    weight = _smoothed(layer, smooth)
    wide = np.repeat(scales, len(weight) // len(scales), axis=0)
    end = 2 ** (BITS[number] - 1) - 1
    values = np.clip(np.rint(weight / wide), -end - 1, end)
    kind, stored = STORED[number]
    values = values.T if layer.transposed else values
    return ir.Tensor(np.ascontiguousarray(values.astype(kind)), dtype=stored, name=name)


def _smoothed(layer: Linear, smooth: Floats | None) -> Floats:
    weight = layer.matrix()
    return weight if smooth is None else weight * smooth[:, None]


def _constant(graph: ir.Graph | ir.Function, name: str, array: NDArray[np.generic]) -> ir.Value:
    assert isinstance(graph, ir.Graph)
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _describe(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.dtype, value.shape = name, dtype, shape
