"""One picture of many samples, a row each: what was asked for, every frame, and in red what is not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nova_export.evaluation.shapes_eval import Sample
from nova_export.runtime.media import save_frames

if TYPE_CHECKING:
    from PIL import ImageDraw

MAX_ROWS = 40
FRAME, GAP, MARGIN = 96, 4, 12  # pixels
TEXT_WIDTH, LINE = 300, 18
FONT_SIZE = 13
PAPER, INK, FAINT, RED = (250, 250, 248), (30, 30, 30), (130, 130, 130), (200, 20, 20)
EDGE = (200, 200, 196)  # around frames, so that a white background is seen on paper


def save_contact_sheet(path: str | Path, made: Sequence[Sample]) -> None:
    """Write a .png of at most MAX_ROWS samples (at least one), failures first. Raises OutputError."""
    from PIL import Image, ImageDraw

    failed = [sample for sample in made if sample.failed]
    shown = [*failed, *(sample for sample in made if not sample.failed)][:MAX_ROWS]
    row = FRAME + 2 * GAP
    width = 2 * MARGIN + TEXT_WIDTH + max(len(sample.frames) for sample in shown) * (FRAME + GAP)
    sheet = Image.new("RGB", (width, 2 * MARGIN + LINE + GAP + row * len(shown)), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = f"{len(failed)} of {len(made)} failed; {len(shown)} shown, failures first"
    draw.text((MARGIN, MARGIN), title, FAINT, font_size=FONT_SIZE)
    for index, sample in enumerate(shown):
        top = MARGIN + LINE + GAP + index * row
        _text(draw, sample, top)
        for place, frame in enumerate(sample.frames):
            left = MARGIN + TEXT_WIDTH + place * (FRAME + GAP)
            draw.rectangle((left - 1, top - 1, left + FRAME, top + FRAME), outline=EDGE)
            sheet.paste(Image.fromarray(frame).resize((FRAME, FRAME), Image.Resampling.BICUBIC), (left, top))
    save_frames(path, np.asarray(sheet)[None])


def _text(draw: ImageDraw.ImageDraw, sample: Sample, top: int) -> None:
    """The prompt, its group, and what is not as asked, each wrapped to the column."""
    failed = f"not as asked: {', '.join(sample.failed)}"
    verdict = (failed, RED) if sample.failed else ("all as asked", FAINT)
    for text, colour in ((sample.item.prompt, INK), (sample.item.group, FAINT), verdict):
        for line in _wrap(draw, text):
            draw.text((MARGIN, top), line, colour, font_size=FONT_SIZE)
            top += LINE


def _wrap(draw: ImageDraw.ImageDraw, text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font_size=FONT_SIZE) > TEXT_WIDTH - MARGIN:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
