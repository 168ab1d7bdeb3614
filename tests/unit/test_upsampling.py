"""Upsampling merged with the convolution behind it, against diffusers' own module."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers.models.upsampling import Upsample2D  # noqa: E402

from edgeflow.upsampling import PhaseConv, merge_upsampling  # noqa: E402


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (2, 8)])
def test_it_is_diffusers_own_upsampling(bias: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    original = torch.nn.Sequential(Upsample2D(6, use_conv=True, out_channels=10, bias=bias)).double()
    merged = merge_upsampling(original)
    assert [type(m) for m in merged.modules()].count(PhaseConv) == 1
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), original(x), rtol=1e-12, atol=1e-12)


def test_the_original_keeps_its_modules() -> None:
    original = torch.nn.Sequential(Upsample2D(4, use_conv=True))
    merge_upsampling(original)
    assert isinstance(original[0], Upsample2D)


def test_other_forms_stay_as_they_are() -> None:
    class Other(torch.nn.Conv2d):  # what a quantized convolution is: a subclass with other weights
        pass

    quantized = Upsample2D(4, use_conv=True)
    quantized.conv = Other(4, 4, 3, padding=1)
    strided = Upsample2D(4, use_conv=True)
    strided.conv = torch.nn.Conv2d(4, 4, 3, padding=1, groups=2)
    others = [
        *(quantized, strided, Upsample2D(4, use_conv=False), Upsample2D(4, use_conv_transpose=True)),
        Upsample2D(4, use_conv=True, kernel_size=5, padding=2),
    ]
    twin = merge_upsampling(torch.nn.Sequential(*others))
    assert [type(m) for m in twin] == [Upsample2D] * len(others)
