"""Parity of a real bundle: what export measures, and a weight spoilt in the artifact that must be noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeflow.bundle import REFERENCE, Bundle, write_bundle_files
from edgeflow.cli import main


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    argv = ["export", str(tiny_checkpoint), "--to", "onnx", "--precision", "fp16", "--precision", "fp32"]
    assert main([*argv, "--no-parity", "-o", str(out)]) == 0
    return out


def measured(capsys: pytest.CaptureFixture[str], *argv: str, expect: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["parity", *argv, "--json"]) == expect
    return json.loads(capsys.readouterr().out)


def rows(report: dict[str, Any], bundle: str | None) -> dict[tuple[str, str], dict[str, Any]]:
    return {(m["gap"], m["metric"]): m for m in report["measurements"] if m["bundle"] == bundle}


def test_both_precisions_pass_and_fp32_is_closer(
    exported: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = sorted(map(str, exported.iterdir()))
    report = measured(capsys, *bundles, "--against", str(tiny_checkpoint))
    half, full = (rows(report, f"onnx-pipeline-{precision}") for precision in ("fp16", "fp32"))
    for key in (("lowering", "sqnr_db"), ("end_to_end", "psnr_db")):
        assert half[key]["status"] == full[key]["status"] == "pass"
        assert full[key]["worst"] > half[key]["worst"] + 20  # 13 bits of mantissa are 78 dB
        assert half[key]["gate"] < full[key]["gate"]
    assert {m["runtime"] for m in half.values()} == {"onnx"}
    assert "onnxruntime" in report["versions"]


def test_a_spoilt_weight_fails_lowering_and_the_picture_but_not_the_rewrite(
    exported: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx
    from onnx import numpy_helper

    root = Path(shutil.copytree(exported / "onnx-pipeline-fp32", tmp_path / "spoilt"))
    bundle = Bundle.open(root)
    path = root / bundle.graph("pipeline").file
    model = onnx.load(path)
    weights = [t for t in model.graph.initializer if len(t.dims) == 4]
    for tensor in weights:
        spoilt = numpy_helper.to_array(tensor) * np.float32(1.05)
        tensor.CopyFrom(numpy_helper.from_array(spoilt, tensor.name))
    onnx.save(model, path)
    (root / "manifest.json").unlink()
    write_bundle_files(root, bundle.manifest)  # its hashes are right: only measuring can tell

    report = measured(capsys, str(root), "--against", str(tiny_checkpoint), expect=3)
    assert {m["status"] for m in report["measurements"] if m["gap"] == "rewrite"} == {"pass"}
    assert rows(report, "spoilt")["lowering", "sqnr_db"]["status"] == "fail"
    assert weights and any(
        failure.startswith("spoilt: lowering: pipeline: SQNR") for failure in report["failures"]
    )
    own = measured(
        capsys, str(root), expect=3
    )  # and the bundle's own reference tells, without the checkpoint
    assert rows(own, "spoilt")["lowering", "sqnr_db"]["status"] == "fail"


def test_the_bundles_own_reference_gives_the_same_lowering(
    exported: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(exported / "onnx-pipeline-fp32")
    afresh = measured(capsys, bundle, "--against", str(tiny_checkpoint))
    own = measured(capsys, bundle)
    a, b = (rows(r, "onnx-pipeline-fp32")["lowering", "sqnr_db"] for r in (afresh, own))
    assert (a["against"], b["against"]) == ("checkpoint", REFERENCE)
    assert b["worst"] == pytest.approx(a["worst"], abs=3)  # threads split torch's sums as they like
    assert [m["status"] for m in own["measurements"] if m["gap"] == "rewrite"] == ["not measured"]


def test_export_measures_by_default(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundles"
    assert main(["export", str(tiny_checkpoint), "--to", "onnx", "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["parity"]
    assert report["passed"] and {m["gap"] for m in report["measurements"]} == {
        "rewrite",
        "lowering",
        "end_to_end",
    }
