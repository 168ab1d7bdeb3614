"""Seeded Gaussian noise, free of torch, bit for bit what ``torch.randn`` draws on a CPU.

A Mersenne Twister (Matsumoto & Nishimura 1998) feeds the Box-Muller transform (Box & Muller 1958). torch
computes logarithm, sine and cosine in float32 with the polynomials of Cephes (Moshier), and its
compiler fuses multiplications with the additions that follow them; each fused step is reproduced here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

#: torch draws blocks of 16: eight radii, then eight angles.
_BLOCK = 16
_LARGEST_SEED = 2**64 - 1

# Polynomials of Cephes' logf, sinf and cosf, highest power first; float32 is what torch rounds them to.
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
#: π/4 and ln 2, each split so that a small whole number times the leading part is exact.
_QUARTER_PI = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)
_LN2 = (0.693359375, -2.12194440e-4)
_SQRT_HALF = np.float32(0.707106781186547524)
_FOUR_OVER_PI = np.float32(1.27323954473516)
_TWO_PI = np.float32(2 * math.pi)


def gaussian_noise(seed: int, shape: tuple[int, ...]) -> Float32:
    """Standard normal noise of this seed and shape, float32.

    Equals ``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`` bit for bit on x86 with
    torch's CPU capability AVX2 or AVX512 (the one kernel serves both; measured with torch 2.13). With
    ATEN_CPU_CAPABILITY=default, 38 % of torch's own values differ from those, by up to 2.2e-6, and torch on
    ARM rounds in its own way too; this function gives the AVX2 values on every machine, for it makes 16
    values or more by correctly rounded operations only. As in torch, only the low 32 bits of the seed count,
    and fewer than 16 values are drawn in double precision by another recipe (with the C library's log1p, sin
    and cos).

    Raises ValueError for a seed outside 0 … 2**64 − 1 or a negative length.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    if any(length < 0 for length in shape):
        raise ValueError(f"shape: expected lengths of 0 or more, got {shape}")
    numel = math.prod(shape)
    twister = np.random.RandomState(int(seed) & 0xFFFFFFFF)
    values = _drawn_one_by_one(twister, numel) if numel < _BLOCK else _drawn_in_blocks(twister, numel)
    return values.reshape(shape)


def _words(twister: np.random.RandomState, count: int) -> NDArray[np.uint32]:
    """The generator's next 32-bit words (over the full range randint hands them out as they come)."""
    return twister.randint(0, 2**32, size=count, dtype=np.uint32)


def _uniform(twister: np.random.RandomState, count: int) -> Float32:
    """Multiples of 2**-24 in [0, 1): the low 24 bits of each word."""
    return (_words(twister, count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)


def _drawn_in_blocks(twister: np.random.RandomState, numel: int) -> Float32:
    """At least 16 values. A rest that fills no block is drawn anew as the last 16, over what was there."""
    whole = numel - numel % _BLOCK
    uniform = _uniform(twister, numel)  # the rest's own draws are spent even though they are then replaced
    values = np.empty(numel, dtype=np.float32)
    values[:whole] = _box_muller(uniform[:whole])
    if whole < numel:
        values[-_BLOCK:] = _box_muller(_uniform(twister, _BLOCK))
    return values


def _box_muller(uniform: Float32) -> Float32:
    """Blocks of 16 uniform values to blocks of 16 normal ones: √(−2 ln u₁) times cos and sin of 2π u₂."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    u1 = np.float32(1) - blocks[:, 0].ravel()  # [0, 1) to (0, 1], for the logarithm
    radius = np.sqrt(np.float32(-2) * _log(u1))
    sine, cosine = _sincos(_TWO_PI * blocks[:, 1].ravel())
    pairs = np.stack([(radius * half).reshape(-1, _BLOCK // 2) for half in (cosine, sine)], axis=1)
    return (pairs + np.float32(0)).ravel()  # torch adds the mean: −0 becomes 0


def _log(x: Float32) -> Float32:
    """ln x for x in [2**-24, 1], as Cephes' logf: x = m·2**e with m in [√½, √2), a polynomial in m − 1."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < _SQRT_HALF
    e = (exponent - small).astype(np.float32)
    m = mantissa - np.float32(1) + np.where(small, mantissa, np.float32(0))
    square = m * m
    y = _polynomial(_LOG, m) * m
    y = _fma(y, square, e * np.float32(_LN2[1]))
    y = y - square * np.float32(0.5)
    return _fma(e, _LN2[0], m + y)


def _sincos(x: Float32) -> tuple[Float32, Float32]:
    """Sine and cosine of x in [0, 2π], as Cephes: reduce to an octant, then one polynomial each."""
    octant = ((x * _FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    y = octant.astype(np.float32)
    for part in _QUARTER_PI:
        x = _fma(y, -part, x)
    z = x * x
    cosine = _polynomial(_COS, z) * z
    cosine = _fma(cosine, z, np.float32(-0.5) * z) + np.float32(1)
    sine = _polynomial(_SIN, z) * z
    sine = _fma(sine, x, x)
    swapped = octant & 2 != 0
    minus_sine = octant & 4 != 0
    minus_cosine = (octant - 2) & 4 == 0
    s, c = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(minus_sine, -s, s), np.where(minus_cosine, -c, c)


def _polynomial(coefficients: tuple[float, ...], x: Float32) -> Float32:
    """Horner's scheme, each step fused."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fma(y, x, coefficient)
    return y


def _fma(a: Float32, b: Float32 | float, c: Float32 | float) -> Float32:
    """a·b + c in float32 with one rounding, the processor's fused multiply-add.

    The product is exact in float64. The sum rounds there and again to float32, which would go wrong only on a
    float64 halfway between two float32 that the exact sum misses: none of the 2**24 radii and 2**24 angles
    that can be drawn leads to one (tests/unit/test_noise.py goes through them).
    """
    product = np.multiply(a, np.float32(b), dtype=np.float64)
    return (product + np.asarray(c, dtype=np.float32)).astype(np.float32)


def _drawn_one_by_one(twister: np.random.RandomState, numel: int) -> Float32:
    """Fewer than 16 values: Box-Muller in double precision, cosine then sine of each pair."""
    return np.fromiter(_double_pairs(twister, numel), dtype=np.float32, count=numel)


def _double_pairs(twister: np.random.RandomState, numel: int) -> Iterator[float]:
    words = [int(word) for word in _words(twister, 4 * ((numel + 1) // 2))]
    doubles = [
        ((high << 32 | low) & (2**53 - 1)) * 2.0**-53
        for high, low in zip(words[::2], words[1::2], strict=True)
    ]
    for u1, u2 in zip(doubles[::2], doubles[1::2], strict=True):
        radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        yield radius * math.cos(theta)
        yield radius * math.sin(theta)
