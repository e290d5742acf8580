"""Names, shapes and spread of every parameter of a published checkpoint, as one table a part. Torch-free.

The spreads make a random model behave: every stage's output has a spread near 1, the residual streams grow by
a small factor whatever the depth, so fp16 holds them, and latents stay bounded for any number of steps.
Must not know files or random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nova_export.config import FREQUENCIES, NUM_CLASSES, Mlp, NovaConfig, Vit

NULL_ROWS = 512  # learned rows for prompts shorter than this, whatever text_token_len is
BIAS = 0.1  # spread of biases, and relative spread of norm weights


@dataclass(frozen=True)
class Parameter:
    """One tensor: independent values of this mean and standard deviation.

    inverse_of: a patch embedding (D, C, p, p); `inverse_gain` of its pseudo-inverse (p * p * C, D) is added.
    """

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    inverse_of: Parameter | None = None
    inverse_gain: float = 0.0

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


Parameters = Iterator[Parameter]


def transformer(config: NovaConfig) -> Parameters:
    """`transformer/`: both encoders, the head and all embeddings."""
    width = config.spatial.width
    yield from _vit("video_encoder", config.temporal, config.latent_channels, 2 * config.patch)
    if config.mixer_rank is not None:
        if config.mixer_rank:
            yield Parameter("video_encoder.mixer.lora.weight", (config.mixer_rank, width), width**-0.5)
        yield from _linear("video_encoder.mixer.proj", config.mixer_rank or width, 2 * width, gain=0.7)
    yield from _vit("image_encoder", config.spatial, config.latent_channels, config.patch)
    yield from _head(config.head, width, config.latent_channels, config.patch)
    for token in ("bos_token", "mask_token"):
        yield Parameter(f"mask_embed.{token}", (1, width), 1.0)
    if config.text_dim is None:
        yield Parameter("label_embed.weight", (NUM_CLASSES + 1, width), 1.0)
        yield from _norm("label_embed.norm", width)
    else:
        yield Parameter("text_embed.weight", (NULL_ROWS, config.text_dim), 1.0)
        yield from _linear("text_embed.proj", config.text_dim, width)
        yield from _norm("text_embed.norm", width)
    if not config.rotary:
        yield from _norm("video_pos_embed.norm", width)
        yield from _frequency_mlp("video_pos_embed.time_proj", width)
    if config.is_video:
        for name in ("flow_proj", "fps_proj"):
            yield from _frequency_mlp(f"motion_embed.{name}", width)


def phi(config: Mapping[str, Any]) -> Parameters:
    """`text_encoder/`: the Phi language model of transformers, by its config.json."""
    width, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    depth = config["num_hidden_layers"]
    yield Parameter("model.embed_tokens.weight", (vocab, width), 1.0)
    for layer in range(depth):
        name = f"model.layers.{layer}"
        yield from _norm(f"{name}.input_layernorm", width)
        for which in ("q_proj", "k_proj", "v_proj"):
            yield from _linear(f"{name}.self_attn.{which}", width, width)
        yield from _linear(f"{name}.self_attn.dense", width, width, gain=2 * depth**-0.5)
        yield from _linear(f"{name}.mlp.fc1", width, hidden)
        yield from _linear(f"{name}.mlp.fc2", hidden, width, gain=2 * depth**-0.5)
    yield from _norm("model.final_layernorm", width)
    yield from _linear("lm_head", width, vocab)


def autoencoder(config: Mapping[str, Any]) -> Parameters:
    """`vae/`: AutoencoderKL or AutoencoderKLOpenSora, by its config.json.

    Both have the same names. The video one's blocks of type 3D have (3, 3, 3) kernels; a downsampling layer
    has those of the block it leads to, the last upsampling layer (1, 3, 3).
    """
    channels, latent = list(config["block_out_channels"]), config["latent_channels"]
    layers, outputs = config["layers_per_block"], latent * (2 if config.get("double_z", True) else 1)
    down = [_kernel(block) for block in config["down_block_types"]]
    up = [_kernel(block) for block in config["up_block_types"]]

    yield from _conv("encoder.conv_in", config["in_channels"], channels[0], (3, 3), gain=1.5)
    for i, (kernel, before, after) in enumerate(_steps(down, channels)):
        yield from _resnets(f"encoder.down_blocks.{i}", before, after, kernel, layers)
        if i + 1 < len(channels):
            yield from _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", after, after, down[i + 1])
    yield from _middle("encoder", channels[-1], down[-1])
    yield from _norm("encoder.conv_norm_out", channels[-1])
    yield from _conv("encoder.conv_out", channels[-1], outputs, down[-1], gain=1.5)

    yield from _conv("decoder.conv_in", latent, channels[-1], up[-1])
    yield from _middle("decoder", channels[-1], up[-1])
    for i, (kernel, before, after) in enumerate(_steps(up, channels[::-1])):
        yield from _resnets(f"decoder.up_blocks.{i}", before, after, kernel, layers + 1)
        if i + 1 < len(channels):
            flat = len(kernel) == 3 and i + 2 == len(channels)
            yield from _conv(
                f"decoder.up_blocks.{i}.upsamplers.0.conv", after, after, (1, 3, 3) if flat else kernel
            )
    yield from _norm("decoder.conv_norm_out", channels[0])
    yield from _conv("decoder.conv_out", channels[0], config["out_channels"], up[-1])

    point = (1,) * len(up[-1])
    if config.get("use_quant_conv", True):
        yield from _conv("quant_conv", outputs, outputs, point, gain=1.5)
    if config.get("use_post_quant_conv", True):
        yield from _conv("post_quant_conv", latent, latent, point)


def _vit(name: str, arch: Vit, channels: int, patch: int) -> Parameters:
    """Blocks add LN(attention) and LN(MLP); weights of 1/sqrt(depth) let the stream's variance grow by 2."""
    width, share = arch.width, arch.depth**-0.5
    yield from _conv(f"{name}.patch_embed.proj", channels, width, (patch, patch))
    for layer in range(arch.depth):
        block = f"{name}.blocks.{layer}"
        yield from _linear(f"{block}.attn.qkv", width, 3 * width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _norm(f"{block}.norm1", width, share)
        yield from _linear(f"{block}.mlp.fc1", width, 4 * width)
        yield from _linear(f"{block}.mlp.fc2", 4 * width, width)
        yield from _norm(f"{block}.norm2", width, share)
    yield from _norm(f"{name}.norm", width)


def _head(arch: Mlp, condition: int, channels: int, patch: int) -> Parameters:
    """The last layer undoes the patch embedding: predictions follow the noisy sample, as trained ones do;
    with predictions unrelated to it the latents would grow by 1/sqrt(alpha bar) over the diffusion steps."""
    width, values = arch.width, patch**2 * channels
    embedding, bias = _conv("image_decoder.patch_embed.proj", channels, width, (patch, patch))
    yield from (embedding, bias)
    for name, size in (("timestep_proj", FREQUENCIES), ("condition_proj", condition)):
        yield from _linear(f"image_decoder.time_cond_embed.{name}.fc1", size, width, gain=1.5)
        yield from _linear(f"image_decoder.time_cond_embed.{name}.fc2", width, width, gain=1.5)
    for layer in range(arch.depth):
        block = f"image_decoder.blocks.{layer}"
        yield from _linear(f"{block}.norm1.proj", width, 3 * width, gain=0.7)
        yield from _linear(f"{block}.proj.fc1", width, width)
        yield from _linear(f"{block}.proj.fc2", width, width)
        yield from _norm(f"{block}.norm2", width, 0.7 * arch.depth**-0.5)
    yield from _linear("image_decoder.norm.proj", width, 2 * width, gain=0.3)
    yield Parameter(
        "image_decoder.head.weight",
        (values, width),
        std=0.2 * width**-0.5,
        inverse_of=embedding,
        inverse_gain=1.7,
    )
    yield Parameter("image_decoder.head.bias", (values,), BIAS)


def _frequency_mlp(name: str, width: int) -> Parameters:
    """Linear, SiLU, Linear on sines and cosines, whose mean square is 1/2."""
    yield from _linear(f"{name}.0", FREQUENCIES, width, gain=2.0)
    yield from _linear(f"{name}.2", width, width, gain=1.5)


def _steps(kernels: list[tuple[int, ...]], channels: list[int]) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(kernel, channels in, channels out) of each block."""
    return zip(kernels, [channels[0], *channels], channels, strict=False)


def _kernel(block_type: str) -> tuple[int, ...]:
    return (3, 3, 3) if "3D" in block_type else (3, 3)


def _middle(part: str, width: int, kernel: tuple[int, ...]) -> Parameters:
    attention = f"{part}.mid_block.attentions.0"
    yield from _resnets(f"{part}.mid_block", width, width, kernel, 2)
    yield from _norm(f"{attention}.group_norm", width)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{attention}.{name}", width, width)


def _resnets(name: str, before: int, after: int, kernel: tuple[int, ...], count: int) -> Parameters:
    for i in range(count):
        inputs, resnet = (before if i == 0 else after), f"{name}.resnets.{i}"
        yield from _norm(f"{resnet}.norm1", inputs)
        yield from _conv(f"{resnet}.conv1", inputs, after, kernel)
        yield from _norm(f"{resnet}.norm2", after)
        yield from _conv(f"{resnet}.conv2", after, after, kernel)
        if inputs != after:
            yield from _conv(f"{resnet}.conv_shortcut", inputs, after, (1,) * len(kernel))


def _linear(name: str, inputs: int, outputs: int, gain: float = 1.0) -> Parameters:
    yield from _conv(name, inputs, outputs, (), gain)


def _conv(name: str, inputs: int, outputs: int, kernel: tuple[int, ...], gain: float = 1.0) -> Parameters:
    """Weight and bias. An input of spread 1 gives an output of spread `gain`."""
    std = gain / math.sqrt(inputs * math.prod(kernel))
    yield Parameter(f"{name}.weight", (outputs, inputs, *kernel), std)
    yield Parameter(f"{name}.bias", (outputs,), BIAS)


def _norm(name: str, width: int, gain: float = 1.0) -> Parameters:
    """Weight and bias of a LayerNorm or GroupNorm whose output has spread `gain`."""
    yield Parameter(f"{name}.weight", (width,), BIAS * gain, mean=gain)
    yield Parameter(f"{name}.bias", (width,), BIAS * gain)
