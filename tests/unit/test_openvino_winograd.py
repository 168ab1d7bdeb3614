"""Convolutions in Winograd's form, in OpenVINO, against PyTorch's in float64."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ov = pytest.importorskip("openvino")

import openvino.opset13 as ops  # noqa: E402

from edgeflow.bundle import Bundle  # noqa: E402
from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.export import export_model  # noqa: E402
from edgeflow.runtimes import openvino_runtime  # noqa: E402
from edgeflow.runtimes.openvino_winograd import TILE, Room, matrices, use_winograd  # noqa: E402

SIZE, TAKEN, MADE = (12, 20), 6, 10
#: Taps, and pads before and after along each axis, as a decoder has them and as merged upsampling has.
FORMS = [(3, (1, 1), (1, 1)), (2, (0, 0), (0, 0)), (2, (1, 0), (0, 1)), (3, (2, 0), (0, 2))]


def widened(weight: Any) -> Any:
    """Weights as an fp16 bundle stores them."""
    return ops.convert(ops.constant(weight.numpy()), "f32")


def stored(
    taps: int, before: tuple[int, int], after: tuple[int, int], more: dict[str, Any] | None = None
) -> tuple[Any, Any, Any]:
    """A model of one convolution, its input and its weights (halves, as the model has them)."""
    torch.manual_seed(0)
    shape = [n + taps - 1 - b - a for n, b, a in zip(SIZE, before, after, strict=True)]
    x, weight = torch.randn(1, TAKEN, *shape), torch.randn(MADE, TAKEN, taps, taps).half()
    fed = ops.parameter(list(x.shape), np.float32)
    facts = {"strides": [1, 1], "pads_begin": list(before), "pads_end": list(after), "dilations": [1, 1]}
    made = ops.convolution(fed, widened(weight), **{**facts, **(more or {})})
    return ov.Model([ops.relu(made)], [fed]), x, weight


def run(model: Any, x: Any) -> Any:
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x.numpy()])[0]


def types(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


@pytest.mark.parametrize("taps", [2, 3])
def test_the_matrices_are_a_convolution(taps: int) -> None:
    rng = np.random.default_rng(0)
    a, g, b = matrices(taps)
    d, k = rng.standard_normal(TILE + taps - 1), rng.standard_normal(taps)
    np.testing.assert_allclose(a @ ((g @ k) * (b @ d)), np.correlate(d, k), atol=1e-12)
    assert len(g) == TILE + taps - 1  # as few products as there are inputs


@pytest.mark.parametrize(("taps", "before", "after"), FORMS)
def test_it_draws_what_the_convolution_draws(
    taps: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    model, x, weight = stored(taps, before, after)
    assert use_winograd(model, Room(), pixels=1, channels=1) == 1
    assert types(model).count("Convolution") == (TILE + taps - 1) ** 2
    padded = torch.nn.functional.pad(x.double(), (before[1], after[1], before[0], after[0]))
    expected = torch.relu(torch.nn.functional.conv2d(padded, weight.double())).numpy()
    found = run(model, x)
    assert found.shape == (1, MADE, *SIZE)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("form", "asked"),
    [
        ((3, (1, 1), (1, 1)), {"pixels": SIZE[0] * SIZE[1] + 1}),
        ((3, (1, 1), (1, 1)), {"channels": TAKEN + 1}),
        ((1, (0, 0), (0, 0)), {}),
        ((3, (2, 2), (2, 2), {"dilations": [2, 2]}), {}),
        ((3, (1, 1), (1, 1), {"strides": [2, 2]}), {}),
        ((3, (0, 1), (1, 0), {"pads_end": [2, 0]}), {}),  # 13 rows: not a multiple of a tile
    ],
)
def test_others_stay_as_they_are(form: Any, asked: dict[str, int]) -> None:
    model, _, _ = stored(*form)
    before = types(model)
    assert use_winograd(model, Room(), **{"pixels": 1, "channels": 1, **asked}) == 0
    assert types(model) == before


def test_a_room_keeps_what_it_holds_when_its_memory_is_given_back() -> None:
    room, array = Room(), np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    held = room.hold(array)
    before = resident_bytes()
    room.leave()
    assert resident_bytes() <= before - array.nbytes // 2
    np.testing.assert_array_equal(held, array)


def resident_bytes() -> int:
    """This process's memory, from the system's own account."""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("Linux tells what memory a process holds in /proc")
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_integer_weights_are_widened_as_the_model_says() -> None:
    torch.manual_seed(0)
    x, integers = torch.randn(1, TAKEN, *SIZE), torch.randint(-127, 128, (MADE, TAKEN, 3, 3))
    scale = torch.rand(MADE, 1, 1, 1) / 100
    fed = ops.parameter(list(x.shape), np.float32)
    weight = ops.multiply(
        ops.convert(ops.constant(integers.numpy().astype(np.int8)), "f32"), ops.constant(scale.numpy())
    )
    model = ov.Model([ops.convolution(fed, weight, [1, 1], [1, 1], [1, 1], [1, 1])], [fed])
    assert use_winograd(model, Room(), pixels=1, channels=1) == 1
    expected = torch.nn.functional.conv2d(x.double(), (integers * scale).double(), padding=1)
    np.testing.assert_allclose(run(model, x), expected.numpy(), atol=2e-4)


@pytest.mark.parametrize(("precision", "used"), [("fp16", True), ("fp32", False)])
def test_the_runtime_uses_it_in_fp16_bundles(
    precision: str, used: bool, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"precisions": [precision], "layouts": ["components"], "num_prompts": 1}
    (path,) = export_model(Checkpoint.open(tiny_checkpoint), backends=["openvino"], out=tmp_path, **asked)
    bundle, counts = Bundle.open(path), []

    def everywhere(model: Any, room: Room) -> int:
        counts.append(use_winograd(model, room, pixels=1, channels=8))
        return counts[-1]

    latent = {"latent": bundle.reference()["prompt0/decoder/latent"]}
    plain = openvino_runtime.OpenVinoRuntime.load(bundle).run("decoder", latent)["image"]
    monkeypatch.setattr(openvino_runtime, "use_winograd", everywhere)
    found = openvino_runtime.OpenVinoRuntime.load(bundle).run("decoder", latent)["image"]
    np.testing.assert_allclose(found, plain, atol=1e-4)
    fused = openvino_runtime.OpenVinoRuntime.operations(bundle, "decoder").fused
    assert (bool(sum(counts)), "Winograd" in fused) == (used, used)
