"""The smaller student: what is left out, what begins as the teacher's, that the rest of edgeflow takes it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.errors import TrainingError, UnknownNameError
from edgeflow.generate import Generator
from edgeflow.training.distill import DistillConfig, DistillObjective
from edgeflow.training.loop import train
from edgeflow.training.models import ModelShape, build_unet, load_parts
from edgeflow.training.pairs import Pairs
from edgeflow.training.presets import PRESETS
from edgeflow.training.student import count_parameters, small_config, small_student

SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # the rest is diffusers' default: SD 1.5's own shape
SD21 = {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}  # fmt: skip


def unet_of(**changes: object) -> UNet2DConditionModel:
    """Two layers a block and three stages, narrow: Stable Diffusion's form, quick to make."""
    shape = ModelShape(
        latent_channels=4, unet_channels=(32, 32, 64), unet_layers=2, unet_heads=(2, 2, 4), text_width=16
    )
    torch.manual_seed(0)
    return build_unet(dataclasses.replace(shape, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("known", [SD15, SD21], ids=["sd15", "sd21"])
def test_stable_diffusion_comes_down_to_bk_sdm_tinys_blocks(known: dict[str, object]) -> None:
    """859.5 M parameters to BK-SDM-Tiny's shape: one layer, three stages, no mid block, 0.38 of them."""
    with torch.device("meta"):
        config = dict(UNet2DConditionModel(**known).config)
    small, removed = small_config(config)
    assert small["block_out_channels"] == [320, 640, 1280] or small["block_out_channels"] == (320, 640, 1280)
    assert (small["layers_per_block"], small["mid_block_type"], len(removed)) == (1, None, 3)
    assert small["up_block_types"][0] == "CrossAttnUpBlock2D"
    if known is SD15:
        assert count_parameters({k: v for k, v in config.items() if k[0] != "_"}) == 859_520_964
        assert 320e6 < count_parameters(small) < 330e6


def test_the_built_in_shape_comes_down_to_half() -> None:
    with torch.device("meta"):
        config = dict(build_unet(ModelShape()).config)
    small, removed = small_config(config)
    full = count_parameters({k: v for k, v in config.items() if k[0] != "_"})
    assert 0.3 * full < count_parameters(small) <= 0.5 * full
    assert len(removed) >= 2 and any("Attn" in kind for kind in small["down_block_types"])


def test_a_unet_that_cannot_come_down_says_so() -> None:
    with torch.device("meta"):
        config = dict(unet_of().config)
    with pytest.raises(TrainingError, match="expected a UNet that comes down to 1%"):
        small_config(config, 0.01)


def test_matching_layers_are_the_teachers_to_the_bit_and_the_rest_is_listed() -> None:
    """The rule written out by hand for two layers a block, three stages and a student of two."""
    teacher = unet_of()
    student = small_student(teacher)
    theirs, mine = teacher.state_dict(), student.unet.state_dict()
    assert student.share <= 0.5 and sum(p.numel() for p in student.unet.parameters()) <= 0.5 * sum(
        p.numel() for p in teacher.parameters()
    )
    assert student.unet.config.block_out_channels == (32, 32)
    assert set(student.taken) | set(student.fresh) == set(mine) and not set(student.taken) & set(
        student.fresh
    )
    for name, source in student.taken.items():
        assert torch.equal(mine[name], theirs[source]), name
    expected = {
        "conv_in.weight": "conv_in.weight",
        "conv_out.bias": "conv_out.bias",
        "time_embedding.linear_1.weight": "time_embedding.linear_1.weight",
        "down_blocks.0.resnets.0.conv1.weight": "down_blocks.0.resnets.0.conv1.weight",
        "down_blocks.1.resnets.0.conv2.weight": "down_blocks.1.resnets.0.conv2.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "down_blocks.0.downsamplers.0.conv.weight",
        # the shallowest up block is the third of the teacher's and the second of the student's; of its three
        # layers the first stays, and the last, which takes the shallower stage's skip connection
        "up_blocks.1.resnets.0.conv2.weight": "up_blocks.2.resnets.0.conv2.weight",
        "up_blocks.1.resnets.1.conv1.weight": "up_blocks.2.resnets.2.conv1.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
    }
    for name, source in expected.items():
        assert student.taken[name] == source
    # the teacher's second up block took 64 channels from its first, which the student does not have
    assert student.fresh and all(name.startswith("up_blocks.0.resnets.0.") for name in student.fresh)
    drawn = student.unet(torch.zeros(1, 4, 16, 16), 1000.0, torch.zeros(1, 5, 16)).sample
    assert drawn.shape == (1, 4, 16, 16) and drawn.isfinite().all()


def four_pairs() -> Pairs:
    noise, latent = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Pairs(noise, latent, torch.zeros(4).long(), ["cat"], torch.arange(4))


@pytest.fixture(scope="module")
def distilled(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of distillation into a small student, from the tiny checkpoint as a flow."""
    config = dataclasses.replace(PRESETS["tiny"]["distill"], student="small", perceptual_weight=0.0)
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=2))
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(noise, noise.flip(0), torch.arange(8) % 2, ["red apple", "cat"], torch.arange(8))
    out = tmp_path_factory.mktemp("small") / "run"
    out.mkdir()
    objective = DistillObjective(config, tiny_checkpoint, pairs, torch.device("cpu"))
    # online targets come from the whole flow, not from the student
    assert objective.flow is not None
    assert len(objective.flow.state_dict()) > len(objective.trained["unet"].state_dict())
    train(objective, config.loop, out, torch.device("cpu"), resume=False)
    return out


def test_the_result_is_a_checkpoint_like_any_other(
    distilled: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint.open(distilled / "checkpoint")
    teacher = Checkpoint.open(tiny_checkpoint)
    assert checkpoint.kind == "one-step"
    assert checkpoint.num_parameters("unet") <= 0.5 * teacher.num_parameters("unet")
    said = json.loads((distilled / "checkpoint" / "edgeflow.json").read_text())["student"]
    assert said["removed"] and said["share_of_parameters"] <= 0.5 and said["from_teacher"] > 20
    assert Generator.open(distilled / "checkpoint").draw("red apple", 0).pixels.std() > 0
    bundles = tmp_path / "bundles"
    argv = ["export", str(distilled / "checkpoint"), "--to", "onnx", "-o", str(bundles)]
    assert main(argv) == 0, capsys.readouterr().err
    (bundle,) = (p.parent for p in bundles.rglob("manifest.json"))
    eager = Generator.open(distilled / "checkpoint").draw("cat", 3).pixels.astype(int)
    assert abs(Generator.open(bundle).draw("cat", 3).pixels.astype(int) - eager).max() <= 1
    assert (
        main(["quantize", str(distilled / "checkpoint"), "-o", str(tmp_path / "w8"), "--recipe", "w8"]) == 0
    )


def test_direct_distillation_begins_with_the_last_layer_negated(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """An ε-network's output at pure noise is x₀, and the velocity begins at −x₀."""
    teacher = Path(shutil.copytree(tiny_checkpoint, tmp_path / "teacher"))
    facts = json.loads((teacher / "edgeflow.json").read_text())
    (teacher / "edgeflow.json").write_text(json.dumps({**facts, "kind": "diffusion", "steps": 25}))
    pairs = four_pairs()
    config = DistillConfig(PRESETS["tiny"]["distill"].loop)
    begun = DistillObjective(config, teacher, pairs, torch.device("cpu")).trained["unet"].state_dict()
    for name, weight in load_parts(teacher).unet.state_dict().items():
        assert torch.equal(begun[name], -weight if name.startswith("conv_out") else weight)


def test_another_student_is_an_error(tiny_checkpoint: Path) -> None:
    pairs = four_pairs()
    config = DistillConfig(PRESETS["tiny"]["distill"].loop, student="huge")
    with pytest.raises(UnknownNameError, match="known: same, small"):
        DistillObjective(config, tiny_checkpoint, pairs, torch.device("cpu"))
