"""``edgeflow bench``: what it derives from timings, what it says of them, and the command as a whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeflow import bench
from edgeflow.bench import BenchReport, NamedRatio, ratios_of, row_of, with_work
from edgeflow.bench_flops import count_gflop
from edgeflow.bench_machine import MatrixRate, busy, gpu_used_mib, machine, matrix_rate
from edgeflow.bench_page import Figures, bench_page, read_quality
from edgeflow.bench_table import lines, sentence
from edgeflow.cli import main
from edgeflow.errors import DataError
from edgeflow.generate import open_model
from edgeflow.measure import Measured, Plan
from edgeflow.measure_child import STAGES
from edgeflow.measure_process import Configuration, Launch

# --- synthetic timings -----------------------------------------------------------------------------------


def a_measured(name: str, warm: float, spread: float = 0.0) -> Measured:
    """Three launches of two rounds; launch k takes ``warm`` · (1 + spread·(k − 1))."""
    launches = [
        Launch(
            stages=dict(zip(STAGES, (40.0, 300.0, 20.0, 600.0, 10.0, 130.0), strict=True)),
            rounds=((warm * (1 + spread * k),) * 2, (1.1 * warm * (1 + spread * k),) * 2),
            graphs_ms={"unet": (warm / 2,), "decoder": (warm / 4,)},
            peak_rss_mib=200.0 + k,
            rss_mib={"imported": 56.0, "ready": 180.0},
            peak_gpu_mib=None,
        )
        for k in (-1, 0, 1)
    ]
    return Measured(
        Configuration(f"/models/{name}", name=name), "onnx", "cpu", "onnxruntime 1", 2, 2**24, 2**23, "fp16",
        "reference.npz, 64.1 dB", tuple(launches),
    )  # fmt: skip


def a_report(**changes: object) -> BenchReport:
    measured = [a_measured("a", 100.0), a_measured("b", 150.0), a_measured("c", 101.0, 0.1)]
    facts = {
        "processor": "a chip", "cpus": 2, "memory_gib": 8.0, "system": "Linux", "python": "3.11",
        "load": 0.1, "governor": "powersave", "on_mains": False, "gpu": None,
    }  # fmt: skip
    rate = MatrixRate(200.0, "NumPy 2")
    rows = tuple(with_work(row_of(m), {"unet": 4.0, "decoder": 6.0}, rate) for m in measured)
    report = BenchReport(facts, {}, rows, ratios_of(measured), {"cpu": rate}, {}, ())
    return replace(report, **changes)  # type: ignore[arg-type]


def test_a_row_is_what_its_launches_say() -> None:
    row = a_report().rows[0]
    assert (row.warm_ms.count, row.warm_ms.median, row.warm_ms.low) == (12, pytest.approx(105), 100)
    assert row.first_picture_ms.median == 1100 and row.load_ms.median == 630
    assert (row.peak_rss_mib, row.imported_rss_mib, row.parts_ms["unet"].median) == (200, 56, 50)
    assert row.launches_ms[1] == ((100, 100), (pytest.approx(110), pytest.approx(110)))


def test_work_over_time_is_the_rate_and_its_share() -> None:
    row = a_report().rows[0]
    assert row.gflop_per_s == pytest.approx(10 / 0.105)
    assert row.share_of_matrix_rate == pytest.approx(10 / 0.105 / 200) and row.floor_ms == pytest.approx(50)
    assert with_work(replace(row, gflop={}, floor_ms=None), {}, MatrixRate(1.0, "")).floor_ms is None


def test_a_row_is_held_against_the_rate_of_what_it_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both devices in one run, as with ``--compare``: neither row is divided by the other's rate."""
    from edgeflow import bench_flops, bench_machine, generate

    asked = []

    def rate(threads: int, device: str) -> MatrixRate:
        asked.append((threads, device))
        return MatrixRate({"cpu": 100.0, "cuda": 100_000.0}[device], device)

    on_cpu, on_gpu = a_measured("a", 100.0), replace(a_measured("b", 1.0), device="cuda")
    monkeypatch.setattr(bench, "measure", lambda *a, **k: [on_cpu, on_gpu])
    monkeypatch.setattr(bench_machine, "matrix_rate", rate)
    model = SimpleNamespace(generation=SimpleNamespace(checkpoint_hash="0"))
    monkeypatch.setattr(generate, "open_model", lambda name: model)
    monkeypatch.setattr(bench_flops, "count_gflop", lambda model: ({"unet": 4.0}, None))
    report = bench.bench(bench.BenchRequest((), Plan()))
    assert asked == [(2, "cpu"), (2, "cuda")]
    assert [row.floor_ms for row in report.rows] == [pytest.approx(40), pytest.approx(0.04)]
    text = "\n".join(lines(report))
    assert "of the machine's matrix rate, which" in text and "of the GPU's matrix rate, which" in text
    assert "Matrix rate: 100 GFLOP/s (cpu)" in text and "Matrix rate: 100000 GFLOP/s (cuda)" in text


def test_a_winner_is_named_only_beyond_the_noise() -> None:
    slower, level = a_report().ratios
    assert (slower.verdict, slower.value) == ("slower", pytest.approx(1.5))
    assert sentence(slower) == "a is 1.50 times as fast as b (95 % interval 1.50 to 1.50)"
    assert level.verdict == "inside the noise" and "c and a: no winner" in sentence(level)
    faster = NamedRatio("x", "y", 0.5, 0.4, 0.625, "faster")
    assert sentence(faster) == "x is 2.00 times as fast as y (95 % interval 1.60 to 2.50)"


def test_the_text_says_every_figure() -> None:
    text = "\n".join(lines(a_report(notes=("a note",))))
    for said in (
        "Benchmark 2: b", "105.0 ms", "unet 50.0 · decoder 25.0 ms", "1100 ms", "session 600",
        "200 MiB (56 after imports)", "16.00 MiB (graphs and weights 8.00)",
        "10.00 GFLOP a picture, 95 GFLOP/s: 48 % of the machine's matrix rate, which would take 50.0 ms",
        "governor powersave, on battery", "Matrix rate: 200 GFLOP/s (NumPy 2)", "a note",
    ):  # fmt: skip
        assert said in text, said


def test_the_json_keeps_every_timing() -> None:
    raw = json.loads(a_report().to_json())
    assert (raw["schema"], raw["kind"]) == (2, "bench") and len(raw["rows"]) == 3
    assert raw["rows"][0]["launches_ms"][0][0] == [100.0, 100.0]
    assert (
        raw["ratios"][1]["verdict"] == "inside the noise" and raw["matrix_rates"]["cpu"]["gflop_per_s"] == 200
    )


# --- the machine and the arithmetic ----------------------------------------------------------------------


def test_the_machine_is_said_and_a_busy_one_is_warned_of() -> None:
    facts = machine()
    assert facts["cpus"] >= 1 and facts["system"] and facts["python"].count(".") == 2
    assert busy({"load": 0.2, "cpus": 2}) is None and busy({"load": None, "cpus": 2}) is None
    assert "load 3 on 2 CPUs" in str(busy({"load": 3.0, "cpus": 2}))


@pytest.mark.parametrize(("said", "used"), [("604 MiB\n17 MiB\n", 604.0), ("[N/A]\n", None), ("", None)])
def test_gpu_memory_in_use_is_what_the_driver_says_of_the_first(
    said: str, used: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_used_mib() is None  # no driver
    driver = tmp_path / "nvidia-smi"
    driver.write_text(
        f"#!{sys.executable}\nimport sys\nassert 'memory.used' in sys.argv[1]\nprint({said!r}, end='')\n"
    )
    driver.chmod(0o755)
    assert gpu_used_mib() == used


def test_the_matrix_rate_is_a_rate_of_this_machine() -> None:
    rate = matrix_rate(1)
    assert 0.5 < rate.gflop_per_s < 100_000 and "float32" in rate.by


def test_counted_arithmetic_is_that_of_the_layers(tiny_checkpoint: Path) -> None:
    """Two operations a multiply-add of every convolution and linear, and attention's two products."""
    import torch
    from torch import nn

    from edgeflow.components import load_components

    model = open_model(tiny_checkpoint)
    found, reason = count_gflop(model)
    assert reason is None and set(found) == {"text_encoder", "unet", "decoder"}
    for name, component in load_components(model).items():  # type: ignore[arg-type]
        if name == "pipeline":
            continue
        seen = []

        def convolution(layer: nn.Conv2d, args: object, out: torch.Tensor, seen: list[int] = seen) -> None:
            seen.append(2 * out.numel() * layer.weight[0].numel())

        def linear(layer: nn.Linear, args: object, out: torch.Tensor, seen: list[int] = seen) -> None:
            seen.append(2 * out.numel() * layer.in_features)

        hooks = [
            layer.register_forward_hook(convolution if isinstance(layer, nn.Conv2d) else linear)
            for layer in component.module.modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        ]
        with torch.no_grad():
            component.module(**component.example)
        for hook in hooks:
            hook.remove()
        layers = sum(seen) / 1e9
        assert layers <= found[name] * (1 + 1e-9)
        assert found[name] == pytest.approx(layers, rel=1e-9 if name == "decoder" else 0.25)


# --- the page --------------------------------------------------------------------------------------------


def test_figures_come_from_a_verdict_or_a_quality_report(tmp_path: Path) -> None:
    verdict, quality = tmp_path / "verdict.json", tmp_path / "quality.json"
    rows = [{"name": "x/a", "figures": {"fd": 90.5}}, {"name": "b", "figures": {"fd": 91}}]
    verdict.write_text(
        json.dumps({"kind": "verdict", "model": {"name": "m", "figures": {"fd": 88}}, "rows": rows})
    )
    quality.write_text(json.dumps({"kind": "quality", "rows": [{"model": "a", "figures": {"frechet": 3}}]}))
    found = read_quality(verdict)
    assert [found.of(n) for n in ("m", "b", "a", "z/b", "none")] == [88, 91, 90.5, 91, None]
    assert read_quality(quality).of("a") == 3
    for text in ("{}", "[]", "nonsense", json.dumps({"kind": "parity"})):
        verdict.write_text(text)
        with pytest.raises(DataError, match=r"expected a verdict\.json or quality\.json"):
            read_quality(verdict)


def test_the_page_holds_every_row_and_nothing_from_elsewhere() -> None:
    page = bench_page(a_report(), Figures("verdict.json", {"a": 90.0, "b": 95.0}))
    assert page.count("<svg") == 2 and page.count("<circle") == 5
    assert "no winner" in page and "Not in verdict.json: c." in page
    assert "http://" not in page and "https://" not in page and "<script" not in page
    hostile = replace(a_report().rows[0], name="<script>alert(1)</script>")
    assert "<script" not in bench_page(a_report(rows=(hostile,), ratios=()))


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_measures_compares_and_draws(
    make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    models = [str(make_bundle(name)) for name in ("one", "two")]
    out = tmp_path / "bench.html"
    argv = ["bench", *models, "--compare", "--launches", "2", "--runs", "2", "--cold", "1", "--threads", "1"]
    assert main([*argv, "--report", str(out), "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in raw["rows"]] == ["one", "two"]
    for row in raw["rows"]:
        assert row["cold_start_ms"]["count"] == 1 and row["cold_start_ms"]["median"] > 50
        assert row["gflop"] == {} and row["gflop_per_s"] is None
    assert [(r["a"], r["b"]) for r in raw["ratios"]] == [("two", "one")]
    assert any("arithmetic not counted: checkpoint absent" in note for note in raw["notes"])
    assert "<svg" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["nowhere"], 2, "nowhere"),
        (["{bundle}", "--compare"], 2, "two models or more"),
        (["{bundle}", "{bundle}", "--compare", "--launches", "1"], 2, "--launches of at least 2"),
        (["{bundle}", "--quality", "q.json"], 2, "expected --report FILE"),
        (["{bundle}", "--report", "{bundle}"], 2, "already exists"),
        (["{bundle}", "--runtime", "torch"], 2, "what fits: onnx"),
    ],
)
def test_errors(
    argv: list[str], code: int, said: str, make_bundle: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    bundle = make_bundle()
    assert main(["bench", *(word.format(bundle=bundle) for word in argv)]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and captured.err.count("\n") == 1


def test_a_checkpoint_is_timed_component_by_component(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["bench", str(tiny_checkpoint), "--launches", "1", "--runs", "1", "--threads", "1", "--json"]
    assert main(argv) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert set(row["parts_ms"]) == set(row["gflop"]) == {"text_encoder", "unet", "decoder"}
    assert (row["runtime"], row["check"]) == ("torch", "its own pictures") and row["cold_start_ms"] is None
    assert row["gflop_per_s"] == pytest.approx(sum(row["gflop"].values()) / row["warm_ms"]["median"] * 1000)
