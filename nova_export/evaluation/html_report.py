"""A verification as one page that needs nothing else: tables, plots as SVG, pictures inside."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

from nova_export.evaluation.metrics import Frames
from nova_export.evaluation.verification import SCORE_HEAD, Pair, Verification
from nova_export.runtime.media import write_whole

WIDTH, HEIGHT, LEFT, BOTTOM = 860, 260, 52, 34  # of a plot, and its margins, in pixels
CEILING = 140.0  # dB; what stands for equal
AMPLIFIED = 8  # how much the pictures of differences are
THUMBNAIL = 112  # pixels; smaller frames are enlarged to it
COLOURS = ("#1f6fb2", "#c2410c")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1e1e1e; background: #fafaf8; max-width: 900px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid #ddd }
td, th { white-space: nowrap }
td:first-child, td:nth-child(2), th:first-child, th:nth-child(2) { text-align: left }
.bad { color: #b91c1c; font-weight: 600 } .faint { color: #777 }
.frames { overflow-x: auto; white-space: nowrap } .frames img { margin: 1px; image-rendering: pixelated }
svg { max-width: 100%; height: auto } text { font-size: 12px; fill: #555 }
"""


def write_report(path: Path, found: Verification) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    page = "\n".join(_page(found))
    write_whole(path, lambda file: file.write_text(page, encoding="utf-8"))


def _page(found: Verification) -> Iterator[str]:
    title = f"{escape(found.tested)} against {escape(found.reference)}"
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{STYLE}</style><h1>{title}</h1>"
    yield f"<p>Frames: PSNR {_db(found.psnr)}, least {_db(found.least_psnr)}, {len(found.pairs)} prompts.</p>"
    yield "<h2>Stages on the same inputs, worst first</h2>"
    yield from _table(found)
    yield from _bars(found)
    yield "<h2>Drift over the steps of the loops</h2>"
    yield "<p>Tokens that a step makes from the reference's state, and frames when the loops run freely.</p>"
    places = sorted(found.drift)
    yield from _lines(
        {
            "teacher-forced": [found.tokens[place].snr for place in places],
            "free-running": [found.drift[place].snr for place in places],
        },
        [index for index, (_, step) in enumerate(places) if step == 0],
    )
    yield "<h2>Frames</h2>"
    if found.scores:
        yield "<p>What they show of what was asked for, by ShapesEval; in brackets the 95 % interval.</p>"
        yield "<table><tr>" + "".join(f"<th>{head}</th>" for head in SCORE_HEAD) + "</tr>"
        for row in found.score_rows:
            yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        yield "</table>"
    yield f"<p>Reference, tested, and their difference {AMPLIFIED} times as large.</p>"
    for pair in found.pairs:
        yield from _pictures(pair)
    yield "</html>"


def _table(found: Verification) -> Iterator[str]:
    heads = ("stage", "tensor", "cosine", "SNR", "max error", "of", "not finite", "saturated", "cut")
    yield "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
    for (stage, tensor), difference in found.worst_first:
        bad = ' class="bad"' if difference.not_finite or difference.saturated else ""
        cells = (
            escape(stage),
            escape(tensor),
            f"{difference.cosine:.6f}",
            _db(difference.snr),
            f"{difference.max_error:.2g}",
            f"{difference.max_reference:.3g}",
            str(difference.not_finite),
            str(difference.saturated),
            str(difference.cut),
        )
        yield f"<tr{bad}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table>"


def _bars(found: Verification) -> Iterator[str]:
    """SNR of every tensor, worst on top."""
    line, label = 18, 300
    yield f'<svg viewBox="0 0 {WIDTH} {line * len(found.tensors) + 6}" role="img" aria-label="SNR by tensor">'
    for row, ((stage, tensor), difference) in enumerate(found.worst_first):
        length = max(0.0, _shown(difference.snr)) / CEILING * (WIDTH - label - 70)
        y = row * line + 4
        yield f'<text x="{label - 8}" y="{y + 11}" text-anchor="end">{escape(f"{stage}.{tensor}")}</text>'
        yield f'<rect x="{label}" y="{y}" width="{length:.1f}" height="{line - 5}" fill="{COLOURS[0]}"/>'
        yield f'<text x="{label + length + 6:.1f}" y="{y + 11}">{_db(difference.snr)}</text>'
    yield "</svg>"


def _lines(series: dict[str, list[float]], marks: Sequence[int]) -> Iterator[str]:
    """SNR in dB over steps; `marks` are steps where a frame begins."""
    shown = {name: [_shown(value) for value in values] for name, values in series.items()}
    everything = [value for values in shown.values() for value in values]
    low, high = 10 * math.floor(min(everything) / 10), 10 * math.ceil(max(everything) / 10 + 0.01)
    count = max(map(len, shown.values()))

    def x(step: float) -> float:
        return LEFT + step * (WIDTH - LEFT - 10) / max(1, count - 1)

    def y(value: float) -> float:
        return 24 + (high - value) / (high - low) * (HEIGHT - 24 - BOTTOM)

    yield f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="SNR over steps">'
    for value in range(low, high + 1, max(10, 10 * round((high - low) / 60))):
        yield f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - 10}" stroke="#e3e3e0"/>'
        yield f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value} dB</text>'
    for frame, step in enumerate(marks):
        yield f'<path d="M{x(step):.1f} 24V{HEIGHT - BOTTOM}" stroke="#bbb" stroke-dasharray="3 3"/>'
        yield f'<text x="{x(step) + 3:.1f}" y="{HEIGHT - BOTTOM + 16}">frame {frame}</text>'
    for place, (name, values) in enumerate(shown.items()):
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(values))
        colour = COLOURS[place]
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield f'<rect x="{LEFT + 170 * place}" y="4" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{LEFT + 170 * place + 17}" y="14">{name}</text>'
    yield "</svg>"


def _pictures(pair: Pair) -> Iterator[str]:
    worst = min(pair.psnr)
    yield (
        f"<p>{escape(str(pair.prompt))} <span class='faint'>seed {pair.seed}, least PSNR {_db(worst)}, "
        f"least SSIM {min(pair.ssim):.4f}</span></p><div class='frames'>"
    )
    error = pair.tested.astype(np.int16) - pair.reference
    amplified = np.clip(128 + AMPLIFIED * error, 0, 255).astype(np.uint8)
    for name, frames in (("reference", pair.reference), ("tested", pair.tested), ("difference", amplified)):
        yield f'<img alt="{name}" src="data:image/png;base64,{_png(frames)}"><br>'
    yield "</div>"


def _png(frames: Frames) -> str:
    """Frames (F, H, W, 3) side by side."""
    from PIL import Image

    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    scale = max(1, THUMBNAIL // frames.shape[1])
    strip = strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _shown(value: float) -> float:
    return min(max(value, -CEILING), CEILING)


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "equal" if value > 0 else "none"
