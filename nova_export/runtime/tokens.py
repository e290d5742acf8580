"""Sets of tokens: how many each AR step predicts, which; latents cut into tokens and put together again."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nova_export.config import NovaConfig

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)


def set_sizes(num_tokens: int, num_steps: int) -> list[int]:
    """Tokens predicted in each AR step: differences of round(N cos(pi i / 2S)); empty steps are dropped."""
    left = np.round(np.cos(0.5 * np.pi * np.arange(num_steps + 1) / num_steps) * num_tokens).astype(np.int64)
    return [int(size) for size in left[:-1] - left[1:] if size > 0]


def patchify(latents: NDArray[Number], patch: int) -> NDArray[Number]:
    """(B, C, h, w) -> (B, N, p * p * C), values in the order (row in patch, column in patch, channel)."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.transpose(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: Floats, config: NovaConfig) -> Floats:
    """(B, N, p * p * C) -> (B, C, h, w)."""
    rows, columns = config.token_grid
    x = tokens.reshape(-1, rows, columns, config.patch, config.patch, config.latent_channels)
    return np.ascontiguousarray(x.transpose(0, 5, 1, 3, 2, 4)).reshape(
        -1, config.latent_channels, *config.latent_size
    )


def token_positions(config: NovaConfig, batch: int) -> Ints:
    """Where each value of each token stands in a flat (B, C, h, w): (B, N, p * p * C)."""
    shape = (batch, config.latent_channels, *config.latent_size)
    return patchify(np.arange(np.prod(shape), dtype=np.int64).reshape(shape), config.patch)


def take(tokens: NDArray[Number], ids: Ints) -> NDArray[Number]:
    """Tokens `ids` (B, K) of (B, N, ...)."""
    return tokens[np.arange(len(ids))[:, None], ids]
