"""Exports that cannot be: each one sentence and the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from edgeflow import registry
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.errors import (
    BackendMissing,
    EdgeflowError,
    ExportError,
    OutputExistsError,
    UnknownNameError,
    UsageError,
)
from edgeflow.export import export_model, plan
from edgeflow.exporters.layouts import DIFFUSERS, graph_spec
from edgeflow.spec import GraphSpec


class Plain:
    """An exporter that writes the graph's name. ``trouble`` is raised on the second call."""

    backend: ClassVar[str] = "plain"
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    trouble: ClassVar[BaseException | None] = None
    content: ClassVar[str] = "first"
    calls: ClassVar[int] = 0

    def lower(self, program: Any, folder: Path, *, precision: str, layout: str) -> GraphSpec:
        spec = graph_spec(program.spec, layout, DIFFUSERS, ".txt")
        (folder / spec.file).write_text(self.content)
        type(self).calls += 1
        if self.trouble is not None and self.calls == 2:
            raise self.trouble
        return spec


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> type[Plain]:
    monkeypatch.setitem(registry.EXPORTERS, "plain", f"{__name__}:Plain")
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__(__name__))
    for name, value in (("trouble", None), ("content", "first"), ("calls", 0)):
        monkeypatch.setattr(Plain, name, value)
    return Plain


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


# --- before any work starts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"backends": ["onxx"]}, "exporter 'onxx' is not known; known: coreml, cuda, onnx, openvino"),
        ({"precisions": ["int3"]}, "precision 'int3' is not known; known: bf16, fp16, fp32"),
        ({"layouts": ["unet"]}, "graph layout 'unet' is not known; known: components, pipeline"),
        ({"picture": "png"}, "picture 'png' is not known; known: float32, uint8"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(given: dict[str, Any], sentence: str) -> None:
    asked: dict[str, Any] = {
        "backends": ["onnx"],
        "precisions": ["fp32"],
        "layouts": ["pipeline"],
        "picture": "float32",
    }
    with pytest.raises(UnknownNameError) as caught:
        plan(**{**asked, **given})
    assert str(caught.value) == sentence
    assert caught.value.exit_code == 2


def test_a_precision_that_the_backend_lacks(plain: type[Plain]) -> None:
    with pytest.raises(
        UsageError, match="backend plain: precision 'fp16' is not available; known: fp32"
    ) as error:
        plan(["plain"], ["fp32", "fp16"], ["pipeline"], "float32")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("backends", "layouts", "reason"),
    [
        (["onnx", "coreml"], ["pipeline"], "Core ML has no uint8"),
        (["onnx"], ["components"], "layout 'pipeline'"),
    ],
)
def test_a_byte_picture_where_there_is_none(backends: list[str], layouts: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        plan(backends, ["fp32"], layouts, "uint8")


def test_nothing_asked_for() -> None:
    with pytest.raises(UsageError, match="at least one"):
        plan([], ["fp32"], ["pipeline"], "float32")


def test_each_bundle_is_written_once(plain: type[Plain]) -> None:
    jobs = plan(["plain", "plain"], ["fp32", "fp32"], ["pipeline", "components", "pipeline"], "float32")
    assert [job.name for job in jobs] == ["plain-pipeline-fp32", "plain-components-fp32"]


@pytest.mark.parametrize(
    ("backend", "package"), [("onnx", "onnx"), ("openvino", "openvino"), ("coreml", "coremltools")]
)
def test_a_backend_that_is_not_installed(backend: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"edgeflow.exporters.to_{backend}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendMissing, match=r"pip install 'edgeflow\[export\]'") as caught:
        plan([backend], ["fp32"], ["pipeline"], "float32")
    assert caught.value.exit_code == 4 and package in str(caught.value)


@pytest.mark.parametrize("kind", ["diffusion", "rectified-flow"])
def test_a_many_step_model(kind: str, own_checkpoint: Path, tmp_path: Path, plain: type[Plain]) -> None:
    facts = json.loads((own_checkpoint / "edgeflow.json").read_text())
    (own_checkpoint / "edgeflow.json").write_text(json.dumps({**facts, "kind": kind, "steps": 25}))
    with pytest.raises(ExportError, match="expected a one-step model") as caught:
        export_model(Checkpoint.open(own_checkpoint), backends=["plain"], out=tmp_path / "out")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists(checkpoint: Checkpoint, tmp_path: Path, plain: type[Plain]) -> None:
    (tmp_path / "plain-components-fp32").mkdir()
    with pytest.raises(OutputExistsError, match="plain-components-fp32"):
        export_model(checkpoint, backends=["plain"], layouts=["pipeline", "components"], out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["plain-components-fp32"]
    assert plain.calls == 0


def test_a_place_that_cannot_be_written(checkpoint: Checkpoint, tmp_path: Path, plain: type[Plain]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EdgeflowError, match="expected a writable folder"):
        export_model(checkpoint, backends=["plain"], out=tmp_path / "file" / "out")
    assert plain.calls == 0 and (tmp_path / "file").read_text() == "x"


# --- while it works -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble", [KeyboardInterrupt(), RuntimeError("crash"), ExportError("no"), SystemExit(143)]
)
def test_an_export_that_stops_leaves_nothing(
    trouble: BaseException, checkpoint: Checkpoint, tmp_path: Path, plain: type[Plain]
) -> None:
    plain.trouble = trouble
    out = tmp_path / "deep" / "out"
    with pytest.raises(type(trouble)):
        export_model(checkpoint, backends=["plain"], layouts=["pipeline", "components"], out=out)
    assert plain.calls == 2
    assert list(tmp_path.iterdir()) == []


def test_a_forced_export_that_stops_leaves_the_old(
    checkpoint: Checkpoint, tmp_path: Path, plain: type[Plain]
) -> None:
    (path,) = export_model(checkpoint, backends=["plain"], out=tmp_path)
    plain.trouble, plain.content = KeyboardInterrupt(), "second"
    with pytest.raises(KeyboardInterrupt):
        export_model(checkpoint, backends=["plain"], out=tmp_path, force=True)
    assert Bundle.open(path) and (path / "pipeline.txt").read_text() == "first"
    plain.trouble = None
    export_model(checkpoint, backends=["plain"], out=tmp_path, force=True)
    assert (path / "pipeline.txt").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_bundle_of_an_outsiders_backend_opens(
    checkpoint: Checkpoint, tmp_path: Path, plain: type[Plain]
) -> None:
    paths = export_model(checkpoint, backends=["plain"], layouts=["pipeline", "components"], out=tmp_path)
    assert [p.name for p in paths] == ["plain-pipeline-fp32", "plain-components-fp32"]
    bundle = Bundle.open(paths[1])
    assert [g.file for g in bundle.manifest.graphs] == ["text_encoder.txt", "unet.txt", "vae_decoder.txt"]
    assert bundle.generation.checkpoint_hash == checkpoint.hash


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_says_it_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny_checkpoint), str(tmp_path / "out")
    for arguments, code, words in (
        ([model, "--to", "onxx", "-o", out], 2, "exporter 'onxx' is not known"),
        (["no-such-model", "--to", "onnx", "-o", out], 2, "no-such-model"),
        ([model, "-o", out], 2, "--to"),
        ([model, "--to", "coreml", "--picture", "uint8", "-o", out], 2, "Core ML has no uint8"),
    ):
        assert main(["export", *arguments]) == code
        printed = capsys.readouterr()
        assert printed.out == "" and words in printed.err
        assert len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_prints_bundles_as_json(
    checkpoint: Checkpoint, tmp_path: Path, plain: type[Plain], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--to", "plain", "--no-parity", "--json", "-o", str(tmp_path / "out")]
    assert main(["export", str(checkpoint.root), *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["parity"] is None
    (bundle,) = printed["bundles"]
    assert bundle["path"] == str(tmp_path / "out" / "plain-pipeline-fp32")
    assert bundle["size_mib"] > bundle["graphs_mib"] > 0
    shutil.rmtree(tmp_path / "out")
    assert main(["export", str(checkpoint.root), *arguments[:3], *arguments[4:]]) == 0
    assert "plain-pipeline-fp32" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(
    sent: signal.Signals, code: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "edgeflow.cli",
        "export",
        str(tiny_checkpoint),
        "--to",
        "onnx",
        "-o",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while (
        not (out.is_dir() and any(out.iterdir())) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert any(out.iterdir())  # it is at work: its hidden folder is there
    process.send_signal(sent)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert printed == "" and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
