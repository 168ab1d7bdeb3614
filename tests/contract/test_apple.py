"""The Neural Engine's layout as saved packages: one UNet whole and cut in two; the gate that must notice."""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from edgeflow import split_einsum
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.components import load_components
from edgeflow.errors import RuntimeFailure
from edgeflow.export import AppleSettings, export_model
from edgeflow.exporters.coreml_chunks import WEIGHTS, cut
from edgeflow.exporters.program import build_program
from edgeflow.exporters.to_coreml import CoreMLExporter
from edgeflow.generate import load_runtime
from edgeflow.parity import measure
from edgeflow.parity_report import FAIL, PASS, REWRITE, render
from edgeflow.runtimes.mil_interpreter import MilInterpreter
from edgeflow.runtimes.mil_reader import read_package

#: Core ML's specification versions, by system.
_VERSIONS = {"iOS15": 6, "iOS16": 7, "iOS17": 8, "iOS18": 9}


@pytest.fixture(scope="module")
def packages(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """precision → the split-einsum UNet as one package, as chunked bundles have it; converted once."""
    program = build_program(load_components(checkpoint, names=("unet",), attention="split-einsum")["unet"])
    targets = {"fp16": "iOS16", "fp32": "iOS15"}

    @functools.cache
    def package(precision: str) -> Path:
        folder = tmp_path_factory.mktemp(precision)
        exporter = CoreMLExporter(target=targets[precision])
        return folder / exporter.lower(program, folder, precision=precision, layout="components").file

    return package


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A whole bundle of components, its UNet in chunks."""
    settings = AppleSettings("split-einsum", chunks=2)
    (path,) = export_model(
        checkpoint,
        backends=["coreml"],
        precisions=["fp16"],
        layouts=["components"],
        apple=settings,
        num_prompts=1,
        out=tmp_path_factory.mktemp("chunked"),
    )
    return Bundle.open(path)


def hashes(package: Path) -> dict[str, str]:
    return {
        str(p.relative_to(package)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(package.rglob("*"))
        if p.is_file()
    }


def spec_of(package: Path) -> Any:
    import coremltools as ct

    return ct.models.utils.load_spec(str(package))


def test_the_layout_is_the_neural_engines(packages: Callable[[str], Path]) -> None:
    """Heads by einsum, linear layers as 1×1 convolutions; what is left is the time embedding's."""
    operations = read_package(packages("fp16")).operations
    counts = collections.Counter(op.type for op in operations)
    assert counts["einsum"] == counts["softmax"] * 2 and counts["softmax"] >= 8
    assert not counts["scaled_dot_product_attention"] and not counts["matmul"]
    ranks = {len(op.outputs[0].shape) for op in operations if op.type == "linear"}
    assert ranks == {2}


@pytest.mark.parametrize(
    "precision",
    ["fp16", pytest.param("fp32", marks=pytest.mark.slow)],  # another conversion
)
def test_chunks_are_the_whole_to_the_last_bit(
    precision: str, packages: Callable[[str], Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    whole = packages(precision)
    parts = [tmp_path / "UnetChunk1.mlpackage", tmp_path / "UnetChunk2.mlpackage"]
    cut(whole, *parts)
    example = load_components(checkpoint, names=("unet",))["unet"].example
    inputs = {name: value.numpy() for name, value in example.items()}
    expected = MilInterpreter.open(whole).run(inputs)
    first, second = (MilInterpreter.open(part) for part in parts)
    values = inputs | first.run({name: inputs[name] for name in first.inputs})
    got = second.run({name: values[name] for name in second.inputs})
    assert set(got) == set(expected) and all(np.array_equal(got[n], expected[n]) for n in got)
    assert not np.array_equal(got["noise_pred"], inputs["sample"])
    # Every operation that computes is in one of them alone.
    steps = [
        [o for o in read_package(p).operations if not o.type.startswith("const")] for p in (whole, *parts)
    ]
    assert [o.outputs for o in steps[0]] == [o.outputs for o in steps[1] + steps[2]]
    # About half of the weights each, and none twice but small ones that both take.
    sizes = [(p / WEIGHTS).stat().st_size for p in (whole, *parts)]
    assert sizes[0] <= sum(sizes[1:]) < 1.02 * sizes[0] and max(sizes[1:]) < 0.56 * sizes[0]
    again = [tmp_path / "again" / p.name for p in parts]
    cut(whole, *again)
    assert [hashes(p) for p in again] == [hashes(p) for p in parts]


def test_coremltools_itself_reads_the_chunks(packages: Callable[[str], Path], tmp_path: Path) -> None:
    """Its reader builds its own program from each, weights and all, with the types that are declared."""
    from coremltools.converters.mil.frontend.milproto import load as milproto

    parts = [tmp_path / "a.mlpackage", tmp_path / "b.mlpackage"]
    cut(packages("fp16"), *parts)
    descriptions = []
    for part in parts:
        spec = spec_of(part)
        program = milproto.load(spec, spec.specificationVersion, str((part / WEIGHTS).parent))
        function = program.functions["main"]
        assert set(function.inputs) == {v.name for v in spec.description.input}
        assert [v.name for v in function.outputs] == [v.name for v in spec.description.output]
        descriptions.append(spec.description)
    made = {v.name: v.type for v in descriptions[0].output}
    taken = {v.name: v.type for v in descriptions[1].input}
    assert made and all(taken[name] == kind for name, kind in made.items())
    assert set(taken) - set(made) <= {"sample", "timestep", "encoder_hidden_states"}


def test_a_chunked_bundle_draws_and_says_what_it_is(
    bundle: Bundle, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bundle.manifest.settings == {"attention": "split-einsum", "target": "iOS16", "chunks": 2}
    unet = bundle.graph("unet")
    assert unet.chunks == ("UnetChunk1.mlpackage", "UnetChunk2.mlpackage")  # Apple's package looks for them
    assert not (bundle.root / "Unet.mlpackage").exists()
    for name in ("TextEncoder.mlpackage", *unet.chunks, "VAEDecoder.mlpackage"):
        assert spec_of(bundle.root / name).specificationVersion == _VERSIONS["iOS16"]
    report = measure([bundle], against=checkpoint, num_prompts=1)
    assert report.passed, render(report)
    rewrite = [m for m in report.measurements if m.gap == REWRITE]
    assert {m.model for m in rewrite} == {f"{checkpoint.name}, split-einsum"}
    assert {m.component for m in rewrite} == {"text_encoder", "unet", "decoder", "pipeline"}
    capsys.readouterr()
    assert main(["inspect", str(bundle.root)]) == 0
    shown = capsys.readouterr().out
    for words in ("split-einsum", "iOS16", "UnetChunk1.mlpackage + UnetChunk2.mlpackage"):
        assert words in shown


def test_a_planted_error_fails_the_rewrites_own_gate(
    bundle: Bundle, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head's logits off by a hundredth: less than float16 would show, and the rewrite's gate sees it."""
    exact = split_einsum.attention

    def spoilt(q: Any, *others: Any) -> Any:
        return exact(q * 1.01, *others)

    monkeypatch.setattr(split_einsum, "attention", spoilt)
    report = measure([bundle], against=checkpoint, num_prompts=1)
    status = {(m.gap, m.component, m.metric): m.status for m in report.measurements}
    assert status[REWRITE, "unet", "sqnr_db"] == status[REWRITE, "text_encoder", "sqnr_db"] == FAIL
    assert status[REWRITE, "decoder", "sqnr_db"] == PASS  # the tiny decoder has no attention
    assert any(f"{checkpoint.name}, split-einsum: rewrite: unet: SQNR" in f for f in report.failures)


def test_a_chunk_that_does_not_fit_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """The second chunk alone twice: what it takes is neither an input nor made before."""
    from dataclasses import replace

    unet = bundle.graph("unet")
    graphs = (replace(unet, chunks=unet.chunks[1:] * 2),)
    with pytest.raises(RuntimeFailure, match="coreml"):
        load_runtime(replace(bundle, manifest=replace(bundle.manifest, graphs=graphs)))
