"""Pairs that are streamed: one shard at a time, every pair equally often, the same as if they were held."""

from __future__ import annotations

import dataclasses
import json
import logging
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeflow.errors import DataError
from edgeflow.training import pair_source
from edgeflow.training.config import LoopConfig
from edgeflow.training.loop import start_run, train
from edgeflow.training.models import Parts, load_parts
from edgeflow.training.pair_shards import Shard, shard_path, write_shard
from edgeflow.training.pair_source import HeldPairs, PairFolder, StreamedPairs, Turns, open_pairs
from edgeflow.training.pairs import Pairs
from edgeflow.training.parallel import Processes
from edgeflow.training.reflow import ReflowConfig, ReflowObjective
from edgeflow.training.sampling import seeded_noise

CPU, SHAPE = torch.device("cpu"), (4, 8, 8)
LENGTHS = (12, 12, 12, 12, 12, 4)


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path) -> Parts:
    return load_parts(tiny_checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pairs in six shards, the last a short one; pair i's latent is i/10 everywhere."""
    out, first = tmp_path_factory.mktemp("pairs"), 0
    for number, length in enumerate(LENGTHS):
        seeds = np.arange(first, first + length)
        latent = np.broadcast_to(seeds.reshape(-1, 1, 1, 1) / 10, (length, *SHAPE)).astype(np.float16)
        noise = seeded_noise(torch.from_numpy(seeds), SHAPE).numpy()
        distance = ((latent.astype(np.float32) - noise) ** 2).sum((1, 2, 3))
        captions = [f"caption {i % 7}" for i in seeds]
        write_shard(shard_path(out, number), first, Shard(seeds, captions, latent), distance)
        first += length
    facts = {"schema": 1, "latent_shape": list(SHAPE), "captions": {"count": 7, "sha256": ""}}
    (out / "pairs.json").write_text(json.dumps(facts))
    return out


def streamed(folder: Path, parts: Parts, batch: int = 4, keep: float = 1.0, **more: object) -> StreamedPairs:
    return StreamedPairs(folder, parts, CPU, batch_size=batch, keep=keep, seed=3, **more)  # type: ignore[arg-type]


def counted(stream: StreamedPairs, steps: int, batch: int = 4) -> np.ndarray:
    """How often each pair is drawn, over batches drawn as the objectives draw them."""
    counts = np.zeros(64, int)
    for done in range(steps):
        stream.prepare(done)
        index = torch.randint(len(stream.pairs.noise), (batch,))
        np.add.at(counts, stream.pairs.seed[index].numpy(), 1)
    return counts


def test_a_streamed_row_is_the_pair_that_is_held(folder: Path, parts: Parts) -> None:
    held, stream = HeldPairs(Pairs.load(folder, CPU), parts, CPU, 1.0), streamed(folder, parts)
    by_seed = {int(s): i for i, s in enumerate(held.pairs.seed)}
    for done in range(0, 32, 2):
        stream.prepare(done)
        for i in range(12):
            j = by_seed[int(stream.pairs.seed[i])]
            assert torch.equal(stream.pairs.noise[i], held.pairs.noise[j])
            assert torch.equal(stream.pairs.latent[i], held.pairs.latent[j])
            k = held.pairs.caption[j]
            assert stream.pairs.captions[stream.pairs.caption[i]] == held.pairs.captions[k]
            torch.testing.assert_close(stream.text[stream.pairs.caption[i]], held.text[k])


def test_every_pair_is_drawn_equally_often_held_or_streamed(folder: Path, parts: Parts) -> None:
    """χ² of the draws against the uniform distribution, for both sources; 63 degrees of freedom."""
    torch.manual_seed(0)
    expected = 20.0
    steps = int(64 * expected / 4)
    held = np.bincount(torch.randint(64, (4 * steps,)).numpy(), minlength=64)
    for counts in (held, counted(streamed(folder, parts), steps)):
        assert counts.sum() == 64 * expected
        assert ((counts - expected) ** 2 / expected).sum() < 110  # 99.98 % of uniform draws


def test_an_epoch_visits_every_shard_once_in_its_own_order() -> None:
    turns = Turns([12, 12, 12, 12, 12, 4], 0, 1, seed=3)
    epochs = [[turns.at(64 * e + i) for i in range(64)] for e in range(3)]
    for epoch in epochs:
        assert np.bincount(epoch).tolist() == list(LENGTHS)
        assert sum(a != b for a, b in pairwise(epoch)) == 5, "a shard was read twice"
    assert len({tuple(dict.fromkeys(e)) for e in epochs}) == 3
    assert turns.at(5) == epochs[0][5], "going back"
    assert [Turns([12, 12, 12, 12, 12, 4], 0, 1, seed=4).at(i) for i in range(64)] != epochs[0]


def test_processes_share_an_epoch_s_shards() -> None:
    ranks = [Turns([5] * 8, rank, 2, seed=1) for rank in range(2)]
    seen = [{t.at(i) for i in range(20)} for t in ranks]
    assert seen[0] | seen[1] == set(range(8)) and not seen[0] & seen[1]


def test_at_most_one_shard_is_in_memory(folder: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Shard]] = []
    most, read = 0, pair_source.read_shard

    def counting(path: Path) -> Shard:
        nonlocal most
        shard = read(path)
        alive.append(weakref.ref(shard))
        most = max(most, sum(r() is not None for r in alive))
        return shard

    monkeypatch.setattr(pair_source, "read_shard", counting)
    stream = streamed(folder, parts)
    memory = {t.data_ptr() for t in (stream.pairs.noise, stream.pairs.latent, stream.text)}
    counted(stream, 20)
    assert most == 1 and len(alive) > 5 and not any(r() for r in alive)
    assert memory == {t.data_ptr() for t in (stream.pairs.noise, stream.pairs.latent, stream.text)}
    assert stream.pairs.noise.shape == (12, *SHAPE)


def test_the_farthest_pairs_are_left_out_as_if_held(folder: Path, parts: Parts) -> None:
    held = set(Pairs.load(folder, CPU).nearest(0.6).seed.tolist())
    stream, seen = streamed(folder, parts, keep=0.6), set()
    for done in range(40):
        stream.prepare(done)
        seen |= set(stream.pairs.seed.tolist())
    assert seen == held and len(held) == 38


def test_the_limit_decides_and_the_log_says_so(
    folder: Path, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging.getLogger("edgeflow"), "propagate", True)
    with caplog.at_level(logging.INFO, "edgeflow"):
        assert isinstance(open_pairs(folder, tiny_checkpoint, CPU, 1.0), Pairs)
        assert isinstance(open_pairs(folder, tiny_checkpoint, CPU, 1e-5), PairFolder)
    held, kept_apart = dict.fromkeys(caplog.messages)  # heard twice where an earlier test left a handler
    assert "64 pairs of 6 shards are held" in held
    assert "are streamed, a shard at a time" in kept_apart and "pairs_gib = 1e-05" in kept_apart
    other = json.loads((folder / "pairs.json").read_text()) | {"latent_shape": [4, 16, 16]}
    write_shard(
        shard_path(tmp_path, 0),
        0,
        Shard(np.arange(1), ["a"], np.zeros((1, 4, 16, 16), np.float16)),
        np.ones(1),
    )
    (tmp_path / "pairs.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"expected latents of shape \(4, 8, 8\)"):
        open_pairs(tmp_path, tiny_checkpoint, CPU, 1.0)
    with pytest.raises(DataError, match="expected a shard for each of 7 processes, got 6"):
        streamed(folder, load_parts(tiny_checkpoint), processes=Processes(0, 7, CPU))


def test_a_streamed_run_resumes_to_the_same_bits(folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    loop = LoopConfig(steps=9, batch_size=4, learning_rate=1e-3, warmup_steps=2, log_every=3)

    def run(name: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        config = ReflowConfig(dataclasses.replace(loop, steps=steps), sample_steps=1, keep_nearest=1.0)
        objective = ReflowObjective(config, tiny_checkpoint, PairFolder(folder), CPU)
        if not resume:
            start_run(tmp_path / name, {}, resume=False)
        train(objective, config.loop, tmp_path / name, CPU, resume)
        return objective.trained.state_dict()

    whole = run("whole", 9)
    run("parts", 4)
    parts = run("parts", 9, resume=True)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
