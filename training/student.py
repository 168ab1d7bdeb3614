"""A student smaller than its teacher: whole blocks left out, the rest begun from the teacher's own weights.

The idea is BK-SDM's (Kim et al. 2023, arXiv 2305.15798): in a UNet that can already draw, the inner blocks
cost the most parameters and are missed the least. ``small_config`` works on any UNet2DConditionModel's
configuration, Stable Diffusion's as well as the built-in model's, and takes away, until at most half of
the parameters is left, in this order:

1. half of each block's layers (Stable Diffusion: two → one; a block of one layer keeps it),
2. the mid block,
3. the deepest stage, down and up,
4. the attention of the deepest stage that has any; then 3 and 4 again.

At least one stage stays, and at least one attention, without which no caption would be heard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from edgeflow.errors import TrainingError, UnknownNameError
from edgeflow.training.models import Parts

_LOG = logging.getLogger("edgeflow")

#: What ``student`` may be in a configuration of distillation.
STUDENTS = ("same", "small")
#: Keys whose value may be a list with an entry for each stage, the shallowest first.
_BY_STAGE = (
    "down_block_types", "block_out_channels", "attention_head_dim", "num_attention_heads",
    "cross_attention_dim", "only_cross_attention", "layers_per_block", "transformer_layers_per_block",
)  # fmt: skip
#: The same, the deepest first.
_BY_STAGE_UP = ("up_block_types", "reverse_transformer_layers_per_block")

Config = dict[str, Any]


@dataclass(frozen=True)
class Student:
    """A smaller UNet and where its weights come from."""

    unet: UNet2DConditionModel
    removed: tuple[str, ...]  # in words, in order
    taken: dict[str, str]  # the student's weight → the teacher's of equal value
    fresh: tuple[str, ...]  # weights that begin random, as the teacher has none of their shape
    share: float  # of the teacher's parameters

    def facts(self) -> dict[str, object]:
        """What a checkpoint says of it."""
        return {
            "removed": list(self.removed),
            "share_of_parameters": round(self.share, 4),
            "from_teacher": len(self.taken),
            "fresh": list(self.fresh),
        }


def begin_student(
    name: str, parts: Parts, teacher: UNet2DConditionModel
) -> tuple[UNet2DConditionModel, Student | None]:
    """What distillation trains: the teacher's UNet itself for "same", a smaller one for "small".

    An ε-network's last layer is negated, as reflow does: at τ = 0 the velocity is x₁ − x₀ and ε predicts x₀.
    The student stands where the teacher stood. Raises UnknownNameError for any other name.
    """
    if name not in STUDENTS:
        raise UnknownNameError("student", name, STUDENTS)
    if parts.facts["kind"] == "diffusion":
        with torch.no_grad():
            teacher.conv_out.weight.neg_()
            teacher.conv_out.bias.neg_()
    if name == "same":
        return teacher, None
    student = small_student(teacher)
    return student.unet.to(teacher.device, memory_format=torch.channels_last), student


def small_student(teacher: UNet2DConditionModel, at_most: float = 0.5) -> Student:
    """A UNet of at most ``at_most`` times the teacher's parameters, begun from its matching blocks.

    Raises TrainingError for a teacher whose blocks cannot be left out. The teacher is unchanged.
    """
    config, removed = small_config(dict(teacher.config), at_most)
    unet = UNet2DConditionModel(**config)
    taken, fresh = copy_matching(teacher, unet)
    share = _count(unet) / _count(teacher)
    student = Student(unet, removed, taken, fresh, share)
    _LOG.info(
        f"student: {_count(unet) / 1e6:.2f} M parameters, {share:.0%} of the teacher's; removed: "
        f"{'; '.join(removed)}; {len(taken)} tensors begin as the teacher's, "
        f"{len(fresh)} anew{': ' + ', '.join(fresh) if fresh else ''}"
    )
    return student


def small_config(config: Config, at_most: float = 0.5) -> tuple[Config, tuple[str, ...]]:
    """The configuration of a UNet of at most ``at_most`` times the parameters, and what was removed.

    Raises TrainingError where nothing more can be removed.
    """
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    limit = at_most * count_parameters(config)
    removed: list[str] = []
    for step in _removals():
        if count_parameters(config) <= limit:
            break
        changed = step(config)
        if changed is not None:
            config, what = changed
            removed.append(what)
    if count_parameters(config) > limit:
        share = count_parameters(config) / limit * at_most
        raise TrainingError(
            f"student: expected a UNet that comes down to {at_most:.0%} of its parameters by leaving "
            f"blocks out; got {share:.0%} after: {'; '.join(removed) or 'nothing'}"
        )
    return config, tuple(removed)


def count_parameters(config: Config) -> int:
    """Parameters of the UNet of a configuration, without making its weights."""
    with torch.device("meta"):
        return _count(UNet2DConditionModel(**config))


def _count(unet: nn.Module) -> int:
    return sum(p.numel() for p in unet.parameters())


_Removal = Callable[[Config], tuple[Config, str] | None]


def _removals() -> Iterator[_Removal]:
    yield _halve_layers
    yield _drop_mid_block
    for _ in range(8):  # more stages than any UNet has
        yield _drop_deepest_stage
        yield _drop_deepest_attention


def _halve_layers(config: Config) -> tuple[Config, str] | None:
    layers = config["layers_per_block"]
    many = layers if isinstance(layers, int) else max(layers)
    if many == 1:
        return None
    halved = max(1, layers // 2) if isinstance(layers, int) else tuple(max(1, n // 2) for n in layers)
    return {**config, "layers_per_block": halved}, f"layers of a block: {layers} → {halved}"


def _drop_mid_block(config: Config) -> tuple[Config, str] | None:
    if config.get("mid_block_type") is None:
        return None
    return {**config, "mid_block_type": None}, "the mid block"


def _drop_deepest_stage(config: Config) -> tuple[Config, str] | None:
    stages = len(config["block_out_channels"])
    if stages == 1 or not _attentive(config["down_block_types"][:-1]):
        return None
    change = {k: config[k][:-1] for k in _BY_STAGE if isinstance(config.get(k), list | tuple)}
    change |= {k: config[k][1:] for k in _BY_STAGE_UP if isinstance(config.get(k), list | tuple)}
    width = config["block_out_channels"][-1]
    return {**config, **change}, f"stage {stages} of {stages}, {width} channels wide"


def _drop_deepest_attention(config: Config) -> tuple[Config, str] | None:
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    with_attention = [i for i, kind in enumerate(down) if _attentive([kind])]
    if len(with_attention) < 2:
        return None
    stage = with_attention[-1]
    down[stage], up[-1 - stage] = "DownBlock2D", "UpBlock2D"
    types = {"down_block_types": tuple(down), "up_block_types": tuple(up)}
    return {**config, **types}, f"the attention of stage {stage + 1}"


def _attentive(kinds: list[str] | tuple[str, ...]) -> bool:
    return any("Attn" in kind for kind in kinds)


@torch.no_grad()
def copy_matching(
    teacher: UNet2DConditionModel, student: UNet2DConditionModel
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Give the student the teacher's weights wherever a layer of the same place has the same shape.

    Returns the student's names with the teacher's, and the names that found none.
    """
    theirs, mine = teacher.state_dict(), student.state_dict()
    taken: dict[str, str] = {}
    for name, weight in mine.items():
        source = _teachers_name(name, teacher, student)
        if source in theirs and theirs[source].shape == weight.shape:
            weight.copy_(theirs[source])
            taken[name] = source
    return taken, tuple(name for name in mine if name not in taken)


def _teachers_name(name: str, teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> str:
    """Where the teacher has the layer that stands at the student's ``name``.

    Stages are counted from the shallowest: the student's up blocks are the teacher's last ones. In a block
    with fewer layers the first ones stay, and in an up block the last one besides, which alone takes the
    skip connection of the shallower stage.
    """
    parts = name.split(".")
    if parts[0] not in ("down_blocks", "up_blocks"):
        return name
    side, stage = parts[0], int(parts[1])
    theirs, mine = getattr(teacher, side), getattr(student, side)
    at = stage + (len(theirs) - len(mine) if side == "up_blocks" else 0)
    parts[1] = str(at)
    if parts[2] in ("resnets", "attentions") and side == "up_blocks":
        layer, last = int(parts[3]), len(mine[stage].resnets) - 1
        if layer == last:
            parts[3] = str(len(theirs[at].resnets) - 1)
    return ".".join(parts)
