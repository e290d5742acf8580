"""What a batch is to make: one Item a prompt and seed, all checked before any runs.

    FILE.jsonl   a line {"prompt": …} each; id, seed and any argument of `Request` are optional
    FILE.txt     a prompt a line, or
    FILE.json    VBench's full info, [{"prompt_en": …}, …]: results are named as VBench looks for them

Knows no pool and no folder.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nova_export.bundle import sha256
from nova_export.config import NovaConfig
from nova_export.errors import InputError, NovaExportError
from nova_export.evaluation.samples import VBENCH_SAMPLES, json_lines, parse_json, sample_name, vbench_prompts
from nova_export.runtime.media import load_image
from nova_export.runtime.noise import TorchGenerator
from nova_export.runtime.request import Request

ARGUMENTS = tuple(field.name for field in fields(Request) if field.name != "num_images_per_prompt")
SHOWN = 5  # bad lines in a message


@dataclass(frozen=True)
class Item:
    """One result to make.

    where: the place in the prompts file, for messages. id: of the line, or None. name: of the file to write.
    arguments: of `Request`, none left to a default. key: digest of them, images by their contents.
    """

    where: str
    id: str | None
    name: str
    arguments: Mapping[str, Any]
    key: str


@dataclass(frozen=True)
class _Line:
    where: str
    id: str | None
    arguments: dict[str, Any]


def read_items(
    prompts: Path,
    config: NovaConfig,
    *,
    count: int | None = None,
    seed: int = 0,
    suffix: str = ".mp4",
    **defaults: Any,
) -> list[Item]:
    """The items of a prompts file, in its order; lines that ask for the same are one.

    count: seeds of each line, from the line's own or `seed` on, and files are ID-INDEX; None is one seed for
    a line of a .jsonl and as many as VBench wants for a prompt of the others.
    defaults: arguments of lines that do not name them. Raises InputError for all bad lines at once.
    """
    if count is None and prompts.suffix.lower() != ".jsonl":
        count = VBENCH_SAMPLES
    items: dict[str, Item] = {}
    bad: list[str] = []
    images: dict[str, str] = {}
    for line in _lines(prompts, bad):
        try:
            for item in _items(line, config, count, suffix, {"seed": seed, **defaults}, images):
                same = items.setdefault(item.name, item)
                if same.key != item.key:
                    raise InputError(f"would write {item.name} as {same.where} does; give it another id")
        except NovaExportError as error:
            bad.append(f"{line.where}: {error}")
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise InputError(f"{prompts}: nothing was run: " + "; ".join(bad[:SHOWN]) + more)
    if not items:
        raise InputError(f"{prompts} holds no prompt")
    return list(items.values())


def _lines(prompts: Path, bad: list[str]) -> Iterator[_Line]:
    """The lines that can be read; what is wrong with others is added to `bad`."""
    match prompts.suffix.lower():
        case ".jsonl":
            for number, text in json_lines(prompts):
                try:
                    yield _line(f"line {number}", text, prompts.parent)
                except InputError as error:
                    bad.append(str(error))
        case ".txt" | ".json":
            for prompt in vbench_prompts(prompts):
                yield _Line(f"prompt {prompt[:60]!r}", prompt, {"prompt": prompt})
        case suffix:
            raise InputError(
                f"{prompts} ends in {suffix!r}: .jsonl is read as an object a line, .txt as a prompt a line "
                "and .json as VBench's full info"
            )


def _line(where: str, text: str, folder: Path) -> _Line:
    """folder: that paths of images start from."""
    data = parse_json(text, where)
    if not isinstance(data, dict) or "prompt" not in data:
        raise InputError(f'{where}: must be an object like {{"prompt": "a cat", "seed": 1}}')
    name = data.pop("id", None)
    if name is not None and (not isinstance(name, (str, int)) or isinstance(name, bool) or name == ""):
        raise InputError(f"{where}: id is {name!r}; it must be text or a whole number")
    for key in data:
        if key == "num_images_per_prompt":
            raise InputError(
                f"{where}: num_images_per_prompt is for `run`; here --seeds makes several samples"
            )
        if key not in ARGUMENTS:
            near = difflib.get_close_matches(key, ARGUMENTS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are id, {', '.join(ARGUMENTS)}"
            raise InputError(f"{where}: there is no argument {key!r}{hint}")
    if not isinstance(data["prompt"], (str, int)):
        raise InputError(f"{where}: prompt is {data['prompt']!r}; it must be one text, or one class id")
    if isinstance(data.get("image"), str):
        data["image"] = str((folder / data["image"]).absolute())
    return _Line(where, None if name is None else str(name), data)


def _items(
    line: _Line,
    config: NovaConfig,
    count: int | None,
    suffix: str,
    defaults: Mapping[str, Any],
    images: dict[str, str],
) -> Iterator[Item]:
    """One for each seed. images: digests of those that were checked before."""
    given = {name: value for name, value in line.arguments.items() if value is not None}
    first = Request(**{**defaults, **given})
    first.plan(config)
    first.negative_prompts(config)
    TorchGenerator(first.resolved_seed())
    if first.image is not None and first.image not in images:
        if not isinstance(first.image, str):
            raise InputError(f"image is {first.image!r}; it must be the path of a file")
        load_image(first.image, *config.image_size)
        images[first.image] = sha256(Path(first.image))
    for index in range(count or 1):
        arguments = {**asdict(first), "seed": first.resolved_seed() + index}
        TorchGenerator(arguments["seed"])
        key = _digest({**arguments, "image": images.get(first.image)})
        place = None if count is None else index
        name = (
            sample_name(key, None, suffix) if line.id is None else sample_name(line.id, place, suffix, "id")
        )
        yield Item(line.where, line.id, name, arguments, key)


def _digest(arguments: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:16]
