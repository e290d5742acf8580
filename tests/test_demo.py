"""The demo that comes with the package: found, built once into the cache, checked, and as good as it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

import nova_export
from nova_export.bundle import Bundle
from nova_export.demo import Build, demo_bundle, demo_bundle_folder, demo_checkpoint
from nova_export.errors import OutputError
from nova_export.evaluation.shapes_eval import TOTAL, Score, prompt_list, samples_of
from nova_export.export.build import build_bundle
from reference_model.demo.recipe import recipe_hash

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOVA_EXPORT_CACHE", str(cache))


@pytest.fixture
def build(golden_bundle: Callable[[str], Path]) -> Build:
    """As the command builds it, from stages that were exported already where they are still good."""

    def build(checkpoint: Path, out: Path) -> None:
        if not out.exists():
            shutil.copytree(golden_bundle("demo"), out)
        build_bundle(checkpoint, out, verify=False, force=True)

    return build


def never(checkpoint: Path, out: Path) -> None:
    raise AssertionError(f"{out} was built again")


def test_the_checkpoint_is_small_and_half_precision() -> None:
    files = [path for path in demo_checkpoint().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * MEGABYTE
    for path in demo_checkpoint().rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_the_checkpoint_has_the_keys_and_configs_of_the_published_layout() -> None:
    golden = Path(__file__).parent / "golden" / "t2v" / "checkpoint"
    for part in ("transformer", "vae", "text_encoder", "scheduler"):
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        ours, theirs = (json.loads((root / part / name).read_text()) for root in (demo_checkpoint(), golden))
        assert ours.keys() == theirs.keys() - {"transformers_version"}, part
    ours, theirs = (
        json.loads((root / "model_index.json").read_text()) for root in (demo_checkpoint(), golden)
    )
    assert {k: v for k, v in ours.items() if k[0] != "_"} == {k: v for k, v in theirs.items() if k[0] != "_"}


def test_the_weights_are_of_the_recipe_that_is_here() -> None:
    """Fails when data, sizes or phases were changed and nobody trained again."""
    training = json.loads((demo_checkpoint() / "training.json").read_text())
    assert training["recipe_sha256"] == recipe_hash()


def test_the_bundle_is_built_once_and_again_when_damaged(in_cache: None, cache: Path, build: Build) -> None:
    bundle = demo_bundle(build)
    assert bundle.parent == cache and Bundle.open(bundle).config.base_frames == 3
    assert demo_bundle(never) == bundle == demo_bundle_folder()
    graph = bundle / Bundle.open(bundle).stages["condition"].graph
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AssertionError, match="built again"):
        demo_bundle(never)
    assert demo_bundle(build) == bundle and graph.read_bytes() == content


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NOVA_EXPORT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match="NOVA_EXPORT_CACHE"):
        demo_bundle(never)


def test_the_score_is_above_a_floor(in_cache: None, build: Build) -> None:
    """A fair sample of the prompts. Chance: 1 in 8 for colour, 1 in 7 for motion. All: the model card."""
    with nova_export.load(demo_bundle(build)) as pipe:
        rates = Score.of(samples_of(pipe, prompt_list()[:48])).rates[TOTAL]
    floors = {"objects": 0.95, "background": 0.95, "colour": 0.9, "shape": 0.75, "motion": 0.9}
    assert {name: rates[name].share for name in floors if rates[name].share < floors[name]} == {}
