"""A checkpoint of random weights in exactly the layout, shapes and config keys of a published one.

    python -m edgeflow.training.random_checkpoint --family sd15 --width narrow -o DIR

For tests and benchmarks where the published weights cannot be had. ``full`` has the sizes of InstaFlow-0.9B
(sd15: UNet 859.5 M, CLIP ViT-L/14 text encoder 123.1 M, AutoencoderKL 83.7 M) or of Stable Diffusion
2.1-base (sd21); ``narrow`` is the same form with a few dozen channels. Configs are written key by key as the
hub has them, not as the installed libraries would write them; there is no edgeflow.json, as in any published
folder. The safety checker is left out. The vocabulary has CLIP's size and form, not its words.

Weights keep activations in a trained model's range: every layer has variance 1/fan-in, what a residual branch
adds is halved, and the two outputs are scaled after one forward pass so that the velocity has the standard
deviation √2 of x₁ − x₀ (both of unit variance) and the decoder's picture 0.5. ``--check`` prints what was
measured on a second input: standard deviation and largest magnitude of every block.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeflow.errors import EdgeflowError
from edgeflow.loading import quiet_libraries
from edgeflow.staging import staged_folder
from edgeflow.tokenizer import END
from edgeflow.training.random_vocabulary import write_tokenizer

FAMILIES, WIDTHS, FILES = ("sd15", "sd21"), ("full", "narrow"), ("full", "fp16", "both")
#: Kind → pipeline class and the name that the published folder records (2-RF shares InstaFlow's class).
KINDS = {
    "one-step": ("RectifiedFlowPipeline", "XCLIU/instaflow_0_9B_from_sd_1_5"),
    "rectified-flow": ("RectifiedFlowPipeline", "XCLIU/2_rectified_flow_from_sd_1_5"),
    "diffusion": ("StableDiffusionPipeline", "runwayml/stable-diffusion-v1-5"),
}
VELOCITY_STD, PICTURE_STD, BRANCH = math.sqrt(2), 0.5, 0.5
_UNET = {
    "act_fn": "silu",
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_VAE = {
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
}
_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


@dataclass(frozen=True)
class Shape:
    """The sizes in which the families and widths differ."""

    unet_channels: tuple[int, ...]
    heads: int | list[int]  # diffusers calls it attention_head_dim
    vae_channels: tuple[int, ...]
    latent_side: int
    text_width: int
    text_layers: int
    text_heads: int
    text_inner: int
    vocabulary: int


_FULL, _NARROW = ((320, 640, 1280, 1280), (128, 256, 512, 512)), ((32, 32, 64, 64), (32, 32, 32, 32))
SHAPES = {
    ("sd15", "full"): Shape(_FULL[0], 8, _FULL[1], 64, 768, 12, 12, 3072, 49408),
    ("sd21", "full"): Shape(_FULL[0], [5, 10, 20, 20], _FULL[1], 64, 1024, 23, 16, 4096, 49408),
    ("sd15", "narrow"): Shape(_NARROW[0], 8, _NARROW[1], 8, 64, 2, 4, 256, 1190),
    ("sd21", "narrow"): Shape(_NARROW[0], [1, 2, 4, 4], _NARROW[1], 8, 96, 3, 6, 384, 1190),
}


def configs(family: str, width: str) -> dict[str, dict[str, Any]]:
    """``config.json`` of unet, vae and text_encoder, as published."""
    shape = SHAPES[family, width]
    second = family == "sd21"
    unet = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.19.3",
        **_UNET,
        "attention_head_dim": shape.heads,
        "block_out_channels": list(shape.unet_channels),
        "cross_attention_dim": shape.text_width,
        "sample_size": shape.latent_side,
        **({"use_linear_projection": True, "dual_cross_attention": False} if second else {}),
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.19.3",
        **_VAE,
        "block_out_channels": list(shape.vae_channels),
        "sample_size": 8 * shape.latent_side,
    }
    text = {
        "architectures": ["CLIPTextModel"],
        **_TEXT,
        "hidden_act": "gelu" if second else "quick_gelu",
        "hidden_size": shape.text_width,
        "intermediate_size": shape.text_inner,
        "num_attention_heads": shape.text_heads,
        "num_hidden_layers": shape.text_layers,
        "projection_dim": 512 if second else shape.text_width,
        "vocab_size": shape.vocabulary,
    }
    return {"unet": unet, "vae": vae, "text_encoder": text}


def build_random_checkpoint(
    out: Path,
    *,
    family: str = "sd15",
    width: str = "narrow",
    kind: str = "one-step",
    files: str = "full",
    max_shard_size: str = "10GB",
    seed: int = 0,
    force: bool = False,
    check: bool = False,
) -> list[str]:
    """Write the checkpoint folder; the same arguments give the same bytes. Returns the lines of ``check``.

    ``files``: full (fp32), fp16 (*.fp16.safetensors alone) or both. ``max_shard_size`` as in diffusers; a
    larger part becomes shards with an index. Raises OutputExistsError.
    """
    for value, known in ((family, FAMILIES), (width, WIDTHS), (kind, KINDS), (files, FILES)):
        if value not in known:
            raise ValueError(f"{value!r} is not known; known: {', '.join(known)}")
    shape, lines = SHAPES[family, width], []
    with quiet_libraries(), staged_folder(out, force=force) as stage, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, config in configs(family, width).items():
            model = build_part(part, config)
            if check:
                lines += _ranges(part, model, config)
            _save(model, stage / part, files, max_shard_size)
            _write_json(stage / part / "config.json", config)
            del model
        write_tokenizer(stage / "tokenizer", shape.vocabulary, pad="!" if family == "sd21" else END)
        _write_json(stage / "scheduler" / "scheduler_config.json", _SCHEDULER)
        _write_json(stage / "model_index.json", _index(kind))
    return lines


def _index(kind: str) -> dict[str, Any]:
    name, origin = KINDS[kind]
    return {
        "_class_name": name,
        "_diffusers_version": "0.19.3",
        "_name_or_path": origin,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def build_part(part: str, config: dict[str, Any], device: str | torch.device = "cpu") -> Any:
    """The part (unet, vae or text_encoder) of ``configs`` with scaled random weights, in eval mode."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):  # libraries' own initialisation would only be overwritten
        if part == "text_encoder":
            model: Any = CLIPTextModel(CLIPTextConfig(**config))
        else:
            cls = getattr(diffusers, config["_class_name"])
            model = cls(**{k: v for k, v in config.items() if not k.startswith("_")})
    model = model.to_empty(device=device).eval().requires_grad_(False)
    _initialise(model)
    with torch.no_grad():
        if part == "unet":
            probe = {name: tensor.to(device) for name, tensor in _probe(part, config).items()}
            model.conv_out.weight *= VELOCITY_STD / model(**probe).sample.std()
        elif part == "vae":
            picture = model.decode(_probe(part, config)["z"].to(device)).sample
            model.decoder.conv_out.weight *= PICTURE_STD / picture.std()
    return model


#: Last layers of residual branches, by the end of their names.
_BRANCH_ENDS = (".conv2", ".to_out.0", ".ff.net.2", ".proj_out", ".out_proj", ".fc2")


def _initialise(model: nn.Module) -> None:
    """Every tensor anew, in the order of names: norms are the identity, biases 0, weights 1/fan-in."""
    for name, module in sorted(model.named_modules()):
        for key, tensor in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                tensor.normal_(std=0.02 if "token" in name else 0.01)  # CLIP's own
            elif tensor.dim() < 2:
                tensor.fill_(1.0 if key == "weight" else 0.0)
            else:
                std = 1 / math.sqrt(tensor[0].numel())
                tensor.normal_(std=std * (BRANCH if name.endswith(_BRANCH_ENDS) else 1.0))
        for key, buffer in module.named_buffers(recurse=False):
            if key != "position_ids":
                raise ValueError(f"buffer {name}.{key}: expected none but position_ids")
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))


def _probe(part: str, config: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Seeded inputs of the size that a forward pass needs at least: a latent of 16 × 16."""
    noise = torch.Generator("cpu").manual_seed(seed)
    if part == "text_encoder":
        return {"input_ids": torch.randint(0, config["vocab_size"] - 2, (1, 77), generator=noise)}
    latent = torch.randn(1, 4, 16, 16, generator=noise)
    if part == "vae":
        return {"z": latent / config["scaling_factor"]}
    text = torch.randn(1, 77, config["cross_attention_dim"], generator=noise)
    return {"sample": latent, "timestep": torch.tensor([1000.0]), "encoder_hidden_states": text}


def _ranges(part: str, model: Any, config: dict[str, Any]) -> list[str]:
    """Standard deviation and largest magnitude of what each block gives, one line each."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                values = f"std {tensor.std():9.3f}  max {tensor.abs().max():9.2f}"
                found.append(f"{part + '.' + name:58s} {values}")

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in _blocks(model)]
    probe = _probe(part, config, seed=2)
    with torch.no_grad():
        model.decode(probe["z"]) if part == "vae" else model(**probe)
    for hook in hooks:
        hook.remove()
    return found


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = ("ResnetBlock2D", "Transformer2DModel", "Attention", "CLIPEncoderLayer", "Conv2d", "LayerNorm")
    for name, module in model.named_modules():
        kind = type(module).__name__
        last = kind not in ("Conv2d", "LayerNorm") or name.endswith(
            ("conv_in", "conv_out", "final_layer_norm")
        )
        if kind in kinds and last and not (kind == "Attention" and "transformer_blocks" in name):
            yield name, module


def _save(model: Any, folder: Path, files: str, max_shard_size: str) -> None:
    if files in ("full", "both"):
        _save_one(model, folder, None, max_shard_size)
    if files in ("fp16", "both"):
        half = copy.deepcopy(model).half() if files == "both" else model.half()
        _save_one(half, folder, "fp16", max_shard_size)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def _save_one(model: Any, folder: Path, variant: str | None, max_shard_size: str) -> None:
    if hasattr(model, "embeddings"):  # transformers ≥ 5.6 would leave out the prefix of the hub's files
        folder.mkdir(parents=True, exist_ok=True)
        name = "model.fp16.safetensors" if variant else "model.safetensors"
        tensors = {f"text_model.{key}": tensor for key, tensor in model.state_dict().items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    else:
        model.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeflow.training.random_checkpoint",
        description="Write a checkpoint of random weights in a published one's exact layout and shapes.",
        epilog="example: python -m edgeflow.training.random_checkpoint --family sd15 -o narrow",
    )
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--width", choices=WIDTHS, default="narrow")
    parser.add_argument("--kind", choices=tuple(KINDS), default="one-step")
    parser.add_argument("--files", choices=FILES, default="full", help="fp32, *.fp16.safetensors, or both")
    parser.add_argument("--max-shard-size", default="10GB", metavar="SIZE")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--check", action="store_true", help="print the range of every block's activations")
    parser.add_argument("--force", action="store_true", help="replace an output that already exists")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    options = vars(parser.parse_args(argv))
    try:
        lines = build_random_checkpoint(options.pop("out"), **options)
    except EdgeflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines), end="\n" if lines else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
