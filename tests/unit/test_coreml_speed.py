"""coremltools made faster writes the same package, and keeps float32 what would overflow float16."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("coremltools")

from edgeflow.components import ComponentSpec  # noqa: E402
from edgeflow.exporters import to_coreml  # noqa: E402
from edgeflow.exporters.program import Program  # noqa: E402
from edgeflow.spec import TensorSpec  # noqa: E402


class Layers(torch.nn.Module):
    """A convolution, a norm and an attention, then a product with a number that float16 does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.GroupNorm(2, 8)
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("large", torch.full((1, 64, 1), 1e5))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(latent)).flatten(2).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(self.linear(x), x, x)
        return (y * self.large) * 1e-5 + x


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_package_is_the_same_byte_for_byte(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, example = Layers().eval(), (torch.randn(1, 4, 8, 8),)
    latent = TensorSpec("latent", (1, 4, 8, 8), "float32", "latent")
    image = TensorSpec("image", (1, 64, 8), "float32", "image")
    with torch.no_grad():
        exported = torch.export.export(module, example)
    program = Program(ComponentSpec("decoder", (latent,), (image,)), exported, module, example)
    written = []
    for place in ("fast", "plain"):
        (tmp_path / place).mkdir()
        to_coreml.CoreMLExporter().lower(program, tmp_path / place, precision=precision, layout="components")
        written.append({p.relative_to(tmp_path / place): p.read_bytes() for p in _files(tmp_path / place)})
        monkeypatch.setattr(to_coreml, "quickly", contextlib.nullcontext)
    assert len(written[0]) >= 3 and written[0] == written[1]
    model = to_coreml.ct.proto.Model_pb2.Model()
    model.ParseFromString(next(p for p in _files(tmp_path / "fast") if p.suffix == ".mlmodel").read_bytes())
    block = next(iter(model.mlProgram.functions["main"].block_specializations.values()))
    types = {o.outputs[0].type.tensorType.dataType for o in block.operations if o.type == "mul"}
    assert types == ({11} if precision == "fp32" else {10, 11})  # 10 is float16, 11 float32


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]
