"""The noise held against torch itself, and against digests of torch's noise where there is no such torch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from edgeflow.noise import _fma, gaussian_noise

SEEDS = [0, 1, 42, 1234567, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 2**63 - 1, 2**64 - 1]
SHAPES = [(0,), (), (1,), (3,), (2, 7), (15,), (16,), (17,), (31,), (32,), (3, 5, 7)]
SHAPES += [(1, 4, 64, 64), (1, 8, 16, 16), (2, 4, 8, 8)]


def torch_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this torch draws by another kernel; the digests below hold the values")
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_torch_bit_for_bit(seed: int, shape: tuple[int, ...]) -> None:
    assert same_bits(gaussian_noise(seed, shape), torch_noise(seed, shape))


def test_equals_torch_over_a_million_values() -> None:
    # Covers about 3% of the 2**24 radii and of the 2**24 angles that exist.
    assert same_bits(gaussian_noise(2026, (1 << 20,)), torch_noise(2026, (1 << 20,)))


@pytest.mark.parametrize(
    ("seed", "shape", "digest"),
    [
        (42, (15,), "8db9a5331024"),
        (42, (17,), "2ae700cddb7c"),
        (42, (1, 4, 64, 64), "e97f3de04c7c"),
    ],
)
def test_digest_of_torch_2_13_noise(seed: int, shape: tuple[int, ...], digest: str) -> None:
    noise = gaussian_noise(seed, shape).astype("<f4")
    assert hashlib.sha256(noise.tobytes()).hexdigest()[:12] == digest


def test_only_the_low_32_bits_of_the_seed_count() -> None:
    assert same_bits(gaussian_noise(2**32 + 5, (64,)), gaussian_noise(5, (64,)))
    assert not same_bits(gaussian_noise(6, (64,)), gaussian_noise(5, (64,)))


def test_bad_seed_and_shape() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            gaussian_noise(seed, (4,))
    with pytest.raises(ValueError, match="shape"):
        gaussian_noise(0, (4, -1))


def correctly_rounded(value: Fraction) -> np.float32:
    """The float32 nearest to an exact value, ties to even."""
    near = np.float32(float(value))
    candidates = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.int32)) & 1))


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(3)
    a, b, c = (rng.standard_normal(2000).astype(np.float32) for _ in range(3))
    # Made ties: a·b is half a unit of c's last place, and a hair off it in the product's own last bits.
    hair = np.float32(1 + 2**-23)
    a = np.concatenate(
        [a, np.float32([2**-24, 2**-24, -(2**-24), 2**-24]), np.full(4, hair * np.float32(2**-24))]
    )
    b = np.concatenate([b, np.float32([1, hair, hair, -hair]), np.float32([1, -1, hair, -hair])])
    c = np.concatenate([c, np.float32([1, 1, 1.5, hair]), np.float32([1, 1.5, hair, 3])])
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)
    ]
    assert same_bits(_fma(a, b, c), np.array([correctly_rounded(value) for value in exact], dtype=np.float32))


def test_fma_mends_a_double_rounding() -> None:
    # (1 + 2**-23)·(1 − 2**-23)·2**-24 is 2**-70 short of half the last place of c. In float64 the sum is a
    # tie, which goes up to the even neighbour; the exact sum lies under it.
    a, b, c = np.float32([1 + 2**-23]), np.float32([(1 - 2**-23) * 2**-24]), np.float32([1 + 2**-23])
    assert np.float32(np.float64(a[0]) * np.float64(b[0]) + np.float64(c[0])) == np.float32(1 + 2**-22)
    assert _fma(a, b, c)[0] == c[0]
    assert _fma(a, -b, -c)[0] == -c[0]


def test_imports_no_torch() -> None:
    code = "import sys, edgeflow.noise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
