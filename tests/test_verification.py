"""How far a bundle is from its reference: the sums, lockstep, drift, the page, and the command."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nova_export.bundle import Bundle
from nova_export.config import NovaConfig
from nova_export.demo import demo_checkpoint
from nova_export.errors import InputError
from nova_export.evaluation.difference import Difference
from nova_export.evaluation.html_report import write_report
from nova_export.evaluation.shapes_eval import TOTAL, Rate, Score
from nova_export.evaluation.verification import Pair, Side, Verification, scores, verify
from nova_export.runtime.pipeline import bundle_tokenizer
from nova_export.runtime.runner import Array, Runner
from nova_export.runtime.stage_runners import StageRunners
from nova_export.stages import stages
from reference_model.demo.data import sample_clip
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN

CALL: dict[str, Any] = {"num_inference_steps": 4, "num_diffusion_steps": 3, "max_latent_length": 3}


# The sums


def test_a_difference_in_parts_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal(1000).astype(np.float32)
    b = a + 0.1 * rng.standard_normal(1000).astype(np.float32)
    whole, parts = Difference(), Difference()
    whole.add(a, b)
    for start in range(0, 1000, 300):
        parts.add(a[start : start + 300], b[start : start + 300])
    assert parts.to_dict() == pytest.approx(whole.to_dict())
    assert whole.snr == pytest.approx(10 * math.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-3)
    assert whole.cosine == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-3)
    assert whole.max_error == pytest.approx(np.abs(a - b).max())


def test_equal_tensors_differ_by_nothing() -> None:
    same, zero = Difference(), Difference()
    same.add(np.arange(5.0), np.arange(5.0))
    zero.add(np.zeros(3), np.zeros(3))
    assert (same.cosine, same.snr, same.to_dict()["snr_db"]) == (pytest.approx(1), math.inf, None)
    assert (zero.cosine, zero.snr) == (1, math.inf)


def test_numbers_that_are_not_finite_are_counted_and_in_no_sum() -> None:
    difference = Difference()
    difference.add(np.array([1.0, 2, 3, 4, np.inf]), np.array([1.0, np.nan, np.inf, 65504, np.inf]))
    assert (difference.not_finite, difference.saturated) == (2, 2)  # infinity is beyond the range as well
    assert difference.max_error == 65500
    with pytest.raises(ValueError, match="differ"):
        difference.add(np.zeros(2), np.zeros(3))


# Lockstep and drift


class Changed:
    """A runner whose outputs are changed by a function of (call, outputs)."""

    def __init__(self, runner: Runner, change: Callable[[int, dict[str, Array]], None]) -> None:
        self.runner, self.change, self.calls = runner, change, 0
        self.stage = runner.stage

    def __enter__(self) -> Changed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self.runner.run(inputs)
        self.change(self.calls, outputs)
        self.calls += 1
        return outputs


@pytest.fixture(scope="module")
def side(golden_bundle: Callable[[str], Path]) -> Side:
    bundle = Bundle.open(golden_bundle("t2v"))
    return Side("reference", bundle.config, StageRunners(bundle, "cpu"), bundle_tokenizer(bundle))


def changed(side: Side, stage: str, change: Callable[[int, dict[str, Array]], None]) -> Side:
    runner = Changed(side.stage(stage), change)
    return replace(side, name="tested", stage=lambda name: runner if name == stage else side.stage(name))


def wrong_once(output: str) -> Callable[[int, dict[str, Array]], None]:
    """Frame 1, step 2 is the seventh of twelve calls in a run: of four steps a frame."""

    def change(call: int, outputs: dict[str, Array]) -> None:
        if call % 12 == 6:
            outputs[output] = outputs[output] + np.float32(0.5)

    return change


def test_the_same_stages_do_not_differ(side: Side) -> None:
    found = verify(side, side, ["a red circle", "a blue square"], **CALL)
    assert {d.error_power for d in found.tensors.values()} == {0}
    assert {d.error_power for d in [*found.tokens.values(), *found.drift.values()]} == {0}
    assert found.psnr == found.least_psnr == math.inf and len(found.pairs) == 2
    assert not np.array_equal(found.pairs[0].reference, found.pairs[1].reference)
    assert len(found.drift) == 3 * 4  # frames, steps
    assert {stage for stage, _ in found.tensors} == stages(side.config).keys() - {"vae_encoder"}


def test_an_error_stands_where_it_arose_and_drifts_from_there(side: Side) -> None:
    found = verify(side, changed(side, "diffusion_head", wrong_once("denoised")), ["a red circle"], **CALL)
    assert [place for place, d in found.tokens.items() if d.error_power] == [(1, 2)]
    assert found.tokens[1, 2].max_error == pytest.approx(0.5, abs=1e-4)
    drifted = [place for place, d in sorted(found.drift.items()) if d.error_power]
    assert drifted == [(1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert found.worst_first[0][0] == ("diffusion_head", "denoised")
    assert math.isfinite(found.least_psnr)


def test_a_step_is_what_its_stages_make_together(side: Side) -> None:
    """An error of the spatial encoder is in its step's tokens too, though the head's inputs are the same."""

    found = verify(side, changed(side, "spatial_encoder", wrong_once("z")), ["a red circle"], **CALL)
    assert [place for place, d in found.tokens.items() if d.error_power] == [(1, 2)]
    assert not found.tensors["diffusion_head", "denoised"].error_power
    assert min(place for place, d in found.drift.items() if d.error_power) == (1, 2)


def test_caches_are_compared_where_they_were_written(side: Side) -> None:
    config = side.config

    def shift(call: int, outputs: dict[str, Array]) -> None:
        outputs["new_key_cache_0"] += np.float32(0.25)

    found = verify(side, changed(side, "temporal_encoder", shift), ["a red circle"], **CALL)
    cache = found.tensors["temporal_encoder", "new_key_cache_0"]
    rows = config.condition_tokens + 3 * config.frame_tokens
    assert cache.count == 2 * rows * config.temporal.width  # two passes; every row once
    assert cache.max_error == pytest.approx(0.25, abs=1e-4)
    assert found.tensors["temporal_encoder", "new_key_cache_1"].error_power == 0
    assert found.tensors["temporal_encoder", "context"].error_power == 0  # the reference's caches go on
    assert found.drift[0, 0].error_power == 0 and found.drift[1, 0].error_power > 0


def test_a_bundle_is_its_checkpoint(golden_bundle: Callable[[str], Path]) -> None:
    arguments = [
        golden_bundle("t2v"),
        "--against",
        GOLDEN / "t2v" / "checkpoint",
        "--count",
        "1",
        "--json",
        "-q",
    ]
    arguments += ["--num-inference-steps", "4", "--num-diffusion-steps", "3", "--max-latent-length", "3"]
    result = nova_export("verify", *arguments)
    found = json.loads(result.out)
    assert result.code == 0 and len(found["steps"]) == 12
    assert min(each["snr_db"] or math.inf for each in found["tensors"]) > 80
    assert all(each["not_finite"] == 0 and each["count"] > 0 for each in found["tensors"])
    assert found["frames"]["least_psnr"] is None or found["frames"]["least_psnr"] > 45


def test_shapes_are_judged_on_both_sides() -> None:
    """A side that shows its circle in another colour loses that, and nothing else."""
    rng, config = np.random.default_rng(0), NovaConfig.from_checkpoint(demo_checkpoint())
    clips = [sample_clip(rng, ("red", "circle", motion)) for motion in ("moving left", "growing")]
    pairs = [Pair(clip.scene.prompt(), 0, clip.frames, clip.frames[..., [2, 1, 0]]) for clip in clips]
    made = scores(config, pairs)
    assert made is not None
    reference, tested = (score.rates[TOTAL] for score in made)
    assert reference["all"].share == 1 and tested["all"].share == 0
    assert tested["colour"].share == 0 and tested["motion"].share == tested["shape"].share == 1
    assert scores(config, [*pairs, Pair("a cat", 0, clips[0].frames, clips[0].frames)]) is None
    assert scores(NovaConfig.from_checkpoint(GOLDEN / "t2v" / "checkpoint"), pairs) is None


# The page


def test_the_page_holds_all_it_needs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 16, 24, 3), np.uint8)
    other = frames.copy()
    other[1] ^= 4
    wrong, fine = Difference(), Difference()
    wrong.add(np.ones(4), np.array([1.0, 2, np.nan, 1]))
    fine.add(np.ones(4), np.ones(4))
    found = Verification(
        reference="fp32 & <b>",
        tested="int8",
        tensors={("head", "denoised"): fine, ("spatial_encoder", "z"): wrong},
        tokens={(0, 0): wrong, (1, 0): fine},
        drift={(0, 0): wrong, (1, 0): wrong},
        pairs=(Pair("a <i>circle</i>", 3, frames, other),),
        scores=(Score({TOTAL: {"all": Rate(3, 4)}}), Score({TOTAL: {"all": Rate(1, 4)}})),
    )
    write_report(tmp_path / "page.html", found)
    page = (tmp_path / "page.html").read_text()
    assert "fp32 &amp; &lt;b&gt;" in page and "a &lt;i&gt;circle" in page and "<b>" not in page
    assert not re.search(r"(src|href)=.(?!data:)", page) and "http" not in page
    assert page.index("spatial_encoder") < page.index("denoised")  # worst first
    assert page.count('class="bad"') == 1
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page)
    ]
    assert [picture.size for picture in pictures] == [(3 * 24 * 7, 16 * 7)] * 3
    difference = np.asarray(pictures[2])
    assert set(np.unique(difference[:, : 24 * 7])) == {128}  # frame 0 is the same
    assert set(np.unique(difference[:, 24 * 7 : 2 * 24 * 7])) == {96, 160}  # four levels, eight times
    assert re.search(r"<td>all</td><td>75.0 % .*</td><td>25.0 % ", page)
    assert re.search(r"\| all +\| 75.0 % ", found.table())
    assert not list(tmp_path.glob("*.partial"))


# The command


def test_wrong_uses_of_verify(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    bundle, other = golden_bundle("t2v"), golden_bundle("t2i")
    only_error(nova_export("verify", bundle, "--against", other, "-q"), InputError.exit_code, "other configs")
    only_error(
        nova_export("verify", bundle, "--against", tmp_path, "-q"), 2, str(tmp_path), "model_index.json"
    )
    only_error(nova_export("verify", tmp_path, "--against", bundle, "-q"), 4, str(tmp_path), "build")
    page = ("verify", bundle, "--against", bundle, "-q", "--report")
    only_error(nova_export(*page, tmp_path / "page.pdf"), 6, ".html")
    only_error(nova_export(*page, tmp_path / "none" / "page.html"), 6, "does not exist")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    only_error(nova_export("verify", bundle, "--against", bundle, "--prompts", empty, "-q"), 5, "no prompts")
    only_error(
        nova_export("verify", bundle, "--against", bundle, "--prompts", tmp_path / "none", "-q"),
        5,
        "cannot be read",
    )


def test_layers_say_where_in_a_stage_it_arose(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Its third block's first layer is spoiled in one of two equal bundles: nothing before it differs."""
    ir = pytest.importorskip("onnx_ir")
    whole, spoiled = golden_bundle("t2i"), tmp_path / "spoiled"
    shutil.copytree(whole, spoiled)
    graph = spoiled / "spatial_encoder.onnx"
    model = ir.load(graph)
    layer = "image_encoder.blocks.2.mlp.fc1"
    bias = model.graph.initializers[f"{layer}.bias"]
    bias.const_value = ir.Tensor(bias.const_value.numpy() + 0.5, name=bias.name)
    ir.save(model, graph)
    manifest = json.loads((spoiled / "manifest.json").read_text())
    content = graph.read_bytes()
    manifest["files"][graph.name] = {
        "size": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    (spoiled / "manifest.json").write_text(json.dumps(manifest))
    options = ("--layers", "--count", "1", "-q", "--json", "--max-latent-length", "1")
    steps = ("--num-inference-steps", "4", "--num-diffusion-steps", "2")
    result = nova_export("verify", spoiled, "--against", whole, *options, *steps)
    assert result.code == 0, result.err
    tensors = json.loads(result.out)["tensors"]
    found = {each["tensor"]: each["snr_db"] for each in tensors if each["stage"] == "spatial_encoder"}
    norms = [f"image_encoder.blocks.{block}.norm{i}" for block in range(3) for i in (1, 2)]
    assert [found[name] is None for name in norms] == [True] * 5 + [False]
    assert found["image_encoder.blocks.2.mlp.fc1"] < 60 and found["image_encoder.blocks.2.attn.proj"] is None
    assert found["z"] < 60
    only_error(
        nova_export("verify", spoiled, "--against", GOLDEN / "t2i" / "checkpoint", *options), 2, "--layers"
    )
