"""Each rewrite for the GPU by itself against the unrewritten modules, float32, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from edgeflow import gpu_attention, gpu_convolutions, gpu_norms  # noqa: E402
from edgeflow import gpu_precision as half  # noqa: E402
from edgeflow import gpu_rewrites as gpu  # noqa: E402
from edgeflow.checkpoint import Checkpoint  # noqa: E402
from edgeflow.components import Component, Decoder, Velocity, load_components, with_picture  # noqa: E402
from edgeflow.training.random_checkpoint import build_part, build_random_checkpoint, configs  # noqa: E402

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pipelines(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Component]:
    """The pipeline of the shipped form (tiny decoder) and of Stable Diffusion's (AutoencoderKL), narrow."""
    narrow = tmp_path_factory.mktemp("sd") / "narrow"
    build_random_checkpoint(narrow, family="sd15", width="narrow")
    folders = {"tiny": tiny_checkpoint, "sd15": narrow}
    return {k: load_components(Checkpoint.open(folder))["pipeline"] for k, folder in folders.items()}


def close(expected: Tensor, got: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert float((got - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def inputs(component: Component, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = component.example["noise"].shape
    ids = torch.randint(0, 400, (batch, component.example["input_ids"].shape[1]), generator=generator)
    return {"input_ids": ids.int(), "noise": torch.randn(batch, *shape[1:], generator=generator)}


@pytest.mark.parametrize("model", ["tiny", "sd15"])
@pytest.mark.parametrize("name", [*gpu.REWRITES, "all"])
def test_a_rewrite_changes_nothing_but_the_arithmetic(
    pipelines: dict[str, Component], model: str, name: str
) -> None:
    pipeline = pipelines[model]
    names = None if name == "all" else [name]
    module, counts = gpu.rewritten(pipeline.module, names)
    with torch.no_grad():
        close(pipeline.original(**inputs(pipeline, 1)), module(**inputs(pipeline, 1)))
        close(pipeline.module(**inputs(pipeline)), module(**inputs(pipeline)))
    expected = set(gpu.REWRITES) if name == "all" else {name}
    assert set(counts) == expected
    # No head of these narrow models is wide.
    assert all((count > 0) is (key != "wide_attention") for key, count in counts.items())


def test_the_rewrites_reach_every_place_of_stable_diffusion() -> None:
    """Counted on the full-size shapes, which are only built, not filled: 16 blocks of two attentions, …"""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    shapes = configs("sd15", "full")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{k: v for k, v in shapes["unet"].items() if k[0] != "_"})
        vae = AutoencoderKL(**{k: v for k, v in shapes["vae"].items() if k[0] != "_"})
    _, of_unet = gpu.rewritten(Velocity(unet))
    _, of_decoder = gpu.rewritten(Decoder(vae))
    unets = {"qkv": 32, "text_kv": 16, "wide_attention": 0, "upsample": 3, "product": 49}
    decoders = {"qkv": 1, "text_kv": 0, "wide_attention": 1, "upsample": 3, "product": 0}
    assert of_unet == unets | {"norm": 61}
    assert of_decoder == decoders | {"norm": 30}


def test_the_original_is_left_as_it_is(pipelines: dict[str, Component]) -> None:
    pipeline = pipelines["sd15"]
    before = {name: tensor.clone() for name, tensor in pipeline.module.state_dict().items()}
    module, _ = gpu.rewritten(pipeline.module)
    half.assembled(module, torch.bfloat16, "cpu")
    after = pipeline.module.state_dict()
    assert list(after) == list(before)
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
        for name, tensor in before.items()
    )


def test_an_unknown_rewrite_is_named() -> None:
    with pytest.raises(ValueError, match="rewrite 'magic' is not known; known: qkv, "):
        gpu.rewritten(nn.Identity(), ["magic"])


# --- the parts by themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 4, 7), (3, 5, 1, 1), (2, 5, 8, 8)])
def test_a_subpixel_convolution_is_upsampling_and_convolution(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 6, 3, padding=1, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    sub = gpu_convolutions.SubpixelConv(conv)
    got = F.conv2d(x, sub.weight, sub.bias, padding=1)
    assert got.shape[1] == 24 and sub.weight[0].numel() == 20  # 16 products a pixel and channel pair, not 36
    torch.testing.assert_close(sub(x), expected, atol=1e-6, rtol=0)  # weights are added in float32
    with pytest.raises(ValueError, match="another"):
        sub(x, (3, 3))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 5, 16, 16), (2, 5, 7, 6), (1, 5, 1, 1), (2, 5, 33, 16)])
def test_a_convolution_by_product_is_the_convolution(shape: tuple[int, ...], stride: int) -> None:
    """At few pixels, where it is a product, and at more, where it is not."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 6, 3, padding=1, stride=stride)
    x = torch.randn(shape)
    with torch.no_grad():
        close(conv(x), gpu_convolutions.ProductConv(conv)(x))


def test_only_few_pixels_are_a_product() -> None:
    counts = []
    for shape in [(1, 5, 16, 16), (2, 5, 16, 16)]:
        module = gpu_convolutions.ProductConv(nn.Conv2d(5, 6, 3, padding=1))
        graph = torch.export.export(module, (torch.randn(shape),)).graph
        counts.append(
            {str(node.target) for node in graph.nodes} & {"aten.conv2d.default", "aten.linear.default"}
        )
    assert counts == [{"aten.linear.default"}, {"aten.conv2d.default"}]


@pytest.mark.parametrize(("batch", "side", "own"), [(1, 127, False), (1, 128, True), (4, 64, True)])
def test_only_many_pixels_are_normed_by_channel(batch: int, side: int, own: bool) -> None:
    module = gpu_norms.ChannelGroupNorm(nn.GroupNorm(1, 2))
    x = torch.randn(batch, 2, side, side)
    targets = {str(node.target) for node in torch.export.export(module, (x,)).graph.nodes}
    assert ("aten.group_norm.default" not in targets) is own
    # What keeps a compiler from computing factor and summand anew for each pixel.
    assert ("aten.as_strided.default" in targets) is own
    with torch.no_grad():
        close(F.group_norm(x, 1), module(x))


@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (1, 12, 40), (3, 12, 1, 1)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_a_channels_group_norm_is_group_norm(shape: tuple[int, ...], offset: float) -> None:
    """An offset hundreds of times the spread is where E[x²] − E[x]² would lose all digits."""
    torch.manual_seed(1)
    norm = nn.GroupNorm(4, 12, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape) * torch.rand(12).view(1, 12, *(1 for _ in shape[2:])) + offset
    wide = nn.GroupNorm(4, 12, eps=1e-6).double()
    wide.load_state_dict(norm.state_dict())
    expected = wide(x.double()).float()
    own = float((gpu_norms.ChannelGroupNorm(norm).by_channel(x) - expected).detach().abs().max())
    theirs = float((norm(x) - expected).detach().abs().max())
    assert own <= max(TOLERANCE, 4 * theirs)


@pytest.mark.parametrize("dim", [(2, 64, 4, 4), (2, 16, 64)], ids=["picture", "tokens"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_attention_processor_is_diffusers_own(dim: tuple[int, ...], wide: bool) -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(2)
    picture = len(dim) == 4
    kwargs: dict[str, Any] = {"norm_num_groups": 8, "residual_connection": True} if picture else {}
    attn = Attention(query_dim=64, heads=2, dim_head=32, bias=picture, rescale_output_factor=1.5, **kwargs)
    x = torch.randn(dim)
    with torch.no_grad():
        expected = attn(x)
        attn.processor = gpu_attention.AttentionProcessor(wide=wide)
        close(expected, attn(x))
        assert gpu_attention.fuse_projections(nn.ModuleList([attn])) == 1
        assert not hasattr(attn, "to_q") and attn.processor.wide is wide
        close(expected, attn(x))


def test_only_heads_that_no_kernel_takes_are_unfused() -> None:
    from diffusers.models.attention_processor import Attention

    narrow, wide = (
        Attention(query_dim=64, heads=2, dim_head=32),
        Attention(query_dim=264, heads=1, dim_head=264),
    )
    x = torch.randn(1, 9, 264)
    with torch.no_grad():
        expected = wide(x)
        assert gpu_attention.unfuse_wide_attention(nn.ModuleList([narrow, wide])) == 1
        assert isinstance(wide.processor, gpu_attention.AttentionProcessor) and wide.processor.wide
        close(expected, wide(x))


# --- precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "floor_db"), [("fp32", 100), ("fp16", 45), ("bf16", 30)])
@pytest.mark.parametrize("model", ["tiny", "sd15"])
def test_an_assembled_pipeline_draws_the_same_picture(
    pipelines: dict[str, Component], model: str, dtype: str, floor_db: float
) -> None:
    pipeline = pipelines[model]
    module, _ = gpu.rewritten(pipeline.module)
    module = half.assembled(module, half.DTYPES[dtype], "cpu")
    with torch.no_grad():
        expected, got = pipeline.original(**inputs(pipeline, 1)), module(**inputs(pipeline, 1))
    assert got.dtype == torch.float32
    mse = float((got - expected).square().mean())
    assert 10 * torch.log10(torch.tensor(1 / max(mse, 1e-20))) >= floor_db
    inner = {t.dtype for t in module.parameters()}
    assert inner == {half.DTYPES[dtype]}
    weights = [t for t in module.parameters() if t.dim() == 4 and t.shape[1] > 1 and t.shape[2] > 1]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in weights)


def test_bytes_are_the_rounded_picture(pipelines: dict[str, Component]) -> None:
    pipeline = with_picture(pipelines["tiny"], "uint8")
    module = half.assembled(gpu.rewritten(pipeline.module)[0], torch.float32, "cpu")
    with torch.no_grad():
        expected, got = pipeline.original(**inputs(pipeline, 1)), module(**inputs(pipeline, 1))
    assert got.dtype == torch.uint8
    assert int((got.int() - expected.int()).abs().max()) <= 1


# --- the decoder's tail ---------------------------------------------------------------------------------


def kl_decoder(gain: float) -> tuple[Decoder, Callable[[], object], Tensor]:
    """A narrow AutoencoderKL's decoder whose third upsampling block's first convolution gives ``gain`` ×."""
    config = configs("sd15", "narrow")["vae"]
    decoder = Decoder(build_part("vae", config)).eval()
    with torch.no_grad():
        decoder.decoder.up_blocks[2].resnets[0].conv1.weight *= gain
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return decoder, lambda: decoder(latent), latent


def test_a_decoder_that_float16_holds_has_no_tail() -> None:
    decoder, run, _ = kl_decoder(1.0)
    tail = half.find_tail(decoder.decoder, run)
    assert tail.start is None and 0 < tail.largest < half.SAFE


def test_the_tail_starts_where_float16_overflows() -> None:
    decoder, run, latent = kl_decoder(1e6)
    tail = half.find_tail(decoder.decoder, run)
    assert tail.start == "up_blocks.2" and tail.largest > 65504
    with torch.no_grad():
        expected = decoder(latent)
        plain = half.assembled(decoder, torch.float16, "cpu")
        assert not bool(torch.isfinite(plain(latent)).all())
        kept = half.assembled(decoder, torch.float16, "cpu", tail)
        got = kept(latent)
    assert bool(torch.isfinite(got).all())
    signal, noise = expected.square().sum(), (got - expected).square().sum()
    assert float(10 * torch.log10(signal / noise)) > 30
    assert {t.dtype for t in kept.parameters()} == {torch.float16, torch.bfloat16}


def test_a_value_that_is_not_a_number_starts_a_tail() -> None:
    decoder, run, _ = kl_decoder(float("nan"))
    assert half.find_tail(decoder.decoder, run).start == "up_blocks.2"


def test_the_tiny_decoders_stages_are_its_layers(pipelines: dict[str, Component]) -> None:
    decoder: Any = pipelines["tiny"].module.decoder.decoder  # type: ignore[union-attr]
    found = half.stages(decoder)
    assert list(found.values()) == list(decoder.layers)
    tail = half.Tail(list(found)[-2], 1e6)
    twin = half.assembled(pipelines["tiny"].module, torch.float16, "cpu", tail)
    with torch.no_grad():
        close(pipelines["tiny"].module(**inputs(pipelines["tiny"])), twin(**inputs(pipelines["tiny"])), 0.02)
