"""The C++ tokenizer gives what Python's gives: the same ids, and the same notice where a prompt was cut."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engines.cpp.tools.unicode_classes import CLASSES, package_classes
from nova_export.errors import BundleError
from nova_export.runtime.tokenizer import PromptTokenizer
from tests.conftest import GOLDEN
from tests.cpp.conftest import REPOSITORY, Inspect

GOLDEN_FILE = GOLDEN / "t2v" / "checkpoint" / "tokenizer" / "tokenizer.json"
DEMO_FILE = REPOSITORY / "reference_model" / "demo" / "checkpoint" / "tokenizer" / "tokenizer.json"
PROMPTS = (REPOSITORY / "calibration" / "prompts.txt").read_text(encoding="utf-8").split("\n")
WHOLE = 100_000

# What a tokenizer may stumble over, put together at random.
SPANS = ("azAZ", "09", "  \t\n\r", "!/", "\0\x1f\x7f\x9f", "\xa0ÿ", "ΑωЀӿ", "אתءيߊ", "अ९क़ॿ", "぀ヿ一丿가힣")
SPANS += ("\u0300\u036f\u20d0\u20f0", "\u2000\u200f\u2028\u202f\u205f\u3000\ufeff", "²½Ⅷ①㊀𝟘𐄇")
SPANS += ("\U0001f300\U0001f64f\U0001f1e6\U0001f1ff\u200d\ufe0f", "\ue000\uf8ff\U0010ffff")
PIECES = ("'s", "'t", "'re", "'ve", "'ll", "'d", "'m", "'S", "''", "<|endoftext|>", "<|endof")
PIECES += ("   ", "\n\n ", " \u3000", "Ġ", "é", "e\u0301")


def strings(count: int) -> list[str]:
    """Prompts, and texts of characters from everywhere in Unicode: whole, cut and joined."""
    rng = random.Random(0)
    made = ["", " ", *PROMPTS, *PIECES]
    while len(made) < count:
        parts = []
        for _ in range(rng.randint(1, 8)):
            kind = rng.randrange(4)
            if kind == 0:
                parts.append(rng.choice(PROMPTS)[: rng.randint(0, 30)])
            elif kind == 1:
                parts.append(rng.choice(PIECES))
            elif kind == 2:
                span = rng.choice(SPANS)
                low, high = sorted((ord(rng.choice(span)), ord(rng.choice(span))))
                parts += [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))]
            else:
                parts += [chr(rng.randrange(0x110000)) for _ in range(rng.randint(1, 4))]
        made.append("".join(part for part in parts if not any(0xD800 <= ord(c) < 0xE000 for c in part)))
    return made


def assert_alike(inspect: Inspect, file: Path, texts: list[str], most: int) -> int:
    """Ids and notices agree for all; how many were cut."""
    python = PromptTokenizer(file, most)
    answers = inspect("tokens", str(file), str(most), lines=texts)
    cut = 0
    for text, answer in zip(texts, answers, strict=True):
        ids, notice = python.encode(text)
        assert answer["ok"][0] == ids, text
        if "\\" not in (notice or ""):  # C++ escapes nothing beyond ASCII
            assert answer["ok"][1] == (notice or ""), text
        assert bool(answer["ok"][1]) == (notice is not None)
        cut += notice is not None
    return cut


@pytest.mark.parametrize("file", [GOLDEN_FILE, DEMO_FILE], ids=["golden", "demo"])
def test_thousands_of_strings(inspect: Inspect, file: Path) -> None:
    texts = strings(6000)
    assert_alike(inspect, file, texts, WHOLE)
    assert assert_alike(inspect, file, texts[:2000], 8) > 1000


def test_the_cut_is_where_python_cuts(inspect: Inspect, tmp_path: Path) -> None:
    """Every length, with and without spaces left out of what tokens stand for."""
    text = "\N{CAT FACE}  \N{DOG FACE} é 漢字   plain <|endoftext|>\t 'quoted' text's end"
    for trim in (True, False):
        data = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
        data["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": trim,
            "use_regex": True,
        }
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(data))
        total = len(PromptTokenizer(file, WHOLE).encode(text)[0])
        for most in range(1, total):
            _, notice = PromptTokenizer(file, most).encode(text)
            assert inspect("tokens", str(file), str(most), lines=[text])[0]["ok"][1] == notice, most


def test_classes_of_every_code_point(inspect: Inspect) -> None:
    """Letters, numbers and white space: the table against the package that is installed."""
    package = package_classes()
    table = {}
    for first, last, kind in inspect("classes")[0]["ok"]:
        table.update(dict.fromkeys(range(first, last + 1), CLASSES[kind]))
    assert {point: name for point, name in table.items() if point in package} == package


def added(content: str, number: int, **changes: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"id": number, "content": content, "normalized": True, **flags, **changes}


def test_added_tokens(inspect: Inspect, tmp_path: Path) -> None:
    """As Phi's: runs of spaces that are tokens; some looked for before others, the longest first."""
    rng = random.Random(1)
    data = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
    contents = [" " * count for count in range(2, 12)] + [
        "\t\t",
        "\t\t\t",
        "ab",
        "abc",
        "bcd",
        "é",
        "é\u0301",
        "the",
        "Ġ",
    ]
    for each in range(20):
        rng.shuffle(contents)
        tokens = data["added_tokens"][:1]
        tokens += [
            added(content, 400 + i, normalized=rng.random() < 0.5, special=rng.random() < 0.3)
            for i, content in enumerate(contents)
        ]
        file = tmp_path / f"{each}.json"
        file.write_text(json.dumps({**data, "added_tokens": tokens}))
        texts = [
            "".join(rng.choice([*contents, "x", " ", "abcd"]) for _ in range(rng.randint(1, 12)))
            for _ in range(50)
        ]
        assert_alike(inspect, file, texts, WHOLE)


UNKNOWN: list[tuple[tuple[str, ...], Any, str]] = [
    (("normalizer",), {"type": "NFC"}, "NFC"),
    (("pre_tokenizer",), {"type": "Whitespace"}, "Whitespace"),
    (("pre_tokenizer",), None, "pre_tokenizer"),
    (("pre_tokenizer", "add_prefix_space"), True, "add_prefix_space"),
    (("pre_tokenizer", "use_regex"), False, "use_regex"),
    (("post_processor",), {"type": "BertProcessing", "sep": ["a", 1], "cls": ["a", 1]}, "BertProcessing"),
    (("model", "dropout"), 0.5, "dropout"),
    (("model", "ignore_merges"), True, "ignore_merges"),
    (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix"),
    (("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix"),
    (("model", "vocab"), {"a": 0}, "byte"),
    (("added_tokens",), [added("x", 400, lstrip=True)], "lstrip"),
    (("added_tokens",), [added("x", 400, rstrip=True)], "rstrip"),
    (("added_tokens",), [added("x", 400, single_word=True)], "single_word"),
]


@pytest.mark.parametrize(
    ("keys", "value", "word"), UNKNOWN, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_not_supported_is_named(
    inspect: Inspect, tmp_path: Path, keys: tuple[str, ...], value: Any, word: str
) -> None:
    data = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
    holder = data
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (answer,) = inspect("tokens", str(tmp_path / "tokenizer.json"), "9")
    assert answer["code"] == 4 and word in answer["error"] and "with Python" in answer["error"]


DAMAGED = ["", "{}", "[]", '{"model": 1}', '{"version": "2.0"}']


@pytest.mark.parametrize("text", DAMAGED)
def test_what_is_no_tokenizer(inspect: Inspect, tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(BundleError):
        PromptTokenizer(file, 9)
    assert inspect("tokens", str(file), "9")[0]["code"] == 4
    assert "absent.json" in inspect("tokens", str(tmp_path / "absent.json"), "9")[0]["error"]


@pytest.mark.parametrize(
    "change", ["merge of unknown", "merge of one", "merge makes unknown", "id", "id twice", "list"]
)
def test_damaged_models(inspect: Inspect, tmp_path: Path, change: str) -> None:
    data = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
    model = data["model"]
    if change.startswith("merge"):
        wrong = {"merge of unknown": ["Ж", "a"], "merge of one": ["a"], "merge makes unknown": ["!", "!"]}
        model["merges"].append(wrong[change])
    else:
        model["vocab"] |= {"id": {"x1": -1}, "id twice": {"x1": 7}, "list": {"x1": []}}[change]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(data))
    assert inspect("tokens", str(file), "9")[0]["code"] == 4
    if change != "id twice":  # of two tokens with one id Python takes any
        with pytest.raises(BundleError):
            PromptTokenizer(file, 9)


def large_tokenizer(size: int) -> Tokenizer:
    """A byte-level BPE of `size` tokens, trained on words that are made up."""
    rng = random.Random(0)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s", "th")]
    words = ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 5))) for _ in range(60_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(words[at : at + 50]) for at in range(0, len(words), 50)], trainer)
    return tokenizer


@pytest.mark.slow
def test_a_large_tokenizer(inspect: Inspect, tmp_path: Path) -> None:
    """As large as Phi's; opening it and encoding a prompt takes C++ not many times as long as Python."""
    file = tmp_path / "tokenizer.json"
    large_tokenizer(50_000).save(str(file))
    assert len(json.loads(file.read_text(encoding="utf-8"))["model"]["merges"]) > 45_000
    assert_alike(
        inspect,
        file,
        [*strings(5000), *(" ".join(PROMPTS)[at : at + 200] for at in range(0, 9000, 100))],
        WHOLE,
    )
    times = {"C++": [], "Python": []}
    for _ in range(5):
        start = time.perf_counter()
        inspect("tokens", str(file), "256", lines=PROMPTS[:1])
        times["C++"].append(time.perf_counter() - start)
        start = time.perf_counter()
        PromptTokenizer(file, 256).encode(PROMPTS[0])
        times["Python"].append(time.perf_counter() - start)
    assert min(times["C++"]) < 3 * min(times["Python"]), times
