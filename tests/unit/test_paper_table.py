"""The paper's table: the arms are trained by what it says, finished ones are kept, seeds become one table."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeflow.cli import main
from edgeflow.cli.train import command as train_command
from edgeflow.errors import ConfigError, TrainingError, UsageError
from edgeflow.training import paper_report, paper_table
from edgeflow.training.config import resolve
from edgeflow.training.paper_stages import Plan, logged, run_stages, stages
from edgeflow.training.presets import PRESETS


def plan_of(out: Path, **changes: object) -> Plan:
    plan = Plan(Path("data"), Path("teacher"), out, 3, "emoji", "cuda", 1.5, 4, Path("pairs"))
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def parsed(arguments: tuple[str, ...]) -> dict[str, object]:
    """What ``edgeflow train`` makes of a stage's arguments."""
    return train_command.make_context("train", [*arguments, "-o", "x"]).params


def test_the_arms_have_matched_minutes_and_the_papers_objectives(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    found = {s.name: parsed(s.arguments) for s in stages(plan)}
    assert list(found) == ["reflow", "distilled", "direct", "small"]
    minutes = {name: p["minutes"] for name, p in found.items()}
    assert minutes["direct"] == minutes["reflow"] + minutes["distilled"] == 3.0
    assert minutes["small"] == 1.0
    assert {p["seed"] for p in found.values()} == {3} and {p["preset"] for p in found.values()} == {"emoji"}
    sources = {name: (p["stage"], str(p["source"])) for name, p in found.items()}
    reflow = str(tmp_path / "reflow")
    assert sources == {
        "reflow": ("reflow", "teacher"),
        "distilled": ("distill", reflow),
        "direct": ("distill", "teacher"),
        "small": ("distill", reflow),
    }
    settings = {
        name: resolve(PRESETS["emoji"][p["stage"]], None, p["overrides"], {}) for name, p in found.items()
    }
    assert {n: settings[n].target_steps for n in ("distilled", "direct", "small")} == {
        "distilled": 4, "direct": 0, "small": 4,
    }  # fmt: skip
    assert (settings["small"].student, settings["distilled"].student) == ("small", "same")
    # where steps end a run, they are matched as the minutes are
    steps = {name: p["steps"] for name, p in found.items()}
    assert steps["direct"] == steps["reflow"] + steps["distilled"]


def test_pairs_are_drawn_first_where_none_are_given(tmp_path: Path) -> None:
    first, reflow, *_ = stages(plan_of(tmp_path, pairs=None))
    assert first.name == "pairs" and parsed(first.arguments)["seed"] == 300_000_000
    assert parsed(reflow.arguments)["pairs"] == tmp_path / "pairs"


def test_settings_go_to_every_stage_and_unknown_ones_are_errors(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, overrides=("loop.steps=7",))
    found = {s.name: parsed(s.arguments) for s in stages(plan)}
    assert [found[n]["steps"] for n in ("reflow", "distilled", "direct", "small")] == [7, 7, 14, 7]
    with pytest.raises(ConfigError, match="nothing is not known"):
        stages(plan_of(tmp_path, overrides=("loop.nothing=1",)))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were started, in place of running them; the one called ``fails`` fails."""
    started: list[str] = []

    def run(argv: list[str], **kwargs: object) -> SimpleNamespace:
        name = Path(argv[-1]).name
        started.append(name)
        assert argv[1:4] == ["-m", "edgeflow.cli", "train"]
        return SimpleNamespace(
            returncode=int("--set" in argv and "loop.seed=13" in argv and name == "direct")
        )

    monkeypatch.setattr(subprocess, "run", run)
    return started


def test_finished_stages_are_kept(tmp_path: Path, ran: list[str]) -> None:
    broken = plan_of(tmp_path, overrides=("loop.seed=13",))
    with pytest.raises(TrainingError, match="direct: expected to finish, got exit code 1"):
        run_stages(broken, force=False)
    assert ran == ["reflow", "distilled", "direct"]
    ran.clear()
    with pytest.raises(TrainingError):
        run_stages(broken, force=False)
    assert ran == ["direct"]  # the others are done
    ran.clear()
    with pytest.raises(UsageError, match="finished with other settings"):
        run_stages(plan_of(tmp_path), force=False)
    assert ran == []
    run_stages(plan_of(tmp_path), force=True)
    assert ran == ["reflow", "distilled", "direct", "small"]
    ran.clear()
    run_stages(plan_of(tmp_path), force=False)
    assert ran == []


def test_a_resumed_logs_seconds_are_added_up(tmp_path: Path) -> None:
    lines = [{"step": 5, "seconds": 10.0}, {"step": 9, "seconds": 18.0}, {"step": 12, "seconds": 4.0}]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert logged(log) == (12, 22.0)
    assert logged(tmp_path / "none") == (0, 0.0)


def table_of(seed: int) -> dict[str, object]:
    """A table as the runner writes it, of one row whose figures follow from the seed."""
    figures = {"frechet": 10.0 + seed, "kid": 0.1, "precision": 0.5, "recall": 0.25, "r_at_1": 0.75}
    paths = {
        "num_paths": 8, "steps": 25, "transport": 40.0, "transport_per_coordinate": 0.5,
        "straightness": 4.0 + seed, "first_segment": 1.0, "straightness_share": 0.1,
    }  # fmt: skip
    row = {"label": "2-rectified flow", "run": "reflow", "steps": 25, "guidance": 0.0, "stages": ["reflow"]}
    model = {"unet_parameters": 2_000_000, "batch_size": 8, "forward_ms": 0.25}
    return {
        "schema": 1, "kind": "paper-table", "seed": seed,
        "settings": {"preset": "tiny", "minutes": 1.5, "target_steps": 4, "overrides": [], "num_paths": 8},
        "data": {"name": "set", "split": "test", "prompts": 8, "train_pictures": 48, "picture_size": 32},
        "quality": {"per_prompt": 2, "features": ["net"], "kid_subsets": 100, "kid_subset_size": 4},
        "versions": {"torch": "2.11", "diffusers": "0.42"},
        "machine": {"device": "cpu", "name": "a machine", "cpu": "1 thread"},
        "pairs": {"transport": 41.0}, "models": {"reflow": model},
        "stages": {"reflow": {"seconds": 90.0, "wall_seconds": 120.0, "steps": 10, "pictures": 80}},
        "floor": {k: v / 2 for k, v in figures.items() if k != "frechet"} | {"frechet": 5.0},
        "rows": [{**row, "minutes": 1.5, "figures": figures, "paths": paths}],
    }  # fmt: skip


def test_two_seeds_become_their_mean_and_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "table.json").write_text(json.dumps(table_of(seed)))
    folders = [str(tmp_path / "seed0"), str(tmp_path / "seed1")]
    assert main(["--combine", *folders, "-o", str(tmp_path / "both")], paper_table.command, "table") == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "both" / "table.md").read_text(encoding="utf-8")
    assert "| 2-rectified flow | 25 | 10.5 (10.0, 11.0) | 0.100 | 0.500 | 0.250 | 0.750 | 1.50 |" in text
    assert "| 2-rectified flow | 25 | 40.0 | 0.5000 | 4.5 (4.0, 5.0) | 1.0 | 0.1000 |" in text
    assert "| reflow | 1.50 | 2.00 | 10 | 0.00 | 2.00 | 0.250 |" in text
    assert "seeds 0, 1, on a machine" in text and "2 pictures for each of 8 captions" in text
    assert "1.5 minutes of reflow, 1.5 of distillation, 3 direct, 1 small student" in text
    combined = json.loads((tmp_path / "both" / "table.json").read_text(encoding="utf-8"))
    assert combined["rows"][0]["figures"]["frechet"] == {"mean": 10.5, "seeds": [10.0, 11.0]}
    assert main(["--combine", folders[0], "--json"], paper_table.command, "table") == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == [0]


def test_tables_that_are_not_of_a_kind_are_refused() -> None:
    first, other = table_of(0), copy.deepcopy(table_of(1))
    with pytest.raises(UsageError, match="different seeds"):
        paper_report.combine([first, table_of(0)])
    other["settings"]["minutes"] = 9  # type: ignore[index]
    with pytest.raises(UsageError, match="equal settings"):
        paper_report.combine([first, other])


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--seed", "1"], 2, "needs --data, --teacher, --out"),
        (["--combine"], 2, "expected the folders"),
        (["--combine", "nowhere"], 1, "expected a finished table"),
        (["folder"], 2, "--combine takes them"),
        (
            ["--data", "{tmp}", "--teacher", "{tiny}", "-o", "{tmp}/out"],
            2,
            "expected kind diffusion, got one-step",
        ),
        (["--data", "{tmp}", "--teacher", "nowhere", "-o", "{tmp}/out"], 2, "nowhere"),
        (
            ["--data", ".", "--teacher", "{tiny}", "-o", "{tmp}/out", "--preset", "huge"],
            2,
            "known: emoji, sd15, sd15-second, tiny",
        ),
    ],
)
def test_errors(
    argv: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [w.format(tmp=tmp_path, tiny=tiny_checkpoint) for w in argv]
    assert main(words, paper_table.command, "table") == code
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
