"""Prompts to token ids as the published pipeline makes them: byte-level BPE, no special tokens, cut."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from nova_export.errors import BundleError


class PromptTokenizer:
    """A `tokenizer.json` and the most tokens that the checkpoint's text rows hold."""

    def __init__(self, path: Path, max_length: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path}: is no tokenizer ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_length = max_length

    def encode(self, prompt: str) -> tuple[list[int], str | None]:
        """Token ids, at most `max_length`; and, if the prompt was longer, a warning of where it was cut."""
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        if len(encoding.ids) <= self.max_length:
            return list(encoding.ids), None
        end = encoding.offsets[self.max_length - 1][1]
        kept, left_out = prompt[:end], prompt[end:]
        more = "…" if len(left_out) > 40 else ""
        return list(encoding.ids[: self.max_length]), (
            f"prompt has {len(encoding.ids)} tokens, the model takes {self.max_length}: "
            f"cut after {kept[-40:]!r}, leaving out {left_out[:40]!r}{more}"
        )
