"""Statistics of layers' inputs, the ranges taken from them, and the runs that they are collected in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.ranges import STEPS, best_range, candidates, smoothing
from calibration.statistics import BINS, LayerInput, Statistics
from nova_export.bundle import Bundle
from nova_export.errors import InputError
from tests.command_line import nova_export, only_error

pytest.importorskip("onnx_ir")

from calibration import collect
from calibration.collect import LayerObserver, calibrate

RNG = np.random.default_rng(0)
SHORT: dict[str, Any] = {"num_inference_steps": 6, "num_diffusion_steps": 3, "max_latent_length": 1}


def seen(*arrays: Any) -> LayerInput:
    layer = LayerInput(np.shape(arrays[0])[-1])
    for array in arrays:
        layer.add(np.asarray(array, np.float32))
    return layer


def rounded(x: Any, low: float, high: float) -> Any:
    step = (high - low) / STEPS
    return np.clip(np.rint(x / step), round(low / step), round(high / step)) * step


def test_a_histogram_that_grew_is_that_of_the_whole() -> None:
    """Whatever comes first: values a thousand times larger come later and are not cut off."""
    x = [RNG.standard_normal((50, 4)) * size for size in (0.001, 30.0, 1.0)]
    layer = seen(*x)
    whole = np.concatenate(x).astype(np.float32)
    expected = np.histogram(whole, BINS, (-layer.limit, layer.limit))[0]
    assert layer.counts.sum() == whole.size
    assert np.abs(np.cumsum(layer.counts) - np.cumsum(expected)).max() <= 2  # on the edge of a bin
    assert (layer.low, layer.high) == (whole.min(), whole.max()) and layer.limit >= np.abs(whole).max()
    np.testing.assert_allclose(layer.largest, np.abs(whole).max(0))
    np.testing.assert_allclose(layer.squares, np.square(whole, dtype=np.float64).sum(0), rtol=1e-6)
    assert layer.rows == 150


def test_statistics_come_back_from_their_file(tmp_path: Path) -> None:
    found = Statistics({"vae": "1"}, ["a", "b"], 3, {"guidance_scale": 2.0}, 1)
    found.layers["text", "fc1"] = seen(RNG.standard_normal((9, 5)))
    found.largest["text", "gelu"] = math.inf
    found.save(tmp_path / "c.npz")
    again = Statistics.load(tmp_path / "c.npz")
    assert again.same_origin(found) and again.done == 1 and again.digest() == found.digest()
    np.testing.assert_array_equal(again.layers["text", "fc1"].counts, found.layers["text", "fc1"].counts)
    assert again.largest_of("text") == {"gelu": math.inf} and again.largest_of("vae") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["c.npz"]
    again.layers["text", "fc1"].add(np.ones((1, 5), np.float32))
    assert again.digest() != found.digest()


@pytest.mark.parametrize("content", [b"", b"nothing", "objects", "other arrays"])
def test_another_file_is_no_calibration(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "c.npz"
    if content == "objects":
        np.savez(path, head=np.array([{"a": 1}], dtype=object))
    elif content == "other arrays":
        np.savez(path, head=np.arange(3))
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match="holds no calibration"):
        Statistics.load(path)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["normal", "outliers", "positive", "zero"])
def test_the_best_range_has_the_least_error_in_truth(kind: str, symmetric: bool) -> None:
    x = RNG.standard_normal((4000, 8)).astype(np.float32)
    if kind == "outliers":
        x[0, 0] = 300
    if kind == "positive":
        x = np.abs(x)
    if kind == "zero":
        x[:] = 0
    layer = seen(x)
    truth = {
        each: np.square(rounded(x, each.low, each.high) - x).mean() for each in candidates(layer, symmetric)
    }
    best = best_range(layer, symmetric)
    assert truth[best] <= 1.1 * min(truth.values()) + 1e-12
    assert best.low <= 0 <= best.high
    assert not symmetric or best.low == -best.high


def test_smoothing_pays_where_one_channel_is_wide() -> None:
    """And the error of the product falls as expected, against the same product without it."""
    x = RNG.standard_normal((2000, 64)).astype(np.float32)
    weight = RNG.standard_normal((64, 32)).astype(np.float32)
    plain = seen(x)
    assert smoothing(plain, weight, best_range(plain, True), True) is None
    x[:, 3] *= 60
    wide = seen(x)
    before = best_range(wide, True)
    found = smoothing(wide, weight, before, True)
    assert found is not None
    factors, after = found
    assert factors[3] > 4 * np.median(factors)

    def error(factors: Any, low: float, high: float) -> float:
        changed = weight * factors[:, None]
        steps = np.abs(changed).max(0) / 127
        product = rounded(x / factors, low, high) @ (np.rint(changed / steps) * steps)
        return float(np.square(product - x @ weight).mean())

    assert error(factors, after.low, after.high) < 0.5 * error(np.ones(64), before.low, before.high)


def test_calibration_sees_every_layer_on_a_sample_of_steps(
    golden_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(golden_bundle("t2i"))
    monkeypatch.setattr(collect, "STEPS_PER_FRAME", 3)
    calls: list[str] = []
    look = LayerObserver.look
    monkeypatch.setattr(LayerObserver, "look", lambda self, x: (calls.append(self.name), look(self, x))[1])
    found = calibrate(bundle, ["a red circle"], 5, tmp_path / "c.npz", **SHORT)
    assert calls.count("spatial_encoder") == 3 and calls.count("temporal_encoder") == 1
    blocks = bundle.config.spatial.depth
    names = set(found.layers_of("spatial_encoder"))
    assert {f"image_encoder.blocks.{i}.mlp.fc1" for i in range(blocks)} <= names
    assert len([name for name in names if "blocks" in name or name.startswith("linear_")]) >= 4 * blocks
    assert all(layer.rows for layer in found.layers.values())
    assert {stage for stage, _ in found.largest} == set(bundle.stages) - {"vae_encoder"}
    assert all(0 <= largest < 1e4 for largest in found.largest.values())


def test_a_group_of_layers_at_a_time_gives_the_same(
    golden_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(golden_bundle("t2i"))
    at_once = calibrate(bundle, ["a red circle"], 5, tmp_path / "a.npz", **SHORT)
    monkeypatch.setattr(collect, "GROUP_CHANNELS", 100)
    one_by_one = calibrate(bundle, ["a red circle"], 5, tmp_path / "b.npz", **SHORT)
    assert at_once.digest() == one_by_one.digest()


def test_a_stopped_calibration_goes_on(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    bundle, out = Bundle.open(golden_bundle("t2i")), tmp_path / "c.npz"
    prompts = ["a red circle", "two cats", "the sea"]
    whole = calibrate(bundle, prompts, 5, tmp_path / "whole.npz", **SHORT)

    def stop(done: float) -> None:
        if done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle, prompts, 5, out, stop, **SHORT)
    assert Statistics.load(out).done == 2
    told: list[float] = []
    assert calibrate(bundle, prompts, 5, out, told.append, **SHORT).digest() == whole.digest()
    assert min(told) > 2 and math.isclose(told[-1], 3)
    with pytest.raises(InputError, match="another checkpoint, or with other prompts"):
        calibrate(bundle, prompts, 6, out, **SHORT)


def test_the_command(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "c.npz"
    options = ("-o", out, "--count", "1", "--num-inference-steps", "4", "--num-diffusion-steps", "2", "-q")
    made = nova_export("calibrate", golden_bundle("t2i"), *options, "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["prompts"] == 1 and Statistics.load(out).done == 1
    only_error(nova_export("calibrate", golden_bundle("t2v"), *options), 5, "another checkpoint", "--out")
