"""What the demo checkpoint can do beside ShapesEval: python benchmarks/demo_quality.py BUNDLE [--json FILE].

Round trip of the autoencoder, speed under motion_flow, image to video with and without a prompt, videos of
twice the trained length, and a whole `nova-export run`. Prints a table; needs the export extra.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import nova_export
from nova_export.demo import demo_checkpoint
from nova_export.evaluation.metrics import psnr
from nova_export.evaluation.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    Scene,
    held_out,
)
from nova_export.evaluation.shapes_eval import BATCH, SEEN, judge, prompt_list
from nova_export.evaluation.vision import look
from nova_export.runtime.media import save_frames
from nova_export.runtime.pipeline import Pipeline
from reference_model.demo.data import Clip, draw, sample_clip, sample_track

OBJECT = ("objects", "colour", "shape", "background")  # what a given image fixes
COLOURED = [colour for colour in COLOURS if colour not in BACKGROUNDS]
SLOW, FAST = 3.5, 6.5  # hundredths of the width per frame; training has 3.3 to 7


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the numbers here.")
@click.option("--strips", type=click.Path(path_type=Path), help="Also write what was made to this .png.")
@click.option("--count", default=64, show_default=True, help="Videos of each kind.")
def main(bundle: Path, json_file: Path | None, strips: Path | None, count: int) -> None:
    """Measure, print, and write."""
    rows: list[np.ndarray] = []
    vae = _autoencoder()
    with nova_export.load(bundle) as pipe:
        results = {
            "autoencoder": round_trip(vae),
            "outlines_after_a_round_trip": outlines(vae, count),
            "motion_flow": motion_flow(pipe, count, rows),
            "image_to_video": image_to_video(pipe, count, rows),
            "twice_the_length": longer(pipe, count, rows),
        }
    results["run"] = one_run(bundle)
    for name, values in results.items():
        for what, value in values.items():
            print(f"| {name} | {what} | {value:.4g} |")
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if strips is not None:
        width = max(row.shape[1] for row in rows)
        padded = [
            np.pad(row, ((2, 2), (0, width - row.shape[1]), (0, 0)), constant_values=90) for row in rows
        ]
        save_frames(strips, np.concatenate(padded)[None])


def round_trip(vae: Any) -> dict[str, float]:
    """PSNR of held-out clips through encoder (mean of the posterior) and decoder, in float32."""
    rng = np.random.default_rng(0)
    values: dict[str, list[float]] = {"psnr": [], "psnr_first_frame_alone": []}
    for combination in sorted(held_out()) * 3:
        clip = sample_clip(rng, combination).frames
        for name, moments in zip(values, (vae.moments, vae.clip_moments), strict=True):
            error = ((_decoded(vae, clip, moments).astype(np.float64) - clip) ** 2).mean()
            values[name].append(10 * np.log10(255**2 / error))
    return {name: float(np.mean(each)) for name, each in values.items()}


def outlines(vae: Any, count: int) -> dict[str, float]:
    """Of `count` true clips of a shape before a ground, the share whose outline a round trip keeps."""
    shares = {}
    for ground in BACKGROUNDS:
        for shape in SHAPES:
            rng, kept = np.random.default_rng(6), []
            for i in range(count):
                motion, colour = MOTIONS[i % 7], COLOURED[(i + i // 7) % 7]  # there are seven of each
                scene = Scene(((colour, shape),), motion, ground)
                frames = draw(scene, [sample_track(rng, motion)])
                kept.append(judge(scene, _decoded(vae, frames, vae.clip_moments))["shape"])
            shares[f"{shape}_before_{ground}"] = float(np.mean(kept))
    return shares


def _autoencoder() -> Any:
    from reference_model.demo.store import read_weights
    from reference_model.demo.vae import Vae

    vae = Vae().eval().requires_grad_(False)
    vae.load_state(read_weights(demo_checkpoint(), "vae"))
    return vae


def _decoded(vae: Any, clip: np.ndarray, moments: Any) -> np.ndarray:
    """uint8 (F, H, W, 3) through encoder and decoder, the same form."""
    from reference_model.demo.train_vae import to_pixels

    pixels = vae.decode(moments(to_pixels([clip]))[0])[0].permute(1, 2, 3, 0).numpy()
    return np.clip(pixels * 127.5 + 127.5, 0, 255).astype(np.uint8)


def motion_flow(pipe: Pipeline, count: int, rows: list[np.ndarray]) -> dict[str, float]:
    """Mean speed of objects that were asked to move, slow and fast, same prompts and seeds."""
    scenes = [i.scene for i in prompt_list() if i.group == SEEN and i.scene.motion in DIRECTIONS][:count]
    speeds: dict[float, list[float]] = {SLOW: [], FAST: []}
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        for flow, found in speeds.items():
            output = pipe([s.prompt() for s in part], max_latent_length=3, seed=start, motion_flow=flow)
            found += [_speed(scene, frames) for scene, frames in zip(part, output.frames, strict=True)]
            rows.append(np.concatenate(list(output.frames[0]), axis=1))
    slow, fast = (float(np.nanmean(found)) for found in speeds.values())
    return {"slow_pixels_a_frame": slow, "fast_pixels_a_frame": fast, "ratio": fast / slow}


def _speed(scene: Scene, frames: np.ndarray) -> float:
    """Pixels a frame along the asked direction; NaN where nothing is seen."""
    dx, dy = DIRECTIONS[str(scene.motion)]
    along = [dx * v.things[0].x + dy * v.things[0].y for v in look(frames) if v.things]
    return (along[-1] - along[0]) / (len(along) - 1) if len(along) > 1 else float("nan")


def image_to_video(pipe: Pipeline, count: int, rows: list[np.ndarray]) -> dict[str, float]:
    """First frame kept, object kept, motion as asked; without a prompt, the object kept."""
    rng = np.random.default_rng(1)
    clips = [sample_clip(rng, _with_motion(rng, MOTIONS[i % len(MOTIONS)])) for i in range(count)]
    kept, asked, same, alone = [], [], [], []
    for i, clip in enumerate(clips):
        frames = pipe(clip.scene.prompt(), image=clip.frames[0], max_latent_length=3, seed=i).frames[0]
        kept.append(float(psnr(frames[:1], clip.frames[:1])[0]))
        checks = judge(clip.scene, frames)
        asked.append(checks["motion"])
        same.append(all(checks[name] for name in OBJECT))
        if i < 8:
            rows.append(np.concatenate(list(frames), axis=1))
        frames = pipe("", image=clip.frames[0], max_latent_length=3, seed=i).frames[0]
        checks = judge(clip.scene, frames)
        alone.append(all(checks[name] for name in OBJECT))
        if i < 4:
            rows.append(np.concatenate(list(frames), axis=1))
    return {
        "first_frame_psnr": float(np.mean(kept)),
        "first_frame_psnr_least": float(np.min(kept)),
        "motion_as_asked": float(np.mean(asked)),
        "object_kept": float(np.mean(same)),
        "object_kept_without_a_prompt": float(np.mean(alone)),
    }


def _with_motion(rng: np.random.Generator, motion: str) -> Any:
    while True:
        clip: Clip = sample_clip(rng)
        if clip.scene.motion == motion:
            return clip.scene.combination


def longer(pipe: Pipeline, count: int, rows: list[np.ndarray]) -> dict[str, float]:
    """Six latent frames instead of three: what still holds over all 21 frames."""
    scenes = [item.scene for item in prompt_list() if item.group == SEEN][:count]
    checks = []
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        output = pipe([scene.prompt() for scene in part], max_latent_length=6, seed=start)
        checks += [judge(scene, frames) for scene, frames in zip(part, output.frames, strict=True)]
        rows += [np.concatenate(list(frames), axis=1) for frames in output.frames[:4]]
    names = ("objects", "colour", "shape", "motion", "background")
    shares = {name: float(np.mean([check[name] for check in checks])) for name in names}
    return {**shares, "all": float(np.mean([all(check.values()) for check in checks]))}


def one_run(bundle: Path) -> dict[str, float]:
    """Seconds of the command line from start to the written mp4, best and worst of three."""
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                Path(sys.executable).parent / "nova-export",
                "run",
                "a red circle moving right",
                "--quiet",
            ]
            started = time.monotonic()
            subprocess.run([*command, "--bundle", bundle, "-o", f"{folder}/out.mp4"], check=True)
            seconds.append(time.monotonic() - started)
    return {"seconds_best": min(seconds), "seconds_worst": max(seconds)}


if __name__ == "__main__":
    main()
