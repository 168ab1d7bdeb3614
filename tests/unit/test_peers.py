"""Rows of the table beside the peers: what is measured, what cannot be had, and what the ratios say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeflow import peers
from edgeflow.clients_process import CLIENTS, ClientProcess, client_job
from edgeflow.errors import RuntimeFailure
from edgeflow.measure_process import Configuration, Launch, Process


def launch(*warm_s: float, peak: float = 100.0) -> Launch:
    stages = dict.fromkeys(("python", "import", "open", "session", "tokenizer", "first"), 500.0)
    return Launch(stages, (tuple(1000 * s for s in warm_s),), {}, peak, {"imported": 1.0, "ready": 2.0})


def row(title: str, peer: str | None, *launches: Launch, why: str = "") -> peers.Row:
    return peers.Row(title, "fp32", peer, why=why, psnr_db=60.0, launches=list(launches))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_compares_every_row_with_our_fastest() -> None:
    ours = row("ours", None, launch(1.0, 1.0), launch(2.0, 2.0))
    slow = row("ours too", None, launch(3.0, 3.0), launch(6.0, 6.0))
    peer = row("peer", "genai", launch(1.5, 1.5, peak=321.0), launch(3.0, 3.0))
    table = [cells(line) for line in peers.lines([slow, ours, peer])][2:]
    assert [line[4] for line in table] == ["3.00", "1.00", "1.50"]
    assert [line[5] for line in table] == ["3.00 to 3.00", "", "1.50 to 1.50"]
    assert table[2][2:4] == ["2.250", "1.500 … 3.000"] and table[2][6:] == ["3.00", "321", "60.0"]
    first = list(peers.lines([row("ours", None, launch(1.0)), row("peer", "sdcpp", launch())]))[-1]
    assert cells(first)[2:] == ["", "", "", "", "3.00", "100", "60.0"]  # a first picture alone
    lone = peers.lines([row("ours", None, launch(1.0)), row("peer", "genai", launch(2.0))])
    assert cells(list(lone)[-1])[4:6] == ["2.00", ""]  # one launch has no interval


def test_a_peer_that_cannot_be_had_is_a_row_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeFailure, match=r"OpenVINO GenAI: no environment .*make bench-peers has not made it"
    ):
        CLIENTS["genai"].python(tmp_path)
    (tmp_path / "sdcpp.log").write_text("Collecting\nERROR: no C++ compiler\nnotice: a new pip\n")
    with pytest.raises(RuntimeFailure, match="ERROR: no C\\+\\+ compiler"):
        CLIENTS["sdcpp"].python(tmp_path)
    table = list(peers.lines([row("peer", "genai", why="no compiler")]))
    assert cells(table[-1])[:3] == ["peer", "fp32", "no compiler"]


class _Drawn(Process):
    """A process that has drawn a given picture."""

    def __init__(self, picture: np.ndarray):
        self.ready, self._picture = {"backend": "fake 1"}, picture

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def picture(self) -> np.ndarray:
        return self._picture

    def order(self, what: str, count: int) -> dict:
        return {"latency_ms": [5.0] * count, "graphs_ms": {}}

    def end(self, turns, parts) -> Launch:
        return launch(*(ms / 1000 for turn in turns for ms in turn["latency_ms"]))


def test_a_wrong_picture_is_no_measurement() -> None:
    expected = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    asked = peers.Asked("m", ("fp32",), launches=2, runs=3, threads=1, seconds=60.0)
    right, wrong, small = (row(name, "genai") for name in ("right", "wrong", "small"))
    right.start = lambda: _Drawn(expected + 1)
    wrong.start = lambda: _Drawn(expected[::-1])
    small.start = lambda: _Drawn(expected[:4])
    peers.measure_rows([right, wrong, small], asked, expected, lambda step: None)
    assert (
        len(right.launches) == 2
        and right.warm_s == [0.005] * 6
        and right.psnr_db == pytest.approx(48.13, 1e-3)
    )
    assert wrong.why.startswith("wrong: drew another picture") and not wrong.launches
    assert small.why == "small: drew (4, 8, 3), expected (8, 8, 3)"


def test_a_row_is_held_against_its_own_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantized bundle, or one with another decoder, draws another picture than the model of the rows."""
    common, own = (np.full((8, 8, 3), value, np.uint8) for value in (10, 200))
    monkeypatch.setattr(peers, "picture_of", lambda bundle: {Path("tiny"): own}[bundle])
    asked = peers.Asked("m", ("fp32",), launches=1, runs=1, threads=1, seconds=60.0)
    tiny, wrong = (peers.Row(n, "w8 fp16", None, bundle=Path("tiny")) for n in ("tiny", "wrong"))
    tiny.start, wrong.start = (lambda: _Drawn(own)), (lambda: _Drawn(common))
    peers.measure_rows([tiny, wrong], asked, common, lambda step: None)
    assert len(tiny.launches) == 1 and not tiny.why
    assert wrong.why.startswith("wrong: drew another picture")


def test_a_peer_of_other_arithmetic_is_printed_and_not_gated() -> None:
    expected = np.full((8, 8, 3), 10, np.uint8)
    asked = peers.Asked("m", ("fp32",), launches=1, runs=1, threads=1, seconds=60.0)
    half = row("half", "sdcpp")
    half.start = lambda: _Drawn(expected + 40)
    peers.measure_rows([half], asked, expected, lambda step: None)
    assert cells(list(peers.lines([half]))[-1])[-1] == "16.1"


def test_no_launch_begins_when_the_time_is_over() -> None:
    asked = peers.Asked("m", ("fp32",), launches=2, runs=3, threads=1, seconds=-1.0)
    late = row("late", None)
    late.start = lambda: pytest.fail("it was started")
    peers.measure_rows([late], asked, np.zeros((8, 8, 3), np.uint8), lambda step: None)
    assert late.why == "not measured: the time was over"


def test_what_a_client_raises_is_told_in_one_sentence(
    make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    bundle = make_bundle(layout="components")
    job = client_job(CLIENTS["genai"], bundle, str(bundle), 1, 0, tmp_path)
    job["client"] = "genai" if not _has("openvino_genai") else pytest.skip("it is installed here")
    with (
        pytest.raises(RuntimeFailure, match="genai: ModuleNotFoundError: No module named 'openvino_genai'"),
        ClientProcess(Path(sys.executable), job, Configuration(str(bundle))),
    ):
        pass


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None
