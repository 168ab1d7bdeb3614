"""Bad input: one sentence on stderr, nothing on stdout, the documented exit code, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeflow.cli import main

UNET = "unet/diffusion_pytorch_model.safetensors"


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run the command line; the one sentence it fails with."""
    assert main([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0].removeprefix("error: ")


@pytest.fixture(params=["generate", "inspect"])
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[object], list[object]]:
    """The arguments of each verb that opens a model."""
    extra: list[object] = ["red apple", "-o", tmp_path / "never.png"] if request.param == "generate" else []
    return lambda model: [request.param, model, *extra]


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> object:
    yield
    assert not (tmp_path / "never.png").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_unknown_model(opening: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, 2, *opening("emojy"))
    assert message.startswith("model 'emojy' is not known; known: ")


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "tokenizer"])
def test_missing_part(
    opening: Callable, own_checkpoint: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_checkpoint / part).rename(own_checkpoint / "elsewhere")
    assert f"part '{part}' is missing" in fails(capsys, 1, *opening(own_checkpoint))


def test_pickle(opening: Callable, own_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_checkpoint / UNET).rename(own_checkpoint / "unet/diffusion_pytorch_model.bin")
    message = fails(capsys, 1, *opening(own_checkpoint))
    assert message.endswith("got the pickle diffusion_pytorch_model.bin, which is refused")


def test_truncated_safetensors(
    opening: Callable, own_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (own_checkpoint / UNET).read_bytes()
    (own_checkpoint / UNET).write_bytes(data[: len(data) // 2])
    message = fails(capsys, 1, *opening(own_checkpoint))
    assert UNET in message and "truncated" in message


@pytest.mark.parametrize("file", ["pipeline.onnx", "tokenizer/vocab.json"])
def test_one_flipped_byte(
    opening: Callable, make_bundle: Callable[..., Path], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_bundle() / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert f"file '{file}' was changed" in fails(capsys, 1, *opening(path.parents[file.count("/")]))


def change_manifest(root: Path, change: Callable[[dict], object]) -> Path:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "tokenizer/../../secret", "a\\..\\b"])
@pytest.mark.parametrize("where", ["files", "graphs"])
def test_a_manifest_that_climbs_out(
    opening: Callable,
    make_bundle: Callable[..., Path],
    name: str,
    where: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def climb(manifest: dict) -> None:
        if where == "files":
            manifest["files"][name] = {"sha256": "0" * 64, "bytes": 1}
        else:
            manifest["graphs"][0]["file"] = name

    root = change_manifest(make_bundle(), climb)
    (root.parent / "secret").write_text("secret")
    assert "leaves the bundle's folder" in fails(capsys, 1, *opening(root))


def test_a_link_that_climbs_out(
    opening: Callable, make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle()
    (root / "pipeline.onnx").rename(tmp_path / "secret")  # the very bytes, so that only the place is wrong
    (root / "pipeline.onnx").symlink_to(tmp_path / "secret")
    assert "leaves the bundle's folder" in fails(capsys, 1, *opening(root))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 9}', '{"schema": 1, "files": 3}']
)
def test_a_manifest_that_is_none(
    opening: Callable, make_bundle: Callable[..., Path], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_bundle()
    (root / "manifest.json").write_text(text)
    assert fails(capsys, 1, *opening(root)).startswith("manifest: ")


def test_unknown_runtime(
    make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", make_bundle(), "x", "-o", tmp_path / "never.png", "--runtime"]
    assert "runtime 'tpu' is not known; known: coreml, cuda" in fails(capsys, 2, *arguments, "tpu")
    assert fails(capsys, 2, *arguments, "openvino").endswith("what fits: onnx, onnx-cuda")


@pytest.mark.parametrize(
    ("backend", "package", "extra"), [("onnx", "onnxruntime", "onnx"), ("openvino", "openvino", "openvino")]
)
def test_a_backend_not_installed(
    make_bundle: Callable[..., Path], tmp_path: Path, backend: str, package: str, extra: str
) -> None:
    root = make_bundle(backend=backend)
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from edgeflow.cli import main
sys.exit(main(["generate", {str(root)!r}, "x", "-o", {str(tmp_path / "never.png")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    expected = f"error: {package} is not installed; install it with: pip install 'edgeflow[{extra}]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (4, "", expected)


def test_existing_output(
    make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_bundle(), tmp_path / "there.png"
    out.write_text("mine")
    message = fails(capsys, 2, "generate", root, "x", "-o", out)
    assert message == f"output {out} already exists; give another -o/--out or --force to replace it"
    (tmp_path / "folder").mkdir()
    assert "already exists" in fails(capsys, 2, "generate", root, "x", "y", "-o", tmp_path / "folder")
    (tmp_path / "folder.png").mkdir()
    message = fails(capsys, 2, "generate", root, "x", "-o", tmp_path / "folder.png", "--force")
    assert message.endswith("expected the name of a file, got a folder")
    assert out.read_text() == "mine"


def test_unwritable_folder(
    make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, file = make_bundle(), tmp_path / "file"
    file.write_text("a file, so no folder can be made under it; holds for root too")
    for out, prompts in ((file / "a.png", ["x"]), (file / "deep" / "many", ["x", "y"])):
        message = fails(capsys, 1, "generate", root, *prompts, "-o", out)
        assert message.startswith(f"output: {out}: expected a writable folder, got: ")


@pytest.mark.parametrize(("kind", "steps"), [("diffusion", 25), ("rectified-flow", 8)])
def test_a_many_step_model(
    own_checkpoint: Path, tmp_path: Path, kind: str, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((own_checkpoint / "edgeflow.json").read_text())
    (own_checkpoint / "edgeflow.json").write_text(json.dumps({**facts, "kind": kind, "steps": steps}))
    message = fails(capsys, 1, "generate", own_checkpoint, "x", "-o", tmp_path / "never.png")
    assert f"expected a one-step model, got kind '{kind}' of {steps} steps" in message
    assert main(["inspect", str(own_checkpoint)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "never.png"], 'expected a "PROMPT" or --prompts-file, got neither'),
        (["x", "-o", "never.jpg"], "expected a name ending in .png for one picture or a grid"),
        (["x", "y", "-o", "never.png"], "expected a folder for several pictures, or --grid for one .png"),
        (["x", "y", "--grid", "-o", "never"], "expected a name ending in .png"),
        (
            ["--prompts-file", "none.txt", "-o", "never"],
            "expected a readable file, got: No such file or directory",
        ),
        (["--prompts-file", "latin1.txt", "-o", "never"], "expected UTF-8 text"),
        (["--prompts-file", "empty.txt", "-o", "never"], "expected at least one prompt, got none"),
        (["x", "--seed", str(2**64 - 1), "--count", "2", "-o", "never"], "expected seeds up to 2**64 - 1"),
        (["\udcff", "-o", "never.png"], "expected valid Unicode text"),
    ],
)
def test_wrong_prompts_and_outputs(
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes("Äpfel".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n  \n")
    assert message in fails(capsys, 2, "generate", make_bundle(), *arguments)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("never")]
