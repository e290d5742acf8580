"""Is a bundle as good as what it was made from? Stage by stage, step by step, and in the frames.

Three questions, on the same prompts and seeds. On equal inputs, how far is each stage (`tensors`), and each
AR step (`tokens`)? Running freely, how far does it drift (`drift`)? And what of that is seen: do frames
differ (`pairs`), and does one of the two show less of what was asked for (`scores`)? Torch-free: both sides
are given as stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nova_export.config import NovaConfig
from nova_export.errors import InputError
from nova_export.evaluation.difference import Difference, finite
from nova_export.evaluation.lockstep import Lockstep, Place, Recorder
from nova_export.evaluation.metrics import Frames, psnr, ssim
from nova_export.evaluation.scene import parse
from nova_export.evaluation.shapes_eval import TOTAL, Item, Sample, Score, check_source, judge
from nova_export.lean_stages import DECODER
from nova_export.progress import Report, call_progress
from nova_export.runtime.generate import StageGetter
from nova_export.runtime.pipeline import Pipeline
from nova_export.runtime.runner import Runner
from nova_export.runtime.tokenizer import PromptTokenizer
from nova_export.tables import markdown

SCORE_HEAD = ("ShapesEval", "reference", "tested")


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a bundle's stages, or a checkpoint's, which needs no tokenizer.

    lean_decode: as in `stages`. Where only one of the two has it, decoders are compared by frames alone.
    vae_tile: as in `decoder_of`; both decode as the tested side does.
    """

    name: str
    config: NovaConfig
    stage: StageGetter
    tokenizer: PromptTokenizer | None = None
    lean_decode: str | None = None
    vae_tile: int | None = None


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed by both: frames uint8 (F, H, W, 3), and how alike they are, frame by frame."""

    prompt: str | int
    seed: int
    reference: Frames
    tested: Frames

    @property
    def psnr(self) -> list[float]:
        return [float(value) for value in psnr(self.reference, self.tested)]

    @property
    def ssim(self) -> list[float]:
        return [float(value) for value in ssim(self.reference, self.tested)]


@dataclass(frozen=True)
class Verification:
    """tensors: by stage and output, on equal inputs. tokens, drift: by latent frame and AR step.

    scores: of ShapesEval, the reference's and the tested one's; None where prompts or model are not for it.
    """

    reference: str
    tested: str
    tensors: dict[tuple[str, str], Difference]
    tokens: dict[Place, Difference]
    drift: dict[Place, Difference]
    pairs: tuple[Pair, ...]
    scores: tuple[Score, Score] | None = None

    @property
    def score_rows(self) -> list[tuple[str, str, str]]:
        """Of ShapesEval, by attribute: what was asked, and the share in which each side shows it."""
        if self.scores is None:
            return []
        reference, tested = (score.rates[TOTAL] for score in self.scores)
        return [(name, str(rate), str(tested[name])) for name, rate in reference.items()]

    @property
    def worst_first(self) -> list[tuple[tuple[str, str], Difference]]:
        """Tensors by their SNR; those with numbers that are not finite before all."""
        return sorted(self.tensors.items(), key=lambda item: (-item[1].not_finite, item[1].snr))

    @property
    def psnr(self) -> float:
        """Of all frames together, in dB: of the mean squared error, so that equal frames count too."""
        errors = [10 ** (-value / 10) for pair in self.pairs for value in pair.psnr]
        mean = float(np.mean(errors))
        return -10 * math.log10(mean) if mean else math.inf

    @property
    def least_psnr(self) -> float:
        return min(value for pair in self.pairs for value in pair.psnr)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: dB are None where nothing differs."""
        return {
            "reference": self.reference,
            "tested": self.tested,
            "tensors": [
                {"stage": stage, "tensor": tensor, **difference.to_dict()}
                for (stage, tensor), difference in self.worst_first
            ],
            "steps": [
                {
                    "frame": frame,
                    "step": step,
                    "teacher_forced": self.tokens[frame, step].to_dict(),
                    "free_running": self.drift[frame, step].to_dict(),
                }
                for frame, step in sorted(self.drift)
            ],
            "frames": {
                "psnr": finite(self.psnr),
                "least_psnr": finite(self.least_psnr),
                "pairs": [
                    {
                        "prompt": pair.prompt,
                        "seed": pair.seed,
                        "psnr": [finite(value) for value in pair.psnr],
                        "ssim": pair.ssim,
                    }
                    for pair in self.pairs
                ],
            },
            "shapes_eval": self.scores
            and {
                name: score.to_dict()
                for name, score in zip(("reference", "tested"), self.scores, strict=True)
            },
        }

    def table(self) -> str:
        """For a person: stages, worst first, then drift at the end of each frame, then the frames."""
        head = ("stage", "tensor", "cosine", "SNR dB", "max error", "of", "not finite", "saturated", "cut")
        rows = [
            (
                stage,
                tensor,
                f"{d.cosine:.6f}",
                f"{d.snr:.1f}",
                f"{d.max_error:.2g}",
                f"{d.max_reference:.3g}",
                str(d.not_finite),
                str(d.saturated),
                str(d.cut),
            )
            for (stage, tensor), d in self.worst_first
        ]
        lines = [markdown(head, rows)]
        for frame in sorted({frame for frame, _ in self.drift}):
            last = max(step for at, step in self.drift if at == frame)
            same, free = self.tokens[frame, last], self.drift[frame, last]
            lines.append(
                f"latent frame {frame}, step {last + 1}: {same.snr:.1f} dB teacher-forced, "
                f"{free.snr:.1f} dB free-running"
            )
        lines.append(f"frames: PSNR {self.psnr:.1f} dB, least {self.least_psnr:.1f} dB")
        if self.scores:
            lines.append(markdown(SCORE_HEAD, self.score_rows))
        return "\n".join(lines)


def verify(
    reference: Side,
    tested: Side,
    prompts: Sequence[str | int],
    seed: int = 0,
    report: Report = lambda done: None,
    **arguments: Any,
) -> Verification:
    """Compare on every prompt, or class; number i has seed + i. arguments: of `Request`.

    report: told how many prompts are done, in parts. Raises InputError for sides of different checkpoints.
    """
    if reference.config.to_dict() != tested.config.to_dict():
        raise InputError(
            f"{tested.name} and {reference.name} have other configs: only forms of one checkpoint compare"
        )
    lockstep = Lockstep(reference.stage, tested.stage, whole_steps=True)
    decodes_alike = reference.lean_decode == tested.lean_decode

    def in_lockstep(name: str) -> Runner:
        return lockstep(name) if decodes_alike or not name.startswith(DECODER) else reference.stage(name)

    both = _pipeline(reference, in_lockstep, tested)
    alone = _pipeline(tested, tested.stage, tested)
    drift: dict[Place, Difference] = {}
    pairs = []
    for index, prompt in enumerate(prompts):
        request = {"max_latent_length": reference.config.video_length, **arguments, "seed": seed + index}
        recorder = Recorder()
        told, compared = call_progress(report, index, 0.5), call_progress(report, index + 0.5, 0.5)
        expected = both(prompt, callback=_each(recorder, told), **request)
        made = alone(prompt, callback=_each(recorder.compare(drift), compared), **request)
        pairs.append(Pair(prompt, seed + index, expected.frames[0], made.frames[0]))
        report(index + 1)
    return Verification(
        reference.name,
        tested.name,
        lockstep.tensors,
        lockstep.tokens,
        drift,
        tuple(pairs),
        scores(reference.config, pairs),
    )


def _pipeline(side: Side, stage: StageGetter, tested: Side) -> Pipeline:
    return Pipeline(
        side.config, stage, tested.tokenizer, lean_decode=side.lean_decode, vae_tile=tested.vae_tile
    )


def scores(config: NovaConfig, pairs: Sequence[Pair]) -> tuple[Score, Score] | None:
    """ShapesEval of both sides; None for a model or a prompt of another world."""
    try:
        check_source(config, "")
        items = [Item.of(parse(str(pair.prompt))) for pair in pairs]
    except InputError:
        return None

    def score(frames: Sequence[Frames]) -> Score:
        return Score.of(
            [Sample(i, each, judge(i.scene, each)) for i, each in zip(items, frames, strict=True)]
        )

    return score([pair.reference for pair in pairs]), score([pair.tested for pair in pairs])


def _each(*callbacks: Callable[[Any], object]) -> Callable[[Any], None]:
    """One callback that calls several; none of them cancels."""

    def callback(step: Any) -> None:
        for each in callbacks:
            each(step)

    return callback
