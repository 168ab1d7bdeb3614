"""The wheel: what is in it, and a picture drawn from it in a clean environment, without torch, elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.export import export_model

ROOT = Path(__file__).resolve().parents[2]
#: What a checkout gives to the build, and the package each folder becomes.
FOLDERS = {
    "edgeflow": "edgeflow",
    "training": "edgeflow/training",
    "exporters": "edgeflow/exporters",
    "runtimes": "edgeflow/runtimes",
}
PROMPT, SEED = "red apple, twemoji style", 3


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout stays as it is."""
    root = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    _run(root, sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist")
    (wheel,) = (root / "dist").glob("*.whl")
    return wheel


def _run(where: Path, *argv: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in ``where`` as a stranger would: without this environment's Python settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(argv, cwd=where, env=inherited, capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done


def test_the_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    built_from = wheel.parent.parent
    expected = {
        f"{package}/{path.relative_to(built_from / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (built_from / folder).rglob("*")
        if path.is_file()
    }
    assert packed == expected
    assert {"METADATA", "LICENSE", "entry_points.txt"} <= metadata


def test_a_clean_environment_draws_from_a_bundle_without_torch(
    wheel: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # here and there: equal sums need equal splits of the work
    exported = tmp_path / "exported"
    export_model(Checkpoint.open(tiny_checkpoint), backends=["onnx"], out=exported)
    bundle, here = exported / "onnx-pipeline-fp32", tmp_path / "here.png"
    assert main(["generate", str(bundle), PROMPT, "--seed", str(SEED), "-o", str(here)]) == 0

    venv.create(tmp_path / "clean", with_pip=True)
    bin = tmp_path / "clean" / ("Scripts" if os.name == "nt" else "bin")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = (bin / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    _run(elsewhere, *install, f"{wheel}[onnx]")
    pip_list = ("-m", "pip", "list", "--format", "json", "--disable-pip-version-check")
    listed = _run(elsewhere, bin / "python", *pip_list)
    installed = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert {"edgeflow", "onnxruntime"} <= installed
    assert installed.isdisjoint({"torch", "diffusers", "transformers", "onnx", "openvino", "coremltools"})
    where = _run(elsewhere, bin / "python", "-c", "import edgeflow.runtimes as r; print(r.__file__)").stdout
    assert str(tmp_path / "clean") in where

    # A name of its own on disk: nothing may lean on where the bundle was made.
    moved = shutil.copytree(bundle, elsewhere / "my bundle")
    shutil.rmtree(exported)
    edgeflow = bin / "edgeflow"
    draw = (edgeflow, "generate", moved.name, PROMPT, "--seed", str(SEED), "-o", "there.png")
    assert _run(elsewhere, *draw).stdout == "there.png\n"
    assert (elsewhere / "there.png").read_bytes() == here.read_bytes()

    report = json.loads(_run(elsewhere, edgeflow, "parity", moved.name, "--json").stdout)
    assert report["passed"] and "torch is not installed" in report["notes"][0]
    export = _run(elsewhere, edgeflow, "export", moved.name, "--to", "onnx", "-o", "out", expect=4)
    assert "pip install 'edgeflow[export]'" in export.stderr and export.stderr.count("\n") == 1
