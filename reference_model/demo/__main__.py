"""Train the demo checkpoint from nothing: python -m reference_model.demo --work FOLDER --out CHECKPOINT."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click

from nova_export.runtime.tokenizer import PromptTokenizer
from reference_model.demo import train_nova
from reference_model.demo.recipe import SEED
from reference_model.demo.tokens import merges
from reference_model.demo.train_nova import LATENT_FRAMES, TEXT_LENGTH, Latents, make_latents, nova_config
from reference_model.demo.train_vae import train_vae
from reference_model.demo.writer import write_checkpoint
from reference_model.small_tokenizer import write_tokenizer


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of state and logs.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint folder to write.")
def main(work: Path, out: Path) -> None:
    """Train autoencoder and transformer, and write the checkpoint. A run that was stopped goes on."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(work)
    vae = train_vae(work / "vae", SEED)
    images = make_latents(vae, tokenizer, work / "images.safetensors", SEED, train_nova.IMAGES, 1)
    clips = make_latents(vae, tokenizer, work / "clips.safetensors", SEED, train_nova.CLIPS, LATENT_FRAMES)
    scale = float(1 / clips.latents.std())
    config = nova_config(scale, len(merges()) + 257)  # with 256 bytes and the end of text
    nova = train_nova.train_nova(work / "nova", config, scaled(images, scale), scaled(clips, scale), SEED)
    write_checkpoint(out, config, vae, nova, tokenizer=work / "tokenizer", logs=[work / "vae", work / "nova"])
    click.echo(out)


def scaled(data: Latents, scale: float) -> Latents:
    """Latents as the transformer sees them: of standard deviation 1 over all."""
    return Latents(data.latents * scale, data.token_ids, data.lengths, data.flow)


def _tokenizer(work: Path) -> PromptTokenizer:
    folder = work / "tokenizer"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=work) as partial:
            write_tokenizer(Path(partial) / "tokenizer", merges())
            shutil.move(Path(partial) / "tokenizer", folder)
    return PromptTokenizer(folder / "tokenizer.json", TEXT_LENGTH)


if __name__ == "__main__":
    main()
