"""Samples of any checkpoint, in the folder forms that the evaluators of GenEval and VBench read.

    GenEval   FILE.jsonl, a line {"prompt": …} each   OUT/00000/metadata.jsonl, OUT/00000/samples/00000.png …
    VBench    FILE.txt, a prompt a line, or           OUT/PROMPT-0.mp4 …
              FILE.json, [{"prompt_en": …}, …]

Files that are there already are kept, so a run that was stopped goes on. VBench guesses the suffix of all
videos from any one entry of the folder, so nothing else is written there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_export.errors import InputError, OutputError, UsageError
from nova_export.evaluation.shapes_eval import Source
from nova_export.progress import Report, call_progress
from nova_export.runtime.media import save_frames, write_whole
from nova_export.runtime.request import FPS

GENEVAL_SAMPLES, VBENCH_SAMPLES = 4, 5  # of each prompt, as their own scripts make
MAX_NAME = 255  # bytes of a file name on common file systems


@dataclass(frozen=True)
class Task:
    """One prompt and the files that its samples go to; their suffix says image or video.

    metadata: a file that stands beside them and its text.
    """

    prompt: str
    files: tuple[Path, ...]
    metadata: tuple[Path, str] | None = None

    @property
    def missing(self) -> list[Path]:
        return [path for path in self.files if not path.exists()]


@dataclass(frozen=True)
class Written:
    """How many files a run wrote, and how many were there before."""

    new: int
    kept: int


def read_tasks(prompts: Path, out: Path, count: int | None = None) -> list[Task]:
    """The tasks of a file of prompts, with `count` samples of each; None is as many as the evaluator wants.

    Raises InputError for a file of another form, or a prompt that cannot be a file name.
    """
    match prompts.suffix.lower():
        case ".jsonl":
            tasks = _geneval(prompts, out, count or GENEVAL_SAMPLES)
        case ".json" | ".txt":
            tasks = _vbench(vbench_prompts(prompts), out, count or VBENCH_SAMPLES)
        case suffix:
            raise InputError(
                f"{prompts} ends in {suffix!r}: .jsonl is read as GenEval's metadata, .txt as a prompt a "
                "line and .json as VBench's full info"
            )
    if not tasks:
        raise InputError(f"{prompts} holds no prompt")
    return tasks


def write_samples(
    source: Source,
    tasks: list[Task],
    seed: int = 0,
    report: Report = lambda done: None,
    **arguments: Any,
) -> Written:
    """Generate the missing files of each task. arguments: of `Request`.

    A task's samples are one call, with seed + the task's place, so they do not depend on which are missing.
    Raises UsageError for a checkpoint that cannot make them, OutputError.
    """
    config, video = source.config, tasks[0].files[0].suffix == ".mp4"
    if config.is_class_conditional:
        raise UsageError("--prompts needs a checkpoint that reads text; this one is class-conditional")
    if video and not config.is_video:
        raise UsageError("VBench scores videos, but this is an image checkpoint; give GenEval's .jsonl")
    kept = 0
    for place, task in enumerate(tasks):
        missing = task.missing
        kept += len(task.files) - len(missing)
        if missing:
            _prepare(task)
            output = source(
                task.prompt,
                callback=call_progress(report, place, 1),
                num_images_per_prompt=len(task.files),
                max_latent_length=config.video_length if video else 1,
                seed=seed + place,
                **arguments,
            )
            for path, frames in zip(task.files, output.frames, strict=True):
                if path in missing:
                    save_frames(path, frames, FPS)
        report(place + 1)
    return Written(sum(len(task.files) for task in tasks) - kept, kept)


def json_lines(prompts: Path) -> Iterator[tuple[int, str]]:
    """The lines of a .jsonl file that are not blank, with their numbers."""
    for number, line in enumerate(_read(prompts).split("\n"), 1):
        if line.strip():
            yield number, line


def vbench_prompts(prompts: Path) -> list[str]:
    """The different prompts of a .txt file, one a line, or of a .json as VBench's full info."""
    if prompts.suffix.lower() == ".json":
        return list(dict.fromkeys(_full_info(_read(prompts), prompts)))
    lines = (line.strip() for line in _read(prompts).splitlines())
    return list(dict.fromkeys(line for line in lines if line))


def _read(prompts: Path) -> str:
    try:
        return prompts.read_text(encoding="utf-8-sig")  # without the mark that some editors put first
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts from {prompts}: {error}") from error


def _geneval(prompts: Path, out: Path, count: int) -> list[Task]:
    tasks = []
    for place, (number, line) in enumerate(json_lines(prompts)):
        prompt = _field(parse_json(line, f"{prompts}, line {number}"), "prompt", f"{prompts}, line {number}")
        folder = out / f"{place:05}"
        files = tuple(folder / "samples" / f"{index:05}.png" for index in range(count))
        tasks.append(Task(prompt, files, (folder / "metadata.jsonl", line.strip() + "\n")))
    return tasks


def _full_info(text: str, prompts: Path) -> list[str]:
    entries = parse_json(text, str(prompts))
    if not isinstance(entries, list):
        raise InputError(f'{prompts}: VBench\'s full info is a list of {{"prompt_en": …}}')
    return [_field(entry, "prompt_en", f"{prompts}, entry {place}") for place, entry in enumerate(entries)]


def _vbench(prompts: list[str], out: Path, count: int) -> list[Task]:
    """One task for each different prompt: a prompt that several dimensions share is one set of files."""
    return [
        Task(prompt, tuple(out / sample_name(prompt, index, ".mp4") for index in range(count)))
        for prompt in prompts
    ]


def sample_name(text: str, index: int | None, suffix: str, what: str = "prompt") -> str:
    """The file of a sample: the text as it is, the index if there is one, and the suffix.

    VBench finds a video by its prompt, word for word, so a name that cannot be is refused, not mended.
    what: the text is, for the message.
    """
    name = text + ("" if index is None else f"-{index}") + suffix
    bad = sorted({letter for letter in text if letter in "/\\" or ord(letter) < 32})
    if bad:
        raise InputError(f"{what} {text!r} has {bad[0]!r}, which cannot stand in the name of its file")
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > MAX_NAME:
        raise InputError(
            f"{what} {text[:60]!r}… makes a file name of {size} bytes; {MAX_NAME} is the most: shorten it"
        )
    return name


def parse_json(text: str, where: str) -> Any:
    """Raises InputError that says where."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def _field(entry: Any, key: str, where: str) -> str:
    prompt = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(prompt, str):
        raise InputError(f"{where} has no text under {key!r}")
    return prompt


def _prepare(task: Task) -> None:
    """The task's folders and metadata."""
    try:
        task.files[0].parent.mkdir(parents=True, exist_ok=True)
        if task.metadata is not None:
            path, text = task.metadata
            write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise OutputError(
            f"cannot write {task.files[0].parent}: {error.strerror or error}; choose another --out"
        ) from error
