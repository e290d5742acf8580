"""Image, video and latents files: the only place that touches PyAV, Pillow and npz.

Knows file formats; must not know models or how the frames were made. A file is written to a hidden sibling
and renamed when whole, so a failure leaves neither a half file nor a damaged older one. PyAV and Pillow are
imported when first used: starting the command line must not wait for them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from nova_export.errors import InputError, OutputError

if TYPE_CHECKING:
    from PIL import Image as PILImage

Frames = NDArray[np.uint8]

H264: Final = "libx264"
SUFFIXES = (".mp4", ".gif", ".png", ".npz")


def check_writable(path: str | Path, suffixes: Collection[str] = SUFFIXES) -> None:
    """Refuse an output path that could not be written, before a long generation rather than after it.

    Raises OutputError: unknown suffix, missing or read-only folder, a folder where the file should go, or no
    H.264 encoder for .mp4.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise OutputError(f"cannot write {path}: its name must end in one of {', '.join(suffixes)}")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give the name of a file")
    if path.suffix.lower() == ".mp4":
        _check_h264(path)
    probe = _sibling(path)
    try:
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise output_error(path, error) from error


def save_frames(path: str | Path, frames: Frames, fps: float = 12) -> None:
    """Write uint8 frames (F, H, W, 3) as the path's suffix says: .mp4, .gif, or .png for the first frame.

    The mp4 is H.264, yuv420p, BT.709, index first, so that browsers play it while it loads; an odd height or
    width gains one row or column, a copy of the last. The gif loops for ever. Equal frames make equal files.
    Raises OutputError when the file cannot be written, InputError for an array of another kind.
    """
    path = Path(path)
    writers: dict[str, Callable[[Path], None]] = {
        ".mp4": lambda target: _write_mp4(target, frames, fps),
        ".gif": lambda target: _write_gif(target, frames, fps),
        ".png": lambda target: _write_png(target, frames),
    }
    _check_frames(frames, "(F, H, W, 3)")
    check_writable(path)
    if path.suffix.lower() not in writers:
        raise OutputError(f"cannot write {path}: frames alone go to one of {', '.join(writers)}")
    write_whole(path, writers[path.suffix.lower()])


def save_outputs(
    path: str | Path, frames: Frames, latents: NDArray[np.float32], fps: float = 12
) -> list[Path]:
    """Write a batch of videos, frames uint8 (B, F, H, W, 3), and return the paths written.

    .npz holds the whole batch: arrays `frames` and `latents` (B, C, L, h, w). Other suffixes hold one video
    each: the path as given for B = 1, else name-0.mp4, name-1.mp4, ... A failure keeps files already whole.
    Raises as `save_frames`.
    """
    path = Path(path)
    _check_frames(frames, "(B, F, H, W, 3)")
    check_writable(path)
    if path.suffix.lower() == ".npz":
        write_whole(path, lambda target: _write_npz(target, frames, latents))
        return [path]
    paths = [path]
    if len(frames) > 1:
        paths = [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(len(frames))]
    for video_path, video in zip(paths, frames, strict=True):
        save_frames(video_path, video, fps)
    return paths


def load_latents(path: str | Path) -> NDArray[np.float32]:
    """Read the `latents` of an .npz that `save_outputs` wrote: float32 (B, C, L, h, w), all finite.

    Raises InputError for a missing or foreign file, a missing array, another rank or kind, NaN and infinity.
    """
    latents = None
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile) and "latents" in archive:
                latents = np.asarray(archive["latents"])
    except FileNotFoundError:
        raise InputError(f"latents file {path} does not exist") from None
    except Exception as error:  # a damaged archive fails anywhere in zipfile, zlib or numpy's header parser
        reason = "it is none" if "pickle" in str(error) else error  # numpy would advise to trust the file
        raise InputError(f"cannot read {path} as an .npz of latents: {reason}") from error
    if latents is None:
        raise InputError(f"{path} holds no array named 'latents': give an .npz that `run -o` wrote")
    if latents.dtype.kind != "f" or latents.ndim != 5 or not latents.size:
        kind = f"{latents.dtype} {latents.shape}"
        raise InputError(f"latents in {path} are {kind}: floats of shape (B, C, L, h, w) are needed")
    with np.errstate(over="ignore"):
        latents = latents.astype(np.float32)
    if not np.isfinite(latents).all():
        raise InputError(f"latents in {path} contain NaN or infinity, so nothing can be decoded from them")
    return latents


def load_image(
    source: str | Path | PILImage.Image | Frames, height: int, width: int
) -> tuple[Frames, str | None]:
    """An image as uint8 (height, width, 3), and a notice saying what was done to make it fit, or None.

    source: a file, a PIL image, or uint8 (H, W), (H, W, 3) or (H, W, 4). EXIF orientation is applied,
    transparency is laid on white. Another size is cropped around its centre to the target's aspect ratio,
    then resized (bilinear).
    Raises InputError naming the source when it is not a readable image.
    """
    from PIL import Image

    name = f"image {source}" if isinstance(source, str | Path) else "the image"
    try:
        if isinstance(source, str | Path):
            with Image.open(source) as opened:
                return _fit(_to_rgb(opened), height, width, name)
        if isinstance(source, np.ndarray) and source.dtype == np.uint8:
            return _fit(_to_rgb(Image.fromarray(source)), height, width, name)
        if isinstance(source, Image.Image):
            return _fit(_to_rgb(source), height, width, name)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist") from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them stumble over
        raise InputError(f"cannot read {name}: {error}") from error
    kind = f"a {source.dtype} array" if isinstance(source, np.ndarray) else f"{type(source).__name__}"
    raise InputError(f"an image must be a path, a PIL image or a uint8 array, not {kind}")


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _fit(image: PILImage.Image, height: int, width: int, name: str) -> tuple[Frames, str | None]:
    from PIL import Image

    full = image.size  # (W, H)
    crop = (
        min(full[0], max(1, round(full[1] * width / height))),
        min(full[1], max(1, round(full[0] * height / width))),
    )
    left, top = (full[0] - crop[0]) // 2, (full[1] - crop[1]) // 2
    done = []
    if crop != full:
        image = image.crop((left, top, left + crop[0], top + crop[1]))
        done.append(f"cropped around its centre to {crop[0]}x{crop[1]}")
    if crop != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        done.append(f"resized to {width}x{height}")
    notice = f"{name} is {full[0]}x{full[1]} pixels: {' and '.join(done)}" if done else None
    return np.array(image, np.uint8), notice


def _check_frames(frames: Frames, expected: str) -> None:
    rank = expected.count(",") + 1
    kind = f"{type(frames).__name__}"
    if isinstance(frames, np.ndarray):
        if frames.dtype == np.uint8 and frames.ndim == rank and frames.shape[-1] == 3 and frames.size:
            return
        kind = f"{frames.dtype} {frames.shape}"
    raise InputError(f"frames must be a uint8 array {expected} with at least one frame, not {kind}")


def _sibling(path: Path) -> Path:
    return path.with_name(f".nova-export-{uuid4().hex[:12]}.tmp")


def drop_unfinished(folder: Path) -> None:
    """Remove what killed processes left in a folder that nobody else writes to now. Raises OSError."""
    for path in folder.glob(".nova-export-*.tmp"):
        path.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a hidden sibling, then give it its name. On any failure the sibling goes.

    Raises OutputError.
    """
    temporary = _sibling(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def output_error(path: Path, error: OSError) -> OutputError:
    """Why a file could not be written, and what to do."""
    folder = path.absolute().parent
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist; create it first"
        return OutputError(f"cannot write {path}: {folder} {problem}")
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            fix = "free some space or write to another folder"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            fix = "choose a folder that you may write to"
        case _:
            fix = "choose another path"
    return OutputError(f"cannot write {path}: {error.strerror or error}; {fix}")


def _check_h264(path: Path) -> None:
    import av

    if H264 not in av.codecs_available:
        raise OutputError(
            f"cannot write {path}: this PyAV {av.__version__} has no H.264 encoder ({H264}); "
            "install PyAV's own wheel (pip install --force-reinstall av) or write a .gif"
        )


def _write_mp4(path: Path, frames: Frames, fps: float) -> None:
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    even = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    # An absolute name: a colon in a relative one would read as a protocol.
    with av.open(str(path.absolute()), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        # No B-frames: with them x264 165 reads what it never wrote, and equal frames make unequal files.
        options = {"crf": "18", "bf": "0"}
        stream = container.add_stream(H264, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Said in the file, or players guess the matrix from the size and colours shift.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        for pixels in even:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: Frames, fps: float) -> None:
    from PIL import Image

    def to_256_colours(pixels: Frames) -> PILImage.Image:
        # A palette of its own for each frame, dithered: nearest to the true colours once the eye averages.
        image = Image.fromarray(pixels)
        palette = image.quantize(256, method=Image.Quantize.FASTOCTREE)
        return image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)

    first, *later = (to_256_colours(pixels) for pixels in frames)
    # GIF counts hundredths of a second: round the moments, not the durations, so that the total is right.
    moments = [round(100 * index / fps) * 10 for index in range(len(frames) + 1)]
    durations = [after - before for before, after in pairwise(moments)]
    with path.open("xb") as file:
        first.save(file, "GIF", save_all=True, append_images=later, duration=durations, loop=0)


def _write_png(path: Path, frames: Frames) -> None:
    from PIL import Image

    with path.open("xb") as file:
        Image.fromarray(frames[0]).save(file, "PNG")


def _write_npz(path: Path, frames: Frames, latents: NDArray[np.float32]) -> None:
    with path.open("xb") as file:
        np.savez(file, frames=frames, latents=np.asarray(latents, np.float32))
