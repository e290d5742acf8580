"""Samples for the evaluators of GenEval and VBench: the folder forms, and runs that go on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nova_export.errors import InputError, UsageError
from nova_export.evaluation.samples import MAX_NAME, Written, read_tasks, write_samples
from nova_export.runtime import pipeline
from nova_export.runtime.generate import Step
from nova_export.runtime.pipeline import Output
from tests.command_line import nova_export, only_error

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "rosé"}], "prompt": "a rosé cow"},
]


class NoiseSource:
    """Noise that depends on seed, prompt and sample; stops like Ctrl-C at the call `stop_at`."""

    def __init__(self, stop_at: int = -1, **config: Any) -> None:
        usual = {"is_class_conditional": False, "is_video": True, "video_length": 3}
        self.config: Any = SimpleNamespace(**{**usual, **config})
        self.stop_at, self.calls = stop_at, []

    def __call__(self, prompt: Any, *, callback: Any = None, **arguments: Any) -> Output:
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((prompt, arguments))
        if callback is not None:
            callback(Step(0, 2, 0, 2, lambda: np.zeros(1, np.float32)))
        rng = np.random.default_rng([arguments["seed"], *prompt.encode()])
        count, length = arguments["num_images_per_prompt"], arguments["max_latent_length"]
        frames = rng.integers(0, 256, (count, 4 * length - 3, 16, 16, 3)).astype(np.uint8)
        return Output(frames, np.zeros((count, 1, length, 1, 1), np.float32), arguments["seed"])


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in GENEVAL) + "\n\n", "utf-8")
    return path


@pytest.fixture
def vbench(tmp_path: Path) -> Path:
    path = tmp_path / "all_dimension.txt"
    path.write_text("a cat, Van Gogh style\na dog: it's running\n\na cat, Van Gogh style\n", "utf-8")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# The forms


def test_geneval(geneval: Path, tmp_path: Path) -> None:
    """Read back as its evaluate_images.py does: folders of digits, one JSON line, samples named by digits."""
    out = tmp_path / "out"
    source, done = NoiseSource(), []
    tasks = read_tasks(geneval, out)
    assert write_samples(source, tasks, 5, done.append, guidance_scale=7.0) == Written(8, 0)
    assert sorted(path.name for path in out.iterdir()) == ["00000", "00001"]
    for folder, metadata in zip(sorted(out.iterdir()), GENEVAL, strict=True):
        assert (
            folder.name.isdigit() and json.loads((folder / "metadata.jsonl").read_text("utf-8")) == metadata
        )
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["00000.png", "00001.png", "00002.png", "00003.png"]
        assert all(re.match(r"\d+\.png", name) for name in names)
        assert {path.name for path in folder.iterdir()} == {"metadata.jsonl", "samples"}
    for place, (prompt, arguments) in enumerate(source.calls):
        assert prompt == GENEVAL[place]["prompt"]
        assert arguments == {
            "seed": 5 + place, "num_images_per_prompt": 4, "max_latent_length": 1, "guidance_scale": 7.0
        }  # fmt: skip
    expected = NoiseSource()("a rosé cow", seed=6, num_images_per_prompt=4, max_latent_length=1).frames
    with Image.open(out / "00001" / "samples" / "00002.png") as image:
        np.testing.assert_array_equal(np.asarray(image), expected[2, 0])
    assert done == [0.25, 1, 1.25, 2]


def test_vbench(vbench: Path, tmp_path: Path) -> None:
    """PROMPT-INDEX.mp4 and nothing else; a prompt given twice is one."""
    import av

    out = tmp_path / "out"
    write_samples(NoiseSource(), read_tasks(vbench, out), 0)
    names = sorted(path.name for path in out.iterdir())
    prompts = ("a cat, Van Gogh style", "a dog: it's running")
    assert names == [f"{prompt}-{index}.mp4" for prompt in prompts for index in range(5)]
    with av.open(str(out / names[0])) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9 and video.streams.video[0].average_rate == 12


def test_vbench_full_info(tmp_path: Path) -> None:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["scene"]}, {"prompt_en": "a dog"}]))
    tasks = read_tasks(path, tmp_path, 2)
    assert [file.name for task in tasks for file in task.files] == [
        "a cat-0.mp4", "a cat-1.mp4", "a dog-0.mp4", "a dog-1.mp4"
    ]  # fmt: skip


# Runs that go on


@pytest.mark.parametrize("form", ["geneval", "vbench"])
def test_a_stopped_run_goes_on(form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """What is there is kept; what is missing becomes what it would have been."""
    prompts = request.getfixturevalue(form)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write_samples(NoiseSource(), read_tasks(prompts, whole), 3)
    with pytest.raises(KeyboardInterrupt):
        write_samples(NoiseSource(stop_at=1), read_tasks(prompts, parts), 3)
    kept = len(tree(parts))
    assert 0 < kept < len(tree(whole))
    tasks = read_tasks(prompts, parts)
    lost, untouched = tasks[0].files[1], tasks[0].files[2]
    lost.unlink()
    untouched.write_bytes(b"mine")
    source = NoiseSource()
    count = len(tasks[0].files)
    assert write_samples(source, tasks, 3) == Written(count + 1, count - 1)
    assert len(source.calls) == 2
    assert untouched.read_bytes() == b"mine"
    untouched.write_bytes(tree(whole)[str(untouched.relative_to(parts))])
    assert tree(parts) == tree(whole)
    again = NoiseSource()
    assert write_samples(again, tasks, 3) == Written(0, 2 * count) and again.calls == []


# What is refused


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("a cat/../../../etc/passwd", "'/'"),
        ("up\\down", r"'\\\\'"),
        ("a\tb", r"'\\t'"),
        ("x" * (MAX_NAME - 5), f"256 bytes; {MAX_NAME} is the most"),
        ("é" * (MAX_NAME // 2), "260 bytes"),
    ],
)
def test_prompts_that_are_no_file_name(prompt: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt_en": prompt}]))
    with pytest.raises(InputError, match=words):
        read_tasks(path, tmp_path / "out", 1)


def test_the_longest_name_and_dots_stay_in_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("..\n" + "x" * (MAX_NAME - 6))
    out = tmp_path / "out"
    write_samples(NoiseSource(), read_tasks(path, out, 1), 0)
    assert sorted(tmp_path.iterdir()) == [out, path]
    assert {file.name for file in out.iterdir()} == {"..-0.mp4", "x" * (MAX_NAME - 6) + "-0.mp4"}


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "line 2 has no text under 'prompt'"),
        ("a.jsonl", '{"prompt": "a"}\n\n[1]', "line 3 has no text under 'prompt'"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.json", "{}", "a list of"),
        ("a.json", '[{"prompt": "a"}]', "entry 0 has no text under 'prompt_en'"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.csv", "a", "ends in '.csv'"),
    ],
)
def test_files_of_another_form(name: str, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        read_tasks(path, tmp_path)


def test_checkpoints_that_cannot(geneval: Path, vbench: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="class-conditional"):
        write_samples(NoiseSource(is_class_conditional=True), read_tasks(geneval, tmp_path), 0)
    with pytest.raises(UsageError, match="image checkpoint"):
        write_samples(NoiseSource(is_video=False), read_tasks(vbench, tmp_path), 0)
    write_samples(NoiseSource(is_video=False), read_tasks(geneval, tmp_path / "out", 1), 0)


# The command


def test_the_command(vbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by Ctrl-C, then run again; any size of frames will do."""
    out = tmp_path / "out"
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: NoiseSource(stop_at=1))
    arguments = ("eval", tmp_path, "--prompts", vbench, "--out", out, "--samples", "2")
    only_error(nova_export(*arguments, "-q"), 130, "finished files are kept", "same command")
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: NoiseSource())
    result = nova_export(*arguments, "--json", "-q")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == {"out": str(out), "new": 2, "kept": 2}
    result = nova_export(*arguments)
    assert result.out == f"{out}\n" and "0 files written, 4 were there before" in result.err


def test_the_command_says_what_it_cannot_read_or_write(
    vbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: NoiseSource())
    missing = tmp_path / "no.txt"
    only_error(nova_export("eval", tmp_path, "--prompts", missing, "--out", tmp_path), 5, str(missing))
    only_error(nova_export("eval", tmp_path, "--prompts", vbench, "--out", vbench, "-q"), 6, "choose another")
