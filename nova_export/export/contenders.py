"""What `bench` compares: one stage, at one size, ready to be run again and again, in each of its forms.

- onnx: the bundle's graph on its runtime, as the pipeline calls it.
- module: the stage's reference module in eager torch, which does the same work.
- compiled: that module under torch.compile.
- published: what the published pipeline does in this stage's place, from the eager pipeline: the diffusion
  head one step at a time over all N tokens, the spatial encoder over all N tokens, caches by concatenation.

On a GPU torch computes in float16, and every run waits until its results are there. Must not know time or
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nova_export.bundle import Bundle
from nova_export.errors import UsageError
from nova_export.export.verify import sample_inputs
from nova_export.runtime.runner import Array, Held, Runner
from nova_export.runtime.stage_runners import StageRunners
from nova_export.spec import Stage
from reference_model.checkpoint import load_module
from reference_model.eager import Memory, denoise, encode_frame, encode_tokens
from reference_model.guidance import Guider
from reference_model.schedulers import make_scheduler

KINDS = ("onnx", "module", "published", "compiled")
PUBLISHED = (
    "temporal_encoder",
    "spatial_encoder",
    "diffusion_head",
)  # where it does other work than the module

Run = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """One stage of a bundle, the sizes of its axes, and the checkpoint it came from, if there is one."""

    bundle: Bundle
    stage: Stage
    sizes: Mapping[str, int]
    checkpoint: Path | None = None

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        name: str,
        wanted: Mapping[str, int],
        checkpoint: Path | None = None,
    ) -> Subject:
        """Sizes that are not `wanted` are what the spec is tuned for. Raises UsageError."""
        if name not in bundle.stages:
            raise UsageError(f"stage {name!r} is not in the bundle; it has {', '.join(bundle.stages)}")
        stage = bundle.stages[name].spec
        if checkpoint is not None and bundle.specs().get(name) != stage:
            raise UsageError(f"stage {name}: the bundle was built by another nova-export; build it again")
        return cls(bundle, stage, stage_sizes(stage, wanted), checkpoint)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The forms that this stage has."""
        if self.checkpoint is None:
            return KINDS[:1]
        return tuple(kind for kind in KINDS if kind != "published" or self.stage.name in PUBLISHED)

    def inputs(self) -> dict[str, Array]:
        """Random inputs of these sizes, the same every time; the temporal encoder's caches full."""
        inputs = sample_inputs(self.stage, self.bundle.config, self.sizes, seed=0)
        if "cache_length" in inputs:
            new = self.sizes["text"] + self.bundle.config.frame_tokens
            inputs["cache_length"][0] = self.sizes["capacity"] - new
        return inputs


def stage_sizes(stage: Stage, wanted: Mapping[str, int]) -> dict[str, int]:
    """A size for every axis. `rows` also sets the head's passes (2 where it can) and samples.

    Raises UsageError for a size that the axis does not allow.
    """
    wanted = dict(wanted)
    if rows := wanted.get("rows"):
        wanted.setdefault("passes", 2 if rows % 2 == 0 else 1)
        wanted.setdefault("samples", rows // wanted["passes"])
    sizes = {axis.name: wanted.get(axis.name, axis.opt) for axis in stage.axes}
    for axis in stage.axes:
        if not axis.min <= sizes[axis.name] <= axis.max:
            raise UsageError(
                f"stage {stage.name}: {axis.name} is {sizes[axis.name]}; it must be {axis.min} to {axis.max}"
            )
    return sizes


@contextmanager
def contenders(
    kinds: Sequence[str],
    subject: Subject,
    inputs: Mapping[str, Array],
    threads: int = 0,
    device: str = "cpu",
    cuda_graphs: bool = True,
) -> Iterator[dict[str, Run]]:
    """These forms of the stage, loaded; at the end their weights are freed. Those in torch share one module.

    threads 0: as many as each library likes. device, cuda_graphs: as of `StageRunners`.
    """
    bundle, stage = subject.bundle, subject.stage
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        if "onnx" in kinds:
            runners = StageRunners(bundle, device, threads, cuda_graphs=cuda_graphs)
            stack.callback(runners.close)
            runs["onnx"] = on_runner(runners(stage.name), inputs)
        if in_torch := [kind for kind in kinds if kind != "onnx"]:
            assert subject.checkpoint is not None
            if threads:
                torch.set_num_threads(threads)
            stack.enter_context(torch.inference_mode())
            module = load_module(stage, bundle.config, subject.checkpoint)
            where = TorchDevice.of(device)
            stack.enter_context(torch.device(where.device))
            module, tensors = module.to(where.device, where.dtype), where.tensors(inputs)
            for kind in in_torch:
                runs[kind] = where.waiting(in_torch_form(kind, subject, module, tensors))
        yield runs


def on_runner(runner: Runner, inputs: Mapping[str, Array]) -> Run:
    """As the pipeline calls it: what the stage writes in place stays where it is from call to call."""
    held: dict[str, Held] = dict(inputs)

    def run() -> None:
        outputs = runner.run(held)
        held.update((tensor.alias, outputs[tensor.name]) for tensor in runner.stage.outputs if tensor.alias)
        np.asarray(min(outputs.values(), key=lambda output: output.nbytes))  # waits for a GPU

    return run


@dataclass(frozen=True)
class TorchDevice:
    """Where torch computes, and in which number type."""

    device: str
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str) -> TorchDevice:
        """For a device of `StageRunners`."""
        return cls("cpu", torch.float32) if device == "cpu" else cls("cuda", torch.float16)

    def tensors(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """Copies, where they are not there already."""
        made = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        return {
            name: each.to(self.dtype) if each.is_floating_point() else each for name, each in made.items()
        }

    def waiting(self, run: Run) -> Run:
        """The run, over when its results are there."""

        def wait() -> None:
            run()
            torch.cuda.synchronize()

        return run if self.device == "cpu" else wait


def in_torch_form(kind: str, subject: Subject, module: nn.Module, inputs: Mapping[str, Tensor]) -> Run:
    """The module itself, compiled, or the published form in its place."""
    if kind == "published":
        return published(subject, module, inputs)
    call = torch.compile(module) if kind == "compiled" else module
    return lambda: call(**inputs)


def published(subject: Subject, module: nn.Module, inputs: Mapping[str, Tensor]) -> Run:
    """The published form of a stage on inputs of the same sizes."""
    make: dict[str, Callable[..., Run]] = {
        "temporal_encoder": _published_temporal_encoder,
        "spatial_encoder": _published_spatial_encoder,
        "diffusion_head": _published_head,
    }
    return make[subject.stage.name](subject, module, inputs)


def _guider(passes: int) -> Guider:
    return Guider(
        scale=5.0 if passes > 1 else 1.0,
        final=5.0,
        least=5.0,
        trunc=0.0,
        renorm=1.0,
        image=0.0,
        spatiotemporal=1.0 if passes > 2 else 0.0,
    )


def _passes(rows: int) -> int:
    return 2 if rows % 2 == 0 else 1


def _published_temporal_encoder(subject: Subject, module: Any, inputs: Mapping[str, Tensor]) -> Run:
    """A frame behind the same number of cached rows, caches grown by concatenation."""
    passes, filled = _passes(subject.sizes["rows"]), int(inputs["cache_length"])
    latents = inputs["latents"][: len(inputs["latents"]) // passes]
    heads = module.video_encoder.blocks[0].attn.split_heads
    caches = [
        (heads(inputs[f"key_cache_{i}"][:, :filled]), heads(inputs[f"value_cache_{i}"][:, :filled]))
        for i in range(len(module.video_encoder.blocks))
    ]

    def run() -> Tensor:
        memory = Memory(list(caches) if filled else [], inputs.get("first_context") if filled else None)
        time = inputs["frame_position"]
        return encode_frame(module, _guider(passes), memory, latents, inputs["text"], time)

    return run


def _published_spatial_encoder(subject: Subject, module: Any, inputs: Mapping[str, Tensor]) -> Run:
    """z of all N tokens."""
    config, passes = subject.bundle.config, _passes(subject.sizes["rows"])
    samples = subject.sizes["rows"] // passes
    known = inputs["predicted_ids"][:samples, :, None]
    tokens = inputs["tokens"].new_zeros(samples, config.num_tokens, config.token_dim)
    tokens.scatter_(1, known.expand(-1, -1, config.token_dim), inputs["tokens"][:samples])
    latents = module.image_encoder.patch_embed.unpatchify(tokens, config.token_grid)
    return lambda: encode_tokens(module, _guider(passes), latents, inputs["context"], known)


def _published_head(subject: Subject, module: Any, inputs: Mapping[str, Tensor]) -> Run:
    """Each diffusion step: all N tokens of every pass embedded, K predicted, scheduler on the full latent."""
    config, sizes = subject.bundle.config, subject.sizes
    rng = np.random.default_rng(1)
    z = rng.standard_normal((sizes["passes"] * sizes["samples"], config.num_tokens, config.spatial.width))
    ids = np.stack([rng.permutation(config.num_tokens)[: sizes["next"]] for _ in range(sizes["samples"])])
    like = inputs["noise"]
    noise = torch.randn(sizes["samples"], config.latent_channels, *config.latent_size).to(like)
    scheduler = make_scheduler(config.scheduler, sizes["steps"])
    all_z, now = torch.from_numpy(z).to(like), torch.from_numpy(ids).to(like.device)[..., None]
    guider = _guider(sizes["passes"])

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape)).to(like)

    return lambda: denoise(module, guider, scheduler, all_z, noise, now, draw)
