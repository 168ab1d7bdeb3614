"""Generation, held against arithmetic written out here and torch's own noise and CLIP's own tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgeflow import __version__, registry
from edgeflow import bundle as bundle_module
from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.errors import (
    BackendMissing,
    BundleError,
    CheckpointError,
    RuntimeFailure,
    UnknownNameError,
    UsageError,
)
from edgeflow.generate import Generator, load_runtime, open_model, run_pipeline, to_pixels
from edgeflow.pictures import best_columns, contact_sheet, read_facts, slug
from edgeflow.staging import staged_output

Arrays = Mapping[str, NDArray[Any]]


class FakeRuntime:
    """Graphs whose outcome can be worked out by hand; remembers what it was asked."""

    name: ClassVar[str] = "fake"

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, NDArray[Any]]]] = []

    @classmethod
    def load(cls, source: Any) -> FakeRuntime:
        return cls()

    def run(self, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        self.asked.append((graph, dict(inputs)))
        if graph == "text_encoder":
            return {"last_hidden_state": np.full((1, 16, 2), inputs["input_ids"][0, 1], np.float32)}
        if graph == "unet":
            return {"velocity": 0.25 - inputs["sample"]}  # so noise + velocity is 0.25 everywhere
        if graph == "decoder":
            return {"image": inputs["latent"][:, :3] - 0.1}
        image = np.zeros((1, 3, 8, 8), np.float32)
        image[0, 0] = inputs["input_ids"][0, 1] / 600
        image[0, 1] = np.abs(np.tanh(inputs["noise"][0, 0]))
        return {"image": image}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeRuntime]:
    module = types.ModuleType("edgeflow_fake_runtime")
    module.FakeRuntime = FakeRuntime  # type: ignore[attr-defined]
    module.__version__ = "9.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "edgeflow_fake_runtime", module)
    monkeypatch.setitem(registry.RUNTIMES, "fake", "edgeflow_fake_runtime:FakeRuntime")
    monkeypatch.setitem(registry.REQUIRES, "fake", ("edgeflow_fake_runtime", "fake"))
    return FakeRuntime


@pytest.fixture
def fake_bundle(fake: type[FakeRuntime], make_bundle: Callable[..., Path]) -> Path:
    return make_bundle("fake-bundle", backend="fake")


# --- one step -----------------------------------------------------------------------------------------------


def test_components_take_one_euler_step_from_t_1000(fake: object, make_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.open(make_bundle(backend="fake", layout="components"))
    generator = Generator(bundle, FakeRuntime())
    ids, noise = generator.inputs("red apple", 3)
    image = run_pipeline(generator.runtime, generator.spec, ids, noise, fused=False)
    asked = dict(generator.runtime.asked)  # type: ignore[attr-defined]
    assert list(asked) == ["text_encoder", "unet", "decoder"]
    np.testing.assert_array_equal(asked["unet"]["timestep"], np.array([1000.0], np.float32))
    np.testing.assert_array_equal(asked["unet"]["sample"], noise)
    np.testing.assert_allclose(asked["decoder"]["latent"], 0.25 / 0.5, atol=1e-6)  # latent_scale 0.5
    np.testing.assert_allclose(image, (0.5 - 0.1) / 2 + 0.5, atol=1e-6)
    assert image.shape == (1, 3, 8, 8) and image.dtype == np.float32


def test_inputs_are_torchs_noise_and_clips_ids(fake_bundle: Path) -> None:
    import torch
    from transformers import CLIPTokenizer

    generator = Generator.open(fake_bundle)
    ids, noise = generator.inputs("red apple, noto style", 7)
    expected = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(7))
    np.testing.assert_array_equal(noise, expected.numpy())
    clip = CLIPTokenizer.from_pretrained(fake_bundle / "tokenizer")
    words = clip(
        "red apple, noto style", padding="max_length", truncation=True, return_tensors="np"
    ).input_ids
    np.testing.assert_array_equal(ids, words)


def test_pixels_round_half_to_even_and_move_channels_last() -> None:
    image = np.zeros((1, 3, 1, 5), np.float64)  # float32 holds no exact half of 1/255
    image[0, 0, 0] = np.array([0.5, 1.5, 2.5, 254.5, 300]) / 255
    image[0, 2, 0, 0] = -1
    pixels = to_pixels(image)
    assert pixels.shape == (1, 5, 3) and pixels.dtype == np.uint8
    assert pixels[0, :, 0].tolist() == [0, 2, 2, 254, 255]
    assert pixels[0, 0].tolist() == [0, 0, 0]


def test_a_graph_that_rounds_itself_is_taken_as_it_is() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2)
    np.testing.assert_array_equal(to_pixels(image), image[0].transpose(1, 2, 0))


def test_values_that_are_not_finite_are_an_error_not_a_picture() -> None:
    image = np.zeros((1, 3, 2, 2), np.float16)
    image[0, 1, 0, 0], image[0, 2, 1, 1] = np.nan, np.inf
    with pytest.raises(RuntimeFailure, match="got 2 of 12 that are not"):
        to_pixels(image)


def test_an_onnx_bundle_draws_what_its_graph_says(make_bundle: Callable[..., Path]) -> None:
    import torch
    from transformers import CLIPTokenizer

    root = make_bundle()
    picture = Generator.open(root).draw("sailboat", 5)
    ids = CLIPTokenizer.from_pretrained(root / "tokenizer")(
        "sailboat", padding="max_length", max_length=16
    ).input_ids
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(5))
    image = torch.sigmoid(noise[0, :3] + sum(ids) / len(ids) / 1000)
    expected = (image * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(picture.pixels.astype(int) - expected).max() <= 1  # a float's last bit can turn a rounding
    assert (picture.pixels == expected).mean() > 0.98


# --- models and runtimes ----------------------------------------------------------------------------------


def test_a_folder_with_a_manifest_is_a_bundle(
    make_bundle: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    assert isinstance(open_model(make_bundle()), Bundle)
    assert isinstance(open_model(tiny_checkpoint), Checkpoint)


def test_a_runtime_that_does_not_fit_lists_what_fits(
    make_bundle: Callable[..., Path], tiny_checkpoint: Path
) -> None:
    with pytest.raises(UsageError, match=r"runtime 'openvino' does not open .*; what fits: onnx, onnx-cuda$"):
        load_runtime(open_model(make_bundle()), "openvino")
    with pytest.raises(UsageError, match=r"a checkpoint; what fits: torch, cuda, cuda-bf16$"):
        load_runtime(open_model(tiny_checkpoint), "onnx")
    with pytest.raises(
        UnknownNameError, match="runtime 'tpu' is not known; known: coreml, cuda, cuda-bf16, onnx"
    ):
        load_runtime(open_model(tiny_checkpoint), "tpu")


def test_a_missing_backend_is_said_and_a_changed_file_before_it(
    fake_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime is imported while the bundle is verified, and may not be there."""
    monkeypatch.setitem(registry.RUNTIMES, "fake", "absent_backend:Runtime")
    with pytest.raises(BackendMissing, match="absent_backend is not installed"):
        Generator.open(fake_bundle, "fake")
    (fake_bundle / "pipeline.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="was changed"):
        Generator.open(fake_bundle, "fake")


def test_the_runtime_is_imported_while_the_bundle_is_hashed(
    fake_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing waits here until the import has begun, so one after the other would fail."""
    asked: list[str] = []
    begun, hashed = threading.Event(), bundle_module.entry_of

    def preload(name: str) -> None:
        asked.append(name)
        begun.set()

    def entry_of(path: Path) -> bundle_module.FileEntry:
        assert begun.wait(10)
        return hashed(path)

    monkeypatch.setattr(registry, "preload", preload)
    monkeypatch.setattr(bundle_module, "entry_of", entry_of)
    Generator.open(fake_bundle, "fake")
    assert asked == ["fake"]


def test_a_tokenizer_of_another_length_is_refused(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    bundle.manifest.model["max_tokens"] = 77
    with pytest.raises(CheckpointError, match="expected the model's 77, got 16"):
        Generator(bundle, FakeRuntime())


# --- the verb -----------------------------------------------------------------------------------------------


def run(*args: object) -> int:
    return main(["generate", *map(str, args)])


def test_one_prompt_writes_one_png_that_says_how_it_was_drawn(
    fake_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "apple.png"
    assert run(fake_bundle, "a café 😀", "--seed", 7, "-o", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert read_facts(out) == {
        "prompt": "a café 😀",
        "seed": "7",
        "model": "by-hand",
        "checkpoint": "ab" * 32,
        "licence": "CC0-1.0",
        "runtime": "fake",
        "backend": "edgeflow_fake_runtime 9.9",
        "edgeflow": __version__,
        "bundle": "fake pipeline fp32",
    }
    expected = Generator.open(fake_bundle).draw("a café 😀", 7).pixels
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)
    assert [p.name for p in out.parent.iterdir()] == ["apple.png"]


def test_equal_commands_give_equal_bytes_and_another_seed_another_picture(
    fake_bundle: Path, tmp_path: Path
) -> None:
    names = [tmp_path / f"{i}.png" for i in range(3)]
    for name, seed in zip(names, (1, 1, 2), strict=True):
        assert run(fake_bundle, "red apple", "--seed", seed, "-o", name) == 0
    first, again, other = (name.read_bytes() for name in names)
    assert first == again != other


def test_several_prompts_fill_a_folder_from_the_same_seed(
    fake_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    assert run(fake_bundle, "Red Apple!", "café", "", "--seed", 4, "-o", out) == 0
    names = ["000-red-apple.png", "001-cafe.png", "002-untitled.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert [read_facts(out / name)["seed"] for name in names] == ["4"] * 3
    assert [read_facts(out / name)["prompt"] for name in names] == ["Red Apple!", "café", ""]


def test_count_draws_consecutive_seeds(fake_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    assert run(fake_bundle, "x", "y", "--seed", 4, "--count", 2, "-o", out) == 0
    names = ["000-x-seed4.png", "001-x-seed5.png", "002-y-seed4.png", "003-y-seed5.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert [read_facts(out / name)["seed"] for name in names] == ["4", "5", "4", "5"]
    single = tmp_path / "single.png"
    assert run(fake_bundle, "y", "--seed", 5, "-o", single) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(single)), np.asarray(Image.open(out / names[3])))


def test_a_grid_is_one_sheet_that_holds_every_picture(
    fake_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    prompts = ["red apple", "sailboat", ""]
    assert run(fake_bundle, *prompts, "--grid", "-o", out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["paths"] == [str(out)]
    assert [(p["prompt"], p["seed"], p["size"]) for p in report["pictures"]] == [
        (p, 0, [8, 8]) for p in prompts
    ]
    facts = read_facts(out)
    assert json.loads(facts["prompts"]) == prompts and json.loads(facts["seeds"]) == [0, 0, 0]
    sheet = np.asarray(Image.open(out))
    generator = Generator.open(fake_bundle)
    for i, prompt in enumerate(prompts):  # 8 pixels are shown 16 times as large, 12 pixels apart
        x = 12 + i * (128 + 12)
        shown = sheet[12 : 12 + 128 : 16, x : x + 128 : 16]
        np.testing.assert_array_equal(shown, generator.draw(prompt, 0).pixels)
        caption = sheet[12 + 128 :, x : x + 128]
        assert (caption < 128).any(), f"no caption under {prompt!r}"


def test_prompts_come_from_a_file_or_stdin(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffred apple\r\n\r\n  grüne Birne \n".encode())
    assert run(fake_bundle, "first", "--prompts-file", file, "-o", tmp_path / "a") == 0
    assert [read_facts(p)["prompt"] for p in sorted((tmp_path / "a").iterdir())] == [
        "first",
        "red apple",
        "grüne Birne",
    ]
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=file.open("rb")))
    assert run(fake_bundle, "--prompts-file", "-", "-o", tmp_path / "b") == 0
    assert len(list((tmp_path / "b").iterdir())) == 2


def test_a_prompt_that_is_cut_is_a_warning_once(
    fake_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPTokenizer

    prompt = "grinning face with big eyes and a lot more to say than fits"
    clip = CLIPTokenizer.from_pretrained(fake_bundle / "tokenizer")
    dropped = len(clip(prompt).input_ids) - 16
    assert run(fake_bundle, prompt, "--count", 2, "-o", tmp_path / "a") == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning:") == 1 and f"its last {dropped} tokens were cut" in captured.err
    assert run(fake_bundle, prompt, "-q", "-o", tmp_path / "b.png") == 0
    assert capsys.readouterr().err == ""


def test_force_replaces_a_result_and_nothing_else(
    fake_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, many, own = tmp_path / "a.png", tmp_path / "many", tmp_path / "own"
    one.write_bytes(b"old")
    assert run(fake_bundle, "x", "-o", one) == 2
    assert one.read_bytes() == b"old"
    assert run(fake_bundle, "x", "-o", one, "--force") == 0
    assert Image.open(one).size == (8, 8)
    assert run(fake_bundle, "x", "y", "z", "-o", many) == 0
    assert run(fake_bundle, "x", "y", "-o", many) == 2
    assert run(fake_bundle, "x", "y", "-o", many, "--force") == 0
    assert sorted(p.name for p in many.iterdir()) == ["000-x.png", "001-y.png"]
    own.mkdir()
    (own / "thesis.tex").write_text("years of work")
    capsys.readouterr()
    assert run(fake_bundle, "x", "y", "-o", own, "--force") == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (own / "thesis.tex").read_text() == "years of work"


def test_a_failure_half_way_leaves_nothing(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def fail(self: FakeRuntime, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        if len(self.asked) == 1:
            raise RuntimeFailure("runtime fake: out of memory")
        self.asked.append((graph, {}))
        return {"image": np.zeros((1, 3, 8, 8), np.float32)}

    monkeypatch.setattr(FakeRuntime, "run", fail)
    assert run(fake_bundle, "x", "y", "-o", out / "many") == 1
    assert run(fake_bundle, "x", "y", "--grid", "-o", out / "grid.png") == 1
    assert list(out.iterdir()) == []


def test_an_onnx_bundle_is_drawn_without_torch(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    root = make_bundle()
    code = f"""
import sys
from edgeflow.cli import main
assert main(["generate", {str(root)!r}, "red apple", "-o", {str(tmp_path / "a.png")!r}]) == 0
assert "onnxruntime" in sys.modules
heavy = {{"torch", "diffusers", "transformers", "onnx", "openvino", "coremltools"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "a.png").is_file()


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (8, 4), (9, 3), (99, 8)]
)
def test_columns(count: int, columns: int) -> None:
    assert best_columns(count) == columns


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Red Apple, noto style!", "red-apple-noto-style"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "untitled"),
        ("猫", "untitled"),
        ("a" * 99, "a" * 40),
    ],
)
def test_slugs_are_safe_file_names(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_a_sheet_wants_pictures_of_one_size() -> None:
    small, large = np.zeros((8, 8, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([small, large], ["a", "b"])
    with pytest.raises(ValueError, match="a caption for each"):
        contact_sheet([small], [])


def test_long_captions_stay_inside_their_column() -> None:
    white = np.full((128, 128, 3), 255, np.uint8)
    sheet = contact_sheet([white, white], ["w" * 500, ""], columns=2)
    assert (sheet[:, 12 + 128 :] == 255).all()  # the second column and the gap before it stay white
    assert (sheet[:, 12 : 12 + 128] < 128).any()


def test_a_staged_output_leaves_the_old_one_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), staged_output(path, force=True) as stage:
        stage.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
