"""C++'s draws against the numpy implementation, bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from nova_export.runtime.noise import BLOCK, TorchGenerator


@pytest.mark.parametrize("seed", [0, 1, -5, 2**32 - 1, 2**40 + 3])
def test_same_seed_same_bits(seed: int, cpp: Path) -> None:
    """Blocks, partial blocks and single values in one stream; single normals may be a float32 step apart."""
    draws = [
        ("uniform", 1000),
        ("normal", 4096),
        ("normal", 37),
        ("normal", 5),
        ("steps", 1500, 7),
        ("uniform", 3),
    ]
    words = [str(word) for draw in draws for word in draw]
    ran = subprocess.run(
        [cpp / "release/tests/nova_noise", str(seed), *words], capture_output=True, check=True
    )
    actual, generator = np.frombuffer(ran.stdout, np.float32), TorchGenerator(seed)
    for kind, size, *steps in draws:
        if kind == "uniform":
            expected = generator.uniform((size,))
        elif kind == "normal":
            expected = generator.normal((size,))
        else:
            expected = generator.normal_steps(size, steps[0], np.arange(0, size, 3)).ravel()
        here, actual = actual[: len(expected)], actual[len(expected) :]
        if kind == "normal" and size < BLOCK:
            np.testing.assert_array_max_ulp(here, expected, 1)
        else:
            np.testing.assert_array_equal(here, expected)
    assert not len(actual)
