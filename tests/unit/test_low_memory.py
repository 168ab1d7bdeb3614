"""One component at a time: loads are counted, pictures are the same, and peak memory keeps its bound."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.errors import UsageError
from edgeflow.generate import Generator
from edgeflow.low_memory import OneAtATime
from edgeflow.spec import COMPONENTS, PIPELINE


class Counting:
    """A runtime of one graph that knows how many of its kind are alive."""

    alive: ClassVar[weakref.WeakSet[Counting]] = weakref.WeakSet()

    def __init__(self, graph: str):
        self.graph = graph
        self.alive.add(self)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert graph == self.graph and len(self.alive) == 1
        return {"graph": graph}


def test_no_two_graphs_are_loaded_at_once() -> None:
    loaded: list[str] = []

    def load(graph: str) -> Any:
        assert not Counting.alive
        loaded.append(graph)
        return Counting(graph)

    runtime = OneAtATime("counting", load)
    for graph in (*COMPONENTS, *COMPONENTS):
        assert runtime.run(graph, {}) == {"graph": graph}
    assert loaded == [*COMPONENTS, *COMPONENTS] and not Counting.alive


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    from edgeflow.export import export_model

    out = tmp_path_factory.mktemp("low") / "bundles"
    asked = {"layouts": ["components"], "precisions": ["fp16"], "num_prompts": 1}
    export_model(Checkpoint.open(tiny_checkpoint), backends=["onnx", "openvino"], out=out, **asked)
    return out


def test_a_session_beside_others_leaves_them_the_cores(exported: Path) -> None:
    """Opened with the others or in turn, as parity opens it; a fused graph is alone."""
    from edgeflow.runtimes import onnx_runtime

    bundle = Bundle.open(exported / "onnx-components-fp16")
    key, path = "session.force_spinning_stop", bundle.root / bundle.graph("unet").file
    for beside in (bundle, bundle.only("unet")):
        options = onnx_runtime._options(beside, path, [onnx_runtime.CPU], frugal=False)
        assert options.get_session_config_entry(key) == "1"
    fused = replace(bundle, manifest=replace(bundle.manifest, layout=PIPELINE))
    options = onnx_runtime._options(fused, path, [onnx_runtime.CPU], frugal=False)
    with pytest.raises(RuntimeError, match=key):
        options.get_session_config_entry(key)


@pytest.mark.parametrize("runtime", ["torch", "onnx", "openvino"])
def test_the_picture_is_the_same(runtime: str, exported: Path, tiny_checkpoint: Path) -> None:
    source = tiny_checkpoint if runtime == "torch" else exported / f"{runtime}-components-fp16"
    whole = Generator.open(source).draw("red apple, noto style", 3)
    frugal = Generator.open(source, low_memory=True).draw("red apple, noto style", 3)
    assert whole.facts == frugal.facts
    difference = np.abs(whole.pixels.astype(int) - frugal.pixels.astype(int))
    assert difference.max() <= 1  # other kernels where weights are not laid out anew


@pytest.mark.parametrize("graph", COMPONENTS)
def test_openvino_in_pieces_gives_the_whole_graphs_values(exported: Path, graph: str) -> None:
    """However small the pieces, down to one weight each, every value is handed on as it is."""
    pytest.importorskip("openvino")
    from edgeflow.bundle import Bundle
    from edgeflow.runtimes.openvino_runtime import OpenVinoPieces, OpenVinoRuntime

    bundle = Bundle.open(exported / "openvino-components-fp16")
    spec = bundle.graph(graph)
    draw = np.random.default_rng(0)
    inputs: dict[str, Any] = {
        t.name: np.arange(t.shape[-1])[None] if t.name == "input_ids" else draw.standard_normal(t.shape)
        for t in spec.inputs
    }
    inputs = {n: a.astype("int32" if n == "input_ids" else "float32") for n, a in inputs.items()}
    if "timestep" in inputs:
        inputs["timestep"] = np.array([1000.0], np.float32)
    (whole,) = OpenVinoRuntime.load(bundle).run(graph, inputs).values()
    counts = []
    for largest in (1 << 17, 1 << 30):
        pieces = OpenVinoPieces(bundle, spec, largest)
        (found,) = pieces.run(graph, inputs).values()
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
        counts.append(len(pieces.pieces.pieces))
    assert counts[1] == 1 and (graph == "decoder" or counts[0] > 1)


def test_a_fused_bundle_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from edgeflow.export import export_model

    (path,) = export_model(Checkpoint.open(tiny_checkpoint), backends=["onnx"], out=tmp_path, num_prompts=1)
    with pytest.raises(UsageError, match="--graph components"):
        Generator.open(path, low_memory=True)
    assert main(["generate", str(path), "x", "--low-memory", "-o", str(tmp_path / "a.png")]) == 2
