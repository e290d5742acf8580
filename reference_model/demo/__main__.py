"""Train the demo checkpoint from nothing: python -m reference_model.demo --work FOLDER --out CHECKPOINT."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click
import torch

from nova_export.runtime.tokenizer import PromptTokenizer
from reference_model.demo import train_nova, train_vae
from reference_model.demo.model import Nova
from reference_model.demo.recipe import SEED
from reference_model.demo.store import last_losses, read_runs, read_weights, write_checkpoint
from reference_model.demo.tokens import merges
from reference_model.demo.train_nova import (
    LATENT_FRAMES,
    TEXT_LENGTH,
    alpha_bars,
    make_latents,
    nova_config,
)
from reference_model.demo.trainer import best_device
from reference_model.demo.vae import Vae
from reference_model.small_tokenizer import write_tokenizer


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of state and logs.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to write.")
@click.option("--start", type=click.Path(path_type=Path), help="Checkpoint whose phases are done already.")
def main(work: Path, out: Path, start: Path | None) -> None:
    """Train autoencoder and transformer, and write the checkpoint. A run that was stopped goes on.

    With --start, a transformer is trained on only if the first phases of its autoencoder are done: latents
    hardly change in the later ones, but entirely in those.
    """
    work.mkdir(parents=True, exist_ok=True)
    before = {"vae": [], "vae_later": [], "nova": [], **(read_runs(start) if start else {})}
    device, tokenizer = best_device(), _tokenizer(work)
    torch.manual_seed(SEED)
    vae = Vae().to(device)
    if start:
        vae.load_state(read_weights(start, "vae"))
    near_latents = len(before["vae"]) == len(train_vae.PHASES)
    if not near_latents:
        before |= {"vae_later": [], "nova": []}
        train_vae.train_vae(vae, work / "vae", SEED, done=len(before["vae"]))
        train_vae.even_latents(vae, SEED)
    later = train_vae.LATER_PHASES
    if len(before["vae_later"]) < len(later):
        vae.compile_stages()
    train_vae.train_vae(vae, work / "vae_later", SEED, later, done=len(before["vae_later"]))

    images = make_latents(vae, tokenizer, work / "images.safetensors", SEED, train_nova.IMAGES, 1)
    clips = make_latents(vae, tokenizer, work / "clips.safetensors", SEED, train_nova.CLIPS, LATENT_FRAMES)
    config = nova_config(len(merges()) + 257)  # with 256 bytes and the end of text
    torch.manual_seed(SEED)
    nova = Nova(config, alpha_bars()).to(device)
    nova.begin_even(clips.latents[:2000].to(device))
    if start and near_latents:
        nova.load_parts({part: read_weights(start, part) for part in ("transformer", "text_encoder")})
    nova.compile_blocks()
    train_nova.train_nova(nova, work / "nova", images, clips, SEED, done=len(before["nova"]))

    runs = {name: [*done, *last_losses(work / name, len(done))] for name, done in before.items()}
    write_checkpoint(out, config, vae, nova, work / "tokenizer", runs)
    click.echo(out)


def _tokenizer(work: Path) -> PromptTokenizer:
    folder = work / "tokenizer"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=work) as partial:
            write_tokenizer(Path(partial) / "tokenizer", merges())
            shutil.move(Path(partial) / "tokenizer", folder)
    return PromptTokenizer(folder / "tokenizer.json", TEXT_LENGTH)


if __name__ == "__main__":
    main()
