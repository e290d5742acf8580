"""Everything to be known of a GPU in one call: python benchmarks/gpu_check.py [CHECKPOINT] > result.jsonl

Builds the checkpoint (the demo if none is given) in fp32 and in fp16, compiles engines for the GPU of the
machine with every TensorRT that is installed, and prints a JSON line for each thing that it tried: what the
machine is, parity of every stage and of whole videos with the fp32 graphs on the CPU, times against PyTorch
in float16, eager and compiled, those of engines also without CUDA graphs, parity of engines without weights
and of torch-tensorrt's, and what the GPU's own bandwidth and arithmetic allow. What fails is a line too, and
the others go on. Without a GPU it says so and ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nova_export.demo import demo_checkpoint
from nova_export.engine.flavour import FLAVOURS, machine_capability
from nova_export.errors import DependencyError
from nova_export.targets import HEAD_STEPS

GRAPHS = ("cuda", "rtx-ep")  # devices that run graphs as they are
TORCH_TENSORRT = "tensorrt"  # what torch-tensorrt compiles for
SIDE = 8192  # of the matrices that measure arithmetic
COPY = 1 << 30  # bytes


def main(arguments: Sequence[str]) -> None:
    if machine_capability() is None:
        say("gpu", skipped="there is no NVIDIA GPU in this machine, or no driver for it")
        return
    checkpoint = Path(arguments[0]) if arguments else demo_checkpoint()
    say("doctor", found=command("doctor", "--json"))
    try:
        say("limits", **limits())
    except (ImportError, RuntimeError) as error:
        say("limits", error=str(error))
    with tempfile.TemporaryDirectory() as folder:
        exact, half = Path(folder) / "fp32", Path(folder) / "fp16"
        attempt("build fp32", "build", checkpoint, "-o", exact)
        in_half = ("--precision", "fp16", "--head-steps", HEAD_STEPS)
        attempt("build fp16", "build", checkpoint, "-o", half, "--target", "cuda", *in_half)
        engines = list(compiled(half))
        for device in (*GRAPHS, *engines):
            attempt(f"{device}: parity", "verify", half, "--against", exact, "--device", device, "--json")
            how = ["--no-compile", "--compile"]  # the second may fail where the first does not
            for option in how if device in GRAPHS else [*how, "--no-cuda-graphs"]:
                timed = ("bench", half, "--against", checkpoint, "--device", device, option, "--json")
                attempt(f"{device}: times {option[2:]}", *timed, "--num-inference-steps", "64")
        for target in engines:
            stripped = ("engines", half, "--target", target, "--weights", "stripped", "--json")
            if attempt(f"{target}: stripped engines", *stripped):
                parity = ("verify", half, "--against", exact, "--device", target, "--json")
                attempt(f"{target}: stripped parity", *parity)
        if TORCH_TENSORRT in engines:
            other, builder = Path(folder) / "other", ("--builder", "torch-tensorrt")
            if attempt(f"{builder[1]}: engines", "build", checkpoint, "-o", other, "--target", TORCH_TENSORRT,
                       *builder, *in_half):  # fmt: skip
                parity = ("verify", other, "--against", exact, "--device", TORCH_TENSORRT, "--json")
                attempt(f"{builder[1]}: parity", *parity)


def compiled(bundle: Path) -> Iterator[str]:
    """Targets of the GPU itself whose engines could be made."""
    for target, flavour in FLAVOURS.items():
        try:
            flavour.load()
        except DependencyError as error:
            say(f"{target}: engines", skipped=str(error))
            continue
        if attempt(f"{target}: engines", "engines", bundle, "--target", target, "--json"):
            yield target


def limits() -> dict[str, Any]:
    """What the GPU does at best: bytes a second, read and written, and operations a second in float16."""
    import torch

    source = torch.empty(COPY, dtype=torch.uint8, device="cuda")
    matrix = torch.randn(SIDE, SIDE, dtype=torch.float16, device="cuda")
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bytes_per_second": 2 * COPY / seconds(source.clone),
        "operations_per_second": 2 * SIDE**3 / seconds(lambda: matrix @ matrix),
    }


def seconds(run: Any, repeats: int = 10) -> float:
    """Of one run on the GPU, in the mean, after three that are not counted."""
    import torch

    for turn in range(repeats + 3):
        if turn == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def attempt(check: str, *arguments: object) -> bool:
    """Run a command of nova-export and say what came of it; whether it worked."""
    start = time.perf_counter()
    try:
        result: dict[str, Any] = {"result": command(*arguments)}
    except subprocess.CalledProcessError as error:
        result = {
            "error": (error.stderr or "it said nothing").strip().splitlines()[-1],
            "exit": error.returncode,
        }
    say(check, seconds=round(time.perf_counter() - start, 2), **result)
    return "result" in result


def command(*arguments: object) -> Any:
    """What a command prints last, as JSON if it is that. Raises CalledProcessError."""
    line = [sys.executable, "-m", "nova_export", *map(str, arguments)]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    try:
        return json.loads(last)
    except ValueError:
        return last


def say(check: str, **found: Any) -> None:
    print(json.dumps({"check": check, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
