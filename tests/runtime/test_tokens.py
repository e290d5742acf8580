"""nova_export.runtime.tokens: sets that add up, latents cut and put together as the reference model does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_export.config import NovaConfig
from nova_export.runtime.tokens import patchify, set_sizes, take, token_positions, unpatchify
from tests.strategies import configs


@given(st.integers(1, 4096), st.integers(1, 300))
def test_sets_sum_to_all_tokens_and_none_is_empty(tokens: int, steps: int) -> None:
    sizes = set_sizes(tokens, steps)
    assert sum(sizes) == tokens and min(sizes) >= 1 and len(sizes) <= steps
    assert all(type(size) is int for size in sizes)


def test_published_sizes() -> None:
    """round(N cos(pi i / 2S)) are left after step i: written out by hand for N = 24 and S = 6."""
    left = [24, 23, 21, 17, 12, 6, 0]
    assert set_sizes(24, 6) == [a - b for a, b in itertools.pairwise(left)]
    assert set_sizes(24, 1) == [24]
    assert set_sizes(2, 50) == [1, 1]


@given(configs, st.integers(1, 3))
@settings(deadline=None)
def test_patchify_is_the_reference_model_s(config: NovaConfig, batch: int) -> None:
    torch = pytest.importorskip("torch")
    from reference_model.layers import PatchEmbed

    latents = np.random.default_rng(0).standard_normal(
        (batch, config.latent_channels, *config.latent_size), np.float32
    )
    tokens = patchify(latents, config.patch)
    assert tokens.shape == (batch, config.num_tokens, config.token_dim)
    reference = PatchEmbed(config.latent_channels, 8, config.patch)
    np.testing.assert_array_equal(tokens, reference.patchify(torch.from_numpy(latents)))
    np.testing.assert_array_equal(unpatchify(tokens, config), latents)
    np.testing.assert_array_equal(reference.unpatchify(torch.from_numpy(tokens), config.token_grid), latents)
    np.testing.assert_allclose(  # and the convolution is a product of the cut patches
        reference(torch.from_numpy(latents)).detach(),
        reference.embed(torch.from_numpy(tokens)).detach(),
        atol=1e-5,
    )


@given(configs, st.integers(1, 3))
def test_positions_find_each_value_in_flat_latents(config: NovaConfig, batch: int) -> None:
    latents = np.random.default_rng(0).standard_normal(
        (batch, config.latent_channels, *config.latent_size), np.float32
    )
    positions = token_positions(config, batch)
    np.testing.assert_array_equal(latents.ravel()[positions], patchify(latents, config.patch))
    assert sorted(positions.ravel()) == list(range(latents.size))


def test_unpatchify_gives_memory_of_its_own() -> None:
    """Latents of a step are shown to the caller while the loop goes on writing tokens."""
    from tests.strategies import tiny_config

    config = tiny_config((1, 1))
    tokens = np.zeros((1, config.num_tokens, config.token_dim), np.float32)
    latents = unpatchify(tokens, config)
    tokens += 1
    assert not latents.any() and latents.flags.c_contiguous


def test_take() -> None:
    tokens = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    ids = np.array([[3, 0], [1, 1]])
    np.testing.assert_array_equal(
        take(tokens, ids), [[tokens[0, 3], tokens[0, 0]], [tokens[1, 1], tokens[1, 1]]]
    )
    assert take(tokens, ids[:, :0]).shape == (2, 0, 3)
