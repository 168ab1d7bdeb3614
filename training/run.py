"""One stage, from files to files: what ``edgeflow train STAGE`` calls."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import TrainingError, UnknownNameError, UsageError
from edgeflow.quantization.recipe import read_recipe
from edgeflow.staging import staged_folder
from edgeflow.training.adversarial import AdversarialObjective
from edgeflow.training.autoencoder import AutoencoderObjective
from edgeflow.training.config import resolve, to_dict
from edgeflow.training.corpus import Corpus
from edgeflow.training.distill import DistillObjective
from edgeflow.training.loop import check_run, start_run, train
from edgeflow.training.models import Parts, load_autoencoder, load_parts
from edgeflow.training.pair_source import open_pairs
from edgeflow.training.pairs import PairDrawer, check_pairs, draw_pairs, read_prompts, start_pairs
from edgeflow.training.parallel import Processes
from edgeflow.training.plan import header, loop_plan
from edgeflow.training.presets import PRESETS, STAGES
from edgeflow.training.qat_inputs import captions_of_pairs
from edgeflow.training.ranks import Ranks
from edgeflow.training.reflow import ReflowObjective
from edgeflow.training.state import last_step, require_tensorboard
from edgeflow.training.teacher import TeacherObjective
from edgeflow.training.vocabulary import train_vocabulary

#: What each stage starts from: (needs --data, kinds of checkpoint that --from may be, needs --pairs).
_NEEDS: dict[str, tuple[bool, tuple[str, ...], bool]] = {
    "autoencoder": (True, (), False),
    "teacher": (True, ("autoencoder", "diffusion"), False),
    "pairs": (False, ("diffusion", "rectified-flow"), False),  # and --data or --prompts
    "reflow": (False, ("diffusion", "rectified-flow"), True),
    "distill": (False, ("rectified-flow", "diffusion", "one-step"), True),
    "adversarial": (False, ("one-step", "rectified-flow"), True),
    "qat": (False, ("one-step",), False),
}


@dataclass(frozen=True)
class Request:
    """What a stage was asked for; paths that it does not need are None."""

    stage: str
    preset: str
    out: Path
    data: Path | None = None
    source: Path | None = None  # a run folder or a checkpoint
    pairs: Path | None = None
    prompts: Path | None = None  # pairs, qat: captions, one a line, in place of a data set's
    flow: Path | None = None  # distill: what draws the online targets, where it is not the source
    toml: Path | None = None
    overrides: tuple[str, ...] = ()
    flags: dict[str, Any] | None = None
    device: str = "auto"
    force: bool = False
    resume: bool = False
    dry_run: bool = False
    recipe: str | None = None  # of qat: a shipped recipe's name or a file


def run_stage(request: Request) -> Path:
    """Run the stage and return its run folder. Raises EdgeflowError for anything a user can mend.

    Under ``torchrun`` or ``accelerate launch`` every process calls this; the first one writes.
    """
    config = _configure(request)
    processes = Processes.join(pick_device(request.device))
    device = processes.device
    if not processes.main:
        logging.getLogger("edgeflow").setLevel(logging.ERROR)
    _check_needs(request)
    _check_flow(request)
    _check_device(config, device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if request.stage == "pairs":
        return _run_pairs(request, config, device)
    check_run(request.out, force=request.force, resume=request.resume)
    processes.barrier()  # everyone has looked at the folder before the first one writes into it
    objective = _objective(request, config, device)  # all inputs are read before anything is written
    if processes.main:
        start_run(request.out, to_dict(config), resume=request.resume)
    processes.barrier()
    train(objective, config.loop, request.out, device, request.resume)
    return request.out


def plan_stage(request: Request) -> dict[str, Any]:
    """What :func:`run_stage` would do, as JSON values; nothing is written. Raises as it does.

    On a machine without the GPU that the settings ask for, the plan is made on the CPU.
    """
    config, device = _configure(request), pick_device(request.device)
    _check_needs(request)
    _check_flow(request)
    plan = header(request.stage, request.preset, request.out, device, config)
    if request.stage == "pairs":
        return {**plan, "pairs": config.num_pairs}
    check_run(request.out, force=request.force, resume=request.resume)
    eager = replace(config, loop=replace(config.loop, compile=False, cuda_graph=False))
    with tempfile.TemporaryDirectory() as scratch:
        away = replace(request, out=Path(scratch) / "run", resume=False, dry_run=True)
        objective = _objective(away, eager, device)
        plan.update(loop_plan(objective, config.loop, int(os.environ.get("WORLD_SIZE", "1"))))
    return {**plan, "resumes_from": (last_step(request.out) or 0) if request.resume else 0}


def _configure(request: Request) -> Any:
    """The resolved configuration of the stage."""
    if request.stage not in STAGES:
        raise UnknownNameError("stage", request.stage, STAGES)
    if request.preset not in PRESETS:
        raise UnknownNameError("preset", request.preset, PRESETS)
    if request.stage not in PRESETS[request.preset]:
        raise UnknownNameError(
            f"stage of the preset {request.preset}", request.stage, PRESETS[request.preset]
        )
    prefix = "" if request.stage == "pairs" else "loop."
    flags = {prefix + k: v for k, v in (request.flags or {}).items() if v is not None}
    if "steps" in flags:  # pairs has no loop: its --steps is the number of pairs
        flags["num_pairs"] = flags.pop("steps")
    config = resolve(PRESETS[request.preset][request.stage], request.toml, request.overrides, flags)
    if getattr(config, "loop", None) is not None and config.loop.tensorboard:
        require_tensorboard()
    return config


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, the CPU elsewhere."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: cuda: expected a CUDA GPU, found none; known: auto, cpu")
    return torch.device(name)


def checkpoint_of(path: Path) -> Path:
    """A run folder's checkpoint, or the path itself."""
    return path / "checkpoint" if (path / "checkpoint").is_dir() else path


def _check_needs(request: Request) -> None:
    needs_data, kinds, needs_pairs = _NEEDS[request.stage]
    missing = []
    if needs_data and request.data is None:
        missing.append("--data DIR")
    if kinds and request.source is None:
        missing.append(f"--from RUN (a checkpoint of kind {' or '.join(kinds)})")
    if needs_pairs and request.pairs is None:
        missing.append("--pairs DIR")
    if request.stage == "qat":
        missing += _qat_misses(request)
    if missing:
        raise UsageError(f"train {request.stage}: needs {', '.join(missing)}")
    if kinds:
        assert request.source is not None
        kind = Checkpoint.open(checkpoint_of(request.source)).kind
        if kind not in kinds:
            raise UsageError(
                f"train {request.stage}: --from {request.source}: expected a checkpoint of kind "
                f"{' or '.join(kinds)}, got {kind}"
            )


def _check_flow(request: Request) -> None:
    if request.flow is None:
        return
    if request.stage != "distill":
        raise UsageError(f"train {request.stage}: --flow: expected the stage distill")
    kind = Checkpoint.open(checkpoint_of(request.flow)).kind
    if kind != "rectified-flow":
        raise UsageError(f"train distill: --flow {request.flow}: expected a rectified-flow, got {kind}")


def _check_device(config: Any, device: torch.device) -> None:
    loop = getattr(config, "loop", None)
    if loop is not None and loop.cuda_graph and device.type != "cuda":
        raise UsageError("loop.cuda_graph: expected a CUDA device, got cpu; add --set loop.cuda_graph=false")


def _run_pairs(request: Request, config: Any, device: torch.device) -> Path:
    assert request.source is not None
    if (request.data is None) == (request.prompts is None):
        raise UsageError("train pairs: expected one of --data DIR and --prompts FILE for the captions")
    ranks, teacher, out = Ranks.from_environment(), checkpoint_of(request.source), request.out
    check_pairs(out, force=request.force, resume=request.resume, ranks=ranks)
    if request.prompts is not None:
        captions = read_prompts(request.prompts)
    else:
        assert request.data is not None
        size = int(Checkpoint.open(teacher).generation.picture_size)
        captions = sorted(set(Corpus.load(request.data, "train", size, torch.device("cpu")).captions))
    drawer = PairDrawer(config, teacher, captions, device)
    start_pairs(out, config, drawer, force=request.force, resume=request.resume, ranks=ranks)
    if draw_pairs(config, drawer, out, ranks) == 0 and ranks.world == 1:
        raise TrainingError(f"pairs: {out}: no pair was drawn within {config.minutes} minutes")
    return out


def _objective(request: Request, config: Any, device: torch.device) -> Any:
    if request.stage == "autoencoder":
        assert request.data is not None
        return AutoencoderObjective(
            config, Corpus.load(request.data, "train", config.shape.picture_size, device), device
        )
    assert request.source is not None
    source = checkpoint_of(request.source)
    if request.stage == "teacher":
        assert request.data is not None
        corpus = Corpus.load(request.data, "train", config.shape.picture_size, device)
        begun = load_parts(source) if Checkpoint.open(source).kind == "diffusion" else None
        vae = load_autoencoder(source) if begun is None else begun.vae
        vocabulary = _vocabulary(request, config, corpus, device, begun)
        if request.dry_run:
            return _teacher_in_outline(config, corpus, vae, vocabulary, device, begun)
        return TeacherObjective(config, corpus, vae, vocabulary, device, begun)
    if request.stage == "qat":
        from edgeflow.training.qat import QatObjective  # torchao, which no other stage needs

        assert request.recipe is not None
        recipe, captions = read_recipe(request.recipe), _qat_captions(request, source)
        return QatObjective(config, Checkpoint.open(source), recipe, captions, device)
    assert request.pairs is not None
    drawn = open_pairs(request.pairs, source, device, config.pairs_gib)
    if request.stage == "adversarial":
        size = int(Checkpoint.open(source).generation.picture_size)
        real = Corpus.load(request.data, "train", size, device) if request.data else None
        return AdversarialObjective(config, source, drawn, real, device)
    if request.stage == "distill":
        flow = checkpoint_of(request.flow) if request.flow else None
        return DistillObjective(config, source, drawn, device, flow)
    return ReflowObjective(config, source, drawn, device)


def _teacher_in_outline(
    config: Any, corpus: Corpus, vae: Any, vocabulary: Path, device: torch.device, begun: Parts | None
) -> TeacherObjective:
    """For a plan, which wants the data's size: one picture stands for all, so that none else is encoded."""
    objective = TeacherObjective(config, corpus.head(1), vae, vocabulary, device, begun)
    count = len(corpus.captions)
    objective.latents = objective.latents.expand(count, -1, -1, -1)
    objective.ids = objective.ids.expand(count, -1)
    return objective


def _qat_misses(request: Request) -> list[str]:
    captions = (request.prompts, request.pairs, request.data)
    missing = ["--recipe NAME|FILE"] if request.recipe is None else []
    if not any(captions):
        missing.append("captions: --pairs DIR, --prompts FILE or --data DIR")
    return missing


def _qat_captions(request: Request, source: Path) -> list[str]:
    """The distinct captions of the first given of --prompts, --pairs and --data."""
    if request.prompts is not None:
        return sorted(set(read_prompts(request.prompts)))
    if request.pairs is not None:
        return captions_of_pairs(request.pairs)
    assert request.data is not None
    size = int(Checkpoint.open(source).facts["picture_size"])
    return sorted(set(Corpus.load(request.data, "train", size, torch.device("cpu")).captions))


def _vocabulary(
    request: Request, config: Any, corpus: Corpus, device: torch.device, begun: Parts | None
) -> Path:
    """The run's own vocabulary: that of the teacher it goes on from, or learnt from the training captions."""
    folder, processes = request.out / "tokenizer", Processes.current(device)
    if processes.main and not (request.resume and folder.is_dir()):
        with staged_folder(folder, force=True) as staged:
            if begun is not None:
                shutil.copytree(begun.tokenizer_dir, staged, dirs_exist_ok=True)
            else:
                train_vocabulary(corpus.captions, config.shape.vocabulary, staged, config.shape.max_tokens)
    processes.barrier()
    return folder
