"""Prompt → token ids → noise → runtime → picture, on any backend. Torch-free unless the runtime is torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeflow import __version__, registry
from edgeflow.bundle import MANIFEST, Bundle, Manifest
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import CheckpointError, RuntimeFailure, UsageError
from edgeflow.noise import gaussian_noise
from edgeflow.registry import Runtime
from edgeflow.spec import PIPELINE, GenerationSpec
from edgeflow.tokenizer import ClipTokenizer

#: The runtime that draws from a checkpoint, which no backend has lowered.
REFERENCE_RUNTIME = "torch"
#: Runtimes that open a checkpoint besides: they compile it themselves.
COMPILING_RUNTIMES = ("cuda", "cuda-bf16")
#: Backend → runtimes that open its bundles besides its own.
OTHER_RUNTIMES = {"onnx": ("onnx-cuda",)}


@dataclass(frozen=True)
class Picture:
    """One drawn picture and what is needed to draw it again."""

    pixels: NDArray[np.uint8]  # (H, W, 3), RGB
    prompt: str
    seed: int
    dropped_tokens: int  # tokens of the prompt that did not fit and were cut
    latency_ms: float  # tokens to pixels, without loading; not part of facts, which repeat exactly
    facts: dict[str, str] = field(default_factory=dict)  # what the PNG records


@dataclass(frozen=True)
class Sampling:
    """How a many-step model is drawn."""

    steps: int
    guidance: float  # 1 or less is none


def open_model(
    source: str | Path, meanwhile: Callable[[Manifest], object] | None = None
) -> Bundle | Checkpoint:
    """A folder with a manifest is a bundle; a built-in name, any other folder or a hub id is a checkpoint.

    ``meanwhile`` is called while a bundle's files are verified. Raises BundleError, CheckpointError or
    UnknownNameError.
    """
    if (Path(source) / MANIFEST).is_file():
        return Bundle.open(source, meanwhile)
    return Checkpoint.open(source)


def default_runtime(model: Bundle | Checkpoint) -> str:
    """The runtime that draws from this model: its backend's own for a bundle, torch for a checkpoint."""
    return model.manifest.backend if isinstance(model, Bundle) else REFERENCE_RUNTIME


def load_runtime(model: Bundle | Checkpoint, name: str | None = None) -> Runtime:
    """The runtime called ``name`` (by default the model's own) with the model loaded.

    Raises UnknownNameError, UsageError for a built-in runtime that does not fit the model, BackendMissing, or
    RuntimeFailure. A runtime from outside decides by itself what it opens.
    """
    expect_fitting(model, name)
    return registry.runtime(name or default_runtime(model)).load(model)  # type: ignore[arg-type]


def expect_fitting(model: Bundle | Checkpoint, name: str | None) -> None:
    """Raise UsageError for a built-in runtime that does not open the model."""
    fitting = default_runtime(model)
    name = name or fitting
    others = OTHER_RUNTIMES.get(fitting, ()) if isinstance(model, Bundle) else COMPILING_RUNTIMES
    fit = (fitting, *others)
    if name in registry.RUNTIMES and name not in fit:
        what = f"bundle of the backend {fitting}" if isinstance(model, Bundle) else "checkpoint"
        raise UsageError(
            f"runtime {name!r} does not open {model.root}, a {what}; what fits: {', '.join(fit)}"
        )


def is_fused(model: Bundle | Checkpoint) -> bool:
    """Whether the whole generator is one graph; torch's runtime always has it."""
    return not isinstance(model, Bundle) or any(g.name == PIPELINE for g in model.manifest.graphs)


def run_pipeline(
    runtime: Runtime,
    spec: GenerationSpec,
    input_ids: NDArray[np.int64],
    noise: NDArray[np.float32],
    *,
    fused: bool,
) -> NDArray[Any]:
    """Ids (1, L) and noise (1, C, h, w) → image (1, 3, H, W): float32 in [0, 1] before any rounding.

    ``fused`` takes the graph ``pipeline``, else text_encoder → unet → decoder with the one step in between:
    x₁ = x₀ + v(x₀, 1000). The image is uint8 instead where the fused graph itself rounds.
    """
    if fused:
        image = runtime.run(PIPELINE, {"input_ids": input_ids, "noise": noise})["image"]
        return image if image.dtype == np.uint8 else image.astype(np.float32)
    hidden = runtime.run("text_encoder", {"input_ids": input_ids})["last_hidden_state"]
    timestep = np.array([spec.timestep], dtype=np.float32)
    inputs = {"sample": noise, "timestep": timestep, "encoder_hidden_states": hidden}
    velocity = runtime.run("unet", inputs)["velocity"].astype(np.float32)
    latent = (noise + velocity) / np.float32(spec.latent_scale)
    image = runtime.run("decoder", {"latent": latent})["image"].astype(np.float32)
    return np.clip(image / 2 + np.float32(0.5), 0, 1)


def to_pixels(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Image (1, 3, H, W), float in [0, 1] or uint8 → pixels (H, W, 3) uint8, half rounded to even.

    Raises RuntimeFailure when a value is not finite.
    """
    if image.dtype != np.uint8:
        if not np.isfinite(image).all():
            bad = int((~np.isfinite(image)).sum())
            raise RuntimeFailure(
                f"picture: expected finite values, got {bad} of {image.size} that are not; "
                "the model overflows in this precision"
            )
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(image[0].transpose(1, 2, 0))


class Generator:
    """Draws pictures from one model on one runtime; both are loaded once.

    ``sampling`` is given for a many-step model, whose runtime is then a sampler (see ``open``).
    """

    def __init__(self, model: Bundle | Checkpoint, runtime: Runtime, sampling: Sampling | None = None):
        if sampling is None:
            expect_one_step(model)
        self.model, self.runtime, self.sampling = model, runtime, sampling
        self.spec = model.generation
        self.tokenizer = ClipTokenizer.from_folder(self.spec.tokenizer_dir)
        if self.tokenizer.max_length != self.spec.max_tokens:
            raise CheckpointError(
                f"tokenizer: {self.spec.tokenizer_dir}: model_max_length: expected the model's "
                f"{self.spec.max_tokens}, got {self.tokenizer.max_length}"
            )
        self._fused = is_fused(model)

    @classmethod
    def open(
        cls,
        source: str | Path | Bundle | Checkpoint,
        runtime: str | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        low_memory: bool = False,
    ) -> Generator:
        """Open a model and a runtime by name. Raises what open_model, load_runtime and plan_sampling raise.

        ``low_memory`` holds one component at a time (edgeflow.low_memory); UsageError where that cannot be.

        A many-step model is drawn in ``steps`` with ``guidance`` (by default the checkpoint's own), and
        refused before anything heavy is loaded where no steps are asked for.
        """

        def preload(manifest: Manifest) -> None:
            registry.preload(runtime or manifest.backend)

        model = source if isinstance(source, Bundle | Checkpoint) else open_model(source, preload)
        sampling = plan_sampling(model, runtime, steps, guidance)
        if low_memory:
            if sampling is not None:
                raise UsageError("--low-memory: expected a one-step model; many steps keep their UNet loaded")
            from edgeflow.low_memory import one_at_a_time

            expect_fitting(model, runtime)
            frugal: Any = one_at_a_time(model, runtime or default_runtime(model))
            generator = cls(model, frugal)
            generator._fused = False
            return generator
        if sampling is None:
            return cls(model, load_runtime(model, runtime))
        sampler: Any = registry.sampler()
        return cls(model, sampler(model, sampling.steps, sampling.guidance), sampling)

    @property
    def facts(self) -> dict[str, str]:
        """What every picture of this generator records."""
        facts = {
            "model": self.spec.name,
            "checkpoint": self.spec.checkpoint_hash,
            "licence": self.spec.licence,
            "runtime": self.runtime.name,
            "backend": backend_version(self.runtime.name),
            "edgeflow": __version__,
        }
        if self.sampling is not None:
            facts |= {"steps": str(self.sampling.steps), "guidance": f"{self.sampling.guidance:g}"}
        if isinstance(self.model, Bundle):
            manifest = self.model.manifest
            facts["bundle"] = f"{manifest.backend} {manifest.layout} {manifest.precision}"
        facts |= getattr(self.runtime, "facts", {})  # what a runtime chose on this machine
        return facts

    def inputs(self, prompt: str, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Token ids (1, L) and the seed's noise (1, C, h, w): the same on every runtime."""
        return self.tokenizer.encode(prompt), gaussian_noise(seed, (1, *self.spec.latent_shape))

    def draw(self, prompt: str, seed: int = 0) -> Picture:
        """One picture. Raises UsageError for a prompt that is not text, RuntimeFailure from the backend."""
        start = time.perf_counter()
        input_ids, noise = self.inputs(prompt, seed)
        pixels = to_pixels(run_pipeline(self.runtime, self.spec, input_ids, noise, fused=self._fused))
        latency_ms = (time.perf_counter() - start) * 1000
        facts = {"prompt": prompt, "seed": str(seed), **self.facts}
        return Picture(pixels, prompt, seed, self.tokenizer.dropped_tokens(prompt), latency_ms, facts)


def plan_sampling(
    model: Bundle | Checkpoint, runtime: str | None, steps: int | None, guidance: float | None
) -> Sampling | None:
    """How a many-step model is to be drawn, or None for one that draws in one step.

    Raises CheckpointError for a many-step model without ``steps``, UsageError for steps or guidance of a
    model that has none, or on a runtime other than torch.
    """
    one_step = isinstance(model, Bundle) or model.kind == "one-step"
    if one_step and (steps not in (None, 1) or guidance not in (None, 0, 1)):
        asked = f"--steps {steps}" if steps not in (None, 1) else f"--guidance {guidance:g}"
        raise UsageError(
            f"{asked}: {model.root}: draws in one step without guidance, and was trained for nothing else; "
            "expected a many-step checkpoint (kind rectified-flow or diffusion)"
        )
    if one_step or steps is None:
        expect_one_step(model)
        return None
    assert isinstance(model, Checkpoint)
    if model.kind == "autoencoder":
        expect_one_step(model)
    if runtime not in (None, REFERENCE_RUNTIME):
        raise UsageError(
            f"--steps {steps}: expected the runtime torch, which draws in several, got {runtime!r}"
        )
    return Sampling(steps, float(model.facts["guidance"]) if guidance is None else guidance)


def expect_one_step(model: Bundle | Checkpoint) -> None:
    """Raises CheckpointError for a model that does not draw in one step."""
    if isinstance(model, Bundle):
        kind, steps = "bundle", model.generation.steps
    else:
        kind, steps = model.kind, model.facts["steps"]
    if steps == 1 and kind in ("bundle", "one-step"):
        return
    hint = ""
    if kind != "autoencoder":
        hint = (
            f" of {steps} steps; distil it first: edgeflow train distill -h, or draw it in several with the "
            f"torch runtime: --steps {steps}"
        )
    raise CheckpointError(f"generate: {model.root}: expected a one-step model, got kind {kind!r}{hint}")


def backend_version(runtime: str) -> str:
    """``package version`` of what a loaded runtime runs on, as the imported module itself says."""
    package = registry.REQUIRES.get(runtime, (runtime, ""))[0]
    return f"{package} {getattr(sys.modules.get(package), '__version__', 'unknown')}"
