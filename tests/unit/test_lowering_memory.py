"""A lowering leaves no weights behind: one process lowers a large model for several backends in turn."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
onnx_ir = pytest.importorskip("onnx_ir")

from edgeflow.components import ComponentSpec  # noqa: E402
from edgeflow.exporters.program import Program  # noqa: E402
from edgeflow.exporters.to_onnx import OnnxExporter  # noqa: E402
from edgeflow.spec import TensorSpec  # noqa: E402


def test_an_onnx_graph_leaves_no_weights(tmp_path: Path) -> None:
    module, example = torch.nn.Linear(512, 512).eval(), (torch.randn(1, 512),)
    with torch.no_grad():
        exported = torch.export.export(module, example)
    inside, outside = (TensorSpec(name, (1, 512), "float32", name) for name in ("latent", "image"))
    program = Program(ComponentSpec("decoder", (inside,), (outside,)), exported, module, example)
    OnnxExporter().lower(program, tmp_path, precision="fp16", layout="components")
    assert next(tmp_path.rglob("*.onnx")).stat().st_size > 512 * 512 * 2
    gc.collect()
    held = [o for o in gc.get_objects() if isinstance(o, onnx_ir.Tensor) and o.nbytes > 1 << 18]
    assert not held
