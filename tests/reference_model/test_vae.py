"""The autoencoders against what the published pipeline and the published modules really computed.

`golden/` holds frames that the published pipeline decoded. `data/vae_*.npz` hold what the published modules
(github.com/baaivision/NOVA at 2cd254a) gave for weights made by `rule` and inputs made by `noise`: `keys`
names the published weights, `pixels_l` is every third pixel, along height and width, of l decoded latents,
`mean` and `std` are the scaled posterior of one image. LTX, whose published `decode` fails: `decoder(z, 0)`.
"""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

from nova_export.config import Tiling, vae_tiling
from nova_export.errors import CheckpointError
from reference_model.vae import VaeDecoder, VaeEncoder
from reference_model.vae.blocks import interpolate_in_time, repeat_in_time

TESTS = Path(__file__).parents[1]
STRIDES = {  # pixels per latent of the configs below
    "AutoencoderKLOpenSora": 8,
    "AutoencoderKL": 4,
    "AutoencoderKLCogVideoX": 8,
    "AutoencoderKLLTXVideo": 32,
}
TILES = {1: 1, 2: 1, 3: 2}  # latent frames -> batch
CONFIGS: dict[str, dict[str, Any]] = {
    "opensora": {
        "_class_name": "AutoencoderKLOpenSora",
        "block_out_channels": [32, 32, 64, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2 + ["DownEncoderBlock3D"] * 2,
        "up_block_types": ["UpDecoderBlock3D"] * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "shift_factor": 0.3,
    },
    "image": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [32, 32, 64],
        "layers_per_block": 1,
        "latent_channels": 4,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "cogvideox": {
        "_class_name": "AutoencoderKLCogVideoX",
        "block_out_channels": [32, 32, 32, 64],
        "layers_per_block": 1,
        "latent_channels": 4,
    },
    "ltx": {
        "_class_name": "AutoencoderKLLTXVideo",
        "block_out_channels": [8, 16, 32, 64, 64],
        "layers_per_block": [1, 2, 1, 2, 1],
        "decoder_block_out_channels": [8, 16, 32, 64],
        "decoder_layers_per_block": [1, 2, 1, 2],
        "latent_channels": 8,
        "scaling_factor": 0.5,
    },
}


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers that depend on the name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(shape, np.float32))


def rule(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight for this name: fan-in scaled for matrices and kernels; near 1 for norms, near 0 for biases."""
    if len(shape) > 1:
        return noise(name, shape) / float(np.prod(shape[1:])) ** 0.5
    return 0.1 * noise(name, shape) + float(name.endswith("weight"))


def inputs(config: dict[str, Any], latent_frames: int) -> tuple[Tensor, Tensor]:
    """Latents (B, C, l, 2, 1) and an image (1, 3, H, W) of that size."""
    stride = STRIDES[config["_class_name"]]
    shape = (TILES[latent_frames], config["latent_channels"], latent_frames, 2, 1)
    return noise(f"latents {latent_frames}", shape), noise("image", (1, 3, 2 * stride, stride)).clamp(-1, 1)


def make(stage: type, config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A stage from checkpoint weights, as the package's users load it."""
    with torch.device("meta"):
        module = stage(config)
    part = {module.parameter_name(key): w for key, w in weights.items() if key.startswith(module.prefixes)}
    module.load_state_dict(part, assign=True)
    return module.eval()


def recorded(name: str, stage: type) -> tuple[Any, Any]:
    """The stage with weights by rule, and the record of the published module with the same weights."""
    record = np.load(TESTS / "data" / f"vae_{name}.npz")
    with torch.device("meta"):
        shapes = {key: p.shape for key, p in stage(CONFIGS[name]).state_dict().items()}
    module = stage(CONFIGS[name])
    keys = [key for key in record["keys"].tolist() if key.startswith(module.prefixes)]
    weights = {key: rule(key, tuple(shapes[module.parameter_name(key)])) for key in keys}
    return make(stage, CONFIGS[name], weights), record


def assert_near(got: Tensor, want: np.ndarray, tolerance: float) -> None:
    worst = np.abs(got.numpy() - want)
    assert got.shape == want.shape
    where = np.unravel_index(worst.argmax(), worst.shape)
    assert worst.max() <= tolerance, f"max {worst.max():.2e} at {where}, mean {worst.mean():.2e}"


@pytest.mark.parametrize("name", ["t2v/call0", "t2v/call1", "t2v-rope/call0", "t2i/call0"])
@torch.no_grad()
def test_golden_latents_decode_to_the_golden_frames(name: str) -> None:
    path = TESTS / "golden" / name
    folder = path.parent / "checkpoint" / "vae"
    config = json.loads((folder / "config.json").read_text())
    weights = {k: w.float() for k, w in load_file(folder / "diffusion_pytorch_model.safetensors").items()}
    record = np.load(path.with_suffix(".npz"))
    pixels = make(VaeDecoder, config, weights)(torch.from_numpy(record["latents"]).float())  # one tile
    frames = (pixels * 127.5 + 127.5).clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()
    wanted = record["frames"].reshape(frames.shape)
    far = np.abs(frames.astype(int) - wanted) > 1
    assert far.mean() <= 1e-3
    assert (frames != wanted).mean() <= 1e-3  # truncation may tip a value that lies on a whole number


@pytest.mark.parametrize("latent_frames", TILES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoder_equals_the_published_module(name: str, latent_frames: int) -> None:
    decoder, record = recorded(name, VaeDecoder)
    latents, _ = inputs(CONFIGS[name], latent_frames)
    pixels = decoder(latents)
    tiling = vae_tiling(CONFIGS[name])
    assert pixels.shape[2] == tiling.frames_per_latent * (latent_frames - 1) + 1
    assert_near(pixels[..., ::3, ::3], record[f"pixels_{latent_frames}"], 5e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encoder_equals_the_published_module(name: str) -> None:
    encoder, record = recorded(name, VaeEncoder)
    mean, std = encoder(inputs(CONFIGS[name], 1)[1])
    assert_near(mean, record["mean"], 5e-5)
    assert_near(std, record["std"], 5e-5)


@torch.no_grad()
def test_image_vae_equals_diffusers() -> None:
    from diffusers import AutoencoderKL

    config = {key: value for key, value in CONFIGS["image"].items() if key != "_class_name"}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    theirs: Any = AutoencoderKL(**config, **blocks)
    weights = {key: rule(key, tuple(w.shape)) for key, w in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    latents, image = inputs(CONFIGS["image"], 1)
    scale, shift = config["scaling_factor"], config["shift_factor"]
    want = theirs.decode(latents[:, :, 0] / scale + shift).sample
    got = make(VaeDecoder, CONFIGS["image"], weights)(latents)
    assert_near(got[:, :, 0], want.numpy(), 2e-5)
    posterior = theirs.encode(image).latent_dist
    mean, std = make(VaeEncoder, CONFIGS["image"], weights)(image)
    assert_near(mean, ((posterior.mean - shift) * scale).numpy(), 2e-5)
    assert_near(std, (posterior.std * scale).numpy(), 2e-5)


@pytest.mark.parametrize("frames", [2, 3, 6])
def test_time_is_doubled_as_torch_does_it_after_the_first_frame(frames: int) -> None:
    x = noise("time", (1, 2, frames, 3, 4))
    for ours, mode in ((interpolate_in_time, "trilinear"), (repeat_in_time, "nearest")):
        later = F.interpolate(x[:, :, 1:], scale_factor=(2.0, 1.0, 1.0), mode=mode)
        want = torch.cat([x[:, :, :1], later], dim=2)
        torch.testing.assert_close(ours(x), want)


def test_a_single_frame_stays_single() -> None:
    x = noise("time", (1, 2, 1, 3, 4))
    assert torch.equal(interpolate_in_time(x), x)
    assert torch.equal(repeat_in_time(x), x)


def test_decoder_is_causal_up_to_its_norms() -> None:
    """Only the group norms, replaced here, look at later frames, and linear upsampling at the next one."""
    decoder, _ = recorded("opensora", VaeDecoder)
    norms = [name for name, module in decoder.named_modules() if isinstance(module, torch.nn.GroupNorm)]
    for name in norms:
        decoder.set_submodule(name, torch.nn.Identity())
    latents, _ = inputs(CONFIGS["opensora"], 3)
    changed = torch.cat([latents[:, :, :2], latents[:, :, 2:] + 1], dim=2)
    with torch.no_grad():
        a, b = decoder(latents), decoder(changed)
    same = [bool(torch.equal(a[:, :, i], b[:, :, i])) for i in range(9)]
    assert same[:2] == [True, True] and not same[8]


def test_tiling_is_the_published_one() -> None:
    tilings = {name: vae_tiling(config) for name, config in CONFIGS.items()}
    assert tilings["opensora"] == Tiling(5, overlap=1, drop=1, frames_per_latent=4)
    assert tilings["cogvideox"] == Tiling(5, overlap=0, drop=1, frames_per_latent=4)
    assert tilings["ltx"] == Tiling(32, overlap=0, drop=1, frames_per_latent=8)
    assert tilings["image"] == Tiling(1, overlap=0, drop=0, frames_per_latent=1)


@torch.no_grad()
def test_without_double_z_there_is_no_variance() -> None:
    config = {**CONFIGS["image"], "double_z": False}
    mean, std = VaeEncoder(config).eval()(inputs(config, 1)[1])
    assert mean.shape == std.shape == (1, 4, 2, 1)
    assert not std.any() and mean.any()


@torch.no_grad()
def test_log_variance_is_clamped() -> None:
    encoder, _ = recorded("opensora", VaeEncoder)
    encoder.quant_conv.bias[4:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    _, std = encoder(inputs(CONFIGS["opensora"], 1)[1])
    want = torch.tensor([10.0, -15.0, 10.0, -15.0]).exp() * 0.18215
    torch.testing.assert_close(std[0, :, 0, 0], want)


def test_old_attention_names_are_understood() -> None:
    names = VaeDecoder(CONFIGS["opensora"]).parameter_name
    prefix = "decoder.mid_block.attentions.0."
    assert names(prefix + "query.weight") == prefix + "to_q.weight"
    assert names(prefix + "key.bias") == prefix + "to_k.bias"
    assert names(prefix + "value.weight") == prefix + "to_v.weight"
    assert names(prefix + "proj_attn.bias") == prefix + "to_out.0.bias"
    assert names(prefix + "to_out.0.bias") == prefix + "to_out.0.bias"


def test_ltx_weights_named_by_diffusers_load_too() -> None:
    for stage in (VaeDecoder, VaeEncoder):
        module = stage(CONFIGS["ltx"])
        assert [key for key in module.state_dict() if module.parameter_name(key) != key] == []


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "AutoencoderTiny"},
        {"_class_name": None},
        {"_class_name": "AutoencoderKLLTXVideo", "latents_mean": [1, 8, 1, 1, 1]},
        {"up_block_types": ["UpDecoderBlock2D"] * 4},
        {"down_block_types": ["DownEncoderBlock3D"] * 4},
        {"down_block_types": ["DownEncoderBlock2D"] * 3},
    ],
)
def test_unknown_configs_are_refused(change: dict[str, Any]) -> None:
    config = {**CONFIGS["opensora"], **change}
    with pytest.raises(CheckpointError, match=r"vae/config\.json"):
        vae_tiling(config), VaeDecoder(config), VaeEncoder(config)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_one_graph_decodes_every_tile(name: str, tmp_path: Path) -> None:
    decoder, record = recorded(name, VaeDecoder)
    axes = {axis: Dim(name, min=1, max=32) for axis, name in ((0, "B"), (2, "l"), (3, "h"), (4, "w"))}
    example = noise("example", (2, decoder.config["latent_channels"], 3, 4, 5))
    session = export(decoder, example, axes, tmp_path)
    for latent_frames in TILES:
        latents, _ = inputs(CONFIGS[name], latent_frames)
        pixels = torch.from_numpy(session.run(None, {"x": latents.numpy()})[0])
        assert_near(pixels[..., ::3, ::3], record[f"pixels_{latent_frames}"], 1e-4)


@torch.no_grad()
def test_one_graph_encodes_every_image(tmp_path: Path) -> None:
    encoder, record = recorded("opensora", VaeEncoder)
    axes = {0: Dim("B", min=1, max=8), 2: 8 * Dim("h", min=1, max=64), 3: 8 * Dim("w", min=1, max=64)}
    session = export(encoder, noise("example", (2, 3, 32, 40)), axes, tmp_path)
    mean, std = session.run(None, {"x": inputs(CONFIGS["opensora"], 1)[1].numpy()})
    assert_near(torch.from_numpy(mean), record["mean"], 5e-5)
    assert_near(torch.from_numpy(std), record["std"], 5e-5)


def export(module: torch.nn.Module, example: Tensor, axes: dict[int, Any], folder: Path) -> Any:
    """The module as ONNX with dynamic axes, in an ONNX Runtime session on one thread."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    path = folder / "stage.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how: dict[str, Any] = {"dynamo": True, "opset_version": 23, "verbose": False, "input_names": ["x"]}
        torch.onnx.export(module, (example,), path, dynamic_shapes=(axes,), **how)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
