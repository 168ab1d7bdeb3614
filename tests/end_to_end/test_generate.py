"""Exported bundles drawn by the command line, held against diffusers and transformers in eager PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.export import export_model
from edgeflow.pictures import read_facts

BUNDLES = ("onnx-pipeline-fp32", "onnx-components-fp32", "openvino-pipeline-fp32")
PROMPT, SEED = "red apple, twemoji style", 11


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles")
    checkpoint = Checkpoint.open(tiny_checkpoint)
    export_model(checkpoint, backends=["onnx"], layouts=["pipeline", "components"], out=out)
    export_model(checkpoint, backends=["openvino"], out=out)
    return out


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> np.ndarray:
    """One Euler step from t = 1000 through the untouched modules: pixels (H, W, 3), float, 0 to 255."""
    import torch
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(tiny_checkpoint / "text_encoder")
    unet = UNet2DConditionModel.from_pretrained(tiny_checkpoint / "unet")
    vae = AutoencoderTiny.from_pretrained(tiny_checkpoint / "vae")
    words = tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt").input_ids
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(SEED))
    with torch.no_grad():
        hidden = text_encoder(words).last_hidden_state
        latent = noise + unet(noise, torch.tensor([1000.0]), encoder_hidden_states=hidden).sample
        image = vae.decode(latent / vae.config.scaling_factor).sample
    return ((image / 2 + 0.5).clamp(0, 1) * 255)[0].permute(1, 2, 0).numpy()


def test_the_expected_picture_is_not_flat(expected: np.ndarray) -> None:
    assert expected.std() > 3 and len(np.unique(expected.round())) > 20


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_bundle_draws_the_picture_of_the_original_modules(
    bundles: Path, bundle: str, expected: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "apple.png"
    assert main(["generate", str(bundles / bundle), PROMPT, "--seed", str(SEED), "-o", str(out)]) == 0
    pixels = np.asarray(Image.open(out)).astype(float)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 0.51  # half a step is rounding, the rest 2e-5 of fp32 error


def test_the_checkpoint_itself_draws_it_too(
    tiny_checkpoint: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    out = tmp_path / "apple.png"
    assert main(["generate", str(tiny_checkpoint), PROMPT, "--seed", str(SEED), "-o", str(out)]) == 0
    assert np.abs(np.asarray(Image.open(out)) - expected).max() <= 0.5001
    facts = read_facts(out)
    assert (facts["prompt"], facts["seed"], facts["runtime"]) == (PROMPT, str(SEED), "torch")


def test_a_bundle_keeps_the_checkpoints_hash(
    bundles: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    for path in (tiny_checkpoint, *(bundles / name for name in BUNDLES)):
        assert main(["inspect", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        seen.append(facts["hash"] if path == tiny_checkpoint else facts["model"]["checkpoint_hash"])
    assert len(seen[0]) == 64 and set(seen) == {seen[0]}


def test_generating_from_an_exported_onnx_bundle_imports_no_torch(bundles: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(bundles / BUNDLES[0]), PROMPT, "-o", str(tmp_path / "a.png")]
    code = f"""
import sys
from edgeflow.cli import main
assert main({arguments!r}) == 0
heavy = {{"torch", "diffusers", "transformers", "onnx", "openvino", "coremltools"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "a.png").is_file()
