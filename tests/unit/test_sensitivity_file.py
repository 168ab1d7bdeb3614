"""Layers' sensitivities read from what a search or a recipe wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeflow.errors import DataError
from edgeflow.sensitivity_file import find_sensitivity, read_sensitivity

LAYERS = [
    {"component": "unet", "layer": "conv_in", "scheme": "w4g32", "psnr_db": 20.0},
    {"component": "decoder", "layer": "conv_out", "scheme": "w4g32", "psnr_db": 45.0},
]


def test_a_list_is_found_at_any_depth_and_more_is_worse(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    path.write_text(json.dumps({"name": "mixed", "measured": {"steps": [1, {"layers": LAYERS}]}}))
    found = read_sensitivity(path)
    assert found.source == "search.json" and found.figure.startswith("PSNR, in dB below")
    assert found.layers == (("unet conv_in, w4g32", 25.0), ("decoder conv_out, w4g32", 0.0))
    drops = [{"component": "unet", "layer": "a", "drop": 0.5}]
    assert find_sensitivity(drops, "x") is not None
    assert find_sensitivity(drops, "x").layers == (("unet a", 0.5),)  # type: ignore[union-attr]


def test_a_search_with_an_error_a_scheme_shows_the_dearest() -> None:
    layers = [
        {"component": "unet", "layer": "a", "shape": [4, 4], "errors": {"w8": 1e-6, "w4g32": 2e-3}},
        {"component": "unet", "layer": "b", "shape": [4, 3], "errors": {"w8": 4e-6}},
    ]
    found = find_sensitivity({"schema": 1, "model": "emoji", "layers": layers}, "sensitivity.json")
    assert found is not None and found.layers == (("unet a, w4g32", 2e-3), ("unet b, w8", 4e-6))


@pytest.mark.parametrize("text", ["", "{}", '{"layers": [{"component": "unet", "layer": "a"}]}', "[1, 2]"])
def test_a_file_without_sensitivities_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"sensitivity: .*search\.json: expected"):
        read_sensitivity(path)
    assert find_sensitivity({"measured": {}}, "recipe") is None
