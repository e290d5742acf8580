"""The command line: its options, what it writes and prints, and the exit code of every kind of failure."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from nova_export import Request, __version__, errors
from nova_export.cli import cli
from nova_export.config import NovaConfig
from nova_export.runtime import pipeline
from nova_export.runtime.pipeline import Pipeline
from tests.command_line import nova_export, only_error
from tests.strategies import parts

SHORT = ("--num-inference-steps", "2", "--num-diffusion-steps", "2", "--seed", "1")
Bundle = Callable[[str], Path]


@pytest.fixture
def image_bundle(golden_bundle: Bundle) -> Path:
    return golden_bundle("t2i")


@pytest.fixture
def video_bundle(golden_bundle: Bundle) -> Path:
    return golden_bundle("t2v")


# Options


@pytest.mark.parametrize(
    "command", [[], *([name] for name in cli.commands)], ids=lambda c: " ".join(c) or "none"
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command: list[str], flag: str) -> None:
    result = nova_export(*command, flag)
    assert result.code == 0 and result.err == ""
    assert result.out.startswith("Usage: nova-export") and len(result.out.splitlines()) > 4


def test_version() -> None:
    assert nova_export("--version").out == f"nova-export, version {__version__}\n"


@pytest.mark.parametrize("field", dataclasses.fields(Request)[1:], ids=lambda field: field.name)
def test_every_argument_of_a_request_is_an_option(field: dataclasses.Field[Any]) -> None:
    options = {option.name: option for option in cli.commands["run"].params}
    option = options[field.name]
    assert option.opts == ["--" + field.name.replace("_", "-")]
    assert isinstance(option, click.Option) and option.help
    if field.name != "max_latent_length":  # of the command line's own default, see below
        assert option.default == field.default


def test_exit_codes_differ() -> None:
    """One code a cause, none of them that of an internal error or of Python itself."""
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    codes = [c.exit_code for c in classes]
    assert len(set(codes)) == len(codes) == 13 and not {0, 70} & set(codes)


@pytest.mark.parametrize("arguments", [["fly"], ["run", "--fly"], ["init"], ["run", "a", "--seed", "x"]])
def test_usage_errors_of_the_parser(arguments: list[str]) -> None:
    result = nova_export(*arguments)
    assert result.code == 2 and "Usage:" in result.err and "Error:" in result.err


# Running a bundle


def test_every_kind_of_file(video_bundle: Path, tmp_path: Path) -> None:
    """Generated once, decoded to each: frames of the second run are those of the first."""
    import av

    latents, first = tmp_path / "latents.npz", tmp_path / "first.npz"
    common = ("--bundle", video_bundle, "--max-latent-length", "2", *SHORT)
    result = nova_export("run", "a red circle", *common, "-o", first, "--save-latents", latents)
    assert result.code == 0, result.err
    assert result.out.splitlines() == [str(first), str(latents)]
    assert "1 x 5 frames of 96x64, seed 1" in result.err
    made = np.load(first)
    assert made["frames"].shape == (1, 5, 64, 96, 3) and made["latents"].shape == (1, 4, 2, 8, 12)
    for suffix in ("mp4", "gif", "png", "npz"):
        out = tmp_path / f"again.{suffix}"
        result = nova_export("run", "--from-latents", latents, "--bundle", video_bundle, "-o", out)
        assert (result.code, result.out) == (0, f"{out}\n"), result.err
    with av.open(str(tmp_path / "again.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 5
    with Image.open(tmp_path / "again.gif") as gif, Image.open(tmp_path / "again.png") as png:
        assert (gif.n_frames, gif.size) == (5, (96, 64))
        np.testing.assert_array_equal(np.asarray(png), made["frames"][0, 0])
    np.testing.assert_array_equal(np.load(tmp_path / "again.npz")["frames"], made["frames"])
    np.testing.assert_array_equal(np.load(tmp_path / "again.npz")["latents"], made["latents"])


def test_batch_as_json(image_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    arguments = ("--bundle", image_bundle, "--num-images-per-prompt", "2", "-o", out, "--json", *SHORT)
    result = nova_export("run", "one", "two", *arguments)
    assert (result.code, result.err) == (0, "")
    printed = json.loads(result.out)
    assert set(printed) == {"files", "seed", "frames", "seconds"}
    assert printed["files"] == [str(tmp_path / f"a-{i}.png") for i in range(4)]
    assert printed["seed"] == 1 and printed["frames"] == [4, 1, 96, 96, 3]
    assert sorted(map(str, tmp_path.iterdir())) == printed["files"]


def test_quiet_and_the_empty_prompt(image_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    result = nova_export("run", "", "--bundle", image_bundle, "-o", out, "--quiet", *SHORT)
    assert (result.code, result.out, result.err) == (0, f"{out}\n", "")


def test_a_seed_is_drawn_and_told(image_bundle: Path, tmp_path: Path) -> None:
    arguments = ("a", "--bundle", image_bundle, "--num-inference-steps", "1", "--num-diffusion-steps", "1")
    told = json.loads(nova_export("run", *arguments, "--json", "-o", tmp_path / "a.npz").out)
    nova_export("run", *arguments, "--seed", str(told["seed"]), "-o", tmp_path / "b.npz")
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npz")["latents"], np.load(tmp_path / "b.npz")["latents"]
    )


def test_a_long_prompt_warns(image_bundle: Path, tmp_path: Path) -> None:
    prompt = "a shiba inu wearing a beret and a black turtleneck " * 3
    result = nova_export("run", prompt, "--bundle", image_bundle, "-o", tmp_path / "a.png", *SHORT)
    warning, summary = result.err.splitlines()
    assert result.code == 0 and summary.startswith("1 x 1 frames")
    assert warning.startswith("warning: prompt has ") and "the model takes 16: cut after" in warning


def test_image_of_another_size_is_told(video_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 50), "red").save(tmp_path / "in.png")
    arguments = ("--image", tmp_path / "in.png", "--max-latent-length", "2", "-o", tmp_path / "a.gif", *SHORT)
    result = nova_export("run", "a", "--bundle", video_bundle, *arguments)
    assert result.code == 0
    assert "in.png is 50x50 pixels: cropped" in result.err and "resized to 96x64" in result.err


@pytest.mark.parametrize(("name", "frames"), [("a.gif", 13), ("a.png", 1)])
def test_a_video_is_as_long_as_trained_and_a_png_one_frame(
    video_bundle: Path, tmp_path: Path, name: str, frames: int
) -> None:
    result = nova_export("run", "a", "--bundle", video_bundle, "-o", tmp_path / name, "--json", *SHORT)
    assert result.code == 0 and json.loads(result.out)["frames"][1] == frames


# Arguments that cannot be carried out: each before anything is computed, and nothing is written


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--num-inference-steps", "0"], 2, ["num_inference_steps is 0", "at least 1"]),
        (["--num-diffusion-steps", "-3"], 2, ["num_diffusion_steps is -3", "at least 1"]),
        (["--num-diffusion-steps", "1001"], 2, ["num_diffusion_steps is 1001", "1 to 1000"]),
        (["--num-images-per-prompt", "0"], 2, ["num_images_per_prompt"]),
        (["--num-images-per-prompt", "999"], 2, ["999 samples", "the most is"]),
        (["--max-latent-length", "9"], 2, ["max_latent_length is 9", "image checkpoint", "use 1"]),
        (
            ["--guidance-scale", "0.5", "--negative-prompt", "b"],
            2,
            ["guidance_scale is 0.5", "negative_prompt"],
        ),
        (["--guidance-scale", "-1"], 2, ["guidance_scale", "at least 0"]),
        (["--guidance-scale", "nan"], 2, ["guidance_scale"]),
        (["--min-guidance-scale", "nan"], 2, ["min_guidance_scale"]),
        (["--image-guidance-scale", "inf"], 2, ["image_guidance_scale"]),
        (["--guidance-renorm", "1.5"], 2, ["guidance_renorm"]),
        (["--flow-shift", "3"], 2, ["flow_shift", "DDPM"]),
        (["--flow-shift", "-3"], 2, ["flow_shift"]),
        (["--image", "pyproject.toml"], 2, ["video checkpoint"]),
        (["--seed", str(2**64)], 5, ["seed", str(2**64)]),
        (["--save-latents", "latents.mp4"], 2, ["--save-latents", ".npz", "latents.mp4"]),
        (["--save-latents", "nowhere/latents.npz"], 6, ["nowhere", "does not exist"]),
        (["-o", "nowhere/a.png"], 6, ["nowhere", "does not exist"]),
        (["-o", "a.webm"], 6, ["a.webm", ".mp4, .gif, .png, .npz"]),
        (["-o", "."], 6, ["must end in"]),
        (["--bundle", "nowhere"], 4, ["nowhere", "no such bundle folder", "nova-export build"]),
        (["--bundle", "."], 4, ["manifest.json", "no bundle"]),
        (["--from-latents", "latents.npz"], 2, ["PROMPT"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_refused(
    image_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    only_error(nova_export("run", "a", "--bundle", image_bundle, "-o", "a.png", *arguments), code, *words)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_generate(image_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    only_error(
        nova_export("run", "--bundle", image_bundle, "-o", out), 2, "no PROMPT given", "nova-export run"
    )
    only_error(nova_export("build", "checkpoint"), 2, "--out FOLDER is missing", "checkpoint")


def test_a_prompt_that_is_no_text(image_bundle: Path, tmp_path: Path) -> None:
    """Bytes of a command line that are not UTF-8 reach Python as lone surrogates."""
    result = nova_export("run", "caf\udce9", "--bundle", image_bundle, "-o", tmp_path / "a.png")
    only_error(result, 5, "prompt 'caf\\udce9'", "UTF-8")


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image(video_bundle: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "in.png"
    if content is not None:
        path.write_bytes(content)
    arguments = ("--bundle", video_bundle, "--image", path, "-o", tmp_path / "a.mp4", *SHORT)
    only_error(nova_export("run", "a", *arguments), 5, "in.png")
    assert not (tmp_path / "a.mp4").exists()


def test_latents_that_cannot_be_decoded(image_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    arguments = ("run", "--from-latents", path, "--bundle", image_bundle, "-o", tmp_path / "a.png")
    only_error(nova_export(*arguments), 5, "in.npz", "does not exist")
    np.savez(path, other=np.zeros(3))
    only_error(nova_export(*arguments), 5, "in.npz", "'latents'")
    np.savez(path, latents=np.zeros((1, 4, 1, 8, 8), np.float32))
    only_error(nova_export(*arguments), 5, "(1, 4, 1, 8, 8)", "(B, 4, L, 12, 12)")


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["cat"], 2, "'cat' is no class id"),
        (["1.5"], 2, "'1.5'"),
        ([""], 2, "''"),
        (["1000"], 5, "1000 is out of range"),
        (["--", "-1"], 5, "-1 is out of range"),
        (["1", "--negative-prompt", "blurry"], 2, "'blurry'"),
        (["1", "--negative-prompt", "1001"], 5, "1001"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_class_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, word: str
) -> None:
    config = NovaConfig.from_parts(**parts(text=False, frames=1))

    def no_stage(name: str) -> Any:
        raise AssertionError(f"{name} must not run")

    monkeypatch.setattr(pipeline, "load", lambda *_, **__: Pipeline(config, no_stage))
    only_error(nova_export("run", "--bundle", "b", "-o", tmp_path / "a.png", *arguments), code, word)


# Building and inspecting


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--target", "fpga"], ["'fpga'", "cpu"]), (["--precision", "int3"], ["'int3'", "fp32"])],
)
def test_unknown_preset(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    from tests.conftest import GOLDEN

    checkpoint = GOLDEN / "t2i" / "checkpoint"
    only_error(nova_export("build", checkpoint, "-o", tmp_path / "b", *arguments), 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_inspect(image_bundle: Path) -> None:
    result = nova_export("inspect", image_bundle)
    assert result.code == 0 and result.err == ""
    for word in ("image 96x96", "diffusion_head", "of the reference", "torch ", "the bundle is whole"):
        assert word in result.out
    described = json.loads(nova_export("inspect", image_bundle, "--json").out)
    assert described["hashes"] == "match" and described["pixels"] == [96, 96]
    assert described["stages"]["vae_decoder"]["inputs"].keys() == {"latents"}


def test_inspect_finds_a_changed_file(image_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(image_bundle, tmp_path / "bundle"))
    path = bundle / "vae_decoder.onnx.data"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    only_error(nova_export("inspect", bundle), 4, "vae_decoder.onnx.data", "sha256")
    assert nova_export("inspect", bundle, "--no-hash").code == 0
