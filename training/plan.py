"""What a run would be, before it is one: ``edgeflow train --dry-run``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edgeflow.training.config import LoopConfig, to_dict
from edgeflow.training.parallel import BUCKET
from edgeflow.training.step import checkpoint_activations

_MIB = 2**20


def loop_plan(objective: Any, config: LoopConfig, processes: int) -> dict[str, Any]:
    """Modules, steps, passes over the data and memory of a run of ``objective``.

    One forward pass of one picture and one of two are made to size the activations; nothing is trained.
    Raises ConfigError for a batch that does not divide.
    """
    draw = getattr(objective, "draw", None)
    if draw is not None:
        draw.share(0, processes, config.accumulate)
    in_hand = config.batch_size // (processes * config.accumulate)
    memory = _memory(objective, config, in_hand, processes)  # first: it lets the objective draw once
    examples = _examples(objective)
    seen = config.steps * config.batch_size
    return {
        "processes": processes,
        "modules": _modules(objective),
        "steps": config.steps,
        "minutes": config.minutes or None,
        "batch": {"size": config.batch_size, "per_process": in_hand * config.accumulate, "at_once": in_hand},
        "pictures_seen": seen,
        "examples": examples,
        "passes": round(seen / examples, 2) if examples else None,
        "memory_estimate_mib": memory,
    }


def _examples(objective: Any) -> int | None:
    """How many examples the run draws from: streamed pairs are more than the shard that is in memory."""
    if (kept := getattr(getattr(objective, "source", None), "kept", None)) is not None:
        return sum(int(shard.sum()) for shard in kept)
    return objective.draw.count if hasattr(objective, "draw") else None


def _modules(objective: Any) -> list[dict[str, Any]]:
    """Each network once, with its parameters; those of ``trained`` first."""
    rows, told = [], set()
    for name, module in objective.trained.items():
        parameters = list(module.parameters())
        learning = sum(p.numel() for p in parameters if p.requires_grad)
        whole = sum(p.numel() for p in parameters)
        rows.append(
            {"name": name, "parameters": whole, "trained": learning, "averaged": name in objective.averaged}
        )
        told |= set(map(id, parameters))
    for name, module in _frozen(objective):
        parameters = [p for p in module.parameters() if id(p) not in told]
        told |= set(map(id, parameters))
        if parameters:
            count = sum(p.numel() for p in parameters)
            rows.append({"name": name, "parameters": count, "trained": 0, "averaged": False})
    return rows


def _held(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an objective holds by name, looking into dataclasses (its parts, its data)."""
    for name, value in vars(thing).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _held(value)
        else:
            yield name, value


def _frozen(objective: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, value in _held(objective):
        if isinstance(value, nn.Module) and name not in ("trained", "averaged"):
            yield name, value


def _memory(objective: Any, config: LoopConfig, in_hand: int, processes: int) -> dict[str, float | None]:
    """MiB of one process, by what it is for.

    float32 weights, one gradient and two AdamW moments for each that is trained, and the average; frozen
    networks and data as they lie; what the forward pass keeps for the backward one, for each picture
    of a micro-batch. Not counted: the backward pass's own temporaries, libraries' work space, the
    allocator's gaps. With ``loop.checkpointing`` the one block that is recomputed is not counted either.
    """
    trained = [p for p in objective.trained.parameters()]
    learning = sum(_bytes(p) for p in trained if p.requires_grad)
    frozen = {p: _bytes(p) for _, m in _frozen(objective) for p in [*m.parameters(), *m.buffers()]}
    data = {v.data_ptr(): _bytes(v) for _, v in _held(objective) if isinstance(v, Tensor)}
    sizes: dict[str, float | None] = {
        "weights": sum(map(_bytes, trained)),
        "gradients": learning,
        "optimizer": 2 * learning,
        "average": sum(map(_bytes, objective.averaged.parameters())),
        "frozen": sum(size for p, size in frozen.items() if p not in set(trained)),
        "data": sum(data.values()),
        "all_reduce": min(learning, 4 * BUCKET) if processes > 1 else 0,
        "activations": None,
    }
    if getattr(objective, "draw", None) is not None:
        if config.checkpointing:
            checkpoint_activations(objective.trained)
        one, two = (_kept_for_backward(objective, config, n) for n in (1, 2))
        sizes["activations"] = one + (in_hand - 1) * (two - one)
    sizes["in_all"] = sum(v or 0 for v in sizes.values())
    return {name: None if size is None else round(size / _MIB, 1) for name, size in sizes.items()}


def _kept_for_backward(objective: Any, config: LoopConfig, batch_size: int) -> int:
    """Bytes that the loss of ``batch_size`` pictures keeps for its backward pass, weights apart."""
    draw = objective.draw
    before, draw.batch_size = draw.batch_size, batch_size
    draw.share(0, 1, 1)
    weights = {p.untyped_storage().data_ptr() for p in objective.trained.parameters()}
    weights |= {p.untyped_storage().data_ptr() for _, m in _frozen(objective) for p in m.parameters()}
    kept: dict[int, Tensor] = {}  # holds on to each, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor
        return tensor

    device = draw.device.type
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(device, torch.bfloat16, enabled=config.bf16, cache_enabled=False),
    ):
        objective.loss()
    draw.batch_size = before
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def render(plan: dict[str, Any]) -> str:
    """The plan for a terminal."""
    lines = [("stage", f"{plan['stage']}, preset {plan['preset']}; would write {plan['run']}")]
    where = f"{plan['device']}, {_count(plan.get('processes', 1), 'process')}"
    lines.append(("where", where))
    if "steps" in plan:
        lines += _loop_lines(plan)
    else:
        lines.append(("pairs", f"{plan['pairs']:,}"))
    lines += [("config" if i == 0 else "", line) for i, line in enumerate(_flat(plan["config"]))]
    lines.append(("", ""))
    return "\n".join(f"{name:<9} {text}".rstrip() for name, text in lines) + "Nothing was written."


def _loop_lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    batch, memory = plan["batch"], dict(plan["memory_estimate_mib"])
    limit = f", or {plan['minutes']:g} minutes if that is sooner" if plan["minutes"] else ""
    again = f"; goes on after step {plan['resumes_from']:,}" if plan["resumes_from"] else ""
    pieces = f"{batch['per_process']:,} a process, {batch['at_once']:,} at once"
    lines = [
        ("steps", f"{plan['steps']:,}{limit}{again}"),
        ("batch", f"{batch['size']:,} pictures: {pieces}"),
    ]
    seen = f"{plan['pictures_seen']:,} pictures seen"
    if plan["passes"] is not None:
        seen += f", {plan['passes']:,g} passes over {plan['examples']:,}"
    lines.append(("data", seen))
    for row in plan["modules"]:
        state = "frozen" if not row["trained"] else "trained"
        if 0 < row["trained"] < row["parameters"]:
            state = f"{row['trained']:,} of them trained"
        average = ", averaged" if row["averaged"] else ""
        lines.append(("network", f"{row['name']}: {row['parameters']:,} parameters, {state}{average}"))
    total = memory.pop("in_all")
    parts = ", ".join(f"{k.replace('_', '-')} {'?' if v is None else f'{v:,g}'}" for k, v in memory.items())
    lines.append(("memory", f"about {total:,g} MiB a process (an estimate: {parts})"))
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("es" if number != 1 else "")


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {value}"


def header(stage: str, preset: str, run: object, device: object, config: Any) -> dict[str, Any]:
    """What the plans of all stages begin with."""
    return {
        "stage": stage,
        "preset": preset,
        "run": str(run),
        "device": str(device),
        "config": to_dict(config),
    }
