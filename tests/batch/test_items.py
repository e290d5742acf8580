"""Reading prompts files: what becomes of lines, and every bad one said at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nova_export.batch.items import ARGUMENTS, Item, read_items
from nova_export.config import NovaConfig
from nova_export.errors import InputError
from tests.strategies import parts

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
VIDEO = NovaConfig.from_parts(**parts(frames=3, scheduler=FLOW))
CLASSES = NovaConfig.from_parts(**parts(text=False, frames=1))


def read(tmp_path: Path, *lines: Any, config: NovaConfig = VIDEO, **options: Any) -> list[Item]:
    path = tmp_path / "prompts.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return read_items(path, config, **options)


def test_a_line_with_all_and_one_with_nothing(tmp_path: Path) -> None:
    whole = {"id": "cat", "prompt": "a cat", "seed": 7, "num_inference_steps": 3, "guidance_scale": 4}
    first, second = read(tmp_path, whole, "", {"prompt": "a dog"}, seed=5, num_diffusion_steps=9)
    assert (first.where, first.id, first.name) == ("line 1", "cat", "cat.mp4")
    assert first.arguments["num_inference_steps"] == 3 and first.arguments["num_diffusion_steps"] == 9
    assert (second.where, second.id, second.name) == ("line 3", None, f"{second.key}.mp4")
    assert second.arguments["seed"] == 5 and second.arguments["guidance_scale"] is None


def test_seeds_count_up(tmp_path: Path) -> None:
    items = read(tmp_path, {"id": 3, "prompt": "a", "seed": 7}, {"prompt": "b"}, count=2, suffix=".png")
    assert [item.arguments["seed"] for item in items] == [7, 8, 0, 1]
    assert [item.name for item in items[:2]] == ["3-0.png", "3-1.png"]
    assert len({item.key for item in items}) == 4


def test_the_key_is_of_the_arguments_alone(tmp_path: Path) -> None:
    """Defaults spelt out, ids and the order of a line change nothing; every argument does."""
    [plain] = read(tmp_path, {"prompt": "a"})
    [spelt] = read(tmp_path, {"seed": 0, "id": "x", "motion_flow": 5.0, "prompt": "a"})
    assert plain.key == spelt.key
    Image.new("RGB", (8, 8), "red").save(tmp_path / "i.png")
    others: dict[str, Any] = {"prompt": "b", "negative_prompt": "c", "image": "i.png", "guidance_renorm": 0.5}
    others |= {"image_guidance_scale": 0.1, "spatiotemporal_guidance_scale": 0.1, "max_latent_length": 2}
    keys = {plain.key}
    for name in ARGUMENTS:
        [item] = read(tmp_path, {"prompt": "a", name: others.get(name, 3)})
        keys.add(item.key)
    assert len(keys) == len(ARGUMENTS) + 1
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "i.png")
    [item] = read(tmp_path, {"prompt": "a", "image": "i.png"})
    assert item.key not in keys


def test_lines_that_ask_for_the_same_are_one(tmp_path: Path) -> None:
    assert len(read(tmp_path, {"prompt": "a"}, {"prompt": "a", "seed": 0}, {"prompt": "a", "id": "a"})) == 2


def test_text_is_named_as_vbench_wants(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\n\na dog: it runs\na cat\n")
    items = read_items(tmp_path / "a.txt", VIDEO)
    names = [f"{prompt}-{index}.mp4" for prompt in ("a cat", "a dog: it runs") for index in range(5)]
    assert [item.name for item in items] == names
    assert [item.arguments["seed"] for item in items] == [0, 1, 2, 3, 4] * 2
    (tmp_path / "b.json").write_text('[{"prompt_en": "a cat"}, {"prompt_en": "a cat"}]')
    assert [item.name for item in read_items(tmp_path / "b.json", VIDEO, count=1)] == ["a cat-0.mp4"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_the_mark_of_some_editors_is_no_part_of_a_prompt(name: str, tmp_path: Path) -> None:
    texts = {"a.txt": "a cat\r\n", "a.jsonl": '{"prompt": "a cat"}\r\n', "a.json": '[{"prompt_en": "a cat"}]'}
    (tmp_path / name).write_text(texts[name], encoding="utf-8-sig")
    assert {item.arguments["prompt"] for item in read_items(tmp_path / name, VIDEO)} == {"a cat"}


def test_class_ids(tmp_path: Path) -> None:
    [item] = read(tmp_path, {"prompt": 7}, config=CLASSES)
    assert item.arguments["prompt"] == 7
    with pytest.raises(InputError, match="line 1: prompt must be a class id"):
        read(tmp_path, {"prompt": "a cat"}, config=CLASSES)


BAD: list[tuple[Any, str]] = [
    ("{", "line 2 is not JSON"),
    ("[" * 100_000, "line 2 is not JSON"),
    ([1], "line 2: must be an object"),
    ({"id": "b"}, "line 2: must be an object"),
    ({"prompt": ["a", "b"]}, "line 2: prompt is ['a', 'b']; it must be one text"),
    ({"prompt": None}, "line 2: prompt is None"),
    ({"prompt": 3}, "line 2: prompt must be text"),
    ({"prompt": "a", "id": 1.5}, "line 2: id is 1.5"),
    ({"prompt": "a", "id": ""}, "line 2: id is ''"),
    ({"prompt": "a", "id": "../up"}, "line 2: id '../up' has '/'"),
    ({"prompt": "a", "id": "x" * 300}, "line 2: id 'xxx"),
    ({"prompt": "a", "sed": 3}, "line 2: there is no argument 'sed'; did you mean 'seed'?"),
    ({"prompt": "a", "zzz": 3}, "line 2: there is no argument 'zzz'; known are id, prompt"),
    ({"prompt": "a", "num_images_per_prompt": 2}, "--seeds"),
    ({"prompt": "a", "seed": "1"}, "line 2: seed must be an integer, not '1'"),
    ({"prompt": "a", "seed": 2**64}, "line 2: seed 18446744073709551616 is outside"),
    ({"prompt": "a", "guidance_scale": "5"}, "line 2: guidance_scale is '5'"),
    ('{"prompt": "a", "motion_flow": NaN}', "line 2: motion_flow is nan"),
    ({"prompt": "a", "max_latent_length": 0}, "line 2: max_latent_length is 0"),
    ({"prompt": "a", "negative_prompt": 4}, "line 2: negative_prompt must be text"),
    ({"prompt": "a", "image": "gone.png"}, "gone.png does not exist"),
    ({"prompt": "a", "image": 3}, "line 2: image is 3"),
    ('{"prompt": "\\ud800"}', "is no text"),
    ({"prompt": "b", "id": "first"}, "line 2: would write first.mp4 as line 1 does"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=range(len(BAD)))
def test_bad_lines(line: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as error:
        read(tmp_path, {"prompt": "a", "id": "first"}, line)
    assert "nothing was run" in str(error.value) and "\n" not in str(error.value)


def test_all_bad_lines_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2 .*line 6 .*; and 2 more$") as error:
        read(tmp_path, {"prompt": "a"}, *["{"] * 7)
    assert "nothing was run: line 2" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "a", "ends in '.csv'"),
        ("a.jsonl", "\n \n", "holds no prompt"),
        ("a.txt", "up/down", "'/'"),
        ("gone.txt", None, "cannot read prompts"),
    ],
)
def test_bad_files(name: str, text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        read_items(tmp_path / name, VIDEO)
