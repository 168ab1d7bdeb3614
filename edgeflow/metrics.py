"""How far one array is from another. NumPy only; everything is computed in float64.

A value that is not finite, on either side, is an unbounded error: −inf dB, or +inf as a difference, so that
it fails every gate. Equal arrays are +inf dB apart.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def sqnr_db(reference: ArrayLike, actual: ArrayLike) -> float:
    """Signal to quantization noise, 10·log₁₀(Σ reference² / Σ (actual − reference)²), in dB.

    Any shape, any real dtype. Raises ValueError for arrays of different shapes or without a value.
    """
    signal, error = _signal_and_error(reference, actual)
    return _decibels(float(np.sum(signal**2)), float(np.sum(error**2)))


def psnr_db(reference: ArrayLike, actual: ArrayLike, peak: float) -> float:
    """Peak signal to noise, 10·log₁₀(peak² / mean (actual − reference)²), in dB.

    ``peak`` is the largest value a pixel can have: 1 for pictures in [0, 1], 255 for bytes. Raises ValueError
    for arrays of different shapes or without a value, or a peak that is not positive.
    """
    if not peak > 0:
        raise ValueError(f"peak: expected a positive number, got {peak}")
    _, error = _signal_and_error(reference, actual)
    return _decibels(float(peak) ** 2, float(np.mean(error**2)))


def max_abs(reference: ArrayLike, actual: ArrayLike) -> float:
    """The largest absolute difference. Raises ValueError as ``sqnr_db`` does."""
    _, error = _signal_and_error(reference, actual)
    largest = float(np.max(np.abs(error)))
    return math.inf if math.isnan(largest) else largest


def _signal_and_error(
    reference: ArrayLike, actual: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    signal, other = np.asarray(reference, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    if signal.shape != other.shape:
        raise ValueError(f"shapes differ: expected {signal.shape}, got {other.shape}")
    if signal.size == 0:
        raise ValueError(f"expected at least one value, got the shape {signal.shape}")
    with np.errstate(invalid="ignore", over="ignore"):  # inf − inf: the NaN is what the callers look for
        return signal, other - signal


def _decibels(signal: float, noise: float) -> float:
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
