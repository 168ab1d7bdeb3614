"""The Neural Engine's layout: every module against what it stands for, and what it has no rewrite for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from edgeflow.checkpoint import Checkpoint
from edgeflow.components import load_components
from edgeflow.errors import ExportError
from edgeflow.split_einsum import (
    QUERIES,
    SplitPictureAttention,
    SplitTransformer,
    as_convolution,
    attention,
    split_einsum,
)


def seeded(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_module(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make().eval().requires_grad_(False)


def apart(a: Any, b: Any) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("heads, width", [(8, 40), (8, 80), (8, 160), (3, 32), (5, 7), (1, 512)])
@pytest.mark.parametrize("queries, keys", [(1, 77), (QUERIES, 16), (QUERIES + 65, 33)])
def test_attention_is_torchs_own(heads: int, width: int, queries: int, keys: int) -> None:
    """Head counts of Stable Diffusion, of the built-in model, odd ones, the autoencoder's; a rest."""
    q, k, v = (seeded(1, heads * width, 1, n, seed=i) for i, n in enumerate((queries, keys, keys)))
    mask = seeded(queries, keys, seed=3)

    def by_head(x: Any) -> Any:
        return x.reshape(1, heads, width, -1).transpose(2, 3)

    for given, theirs in ((None, None), (mask.T[None, :, None], mask)):
        expected = F.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v), theirs)
        expected = expected.transpose(2, 3).reshape(q.shape)
        assert apart(attention(q, k, v, heads, given), expected) < 1e-5


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("heads, width", [(8, 40), (3, 32), (5, 8)])
def test_transformers_are_diffusers_own(heads: int, width: int, linear: bool) -> None:
    channels = heads * width
    model = random_module(
        lambda: Transformer2DModel(
            heads,
            width,
            channels,
            num_layers=2,
            norm_num_groups=8,
            cross_attention_dim=24,
            use_linear_projection=linear,
        )
    )
    for layer in model.modules():  # a fresh norm's factor and summand are 1 and 0, which tell nothing
        if isinstance(layer, nn.LayerNorm):
            layer.weight.copy_(1 + 0.3 * seeded(*layer.weight.shape))
            layer.bias.copy_(seeded(*layer.bias.shape, seed=1))
    x, states = seeded(1, channels, 26, 24), seeded(1, 9, 24, seed=1)  # 624 places
    with torch.no_grad():
        (expected,) = model(x, encoder_hidden_states=states, return_dict=False)
        (got,) = SplitTransformer(model)(x, encoder_hidden_states=states, return_dict=False)
    assert apart(got, expected) < 1e-5


def test_the_autoencoders_single_head_is_diffusers_own() -> None:
    attn = random_module(
        lambda: Attention(
            512, heads=1, dim_head=512, residual_connection=True, norm_num_groups=32, bias=True, eps=1e-6
        )
    )
    x = seeded(1, 512, 25, 25)
    with torch.no_grad():
        assert apart(SplitPictureAttention(attn)(x), attn(x)) < 1e-5


@pytest.mark.parametrize("model", ["tiny", "emoji"])
def test_whole_components_are_the_untouched_ones(model: str, tiny_checkpoint: Path) -> None:
    """Against the originals: the rewrite gap itself. None of the modules that were rewritten is left."""
    checkpoint = Checkpoint.open(str(tiny_checkpoint) if model == "tiny" else model)
    names = ("text_encoder", "unet", "pipeline") if model == "tiny" else ("pipeline",)
    for name, component in load_components(checkpoint, names=names, attention="split-einsum").items():
        with torch.no_grad():
            expected = component.original(**component.example)
            got = component.module(**component.example)
        assert apart(got, expected) < 1e-4, name
        left = {type(m).__name__ for m in component.module.modules()}
        assert not left & {"Attention", "Transformer2DModel", "TextLayer", "LayerNorm"} - {"LayerNorm"}
        assert any(t.startswith("Split") for t in left)


def test_a_linear_layer_of_integers_keeps_them(tiny_checkpoint: Path) -> None:
    from edgeflow.quantization.layers import replace_weight

    q = torch.arange(-64, 64, dtype=torch.int8).reshape(4, 32)
    scale, zero_point = seeded(4, 2).abs() + 0.1, torch.tensor([[1, -2]] * 4, dtype=torch.int8)
    layer = nn.Linear(32, 4)
    replace_weight(layer, q, scale, zero_point, 4, (torch.tensor(0.05), torch.tensor(9, dtype=torch.uint8)))
    conv = as_convolution(layer)
    assert type(conv).__name__ == "QuantizedConv2d" and conv.weight_bits == 4
    assert conv.weight_q.shape == (4, 32, 1, 1) and torch.equal(conv.weight_q[:, :, 0, 0], q)
    assert conv.weight_q.data_ptr() == q.data_ptr() and conv.weight_scale.data_ptr() == scale.data_ptr()
    x = seeded(1, 32, 1, 5)
    with torch.no_grad():
        expected = layer(x[:, :, 0].transpose(1, 2)).transpose(1, 2)[:, :, None]
        assert torch.allclose(conv(x), expected, rtol=1e-5, atol=1e-5)


def test_forms_without_a_rewrite_are_refused() -> None:
    def model(**more: Any) -> Any:
        return nn.Sequential(Transformer2DModel(2, 8, 16, norm_num_groups=4, cross_attention_dim=8, **more))

    with pytest.raises(ExportError, match="expected GEGLU feed-forward layers, got"):
        split_einsum(model(activation_fn="gelu"))
    strange = model()
    strange[0].transformer_blocks[0].attn1.norm_q = nn.LayerNorm(8)
    with pytest.raises(ExportError, match="expected plain attention, got one with norm_q"):
        split_einsum(strange)
    with pytest.raises(ExportError, match="expected an attention with norm and residual"):
        split_einsum(nn.Sequential(Attention(16, heads=2, dim_head=8)))
    assert type(model()[0]).__name__ == "Transformer2DModel"  # what was given stays as it is
