"""A whole batch in this process: the same frames as `run`, going on, and failures that stop nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nova_export as library
from nova_export.batch.folder import open_folder
from nova_export.batch.pools import LocalPool
from nova_export.batch.run import make_missing, run_batch
from nova_export.errors import BundleError, OutputError
from nova_export.runtime import media
from tests.batch.worlds import NoiseWorker, calls, item
from tests.command_line import nova_export, only_error
from tests.test_cli_failures import MAIN, start

STEPS = {"num_inference_steps": 2, "num_diffusion_steps": 2}
OPTIONS = ("--num-inference-steps", "2", "--num-diffusion-steps", "2", "--threads", "1")
LINES = [{"id": f"n{seed}", "prompt": "a cat", "seed": seed} for seed in range(6)]


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path]) -> Path:
    return golden_bundle("t2i")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]


def digests(bundle: Path, lines: list[dict[str, Any]]) -> list[str]:
    """Of the frames that `run` makes of these lines."""
    pipe = library.load(bundle, threads=1)
    frames = [pipe(line["prompt"], seed=line["seed"], **STEPS).frames[0] for line in lines]
    return [hashlib.sha256(each.tobytes()).hexdigest() for each in frames]


def test_the_same_frames_as_run(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    summary = run_batch(prompts, tmp_path / "out", bundle, suffix=".npz", threads=1, **STEPS)
    assert (summary.results, summary.new, summary.kept, summary.failed) == (6, 6, 0, 0)
    made = results(tmp_path / "out")
    assert [line["id"] for line in made] == [line["id"] for line in LINES]
    assert [line["sha256"] for line in made] == digests(bundle, LINES)
    assert len({line["sha256"] for line in made}) == 6
    with np.load(tmp_path / "out" / made[3]["file"]) as file:
        assert hashlib.sha256(file["frames"].tobytes()).hexdigest() == made[3]["sha256"]
        assert list(file["frames"].shape[1:]) == made[3]["frames"]


def test_goes_on_after_kill(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; then the same command makes what is missing, and keeps what is there."""
    out = tmp_path / "out"
    arguments = ("batch", prompts, "--out", out, "--bundle", bundle, "--format", ".png", *OPTIONS, "--json")
    slow = "import time; from nova_export.runtime import pipeline as p\n"
    slow += "decode = p.Pipeline.decode\n"
    slow += "p.Pipeline.decode = lambda *a: (time.sleep(0.5), decode(*a))[1]\n"
    process = start(slow + MAIN, *arguments)
    journal = out / "results.jsonl"
    for _ in range(600):
        if journal.exists() and journal.read_text().count("\n") >= 2:
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = {line["file"]: (out / line["file"]).stat().st_mtime_ns for line in results(out)}
    assert 2 <= len(there) < 6
    result = nova_export(*arguments)
    told = json.loads(result.out)
    assert (result.code, told["results"], told["kept"]) == (0, 6, len(there)) and told["new"] == 6 - len(
        there
    )
    assert {file: (out / file).stat().st_mtime_ns for file in there} == there
    assert [line["sha256"] for line in results(out)] == digests(bundle, LINES)
    assert {path.name for path in (out / "samples").iterdir()} == {f"n{seed}.png" for seed in range(6)}


def make(out: Path, *prompts: str) -> list[str]:
    """Make noise of prompts; the notices."""
    items, notices = [item(prompt, where=f"line {n}") for n, prompt in enumerate(prompts, 1)], []
    with open_folder(out, {}) as folder:
        missing = folder.missing(items)
        done: list[float] = []
        progress: Any = lambda total: nullcontext(done.append)  # noqa: E731
        make_missing(folder, items, missing, LocalPool(2), NoiseWorker(out), progress, notices.append)
        assert done == list(range(1, len(missing) + 1))
    return notices


def test_failures_stop_no_others(tmp_path: Path) -> None:
    notices = make(tmp_path, "a", "wrong", "long", "b")
    assert notices == ["error: line 2, seed 0: no such thing", "warning: line 3: cut"]
    assert [line["prompt"] for line in results(tmp_path)] == ["a", "long", "b"]
    assert json.loads((tmp_path / "failures.jsonl").read_text())["where"] == "line 2"
    make(tmp_path, "a", "wrong", "long", "b")
    made = [prompt for prompt, *_ in calls(tmp_path)]
    assert made == ["a", "wrong", "long", "b", "wrong"]
    assert {threads for *_, threads in calls(tmp_path)} == {"2"}


def test_what_hits_all_stops_all_and_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        make(tmp_path, "a", "full disk", "b")
    assert [line["prompt"] for line in results(tmp_path)] == ["a"]
    assert [prompt for prompt, *_ in calls(tmp_path)] == ["a", "full disk"]


def test_a_bug_is_the_lines_own(
    bundle: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nova_export.runtime.pipeline import Pipeline

    whole, errors = Pipeline.decode, [RuntimeError("two and two is five"), MemoryError("9 GiB")]

    def decode(self: Any, latents: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return whole(self, latents)

    monkeypatch.setattr(Pipeline, "decode", decode)
    out = tmp_path / "out"
    result = nova_export(
        "batch", prompts, "--out", out, "--bundle", bundle, "--format", ".png", *OPTIONS, "-q"
    )
    assert result.code == 11 and result.out == f"{out}\n"
    first, second, last = result.err.splitlines()
    assert first.startswith("error: line 1, seed 0: internal error: RuntimeError: two and two is five")
    assert second.startswith("error: line 2, seed 1: out of memory (9 GiB)")
    assert last.startswith("error: 2 of 6 results could not be made") and "failures.jsonl" in last
    result = nova_export("batch", prompts, "--out", out, "--bundle", bundle, "--format", ".png", *OPTIONS)
    assert result.code == 0 and "2 results made, 4 were there before" in result.err


# What is refused, before anything runs


def test_nothing_is_made_if_a_line_is_bad(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    prompts.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    result = nova_export("batch", prompts, "--out", tmp_path / "out", "--bundle", bundle)
    only_error(result, 5, "line 2", "nothing was run")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_bundle(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    common = ("batch", prompts, "--out", tmp_path / "out", "--format", ".png", "-q", *OPTIONS)
    assert nova_export(*common, "--bundle", bundle).code == 0
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"tools": {}}))
    only_error(nova_export(*common, "--bundle", other), 2, "was made with bundle", "choose another --out")
    only_error(nova_export(*common, "--bundle", bundle, "--fps", "5"), 2, "made with fps 12.0, not 5.0")
    only_error(nova_export(*common, "--bundle", bundle, "--seeds", "2"), 2, "made with names 'ID', not")
    guided = nova_export(*common, "--bundle", bundle, "--guidance-scale", "3")
    only_error(guided, 2, "made with guidance_scale None, not 3.0")
    prompts.write_text(json.dumps({**LINES[0], "prompt": "a dog"}))
    only_error(nova_export(*common, "--bundle", bundle), 2, "line 1", "prompt 'a cat'")


def test_workers_are_of_ray(bundle: Path, prompts: Path, tmp_path: Path) -> None:
    result = nova_export("batch", prompts, "--out", tmp_path / "out", "--bundle", bundle, "--workers", "2")
    only_error(result, 2, "--workers is for --ray")


def test_no_ray(bundle: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    result = nova_export("batch", prompts, "--out", tmp_path / "out", "--bundle", bundle, "--ray", "auto")
    only_error(result, 9, "pip install 'nova-export[ray]'")


def test_no_encoder_is_found_out_before(
    bundle: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "H264", "none such")
    only_error(nova_export("batch", prompts, "--out", tmp_path / "out", "--bundle", bundle), 6, "H.264")


def test_a_worker_that_sees_other_files(bundle: Path, tmp_path: Path) -> None:
    from nova_export.batch.worker import PipelineWorker

    worker = PipelineWorker(bundle, "0" * 64, tmp_path, 12, {})
    with pytest.raises(OutputError, match="a file system that all machines share"):
        worker.open(1)
    (tmp_path / "settings.json").touch()
    with pytest.raises(BundleError, match="sees another bundle"):
        worker.open(1)
