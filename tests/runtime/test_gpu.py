"""Runners on GPUs, over fakes of CUDA and TensorRT that run the graphs: what is copied, freed and refused."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nova_export
from nova_export.bundle import MANIFEST, Bundle
from nova_export.engine import flavour
from nova_export.errors import BundleError, DependencyError, MemoryShortage, StageError, UsageError
from nova_export.runtime import ort_rtx, stage_runners
from nova_export.runtime.cuda import Gpu
from nova_export.runtime.device_array import DeviceArray
from nova_export.runtime.ort_cuda import OrtCudaRunner
from nova_export.runtime.ort_rtx import OrtRtxRunner
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.runner import OrtRunner
from nova_export.runtime.stage_runners import choose_device
from nova_export.runtime.tensorrt import TensorRtRunner
from nova_export.stages import cache_names
from tests.runtime.fake_gpu import CAPABILITY, STRIPPED, TARGET, Machine, add_engines

CALL = {
    "prompt": "a red circle moving right",
    "max_latent_length": 3,
    "num_inference_steps": 2,
    "num_diffusion_steps": 2,
    "seed": 3,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOVA_EXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bundle with engines, which the fakes can run."""
    path = Path(shutil.copytree(golden_bundle("t2v"), tmp_path / "bundle"))
    add_engines(path)
    return path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Bundle:
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(bundle)


# TensorRT


@pytest.mark.parametrize(
    "options", [{}, {"aliases": True}, {"on_host": ("cache_length",)}, {"numbers_tensors": True}], ids=str
)
@pytest.mark.parametrize("low_memory", [False, True])
def test_engines_make_the_same_video(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], low_memory: bool
) -> None:
    expected = nova_export.load(bundle, device="cpu")(**CALL)
    machine = Machine(monkeypatch, **options)
    with nova_export.load(bundle, low_memory=low_memory) as pipe:
        actual = pipe(**CALL)
    np.testing.assert_array_equal(actual.latents, expected.latents)
    np.testing.assert_array_equal(actual.frames, expected.frames)
    assert low_memory or len(machine.trt.scratch) == 2  # all stages compute in the same, but the decoder
    assert machine.cuda.kept_after_free == 2**64 - 1
    del pipe
    gc.collect()
    assert not machine.cuda.live


def test_what_stages_pass_on_stays_on_the_gpu(bundle: Path, machine: Machine) -> None:
    """Caches, contexts and z are copied at no time but once, when they are still zeros of the host."""
    with nova_export.load(bundle) as pipe:
        config = pipe.config
        pipe(**CALL)
    uploads, rows, frames, steps = machine.cuda.uploads, 2, 3, 2
    capacity = config.condition_tokens + frames * config.frame_tokens
    width = 4 * rows * config.temporal.width
    assert uploads.count(width * capacity) == len(cache_names(config))
    assert uploads.count(width * config.frame_tokens) == (1 if config.mixer_rank is not None else 0)
    z = 4 * rows * (config.num_tokens // steps) * config.spatial.width
    assert z not in uploads


def test_the_decoder_has_a_stream_that_yields_to_the_other(bundle: Path, machine: Machine) -> None:
    """So that the next frame is not held up by what is decoded meanwhile."""
    with nova_export.load(bundle) as pipe:
        expected = nova_export.load(bundle, device="cpu")(**{**CALL, "max_latent_length": 6}).frames
        np.testing.assert_array_equal(pipe(**{**CALL, "max_latent_length": 6}).frames, expected)
        assert pipe.decodes_meanwhile
    decoder, loops = sorted(machine.trt.ran_on, key=lambda stream: len(machine.trt.ran_on[stream]))
    assert machine.trt.ran_on[decoder] == {"pixels"} and "pixels" not in machine.trt.ran_on[loops]
    least, most = machine.cuda.cudaDeviceGetStreamPriorityRange()[1:]
    assert machine.cuda.priorities == {decoder: least, loops: most}
    assert not nova_export.load(bundle, low_memory=True).decodes_meanwhile
    assert not nova_export.load(bundle, device="cpu").decodes_meanwhile


@pytest.mark.parametrize("batch", [1, 2])
def test_a_frame_is_waited_for_once(bundle: Path, machine: Machine, batch: int) -> None:
    """Its tokens stay on the GPU from set to set, and come back when all are there, or somebody looks."""
    call = {**CALL, "num_inference_steps": 4, "num_images_per_prompt": batch}
    with nova_export.load(bundle) as pipe:
        latents, texts, frames = pipe(**call).latents, 1, 3  # the negative one is empty
        before, known = machine.cuda.waits, []
        for _ in pipe.stream(**call, callback=lambda step: known.append(machine.cuda.waits)):
            pass
        assert known[-1] - before == texts + frames - 1  # and the last frame when it is decoded
        assert len(known) == 4 * frames and len(set(known)) == frames
        looked: list[Any] = []
        again = pipe(**call, callback=lambda step: looked.append(step.latents))
    np.testing.assert_array_equal(again.latents, latents)
    filled = [np.count_nonzero(each) for each in looked[:4]]
    assert filled == sorted(filled) and filled[0] < filled[-1]
    np.testing.assert_array_equal(looked[3], latents[:, :, 0])


@pytest.mark.parametrize(
    ("made_of", "words"),
    [
        ({"version": "1.2.2"}, "version was '1.2.2', is '1.2.3'"),
        ({"compute capability": "12.0"}, "compute capability was '12.0', is '8.9'"),
        ({"runtime": "TensorRT"}, "runtime was 'TensorRT', is 'TensorRT-RTX'"),
    ],
)
def test_engines_of_other_machines_are_not_loaded(
    golden_bundle: Callable[[str], Path],
    tmp_path: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    made_of: dict[str, str],
    words: str,
) -> None:
    path = Path(shutil.copytree(golden_bundle("t2v"), tmp_path / "bundle"))
    add_engines(path, **made_of)
    monkeypatch.setattr(machine.trt, "Runtime", None)  # it would fail
    for device in (None, TARGET):
        with pytest.raises(BundleError, match=words) as caught:
            nova_export.load(path, device=device)
        assert f"nova-export engines {path} --target {TARGET}" in str(caught.value)
        assert "--device cpu" in str(caught.value)
    nova_export.load(path, device="cpu")


@pytest.mark.parametrize("target", [TARGET, "tensorrt"])
def test_stripped_engines_get_their_weights_from_the_graphs(
    golden_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    path = Path(shutil.copytree(golden_bundle("t2v"), tmp_path / "bundle"))
    add_engines(path, target, weights="stripped")
    expected = nova_export.load(path, device="cpu")(**CALL)
    Machine(monkeypatch, target)
    np.testing.assert_array_equal(nova_export.load(path)(**CALL).frames, expected.frames)

    weights = sum(file.stat().st_size for file in path.glob("*.onnx.data"))
    short = Machine(monkeypatch, target)
    short.cuda.memory = weights  # TensorRT says that the engines themselves hold none
    with pytest.raises(MemoryShortage, match="its engines take"):
        nova_export.load(path)(**CALL)

    data = path / "condition.onnx.data"
    data.write_bytes(data.read_bytes()[::-1])
    Machine(monkeypatch, target)
    with pytest.raises(BundleError, match=r"condition\.onnx\.data: was changed"):
        nova_export.load(path)(**CALL)


def test_weights_that_an_engine_does_not_take(
    golden_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, "tensorrt")
    engine, stage = tmp_path / "engine", Bundle.open(golden_bundle("t2v")).stages["condition"].spec
    engine.write_bytes(STRIPPED)
    runner = TensorRtRunner(stage, engine, Gpu(), weights=tmp_path / "no graph")
    with pytest.raises(BundleError, match="no graph is no graph"), runner:
        pass


def test_a_missing_engine_is_named(bundle: Path, machine: Machine) -> None:
    edit(bundle, lambda manifest: manifest["engines"][TARGET].pop("vae_decoder"))
    with pytest.raises(BundleError, match="has no engine of vae_decoder for rtx-40"):
        nova_export.load(bundle)


def test_an_engine_that_was_changed_is_not_loaded(bundle: Path, machine: Machine) -> None:
    file = bundle / "engines" / "condition.engine"
    file.write_bytes(file.read_bytes().swapcase())
    with pytest.raises(BundleError, match="was changed"):
        nova_export.load(bundle)(**CALL)


def test_what_tensorrt_says_is_passed_on(bundle: Path, machine: Machine) -> None:
    edit(bundle, lambda manifest: manifest["files"].update(damaged(bundle / "engines/text_encoder.engine")))
    with pytest.raises(BundleError, match=r"text_encoder.engine: TensorRT-RTX 1.2.3 .*magic tag"):
        nova_export.load(bundle)(**CALL)
    machine.trt.fails = "an illegal memory access"
    stage = Bundle.open(bundle).stages["condition"].spec
    with pytest.raises(StageError, match="stage condition: TensorRT-RTX failed: an illegal memory access"):
        pipe = nova_export.load(bundle)
        runner = pipe._stage("condition")
        sizes = {axis.name: axis.opt for axis in stage.axes}
        shapes = stage.shapes(sizes)
        runner.run({t.name: np.zeros(shapes[t.name], t.dtype) for t in stage.inputs})


def damaged(engine: Path) -> dict[str, Any]:
    from nova_export.bundle import file_entry

    engine.write_bytes(b"no engine")
    return {f"engines/{engine.name}": file_entry(engine)}


def test_too_little_memory_is_said_with_a_way_out(bundle: Path, machine: Machine) -> None:
    machine.cuda.memory = 1 << 16
    with pytest.raises(StageError, match=r"allocating \d+ MiB: out of memory.*--low-memory"):
        nova_export.load(bundle)(**CALL)


@pytest.mark.parametrize(
    ("free", "low_memory", "words"),
    [
        (10, False, None),
        (8, False, r"its engines take 9.0 GB, and 8.0 GB of the GPU's memory.*--low-memory needs 6.0 GB"),
        (7, True, None),
        (5, True, r"its engines take 6.0 GB, and 5.0 GB .*--lean-decode"),
    ],
)
def test_engines_that_do_not_fit_are_not_loaded(
    bundle: Path, machine: Machine, free: int, low_memory: bool, words: str | None
) -> None:
    """Weights of 1, 1 and 2 GB in three phases, scratch of 4 GB of the decoder and 1 GB of the others."""

    def sized(manifest: dict[str, Any]) -> None:
        engines = manifest["engines"][TARGET]
        for name, weights in (("text_encoder", 1), ("spatial_encoder", 1), ("vae_decoder", 2)):
            engines[name]["weight_bytes"] = weights * 10**9
        for name, scratch in (("temporal_encoder", 1), ("spatial_encoder", 1), ("vae_decoder", 4)):
            engines[name]["activation_bytes"] = scratch * 10**9

    edit(bundle, sized)
    machine.cuda.memory = free * 10**9
    pipe = nova_export.load(bundle, low_memory=low_memory)
    if words is None:
        pipe(**CALL)
        return
    with pytest.raises(MemoryShortage, match=words):
        pipe(**CALL)
    assert not machine.cuda.uploads


# Arrays


def test_arrays_come_back_as_they_went(machine: Machine) -> None:
    gpu, array = Gpu(), np.arange(6, dtype=np.float32).reshape(2, 3)
    held = gpu.upload(array.T)  # not contiguous
    array[:] = 0
    np.testing.assert_array_equal(np.asarray(held), np.arange(6).reshape(2, 3).T)
    again = held.reshape(2, -1)
    del held
    gc.collect()
    assert again.shape == (2, 3) and np.asarray(again).tolist() == [[0, 3, 1], [4, 2, 5]]
    with pytest.raises(ValueError, match="no shape"):
        again.reshape(4, -1)
    assert np.asarray(gpu.upload(np.zeros((2, 0), np.int64))).shape == (2, 0)


def test_scratch_grows_and_is_never_there_twice(machine: Machine) -> None:
    gpu = Gpu()
    first = gpu.arena(100)
    assert gpu.arena(50) == first
    assert gpu.arena(200) != first
    assert [len(memory) for memory in machine.cuda.live.values()] == [200]
    gpu.free_arena()
    assert not machine.cuda.live and gpu.arena(10)


def test_what_phases_compute_in_goes_with_them(bundle: Path, machine: Machine) -> None:
    """The decoder's scratch is the largest: the next video's text encoder has no room beside it."""
    with nova_export.load(bundle, low_memory=True) as pipe:
        latents = np.zeros((1, pipe.config.latent_channels, 1, *pipe.config.latent_size), np.float32)
        pipe.decode(latents)
    assert not machine.cuda.live


# Which device


def test_the_device_is_the_engines_where_they_can_run(bundle: Path, machine: Machine) -> None:
    opened = Bundle.open(bundle)
    assert choose_device(opened) == TARGET
    machine.has(None)
    assert choose_device(opened) == "cpu"
    machine.has(CAPABILITY)
    assert choose_device(edit(bundle, lambda manifest: manifest.pop("engines"))) == "cpu"
    assert choose_device(edit(bundle, lambda manifest: manifest.update(target="cuda"))) == "cuda"


def test_the_first_target_that_fits_is_taken(bundle: Path, machine: Machine) -> None:
    def others(manifest: dict[str, Any]) -> None:
        entries = json.loads(json.dumps(manifest["engines"][TARGET]))
        for entry in entries.values():
            entry["made_of"]["compute capability"] = "12.0"
        manifest["engines"] = {"rtx-50": entries, **manifest["engines"]}

    opened = edit(bundle, others)
    assert choose_device(opened) == TARGET
    machine.has("12.0")
    assert choose_device(opened) == "rtx-50"
    machine.has("8.6")
    with pytest.raises(BundleError, match=r"was '12.0', is '8.6'.*was '8.9', is '8.6'"):
        choose_device(opened)


def test_a_device_that_is_not_there(bundle: Path, machine: Machine) -> None:
    with pytest.raises(UsageError, match="device 'rtx-50': this bundle runs on cpu, cuda, rtx-ep, rtx-40"):
        nova_export.load(bundle, device="rtx-50")
    machine.has(None)
    with pytest.raises(UsageError, match="rtx-40: there is no NVIDIA GPU in this machine; --device cpu"):
        nova_export.load(bundle, device=TARGET)


def test_without_tensorrt_or_cuda_python(
    bundle: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(DependencyError, match="cuda-bindings"):
        nova_export.load(bundle)(**CALL)
    missing = flavour.Flavour("TensorRT-RTX", "tensorrt_that_is_not_there", "rtx")
    monkeypatch.setitem(flavour.FLAVOURS, "tensorrt-rtx", missing)
    with pytest.raises(DependencyError, match=r"nova-export\[rtx\]"):
        nova_export.load(bundle, device=TARGET)


def test_without_a_driver_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real cuda-python."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("this machine has a GPU")
    with pytest.raises(StageError, match=r"CUDA failed in .*driver"):
        Gpu()


# ONNX Runtime


def test_graphs_bound_to_memory_make_the_same_video(golden_bundle: Callable[[str], Path]) -> None:
    """What runs on GPUs, on the CPU's provider: aliased outputs in place, the others passed on unread."""
    opened = Bundle.open(golden_bundle("t2v"))
    runners: dict[str, Any] = {}

    def stage(kind: Callable[..., Any]) -> Callable[[str], Any]:
        def get(name: str) -> Any:
            entry = opened.stages[name]
            key = f"{kind} {name}"
            if key not in runners:
                runners[key] = kind(entry.spec, opened.path(entry.graph)).__enter__()
            return runners[key]

        return get

    def bound(spec: Any, path: Path) -> OrtCudaRunner:
        return OrtCudaRunner(spec, path, device="cpu")

    expected, actual = (Pipeline.over(opened, stage(kind))(**CALL) for kind in (OrtRunner, bound))
    np.testing.assert_array_equal(actual.latents, expected.latents)
    np.testing.assert_array_equal(actual.frames, expected.frames)


def test_aliased_outputs_are_the_memory_of_their_inputs(golden_bundle: Callable[[str], Path]) -> None:
    entry = Bundle.open(golden_bundle("t2v")).stages["temporal_encoder"]
    shapes = entry.spec.shapes({axis.name: axis.opt for axis in entry.spec.axes})
    inputs = {t.name: np.zeros(shapes[t.name], t.dtype) for t in entry.spec.inputs}
    with OrtCudaRunner(entry.spec, golden_bundle("t2v") / entry.graph, device="cpu") as runner:
        first = runner.run(inputs)
        caches = {t.alias: first[t.name] for t in entry.spec.outputs if t.alias}
        second = runner.run({**inputs, **caches})
    assert all(isinstance(array, DeviceArray) for array in first.values())
    for tensor in entry.spec.outputs:
        if tensor.alias:
            assert second[tensor.name].pointer == caches[tensor.alias].pointer


class FakePlugin:
    """The plugin of TensorRT-RTX, by name ONNX Runtime's own provider for CPUs, so that it has devices."""

    def __init__(self, name: str = "CPUExecutionProvider", library: str = "plugin.so") -> None:
        self.name, self.library = name, library
        self.registered: list[tuple[str, str]] = []
        self.fails = ""

    def get_ep_name(self) -> str:
        return self.name

    def get_library_path(self) -> str:
        return self.library

    def register(self, name: str, library: str) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        self.registered.append((name, library))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> FakePlugin:
    import onnxruntime

    made = FakePlugin()
    monkeypatch.setitem(sys.modules, ort_rtx.PLUGIN, made)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", made.register)
    monkeypatch.setattr(ort_rtx, "_registered", set())
    return made


def test_a_plugin_of_onnx_runtime_makes_the_same(
    golden_bundle: Callable[[str], Path], plugin: FakePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is registered once; sessions are made for its devices, and for no providers by name."""
    path = golden_bundle("t2v")
    expected = nova_export.load(path, device="cpu")(**CALL)
    monkeypatch.setitem(stage_runners.RUNNERS, "rtx-ep", partial(OrtRtxRunner, device="cpu"))
    actual = nova_export.load(path, device="rtx-ep")(**CALL)
    np.testing.assert_array_equal(actual.frames, expected.frames)
    assert plugin.registered == [("CPUExecutionProvider", "plugin.so")]


def test_no_plugin_no_driver_no_gpu(
    golden_bundle: Callable[[str], Path], plugin: FakePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(words: str) -> None:
        with pytest.raises(DependencyError, match=words):
            nova_export.load(golden_bundle("t2i"), device="rtx-ep")("a")

    plugin.fails = "libcuda.so.1: cannot open shared object file"
    refused(r"cannot load the plugin of TensorRT-RTX: libcuda\.so\.1.*needs an RTX GPU")
    plugin.fails, plugin.name = "", "NvTensorRTRTXExecutionProvider"
    refused("finds no GPU")
    monkeypatch.setitem(sys.modules, ort_rtx.PLUGIN, None)
    refused(r"no plugin of TensorRT-RTX.*pip install 'nova-export\[rtx-ep\]'")


def test_an_onnx_runtime_for_cpus_alone_is_refused(golden_bundle: Callable[[str], Path]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is for CUDA")
    with pytest.raises(DependencyError, match="onnxruntime-gpu"):
        nova_export.load(golden_bundle("t2i"), device="cuda")("a")


def test_a_silent_fallback_to_the_cpu_is_refused(
    golden_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime only warns where its CUDA cannot start."""
    import onnxruntime

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: fallen)
    with pytest.raises(StageError, match=r"cannot use the GPU.*--device cpu"):
        nova_export.load(golden_bundle("t2i"), device="cuda")("a")
