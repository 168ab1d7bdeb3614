"""The components of a one-step model: the only things that get exported.

A component is an ``nn.Module`` with named inputs and one named output, plus the untouched modules of
diffusers and transformers that it rewrites, so that what the rewrite changed can be measured.

The rewrites, and why:

- CLIP's causal mask is a finite constant: −∞ has no place in float16 graphs.
- The UNet's sinusoidal time embedding is expanded around t = 1000 (``AnchoredTimesteps``): the angle
  1000·f has an error of half a radian in float16, the angle (t − 1000)·f has none where the model is used.
- In the pipeline t is the constant 1000, so each block's projected time embedding is a constant added
  after its first convolution: it is folded into that convolution's bias.
- A pipeline that is exported upsamples and convolves in one (edgeflow.upsampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeflow.apple import FUSED
from edgeflow.checkpoint import KINDS, Checkpoint
from edgeflow.errors import ExportError
from edgeflow.loading import check_classes, load_part
from edgeflow.sharing import sharing_copy
from edgeflow.spec import COMPONENTS, FIRST_TIMESTEP, PIPELINE, GenerationSpec, TensorSpec
from edgeflow.upsampling import merge_upsampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What the pipeline's picture can be.
PICTURES = ("float32", "uint8")
#: Added to an attention logit to mask it: its exponential is 0 in every precision, and float16 holds it.
MASKED = -1e4


@dataclass(frozen=True)
class ComponentSpec:
    """A component's name and its tensors; a tensor's ``key`` is its name (exporters give it their own)."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Component:
    """An export-ready module, what it stands for, and what it was.

    ``module`` and ``original`` take the spec's inputs by name and return the one output tensor;
    ``original`` runs the untouched modules. ``example`` holds seeded inputs of the spec's shapes and dtypes.
    """

    spec: ComponentSpec
    module: nn.Module
    original: Callable[..., Tensor]
    example: dict[str, Tensor]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The export-ready module in eager fp32 on NumPy arrays, cast to the spec's dtypes."""
        return self._call(self.module, inputs)

    def run_original(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The untouched modules in eager fp32 on the same arrays."""
        return self._call(self.original, inputs)

    def _call(self, function: Callable[..., Tensor], inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        names = [t.name for t in self.spec.inputs]
        if set(inputs) != set(names):
            raise ValueError(f"component {self.spec.name}: expected inputs {names}, got {sorted(inputs)}")
        tensors = {t.name: torch.as_tensor(inputs[t.name]).to(_DTYPES[t.dtype]) for t in self.spec.inputs}
        with torch.no_grad():
            return {self.spec.outputs[0].name: function(**tensors).numpy()}


_DTYPES = {"float32": torch.float32, "int32": torch.int32, "uint8": torch.uint8}


#: Component → the parts of a checkpoint that it is made from.
PARTS_OF: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("text_encoder",),
    "unet": ("unet",),
    "decoder": ("vae",),
    PIPELINE: ("text_encoder", "unet", "vae"),
}


def load_components(
    checkpoint: Checkpoint,
    picture: str = "float32",
    names: Sequence[str] = (*COMPONENTS, PIPELINE),
    attention: str = FUSED,
    merged: bool = False,
) -> dict[str, Component]:
    """The components of a one-step checkpoint by name, those of ``names``: by default all.

    Weights are fp32, whatever the files hold; only the parts that ``names`` need are read. ``picture`` is the
    pipeline's output: float32 in [0, 1] or uint8; ``attention`` other than fused is the Neural Engine's
    layout (edgeflow.split_einsum); ``merged`` upsamples in the pipeline's decoder as bundles have it
    (edgeflow.upsampling). Raises ExportError for a model that does not draw in one step or whose
    parts are of a class edgeflow has no rewrite for, CheckpointError for weights that do not fit it.
    """
    check_exportable(checkpoint)
    spec = checkpoint.generation
    needed = {part for name in names for part in PARTS_OF[name]}
    text, unet, vae = (
        load_part(checkpoint, part) if part in needed else None for part in ("text_encoder", "unet", "vae")
    )
    text_encoder = None if text is None else TextEncoder(text)
    decoder = None if vae is None else Decoder(vae)

    def module(name: str) -> nn.Module:
        if name == "text_encoder" and text_encoder is not None:
            return text_encoder
        if name == "decoder" and decoder is not None:
            return decoder
        if name == "unet":
            return Velocity(_anchored(unet))
        assert text_encoder is not None and decoder is not None
        last = merge_upsampling(decoder) if merged else decoder
        return Pipeline(text_encoder, fold_time(unet, spec.timestep), last, spec.latent_scale)

    originals = _originals(text, unet, vae, spec)
    components = {
        s.name: Component(s, module(s.name).eval(), originals[s.name], _example(s, spec.latent_scale))
        for s in _component_specs(spec, int(checkpoint.config("text_encoder")["hidden_size"]))
        if s.name in names
    }
    if attention != FUSED:
        from edgeflow.split_einsum import split_einsum

        components = {n: replace(c, module=split_einsum(c.module)) for n, c in components.items()}
    if PIPELINE in components:
        components[PIPELINE] = with_picture(components[PIPELINE], picture)
    return components


def with_picture(pipeline: Component, picture: str) -> Component:
    """The float32 pipeline component with its picture as float32 or uint8. Raises ValueError for others."""
    if picture not in PICTURES:
        raise ValueError(f"picture {picture!r} is not known; known: {PICTURES}")
    if picture == "float32":
        return pipeline
    (image,) = pipeline.spec.outputs

    def original(**inputs: Tensor) -> Tensor:
        return _to_bytes(pipeline.original(**inputs))

    spec = replace(pipeline.spec, outputs=(replace(image, dtype=picture),))
    return replace(pipeline, spec=spec, module=BytePipeline(pipeline.module).eval(), original=original)


def check_exportable(checkpoint: Checkpoint) -> None:
    """Raise ExportError unless the checkpoint is a one-step model of known parts. Reads no weights."""
    if checkpoint.kind != "one-step":
        raise ExportError(
            f"export: {checkpoint.name}: expected a one-step model, got kind {checkpoint.kind!r}, which "
            f"needs several steps and cannot be drawn in one; known kinds: {', '.join(KINDS)}"
        )
    check_classes(checkpoint)


def _component_specs(spec: GenerationSpec, text_width: int) -> tuple[ComponentSpec, ...]:
    """The specs of all components, batch 1 (see edgeflow.spec.GraphSpec for the names)."""

    def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name, shape, dtype, name)

    ids = tensor("input_ids", 1, spec.max_tokens, dtype="int32")
    text = (1, spec.max_tokens, text_width)
    latent = (1, *spec.latent_shape)
    image = (1, 3, spec.picture_size, spec.picture_size)
    unet_inputs = (
        tensor("sample", *latent),
        tensor("timestep", 1),
        tensor("encoder_hidden_states", *text),
    )
    return (
        ComponentSpec("text_encoder", (ids,), (tensor("last_hidden_state", *text),)),
        ComponentSpec("unet", unet_inputs, (tensor("velocity", *latent),)),
        ComponentSpec("decoder", (tensor("latent", *latent),), (tensor("image", *image),)),
        ComponentSpec(PIPELINE, (ids, tensor("noise", *latent)), (tensor("image", *image),)),
    )


# --- export-ready modules -------------------------------------------------------------------------------


class TextEncoder(nn.Module):
    """CLIP's text transformer with its causal mask as a finite constant: ids (1, L) → (1, L, D)."""

    mask: Tensor
    positions: Tensor

    def __init__(self, model: Any):
        super().__init__()
        length = model.config.max_position_embeddings
        self.token_embedding = model.embeddings.token_embedding
        self.register_buffer("positions", model.embeddings.position_embedding.weight.detach()[None, :length])
        self.register_buffer("mask", torch.full((length, length), MASKED).triu(1)[None, None])
        self.layers = nn.ModuleList(TextLayer(layer) for layer in model.encoder.layers)
        self.final_layer_norm = model.final_layer_norm

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token_embedding(input_ids) + self.positions
        for layer in self.layers:
            x = layer(x, self.mask)
        return self.final_layer_norm(x)


class TextLayer(nn.Module):
    """One pre-norm transformer layer: (1, L, D) → (1, L, D)."""

    def __init__(self, layer: Any):
        super().__init__()
        self.num_heads = layer.self_attn.num_heads
        self.norm1, self.norm2, self.mlp = layer.layer_norm1, layer.layer_norm2, layer.mlp
        self.q_proj, self.k_proj = layer.self_attn.q_proj, layer.self_attn.k_proj
        self.v_proj, self.out_proj = layer.self_attn.v_proj, layer.self_attn.out_proj

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (self._heads(p(h)) for p in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out_proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm2(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)


class AnchoredTimesteps(nn.Module):
    """The sinusoidal embedding of t as a rotation of the embedding of 1000 by (t − 1000)·f.

    sin(1000f + df) = sin(1000f)·cos(df) + cos(1000f)·sin(df), so at t = 1000 no large angle is ever computed.
    Takes t (N,), gives (N, 2·half), in diffusers' order.
    """

    frequency: Tensor
    sin0: Tensor
    cos0: Tensor

    def __init__(self, original: Any, anchor: float = FIRST_TIMESTEP):
        super().__init__()
        half = original.num_channels // 2
        steps = torch.arange(half, dtype=torch.float32) / (half - original.downscale_freq_shift)
        first, second = original(torch.tensor([anchor])).split(half, dim=-1)
        self.anchor, self.flip = anchor, original.flip_sin_to_cos
        self.register_buffer("frequency", original.scale * torch.exp(-math.log(10000) * steps)[None])
        self.register_buffer("sin0", second if self.flip else first)
        self.register_buffer("cos0", first if self.flip else second)

    def forward(self, timesteps: Tensor) -> Tensor:
        # A product of matrices: OpenVINO would turn a plain one into t·f − 1000·f, and round both to float16.
        angle = (timesteps[:, None] - self.anchor) @ self.frequency
        sin, cos = torch.sin(angle), torch.cos(angle)
        parts = (self.sin0 * cos + self.cos0 * sin, self.cos0 * cos - self.sin0 * sin)
        return torch.cat(parts[::-1] if self.flip else parts, dim=-1)


class Velocity(nn.Module):
    """The UNet as a function of tensors alone: (1, C, h, w), (1,), (1, L, D) → velocity (1, C, h, w)."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class Decoder(nn.Module):
    """The autoencoder's decoder: latent (1, C, h, w), divided by the scale → (1, 3, H, W) in [-1, 1]."""

    def __init__(self, vae: Any):
        super().__init__()
        self.decoder = vae.decoder
        has_quant = getattr(vae, "post_quant_conv", None) is not None
        self.post_quant_conv = vae.post_quant_conv if has_quant else nn.Identity()

    def forward(self, latent: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent))


class Pipeline(nn.Module):
    """ids (1, L) and noise x₀ (1, C, h, w) → the picture of x₁ = x₀ + v(x₀, 1000), (1, 3, H, W) in [0, 1]."""

    def __init__(self, text_encoder: nn.Module, folded: nn.Module, decoder: nn.Module, scale: float):
        super().__init__()
        self.text_encoder, self.unet, self.decoder, self.scale = text_encoder, folded, decoder, scale

    def forward(self, input_ids: Tensor, noise: Tensor) -> Tensor:
        text = self.text_encoder(input_ids)
        velocity = self.unet(noise, FIRST_TIMESTEP, text, return_dict=False)[0]
        return to_unit(self.decoder((noise + velocity) / self.scale))


class BytePipeline(nn.Module):
    """A pipeline whose picture is uint8."""

    def __init__(self, pipeline: nn.Module):
        super().__init__()
        self.pipeline = pipeline

    def forward(self, input_ids: Tensor, noise: Tensor) -> Tensor:
        return _to_bytes(self.pipeline(input_ids, noise))


def to_unit(image: Tensor) -> Tensor:
    """[-1, 1] → [0, 1]."""
    return (image / 2 + 0.5).clamp(0, 1)


def _to_bytes(unit: Tensor) -> Tensor:
    """[0, 1] → uint8, rounding half to even."""
    return (unit * 255).round().to(torch.uint8)


# --- rewrites of the UNet -------------------------------------------------------------------------------


class _NoTime(nn.Module):
    """Stands where a folded-away time embedding was: a ResnetBlock2D skips an embedding of None."""

    def forward(self, *_: Any) -> None:
        return None


def _anchored(unet: Any) -> Any:
    if type(unet.time_proj).__name__ != "Timesteps":
        kind = unet.config.time_embedding_type
        raise ExportError(f"export: unet: expected a positional time embedding, got {kind!r}")
    twin = sharing_copy(unet)
    twin.time_proj = AnchoredTimesteps(unet.time_proj)
    return twin


def fold_time(unet: Any, timestep: float) -> Any:
    """A UNet without time: what each block adds for ``timestep`` is in its first convolution's bias."""
    twin = sharing_copy(unet)
    with torch.no_grad():
        at = torch.tensor([timestep], device=next(unet.parameters()).device)
        embedding = unet.time_embedding(unet.time_proj(at))
        for block in twin.modules():
            if getattr(block, "time_emb_proj", None) is None:
                continue
            if block.time_embedding_norm != "default" or block.skip_time_act:
                kind = block.time_embedding_norm
                raise ExportError(f"export: unet: expected blocks that add the time embedding, got {kind!r}")
            added = block.time_emb_proj(block.nonlinearity(embedding))[0]
            conv = sharing_copy(block.conv1)
            conv.bias = nn.Parameter(added if conv.bias is None else conv.bias + added, requires_grad=False)
            block.conv1, block.time_emb_proj = conv, None
    twin.time_proj, twin.time_embedding = None, _NoTime()
    twin.get_time_embed = lambda sample, timestep: None
    return twin


# --- originals and examples -----------------------------------------------------------------------------


def _originals(text: Any, unet: Any, vae: Any, spec: GenerationSpec) -> dict[str, Callable[..., Tensor]]:
    """The same functions through the untouched modules, as Stable Diffusion's pipeline calls them."""

    def text_encoder(input_ids: Tensor) -> Tensor:
        return text(input_ids.long()).last_hidden_state

    def velocity(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return unet(sample, timestep, encoder_hidden_states=encoder_hidden_states).sample

    def decoder(latent: Tensor) -> Tensor:
        return vae.decode(latent).sample

    def pipeline(input_ids: Tensor, noise: Tensor) -> Tensor:
        hidden = text_encoder(input_ids)
        latent = noise + velocity(noise, torch.tensor([spec.timestep]), hidden)
        return to_unit(decoder(latent / spec.latent_scale))

    return {"text_encoder": text_encoder, "unet": velocity, "decoder": decoder, PIPELINE: pipeline}


def _example(spec: ComponentSpec, latent_scale: float) -> dict[str, Tensor]:
    """Seeded inputs: small token ids, Gaussian noise, latents of a real one's size, the first timestep."""
    generator = torch.Generator("cpu").manual_seed(0)

    def tensor(t: TensorSpec) -> Tensor:
        if t.name == "input_ids":
            return torch.arange(t.shape[-1], dtype=_DTYPES[t.dtype])[None]
        if t.name == "timestep":
            return torch.full(t.shape, FIRST_TIMESTEP)
        noise = torch.randn(t.shape, generator=generator)
        return noise / latent_scale if t.name == "latent" else noise

    return {t.name: tensor(t) for t in spec.inputs}
