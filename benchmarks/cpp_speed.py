"""The C++ library against the Python runtime: one bundle, one video, in turns, each in a process of its own.

    python benchmarks/cpp_speed.py BUNDLE PROGRAM [--turns 3]

PROGRAM is nova_call of `make test-cpp` (build/cpp/release/tests/nova_call). Prints JSON: seconds of a first
call, which loads and checks stages, and of a second; of the second the share that no stage accounts for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

OPTIONS = {"seed": 1, "max_latent_length": 9}  # 33 frames, 64 AR steps of 25 diffusion steps
PROMPT = "a red circle moving right"

IN_PYTHON = """
import json, sys, time
import numpy as np
import nova_export
bundle, options, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
seconds, stages = [], []
with nova_export.load(bundle) as pipe:
    get, decode = pipe._stage, pipe._decoder
    spent = 0.0
    def timed(call, *given):
        global spent
        start = time.perf_counter()
        made = call(*given)
        spent += time.perf_counter() - start
        return made
    class Timed:
        def __init__(self, name): self.name, self.stage = name, get(name).stage
        def run(self, inputs): return timed(lambda: get(self.name).run(inputs))
    pipe._stage, pipe._decoder = Timed, lambda latents: timed(decode, latents)
    for _ in range(2):
        spent, start = 0.0, time.perf_counter()
        made = pipe(sys.argv[4], **options)
        seconds.append(time.perf_counter() - start)
        stages.append(spent)
np.savez(out, latents=made.latents, frames=made.frames)
print(json.dumps({"seconds": seconds, "stages": stages}))
"""


def python_run(bundle: Path, folder: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-c",
        IN_PYTHON,
        str(bundle),
        json.dumps(OPTIONS),
        str(folder / "python.npz"),
        PROMPT,
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(ran.stdout))


def cpp_run(bundle: Path, program: Path, folder: Path) -> dict[str, Any]:
    call = {"bundle": str(bundle), "options": {"prompts": [PROMPT], **OPTIONS}}
    (folder / "calls.json").write_text(json.dumps([call, call]))
    subprocess.run([program, folder / "calls.json", folder], check=True)
    told = [json.loads((folder / f"{number}.json").read_text()) for number in (0, 1)]
    spent = [sum(stage["load"] + stage["run"] for stage in each["stages"].values()) for each in told]
    return {"seconds": [each["seconds"] for each in told], "stages": spent}


def differences(folder: Path) -> dict[str, float]:
    told = json.loads((folder / "1.json").read_text())
    latents = np.fromfile(folder / "1.latents", np.float32).reshape(told["latents_shape"])
    frames = np.fromfile(folder / "1.frames", np.uint8).reshape(told["frames_shape"])
    with np.load(folder / "python.npz") as expected:
        return {
            "latents": float(np.abs(latents - expected["latents"]).max()),
            "frames": int(np.abs(frames.astype(int) - expected["frames"]).max()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"python": [], "cpp": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(given.turns):
            runs["python"].append(python_run(given.bundle, folder))
            runs["cpp"].append(cpp_run(given.bundle, given.program, folder))
        apart = differences(folder)
    report: dict[str, Any] = {"options": OPTIONS, "apart": apart, "runs": runs}
    for kind, each in runs.items():
        seconds = [run["seconds"][1] for run in each]
        outside = [1 - run["stages"][1] / run["seconds"][1] for run in each]
        report[kind] = {
            "first_seconds": round(median(run["seconds"][0] for run in each), 3),
            "seconds": round(median(seconds), 3),
            "outside_stages": round(median(outside), 4),
        }
    report["cpp_over_python"] = round(report["cpp"]["seconds"] / report["python"]["seconds"], 4)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
