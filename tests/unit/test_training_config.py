"""Presets, files and flags: what wins, and that every wrong key is named at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeflow.errors import ConfigError
from edgeflow.training.config import resolve, to_dict
from edgeflow.training.presets import PRESETS, STAGES


def test_flag_over_set_over_file_over_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("guidance = 2.0\n[loop]\nsteps = 7\nbatch_size = 3\nseed = 9\n")
    preset = PRESETS["tiny"]["teacher"]
    config = resolve(preset, file, ["loop.batch_size=4", "loop.steps=8"], {"loop.steps": 11})
    assert (config.guidance, config.loop.steps, config.loop.batch_size, config.loop.seed) == (2.0, 11, 4, 9)
    assert config.loop.learning_rate == preset.loop.learning_rate
    assert resolve(preset, None, ["shape.unet_channels=[32, 96]"], {}).shape.unet_channels == (32, 96)


def test_every_problem_is_named_at_once() -> None:
    wrong = ["loop.stepz=1", "loop.steps=many", "loop.bf16=1", "nonsense", "shape.text_heads=2.5"]
    with pytest.raises(ConfigError) as caught:
        resolve(PRESETS["tiny"]["teacher"], None, wrong, {})
    message = str(caught.value)
    for part in (
        "loop.stepz",
        "loop.steps: expected a whole number",
        "loop.bf16",
        "'nonsense'",
        "text_heads",
    ):
        assert part in message
    assert "\n" not in message


def test_a_file_that_is_not_toml_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps == 1")
    with pytest.raises(ConfigError, match="expected a TOML file"):
        resolve(PRESETS["tiny"]["teacher"], file, [], {})


def test_every_preset_has_every_stage_and_survives_json() -> None:
    for name, stages in PRESETS.items():
        assert set(stages) <= set(STAGES)
        assert tuple(stages) == STAGES or name not in ("tiny", "emoji")
        for config in stages.values():
            assert to_dict(config)
