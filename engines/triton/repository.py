"""A bundle as a model repository of Triton Inference Server: everything is made from the manifest.

Stages run in the process of the `nova` model, or are models of their own, which it calls through the server.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

from engines.triton.config_text import Enum, to_text
from engines.triton.tensors import DATA_TYPES, OUTPUTS, inputs
from nova_export.bundle import Bundle, replace_folder
from nova_export.config import NovaConfig
from nova_export.errors import OutputError, UsageError
from nova_export.runtime.ort_cuda import PROVIDERS
from nova_export.runtime.stage_runners import specs_on, vae_tile_on
from nova_export.spec import Axis, Stage, Tensor
from nova_export.targets import TARGETS, find

SOURCES = files("engines") / "triton"
VERSION = "1"  # of the model, the folder that Triton looks into
MARK = "nova_repository.json"  # tells a repository of ours, which --force may replace
MICROSECONDS = 1_000_000
LONGEST = 32  # latent frames, where engines do not say less
WIDEST = 8  # samples in one loop, likewise
STAGES = ("in-process", "models")
PLATFORMS = {"python": "", "onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}


@dataclass(frozen=True)
class Serving:
    """How a repository serves. None is decided by `resolved`.

    device: of the stages: cpu, cuda, or a target that the bundle has engines for. stages: one of STAGES.
    platform: of stage models, one of PLATFORMS. loops: instances of the model, each one loop at a time.
    max_batch: samples in one loop. max_latent_length: of one video. queue: requests that may wait;
    timeout: seconds that they may. gather: seconds that a request waits for others to share its loop.
    threads: of ONNX Runtime, 0 leaves it to it.
    """

    device: str | None = None
    stages: str = "in-process"
    platform: str | None = None
    name: str = "nova"
    loops: int = 1
    max_batch: int | None = None
    max_latent_length: int | None = None
    queue: int = 64
    timeout: float = 120.0
    gather: float = 0.02
    threads: int = 0

    def resolved(self, bundle: Bundle) -> Serving:
        """With every choice made. Raises UsageError naming what the bundle has or allows."""
        device = self.device or _device_of(bundle)
        there = [*PROVIDERS, *bundle.engines]
        if device not in there:
            raise UsageError(f"device {device!r}: this bundle runs on {', '.join(there)}")
        specs = specs_on(bundle, device)
        if missing := bundle.stages.keys() - specs.keys():
            raise UsageError(
                f"device {device}: the bundle has no engine of {min(missing)}; "
                f"`nova-export engines {bundle.folder} --target {device}` makes it"
            )
        platform = self.platform or _platform_of(device)
        _check_platform(self.stages, platform, device)
        samples = specs["diffusion_head"].axis("samples").max
        frames = most_frames(bundle.config, specs["temporal_encoder"])
        made = replace(
            self,
            device=device,
            platform=platform,
            max_batch=self.max_batch or min(WIDEST, samples),
            max_latent_length=self.max_latent_length or min(LONGEST, frames),
        )
        for name, value, most in (
            ("--max-batch", made.max_batch, samples),
            ("--max-latent-length", made.max_latent_length, frames),
        ):
            if value is not None and value > most:
                raise UsageError(f"{name} is {value}; the stages of this bundle for {device} take {most}")
        return made


def package(folder: Path, out: Path, serving: Serving, force: bool = False) -> Path:
    """Write the model repository of the bundle in `folder`; it is whole or absent.

    Raises BundleError for a bundle that was changed, UsageError for what it cannot serve, OutputError.
    """
    bundle = Bundle.open(folder)
    chosen = serving.resolved(bundle)
    _check_out(out, force)
    work = out.parent / f".{out.name}.{uuid4().hex[:8]}.partial"
    try:
        work.mkdir()
        (work / MARK).write_text(json.dumps({"bundle": dict(bundle.source), "model": chosen.name}))
        if chosen.stages == "models":
            _write_models(bundle, chosen, work)
        else:
            _write_in_process(bundle, chosen, work)
        replace_folder(work, out)
    except OSError as error:
        raise OutputError(
            f"{error.filename or out}: {error.strerror or error}; nothing was written"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def most_frames(config: NovaConfig, temporal: Stage) -> int:
    """Latent frames that the temporal encoder's caches may hold."""
    return (temporal.axis("capacity").max - config.condition_tokens) // config.frame_tokens


def batch_axis(stage: Stage) -> Axis | None:
    """The axis that leads every input and output: along it Triton may put requests together."""
    tensors = (*stage.inputs, *stage.outputs)
    lead, *others = {tensor.shape[0] for tensor in tensors}
    if others or isinstance(lead, int) or stage.axis(lead).min > 1:
        return None
    # Triton wants an axis behind that of the batch.
    return stage.axis(lead) if all(len(tensor.shape) > 1 for tensor in tensors) else None


def stage_config(stage: Stage, serving: Serving, file: str) -> dict[str, Any]:
    """config.pbtxt of a stage's model, batched where the stage has an axis for it."""
    axis = batch_axis(stage)
    batches = axis is not None
    gpu = serving.device != "cpu"
    config: dict[str, Any] = {
        "name": f"{serving.name}_{stage.name}",
        "max_batch_size": axis.max if axis is not None else 0,
        "input": [_tensor(tensor, batches) for tensor in stage.inputs],
        "output": [_tensor(tensor, batches) for tensor in stage.outputs],
        "instance_group": [{"count": 1, "kind": Enum("KIND_GPU" if gpu else "KIND_CPU")}],
    }
    assert serving.platform is not None
    if platform := PLATFORMS[serving.platform]:
        config |= {"platform": platform, "default_model_filename": file}
    else:
        config |= {"backend": "python"}
    if batches:
        config["dynamic_batching"] = {}
    return config


def nova_config(bundle: Bundle, serving: Serving) -> dict[str, Any]:
    """config.pbtxt of the model that streams frames."""
    of_request = inputs(bundle.config.is_class_conditional)
    gpu = serving.device != "cpu" and serving.stages == "in-process"
    parameters = {
        "device": serving.device,
        "stages": serving.stages,
        "threads": serving.threads,
        "max_latent_length": serving.max_latent_length,
    }
    return {
        "name": serving.name,
        "backend": "python",
        "max_batch_size": serving.max_batch,
        "model_transaction_policy": {"decoupled": True},
        "input": [
            {**_tensor(tensor), **({} if tensor.name == "prompt" else {"optional": True})}
            for tensor in of_request
        ],
        "output": [_tensor(tensor) for tensor in OUTPUTS],
        "instance_group": [{"count": serving.loops, "kind": Enum("KIND_GPU" if gpu else "KIND_CPU")}],
        "dynamic_batching": {
            "max_queue_delay_microseconds": round(serving.gather * MICROSECONDS),
            "default_queue_policy": {
                "timeout_action": Enum("REJECT"),
                "default_timeout_microseconds": round(serving.timeout * MICROSECONDS),
                "allow_timeout_override": True,
                "max_queue_size": serving.queue,
            },
        },
        "parameters": [
            {"key": key, "value": {"string_value": str(value)}} for key, value in parameters.items()
        ],
    }


def _tensor(tensor: Tensor, batched: bool = False) -> dict[str, Any]:
    """Within config.pbtxt. batched: its first axis is that of the batch, which Triton adds itself."""
    dims = [size if isinstance(size, int) else -1 for size in tensor.shape[batched:]]
    return {"name": tensor.name, "data_type": Enum(DATA_TYPES[tensor.dtype]), "dims": dims}


def _write_in_process(bundle: Bundle, serving: Serving, work: Path) -> None:
    version = _model(work, nova_config(bundle, serving), "nova_model.py")
    for path in ("manifest.json", *bundle.files):
        _copy(bundle.path(path), version / "bundle" / path)
    Bundle.open(version / "bundle").check_all()  # what was copied is what was built


def _write_models(bundle: Bundle, serving: Serving, work: Path) -> None:
    assert serving.device is not None
    specs = specs_on(bundle, serving.device)
    version = _model(work, nova_config(bundle, serving), "nova_model.py")
    if bundle.tokenizer:
        bundle.check(bundle.tokenizer)
        _copy(bundle.path(bundle.tokenizer), version / "tokenizer.json")
    kept = {
        "config": bundle.config.to_dict(),
        "tokenizer": bool(bundle.tokenizer),
        "lean_decode": bundle.lean_decode,
        "vae_tile": vae_tile_on(bundle, serving.device),
        "stages": {name: spec.to_dict() for name, spec in specs.items()},
    }
    (version / "nova.json").write_text(json.dumps(kept), encoding="utf-8")
    for name, spec in specs.items():
        _write_stage(bundle, serving, spec, bundle_files(bundle, serving.device, name), work)


def bundle_files(bundle: Bundle, device: str, stage: str) -> Sequence[str]:
    """Paths of what runs a stage; the first is loaded, and reads the others."""
    if device not in PROVIDERS:
        return (bundle.engines[device][stage].file,)
    entry = bundle.stages[stage]
    return (entry.graph, *(path for path in entry.files if path != entry.graph))


def _write_stage(bundle: Bundle, serving: Serving, spec: Stage, paths: Sequence[str], work: Path) -> None:
    main = Path(paths[0]).name
    source = "stage_model.py" if serving.platform == "python" else None
    version = _model(work, stage_config(spec, serving, main), source)
    bundle.check(*paths)
    if serving.device in PROVIDERS:
        bundle.check_stage(spec.name)
    for path in paths:
        _copy(bundle.path(path), version / Path(path).name)
    if source:
        kept = {"spec": spec.to_dict(), "graph": main, "device": serving.device, "threads": serving.threads}
        (version / "stage.json").write_text(json.dumps(kept), encoding="utf-8")


def _model(work: Path, config: dict[str, Any], source: str | None) -> Path:
    """A model's folder with its config and `model.py`; returns that of its version."""
    version = work / str(config["name"]) / VERSION
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(to_text(config), encoding="utf-8")
    if source:
        (version / "model.py").write_text((SOURCES / source).read_text(encoding="utf-8"), encoding="utf-8")
    return version


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _device_of(bundle: Bundle) -> str:
    if len(bundle.engines) > 1:
        raise UsageError(f"--device is missing: this bundle has engines for {', '.join(bundle.engines)}")
    if bundle.engines:
        return next(iter(bundle.engines))
    return "cuda" if bundle.target == "cuda" else "cpu"


def _platform_of(device: str) -> str:
    if device in PROVIDERS:
        return "onnxruntime" if device == "cuda" else "python"
    return "tensorrt" if find(TARGETS, device).runtime == "tensorrt" else "python"


def _check_platform(stages: str, platform: str, device: str) -> None:
    if stages not in STAGES:
        raise UsageError(f"stages {stages!r} is unknown; there is {', '.join(STAGES)}")
    if platform not in PLATFORMS:
        raise UsageError(f"platform {platform!r} is unknown; there is {', '.join(PLATFORMS)}")
    if stages != "models":
        return
    if (platform == "tensorrt") == (device in PROVIDERS):
        raise UsageError(
            f"platform {platform} does not run device {device}: tensorrt runs engines, the others "
            "graphs (cpu, cuda); engines of TensorRT-RTX need --stages in-process"
        )
    only_here = device == "rtx-ep" or (platform == "tensorrt" and find(TARGETS, device).runtime != "tensorrt")
    if only_here:
        raise UsageError(f"Triton has no backend for what runs on {device}; use --stages in-process")


def _check_out(out: Path, force: bool) -> None:
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder; make it first, or choose another place")
    if out.exists() and not (out / MARK).is_file():
        raise OutputError(f"{out}: exists and is no repository of nova-export; it will not be overwritten")
    if out.exists() and not force:
        raise OutputError(f"{out}: exists; give --force to replace it")
