"""benchmarks/gpu_check.py without a GPU: that it says so; and that one check which fails stops no other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nova_export.engine.flavour import FLAVOURS, Flavour, machine_capability

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_without_a_gpu_it_says_so(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if machine_capability() is not None:
        pytest.skip("this machine has a GPU")
    script.main([])
    [line] = lines(capsys)
    assert line["check"] == "gpu" and "no NVIDIA GPU" in line["skipped"]


def test_what_fails_is_a_line_and_the_others_go_on(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here TensorRT proper is missing, ONNX Runtime has no CUDA, and RTX's engines run but do not compile."""
    called: list[list[str]] = []

    def command(*arguments: object) -> Any:
        words = [str(each) for each in arguments]
        called.append(words)
        if "--compile" in words or ("cuda" in words and words[0] != "build"):
            raise subprocess.CalledProcessError(8, words, stderr="notice\nerror: it failed\n")
        return {"of": words[0]}

    monkeypatch.setattr(script, "machine_capability", lambda: "9.0")
    monkeypatch.setattr(script, "command", command)
    monkeypatch.setattr(script, "limits", lambda: {"gpu": "H"})
    monkeypatch.setattr(script, "FLAVOURS", {
        "tensorrt-rtx": Flavour("RTX", "json", "rtx"),
        "tensorrt": Flavour("TensorRT", "not_there", "tensorrt"),
    })  # fmt: skip
    script.main([str(tmp_path)])
    found = {line["check"]: line for line in lines(capsys)}
    assert found["cuda: parity"]["error"] == "error: it failed" and found["cuda: parity"]["exit"] == 8
    assert found["tensorrt-rtx: parity"]["result"] == {"of": "verify"}
    assert "result" in found["tensorrt-rtx: times no-compile"]
    assert "error" in found["tensorrt-rtx: times compile"]
    assert "result" in found["tensorrt-rtx: times no-cuda-graphs"]
    assert "cuda: times no-cuda-graphs" not in found  # those of engines alone
    without = [words for words in called if "--no-cuda-graphs" in words]
    assert [words[words.index("--device") + 1] for words in without] == ["tensorrt-rtx"]
    assert found["tensorrt-rtx: stripped parity"]["result"] == {"of": "verify"}
    assert "result" in found["rtx-ep: parity"] and "torch-tensorrt: engines" not in found
    assert "not_there" in found["tensorrt: engines"]["skipped"]
    assert not any("tensorrt" in words for words in called)
    assert set(FLAVOURS) == {"tensorrt-rtx", "tensorrt"}  # the script takes them all


def test_a_command_gives_its_last_line(script: ModuleType) -> None:
    assert script.command("doctor", "--json")[0]["name"] == "nova-export"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        script.command("inspect", "/not/there")
    assert caught.value.returncode == 4 and "no such bundle" in caught.value.stderr
