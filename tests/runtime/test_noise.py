"""nova_export.runtime.noise against torch's own CPU generator."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nova_export.errors import InputError
from nova_export.runtime.noise import SEED_MAX, SEED_MIN, TorchGenerator

torch = pytest.importorskip("torch")

# torch's AVX kernels, as its Linux builds compile them, are matched bit for bit (see noise.py).
EXACT = sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
BLOCK_TOLERANCE = 0.0 if EXACT else 5e-6
SCALAR_TOLERANCE = 5e-7  # one float32 step, where a double rounds to the other side

seeds = st.one_of(
    st.integers(SEED_MIN, SEED_MAX), st.sampled_from([0, -1, 2**32, 2**32 + 1, 2**63, SEED_MIN, SEED_MAX])
)
shapes = st.one_of(
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.integers(0, 70).map(lambda n: (n,)),
    st.sampled_from([(1000,), (2, 3, 17, 5), (624,), (625,)]),
)
small_settings = settings(max_examples=60, deadline=None)


def pair(seed: int) -> tuple[TorchGenerator, torch.Generator]:
    return TorchGenerator(seed), torch.Generator("cpu").manual_seed(seed)


def assert_normal(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.dtype == np.float32 and ours.shape == tuple(theirs.shape)
    tolerance = BLOCK_TOLERANCE if ours.size >= 16 else SCALAR_TOLERANCE
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=tolerance)


@small_settings
@given(seed=seeds, shape=shapes)
def test_any_seed_and_shape(seed: int, shape: tuple[int, ...]) -> None:
    ours, theirs = pair(seed)
    uniform = ours.uniform(shape)
    assert uniform.dtype == np.float32
    np.testing.assert_array_equal(uniform, torch.rand(shape, generator=theirs).numpy())
    assert_normal(ours.normal(shape), torch.randn(shape, generator=theirs))


@small_settings
@given(
    seed=seeds,
    calls=st.lists(st.tuples(st.sampled_from(["uniform", "normal"]), st.integers(0, 40)), max_size=12),
)
def test_interleaved_calls_share_one_state(seed: int, calls: list[tuple[str, int]]) -> None:
    """Odd small normals leave half a pair waiting: neither uniforms nor blocks may use it up or drop it."""
    ours, theirs = pair(seed)
    for kind, size in calls:
        if kind == "uniform":
            np.testing.assert_array_equal(ours.uniform((size,)), torch.rand(size, generator=theirs).numpy())
        else:
            assert_normal(ours.normal((size,)), torch.randn(size, generator=theirs))


@pytest.mark.parametrize("between", [0, 16, 17, 100])
def test_waiting_half_of_a_pair_survives_a_block(between: int) -> None:
    ours, theirs = pair(7)
    for size in (3, between, 1, 2):
        assert_normal(ours.normal((size,)), torch.randn(size, generator=theirs))


@pytest.mark.parametrize("size", [17, 24, 31, 33, 47, 12345])
def test_last_partial_block_is_redrawn(size: int) -> None:
    ours, theirs = pair(3)
    got, want = ours.normal((size,)), torch.randn(size, generator=theirs).numpy()
    np.testing.assert_allclose(got[-16:], want[-16:], rtol=0, atol=BLOCK_TOLERANCE)
    whole = TorchGenerator(3).normal((size // 16 * 16,))
    np.testing.assert_array_equal(got[: size - 16], whole[: size - 16])
    assert not np.any(got[size - 16 : size // 16 * 16] == whole[size - 16 :]), (
        "the whole blocks' values must be gone"
    )
    np.testing.assert_array_equal(ours.uniform((5,)), torch.rand(5, generator=theirs).numpy())


def test_two_million_values() -> None:
    ours, theirs = pair(2024)
    got, want = ours.normal((1 << 21,)), torch.randn(1 << 21, generator=theirs)
    assert_normal(got, want)
    assert np.abs(got).max() > 4.5, "too few tail values for the test to mean anything"


@small_settings
@given(seed=st.integers(0, 99), size=st.integers(1, 200), steps=st.integers(0, 4), data=st.data())
def test_taken_values_are_those_of_the_whole(seed: int, size: int, steps: int, data: st.DataObject) -> None:
    flat = data.draw(st.lists(st.integers(0, size - 1), max_size=12))
    indices = np.array(flat, np.int64).reshape((2, -1) if len(flat) % 2 == 0 else (-1,))
    one_by_one, raw, batched = (TorchGenerator(seed) for _ in range(3))
    want = [one_by_one.normal((size,))[indices] for _ in range(steps)]
    got = [raw.normal_raw(size).take(indices) for _ in range(steps)]
    together = batched.normal_steps(size, steps, indices)
    assert together.dtype == np.float32 and together.shape == (steps, *indices.shape)
    for step in range(steps):
        np.testing.assert_array_equal(got[step], want[step])
        np.testing.assert_array_equal(together[step], want[step])
    after = one_by_one.normal((3,))
    np.testing.assert_array_equal(raw.normal((3,)), after)
    np.testing.assert_array_equal(batched.normal((3,)), after)


def test_steps_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    indices = np.array([0, 8, 40, 41], np.int64)
    whole = TorchGenerator(1).normal_steps(41 + 1, 7, indices)
    monkeypatch.setattr("nova_export.runtime.noise.CHUNK_DRAWS", 100)
    np.testing.assert_array_equal(TorchGenerator(1).normal_steps(41 + 1, 7, indices), whole)


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("index", [-1, 64])
def test_index_outside_the_tensor(size: int, index: int) -> None:
    with pytest.raises(IndexError, match=f"{size} values"):
        TorchGenerator(0).normal_raw(size).take(np.array([index]))
    with pytest.raises(IndexError):
        TorchGenerator(0).normal_steps(size, 2, np.array([index]))


@pytest.mark.parametrize("seed", [SEED_MIN - 1, SEED_MAX + 1, 1.0, "1", None])
def test_seed_refused(seed: object) -> None:
    with pytest.raises(InputError, match="seed"):
        TorchGenerator(seed)  # type: ignore[arg-type]


def test_numpy_seed_taken() -> None:
    np.testing.assert_array_equal(
        TorchGenerator(np.int64(-5)).uniform((4,)), TorchGenerator(-5).uniform((4,))
    )
