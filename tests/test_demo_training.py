"""The demo's training: the model in training form is the model that runs, and a stopped run goes on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reference_model.demo import train_nova, train_vae
from reference_model.demo.model import EMBEDDED_DEVIATION, Nova
from reference_model.demo.store import last_losses
from reference_model.demo.tokens import merges
from reference_model.demo.train_nova import Latents, alpha_bars, frame_positions, nova_config, visible_tokens
from reference_model.demo.train_vae import to_pixels
from reference_model.demo.trainer import Phase, Trainer
from reference_model.demo.vae import CONFIG, Vae, inflate
from reference_model.vae import VaeEncoder
from reference_model.vae.blocks import CausalConv3d


@pytest.fixture(scope="module")
def config():
    return nova_config(len(merges()) + 257)


@pytest.fixture
def nova(config) -> Nova:
    torch.manual_seed(0)
    nova = Nova(config, alpha_bars())
    with torch.no_grad():  # the zeros that training begins with would hide errors
        for parameter in nova.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return nova.eval()


def test_all_frames_at_once_are_what_the_stage_gives_frame_by_frame(nova: Nova, config) -> None:
    rows, frames, width = 2, 4, config.temporal.width
    text, latents = torch.randn(rows, config.condition_tokens, width), torch.randn(rows, 8, frames, 8, 8)
    times = torch.tensor([0.0, 0.7, 1.4, 2.2])
    capacity = config.condition_tokens + frames * config.frame_tokens
    names = [f"{kind}_cache_{i}" for i in range(config.temporal.depth) for kind in ("key", "value")]
    caches = {name: torch.zeros(rows, capacity, width) for name in names}
    filled, contexts = 0, []
    with torch.no_grad():
        whole = nova.contexts(text, latents, times)
        for t in range(frames):
            context, *written = nova.temporal(
                text if t == 0 else text[:, :0],
                latents[:, :, max(t - 1, 0)],
                torch.zeros(rows, dtype=torch.bool),
                times[t : t + 1],
                torch.tensor([filled]),
                first_context=contexts[0] if t else torch.zeros(rows, config.frame_tokens, width),
                **caches,
            )
            contexts.append(context)
            caches = dict(zip(names, written, strict=True))
            filled += config.frame_tokens + (config.condition_tokens if t == 0 else 0)
    assert torch.allclose(torch.stack(contexts, dim=1), whole, atol=1e-5)


def test_the_loss_is_the_error_of_the_noise(nova: Nova, config) -> None:
    """A head that predicts no noise at all is wrong by the noise's variance."""
    nn.init.zeros_(nova.head.image_decoder.head.weight)
    nn.init.zeros_(nova.head.image_decoder.head.bias)
    torch.manual_seed(1)
    losses = nova.losses(
        torch.zeros(8, 16, dtype=torch.int64),
        torch.full((8,), 5),
        torch.full((8, 2), 5.0),
        torch.randn(8, 8, 3, 8, 8),
        torch.arange(3.0),
        torch.rand(24, 16).argsort(1),
        visible=4,
    )
    assert losses.shape == (8, 3)
    assert losses.mean().item() == pytest.approx(1, abs=0.03)


def test_hidden_tokens_do_not_leak_into_the_prediction(nova: Nova, config) -> None:
    tokens, order = torch.randn(1, 16, config.token_dim), torch.randperm(16)[None]
    context = torch.randn(1, config.frame_tokens, config.spatial.width)
    seen, hidden = order[:, :6], order[:, 6:]
    with torch.no_grad():
        z = nova.spatial(context, tokens[:, seen[0]], seen, hidden)
        other = tokens.clone()
        other[:, hidden[0]] += 1
        assert torch.equal(z, nova.spatial(context, other[:, seen[0]], seen, hidden))


def test_weights_have_the_names_of_the_golden_checkpoint() -> None:
    from safetensors import safe_open

    golden = Path(__file__).parent / "golden" / "t2v" / "checkpoint"
    torch.manual_seed(0)
    model = Nova(nova_config(400), alpha_bars())
    parts = {**model.parts(), "vae": Vae().state()}
    for part, tensors in parts.items():
        with safe_open(next((golden / part).glob("*.safetensors")), "pt") as file:
            wanted = {_without_layer(key) for key in file.keys()}  # noqa: SIM118
        assert {_without_layer(name) for name in tensors} == wanted, part


def _without_layer(name: str) -> str:
    """Depths differ, names of layers do not."""
    return ".".join("#" if piece.isdigit() and "vae" not in name else piece for piece in name.split("."))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def train(folder: str, stops: list[int]) -> list[torch.Tensor]:
        for stop in stops:
            torch.manual_seed(7)
            module = nn.Linear(3, 2)
            trainer = Trainer(module, tmp_path / folder, Phase(1, 4, 9, 0.1), seed=5, warmup=2, average=0.9)
            for _ in trainer.run(partial(_toy_losses, module), until=stop):
                pass
        trainer.load_average()
        return [p.detach().clone() for p in module.parameters()]

    once, stopped = train("once", [9]), train("stopped", [2, 5, 9])
    assert all(torch.equal(a, b) for a, b in zip(once, stopped, strict=True))


def _toy_losses(module: nn.Module, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    x = torch.from_numpy(rng.standard_normal((4, 3)).astype(np.float32))
    return {"loss": (module(x) + torch.randn(4, 2) - x[:, :2]).square().mean()}


def test_the_learning_rate_warms_up_and_ends_at_zero(tmp_path: Path) -> None:
    trainer = Trainer(
        nn.Linear(1, 1), tmp_path / "run", Phase(1, 1, 100, 2.0), seed=0, warmup=10, average=0.9
    )
    rates = [trainer.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == 2.0 and rates[100] == 0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_a_short_training_learns(tmp_path: Path, config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both trainings, a few steps of each, deterministic: the second run must give the same weights."""
    monkeypatch.setattr(train_vae, "psnr", partial(train_vae.psnr, count=2))
    phases = [Phase(1, 4, 4, 1e-3), Phase(5, 2, 2, 1e-3)]
    states = []
    for i in range(2):
        torch.manual_seed(0)
        vae = Vae()
        train_vae.train_vae(vae, tmp_path / f"vae{i}", 0, phases)
        states.append(vae.state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    generator = torch.Generator().manual_seed(0)
    data = Latents(
        latents=torch.randn(1, 8, 3, 8, 8, generator=generator).repeat(4, 1, 1, 1, 1),
        token_ids=torch.zeros(4, 16, dtype=torch.int64),
        lengths=torch.full((4,), 3),
        flow=torch.full((4,), 5.0),
        crosses=torch.zeros(4),
        lit=torch.zeros(4),
        white=torch.zeros(4),
    )
    images = replace(data, latents=data.latents[:, :, :1])
    phases = [Phase(1, 16, 20, 3e-3), Phase(3, 16, 60, 3e-3)]
    model = Nova(config, alpha_bars())
    train_nova.train_nova(model, tmp_path / "nova", images, data, 0, phases)
    lines = (tmp_path / "nova" / "1" / "log.jsonl").read_text().splitlines()
    assert '"step": 60' in lines[-1]
    assert float(lines[-1].split('"loss": ')[1].split(",")[0]) < 0.9  # 1 is to have learned nothing


def test_changed_latents_decode_to_the_same_frames() -> None:
    torch.manual_seed(0)
    vae, mean, transform = Vae(), torch.randn(8), torch.randn(8, 8)
    pixels = torch.rand(2, 3, 5, 64, 64) * 2 - 1
    with torch.no_grad():
        (before, _), frames = vae.moments(pixels), vae.decode(vae.moments(pixels)[0])
        vae.change_latents(transform, mean)
        after, logvar = vae.moments(pixels)
        wanted = torch.einsum("ij,bjlhw->bilhw", transform, before - mean.view(1, -1, 1, 1, 1))
        assert torch.allclose(after, wanted, atol=1e-3)
        assert torch.allclose(vae.decode(after), frames, atol=1e-3)
    variance = np.exp(-6) * transform.square().sum(1)  # a new Vae gives every channel e^-6
    assert torch.allclose(logvar.mean((0, 2, 3, 4)).exp(), variance, rtol=0.2)


def test_patches_and_positions_begin_alike(config) -> None:
    torch.manual_seed(0)
    latents = torch.randn(300, 8, 2, 8, 8) * torch.logspace(0, -0.7, 8).view(1, -1, 1, 1, 1) + 2
    nova = Nova(config, alpha_bars())
    nova.begin_even(latents)
    for embed, table in (
        (nova.spatial.image_encoder.patch_embed, nova.spatial.table),
        (nova.temporal.video_encoder.patch_embed, nova.temporal.table),
    ):
        with torch.no_grad():
            embedded = embed(latents.transpose(1, 2).flatten(0, 1))  # (frames, patches, width)
            both = (embedded + table).flatten(0, 1)
        assert both.mean(0).abs().max() < 1e-3
        centred = (embedded - embedded.mean((0, 1))).flatten(0, 1)
        values = torch.linalg.svdvals(centred) / len(centred) ** 0.5
        components = 8 * embed.patch**2
        wanted = torch.tensor(EMBEDDED_DEVIATION * (192 / components) ** 0.5)
        assert torch.allclose(values[:components], wanted, rtol=0.1)


def test_inflated_weights_decode_every_frame_as_an_image() -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(4, 5, 3, padding=1)
    x = torch.randn(2, 4, 3, 8, 8)
    with torch.no_grad():
        images = torch.cat([conv(frame) for frame in x.split(1, dim=2)], dim=2)
        inflate(conv)
        assert torch.allclose(conv(x), images, atol=1e-5)


def test_losses_are_those_of_the_phases_that_were_trained_now(tmp_path: Path) -> None:
    """Of an autoencoder that was not trained again there is no folder."""
    assert last_losses(tmp_path / "vae", 4) == []
    for index in (2, 10, 9):
        (tmp_path / "nova" / str(index)).mkdir(parents=True)
        lines = [{"step": index, "loss": 0.5}, {"step": index, "psnr_clips": 30.0}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "nova" / str(index) / "log.jsonl").write_text(text)
    assert [each["step"] for each in last_losses(tmp_path / "nova", 9)] == [9, 10]


def test_mask_ratios_and_times() -> None:
    rng = np.random.default_rng(0)
    counts = np.bincount([visible_tokens(rng, 16) for _ in range(4000)], minlength=16)
    assert len(counts) == 16 and counts.min() > 50  # every number of visible tokens
    assert counts[:5].sum() > 0.42 * counts.sum()  # the paper's ratios: few; 5 of 16 without them
    starts = [frame_positions(rng, 3) for _ in range(200)]
    assert all(start[0] == 0 and len(start) == 3 for start in starts)
    steps = {round(float(start[1]), 3) for start in starts}
    assert steps == {1.0, 0.75, 0.6, 0.5}


def test_the_encoder_takes_clips_and_images() -> None:
    torch.manual_seed(0)
    encoder = VaeEncoder(CONFIG).eval()
    pixels = to_pixels([np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)])
    with torch.no_grad():
        assert encoder.encoder(pixels).shape == (1, 16, 3, 8, 8)
        image = encoder.encoder(pixels[:, :, :1])
        assert torch.allclose(image, encoder.encoder(pixels[:, :, 0]), atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride", "frames"), [(3, 1, 1), (3, 2, 1), ((1, 3, 3), 1, 4), (1, 1, 3)])
def test_convolutions_of_single_frames_are_those_of_clips(kernel, stride: int, frames: int) -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(4, 5, kernel, stride=stride, padding=0 if kernel == 1 else 1)
    x = torch.randn(2, 4, frames, 8, 8)
    padded = torch.cat([x[:, :, :1]] * (conv.kernel_size[0] - 1) + [x], dim=2)
    with torch.no_grad():
        assert torch.allclose(conv(x), nn.Conv3d.forward(conv, padded), atol=1e-5)


def test_noise_on_latents_grows_with_them_where_the_encoder_learns() -> None:
    """Channels of deviations 1 and 10; the share of the noise is uniform in 0 .. 0.2."""
    torch.manual_seed(0)
    mean = torch.randn(500, 2, 1, 8, 8) * torch.tensor([1.0, 10]).view(1, 2, 1, 1, 1)
    silent = torch.full_like(mean, -30)
    deviations = {
        only: (train_vae.noisy(mean, silent, Phase(9, 4, 1, 1e-3, only, latent_noise=0.2)) - mean)
        .square()
        .mean((0, 2, 3, 4))
        .sqrt()
        .tolist()
        for only in ("", "decode_stage")
    }
    expected = 0.2 / 3**0.5
    assert deviations[""] == pytest.approx([expected, 10 * expected], rel=0.1)
    assert deviations["decode_stage"] == pytest.approx([expected, expected], rel=0.1)


def test_brighter_than_white_is_white_to_the_loss() -> None:
    pixels = torch.tensor([1.0, 1, 1, -1, -1, -1, 0.5, 0.5])
    decoded = torch.tensor([1.5, 0.9, -2, -1.5, -0.9, 2, 1.5, -1.5], requires_grad=True)
    shown = train_vae.shown(decoded, pixels)
    assert shown.tolist() == pytest.approx([1, 0.9, -2, -1, -0.9, 2, 1.5, -1.5])
    shown.sum().backward()
    assert decoded.grad is not None and decoded.grad.tolist() == [0, 1, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("weight", [1.0, 12.0])
def test_clips_before_other_backgrounds_are_drawn_oftener(weight: float) -> None:
    """A third of them is not before black: w / (w + 2) with a weight of w."""
    phase = Phase(1, 300, 1, 1e-3, lit_weight=weight)
    corners = train_vae._batch(np.random.default_rng(0), phase)[:, 0, 0, 0, 0]
    assert float((corners > -1).float().mean()) == pytest.approx(weight / (weight + 2), abs=0.08)
