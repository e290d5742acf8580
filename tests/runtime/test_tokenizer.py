"""nova_export.runtime.tokenizer: plain BPE, no special tokens, and a warning that says where it cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_export.errors import BundleError
from nova_export.runtime.tokenizer import PromptTokenizer
from tests.conftest import GOLDEN

FILE = GOLDEN / "t2v" / "checkpoint" / "tokenizer" / "tokenizer.json"


@pytest.fixture(scope="module")
def long() -> PromptTokenizer:
    return PromptTokenizer(FILE, 10_000)


def decoded(tokenizer: PromptTokenizer, ids: list[int]) -> str:
    return str(tokenizer._tokenizer.decode(ids, skip_special_tokens=False))


def test_a_short_prompt_is_kept_and_warns_of_nothing(long: PromptTokenizer) -> None:
    ids, notice = long.encode("a red circle moving right")
    assert notice is None and decoded(long, ids) == "a red circle moving right"
    assert long.encode("") == ([], None)


def test_there_are_no_special_tokens(long: PromptTokenizer, tmp_path: Path) -> None:
    """Not even those that the file's own post-processor would add, nor its truncation and padding."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(FILE))
    tokenizer.add_special_tokens(["<start>"])
    start = tokenizer.token_to_id("<start>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", start)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompt = "many spotted jellyfish pulsating under water"
    assert PromptTokenizer(tmp_path / "tokenizer.json", 10_000).encode(prompt) == long.encode(prompt)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.integers(1, 30))
def test_a_long_prompt_is_cut(prompt: str, most: int) -> None:
    """The first ids are those of the whole prompt: cutting never makes other tokens."""
    whole, _ = PromptTokenizer(FILE, 10_000).encode(prompt)
    ids, notice = PromptTokenizer(FILE, most).encode(prompt)
    assert ids == whole[:most]
    assert (notice is None) == (len(whole) <= most)


def test_the_warning_says_where_it_cut(long: PromptTokenizer) -> None:
    prompt = "one two three " * 20 + "the end"
    short = PromptTokenizer(FILE, 8)
    ids, notice = short.encode(prompt)
    kept = decoded(long, ids)
    assert prompt.startswith(kept)
    assert notice is not None
    assert f"{len(long.encode(prompt)[0])} tokens, the model takes 8" in notice
    assert f"cut after {kept[-40:]!r}" in notice
    assert f"leaving out {prompt[len(kept) : len(kept) + 40]!r}…" in notice


def test_the_warning_counts_characters_not_bytes(long: PromptTokenizer) -> None:
    """A byte-level BPE makes several tokens of a character; the warning shows whole ones."""
    prompt = "\N{CAT FACE}\N{DOG FACE} é 漢字 plain"
    total = len(long.encode(prompt)[0])
    for most in range(1, total):
        _, notice = PromptTokenizer(FILE, most).encode(prompt)
        assert notice is not None and "\ufffd" not in notice
        kept, left = notice.split("cut after ")[1].split(", leaving out ")
        assert prompt.startswith(kept[1:-1]) and prompt.endswith(left[1:-1])
        assert kept[1:-1] + left[1:-1] == prompt


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer.json: is no tokenizer"):
        PromptTokenizer(tmp_path / "tokenizer.json", 4)
    with pytest.raises(BundleError, match="is no tokenizer"):
        PromptTokenizer(tmp_path / "absent.json", 4)
