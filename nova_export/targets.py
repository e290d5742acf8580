"""Targets and precisions as named presets: what a bundle is built for. Frozen data, read by the build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from nova_export.errors import UsageError
from nova_export.lean_stages import GIVEN
from nova_export.spec import Stage
from nova_export.toml_file import read_toml


@dataclass(frozen=True)
class Hardware:
    """A device, from its maker's data sheets. memory: in GB, of which system and driver take `system`.
    bandwidth: in GB/s. half, int8: 10^12 operations a second in float16 and int8, without sparsity. unified:
    whether the GPU's memory is the machine's."""

    compute_capability: str
    memory: float
    system: float
    bandwidth: float
    half: float
    int8: float
    unified: bool = False


@dataclass(frozen=True)
class Target:
    """Where a bundle runs. `opset` of its graphs; 23 has Attention, which runtimes fuse, and 21 weights in
    integers with a scale a block.

    kernels: the number types that it computes in. Others are stored, and computed in float32. signed_inputs:
    whether 8-bit inputs of layers are signed, with their zero at 0, as TensorRT wants them. ort_operators:
    whether stages in integers have ONNX Runtime's own operators, for attention and products. runtime: what
    compiles its engines; None where the graphs themselves are run. compute_capability: of the GPU that they
    are for; None for the one of the machine. device: the same for a person. hardware: where it is one device.
    head_steps: as in `stages`, where a build is not told.
    """

    name: str
    opset: int
    kernels: tuple[str, ...]
    signed_inputs: bool = False
    ort_operators: bool = False
    runtime: str | None = None
    compute_capability: str | None = None
    device: str = ""
    hardware: Hardware | None = None
    head_steps: int | None = None

    @property
    def graph_form(self) -> tuple[Any, ...]:
        """What its graphs depend on: those of targets that have this in common are the same."""
        return self.opset, self.kernels, self.signed_inputs, self.ort_operators


@dataclass(frozen=True)
class Precision:
    """What the weights and the arithmetic of a stage are.

    half: the number type of both, where it is not float32. float_sums: whether additions of computed values,
    the residuals, stay in float32 then. weights: "int8" or "int4", how the weights of linear layers are
    stored, with a scale for every `block` input channels or, without, every output channel.
    inputs: whether the inputs of these layers are in 8 bits too. stages: those that it is for; others stay in
    fp32. instead: stages that have another precision in its place. least_snr: the gate, in dB against
    float32, that every output of every stage must pass, or the stage is not written. fastest_of: names of
    precisions; a stage gets the fastest of them that passes its gate.
    """

    name: str
    half: str | None = None
    float_sums: bool = False
    weights: str | None = None
    block: int | None = None
    inputs: bool = False
    stages: tuple[str, ...] | None = None
    instead: tuple[tuple[str, str], ...] = ()
    least_snr: float | None = None
    fastest_of: tuple[str, ...] = ()

    def is_for(self, stage: str) -> bool:
        return self.stages is None or stage in self.stages

    def of_stage(self, stage: str) -> Precision:
        """What a stage is in, where the whole bundle is asked for in this precision."""
        return find(PRECISIONS, dict(self.instead).get(stage, self.name)) if self.is_for(stage) else FP32


CPU = Target("cpu", opset=23, kernels=("float32", "float16"), ort_operators=True, device="any CPU")
GPU_KERNELS = ("float32", "float16", "bfloat16")
CUDA = Target(
    "cuda", opset=23, kernels=GPU_KERNELS, signed_inputs=True, device="NVIDIA GPUs, by ONNX Runtime"
)
BUILDERS = ("onnx", "torch-tensorrt")  # what engines are compiled by: from graphs, or from PyTorch programs
HEAD_STEPS = 5  # of engines: their CUDA graphs hold no loop, and 25 unrolled compile 20 times as long
ENCODERS = ("text_encoder", "temporal_encoder", "spatial_encoder")
# Rounding alone leaves 6 dB a bit: 66 dB with the 11 bits of float16, 48 dB with the 8 of bfloat16. The gates
# leave room for deep stages, and none for an overflow. Stages in 8 bits have 30 to 45 dB, in 4 bits 20.
FP32 = Precision("fp32")
PRECISIONS = (
    FP32,
    Precision("fp16", half="float16", least_snr=45.0),
    # Guidance adds up differences of the head's passes, many times as large as they were, and bfloat16's
    # errors with them: 27 dB of frames, where 8 bits elsewhere leave 42.
    Precision(
        "bf16", half="bfloat16", float_sums=True, least_snr=30.0, instead=(("diffusion_head", "fp16"),)
    ),
    Precision("int8", weights="int8", inputs=True, stages=ENCODERS, least_snr=20.0),
    Precision("int8-weights", weights="int8", block=64, stages=ENCODERS, least_snr=20.0),
    Precision("int4-weights", weights="int4", block=32, stages=("text_encoder",), least_snr=15.0),
    Precision("auto", fastest_of=("fp32", "fp16", "int8", "int8-weights")),
)
# Of linear layers in integers: at least so many input and output channels. Smaller ones gain nothing.
LEAST_CHANNELS = 64
# Inputs that stay in float32 in any precision: state of loops, where errors add up, and the tables that step
# it. So do inputs that a stage writes in place.
FLOAT_INPUTS: Mapping[str, frozenset[str]] = {
    "diffusion_head": frozenset(
        {"noise", "step_noise", "step_coefficients", "step_guidance", "step_extra_guidance"}
        | {"step_renorm", "rest", "step_rest_noise"}
    ),
}
STATISTICS = frozenset(tensor.name for tensor in GIVEN)  # of norms, between the pieces of a lean decode


def _gpu_targets() -> Iterator[Target]:
    """Those of engines/targets, a TOML file each."""
    for path in sorted(Path(str(files("engines") / "targets")).glob("*.toml")):
        data = {"opset": 23, "head_steps": HEAD_STEPS, **read_toml(path)}
        hardware = Hardware(**data.pop("hardware")) if "hardware" in data else None
        yield Target(path.stem, kernels=GPU_KERNELS, signed_inputs=True, hardware=hardware, **data)


TARGETS = (CPU, CUDA, *_gpu_targets())

Preset = TypeVar("Preset", Target, Precision)


def find(presets: tuple[Preset, ...], name: str) -> Preset:
    """The preset of that name. Raises UsageError naming those there are."""
    for preset in presets:
        if preset.name == name:
            return preset
    kind = type(presets[0]).__name__.lower()
    raise UsageError(f"{kind} {name!r} is unknown; there is {', '.join(p.name for p in presets)}")


def contained(precision: Precision) -> list[Precision]:
    """The precision itself, or those that it takes the fastest of."""
    return [find(PRECISIONS, name) for name in precision.fastest_of] or [precision]


def float_inputs(stage: Stage) -> frozenset[str]:
    """Names of the inputs of a stage that stay in float32."""
    in_place = {tensor.alias for tensor in stage.outputs if tensor.alias}
    statistics = STATISTICS & {tensor.name for tensor in stage.inputs}
    return FLOAT_INPUTS.get(stage.name, frozenset()) | statistics | in_place
