"""Measuring in processes of its own: what timings say, what a child reports, and what is refused."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgeflow import measure_process
from edgeflow.errors import EdgeflowError, RuntimeFailure
from edgeflow.generate import Generator
from edgeflow.measure import Plan, distinct_names, measure
from edgeflow.measure_child import STAGES
from edgeflow.measure_process import Configuration, Process, cold_starts
from edgeflow.measure_statistics import quantile, ratio, ratio_of_launches, summarize

# --- statistics on timings that are made up --------------------------------------------------------------


def launches(
    generator: random.Random, cost: float, *, between: float, within: float, drift: Sequence[float]
) -> list[list[list[float]]]:
    """Launches of rounds of timings: a cost, what a process and a run add to it, the machine's drift."""
    made = []
    for _ in range(4):
        process = math.exp(generator.gauss(0, between))
        made.append(
            [
                [cost * process * slow * math.exp(generator.gauss(0, within)) for _ in range(3)]
                for slow in drift
            ]
        )
    return made


def test_a_summary_is_numpys() -> None:
    values = [3.0, 1.0, 7.0, 5.0, 9.0, 2.0]
    found = summarize(values)
    assert (found.count, found.low, found.high) == (6, 1.0, 9.0)
    assert found.median == np.median(values) and found.p90 == pytest.approx(np.quantile(values, 0.9))
    assert quantile([4.0], 0.9) == 4.0


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_no_summary_of_nothing_or_of_what_is_not_finite(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite timings"):
        summarize(values)


def test_a_real_difference_is_found_and_its_interval_holds_it() -> None:
    generator, drift, held, found = random.Random(0), (1.0, 1.0, 1.4, 1.4, 2.0), 0, 0
    for _ in range(200):
        a, b = (launches(generator, c, between=0.01, within=0.05, drift=drift) for c in (120.0, 100.0))
        result = ratio(a, b)
        held += result.low <= 1.2 <= result.high
        found += result.verdict == "slower"
    assert held >= 180 and found >= 190


def test_no_winner_among_equals_although_their_processes_differ() -> None:
    """Processes that differ by 3 % and a machine that gets half as fast: a winner one time in twenty."""
    generator, winners, naive = random.Random(1), 0, 0
    for _ in range(300):
        a, b = (launches(generator, 100, between=0.03, within=0.01, drift=(1.0, 1.3, 2.0)) for _ in range(2))
        winners += ratio(a, b).verdict != "inside the noise"
        one = [[math.log(x / y) for x, y in zip(r, s, strict=True)] for r, s in zip(a[0], b[0], strict=True)]
        naive += ratio_of_launches([v for r in one for v in r]).verdict != "inside the noise"
    assert winners <= 30
    assert naive > 200  # taking runs of one process for independent ones would name a winner nearly always


def test_drift_that_hits_both_sides_cancels() -> None:
    drift = [1.0, 5.0, 0.2, 3.0]
    a = [[[80.0 * d] * 3 for d in drift]] * 3
    b = [[[100.0 * d] * 3 for d in drift]] * 3
    result = ratio(a, b)
    assert (result.value, result.verdict, result.launches) == (pytest.approx(0.8), "faster", 3)


def test_a_ratio_needs_two_launches_of_both() -> None:
    with pytest.raises(ValueError, match="two launches"):
        ratio([[[1.0]]], [[[1.0]]])
    with pytest.raises(ValueError, match="two launches"):
        ratio([[[1.0]]] * 2, [[[1.0]]] * 3)


@pytest.mark.parametrize("launches", [2, 3, 5, 21])
def test_the_interval_is_students(launches: int) -> None:
    """The t that the half width stands for holds 95 % of the t distribution of launches − 1 degrees."""
    logs = [0.1 + 0.01 * (-1) ** i for i in range(launches)]
    found = ratio_of_launches(logs)
    error = np.std(logs, ddof=1) / math.sqrt(launches)
    t, df = (math.log(found.high) - math.log(found.low)) / (2 * error), launches - 1
    x = np.linspace(-t, t, 400_001)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    assert np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x) == pytest.approx(0.95, abs=5e-4)


# --- processes -------------------------------------------------------------------------------------------


class _Drawn(Process):
    """A child that says it drew on ``device``, and held as much as torch says."""

    def __init__(self, device: str, torch_mib: float | None = None):
        super().__init__({}, Configuration("it"))
        ready = {"event": "ready", "device": device, "stages": {}, "rss_mib": {}}
        ended = {"event": "ended", "peak_rss_mib": 1.0, "peak_gpu_mib": torch_mib}
        self._lines = [json.dumps(event) for event in (ready, ended)]

    def command(self) -> list[str]:
        return [sys.executable, "-c", f"import sys\nfor line in {self._lines!r}: print(line, flush=True)"]


def test_gpu_memory_is_torchs_count_or_what_the_device_had_more_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taken(child: Process, *used: float | None) -> float | None:
        said = iter(used)
        monkeypatch.setattr(measure_process, "gpu_used_mib", lambda: next(said))
        with child:
            return child.end([], {}).peak_gpu_mib

    assert taken(_Drawn("cuda"), 600.0, 3100.0) == 2500
    assert taken(_Drawn("cuda", 2000.0), 600.0, 3100.0) == 2000
    assert taken(_Drawn("cuda"), None) is None  # no driver says
    assert taken(_Drawn("cpu"), 600.0) is None  # another's, whatever it is


def test_every_launch_has_its_stages_and_its_turns(make_bundle: Callable[..., Path]) -> None:
    models = [make_bundle("one"), make_bundle("two")]
    wanted = [Configuration(str(m), threads=1, prompt="red apple", seed=3) for m in models]
    measured = measure(wanted, Plan(launches=2, rounds=3, runs=2))
    assert [m.label for m in measured] == ["one", "two"]
    for subject in measured:
        assert (subject.runtime, subject.threads, subject.precision) == ("onnx", 1, "fp32")
        assert subject.backend.startswith("onnxruntime ") and subject.device == "cpu"
        for launch in subject.launches:
            assert set(launch.stages) == set(STAGES) and min(launch.stages.values()) >= 0
            assert launch.first_picture_ms == pytest.approx(sum(launch.stages.values()))
            assert [len(turn) for turn in launch.rounds] == [2, 2, 2] and min(launch.warm_ms) > 0
            assert len(launch.graphs_ms["pipeline"]) == 6
            assert max(launch.graphs_ms["pipeline"]) < max(launch.warm_ms)
            assert 10 < launch.rss_mib["imported"] <= launch.rss_mib["ready"] <= launch.peak_rss_mib
            assert launch.peak_gpu_mib is None
        assert len(subject.launches) == 2 and len(subject.warm_ms) == 12
    files = [p for p in models[0].rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert measured[0].bytes == sum(p.stat().st_size for p in files)
    assert measured[0].graph_bytes == (models[0] / "pipeline.onnx").stat().st_size


def test_the_child_draws_what_generate_draws(make_bundle: Callable[..., Path]) -> None:
    bundle = make_bundle()
    picture = Generator.open(bundle).draw("red apple", 5).pixels
    wanted = Configuration(str(bundle), prompt="red apple", seed=5, expected=picture)
    (found,) = measure([wanted], Plan(launches=1, rounds=1, runs=1))
    assert found.check == "the expected picture, equal"


def test_a_fast_wrong_picture_is_an_error_and_no_row(make_bundle: Callable[..., Path]) -> None:
    bundle = make_bundle()
    other = Generator.open(bundle).draw("red apple", 6).pixels
    wanted = Configuration(str(bundle), prompt="red apple", seed=5, expected=other)
    with pytest.raises(
        RuntimeFailure, match=r"expected the expected picture within 60 dB, got one .* dB away"
    ):
        measure([wanted], Plan(launches=1, rounds=1, runs=1))


def test_what_the_child_cannot_load_is_said_with_its_exit_code(make_bundle: Callable[..., Path]) -> None:
    bundle = make_bundle()
    job = {"model": str(bundle), "runtime": "openvino", "prompt": "a", "seed": 0, "repeat_psnr_db": 60}
    with (
        pytest.raises(EdgeflowError, match="what fits: onnx") as caught,
        Process(job, Configuration(str(bundle))),
    ):
        pass
    assert caught.value.exit_code == 2


def test_a_child_that_dies_is_an_error_with_its_last_words(make_bundle: Callable[..., Path]) -> None:
    job = {"model": str(make_bundle()), "runtime": None, "prompt": "a"}  # the seed is missing
    with pytest.raises(RuntimeFailure, match="code 1: KeyError: 'seed'"), Process(job, Configuration("it")):
        pass


def test_memory_is_the_childs_own_and_not_what_the_parent_held(make_bundle: Callable[..., Path]) -> None:
    ballast = np.ones(60_000_000)  # 458 MiB
    (found,) = measure([Configuration(str(make_bundle()), prompt="a")], Plan(launches=1, rounds=1, runs=1))
    assert found.launches[0].peak_rss_mib < 400 < ballast.nbytes / 2**20


def test_a_cold_start_is_generate_itself(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    (first,) = cold_starts(Configuration(str(make_bundle()), prompt="red apple"), 1)
    assert 50 < first < 60_000
    with pytest.raises(RuntimeFailure, match=r"edgeflow generate failed: error: .*nowhere"):
        list(cold_starts(Configuration(str(tmp_path / "nowhere"), prompt="red apple"), 1))


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [str(tmp_path / p) for p in ("a/m", "b/m", "b/n")]
    for place in places:
        Path(place).mkdir(parents=True)
    assert distinct_names([*places, "emoji"]) == ["a/m", "b/m", "n", "emoji"]
    assert distinct_names([*places, places[0]], ["x", "x", "y", "x"]) == ["a/m", "b/m", "y", "a/m"]
