"""A bundle runs without PyTorch: nothing outside export/ imports it, a plain install does not bring it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = ("torch", "transformers", "diffusers", "onnx", "onnxscript", "safetensors")
MAX_INSTALLED = 400 * 2**20  # bytes of site-packages

# Makes importing a forbidden package fail, wherever in a process it is tried, and however late.
FORBID = f"""
import importlib, pkgutil, sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN}:
            raise ImportError(f"{{name}} is imported where PyTorch is banned")

sys.meta_path.insert(0, Forbid())
"""

IMPORT_ALL = """
import nova_export

for module in pkgutil.walk_packages(nova_export.__path__, "nova_export."):
    if not module.name.startswith("nova_export.export"):
        importlib.import_module(module.name)
        print(module.name)
"""

GENERATE = """
import nova_export

steps = {"num_inference_steps": 2, "num_diffusion_steps": 2}
out = nova_export.load(sys.argv[1])("a cat", max_latent_length=2, seed=1, **steps)
print(out.frames.shape)
"""


def run(python: str | Path, code: str, *arguments: str | Path, cwd: Path) -> str:
    """stdout of a program run by an interpreter of its own."""
    done = subprocess.run([python, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_forbidding_works() -> None:
    with pytest.raises(AssertionError, match="torch is imported where PyTorch is banned"):
        run(sys.executable, FORBID + "import torch", cwd=ROOT)


def test_every_module_outside_export_imports_without_torch() -> None:
    imported = run(sys.executable, FORBID + IMPORT_ALL, cwd=ROOT).split()
    assert {"nova_export.cli", "nova_export.bundle", "nova_export.runtime.pipeline"} <= set(imported)


def test_generating_imports_no_torch(golden_bundle: Callable[[str], Path]) -> None:
    assert run(sys.executable, FORBID + GENERATE, golden_bundle("t2v"), cwd=ROOT) == "(1, 5, 64, 96, 3)\n"


@pytest.mark.slow  # a venv, and packages from the index
def test_plain_install_is_light_and_runs(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    source = tmp_path / "source"  # a copy: building leaves files beside pyproject.toml
    for package in ("calibration", "engines", "nova_export", "reference_model"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([python, "-m", "pip", "install", "--quiet", source], cwd=tmp_path, check=True)

    installed = next((tmp_path / "venv" / "lib").glob("python3*/site-packages"))
    assert not [name for name in FORBIDDEN if (installed / name).exists()]
    size = sum(path.lstat().st_size for path in installed.rglob("*") if path.is_file())
    assert size < MAX_INSTALLED
    assert run(python, FORBID + GENERATE, golden_bundle("t2v"), cwd=tmp_path) == "(1, 5, 64, 96, 3)\n"
