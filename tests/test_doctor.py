"""What `doctor` makes of machines: this one, a workstation, a Jetson, and one with nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from nova_export import doctor
from nova_export.doctor import Finding, examine
from nova_export.engine.flavour import FLAVOURS, Flavour
from tests.command_line import nova_export


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cuda_version", lambda: None)


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def silent(command: Sequence[str]) -> str:
    return ""


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {each.name: each for each in findings}


def test_a_workstation(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 65536000 kB\nMemAvailable: 32768000 kB\nSwapTotal: 2097152 kB\n",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\n",
        },
    )

    def run(command: Sequence[str]) -> str:
        return "NVIDIA GeForce RTX 4090, 8.9, 24564\nTesla V100, 7.0, 16160\n" if "smi" in command[0] else ""

    findings = examine(root, run)
    found = by_name(findings)
    assert found["memory"] == Finding("memory", "62.5 GiB, 31.2 GiB of it available")
    assert found["swap"].value == "2.0 GiB"
    assert found["NVIDIA driver"].value == "580.65.06, CUDA up to unknown" and not found["NVIDIA driver"].fix
    gpus = [each.value or "" for each in findings if each.name == "GPU"]
    assert gpus[0] == "NVIDIA GeForce RTX 4090, SM89, 24.0 GiB; target rtx-40, rtx-4090"
    assert "SM70" in gpus[1] and "no target of its own" in gpus[1]
    assert "Jetson" not in found


@pytest.mark.parametrize("has_cuda", [True, False])
def test_what_a_gpu_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_cuda: bool) -> None:
    monkeypatch.setattr(doctor, "_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(doctor, "_version", lambda each: "1.7" if each.module == "tensorrt_rtx" else None)
    monkeypatch.setitem(sys.modules, doctor.cuda.MODULE, ModuleType("runtime") if has_cuda else None)  # type: ignore[arg-type]
    gpu = "NVIDIA GeForce RTX 4090, 8.9, 24564\n"
    can_run = by_name(examine(tmp_path, lambda command: gpu if "smi" in command[0] else ""))["can run"]
    engines = ", engines with TensorRT-RTX" if has_cuda else ""
    assert can_run.value == f"bundles on the CPU, on the GPU with ONNX Runtime{engines}"
    assert ("cuda-bindings" in can_run.fix) is not has_cuda


def test_a_jetson(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "proc/meminfo": "MemTotal:        7802000 kB\nMemAvailable:    5000000 kB\nSwapTotal:  0 kB\n",
        },
    )
    found = by_name(examine(root, lambda c: "NV Power Mode: 15W\n0\n" if c[0] == "nvpmodel" else ""))
    assert found["Jetson"].value == "NVIDIA Jetson Orin Nano Developer Kit, Jetson Linux R36.4.3, JetPack 6"
    assert found["power mode"].value == "15W" and "nvpmodel -m 0" in found["power mode"].fix
    assert "--low-memory" in found["memory"].fix and found["swap"].value == "none"
    assert "nothing runs on a GPU" in found["NVIDIA driver"].fix


def test_a_machine_with_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line says what is missing and how to get it; none fails."""
    for name, each in FLAVOURS.items():
        monkeypatch.setitem(FLAVOURS, name, Flavour(each.name, "not_there_at_all", each.extra))

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(doctor.importlib, "import_module", missing)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    found = by_name(examine(tmp_path, silent))
    assert found["memory"].value is None and found["ONNX Runtime"].value is None
    assert "nova-export[export]" in found["export"].fix and "'torch'" in found["export"].fix
    assert "nova-export[rtx]" in found["TensorRT-RTX"].fix
    assert "NOVA_EXPORT_CACHE" in found["cache"].fix
    assert found["can build"].value == "nothing"


def test_a_command_that_is_not_there_or_fails() -> None:
    assert doctor.run_command(["no-such-command"]) == "" == doctor.run_command(["false"])
    assert doctor.run_command(["echo", "yes"]) == "yes\n"


def test_the_command() -> None:
    """On this machine, which has the base install at least."""
    result = nova_export("doctor")
    assert result.code == 0 and "ONNX Runtime" in result.out
    found = {each["name"]: each for each in json.loads(nova_export("doctor", "--json").out)}
    assert found["ONNX Runtime"]["value"] and found["memory"]["value"] and not found["ONNX Runtime"]["fix"]
