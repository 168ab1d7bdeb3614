"""The HTML pages in a real browser: they render, say nothing to the console, fetch nothing, and fit.

Chromium runs headless. A second page frames the first at the width of a phone and of a desk, in light and in
dark, and writes down what it sees.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeflow.bench import BenchReport, BenchRow, NamedRatio
from edgeflow.bench_machine import MatrixRate
from edgeflow.bench_page import Figures, bench_page
from edgeflow.measure_child import STAGES
from edgeflow.measure_statistics import Summary
from edgeflow.quality import Data
from edgeflow.verdict import Change, Close, Layer, VerdictReport, VerdictRow, VerdictSettings, WorstPicture
from edgeflow.verdict_page import Pictures, Sensitivity, amplified, verdict_page

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
LONG = "openvino-pipeline-fp16-of-a-model-with-a-very-long-name"
_FRAME = """<!doctype html><body style="margin:0">
<iframe src="page.html" style="border:0;width:WIDTHpx;height:900px"></iframe>
<pre id="said"></pre><script>
addEventListener("load", () => {
  const view = frames[0], page = view.document, style = view.getComputedStyle(page.body);
  const wide = [...page.querySelectorAll("main > *")].filter(
    (e) => e.getBoundingClientRect().right > view.innerWidth + 1).map((e) => e.className || e.tagName);
  document.getElementById("said").textContent = JSON.stringify({
    width: view.innerWidth, scroll: page.documentElement.scrollWidth, wide: wide,
    images: [...page.images].filter((i) => i.complete && i.naturalWidth > 0).length,
    plots: page.querySelectorAll("svg circle").length, rows: page.querySelectorAll("tbody tr").length,
    title: page.title, paper: style.backgroundColor, ink: style.color,
    fetched: view.performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).length,
  });
});
</script></body>"""


def a_page() -> str:
    """A page with all that a verdict can have: gates, speed, layers, sensitivities, hostile names."""
    rng = np.random.default_rng(0)
    count, prompts = 6, ["red <apple>, noto style", *(f"prompt {i} with many a word in it" for i in range(5))]
    model = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    drawn = [np.clip(model.astype(int) + k, 0, 255).astype(np.uint8) for k in (0, 3, 40)]
    figures = {"kid": 0.334, "fd": 90.42, "r_at_1": 0.667, "real_distance": 0.3416}

    def summary(v: float) -> dict[str, float]:
        return {"count": 5, "median": v, "p90": 1.1 * v, "low": 0.9 * v, "high": 1.2 * v}

    def row(name: str, mib: float, worse: float, db: float) -> VerdictRow:
        changes = {
            k: Change.of(worse, worse - 0.5, worse + 0.5, more_is_better=k == "r_at_1") for k in figures
        }
        close = {"psnr_worst_db": db, "psnr_median_db": db, "distance": 0.01, "fd_ratio": 1.01}
        against = [
            {"name": "fp16", "precision": "fp16", "value": 1.3, "low": 1.2, "high": 1.4, "verdict": "slower"}
        ]
        return VerdictRow(
            name=name, checkpoint="ab" * 32, kind="bundle", runtime="onnx", backend="onnxruntime 1.0",
            precision="w8 fp16", recipe={"name": "w8", "rules": [
                {"component": "unet", "pattern": "*", "scheme": "w8"}] * 14},
            bytes=int(mib * 2**20), graph_bytes=int(mib * 2**20),
            figures={k: v + worse for k, v in figures.items()},
            changes=changes, closeness={k: Close(v, v - 0.001, v) for k, v in close.items()},
            worst=tuple(WorstPicture(p, i, db, 0.01) for i, p in enumerate(prompts)),
            graphs=({"name": "pipeline", "file": "pipeline.onnx", "inputs": {"input_ids": "int32"},
                     "outputs": {"image": "float32"}},),
            layers=tuple(Layer("unet", f"down_blocks.{i}.conv1", 8, (4, 4), 40.0 - i) for i in range(20)),
            speed={"threads": 2, "launches": 3, "check": "", "first_picture_ms": summary(900),
                   "load_ms": summary(300), "warm_ms": summary(100), "peak_rss_mib": 200.0,
                   "peak_gpu_mib": None, "against": against},
        )  # fmt: skip

    base = row("emoji <b>", 26.4, 0.0, 40.0)
    base = VerdictRow(
        **{**vars(base), "changes": {}, "closeness": {}, "speed": None, "recipe": None, "layers": ()}
    )
    rows = (row("same", 23.3, 0.0, float("inf")), row(LONG, 11.9, 0.2, 40.4), row("w4", 7.3, 3.0, 16.7))
    report = VerdictReport(
        Data("set", "test", count, 0, 32), VerdictSettings(features="net"), base, rows, {"edgeflow": "0.1.0"},
        ("a note",), {"kid": "noise", "psnr": 38.0}, ("w4: gate psnr: expected at least 38 dB, got 16.7 dB",),
    )  # fmt: skip
    sensitivity = Sensitivity(
        "search.json", "drop", tuple((f"unet layer{i}", 1.0 / (i + 1)) for i in range(40))
    )
    return verdict_page(report, Pictures(range(count), model, model, drawn), [sensitivity])


def a_bench_page() -> str:
    """Three rows of made-up timings, two of them with a figure."""

    def row(name: str, ms: float) -> BenchRow:
        times = Summary(10, ms, 1.1 * ms, 0.9 * ms, 1.2 * ms)
        stages = dict.fromkeys(STAGES, ms)
        return BenchRow(
            name, name, "onnx", "cpu", "onnxruntime 1", "fp16", 2, 2**24, int(2**17 * ms), "equal", times, {},
            stages, times, times, 200.0, 56.0, None, (((ms,),),), times, {"unet": 4.0}, 40.0, 0.4, 20.0,
        )  # fmt: skip

    machine = {
        "processor": "a chip with a name that goes on and on, as processors' names do", "cpus": 2,
        "memory_gib": 8.0, "system": "Linux", "python": "3.11", "load": 0.1, "governor": None,
        "on_mains": None, "gpu": None,
    }  # fmt: skip
    rows = (row(LONG, 120.0), row("b", 90.0), row("c", 60.0))
    ratios = (NamedRatio("b", LONG, 0.75, 0.7, 0.8, "faster"),)
    report = BenchReport(machine, {}, rows, ratios, {"cpu": MatrixRate(100.0, "NumPy 2")}, {}, ("a note",))
    return bench_page(report, Figures("verdict.json", {LONG: 90.0, "b": 95.0}))


# --- without a browser -----------------------------------------------------------------------------------


def test_the_page_is_one_file_and_escapes_what_it_shows() -> None:
    page = a_page()
    assert "<script" not in page and "@import" not in page and "<b>, " not in page
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == [] and "url(" not in page
    assert "emoji &lt;b&gt;" in page and "red &lt;apple&gt;, noto style" in page
    words = (
        "gates failed",
        "inside the noise",
        "worse",
        "slower",
        "equal",
        "24 more",
        "4 more",
        "and 2 rules",
    )
    assert [word for word in words if word not in page] == []


def test_worst_prompts_come_first_and_differences_are_told_with_their_gain() -> None:
    reference = np.full((3, 8, 8), 100, np.uint8)
    shown, gain = amplified(reference, reference + 3)
    assert gain == 16 and shown.tolist() == np.full((3, 8, 8), 128 + 48).tolist()
    shown, gain = amplified(reference, reference - 100)
    assert gain == 1 and set(shown.flatten().tolist()) == {28}
    page = a_page()
    assert page.index("difference × 16") < page.index("difference × 2")


# --- in Chromium -----------------------------------------------------------------------------------------


def render(folder: Path, page: str, width: int, dark: bool) -> tuple[dict[str, object], str]:
    """What the page says of itself in a frame of ``width`` pixels, and Chromium's console."""
    page = page.replace(' loading="lazy"', "")  # the frame's load event then waits for every picture
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(_FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    done = chromium(folder, dark, width, "--allow-file-access-from-files", "--dump-dom", frame="frame.html")
    said = re.search(r'<pre id="said">(\{.*?\})</pre>', done.stdout, re.S)
    assert said, f"the page did not report on itself: {done.stderr[-2000:]}"
    return json.loads(html.unescape(said[1])), "\n".join(
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    )


def chromium(
    folder: Path, dark: bool, width: int, *more: str, frame: str
) -> subprocess.CompletedProcess[str]:
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    argv = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", scheme,
        f"--window-size={max(width, 600)},1000", "--hide-scrollbars", "--enable-logging=stderr",
        "--no-first-run", f"--user-data-dir={folder / 'profile'}", *more, (folder / frame).as_uri(),
    ]  # fmt: skip
    return subprocess.run(argv, capture_output=True, text=True, timeout=240)


@pytest.mark.slow  # starts a browser four times
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_renders_in_chromium(width: int, dark: bool, tmp_path: Path) -> None:
    found, console = render(tmp_path, a_page(), width, dark)
    assert console == ""
    assert found["width"] == found["scroll"] == width and found["wide"] == []
    assert found["images"] == 3 * 6 * 4 and found["plots"] == 8 and found["fetched"] == 0
    assert found["title"] == "What 3 models lost against emoji <b>" and found["rows"] == 4 + 3 + 4
    light = [sum(map(int, re.findall(r"\d+", str(found[key]))[:3])) for key in ("paper", "ink")]
    assert (light[0] < light[1]) == dark and abs(light[0] - light[1]) > 300


@pytest.mark.slow  # starts a browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_benchmarks_page_renders_in_chromium(width: int, tmp_path: Path) -> None:
    found, console = render(tmp_path, a_bench_page(), width, dark=True)
    assert console == "" and found["fetched"] == 0
    assert found["width"] == found["scroll"] == width and found["wide"] == []
    assert found["plots"] == 5 and found["rows"] == 3


@pytest.mark.slow  # starts a browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_dark_and_light_are_painted(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(a_page(), encoding="utf-8")
    paper = []
    for dark in (False, True):
        shot = tmp_path / f"{dark}.png"
        chromium(tmp_path, dark, 1280, f"--screenshot={shot}", frame="page.html")
        with Image.open(shot) as picture:
            assert picture.size == (1280, 1000)
            paper.append(float(np.asarray(picture.convert("L"))[:, :20].mean()))
    assert paper[0] > 200 and paper[1] < 60
