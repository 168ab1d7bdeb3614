"""What the ecosystem's own clients read beside the graphs of a ``components`` bundle. Torch-free.

diffusers' and OpenVINO GenAI's pipelines draw by a scheduler that they build from a JSON file, and none of
theirs makes the step x₁ = x₀ + v of a rectified flow: each brings a negative sign, or another scale. But one
step need only come out right up to a factor, because the pipelines then divide by the autoencoder's
``scaling_factor``, which is ours to state beside the decoder.

LCMScheduler's last step gives c_skip·x₀ + c_out·(x₀ − √(1−ᾱ)·m) / √ᾱ for the network's output m, where
c_out = s / √(s² + ¼), c_skip = 1 − c_out² and s = 1000 · timestep_scaling (Luo et al. 2023, arXiv 2310.04378,
section 4.1). With c_out = −½ and ᾱ = 144/169 both x₀ and m get the factor 5/24. Its one timestep is
num_train_timesteps − 1 where original_inference_steps is 1, hence 1001 of them: ᾱ before the last is 1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from edgeflow.checkpoint import Checkpoint
from edgeflow.spec import FIRST_TIMESTEP

#: LCM's constant of the boundary condition.
_SIGMA_DATA = 0.5
_C_OUT = -0.5
_ALPHA_BAR = 144 / 169
#: What the scheduler's step leaves x₀ + v multiplied by.
STEP_FACTOR = 5 / 24


def write_client_configs(checkpoint: Checkpoint, folder: Path, backend: str) -> None:
    """Write the configs, and for Core ML the vocabulary, where the backend's clients look for them.

    ONNX: optimum's ORTStableDiffusionPipeline. OpenVINO: GenAI's Text2ImagePipeline and optimum-intel.
    Core ML: Apple's ml-stable-diffusion, whose schedulers are code; it reads no configs.
    """
    decoder = {**checkpoint.config("vae"), "scaling_factor": _scaling_factor(checkpoint)}
    configs = {
        "model_index.json": _index(checkpoint),
        "scheduler/scheduler_config.json": scheduler_config(),
        "text_encoder/config.json": checkpoint.config("text_encoder"),
        "unet/config.json": checkpoint.config("unet"),
        "vae_decoder/config.json": decoder,
    }
    for name, config in configs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    if backend == "coreml":
        for file in checkpoint.files("tokenizer"):
            if file.name in ("vocab.json", "merges.txt"):
                (folder / file.name).write_bytes(file.read_bytes())


def scheduler_config() -> dict[str, Any]:
    """LCMScheduler's config whose single step from noise x₀ is STEP_FACTOR · (x₀ + v), at t = 1000."""
    steps = int(FIRST_TIMESTEP) + 1
    scaled = _C_OUT * _SIGMA_DATA / math.sqrt(1 - _C_OUT**2)
    return {
        "_class_name": "LCMScheduler",
        "beta_end": 0.012,  # not read where trained_betas are given
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": steps,
        "original_inference_steps": 1,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "thresholding": False,
        "timestep_scaling": scaled / FIRST_TIMESTEP,
        "timestep_spacing": "leading",
        "trained_betas": [0.0] * (steps - 1) + [1 - _ALPHA_BAR],
    }


def _scaling_factor(checkpoint: Checkpoint) -> float:
    return checkpoint.generation.latent_scale * STEP_FACTOR


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    """model_index.json: classes by which clients pick their own code, whatever class drew the decoder."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_name_or_path": checkpoint.facts["origin"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
