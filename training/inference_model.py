"""The model that edgeflow.training.inference_benchmark times: full-size shapes with random weights."""

from __future__ import annotations

import functools
import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgeflow import gpu_device, gpu_rewrites
from edgeflow.components import Decoder, Pipeline, TextEncoder, fold_time
from edgeflow.spec import FIRST_TIMESTEP
from edgeflow.training.random_checkpoint import build_part, configs

FAMILY = "sd15"
#: AutoencoderTiny as published for Stable Diffusion 1; it takes the UNet's latents as they are.
TINY = {"_class_name": "AutoencoderTiny", "latent_channels": 4, "scaling_factor": 1.0}


class Model:
    """Parts, export-ready modules made of them, inputs and the float32 picture, each made when asked for."""

    def __init__(self, width: str, device: str, *, runs: int, compile: bool):
        """Raises DeviceMissing for ``device`` cuda without one."""
        self.chip = gpu_device.require_chip() if device == "cuda" else None
        self.width, self.device, self.runs, self.compile = width, device, runs, compile
        self.configs = configs(FAMILY, width)
        torch.manual_seed(0)

    @functools.cached_property
    def text(self) -> Any:
        return build_part("text_encoder", self.configs["text_encoder"], self.device)

    @functools.cached_property
    def unet(self) -> Any:
        return build_part("unet", self.configs["unet"], self.device)

    @functools.cache  # noqa: B019 - one model a process
    def vae(self, tiny: bool) -> Any:
        if tiny:
            return build_part("tiny decoder", TINY, self.device)
        return build_part("vae", self.configs["vae"], self.device)

    def scale(self, tiny: bool) -> float:
        return float(TINY["scaling_factor"] if tiny else self.configs["vae"]["scaling_factor"])  # type: ignore[arg-type]

    def module(self, graph: str, tiny: bool) -> nn.Module:
        """The export-ready module of pipeline, unet (time folded away) or decoder, float32, not rewritten."""
        if graph == "decoder":
            return Decoder(self.vae(tiny)).eval()
        unet = fold_time(self.unet, FIRST_TIMESTEP)
        if graph == "unet":
            return _Folded(unet).eval()
        return Pipeline(TextEncoder(self.text), unet, Decoder(self.vae(tiny)), self.scale(tiny)).eval()

    def inputs(self, graph: str, batch: int, tiny: bool) -> list[Tensor]:
        """Seeded ids (int32) and noise, or what a component takes, float32, on the host."""
        generator = torch.Generator("cpu").manual_seed(7)
        vocabulary, side = self.configs["text_encoder"]["vocab_size"], self.configs["unet"]["sample_size"]
        ids = torch.randint(0, vocabulary - 2, (batch, 77), generator=generator, device="cpu").int()
        noise = torch.randn(batch, 4, side, side, generator=generator, device="cpu")
        width = self.configs["unet"]["cross_attention_dim"]
        hidden = torch.randn(batch, 77, width, generator=generator, device="cpu")
        return {"pipeline": [ids, noise], "unet": [noise, hidden], "decoder": [noise / self.scale(tiny)]}[
            graph
        ]

    def reference(self, graph: str, batch: int, tiny: bool, count: int) -> Tensor:
        """What the unrewritten float32 modules give, without TF32, for the first ``count`` of a batch."""
        module = self.module(graph, tiny).to(self.device)
        inputs = [t.to(self.device) for t in self.inputs(graph, batch, tiny)]
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with torch.no_grad():
                return torch.cat([module(*(t[i : i + 1] for t in inputs)) for i in range(count)]).cpu()
        finally:
            torch.backends.cudnn.allow_tf32 = before

    @functools.cached_property
    def gflop(self) -> dict[str, dict[str, float]]:
        """Graph → arithmetic of one picture before and after the rewrites; counted, not computed."""
        unet, text = self.configs["unet"], self.configs["text_encoder"]
        ids, noise = self.inputs("pipeline", 1, False)
        hidden = torch.empty(1, 77, unet["cross_attention_dim"])
        with torch.device("meta"):
            modules: dict[str, tuple[nn.Module, list[Tensor]]] = {
                "text encoder": (TextEncoder(_shell("text_encoder", text)), [ids]),
                "unet": (_Folded(fold_time(_shell("unet", unet), FIRST_TIMESTEP)), [noise, hidden]),
                "decoder": (Decoder(_shell("vae", self.configs["vae"])), [noise]),
                "tiny decoder": (Decoder(_shell("vae", TINY)), [noise]),
            }
            found = {name: _count_both(module, inputs) for name, (module, inputs) in modules.items()}
        for name, decoder in (("pipeline", "decoder"), ("pipeline, tiny decoder", "tiny decoder")):
            parts = [found[part] for part in ("text encoder", "unet", decoder)]
            found[name] = {key: round(sum(p[key] for p in parts), 2) for key in ("plain", "rewritten")}
        return found

    def machine(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"torch": torch.__version__, "device": self.device}
        if self.chip is not None:
            facts |= {"gpu": self.chip.name, **self.chip.versions(), "cudnn": self.chip.cudnn}
        return facts

    def free(self) -> None:
        """Give back what the row before has left."""
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


class _Folded(nn.Module):
    """The UNet without time as a function of tensors alone: (N, C, h, w), (N, L, D) → (N, C, h, w)."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, FIRST_TIMESTEP, encoder_hidden_states, return_dict=False)[0]


def _shell(part: str, config: dict[str, Any]) -> Any:
    """A part without weights, on the meta device."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    if part == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**config))
    cls = getattr(diffusers, config["_class_name"])
    return cls(**{k: v for k, v in config.items() if not k.startswith("_")})


def _count_both(module: nn.Module, inputs: list[Tensor]) -> dict[str, float]:
    """GFLOP of one call as it is and rewritten; attention in its plain form, which the counter knows."""
    found = {}
    for name, of in (("plain", module), ("rewritten", gpu_rewrites.rewritten(module)[0])):
        empty = [torch.empty(t.shape, dtype=t.dtype) for t in inputs]
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            of(*empty)
        found[name] = round(counter.get_total_flops() / 1e9, 2)
    return found
