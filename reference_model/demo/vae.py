"""The demo's autoencoder in training form: encoder and decoder together, and the weights they begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference_model.vae import VaeDecoder, VaeEncoder
from reference_model.vae.blocks import Attention, CausalConv3d, ResBlock

CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKLOpenSora",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "block_out_channels": [64, 32, 64, 64],  # 64 at the ends: see `_linear_through_norm`
    "down_block_types": ["DownEncoderBlock2D"] * 2 + ["DownEncoderBlock3D"] * 2,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 8,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "shift_factor": None,
    "up_block_types": ["UpDecoderBlock3D"] * 4,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


class Vae(nn.Module):
    """Encoder and decoder together. Latents are not scaled here; the checkpoint's config says by how much."""

    def __init__(self) -> None:
        super().__init__()
        self.encode_stage, self.decode_stage = VaeEncoder(CONFIG), VaeDecoder(CONFIG)
        encoder: Any = self.encode_stage.encoder
        decoder: Any = self.decode_stage.decoder
        quant: Any = self.encode_stage.quant_conv
        self.apply(_begin_linear)
        last, middle, top = encoder.down_blocks[-1], encoder.mid_block, decoder.up_blocks[-1].resnets
        stream = [encoder.down_blocks[-2].downsamplers[0].conv, *(block.conv2 for block in last.resnets)]
        stream += [middle.resnets[0].conv2, middle.attentions[0].to_out[0], middle.resnets[1].conv2]
        _linear_through_norm(stream, middle.resnets[1], encoder.conv_norm_out, encoder.conv_out)
        nn.init.constant_(quant.bias[CONFIG["latent_channels"] :], -6.0)  # little noise
        stream = [top[0].conv_shortcut, top[0].conv2, top[1].conv2]
        _linear_through_norm(stream, top[1], decoder.conv_norm_out, decoder.conv_out)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, F, H, W) in [-1, 1] -> mean and log variance of the latents, each (B, C, l, h, w)."""
        moments = self.encode_stage.quant_conv(self.encode_stage.encoder(pixels))
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, l, h, w) -> (B, 3, F, H, W)."""
        return self.decode_stage(latents).float()

    def clip_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of a clip whose first frame is encoded by itself.

        GroupNorm's statistics span all frames, so the first latent frame of a clip differs from that of its
        first image. Generation starts from an image (image to video), so the transformer learns from these.
        """
        clip, image = self.moments(pixels), self.moments(pixels[:, :, :1])
        mean, logvar = (torch.cat([i, c[:, :, 1:]], dim=2) for i, c in zip(image, clip, strict=True))
        return mean, logvar

    @torch.no_grad()
    def change_latents(self, transform: Tensor, mean: Tensor) -> None:
        """Make transform @ (z - mean) the latents, transform (C, C) and mean (C,); frames stay as they are.

        Both go into the 1x1x1 convolutions on either side of the latents. Variances become those of sums of
        independent channels, the logarithm taken inside the sum.
        """
        channels = CONFIG["latent_channels"]
        quant: Any = self.encode_stage.quant_conv
        after: Any = self.decode_stage.post_quant_conv
        weights, biases = quant.weight.flatten(1), quant.bias
        share = transform.square() / transform.square().sum(1, keepdim=True)
        of_mean, of_logvar = transform @ weights[:channels], share @ weights[channels:]
        bias_of_mean = transform @ (biases[:channels] - mean)
        bias_of_logvar = share @ biases[channels:] + transform.square().sum(1).log()
        quant.weight.copy_(torch.cat([of_mean, of_logvar]).view_as(quant.weight))
        quant.bias.copy_(torch.cat([bias_of_mean, bias_of_logvar]))
        weight = after.weight.flatten(1)
        after.bias += weight @ mean
        after.weight.copy_((weight @ transform.inverse()).view_as(after.weight))

    def compile_stages(self) -> None:
        """Makes the decoder's training 1.3 times as fast, once compiled."""
        for stage in (self.encode_stage, self.decode_stage):
            stage.compile(dynamic=False)

    def state(self) -> dict[str, Tensor]:
        """Weights by their names in a checkpoint."""
        return {**self.encode_stage.state_dict(), **self.decode_stage.state_dict()}

    def load_state(self, weights: Mapping[str, Tensor]) -> None:
        """The reverse of `state`."""
        for stage in (self.encode_stage, self.decode_stage):
            stage.load_state_dict({name: weights[name] for name in stage.state_dict()})


@torch.no_grad()
def inflate(module: Any) -> None:
    """Images train the sum of a convolution's taps in time; give it all to the tap on the frame itself."""
    if isinstance(module, CausalConv3d):
        total = module.weight.sum(2)
        module.weight.zero_()
        module.weight[:, :, -1] = total


@torch.no_grad()
def _begin_linear(module: Any) -> None:
    """Convolutions keep the variance, and what stands behind a norm begins small: see below, why."""
    kind = type(module)
    if issubclass(kind, (nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)
    elif kind is ResBlock:
        module.conv2.weight *= 0.2
    elif kind is Attention:
        module.to_out[0].weight *= 0.2


def _linear_through_norm(
    stream: list[Any], last: Any, norm: nn.GroupNorm, out: nn.Conv3d, marker: float = 2.0
) -> None:
    """Initial weights under which the last GroupNorm keeps flat colours.

    Flat shapes on a flat ground have next to no statistics: normalised over the whole clip in groups of one
    or two channels, a value comes out that depends on the shape's area and hardly on its colour, and
    training learns no colours for a long time. So channels begin in pairs (A, -A), whose mean is zero, in
    one group; each carries a fixed zero-mean marker +M or -M on the frame's edge, which dominates the
    variance; and `out` begins with opposite weights within a pair, equal ones between +M and -M. As
    silu(y) - silu(-y) = y, the way through norm, SiLU and convolution is then linear, and free of M.
    """
    with torch.no_grad():
        for layer in stream:  # whatever writes into the residual stream
            layer.weight[1::2] = -layer.weight[::2]
            layer.bias.zero_()
        last.norm2.weight[0], last.norm2.bias[0] = 0.0, 3.0  # a constant activation, silu(3)
        edge = torch.tensor([[0.0, -1, 0], [1, 0, 1], [0, -1, 0]]) * marker
        kernel = torch.zeros_like(last.conv2.weight[0, 0])
        kernel[-1] = edge
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(norm.num_channels // 4)
        last.conv2.weight[:, 0] = signs[:, None, None, None] * kernel
        quads = out.weight[:, ::4]
        out.weight[:] = torch.stack([quads, -quads, quads, -quads], dim=2).flatten(1, 2)
