"""The demo's tokenizer: byte-level BPE whose merges make one token of every word of the grammar."""

from __future__ import annotations

from itertools import accumulate, pairwise

from nova_export.evaluation.scene import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

SPACE = "Ġ"  # how byte-level BPE writes the space before a word
WORDS = ("an", "and", "on", "background", *COLOURS, *SHAPES, *BACKGROUNDS, *" ".join(MOTIONS).split())


def merges() -> list[tuple[str, str]]:
    """Pairs in order: each word grows letter by letter, so that its merges depend on no other word's."""
    pairs: dict[tuple[str, str], None] = {}
    for word in WORDS:
        letters = (SPACE, *word)
        grown = accumulate(letters)
        pairs |= dict.fromkeys((before, after[len(before) :]) for before, after in pairwise(grown))
    return [*pairs, ("a", "n")]  # the word that begins a prompt; last, for it stands inside others too
