"""What Core ML bundles are made for: targets from the checkpoint's headers, refusals, the command line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeflow.apple import CHUNK_BYTES, TARGETS, AppleSettings, needs, settle
from edgeflow.cli import main
from edgeflow.errors import UnknownNameError, UsageError
from edgeflow.quantization.stored import StoredLayer

CHANNEL = StoredLayer(8, (4, 32), (4, 1), zero_point=False)
BLOCKS = StoredLayer(8, (4, 32), (4, 2), zero_point=False)
INT4 = StoredLayer(4, (4, 32), (4, 1), zero_point=False)
SHIFTED = StoredLayer(8, (4, 32), (4, 1), zero_point=True)
TABLE = StoredLayer(6, (4, 32), (64,), zero_point=False, palette=True)
ROUNDED = StoredLayer(8, (4, 32), (4, 1), zero_point=False, activations=True)


def model(*layers: StoredLayer, unet_weights: int = 10) -> Any:
    """A checkpoint as far as its headers are asked for."""
    tensor = SimpleNamespace(numel=unet_weights, dtype="F32", start=0, end=4 * unet_weights)
    return SimpleNamespace(
        name="m",
        quantized_layers=lambda part: {f"l{i}": x for i, x in enumerate(layers)} if part == "unet" else {},
        stored_tensors=lambda part: {"w": tensor},
    )


@pytest.mark.parametrize(
    "layers, version",
    [
        ((), 15),
        ((CHANNEL,), 16),
        ((TABLE,), 16),
        ((ROUNDED, CHANNEL), 17),
        ((CHANNEL, INT4), 18),
        ((BLOCKS,), 18),
        ((SHIFTED,), 18),
    ],
)
def test_the_target_is_the_earliest_that_has_what_is_needed(
    layers: tuple[StoredLayer, ...], version: int
) -> None:
    given = model(*layers)
    assert max(v for v, _ in needs(given)) == version
    assert settle(given, AppleSettings(), "pipeline", "fp16")["target"] == f"iOS{version}"
    for target, own in TARGETS.items():
        if own >= version:
            assert settle(given, AppleSettings(target=target), "pipeline", "fp16")["target"] == target
        else:
            with pytest.raises(UsageError, match=f"--target {target}: m: expected iOS{version} or macOS"):
                settle(given, AppleSettings(target=target), "pipeline", "fp16")


def test_a_large_unet_is_cut_for_ios_alone() -> None:
    large = model(unet_weights=CHUNK_BYTES // 2)

    def chosen(layout: str, precision: str, **asked: Any) -> tuple[int, str]:
        settings = settle(large, AppleSettings(**asked), layout, precision)
        return settings["chunks"], settings["target"]

    assert chosen("components", "fp16") == (2, "iOS16")  # float16 crosses the cut
    assert chosen("components", "fp32") == (2, "iOS15")
    assert chosen("components", "fp16", chunks=1) == (1, "iOS15")
    assert chosen("components", "fp16", target="macOS14") == (1, "macOS14")
    assert chosen("components", "fp16", target="macOS14", chunks=2) == (2, "macOS14")
    assert chosen("pipeline", "fp16") == (1, "iOS15")
    with pytest.raises(UsageError, match="expected iOS16 or macOS13, or later, as float16 values go from"):
        chosen("components", "fp16", target="iOS15")
    below = model(unet_weights=CHUNK_BYTES // 2 - 1)
    assert settle(below, AppleSettings(), "components", "fp16")["chunks"] == 1


def test_what_nothing_can_take_is_refused() -> None:
    for asked, backends, layouts, said in (
        (
            AppleSettings("split-einsum"),
            ("onnx", "coreml"),
            ("pipeline",),
            "expected --to coreml alone, got onnx",
        ),
        (AppleSettings(target="iOS16"), ("onnx",), ("pipeline",), "expected --to coreml among the backends"),
        (AppleSettings(chunks=2), ("coreml",), ("pipeline",), "expected --graph components"),
        (AppleSettings(chunks=3), ("coreml",), ("components",), "--chunks 3: expected 1 or 2"),
    ):
        with pytest.raises(UsageError, match=said):
            asked.check(backends, layouts)
    for asked in (AppleSettings("original"), AppleSettings(target="iOS9")):
        with pytest.raises(UnknownNameError):
            asked.check(("coreml",), ("components",))
    AppleSettings("split-einsum", "macOS15", 2).check(("coreml",), ("pipeline", "components"))


def test_the_command_line_refuses_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundles"
    argv = ["export", str(tiny_checkpoint), "-o", str(out)]
    for more, said in (
        (["--to", "onnx", "--attention", "split-einsum"], "expected --to coreml alone"),
        (["--to", "onnx", "--target", "iOS17"], "expected --to coreml among the backends, got onnx"),
    ):
        assert main([*argv, *more]) == 2
        assert said in capsys.readouterr().err and not out.exists()
