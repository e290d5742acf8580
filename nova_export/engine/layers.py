"""The layers that an engine came to have, from what TensorRT says while it builds it.

An engine's own inspector tells the same, but needs the GPU that the engine is for.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*), Constants: (?P<weights>.*), "
    r"Outputs: (?P<outputs>.*), TacticName: .*, Metadata: (?P<nodes>.*)$",
    re.MULTILINE,
)
NUMBERS = re.compile(r"Datatype: (\w+)")
NODE = "[ONNX Layer: "
FUSED_ATTENTION = "_mha_"


def layers_of(said: str) -> list[dict[str, Any]]:
    """Layers of the same kind and number types as one entry, most first; empty if `said` is of other things.

    inputs, weights, outputs: number types as TensorRT calls them. nodes: of the graph, that these layers do
    at least a part of, each counted once a layer.
    """
    layers: Counter[tuple[str, ...]] = Counter()
    nodes: Counter[tuple[str, ...]] = Counter()
    for layer in LAYER.finditer(said):
        kind = "attention" if FUSED_ATTENTION in layer["name"] else layer["kind"]
        key = (kind, *(_numbers(layer[each]) for each in ("inputs", "weights", "outputs")))
        layers[key] += 1
        nodes[key] += layer["nodes"].count(NODE)
    names = ("kind", "inputs", "weights", "outputs")
    return [
        {**dict(zip(names, key, strict=True)), "layers": count, "nodes": nodes[key]}
        for key, count in layers.most_common()
    ]


def _numbers(tensors: str) -> str:
    return "+".join(sorted(set(NUMBERS.findall(tensors))))
