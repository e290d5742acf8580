"""Writes src/unicode_classes.inc: letters, numbers and white space as the `tokenizers` package has them.

Asks the package itself about every code point: `python engines/cpp/tools/unicode_classes.py`, after an update
of it. tests/cpp/test_tokenizer.py compares the table with the package that is installed.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers

CLASSES = ("other", "letter", "number", "space")
TABLE = Path(__file__).parents[1] / "src" / "unicode_classes.inc"
SURROGATES = range(0xD800, 0xE000)


def package_classes() -> dict[int, str]:
    """The class of every code point, from where the package's GPT-2 pattern cuts a text around it."""
    points = [point for point in range(0x110000) if point not in SURROGATES]
    classes = dict.fromkeys(points, "other")
    # A character between two of a class is one word with them if it is of that class too.
    for name, neighbour in (("letter", "a"), ("number", "1")):
        for point, size in zip(points, _first_words(points, neighbour), strict=True):
            if size == 3:
                classes[point] = name
    # A space before white space is a word alone; before all else it belongs to the next word.
    for point, size in zip(points, _first_words(points, " "), strict=True):
        if size == 1:
            classes[point] = "space"
    return classes


def _first_words(points: list[int], neighbour: str) -> list[int]:
    """Characters in the first word of "neighbour, character, neighbour", for each."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str
    after = "a" if neighbour == " " else neighbour
    return [split(f"{neighbour}{chr(point)}{after}")[0][1][1] for point in points]


def main() -> None:
    rows = []
    ordered = sorted(package_classes().items())
    for (name, _), run in groupby(ordered, key=lambda item: (item[1], item[0] >= SURROGATES.stop)):
        points = [point for point, _ in run]
        if name != "other":
            rows.append(f"{{0x{points[0]:x}, 0x{points[-1]:x}, CharacterClass::{name}}},")
    made_by = f"tools/unicode_classes.py from tokenizers {tokenizers.__version__}"
    TABLE.write_text("\n".join([f"// Written by {made_by}: first, last, class.", *rows, ""]))


if __name__ == "__main__":
    main()
