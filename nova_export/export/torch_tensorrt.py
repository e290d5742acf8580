"""Another way to engines: torch-tensorrt, from the PyTorch program itself instead of its ONNX graph.

It compiles with TensorRT, in this process, on the GPU of the machine. Never ran on one: only its double in
the tests was called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nova_export.child import memory
from nova_export.config import NovaConfig
from nova_export.engine.compiler import Compiled, CompileJob
from nova_export.errors import DependencyError, ExportError, UsageError
from nova_export.export.onnx_export import dynamic_dims, example_inputs, trace_sizes
from nova_export.runtime.media import write_whole
from nova_export.spec import Stage
from nova_export.targets import Precision, Target
from reference_model.checkpoint import load_module

RUNTIME = "tensorrt"  # of targets
DEVICE = "cuda"


def load_torch_tensorrt() -> Any:
    """Raises DependencyError where it is not installed, or there is no GPU that it could compile on."""
    try:
        library = import_module("torch_tensorrt")
    except (ImportError, OSError, RuntimeError) as error:  # what it says without TensorRT, or a driver
        raise DependencyError(
            f"torch-tensorrt is not usable here ({error}); pip install 'nova-export[torch-tensorrt]', or "
            "leave --builder out"
        ) from error
    if not torch.cuda.is_available():
        raise DependencyError(
            f"torch-tensorrt compiles on a GPU, and PyTorch {torch.__version__} sees none here; leave "
            "--builder out, or build on the device"
        )
    return library


@dataclass(frozen=True)
class TorchTensorRt:
    """A builder of engines, see engine/build.py, from a checkpoint. precisions: by stage."""

    checkpoint: Path
    config: NovaConfig
    precisions: Mapping[str, Precision]
    library: Any

    @classmethod
    def of(
        cls, checkpoint: Path, config: NovaConfig, precisions: Mapping[str, Precision], target: Target
    ) -> TorchTensorRt:
        """Raises UsageError for what it does not make, DependencyError where it is not there."""
        if target.runtime != RUNTIME:
            raise UsageError(
                f"torch-tensorrt compiles with TensorRT, and target {target.name} does not; name one that "
                "does, as `tensorrt`, or leave --builder out"
            )
        for stage, precision in precisions.items():
            if precision.weights or precision.fastest_of:
                raise UsageError(
                    f"torch-tensorrt makes engines in fp32, fp16 and bf16 here, and stage {stage} is asked "
                    f"for in {precision.name}; leave --builder out"
                )
        return cls(checkpoint, config, precisions, load_torch_tensorrt())

    @property
    def name(self) -> str:
        return f"torch-tensorrt {self.library.__version__}"

    def compile(self, job: CompileJob, stage: Stage, report: Callable[[str], object]) -> Compiled:
        """Write `job.out`. Raises ExportError with what torch-tensorrt says."""
        started, half = time.monotonic(), self.precisions[stage.name].half
        dtype = getattr(torch, half) if half else torch.float32
        report("exporting")
        module = _Typed(stage, load_module(stage, self.config, self.checkpoint), dtype).to(DEVICE).eval()
        report("compiling")
        options = {"timing_cache_path": job.timings} if job.timings else {}
        try:
            engine = self.library.dynamo.convert_exported_program_to_serialized_trt_engine(
                exported(stage, module),
                arg_inputs=[self._input(job, tensor.name, tensor.dtype) for tensor in stage.inputs],
                use_explicit_typing=True,  # the program's own number types
                **options,
            )
        except Exception as error:  # whatever a converter raises
            raise ExportError(f"{self.name} cannot compile stage {stage.name}: {error}") from error
        write_whole(Path(job.out), lambda file: file.write_bytes(engine))
        seconds = round(time.monotonic() - started, 2)
        return Compiled(None, None, None, memory("VmHWM"), seconds, ())

    def _input(self, job: CompileJob, name: str, dtype: str) -> Any:
        least, usual, most = job.profile[name]
        if least == most:
            return self.library.Input(shape=least, dtype=getattr(torch, dtype))
        return self.library.Input(
            min_shape=least, opt_shape=usual, max_shape=most, dtype=getattr(torch, dtype)
        )


def exported(stage: Stage, module: nn.Module) -> torch.export.ExportedProgram:
    """The module with the spec's dynamic axes."""
    examples = tuple(tensor.to(DEVICE) for tensor in example_inputs(stage, trace_sizes(stage)).values())
    with torch.no_grad():
        return torch.export.export(module, examples, dynamic_shapes=(dynamic_dims(stage),))


class _Typed(nn.Module):
    """A stage that computes in another number type, between inputs and outputs of the spec's."""

    def __init__(self, stage: Stage, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.names = [tensor.name for tensor in stage.inputs]
        self.outputs = [getattr(torch, tensor.dtype) for tensor in stage.outputs]
        self.module, self.dtype = module.to(dtype), dtype

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        typed = [each.to(self.dtype) if each.is_floating_point() else each for each in tensors]
        made = self.module(**dict(zip(self.names, typed, strict=True)))
        made = made if isinstance(made, tuple) else (made,)
        return tuple(each.to(dtype) for each, dtype in zip(made, self.outputs, strict=True))
