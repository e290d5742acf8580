"""High water of memory of one thing, in a fresh process: this module run as a program, the job on stdin.

Prints the bytes that loading and running it added at the highest, over what the process held before. A whole
generation is counted from the bare interpreter, a stage from when libraries are loaded and inputs made.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nova_export.child import die_with_parent, environment, memory

CLEAR = Path("/proc/self/clear_refs")


def measure(job: Mapping[str, Any]) -> int | None:
    """Bytes that a job needs at most; None where the system does not tell, or the job failed.

    A stage's job: "kind", "bundle", "stage", "sizes", "checkpoint", "threads". A generation's has "arguments"
    of the call in place of "stage" and "sizes".
    """
    command = [sys.executable, "-m", "nova_export.export.peak_memory"]
    done = subprocess.run(command, input=json.dumps(job), env=environment(), capture_output=True, text=True)
    last = done.stdout.strip().rpartition("\n")[2]
    return int(last) if done.returncode == 0 and last.isdigit() else None


def _stage(job: Mapping[str, Any]) -> int:
    from nova_export.bundle import Bundle
    from nova_export.export.contenders import Subject, contenders

    checkpoint = Path(job["checkpoint"]) if job["checkpoint"] else None
    subject = Subject.of(Bundle.open(job["bundle"]), job["stage"], job["sizes"], checkpoint)
    inputs = subject.inputs()
    CLEAR.write_text("5")  # high water down to what is held now
    before = memory("VmRSS")
    with contenders([job["kind"]], subject, inputs, job["threads"]) as runs:
        for _ in range(2):
            runs[job["kind"]]()
    return memory("VmHWM") - before


def _generation(job: Mapping[str, Any]) -> int:
    before = memory("VmRSS")
    if job["kind"] == "onnx":
        import nova_export

        with nova_export.load(job["bundle"], threads=job["threads"]) as pipeline:
            pipeline(**job["arguments"])
    else:
        import torch

        from reference_model.eager import EagerPipeline

        if job["threads"]:
            torch.set_num_threads(job["threads"])
        EagerPipeline.from_checkpoint(job["checkpoint"])(**job["arguments"])
    return memory("VmHWM") - before


def main() -> None:
    die_with_parent()
    job = json.load(sys.stdin)
    print(_stage(job) if "stage" in job else _generation(job))


if __name__ == "__main__":
    main()
