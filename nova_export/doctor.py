"""What this machine is and has, what of it nova-export can use, and how to get what is missing.

Reads files and asks nvidia-smi; changes nothing. Both can be replaced, for machines that are not here.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_export import __version__
from nova_export.child import system_memory
from nova_export.demo import cache_folder
from nova_export.engine.flavour import FLAVOURS, Flavour
from nova_export.errors import DependencyError
from nova_export.runtime import cuda
from nova_export.runtime.ort_cuda import PROVIDERS
from nova_export.targets import TARGETS

Run = Callable[[Sequence[str]], str]  # a command's standard output; empty where it fails or is not there

GIB = 1 << 30
LEAST_MEMORY = 8 * GIB  # below it full-size checkpoints need --low-memory: README, "How fast"
LEAST_SPACE = 20 * GIB  # of a full-size bundle in fp32, with what a build keeps meanwhile
JETPACK = {"R35": "5", "R36": "6", "R38": "7"}  # by release of Jetson Linux


@dataclass(frozen=True)
class Finding:
    """value: what was found, None for nothing. fix: what to do about it, empty if all is well."""

    name: str
    value: str | None
    fix: str = ""


def run_command(command: Sequence[str]) -> str:
    """Its standard output; empty where it fails, hangs or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def examine(root: Path = Path("/"), run: Run = run_command) -> list[Finding]:
    """Everything, in the order of a reader's questions. root: of the files of the system."""
    gpus, export = _gpus(run), _export()
    versions = {name: _version(each) for name, each in FLAVOURS.items()}
    return [
        Finding("nova-export", f"{__version__}, Python {platform.python_version()}"),
        Finding("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"),
        *_memory(root),
        _space(),
        *_jetson(root, run),
        _driver(root, gpus),
        *gpus,
        _onnxruntime(),
        _video(),
        export,
        *_flavours(versions),
        *_abilities(gpus, export, versions),
    ]


def _memory(root: Path) -> Iterator[Finding]:
    sizes = system_memory(root / "proc/meminfo")
    if "MemTotal" not in sizes:
        yield Finding("memory", None, "this system does not tell")
        return
    total, free = sizes["MemTotal"], sizes.get("MemAvailable", 0)
    low = "full-size checkpoints need `run --low-memory`" if total < LEAST_MEMORY else ""
    yield Finding("memory", f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB of it available", low)
    swap = sizes.get("SwapTotal", 0)
    yield Finding("swap", f"{swap / GIB:.1f} GiB" if swap else "none")


def _space() -> Finding:
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    fix = "too little for a full-size bundle" if free < LEAST_SPACE else ""
    if not os.access(there, os.W_OK):
        fix = "is not writable: name another folder in NOVA_EXPORT_CACHE"
    return Finding("cache", f"{folder}, {free / GIB:.1f} GiB free", fix)


def _jetson(root: Path, run: Run) -> Iterator[Finding]:
    release = re.match(r"# (R\d+).*REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    if not release:
        return
    model = _read(root / "proc/device-tree/model").strip("\0\n ") or "unknown model"
    jetpack = JETPACK.get(release[1])
    yield Finding(
        "Jetson", f"{model}, Jetson Linux {release[1]}.{release[2]}, JetPack {jetpack or 'unknown'}"
    )
    mode = re.search(r"NV Power Mode: (\S+)", run(["nvpmodel", "-q"]))
    slow = mode is not None and mode[1] != "MAXN"
    yield Finding(
        "power mode", mode[1] if mode else None, "`sudo nvpmodel -m 0` is the fastest" if slow else ""
    )


def _driver(root: Path, gpus: list[Finding]) -> Finding:
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _read(root / "proc/driver/nvidia/version"))
    cuda = _cuda_version()
    if not found and not cuda:
        return Finding("NVIDIA driver", None, "without it nothing runs on a GPU; engines can be compiled")
    text = f"{found[1] if found else 'of unknown version'}, CUDA up to {cuda or 'unknown'}"
    fix = "" if gpus else "nvidia-smi finds no GPU: is it passed into this container?"
    return Finding("NVIDIA driver", text, fix)


def _cuda_version() -> str | None:
    """The latest CUDA that the driver knows."""
    try:
        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _gpus(run: Run) -> list[Finding]:
    asked = "--query-gpu=name,compute_cap,memory.total"
    found = []
    for line in run(["nvidia-smi", asked, "--format=csv,noheader,nounits"]).splitlines():
        name, capability, memory = (part.strip() for part in line.split(","))
        targets = [each.name for each in TARGETS if each.compute_capability == capability]
        fit = f"target {', '.join(targets)}" if targets else "no target of its own; `tensorrt` may do"
        size = f"{int(memory) / 1024:.1f} GiB" if memory.isdigit() else "memory shared with the system"
        found.append(Finding("GPU", f"{name}, SM{capability.replace('.', '')}, {size}; {fit}"))
    return found


def _onnxruntime() -> Finding:
    try:
        ort: Any = importlib.import_module("onnxruntime")
        providers = [name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()]
        return Finding("ONNX Runtime", f"{ort.__version__}, for {', '.join(providers)}")
    except (ImportError, AttributeError) as error:  # its files overlaid by another build's
        return Finding("ONNX Runtime", None, f"{error}; pip install --force-reinstall onnxruntime")


def _video() -> Finding:
    try:
        av: Any = importlib.import_module("av")
        fix = "" if "libx264" in av.codecs_available else "no H.264 encoder: write .gif, or pip install av"
        return Finding("video files", f"PyAV {av.__version__}", fix)
    except ImportError as error:
        return Finding("video files", None, f"{error}; pip install av")


def _export() -> Finding:
    try:
        torch: Any = importlib.import_module("torch")
        for name in ("onnx", "onnxscript", "onnx_ir", "transformers", "diffusers", "safetensors"):
            importlib.import_module(name)
        return Finding("export", f"PyTorch {torch.__version__}")
    except ImportError as error:
        return Finding("export", None, f"{error}; to build bundles: pip install 'nova-export[export]'")


def _version(flavour: Flavour) -> str | None:
    try:
        return str(flavour.load().__version__)
    except DependencyError:
        return None


def _flavours(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    for name, each in FLAVOURS.items():
        fix = "" if versions[name] else f"to compile engines: pip install 'nova-export[{each.extra}]'"
        yield Finding(each.name, versions[name], fix)


def _abilities(gpus: list[Finding], export: Finding, versions: Mapping[str, str | None]) -> Iterator[Finding]:
    engines = [
        each.name
        for each in TARGETS
        if each.runtime and versions[each.runtime] and (each.compute_capability or gpus)
    ]
    can = ["bundles"] if export.value else []
    can += [f"engines for {', '.join(engines)}"] if engines else []
    yield Finding("can build", "; ".join(can) or "nothing")
    runs = ["bundles on the CPU"]
    if gpus and PROVIDERS["cuda"] in _providers():
        runs.append("on the GPU with ONNX Runtime")
    if gpus and _has_cuda_python():
        runs += [f"engines with {FLAVOURS[name].name}" for name, version in versions.items() if version]
    fix = "" if not gpus or _has_cuda_python() else "to run engines: pip install 'cuda-bindings>=12.8'"
    yield Finding("can run", ", ".join(runs), fix)


def _providers() -> list[str]:
    try:
        ort: Any = importlib.import_module("onnxruntime")
        return list(ort.get_available_providers())
    except (ImportError, AttributeError):
        return []


def _has_cuda_python() -> bool:
    try:
        importlib.import_module(cuda.MODULE)
    except ImportError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
