"""What a bundle is held against: inputs and fp32 outputs of every graph, for real prompts.

They come from the checkpoint, computed afresh in torch, or from the bundle's own ``reference.npz``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeflow.apple import FUSED
from edgeflow.bundle import REFERENCE, Bundle
from edgeflow.checkpoint import Checkpoint, builtin_models
from edgeflow.errors import BackendMissing, BundleError, CheckpointError, EdgeflowError, UsageError
from edgeflow.noise import gaussian_noise
from edgeflow.spec import COMPONENTS, PIPELINE
from edgeflow.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from edgeflow.components import Component

#: Prompts measured unless told otherwise; prompt i is drawn with seed i.
NUM_PROMPTS = 4
#: Graph → its one output.
OUTPUTS = {"text_encoder": "last_hidden_state", "unet": "velocity", "decoder": "image", PIPELINE: "image"}
#: What a reference was made from, besides ``reference.npz``.
CHECKPOINT = "checkpoint"
#: What computing a reference afresh needs, besides the checkpoint.
TORCH_PACKAGES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Sample:
    """One prompt: the inputs and fp32 outputs of every graph, keyed as in ``reference.npz``.

    ``arrays``: input_ids (1, L), noise, unet/velocity and decoder/latent (1, C, h, w),
    text_encoder/last_hidden_state (1, L, D), decoder/image in [-1, 1] and pipeline/image in [0, 1]
    (1, 3, H, W); outputs are the export-ready modules'. ``picture`` (1, 3, H, W) in [0, 1] is what end to end
    compares with.
    """

    prompt: str
    arrays: Mapping[str, NDArray[Any]]
    picture: NDArray[np.float32]
    originals: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # graph → untouched, if at hand

    def inputs(self, graph: str, timestep: float) -> dict[str, NDArray[Any]]:
        """What a graph is fed: the reference's own inputs, so that no error comes from another graph."""
        names = {
            "text_encoder": {"input_ids": "input_ids"},
            "unet": {"sample": "noise", "encoder_hidden_states": "text_encoder/last_hidden_state"},
            "decoder": {"latent": "decoder/latent"},
            PIPELINE: {"input_ids": "input_ids", "noise": "noise"},
        }[graph]
        fed = {name: self.arrays[key] for name, key in names.items()}
        return {**fed, "timestep": np.array([timestep], np.float32)} if graph == "unet" else fed

    def output(self, graph: str) -> NDArray[Any]:
        return self.arrays[f"{graph}/{OUTPUTS[graph]}"]


@dataclass(frozen=True)
class Reference:
    """What bundles of one checkpoint are held against."""

    against: str  # CHECKPOINT or reference.npz
    samples: tuple[Sample, ...]
    components: Mapping[str, Component] | None  # None without a checkpoint, or where originals are at hand
    reason: str | None  # why there is no checkpoint

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(sample.prompt for sample in self.samples)


def find_checkpoint(bundle: Bundle, given: Checkpoint | None) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint a bundle was exported from, or None and why not. A given one must be it."""
    expected = bundle.generation.checkpoint_hash
    missing = [package for package in TORCH_PACKAGES if find_spec(package) is None]
    if given is not None:
        if given.hash != expected:
            raise CheckpointError(
                f"parity: {bundle.root}: expected the checkpoint it was exported from, {expected[:12]}…, "
                f"got {given.name}, {given.hash[:12]}…"
            )
        if missing:
            raise BackendMissing(missing[0], "export")
        return given, None
    if missing:
        return None, f"{missing[0]} is not installed"
    reason = "checkpoint absent"
    for name in dict.fromkeys((bundle.generation.name, str(bundle.manifest.model.get("origin", "")))):
        try:
            checkpoint = Checkpoint.open(name) if is_local(name) else None
        except EdgeflowError as error:
            checkpoint, reason = None, f"checkpoint absent ({error})"
        if checkpoint is not None and checkpoint.hash == expected:
            return checkpoint, None
        if checkpoint is not None:
            reason = f"checkpoint absent (the {name} here is {checkpoint.hash[:12]}…, not {expected[:12]}…)"
    return None, reason


def is_local(model: str) -> bool:
    """Whether opening ``model`` needs no network: a built-in name, a folder, or a hub id in the cache."""
    if not model or model in builtin_models() or Path(model).is_dir():
        return bool(model)
    if model.count("/") != 1 or find_spec("huggingface_hub") is None:
        return False
    hub = importlib.import_module("huggingface_hub")
    try:
        return isinstance(hub.try_to_load_from_cache(model, "model_index.json"), str)
    except ValueError:  # not the form of a hub id
        return False


def _count(wanted: int | None, available: int, where: object) -> int:
    if wanted is None:
        return min(NUM_PROMPTS, available)
    if not 1 <= wanted <= available:
        raise UsageError(f"parity: {where}: number of prompts: expected 1 to {available}, got {wanted}")
    return wanted


def reference_from_bundle(bundle: Bundle, num_prompts: int | None, reason: str | None) -> Reference:
    """The references that the bundle carries: the export-ready modules' outputs, also for the picture."""
    arrays, spec = bundle.reference(), bundle.generation
    available = sum(f"prompt{i}/input_ids" in arrays for i in range(len(spec.prompts)))
    if not available:
        raise BundleError(f"bundle: {bundle.root}: {REFERENCE}: expected prompt0/input_ids, found none")
    samples = []
    for i in range(_count(num_prompts, available, bundle.root)):
        prefix = f"prompt{i}/"
        own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        absent = sorted(_needed(bundle) - set(own))
        if absent:
            raise BundleError(f"bundle: {bundle.root}: {REFERENCE}: expected {prefix}{absent[0]}, found none")
        samples.append(Sample(spec.prompts[i], own, own["pipeline/image"]))
    return Reference(REFERENCE, tuple(samples), None, reason)


def _needed(bundle: Bundle) -> set[str]:
    keys = {"input_ids", "noise", "pipeline/image"}
    for graph in graphs_of(bundle):
        keys.add(f"{graph}/{OUTPUTS[graph]}")
        keys |= {"unet": {"text_encoder/last_hidden_state"}, "decoder": {"decoder/latent"}}.get(graph, set())
    return keys


def reference_from_checkpoint(
    checkpoint: Checkpoint, prompts: Sequence[str], num_prompts: int | None, attention: str = FUSED
) -> Reference:
    """The references computed in torch, eager fp32, chained as a pipeline chains them.

    ``attention`` is the export-ready modules' layout, as the bundle has it.
    """
    from edgeflow.components import load_components

    spec, components = checkpoint.generation, load_components(checkpoint, attention=attention, merged=True)
    tokenizer = ClipTokenizer.from_folder(spec.tokenizer_dir)
    count = _count(num_prompts, len(prompts), checkpoint.name)
    samples = []
    for seed, prompt in enumerate(prompts[:count]):
        noise = gaussian_noise(seed, (1, *spec.latent_shape))
        arrays: dict[str, NDArray[Any]] = {"input_ids": tokenizer.encode(prompt), "noise": noise}
        sample = Sample(prompt, arrays, noise)
        for graph in (*COMPONENTS, PIPELINE):
            fed = sample.inputs(graph, spec.timestep)
            arrays[f"{graph}/{OUTPUTS[graph]}"] = components[graph].run(fed)[OUTPUTS[graph]]
            if graph == "unet":
                arrays["decoder/latent"] = (noise + arrays["unet/velocity"]) / np.float32(spec.latent_scale)
        picture = components[PIPELINE].run_original(sample.inputs(PIPELINE, spec.timestep))["image"]
        samples.append(replace(sample, picture=picture))
    return Reference(CHECKPOINT, tuple(samples), components, None)


def graphs_of(bundle: Bundle) -> list[str]:
    names = [graph.name for graph in bundle.manifest.graphs]
    unknown = sorted(set(names) - set(OUTPUTS))
    if unknown or not names:
        got = repr(unknown[0]) if unknown else "none"
        raise BundleError(f"bundle: {bundle.root}: graphs: expected some of {', '.join(OUTPUTS)}, got {got}")
    return names
