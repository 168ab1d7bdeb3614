"""Pairs on disk: resumable, sharded by process, whole or not at all, as webdataset itself reads them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeflow.errors import DataError, OutputExistsError, UsageError
from edgeflow.training.pair_shards import Shard, list_shards, read_shard, shard_length, write_shard
from edgeflow.training.pairs import Pairs, PairsConfig, draw_pairs, read_prompts, start_pairs
from edgeflow.training.ranks import Ranks
from edgeflow.training.sampling import seeded_noise

CONFIG = PairsConfig(num_pairs=44, batch_size=4, shard_size=8, steps=1, seed=100)
SHAPE = (4, 8, 8)


class Drawer:
    """A teacher whose picture is half its noise, shifted by the caption's number."""

    captions = ("a red apple", "ein gelber Vogel – über dem See", "c" * 700)
    shape = SHAPE

    def __init__(self, config: PairsConfig = CONFIG, delay_s: float = 0.0):
        self.config, self.delay_s, self.teacher = config, delay_s, {"name": "half", "hash": "0"}
        self.drawn: list[int] = []

    def caption(self, number: int) -> str:
        return self.captions[number % 3]

    def draw(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.delay_s)
        self.drawn += numbers.tolist()
        noise = seeded_noise(numbers + self.config.seed, SHAPE)
        latent = (noise / 2 + (numbers % 3).view(-1, 1, 1, 1)).half()
        return latent, (latent.float() - noise).square().flatten(1).sum(1)

    def draw_sheet(self, path: Path, latents: torch.Tensor) -> None:
        path.write_bytes(b"sheet")


def draw(out: Path, config: PairsConfig = CONFIG, ranks: Ranks | None = None, resume: bool = False) -> Drawer:
    drawer = Drawer(config)
    start_pairs(out, config, drawer, force=False, resume=resume, ranks=ranks)  # type: ignore[arg-type]
    draw_pairs(config, drawer, out, ranks)  # type: ignore[arg-type]
    return drawer


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("pairs-*"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "whole"
    draw(out)
    return out


def test_webdataset_reads_the_shards_as_any_others(whole: Path) -> None:
    import webdataset

    urls = [str(p) for p in sorted(whole.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"{i:09d}" for i in range(44)]
    for i, sample in enumerate(samples):
        assert sample["json"] == {"caption": Drawer.captions[i % 3], "seed": 100 + i}
        expected = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(100 + i)) / 2 + i % 3
        assert sample["latent.npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["latent.npy"], expected.half().numpy())


def test_held_pairs_are_the_shards(whole: Path) -> None:
    pairs = Pairs.load(whole, torch.device("cpu"))
    assert pairs.noise.shape == pairs.latent.shape == (44, *SHAPE)
    for i in (0, 7, 43):
        noise = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(100 + i))
        assert torch.equal(pairs.noise[i], noise)
        assert torch.equal(pairs.latent[i], (noise / 2 + i % 3).half().float())
        assert pairs.captions[pairs.caption[i]] == Drawer.captions[i % 3]
    stored = np.concatenate([np.load(p) for p in sorted(whole.glob("*.distance.npy"))])
    expected = (pairs.latent - pairs.noise).square().flatten(1).sum(1).numpy()
    np.testing.assert_allclose(stored, expected, rtol=1e-5)


def test_large_sets_are_read_by_several_processes_in_order(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Pairs.load(whole, torch.device("cpu"))
    monkeypatch.setattr("edgeflow.training.pair_shards._MANY", 10)
    actual = Pairs.load(whole, torch.device("cpu"))
    assert torch.equal(actual.latent, expected.latent) and torch.equal(actual.caption, expected.caption)


@pytest.mark.parametrize("world", [2, 3, 9])
def test_several_processes_give_the_set_that_one_gives(whole: Path, tmp_path: Path, world: int) -> None:
    drawn = [draw(tmp_path / "out", ranks=Ranks(rank, world)).drawn for rank in range(world)]
    assert content(tmp_path / "out") == content(whole)
    assert sorted(n for numbers in drawn for n in numbers) == list(range(44)), (
        "a pair was drawn twice, or by nobody"
    )


def test_killed_pairs_go_on_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the run: what is there is whole, at most a shard's work is lost."""
    out = tmp_path / "out"
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        "spec = importlib.util.spec_from_file_location('here', sys.argv[1])\n"
        "here = importlib.util.module_from_spec(spec); spec.loader.exec_module(here)\n"
        "drawer = here.Drawer(delay_s=0.05); out = Path(sys.argv[2])\n"
        "here.start_pairs(out, here.CONFIG, drawer, force=False, resume=False)\n"
        "here.draw_pairs(here.CONFIG, drawer, out)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, __file__, str(out)])
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.tar"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = [p for p in sorted(out.glob("*.tar")) if shard_length(p) == len(read_shard(p))]
    assert 2 <= len(kept) < 6 and kept == sorted(out.glob("*.tar"))
    again = draw(out, resume=True).drawn
    assert again == list(range(8 * len(kept), 44)), "whole shards were drawn again"
    assert content(out) == content(whole)


def test_a_write_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    shard = Shard(np.arange(2), ["a", "b"], np.zeros((1, *SHAPE), np.float16))
    with pytest.raises(ValueError):
        write_shard(tmp_path / "pairs-00000.tar", 0, shard, np.zeros(2, np.float32))
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.partial"))
    assert shard_length(tmp_path / "pairs-00000.tar") == 0


def test_a_larger_set_draws_the_cut_short_shard_again(whole: Path, tmp_path: Path) -> None:
    small = PairsConfig(num_pairs=12, batch_size=4, shard_size=8, steps=1, seed=100)
    draw(tmp_path / "out", small)
    assert [shard_length(p) for p in list_shards(tmp_path / "out")] == [8, 4]
    draw(tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(whole)


def test_resuming_other_pairs_is_refused(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw(out)
    with pytest.raises(OutputExistsError):
        draw(out)
    for change in ({"seed": 1}, {"steps": 2}, {"shard_size": 16}):
        with pytest.raises(DataError, match=f"different: .*{next(iter(change))}"):
            draw(out, PairsConfig(**{**CONFIG.__dict__, **change}), resume=True)
    facts = json.loads((out / "pairs.json").read_text())
    (out / "pairs.json").write_text(json.dumps({**facts, "teacher": {"name": "x", "hash": "1"}}))
    with pytest.raises(DataError, match="different: teacher"):
        draw(out, resume=True)
    with pytest.raises(UsageError, match="expected one process, got 2"):
        start_pairs(out, CONFIG, Drawer(), force=True, resume=False, ranks=Ranks(0, 2))  # type: ignore[arg-type]


def test_a_broken_shard_is_named(whole: Path, tmp_path: Path) -> None:
    draw(tmp_path / "out")
    shard = tmp_path / "out" / "pairs-00001.tar"
    data = shard.read_bytes()
    for broken in (data[:1500], data[:9000], b"no tar" * 300, b""):
        shard.write_bytes(broken)
        with pytest.raises(DataError, match=r"pairs-00001\.tar: "):
            Pairs.load(tmp_path / "out", torch.device("cpu"))
    with pytest.raises(DataError, match=r"expected pairs\.json and shards"):
        Pairs.load(tmp_path, torch.device("cpu"))


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n\n  ein Vogel \n", encoding="utf-8")
    assert read_prompts(path) == ["a red apple", "ein Vogel"]
    path.write_text("\n \n")
    with pytest.raises(DataError, match="expected a caption a line, found none"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="expected a UTF-8 text file"):
        read_prompts(path)
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "none.txt")


def test_ranks_come_from_the_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(5, 8, 1)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(UsageError, match="expected 0 to WORLD_SIZE − 1 = 7, got 8"):
        Ranks.from_environment()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(UsageError, match="expected whole numbers"):
        Ranks.from_environment()
