"""The doctor's findings on made-up environments, and the plan's refusals on made-up machines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from edgeflow import export_plan
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.doctor import ERROR, LOWEST, NOTE, OK, WARNING, Finding, diagnose
from edgeflow.errors import EdgeflowError
from edgeflow.spec import COMPONENTS
from edgeflow.weights import StoredTensor

FINE = {**LOWEST, "accelerate": "1.15"}
del FINE["onnxruntime-gpu"]


def found(versions: dict[str, str], status: str) -> list[Finding]:
    return [f for f in diagnose(versions.get) if f.status == status]


def test_a_fine_environment_has_no_error() -> None:
    assert found(FINE, ERROR) == []


@pytest.mark.parametrize(
    ("changes", "status", "subject", "remedy"),
    [
        ({"onnxruntime-gpu": "1.31"}, ERROR, "onnxruntime", "pip uninstall"),
        ({"transformers": "4.57"}, ERROR, "transformers", "transformers>=5.0"),
        ({"torch": "2.13.0+cpu"}, NOTE, "coremltools", "nothing"),
        (
            {"optimum-intel": "2.2.0", "transformers": "5.23"},
            WARNING,
            "optimum-intel",
            "environment of its own",
        ),
    ],
)
def test_versions_that_break(changes: dict[str, str], status: str, subject: str, remedy: str) -> None:
    (one,) = [f for f in found({**FINE, **changes}, status) if f.subject == subject]
    assert remedy in one.remedy


def test_a_missing_backend_names_its_extra() -> None:
    without = {k: v for k, v in FINE.items() if k != "openvino"}
    (one,) = [f for f in found(without, NOTE) if f.subject == "openvino (run)"]
    assert one.remedy == "pip install 'edgeflow[openvino]'"


def test_every_finding_that_is_not_fine_has_a_remedy() -> None:
    for versions in (FINE, {}, {"torch": "2.0", "onnxruntime": "1.0"}):
        assert all(f.remedy for f in diagnose(versions.get) if f.status != OK)


def test_the_lowest_versions_are_the_projects() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name, lowest in LOWEST.items():
        assert f'"{name}>={lowest}"' in text


def test_doctor_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) in (0, 1)
    assert {f["status"] for f in json.loads(capsys.readouterr().out)["findings"]} <= {
        OK,
        NOTE,
        WARNING,
        ERROR,
    }


# --- the plan -------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tiny_checkpoint: Path, tmp_path: Path) -> export_plan.ExportPlan:
    jobs = [("onnx", "fp16", ("pipeline",)), ("onnx", "fp32", ("text_encoder", "unet", "decoder"))]
    return export_plan.plan_export(
        Checkpoint.open(tiny_checkpoint), jobs, tmp_path / "a" / "b", num_prompts=1, parity=True
    )


def test_planned_bytes_are_the_weights_own(plan: export_plan.ExportPlan, tiny_checkpoint: Path) -> None:
    halves, *wholes = [step.disk for step in plan.steps if step.disk]
    assert sum(wholes) == 2 * halves
    checkpoint = Checkpoint.open(tiny_checkpoint)
    encoder = sum(t.numel for n, t in checkpoint.stored_tensors("vae").items() if n.startswith("encoder."))
    assert halves == 2 * (sum(plan.parts.values()) - encoder)


def test_a_plan_that_cannot_fit_is_refused(plan: export_plan.ExportPlan) -> None:
    plan.check()
    with pytest.raises(EdgeflowError, match="free disk"):
        dataclasses.replace(plan, disk_free=plan.disk - 1).check()
    short = dataclasses.replace(plan, memory_available=1 << 20)
    short.check()  # a small model's estimate is no reason to refuse
    with pytest.raises(EdgeflowError, match="free memory"):
        dataclasses.replace(short, isolated=True).check()


class FullSize:
    """As much of a Stable Diffusion 1.5 checkpoint as a plan reads: its sizes, without its weights."""

    name = "sd15"
    parts = ("text_encoder", "tokenizer", "unet", "vae")
    parameters: ClassVar = {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    generation = SimpleNamespace(picture_size=512, latent_shape=(4, 64, 64))

    def num_parameters(self, part: str) -> int:
        return self.parameters[part]

    def class_name(self, part: str) -> str:
        return {"vae": "AutoencoderKL"}.get(part, part)

    def stored_tensors(self, part: str) -> dict[str, StoredTensor]:
        share = 49_490_199 if part == "vae" else self.parameters[part]
        return {"decoder.weight": StoredTensor("F16", (share,), 0, 2 * share)}


def planned(precision: str, graphs: tuple[str, ...]) -> export_plan.ExportPlan:
    jobs = [(backend, precision, graphs) for backend in ("onnx", "openvino", "coreml")]
    checkpoint: Any = FullSize()
    return export_plan.plan_export(checkpoint, jobs, Path(), num_prompts=1, parity=True)


def test_parity_of_large_components_is_planned_one_at_a_time() -> None:
    assert planned("fp32", COMPONENTS).steps[-1].memory == planned("fp32", ("unet",)).steps[-1].memory


@pytest.mark.parametrize(("graphs", "gib"), [(COMPONENTS, 7.44), (("pipeline",), 8.83)])
def test_planned_memory_is_what_was_seen_at_full_size(graphs: tuple[str, ...], gib: float) -> None:
    """docs/full-size.md: the most that exporting to three backends took, over all precisions."""
    assert gib <= planned("fp32", graphs).memory / export_plan.GIB <= 1.2 * gib


def test_parity_of_small_components_is_planned_all_at_once(plan: export_plan.ExportPlan) -> None:
    fused, components = (step.memory for step in plan.steps if step.what.startswith("parity of"))
    assert components == pytest.approx(fused)  # the same weights and one picture


def test_dry_run_writes_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    asked = ["export", str(tiny_checkpoint), "--to", "onnx", "--dry-run", "-o", str(tmp_path / "out")]
    assert main(asked) == 0
    assert "onnx fp32: pipeline" in capsys.readouterr().out
    monkeypatch.setattr(export_plan, "free_disk_bytes", lambda path: 10)
    assert main([*asked, "--json"]) == 1
    assert "free disk" in json.loads(capsys.readouterr().out)["obstacle"]
    assert main([a for a in asked if a != "--dry-run"]) == 1
    assert not (tmp_path / "out").exists()
