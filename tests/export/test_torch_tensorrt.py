"""How torch-tensorrt is called, by a double with the signature that its documentation gives."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nova_export.config import NovaConfig
from nova_export.engine.build import profile
from nova_export.engine.compiler import CompileJob
from nova_export.errors import DependencyError, ExportError, UsageError
from nova_export.export import torch_tensorrt
from nova_export.export.torch_tensorrt import TorchTensorRt
from nova_export.stages import Limits, stages
from nova_export.targets import PRECISIONS, TARGETS, find
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "t2i" / "checkpoint"
TENSORRT = find(TARGETS, "tensorrt")


class Input:
    """torch_tensorrt.Input: of one shape, or of three."""

    def __init__(
        self,
        shape: Sequence[int] | None = None,
        *,
        min_shape: Sequence[int] | None = None,
        opt_shape: Sequence[int] | None = None,
        max_shape: Sequence[int] | None = None,
        dtype: torch.dtype,
    ) -> None:
        dynamic = [min_shape, opt_shape, max_shape]
        assert (shape is None) == all(each is not None for each in dynamic) and any([shape, *dynamic])
        self.shape, self.opt_shape, self.dtype = shape, shape or opt_shape, dtype


class TorchTensorRtDouble:
    """Runs the program that it is given, in the usual shapes, and keeps what comes out."""

    __version__ = "2.13.0"
    Input = Input

    def __init__(self) -> None:
        self.dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=self.convert)
        self.inputs: list[Input] = []
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.options: dict[str, Any] = {}
        self.fails = ""

    def convert(
        self,
        exported_program: torch.export.ExportedProgram,
        inputs: Sequence[Any] | None = None,
        *,
        arg_inputs: Sequence[Any] | None = None,
        kwarg_inputs: dict[str, Any] | None = None,
        use_explicit_typing: bool = False,
        timing_cache_path: str = "",
        **options: Any,
    ) -> bytes:
        if self.fails:
            raise RuntimeError(self.fails)
        assert inputs is None and not options and use_explicit_typing
        self.inputs = list(arg_inputs or ())
        self.options = {"timings": timing_cache_path}
        arguments = [torch.zeros(each.opt_shape, dtype=each.dtype) for each in self.inputs]
        self.outputs = exported_program.module()(*arguments)
        return b"engine"


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> TorchTensorRtDouble:
    made = TorchTensorRtDouble()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch_tensorrt, "DEVICE", "cpu")
    return made


def builder(precision: str, stage: str = "diffusion_head") -> TorchTensorRt:
    precisions = {stage: find(PRECISIONS, precision)}
    return TorchTensorRt.of(CHECKPOINT, NovaConfig.from_checkpoint(CHECKPOINT), precisions, TENSORRT)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stage_with_its_shapes_and_types(
    double: TorchTensorRtDouble, tmp_path: Path, precision: str
) -> None:
    made = builder(precision)
    stage = stages(made.config, Limits(2, 1), head_steps=3)["diffusion_head"]
    job = CompileJob("tensorrt", "", str(tmp_path / "x"), profile(stage), None, timings="timings.bin")
    said: list[str] = []
    made.compile(job, stage, said.append)
    assert (tmp_path / "x").read_bytes() == b"engine" and said == ["exporting", "compiling"]
    assert made.name == "torch-tensorrt 2.13.0" and double.options == {"timings": "timings.bin"}
    for given, tensor in zip(double.inputs, stage.inputs, strict=True):
        least, usual, most = job.profile[tensor.name]
        assert (tuple(given.opt_shape or ()), given.dtype) == (usual, getattr(torch, tensor.dtype))
        assert (given.shape is not None) == (least == most)
    usual_sizes = {axis.name: axis.opt for axis in stage.axes}
    shapes = stage.shapes(usual_sizes, outputs=True)
    for output, tensor in zip(double.outputs, stage.outputs, strict=True):
        assert (tuple(output.shape), output.dtype) == (shapes[tensor.name], torch.float32)


def test_what_it_says_is_passed_on(double: TorchTensorRtDouble, tmp_path: Path) -> None:
    double.fails = "no converter for aten.wobble"
    made = builder("fp32", "condition")
    stage = stages(made.config, Limits(1, 1))["condition"]
    job = CompileJob("tensorrt", "", str(tmp_path / "x"), profile(stage), None)
    with pytest.raises(ExportError, match=r"torch-tensorrt 2\.13\.0 cannot compile stage condition: no conv"):
        made.compile(job, stage, lambda doing: None)
    assert not (tmp_path / "x").exists()


def test_what_it_does_not_make(double: TorchTensorRtDouble) -> None:
    with pytest.raises(UsageError, match="spatial_encoder is asked for in int8"):
        builder("int8", "spatial_encoder")
    config = NovaConfig.from_checkpoint(CHECKPOINT)
    with pytest.raises(UsageError, match="target rtx-40 does not"):
        TorchTensorRt.of(CHECKPOINT, config, {}, find(TARGETS, "rtx-40"))


def test_where_it_is_not_there(
    double: TorchTensorRtDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is exported, with the way out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DependencyError, match="sees none here"):
        builder("fp32")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    command = ("build", CHECKPOINT, "-o", tmp_path / "b", "--target", "tensorrt", "--no-engines", "-q")
    refused = nova_export(*command, "--builder", "torch-tensorrt")
    only_error(refused, DependencyError.exit_code, "nova-export[torch-tensorrt]", "--builder")
    assert not (tmp_path / "b").exists()
