"""The tokenizer of a checkpoint as one `tokenizer.json`, whichever files the checkpoint has."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nova_export.errors import CheckpointError


def read_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json`, or the byte-level BPE of `vocab.json` and `merges.txt`. Raises CheckpointError."""
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.exists():
            return Tokenizer.from_file(str(whole))
        if not (vocab.exists() and merges.exists()):
            raise CheckpointError(f"{folder}: has neither tokenizer.json nor vocab.json with merges.txt")
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{folder}: cannot be read as a tokenizer ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
