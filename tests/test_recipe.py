"""Recipes: what they say, what is wrong with them, and what a build makes of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calibration.recipe import Recipe
from nova_export.errors import InputError
from nova_export.targets import PRECISIONS, find
from tests.command_line import nova_export, only_error
from tests.conftest import GOLDEN

CHECKPOINT = GOLDEN / "t2i" / "checkpoint"


@pytest.mark.parametrize("name", ["cpu", "small"])
def test_those_of_the_package_name_precisions_that_there_are(name: str) -> None:
    recipe = Recipe.load(name)
    assert find(PRECISIONS, recipe.precision)
    for stage, precision in recipe.stages.items():
        assert find(PRECISIONS, precision).is_for(stage)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[stages]\ntext_encoder = "fp16"\n[float_layers]\nspatial_encoder = ["*.fc2"]\n')
    assert Recipe.load(str(path)) == Recipe("fp32", {"text_encoder": "fp16"}, {"spatial_encoder": ("*.fc2",)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("precision = ", "cannot be read as TOML"),
        ("precison = 'fp16'", "'precison' is unknown"),
        ("precision = 16", "must be a name"),
        ("[stages]\nhead = 16", "lines like"),
        ("[float_layers]\nhead = 'fc1'", "lines like"),
    ],
)
def test_a_wrong_one(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        Recipe.load(str(path))


def test_one_that_is_not_there() -> None:
    with pytest.raises(InputError, match="there is cpu, small"):
        Recipe.load("fast")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command line asks of a build."""
    pytest.importorskip("torch")
    from nova_export.export import build

    asked: dict[str, Any] = {}

    def build_bundle(checkpoint: Path, out: Path, **options: Any) -> Path:
        asked.update(options)
        return out

    monkeypatch.setattr(build, "build_bundle", build_bundle)
    return asked


def test_the_command_line_goes_before_it(options: dict[str, Any], tmp_path: Path) -> None:
    out = ("-o", tmp_path / "b", "-q", "--recipe", "small")
    assert nova_export("build", CHECKPOINT, *out).code == 0
    assert options["precision"] == "fp16" and options["stage_precisions"]["text_encoder"] == "int4-weights"
    nova_export("build", CHECKPOINT, *out, "--precision", "fp32", "--stage", "text_encoder=bf16")
    assert options["precision"] == "fp32" and options["stage_precisions"]["text_encoder"] == "bf16"
    assert options["stage_precisions"]["spatial_encoder"] == "int8-weights"


def test_stages_and_layers_that_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "r.toml"
    path.write_text('[float_layers]\nspacial = ["*"]\n')
    only_error(
        nova_export("build", CHECKPOINT, "-o", tmp_path / "b", "-q", "--recipe", str(path)), 2, "'spacial'"
    )
