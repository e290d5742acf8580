"""What a bundle holds, as plain data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nova_export.bundle import Bundle, EngineEntry, StageEntry
from nova_export.spec import Tensor
from nova_export.tables import markdown

ENGINE_COLUMNS = (
    "stage",
    "attention",
    "engine MB",
    "weights MB",
    "activations MB",
    "compile peak MB",
    "seconds",
)
LAYER_COLUMNS = ("kind", "inputs", "weights", "outputs", "layers", "nodes")


def describe(bundle: Bundle) -> dict[str, Any]:
    """Stages with shapes, axes, bytes and precision; where the bundle comes from and what built it."""
    config = bundle.config
    return {
        "bundle": str(bundle.folder),
        "source": bundle.source["name"],
        "target": bundle.target,
        "kind": "class to image" if config.is_class_conditional else "video" if config.is_video else "image",
        "pixels": list(config.image_size),
        "tools": dict(bundle.tools),
        "bytes": sum(entry.size for entry in bundle.files.values()),
        "stages": {name: _stage(bundle, entry) for name, entry in bundle.stages.items()},
        "engines": {
            target: {name: describe_engine(bundle, entry) for name, entry in engines.items()}
            for target, engines in bundle.engines.items()
        },
    }


def _stage(bundle: Bundle, entry: StageEntry) -> dict[str, Any]:
    spec = entry.spec
    return {
        "precision": entry.precision,
        "bytes": sum(bundle.files[path].size for path in entry.files),
        "inputs": {tensor.name: _shape(tensor) for tensor in spec.inputs},
        "outputs": {tensor.name: _shape(tensor) for tensor in spec.outputs},
        "axes": {axis.name: [axis.min, axis.opt, axis.max] for axis in spec.axes},
        "verified": entry.verified,
    }


def describe_engine(bundle: Bundle, engine: EngineEntry) -> dict[str, Any]:
    """What an engine was made of and takes: bytes as TensorRT tells them, seconds of compiling."""
    return {
        "file": engine.file,
        "made_of": dict(engine.made_of),
        "attention": engine.attention,
        "axes": {axis.name: [axis.min, axis.opt, axis.max] for axis in engine.spec.axes},
        "bytes": bundle.files[engine.file].size,
        "weight_bytes": engine.weight_bytes,
        "activation_bytes": engine.activation_bytes,
        "peak_bytes": engine.peak_bytes,
        "seconds": engine.seconds,
        "layers": [dict(each) for each in engine.layers],
    }


def engine_table(engines: Mapping[str, Mapping[str, Any]]) -> str:
    """Engines, as `describe_engine` gives them by stage, for a person."""

    def row(name: str, engine: Mapping[str, Any]) -> list[str]:
        sizes = [engine[key] for key in ("bytes", "weight_bytes", "activation_bytes", "peak_bytes")]
        shown = ["-" if size is None else f"{size / 1e6:.1f}" for size in sizes]
        return [name, engine["attention"] or "-", *shown, f"{engine['seconds']:.1f}"]

    return markdown(ENGINE_COLUMNS, [row(*item) for item in engines.items()])


def layer_table(engine: Mapping[str, Any]) -> str:
    """The layers of an engine, as `describe_engine` gives them, for a person."""
    return markdown(
        LAYER_COLUMNS, [[str(each[key] or "-") for key in LAYER_COLUMNS] for each in engine["layers"]]
    )


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} ({', '.join(map(str, tensor.shape))})"


def format_table(described: dict[str, Any], layers: bool = False) -> str:
    """The description for a person; caches of the same shape are one line. layers: those of engines too."""
    height, width = described["pixels"]
    lines = [
        f"{described['bundle']}: {described['source']}, {described['kind']} {width}x{height}, "
        f"target {described['target']}, {_bytes(described['bytes'])}",
        "built with " + ", ".join(f"{tool} {version}" for tool, version in described["tools"].items()),
    ]
    for name, stage in described["stages"].items():
        verified = stage["verified"]
        found = _found(verified) if verified else "not verified"
        lines.append(f"\n{name}  {stage['precision']}  {_bytes(stage['bytes'])}  {found}")
        for kind in ("inputs", "outputs"):
            lines += [f"  {kind[:-1]:<7}{tensor}" for tensor in _tensors(stage[kind])]
        if stage["axes"]:
            axes = (
                f"{axis} {low}..{high} (usually {usual})"
                for axis, (low, usual, high) in stage["axes"].items()
            )
            lines.append("  where  " + ", ".join(axes))
    for target, engines in described["engines"].items():
        made = next(iter(engines.values()))["made_of"]
        lines.append(f"\nengines for {target}, by {made['runtime']} {made['version']}")
        lines.append(engine_table(engines))
        if layers:
            lines += [f"\n{name}\n{layer_table(engine)}" for name, engine in engines.items()]
    if described.get("hashes"):
        lines.append("\nall files match their sha256: the bundle is whole")
    return "\n".join(lines)


def _tensors(tensors: dict[str, str]) -> list[str]:
    """Lines "name shape"; a run of tensors that differ by their number only becomes one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, shape in tensors.items():
        groups.setdefault((name.rstrip("0123456789"), shape), []).append(name)
    return [
        f"{names[0]}{f' … {names[-1]}' if len(names) > 1 else ''}  {shape}"
        for (_, shape), names in groups.items()
    ]


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} GB"


def _found(verified: Mapping[str, Any]) -> str:
    """What verifying a stage found: the largest difference, or in a lower precision the worst SNR."""
    if "max_abs_diff" in verified:
        return f"within {verified['max_abs_diff']:.1e} of the reference"
    snr = "equal" if verified["snr_db"] is None else f"SNR {verified['snr_db']:.1f} dB"
    if "layers" in verified:
        return f"{snr} to fp32 on its runs, {verified['layers']} layers in integers"
    return f"{snr} to the reference, {verified['float_nodes']} operators in fp32"
