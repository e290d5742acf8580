"""nova_export.runtime.media: what is written can be read back, and a failure leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from nova_export.errors import InputError, OutputError
from nova_export.runtime.media import check_writable, load_image, load_latents, save_frames, save_outputs

LATENTS = np.linspace(-1, 1, 2 * 4 * 3 * 2 * 2, dtype=np.float32).reshape(2, 4, 3, 2, 2)  # (B, C, L, h, w)


def moving_square(frames: int, height: int, width: int) -> np.ndarray:
    """Colour gradients with a red square going right: uint8 (F, H, W, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = np.stack([255 * x / width, 255 * y / height, 0 * x + 128], axis=-1).astype(np.uint8)
    for index, frame in enumerate(video):
        left = (width - 16) * index // max(1, frames - 1)
        frame[height // 2 - 8 : height // 2 + 8, left : left + 16] = (220, 30, 30)
    return video


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def read_mp4(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_gif(path: Path) -> tuple[np.ndarray, list[int]]:
    with Image.open(path) as gif:
        frames, durations = [], []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.array(gif.convert("RGB")))
            durations.append(gif.info["duration"])
        assert gif.info["loop"] == 0
    return np.stack(frames), durations


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as on a full disk, whoever does them (ffmpeg included)."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_equal_frames_make_equal_files(tmp_path: Path) -> None:
    """Whatever the heap held before: glibc fills what it hands out. With B-frames x264 wrote other bytes."""
    code = """if True:
        import sys
        import numpy as np
        from nova_export.runtime.media import save_frames
        for seed in range(12):
            frames = np.random.default_rng(seed).integers(0, 256, (9, 18, 18, 3)).astype(np.uint8)
            save_frames(f"{sys.argv[1]}/{seed}.mp4", frames)
    """
    for fill in ("33", "85"):
        (tmp_path / fill).mkdir()
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", code, tmp_path / fill], env=environment, check=True)
    for file in (tmp_path / "33").iterdir():
        assert file.read_bytes() == (tmp_path / "85" / file.name).read_bytes()


def test_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    frames = moving_square(9, 96, 160)
    path = tmp_path / "out.mp4"
    save_frames(path, frames)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate, stream.duration * stream.time_base) == (9, 12, 0.75)
        context = stream.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            1,
            1,
            1,
            1,
        )
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    decoded = read_mp4(path)
    assert decoded.shape == frames.shape
    for got, want in zip(decoded, frames, strict=True):
        assert psnr(got, want) > 33


def test_mp4_of_odd_size_repeats_the_edge(tmp_path: Path) -> None:
    frames = moving_square(3, 63, 95)
    save_frames(tmp_path / "odd.mp4", frames, fps=24)
    decoded = read_mp4(tmp_path / "odd.mp4")
    assert decoded.shape == (3, 64, 96, 3)
    assert psnr(decoded[:, :63, :95], frames) > 30
    assert psnr(decoded[:, 63, :95], frames[:, 62]) > 25
    assert psnr(decoded[:, :63, 95], frames[:, :, 94]) > 25


def test_gif(tmp_path: Path) -> None:
    frames = moving_square(9, 48, 80)
    save_frames(tmp_path / "out.GIF", frames)
    decoded, durations = read_gif(tmp_path / "out.GIF")
    assert psnr(decoded, frames) > 30
    assert set(durations) == {80, 90} and sum(durations) == 750  # 9 frames at 12 a second


def test_gif_of_one_frame(tmp_path: Path) -> None:
    save_frames(tmp_path / "one.gif", moving_square(1, 16, 16))
    with Image.open(tmp_path / "one.gif") as gif:
        assert gif.size == (16, 16) and gif.n_frames == 1


def test_png_is_the_first_frame(tmp_path: Path) -> None:
    frames = moving_square(2, 17, 33)
    save_frames(str(tmp_path / "out.png"), frames)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out.png")), frames[0])


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        save_frames(tmp_path / "out.png", moving_square(1, 16, 16))
    finally:
        os.umask(old)
    if os.name == "posix":
        assert (tmp_path / "out.png").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_batch_is_numbered(tmp_path: Path, suffix: str) -> None:
    videos = np.stack([moving_square(2, 32, 32), 255 - moving_square(2, 32, 32)])
    paths = save_outputs(tmp_path / f"cat{suffix}", videos, LATENTS)
    assert paths == [tmp_path / f"cat-0{suffix}", tmp_path / f"cat-1{suffix}"]
    assert sorted(tmp_path.iterdir()) == paths
    assert save_outputs(tmp_path / f"one{suffix}", videos[:1], LATENTS[:1]) == [tmp_path / f"one{suffix}"]


def test_npz_round_trip(tmp_path: Path) -> None:
    videos = np.stack([moving_square(2, 16, 16)] * 2)
    path = tmp_path / "out.npz"
    assert save_outputs(str(path), videos, LATENTS) == [path]
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive) == ["frames", "latents"]
        np.testing.assert_array_equal(archive["frames"], videos)
    latents = load_latents(path)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, LATENTS)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".npz"])
@pytest.mark.parametrize("room", [0, 100, 3000])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, suffix: str, room: int) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"older")
    noise = np.random.default_rng(0).integers(0, 256, (1, 4, 64, 64, 3), np.uint8)
    with disk_with_room_for(room), pytest.raises(OutputError, match="free some space") as caught:
        save_outputs(path, noise, LATENTS[:1])
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"older"


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nova_export.runtime.media.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_frames(tmp_path / "out.gif", moving_square(2, 16, 16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png", ".npz"])
def test_check_writable_leaves_no_trace(tmp_path: Path, suffix: str) -> None:
    check_writable(tmp_path / f"out{suffix}")
    check_writable(str(tmp_path / f"out{suffix.upper()}"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("out.avi", r"\.mp4, \.gif, \.png, \.npz"),
        ("out", r"must end in"),
        ("missing/out.mp4", r"missing does not exist; create it first"),
        ("folder.mp4", r"it is a folder"),
        ("file.png/out.mp4", r"file\.png is not a folder"),
    ],
)
def test_unwritable_paths(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file.png").touch()
    frames = moving_square(1, 16, 16)
    for attempt in (
        lambda: check_writable(tmp_path / name),
        lambda: save_frames(tmp_path / name, frames),
        lambda: save_outputs(tmp_path / name, frames[None], LATENTS[:1]),
    ):
        with pytest.raises(OutputError, match=reason):
            attempt()
    assert len(list(tmp_path.iterdir())) == 2


def test_frames_alone_are_not_npz(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="frames alone"):
        save_frames(tmp_path / "out.npz", moving_square(1, 16, 16))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="folder that you may write to"):
            check_writable(tmp_path / "out.mp4")
    finally:
        tmp_path.chmod(0o700)


def test_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError, match="Read-only file system; choose a folder that you may write to"):
        check_writable(tmp_path / "out.gif")


def test_pyav_without_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", frozenset({"mpeg4"}))
    with pytest.raises(OutputError, match=r"no H\.264 encoder"):
        check_writable(tmp_path / "out.mp4")
    check_writable(tmp_path / "out.gif")


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        [[1]],
    ],
)
def test_frames_of_another_kind(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8 array"):
        save_frames(tmp_path / "out.png", frames)
    assert list(tmp_path.iterdir()) == []


def test_latents_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    with pytest.raises(InputError, match="does not exist"):
        load_latents(path)
    with pytest.raises(InputError, match="cannot read"):
        load_latents(tmp_path)
    broken = LATENTS.copy()
    broken[0, 0, 0, 0, 0] = np.nan
    cases = [
        ({"frames": LATENTS}, "'latents'"),
        ({"latents": LATENTS[0]}, "shape"),
        ({"latents": LATENTS.astype(np.int32)}, "int32"),
        ({"latents": LATENTS[:0]}, "shape"),
        ({"latents": broken}, "NaN"),
        ({"latents": LATENTS.astype(np.float64) * 1e300}, "infinity"),
        ({"latents": np.array([object()], dtype=object)}, "cannot read"),
    ]
    for arrays, reason in cases:
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=reason) as caught:
            load_latents(path)
        assert str(path) in str(caught.value)


def test_damaged_latents_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    np.savez(path, latents=LATENTS)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:100], whole[:-30], whole[:200] + b"\0" * 50 + whole[250:]):
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            load_latents(path)
        assert "allow_pickle" not in str(caught.value)  # numpy's own advice: trust it
    np.save(tmp_path / "in.npy", LATENTS)
    with pytest.raises(InputError, match="'latents'"):
        load_latents(tmp_path / "in.npy")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_latents_of_other_floats(tmp_path: Path, dtype: type) -> None:
    np.savez(tmp_path / "in.npz", latents=LATENTS.astype(dtype))
    latents = load_latents(tmp_path / "in.npz")
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, LATENTS, atol=1e-3)


def test_image_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    pixels = moving_square(1, 24, 40)[0]
    Image.fromarray(pixels).save(tmp_path / "in.png")
    for source in (tmp_path / "in.png", str(tmp_path / "in.png"), Image.fromarray(pixels), pixels):
        image, notice = load_image(source, 24, 40)
        assert notice is None and image.dtype == np.uint8 and image.flags.writeable
        np.testing.assert_array_equal(image, pixels)


def test_wide_image_is_cropped_around_its_centre(tmp_path: Path) -> None:
    pixels = np.zeros((20, 100, 3), np.uint8)
    pixels[:, 40:60] = 255
    Image.fromarray(pixels).save(tmp_path / "in.png")
    image, notice = load_image(tmp_path / "in.png", 20, 20)
    assert (image == 255).all()
    assert notice == f"image {tmp_path / 'in.png'} is 100x20 pixels: cropped around its centre to 20x20"


def test_tall_image_is_cropped_and_resized() -> None:
    pixels = np.zeros((90, 20, 3), np.uint8)
    pixels[35:55] = (10, 200, 30)
    image, notice = load_image(pixels, 40, 40)
    assert image.shape == (40, 40, 3) and (image == (10, 200, 30)).all()
    assert notice == "the image is 20x90 pixels: cropped around its centre to 20x20 and resized to 40x40"


def test_same_aspect_ratio_is_only_resized() -> None:
    image, notice = load_image(moving_square(1, 96, 160)[0], 48, 80)
    assert notice == "the image is 160x96 pixels: resized to 80x48"
    assert psnr(image, moving_square(1, 96, 160)[0, ::2, ::2]) > 20


def test_line_of_pixels_can_be_fitted() -> None:
    assert load_image(np.zeros((1, 500, 3), np.uint8), 30, 10)[0].shape == (30, 10, 3)


def test_exif_orientation(tmp_path: Path) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned left: to be shown turned right by 90 degrees
    Image.fromarray(np.rot90(upright)).save(tmp_path / "in.png", exif=exif)
    image, notice = load_image(tmp_path / "in.png", 16, 32)
    assert notice is None
    np.testing.assert_array_equal(image, upright)


def test_modes_become_rgb(tmp_path: Path) -> None:
    half_red = np.full((8, 8, 4), (255, 0, 0, 128), np.uint8)
    deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    palette = Image.fromarray(moving_square(1, 8, 8)[0]).quantize(8)
    clear = Image.fromarray(np.full((8, 8), 3, np.uint8)).convert("P")
    cases = [
        (Image.fromarray(half_red), np.array([255, 127, 127])),
        (half_red, np.array([255, 127, 127])),
        (Image.fromarray(np.full((8, 8), 77, np.uint8)), np.array(77)),
        (np.full((8, 8), 77, np.uint8), np.array(77)),
        (Image.fromarray(deep), (deep >> 8)[..., None]),
        (palette, np.array(palette.convert("RGB"))),
        (Image.new("1", (8, 8), 1), np.array(255)),
        (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), np.array(255)),
        (Image.new("LA", (8, 8), (0, 0)), np.array(255)),
    ]
    for index, (source, want) in enumerate(cases):
        image, _ = load_image(source, 8, 8)
        assert np.abs(image.astype(int) - want).max() <= 1, f"case {index}"
    clear.save(tmp_path / "clear.png", transparency=3)
    assert (load_image(tmp_path / "clear.png", 8, 8)[0] == 255).all()


def test_unusable_images(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    for name in ("text.png", "cut.png", "missing.png", "."):
        with pytest.raises(InputError, match="image") as caught:
            load_image(tmp_path / name, 8, 8)
        assert str(tmp_path / name) in str(caught.value)
    for source in (np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 5), np.uint8), None, b"bytes"):
        with pytest.raises(InputError, match="image"):
            load_image(source, 8, 8)  # type: ignore[arg-type]


def test_start_is_not_slowed_by_codecs() -> None:
    code = "import sys, nova_export.runtime.media; print({'av', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
