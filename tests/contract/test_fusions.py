"""What runs as one operation, counted by each backend, against the modules that the graph was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.components import load_components
from edgeflow.fusions import fusions

for _package in ("onnx", "onnxruntime", "openvino", "coremltools"):
    pytest.importorskip(_package)


@pytest.fixture(scope="module")
def modules(checkpoint: Checkpoint) -> dict[str, int]:
    """Module class of the whole pipeline → how many."""
    found: dict[str, int] = {}
    for module in load_components(checkpoint, names=("pipeline",))["pipeline"].module.modules():
        name = type(module).__name__
        found[name] = found.get(name, 0) + 1
    return found


@pytest.mark.parametrize("backend", ["onnx", "openvino", "coreml"])
def test_norms_and_attentions_are_the_modules_own(
    backend: str, bundles: Callable[[str], Path], modules: dict[str, int]
) -> None:
    (found,) = (fusions(Bundle.open(bundles(backend) / f"{backend}-pipeline-fp32")) or {}).values()
    norms = modules["GroupNorm"] + modules["LayerNorm"]
    attentions = modules["Attention"] + modules["TextLayer"]
    assert norms > 20 and attentions > 5
    expected = {  # ONNX Runtime's CPU has no kernel for attention; Core ML takes group norms apart
        "onnx": (norms, 0),
        "openvino": (norms, attentions),
        "coreml": (modules["LayerNorm"], 0),  # one operation from iOS 18 on
    }[backend]
    assert (found.kinds["norm"], found.kinds["attention"]) == expected
    assert found.kinds["gelu, silu"] >= modules["GEGLU"] and found.fused
    if backend == "onnx":
        assert found.run < 1.2 * found.stored  # what has no kernel is taken apart, and then there are more


def test_onnx_group_norms_are_one_kernel_that_sums_in_float32(
    bundles: Callable[[str], Path], modules: dict[str, int]
) -> None:
    import onnx

    for precision in ("fp32", "fp16"):
        path = bundles("onnx") / f"onnx-pipeline-{precision}" / "pipeline" / "model.onnx"
        graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
        types = [node.op_type for node in graph.node]
        assert types.count("InstanceNormalization") == modules["GroupNorm"]
        assert "GroupNormalization" not in types
        kinds = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
        for node in graph.node:
            if node.op_type == "InstanceNormalization":
                assert kinds[node.output[0]] == onnx.TensorProto.FLOAT


def test_an_onnx_files_nodes_are_read_without_onnx(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    import onnx

    from edgeflow.runtimes.onnx_file import node_types

    path = bundles("onnx") / "onnx-pipeline-fp32" / "pipeline" / "model.onnx"
    assert list(node_types(path)) == [(n.domain, n.op_type) for n in onnx.load(path).graph.node]
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        list(node_types(cut))


def test_inspect_shows_them(bundles: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(bundles("onnx") / "onnx-components-fp32")
    assert main(["inspect", path, "--json"]) == 0
    operations = json.loads(capsys.readouterr().out)["operations"]
    assert set(operations) == {"text_encoder", "unet", "decoder"}
    assert operations["unet"]["kinds"]["norm"] > operations["text_encoder"]["kinds"]["norm"] > 0
    assert main(["inspect", path]) == 0
    assert "fused where they run" in capsys.readouterr().out
    assert main(["inspect", path, "--no-fused", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["operations"] is None
