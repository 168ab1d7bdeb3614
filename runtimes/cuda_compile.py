"""A one-step checkpoint as compiled graphs: each component rewritten, cast, compiled and captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeflow import gpu_device, gpu_precision, gpu_rewrites
from edgeflow.checkpoint import Checkpoint
from edgeflow.components import Component, load_components, with_picture
from edgeflow.errors import RuntimeFailure
from edgeflow.gpu_precision import DTYPES, Tail
from edgeflow.noise import gaussian_noise
from edgeflow.runtimes.cuda_graph import Captured
from edgeflow.runtimes.cuda_quantized import float_layers, integer_linears
from edgeflow.spec import PIPELINE
from edgeflow.tokenizer import ClipTokenizer

_DTYPES = {"float32": torch.float32, "int32": torch.int32}


@dataclass(frozen=True)
class How:
    """What is made of a checkpoint."""

    precision: str = "fp16"
    device: str = "cuda"
    compile: bool = True
    rewrites: tuple[str, ...] = tuple(gpu_rewrites.REWRITES)
    attention: str | None = None  # None: the fastest is measured


class CompiledCheckpoint:
    """Builds a component's function on demand; ``facts`` says what was chosen on the way."""

    def __init__(self, checkpoint: Checkpoint, how: How):
        self.how, self._spec = how, checkpoint.generation
        self.components = load_components(checkpoint)
        self.components[PIPELINE] = with_picture(self.components[PIPELINE], "uint8")
        self._probe = self._probed(checkpoint)
        self.tail = self._find_tail()
        self.facts = {
            "precision": how.precision,
            "tail": "none" if self.tail.start is None else f"bf16 from the decoder's {self.tail.start}",
        }

    def build(self, graph: str) -> Callable[..., Tensor]:
        """The function of a component: tensors in its spec's order → its output.

        Raises RuntimeFailure where it cannot be captured or its output is not finite.
        """
        module, counts = self.assemble(graph)
        self.facts["rewrites"] = ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"
        inputs = self.example(graph)
        if self.how.device == "cuda":
            self._choose_attention(module, inputs)
        function: Callable[..., Tensor] = module
        if self.how.compile:
            function = torch.compile(module, fullgraph=True, dynamic=False)
        with gpu_device.attention_order(self.facts.get("attention")):
            if self.how.device == "cuda":
                function = Captured(function, inputs)
            self._check(graph, function, inputs)
        return function

    def assemble(self, graph: str) -> tuple[nn.Module, dict[str, int]]:
        """The component's module on the device, not compiled, and what was rewritten or kept in it."""
        source, kept = float_layers(self.components[graph].module)
        module, counts = gpu_rewrites.rewritten(source, self.how.rewrites)
        tail = self.tail if gpu_precision.decoder_of(module) is not None else None
        module = gpu_precision.assembled(module, DTYPES[self.how.precision], self.how.device, tail)
        integer_linears(module, DTYPES[self.how.precision])
        return module, {**counts, **kept}

    def example(self, graph: str) -> list[Tensor]:
        """The probe's inputs of a component on the device: the model's first prompt, the noise of seed 0."""
        spec, given = self.components[graph].spec, self._inputs_of(graph)
        return [torch.as_tensor(given[t.name]).to(self.how.device, _DTYPES[t.dtype]) for t in spec.inputs]

    def _inputs_of(self, graph: str) -> dict[str, Any]:
        probe = self._probe
        return {
            PIPELINE: {"input_ids": probe["input_ids"], "noise": probe["noise"]},
            "text_encoder": {"input_ids": probe["input_ids"]},
            "unet": {
                "sample": probe["noise"],
                "timestep": np.array([self._spec.timestep], np.float32),
                "encoder_hidden_states": probe["hidden"],
            },
            "decoder": {"latent": probe["latent"]},
        }[graph]

    def _probed(self, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        """The first prompt through text encoder and UNet in float32, on the device that will run them."""
        spec = self._spec
        ids = ClipTokenizer.from_folder(spec.tokenizer_dir).encode(spec.prompts[0])
        noise = gaussian_noise(0, (1, *spec.latent_shape))
        text, unet = (self._float32(self.components[name]) for name in ("text_encoder", "unet"))
        with torch.no_grad():
            at, timestep = torch.as_tensor(noise).to(self.how.device), torch.tensor([spec.timestep])
            hidden = text(torch.as_tensor(ids).to(self.how.device, torch.int32))
            latent = (at + unet(at, timestep.to(self.how.device), hidden)) / spec.latent_scale
        return {
            "input_ids": ids,
            "noise": noise,
            "hidden": hidden.cpu().numpy(),
            "latent": latent.cpu().numpy(),
        }

    def _float32(self, component: Component) -> nn.Module:
        plain, _ = float_layers(component.module, everything=True)
        return gpu_precision.assembled(plain, torch.float32, self.how.device)

    def _find_tail(self) -> Tail:
        module = self._float32(self.components["decoder"])
        latent = torch.as_tensor(self._probe["latent"]).to(self.how.device)
        tail = gpu_precision.find_tail(gpu_precision.decoder_of(module), lambda: module(latent))
        return tail if self.how.precision == "fp16" else replace(tail, start=None)

    def _choose_attention(self, module: nn.Module, inputs: list[Tensor]) -> None:
        if "attention" in self.facts:
            return
        if self.how.attention is not None:
            self.facts["attention"] = self.how.attention
            return
        shapes = gpu_device.attention_shapes(module, inputs)
        name, total = gpu_device.choose_attention(shapes, DTYPES[self.how.precision])
        self.facts["attention"] = name
        self.facts["attention_ms"] = ", ".join(f"{key} {ms:.3f}" for key, ms in total.items())

    def _check(self, graph: str, function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        """A picture in bytes cannot tell, so its decoder is asked: every value must be finite."""
        with torch.no_grad():
            output = function(*inputs)
            if output.dtype == torch.uint8:
                inner, _ = self.assemble("decoder")
                output = inner(*self.example("decoder"))
        if not bool(torch.isfinite(output).all()):
            raise RuntimeFailure(
                f"runtime cuda: graph {graph}: expected finite values in {self.how.precision}, got others"
            )
