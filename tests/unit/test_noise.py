"""The noise held against torch itself, and against digests of torch's noise where there is no such torch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from edgeflow import noise
from edgeflow.noise import gaussian_noise

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
    drawn = gaussian_noise(seed, shape).astype("<f4")
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:12] == digest


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
    triples = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in triples]
    fused = np.array([correctly_rounded(value) for value in exact], dtype=np.float32)
    assert not same_bits(a * b + c, fused)  # two roundings do differ here
    assert same_bits(noise._fma(a, b, c), fused)


def _double_roundings(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> int:
    """How many of these sums float64 leaves halfway between two float32 without being exactly there."""
    product = np.multiply(a, np.float32(b), dtype=np.float64)
    addend = np.broadcast_to(np.asarray(c, dtype=np.float32), product.shape).astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # exact: Knuth's two-sum
    return int(np.count_nonzero((total.view(np.int64) & 0x1FFFFFFF == 0x10000000) & (error != 0)))


def test_the_check_sees_a_double_rounding() -> None:
    # (1 + 2**-23)·(1 − 2**-23)·2**-24 is 2**-70 short of half the last place of c.
    a, b, c = np.float32([1 + 2**-23]), np.float32([(1 - 2**-23) * 2**-24]), np.float32([1 + 2**-23])
    assert _double_roundings(a, b, c) == 1


@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_no_draw_leads_to_a_double_rounding(monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    """The premise of ``_fma``, over each uniform value that can be drawn (all 2**24 with -m slow)."""
    calls, wrong = 0, 0
    plain = noise._fma

    def counting(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> np.ndarray:
        nonlocal calls, wrong
        calls, wrong = calls + 1, wrong + _double_roundings(a, b, c)
        return plain(a, b, c)

    monkeypatch.setattr(noise, "_fma", counting)
    for start in range(0, 1 << 24, 1 << 22):
        uniform = np.arange(start, start + (1 << 22), stride).astype(np.float32) * np.float32(2**-24)
        noise._log(np.float32(1) - uniform)
        noise._sincos(noise._TWO_PI * uniform)
    assert calls == 4 * 19 and wrong == 0


def test_imports_no_torch() -> None:
    code = "import sys, edgeflow.noise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
