"""What crosses the seams: tensors, graphs, and what a model needs to draw a picture. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: The graph of a fused bundle, and the graphs of a bundle of components, in the order they run.
PIPELINE = "pipeline"
COMPONENTS = ("text_encoder", "unet", "decoder")

#: InstaFlow's first and only timestep: 1000·(1−τ) at τ = 0, a float (not 999).
FIRST_TIMESTEP = 1000.0


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a graph.

    ``name`` is edgeflow's own and the same on every backend; ``key`` is what the artifact calls it
    (clients of the ecosystem look for their own names).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # NumPy's name: float32, float16, int64, int32, uint8
    key: str


@dataclass(frozen=True)
class GraphSpec:
    """One lowered graph: where it lies in the bundle and what goes in and comes out.

    Names by component (shapes for batch 1; C, h, w the latent's, H, W the picture's, L tokens, D width):

    - ``text_encoder``: input_ids (1, L) → last_hidden_state (1, L, D)
    - ``unet``: sample (1, C, h, w), timestep (1,), encoder_hidden_states (1, L, D) → velocity (1, C, h, w)
    - ``decoder``: latent (1, C, h, w), already divided by the latent scale → image (1, 3, H, W) in [-1, 1]
    - ``pipeline``: input_ids (1, L), noise (1, C, h, w) → image (1, 3, H, W) float in [0, 1] or uint8
    """

    name: str
    file: str  # relative to the bundle's root
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    chunks: tuple[
        str, ...
    ] = ()  # where it lies in several files: all, in the order they run; file is the first


@dataclass(frozen=True)
class GenerationSpec:
    """All that drawing a picture needs to know of a model, be it a checkpoint or a bundle."""

    name: str  # emoji, or the folder's name, or the hub id
    checkpoint_hash: str  # sha256 over the checkpoint's parts
    licence: str
    tokenizer_dir: Path  # vocab.json, merges.txt, tokenizer_config.json
    max_tokens: int  # L
    latent_shape: tuple[int, int, int]  # C, h, w
    latent_scale: float  # UNet latents = autoencoder latents × latent_scale
    picture_size: int  # pixels, square
    steps: int  # 1 for a one-step model
    timestep: float  # FIRST_TIMESTEP for a one-step model
    prompts: tuple[str, ...]  # real prompts of the model's own domain, for parity and demos
