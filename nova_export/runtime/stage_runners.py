"""The stages of a bundle on a device: whether they can run here, and their runners, opened when needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nova_export.bundle import Bundle, EngineEntry, StageEntry
from nova_export.child import GB, available_memory
from nova_export.demo import cache_file
from nova_export.engine.compatibility import check_engines
from nova_export.engine.compiler import STRIPPED
from nova_export.engine.flavour import machine_capability
from nova_export.errors import BundleError, DependencyError, MemoryShortage, UsageError
from nova_export.lean_stages import DECODE, DECODER
from nova_export.runtime.cuda import Gpu
from nova_export.runtime.ort_cuda import PROVIDERS, OrtCudaRunner
from nova_export.runtime.ort_rtx import OrtRtxRunner
from nova_export.runtime.rtx import RtxRunner
from nova_export.runtime.runner import OrtRunner, Runner
from nova_export.runtime.tensorrt import TensorRtRunner
from nova_export.spec import Stage
from nova_export.targets import TARGETS, find

RUNNERS: dict[str, Callable[[Stage, Path, int], Runner]] = {
    "cpu": OrtRunner,
    "cuda": OrtCudaRunner,
    "rtx-ep": OrtRtxRunner,
}


def choose_device(bundle: Bundle) -> str:
    """Where a bundle runs if nobody says: on the CPU where there is no GPU, or nothing was built for one.

    Raises BundleError where there is one, but none of the bundle's engines is for it.
    """
    if machine_capability() is None:
        return "cpu"
    if not bundle.engines:
        return "cuda" if bundle.target == "cuda" else "cpu"
    reasons = {}
    for target in bundle.engines:
        try:
            check_engines(bundle, target)
            return target
        except (BundleError, DependencyError) as error:
            reasons[target] = str(error)
    if len(reasons) == 1:
        raise BundleError(*reasons.values())
    raise BundleError("no engines of the bundle can run here: " + "; ".join(reasons.values()))


def specs_on(bundle: Bundle, device: str) -> dict[str, Stage]:
    """The stages within the limits of what runs them."""
    entries = bundle.stages if device in PROVIDERS else bundle.engines[device]
    return {name: entry.spec for name, entry in entries.items()}


def vae_tile_on(bundle: Bundle, device: str) -> int | None:
    """The largest side of what the decoder takes, in latents, where whole frames are larger."""
    first = next(name for name in bundle.specs() if name.startswith(DECODER))
    spec = specs_on(bundle, device)[first]
    side = max(spec.axis(name).max for name in ("latent_height", "latent_width"))
    return side if side < max(bundle.config.latent_size) else None


def graph_bytes(bundle: Bundle) -> dict[str, int]:
    """Size of the stages' graphs with their weights, by phase."""
    sizes: dict[str, int] = {}
    for stage in bundle.stages.values():
        sizes[stage.spec.phase] = sizes.get(stage.spec.phase, 0) + _graph_size(bundle, stage)
    return sizes


def _graph_size(bundle: Bundle, stage: StageEntry) -> int:
    return sum(bundle.files[path].size for path in stage.files)


def check_memory(bundle: Bundle, device: str, low_memory: bool, there: int | None) -> None:
    """Whether there is memory for what is known: weights, and the scratch memory that engines say they need.

    there: bytes that are free; None where nobody knows. Raises MemoryShortage, before any weights are read.
    """
    weights = graph_bytes(bundle)
    scratch = dict.fromkeys(weights, 0)
    if device not in PROVIDERS:
        for name, stage in bundle.stages.items():
            engine, phase = bundle.engines[device][name], stage.spec.phase
            scratch[phase] = max(scratch[phase], engine.activation_bytes or 0)
            if not is_stripped(engine):  # whose weights are the graph's
                weights[phase] += (engine.weight_bytes or 0) - _graph_size(bundle, stage)
    others = max(size for phase, size in scratch.items() if phase != DECODE)
    at_once = sum(weights.values()) + others + scratch[DECODE]  # which may run while one of them does
    least = max(weights[phase] + scratch[phase] for phase in weights)
    needed = least if low_memory else at_once
    if there is None or needed <= there:
        return
    way = "build it in fp16 or int8, or with --lean-decode"
    if least <= there and not low_memory:
        way = f"--low-memory needs {least / GB:.1f} GB"
    takes, free = f"{needed / GB:.1f} GB", f"{there / GB:.1f} GB"
    sizes = f"its engines take {takes}, and {free} of the GPU's memory are free"
    if device in PROVIDERS:
        sizes = f"its weights take {takes}, and {free} of memory are free"
    raise MemoryShortage(f"{bundle.folder}: {sizes}; {way}")


def is_stripped(engine: EngineEntry) -> bool:
    """Whether its weights are left out, and come from the graph when it is loaded."""
    return engine.made_of.get("weights") == STRIPPED


class StageRunners:
    """Runners of a bundle's stages, opened when first asked for, their files checked then.

    device: one of PROVIDERS for the graphs, or a target that the bundle has engines for. With `low_memory`
    only the stages of one phase are open at a time (text, image, frame, step, decode). cuda_graphs: of
    engines; there are none with `low_memory`, where no stage stays long enough to use them.

    Engines of the decode phase have a stream of their own, so that another thread may run them meanwhile.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str | None = None,
        threads: int = 0,
        low_memory: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        self.bundle, self.threads, self.low_memory = bundle, threads, low_memory
        self.cuda_graphs = cuda_graphs and not low_memory
        self.device = device or choose_device(bundle)
        if self.device in PROVIDERS:
            check_memory(bundle, self.device, low_memory, available_memory())
        elif device:  # what was chosen has been checked
            if device not in bundle.engines:
                there = ", ".join([*PROVIDERS, *bundle.engines])
                raise UsageError(
                    f"device {self.device!r}: this bundle runs on {there}; "
                    f"`nova-export engines {bundle.folder} --target TARGET` adds others"
                )
            check_engines(bundle, device)
        self._gpus: dict[bool, Gpu] = {}  # by whether it is the decoder's
        self._open: dict[str, Runner] = {}
        self._checked: set[str] = set()

    @property
    def vae_tile(self) -> int | None:
        """The largest side of what the decoder takes, in latents, where whole frames are larger."""
        return vae_tile_on(self.bundle, self.device)

    @property
    def decodes_meanwhile(self) -> bool:
        """Whether frames can be decoded while others are generated, and time is gained by it."""
        return self.device not in PROVIDERS and not self.low_memory

    def __call__(self, name: str) -> Runner:
        if name in self._open:
            return self._open[name]
        if self.low_memory:
            self.close(keep_phase=self.bundle.stages[name].spec.phase)
        runner = self._runner(name)
        self._checked.add(name)
        self._open[name] = runner.__enter__()
        return self._open[name]

    def _runner(self, name: str) -> Runner:
        entry, checked = self.bundle.stages[name], name in self._checked
        if self.device in PROVIDERS:
            if not checked:
                self.bundle.check_stage(name)
            return RUNNERS[self.device](entry.spec, self.bundle.path(entry.graph), self.threads)
        engine = self.bundle.engines[self.device][name]
        if not checked:
            self.bundle.check(engine.file)
        gpu = self._gpu(entry.spec.phase == DECODE)
        path, weights = self.bundle.path(engine.file), None
        if is_stripped(engine):
            self.bundle.check_stage(name)
            weights = self.bundle.path(entry.graph)
        if find(TARGETS, self.device).runtime == RtxRunner.runtime:
            kernels = kernel_file(self.bundle, engine)
            return RtxRunner(engine.spec, path, gpu, kernels, self.cuda_graphs, weights)
        return TensorRtRunner(engine.spec, path, gpu, self.cuda_graphs, weights)

    def _gpu(self, decodes: bool) -> Gpu:
        """Raises MemoryShortage where there is too little for the engines."""
        if decodes not in self._gpus:
            gpu = Gpu(yields=decodes)
            if not self._gpus:
                check_memory(self.bundle, self.device, self.low_memory, gpu.free_memory())
            self._gpus[decodes] = gpu
        return self._gpus[decodes]

    def close(self, keep_phase: str | None = None) -> None:
        """Free every open runner, but those of one phase if it is named, and what they computed in."""
        closed = [name for name, runner in self._open.items() if runner.stage.phase != keep_phase]
        for name in closed:
            self._open.pop(name).__exit__(None, None, None)
        if closed:
            for gpu in self._gpus.values():
                gpu.free_arena()


def kernel_file(bundle: Bundle, engine: EngineEntry) -> Path:
    """Where kernels of an engine are kept: by its contents, and version and GPU that it was made for."""
    made_of = f"{bundle.files[engine.file].sha256} {sorted(engine.made_of.items())}"
    return cache_file("kernels", made_of, ".bin")
