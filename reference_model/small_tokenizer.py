"""A small fixed tokenizer in CodeGen's files, for checkpoints without trained weights. Torch-free.

Byte-level BPE of 256 bytes, some merges and the end of text: every text has tokens, common words have few.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"

# Frequent English pairs, each of two pieces that come before it; Ġ is the space before a word.
MERGES = """
Ġ t|Ġ a|h e|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|Ġ o|e n|Ġ c|i t|i s|a n|o r|e s|Ġ b|e d|Ġ f|in g|Ġ p|o u|Ġa n
a l|a r|Ġt o|Ġ m|Ġo f|Ġ in|Ġ d|Ġ h|Ġan d|i c|l e|Ġt h|i on|o m|l l|en t|Ġ n|Ġ l|s t|Ġ re|v e|r o|l y|Ġb e
Ġ g|Ġ T|c t|Ġ S|i d|o t|Ġ I|u t|e t|Ġ A|Ġ is|Ġ on|i m|a m|o w|a y|a d|s e|Ġth at|Ġ C|i g|Ġf or|a c|v er|u r
Ġ y|Ġ u|l d|Ġs t|Ġ M|' s|Ġ he|Ġ it|at ion|it h|i r|c e|Ġy ou|i l|Ġ B|Ġw h|o l|Ġ P|Ġw ith|Ġ 1|t er|c h|Ġa s
Ġw e|Ġ (|n d|i ll|Ġ D|i f|Ġ 2|Ġb l|Ġbl u|Ġblu e|Ġg re|Ġgre en|Ġc ir|Ġcir c|Ġcirc le|Ġm o|Ġmo v|Ġmov ing
Ġre d|r ig|h t|Ġ rig|Ġrig ht
"""


def common_merges() -> list[tuple[str, str]]:
    """`MERGES` as pairs."""
    pairs = (pair.split(" ") for pair in re.split(r"[|\n]", MERGES.strip()))
    return [(left, right) for left, right in pairs]


def write_tokenizer(folder: Path, merges: Sequence[tuple[str, str]]) -> None:
    """Make `folder` with vocab.json, merges.txt, tokenizer.json and tokenizer_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *("".join(pair) for pair in merges), END_OF_TEXT]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])

    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False}
    config |= {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "pad", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
