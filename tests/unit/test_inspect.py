"""inspect, held against safetensors, hashlib and the files themselves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeflow.cli import main
from edgeflow.cli.inspect import size
from edgeflow.inspect import describe


def test_a_checkpoint_is_described_part_by_part(tiny_checkpoint: Path) -> None:
    from safetensors.torch import load_file

    facts = describe(tiny_checkpoint)
    assert (facts["what"], facts["kind"], facts["steps"], facts["runtime"]) == (
        "checkpoint",
        "one-step",
        1,
        "torch",
    )
    assert (facts["licence"], facts["picture_size"], facts["latent_shape"]) == ("Apache-2.0", 32, [4, 8, 8])
    parts = {part["name"]: part for part in facts["parts"]}
    assert parts["tokenizer"]["class"] == "CLIPTokenizer"
    total = 0
    for name, cls in (
        ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderTiny"),
        ("text_encoder", "CLIPTextModel"),
    ):
        (path,) = (tiny_checkpoint / name).glob("*.safetensors")
        weights = sum(tensor.numel() for tensor in load_file(path).values())
        total += weights
        assert parts[name]["class"] == cls
        assert (parts[name]["parameters"], parts[name]["dtypes"]) == (weights, {"float32": weights})
        assert parts[name]["bytes"] == path.stat().st_size + (path.parent / "config.json").stat().st_size
    assert facts["parameters"] == total


def test_mixed_dtypes_are_counted_apart(own_checkpoint: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = own_checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    first = next(iter(weights))
    save_file({k: v.to(torch.bfloat16) if k == first else v.half() for k, v in weights.items()}, path)
    (vae,) = (part for part in describe(own_checkpoint)["parts"] if part["name"] == "vae")
    numel = weights[first].numel()
    assert vae["dtypes"] == {"float16": vae["parameters"] - numel, "bfloat16": numel}


def test_a_bundle_is_described_file_by_file(make_bundle: Callable[..., Path]) -> None:
    root = make_bundle(layout="components")
    facts = describe(root)
    assert (facts["what"], facts["backend"], facts["layout"], facts["precision"]) == (
        "bundle",
        "onnx",
        "components",
        "fp32",
    )
    on_disk = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    del on_disk["manifest.json"]
    assert facts["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in on_disk.items()
    }
    assert facts["bytes"] == sum(map(len, on_disk.values()))
    assert facts["graph_bytes"] == 3
    names = {
        g["name"]: ([t["name"] for t in g["inputs"]], [t["name"] for t in g["outputs"]])
        for g in facts["graphs"]
    }
    assert names["unet"] == (["sample", "timestep", "encoder_hidden_states"], ["velocity"])


def test_json_is_the_description(
    make_bundle: Callable[..., Path], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (make_bundle(), tiny_checkpoint):
        assert main(["inspect", str(path), "--json"]) == 0
        captured = capsys.readouterr()
        # Through JSON a tuple is a list.
        assert json.loads(captured.out) == json.loads(json.dumps(describe(path)))
        assert captured.err == ""


def test_the_tables_show_what_a_reader_looks_for(
    make_bundle: Callable[..., Path], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = describe(tiny_checkpoint)
    assert main(["inspect", str(tiny_checkpoint)]) == 0
    out = capsys.readouterr().out
    for word in (facts["hash"], "one-step", "32 × 32", "4 × 8 × 8", "Apache-2.0", f"{facts['parameters']:,}"):
        assert word in out
    root = make_bundle()
    assert main(["inspect", str(root)]) == 0
    out = capsys.readouterr().out
    hashes = [entry["sha256"] for entry in describe(root)["files"].values()]
    for word in ("onnx", "CC0-1.0", "input_ids", "1 × 4 × 8 × 8", "int32", "ab" * 32, *hashes):
        assert word in out


def test_an_autoencoder_has_no_drawing_facts(
    own_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((own_checkpoint / "edgeflow.json").read_text())
    (own_checkpoint / "edgeflow.json").write_text(json.dumps({**facts, "kind": "autoencoder"}))
    for part in ("unet", "text_encoder", "tokenizer"):
        shutil.rmtree(own_checkpoint / part)
    assert [part["name"] for part in describe(own_checkpoint)["parts"]] == ["vae"]
    assert main(["inspect", str(own_checkpoint)]) == 0
    assert "autoencoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 1024**2, "3.00 MiB")]
)
def test_sizes(count: int, words: str) -> None:
    assert size(count) == words
