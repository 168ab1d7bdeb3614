"""The full-size table: steps and memory of a watched tree, pieces that go on where they stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgeflow.bundle import FileEntry, Manifest
from edgeflow.measure_tree import watch
from edgeflow.spec import GraphSpec
from edgeflow.training import full_size_table as table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

#: Says two steps; in the second a child of the command holds 96 MiB.
TREE = """
import subprocess, sys, time
print("step: one", file=sys.stderr, flush=True)
time.sleep(0.3)
print("step: two", file=sys.stderr, flush=True)
subprocess.run([sys.executable, "-c", "import time; x = bytearray(96 << 20); time.sleep(0.6)"])
raise SystemExit(3)
"""


def test_steps_have_their_own_seconds_and_peaks() -> None:
    report = watch([sys.executable, "-c", TREE], 0.02, step="step:")
    assert report["exit_code"] == 3 and report["processes"] == 2
    before, one, two = report["steps"]
    assert (before["what"], one["what"], two["what"]) == ("", "one", "two")
    assert one["seconds"] >= 0.2 and two["seconds"] >= 0.5
    assert two["peak_mib"] > one["peak_mib"] + 90
    assert report["peak_rss_mib"] == two["peak_mib"]


#: Stands for edgeflow: exports write a manifest, and fail where the folder ``broken`` is there.
EDGEFLOW = """
import json, pathlib, sys
verb, source, *rest = sys.argv[1:]
out = pathlib.Path(rest[rest.index("-o") + 1])
pathlib.Path("calls").open("a").write(verb + " ")
if pathlib.Path("broken").exists():
    raise SystemExit(1)
if verb == "export":
    (out / "onnx-pipeline-fp16").mkdir(parents=True)
    (out / "onnx-pipeline-fp16" / "manifest.json").write_text(pathlib.Path("manifest").read_text())
    rows = [("lowering", "pipeline", 61.234), ("end_to_end", "pipeline", "inf"), ("rewrite", "unet", 99.0)]
    names = ("gap", "component", "worst")
    rows = [dict(zip(names, r), bundle="onnx-pipeline-fp16", reason=None) for r in rows]
    print("debug: step: onnx-pipeline-fp16: pipeline", file=sys.stderr, flush=True)
    facts = {"backend": "onnx", "graphs_mib": 2048.4}
    parity = {"passed": True, "failures": [], "measurements": rows}
    print(json.dumps({"bundles": [facts], "parity": parity}))
else:
    print(json.dumps({"pictures": [{"latency_ms": 12345.0}]}))
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for rows; the commands are EDGEFLOW's, and ``calls`` beside it says which ran."""
    monkeypatch.chdir(tmp_path)
    graph = GraphSpec("pipeline", "pipeline/model.onnx", (), ())
    files = {"pipeline/model.onnx": FileEntry("", 7), "pipeline/model.onnx.data": FileEntry("", 1 << 31)}
    model = {"origin": "", "name": "m", "checkpoint_hash": "", "licence": "", "max_tokens": 1}
    model |= {"latent_shape": [1, 1, 1], "latent_scale": 1, "picture_size": 8, "steps": 1, "timestep": 1.0}
    manifest = Manifest("onnx", "fp16", "pipeline", model | {"prompts": []}, None, (graph,), files, {})
    Path("manifest").write_text(manifest.to_json())
    Path("fake.py").write_text(EDGEFLOW)
    real = table.Table.__init__

    def init(self: table.Table, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        self.commands = [sys.executable, str(tmp_path / "fake.py")]

    monkeypatch.setattr(table.Table, "__init__", init)
    return tmp_path / "rows"


def test_a_table_goes_on_where_it_stopped(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["model", "-o", str(rows), "--to", "onnx", "--only", "fp16-pipeline*"]
    Path("broken").mkdir()
    assert table.main(asked) == 1
    assert Path("calls").read_text() == "export "  # a picture of a bundle that is not there is not tried
    assert not list(rows.glob("*.json"))
    Path("broken").rmdir()
    assert table.main([*asked[:-1], "fp16-pipeline.export"]) == 0
    assert table.main(asked) == 0
    assert Path("calls").read_text() == "export export generate "
    assert not (rows / "bundles" / "fp16-pipeline").exists()
    said = capsys.readouterr().out
    assert "| fp16-pipeline onnx | 2048 |" in said and "| 61.2 | inf |" in said
    assert "| fp16-pipeline onnx | 12.3 |" in said


def test_low_memory_is_held_against_the_largest_graph(rows: Path) -> None:
    rows.mkdir()
    (rows / "manifest.json").write_text(Path("manifest").read_text())
    assert table.largest_graph(rows) == (1 << 31) + 7
    picture = {"wall_s": 1, "peak_rss_mib": 1024, "load_before": [0], "largest_graph_bytes": 1 << 31}
    row = picture | {"said": {"pictures": [{"latency_ms": 1000}]}}
    name = "fp16-components.onnx-low-memory"
    text = table.render(
        {name: json.loads(json.dumps(row))}, [table.Group("", "fp16", "components")], ["onnx"]
    )
    assert "| fp16-components onnx --low-memory | 1.0 | 1.0 | 1.00 | 3.50 | 0.0 |" in text
