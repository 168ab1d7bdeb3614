"""The verdict: its statistics against independent ones, its words, its gates, and the command as a whole."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.errors import EdgeflowError
from edgeflow.quality import Data
from edgeflow.training import distances, paired
from edgeflow.verdict import Change, Close, VerdictReport, VerdictRow, VerdictSettings
from edgeflow.verdict_gates import GATES, failures, parse_gates
from edgeflow.verdict_table import render

# --- statistics ------------------------------------------------------------------------------------------


def gaussians(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def once(count: int) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.float64)


def test_kid_over_all_pictures_is_torchmetrics_with_one_subset() -> None:
    real, fake = gaussians(40, 24, 0), gaussians(40, 24, 1, 0.3)
    expected = distances.kid(real, fake, subsets=1, subset_size=40, seed=0).mean
    assert paired.KernelDistance(real)(fake, once(40))[0] == pytest.approx(expected, rel=1e-9)


def test_frechet_with_every_prompt_once_is_the_plain_one() -> None:
    for count, width in ((20, 30), (60, 8)):
        real, fake = gaussians(count, width, 0), gaussians(count, width, 1, 0.3)
        expected = distances.frechet_distance(real, fake)
        assert paired.Frechet(real)(fake, once(count))[0] == pytest.approx(expected, rel=1e-9)


def test_a_resample_by_weights_is_the_resample_itself() -> None:
    """Weights stand for copies: FD of copied rows, and KID less the pairs of a prompt's own copies."""
    real, fake = gaussians(12, 5, 0), gaussians(12, 5, 1, 0.3)
    (row,) = weights = paired.resamples(12, 1, seed=3)
    index = torch.arange(12).repeat_interleave(row.long())
    expected = distances.frechet_distance(real[index], fake[index])
    assert paired.Frechet(real)(fake, weights)[0] == pytest.approx(expected, rel=1e-9)
    other = index[:, None] != index[None]

    def mean_kernel(a: torch.Tensor, b: torch.Tensor, kept: torch.Tensor) -> float:
        return float(((a.double() @ b.double().T / 5 + 1) ** 3)[kept].mean())

    r, f = real[index], fake[index]
    everything = torch.ones_like(other)
    mmd = mean_kernel(r, r, other) + mean_kernel(f, f, other) - 2 * mean_kernel(r, f, everything)
    assert paired.KernelDistance(real)(fake, weights)[0] == pytest.approx(mmd, rel=1e-9)


def test_hit_chances_are_what_drawing_candidates_estimates() -> None:
    pictures = torch.nn.functional.normalize(gaussians(60, 8, 0), dim=1)
    texts = torch.nn.functional.normalize(pictures + 0.5 * gaussians(60, 8, 1), dim=1)
    exact = paired.hit_chances(pictures, texts, 20)
    drawn = distances.retrieval_r_at_1(pictures, texts, candidates=20, seed=0, rounds=400)
    assert float(exact.mean()) == pytest.approx(drawn, abs=0.01) and 0.1 < drawn < 0.9
    assert set(paired.hit_chances(pictures, texts, 60).tolist()) == {0.0, 1.0}  # everyone is a candidate


@pytest.mark.parametrize("figure", ["kid", "fd"])
def test_an_interval_holds_no_change_among_equals_and_finds_a_real_one(figure: str) -> None:
    """Two models whose pictures scatter alike around the real ones; then one that is off by a little."""
    inside = found = 0
    for seed in range(24):
        real, prompts = gaussians(60, 6, 4 * seed), gaussians(60, 6, 4 * seed + 1)
        real = real + prompts
        a, b = (prompts + 0.8 * gaussians(60, 6, 4 * seed + i) for i in (2, 3))
        weights = paired.resamples(60, 100, seed)
        measure = (paired.KernelDistance if figure == "kid" else paired.Frechet)(real)
        base = np.concatenate([measure(a, once(60)), measure(a, weights)])
        for other, shifted in ((b, False), (b + 0.6, True)):
            values = np.concatenate([measure(other, once(60)), measure(other, weights)]) - base
            interval = paired.around(float(values[0]), values[1:])
            if shifted:
                found += interval.low > 0
            else:
                inside += interval.low <= 0 <= interval.high
    assert inside >= 21 and found >= 20


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = paired.mean_change(values, torch.zeros(400), paired.resamples(400, 2000, 0))
    half = 1.96 * float(values.std()) / 20
    assert found.value == pytest.approx(float(values.mean()))
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], abs=0.1 * half)


def test_a_percentile_interval_bears_equal_pictures() -> None:
    values = np.array([math.inf] * 10 + [40.0] * 2)
    found = paired.percentile(
        lambda v: float(np.sort(v)[(len(v) - 1) // 2]), values, paired.resamples(12, 200, 0)
    )
    assert found.value == found.low == found.high == math.inf


# --- words and gates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "more_is_better", "verdict"),
    [
        (-1, 1, False, "inside the noise"),
        (0, 1, True, "inside the noise"),
        (1, 2, False, "worse"),
        (1, 2, True, "better"),
        (-2, -1, False, "better"),
        (-2, -1, True, "worse"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(
    low: float, high: float, more_is_better: bool, verdict: str
) -> None:
    assert Change.of((low + high) / 2, low, high, more_is_better=more_is_better).verdict == verdict


def a_row(name: str = "w8", **changes: tuple[float, float, float]) -> VerdictRow:
    given = {"kid": (0.001, -0.01, 0.01), "fd": (0.5, -1, 2), "r_at_1": (0, 0, 0), "real_distance": (0, 0, 0)}
    figures = {"kid": 0.3, "fd": 90.0, "r_at_1": 0.6, "real_distance": 0.3}
    close = {"psnr_worst_db": 39.0, "psnr_median_db": 45.0, "distance": 0.01, "fd_ratio": 1.01}
    return VerdictRow(
        name=name, checkpoint="ab", kind="bundle", runtime="onnx", backend="onnxruntime 1",
        precision="w8 fp16", recipe={"name": "w8"}, bytes=2**21, graph_bytes=2**20, figures=figures,
        changes={k: Change.of(*v, more_is_better=k == "r_at_1") for k, v in {**given, **changes}.items()},
        closeness={k: Close(v, v, v) for k, v in close.items()},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        ("kid=0.01,psnr=38,fd_ratio=1.02,fd=1,distance=0.02,psnr_median=45,r_at_1=0,kid=noise", None),
        ("kid=0.0001", "w8: gate kid: KID above the model's: expected at most 0.0001, got 0.0010"),
        ("psnr=40", "w8: gate psnr: PSNR of the worst picture: expected at least 40 dB, got 39.0 dB"),
        ("fd_ratio=1.005", "w8: gate fd_ratio: FD over the model's: expected at most 1.005, got 1.0100"),
        ("distance=0.005", "w8: gate distance: mean feature distance: expected at most 0.005, got 0.0100"),
    ],
)
def test_gates_hold_or_say_why(gates: str, said: str | None) -> None:
    assert failures([a_row()], parse_gates([gates])) == (() if said is None else (said,))


def test_the_noise_gate_fails_what_is_measurably_worse_alone() -> None:
    worse, better = a_row("worse", kid=(0.1, 0.05, 0.2)), a_row("better", kid=(-0.1, -0.2, -0.05))
    assert failures([worse, better, a_row()], {"kid": "noise"}) == (
        "worse: gate kid: KID above the model's: expected inside the noise, got +0.0500 to +0.2000",
    )
    lost = a_row("lost", r_at_1=(-0.2, -0.3, -0.1))
    assert [f.partition(":")[0] for f in failures([lost], {"r_at_1": "noise"})] == ["lost"]
    assert failures([lost], {"r_at_1": 0.25}) == () and failures([lost], {"r_at_1": 0.15}) != ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kidd=1", "known: distance, fd, fd_ratio, kid, psnr, psnr_median, r_at_1, real_distance"),
        ("", "gate '' is not known"),
        ("kid", "expected a number or 'noise' after kid="),
        ("kid=low", "got 'low'"),
        ("kid=nan", "got 'nan'"),
        ("psnr=noise", "no noise to be inside of"),
    ],
)
def test_wrong_gates_are_usage_errors(text: str, said: str) -> None:
    with pytest.raises(EdgeflowError, match=said) as caught:
        parse_gates([text])
    assert caught.value.exit_code == 2


def test_every_gate_reads_a_number_of_a_row() -> None:
    assert all(isinstance(gate.read(a_row()), float | int) for gate in GATES.values())


def test_the_table_and_the_json_say_all_that_was_measured() -> None:
    base = replace(a_row("emoji"), changes={}, closeness={}, precision="fp32", runtime="torch")
    equal = replace(a_row("same"), closeness={**a_row().closeness, "psnr_worst_db": Close(*[math.inf] * 3)})
    report = VerdictReport(
        Data("set", "test", 8, 0, 32), VerdictSettings(), base, (a_row(kid=(0.1, 0.05, 0.2)), equal)
    )
    text = render(report)
    for said in (
        "against emoji",
        "+0.0500 to +0.2000",
        "worse",
        "onnx w8 fp16",
        "equal",
        "worst picture 39.0 dB",
    ):
        assert said in text
    raw = json.loads(report.to_json())
    assert raw["rows"][1]["closeness"]["psnr_worst_db"]["value"] == "inf" and raw["model"]["name"] == "emoji"
    assert raw["rows"][0]["changes"]["kid"]["verdict"] == "worse" and raw["passed"] is True


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training pictures and 12 held-out ones, bars of a colour and a width."""
    from edgeflow.training.dataset import write_shards

    def picture(i: int) -> bytes:
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[4:28, 4 : 6 + 3 * (i % 8)] = (40 * (i % 6), 20 * (i % 11), 255 - 4 * i)
        out = io.BytesIO()
        Image.fromarray(pixels, "RGB").save(out, "PNG")
        return out.getvalue()

    folder = tmp_path_factory.mktemp("pictures")
    named = [(f"{i:03d}", picture(i), {"caption": f"bar {i % 8}, colour {i % 6}"}) for i in range(52)]
    write_shards(folder, "train", named[:40], "png")
    write_shards(folder, "test", named[40:], "png")
    return folder


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "tiny-w4"
    recipe = out.parent / "recipe.json"
    rules = [
        {"component": c, "pattern": "*", "scheme": "w4g32", "fallback": "w8"}
        for c in ("text_encoder", "unet", "decoder")
    ]
    recipe.write_text(json.dumps({"schema": 1, "name": "all4", "rules": rules}))
    assert main(["quantize", str(tiny_checkpoint), "--recipe", str(recipe), "-o", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Fewer resamples and a shorter training of what measures R@1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "edgeflow.training.verdict.VerdictSettings",
            lambda **given: VerdictSettings(resamples=60, frechet_resamples=20, agreement_steps=20, **given),
        )
        yield


@pytest.fixture
def verdict(
    data: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """Runs ``edgeflow quality … --against tiny`` and gives code, stdout and stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["quality", *argv, "--against", str(tiny_checkpoint), "--data", str(data)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_model_itself_lost_nothing_and_integers_lost_something(
    verdict: Callable[..., tuple[int, str, str]], tiny_checkpoint: Path, quantized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "verdict"
    models = [str(tiny_checkpoint), str(quantized)]
    code, said, _ = verdict(*models, "--gate", "kid=noise,psnr=20", "--json", "-o", str(out))
    report = json.loads(said)
    assert code == 0 and json.loads((out / "verdict.json").read_text(encoding="utf-8")) == report
    same, rounded = report["rows"]
    assert same["closeness"]["psnr_worst_db"]["value"] == "inf"
    assert {c["verdict"] for c in same["changes"].values()} == {"inside the noise"}
    assert all((c["value"], c["low"], c["high"]) == (0, 0, 0) for c in same["changes"].values())
    assert same["figures"] == report["model"]["figures"] and same["closeness"]["fd_ratio"]["value"] == 1.0
    assert rounded["precision"] == "all4 fp32" and rounded["recipe"]["name"] == "all4"
    assert 20 < rounded["closeness"]["psnr_worst_db"]["value"] < 60
    worst = [w["psnr_db"] for w in rounded["worst"]]
    assert worst == sorted(worst) and worst[0] == rounded["closeness"]["psnr_worst_db"]["value"]
    assert {layer["bits"] for layer in rounded["layers"]} == {4, 8}
    assert rounded["graph_bytes"] < report["model"]["graph_bytes"]


def test_figures_are_those_of_quality(
    verdict: Callable[..., tuple[int, str, str]],
    data: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """The plain command, which measures with torchmetrics and drawn candidates, agrees."""
    _, said, _ = verdict(str(tiny_checkpoint), "--json")
    figures = json.loads(said)["model"]["figures"]
    with pytest.MonkeyPatch.context() as patch:
        from edgeflow.quality import Settings

        patch.setattr(
            "edgeflow.training.evaluate.Settings",
            lambda **given: Settings(
                **{"kid_subsets": 1000, "floor_draws": 2, "agreement_steps": 20, **given}
            ),
        )
        assert main(["quality", str(tiny_checkpoint), "--data", str(data), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["rows"][0]["figures"]
    assert figures["kid"] == pytest.approx(
        plain["kid"], rel=0.02
    )  # the mean of a thousand halves of 12 pictures
    assert figures["fd"] == pytest.approx(plain["frechet"], rel=1e-9)
    assert figures["r_at_1"] == pytest.approx(plain["r_at_1"], abs=1e-6)


def test_a_failed_gate_is_exit_3_after_the_whole_table(
    verdict: Callable[..., tuple[int, str, str]], quantized: Path
) -> None:
    code, out, err = verdict(str(quantized), "--gate", "psnr=90", "--gate", "distance=0")
    assert code == 3 and "inside the noise" in out and err.count("\n") == 1
    assert f"{quantized.name}: gate psnr: " in err and f"{quantized.name}: gate distance: " in err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--gate", "kid=0,nonsense=1"], 2, "'nonsense' is not known; known: distance"),
        (["--steps", "4"], 2, "--steps: not with --against"),
        (["--teacher", "emoji"], 2, "--teacher: not with --against"),
        (["--num-prompts", "4"], 1, "at least 8 prompts, got 4"),
        (["-o", "{tiny}"], 2, "already exists"),
        (["emoji"], 2, "one picture and latent size, got: tiny 32"),
    ],
)
def test_errors(
    argv: list[str], code: int, said: str, verdict: Callable[..., tuple[int, str, str]], tiny_checkpoint: Path
) -> None:
    got, out, err = verdict(str(tiny_checkpoint), *(w.format(tiny=tiny_checkpoint) for w in argv))
    assert (got, out) == (code, "") and said in err and err.count("\n") == 1


def test_gates_need_a_model_to_be_held_against(data: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["quality", "emoji", "--data", str(data), "--gate", "kid=1"]) == 2
    assert "--gate: expected --against MODEL with it" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["w4g32", "w6"])
def test_layers_have_the_noise_that_quantizing_reported(
    recipe: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Read back from what is stored: integers and scales, or a palette."""
    from edgeflow.quantization.apply import quantize_checkpoint
    from edgeflow.quantization.recipe import read_recipe
    from edgeflow.verdict_layers import layers_of

    source = Checkpoint.open(tiny_checkpoint)
    report = quantize_checkpoint(source, read_recipe(recipe), tmp_path / "model")
    found = {
        (x.component, x.layer): x.sqnr_db for x in layers_of(Checkpoint.open(tmp_path / "model"), source)
    }
    expected = {(x.component, x.layer): x.weight_sqnr_db for x in report.layers}
    assert found == pytest.approx(expected, abs=0.05) and len(found) > 50
