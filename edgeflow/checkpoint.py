"""Checkpoints: diffusers folders that also say what the model is. Torch-free.

``edgeflow.json`` beside ``model_index.json`` records what diffusers has no place for::

    {"schema": 1, "kind": "one-step", "steps": 1, "guidance": 0.0, "licence": "…", "origin": "…",
     "picture_size": 128, "prompts": ["…"], "training": {…}}

``kind`` is one of KINDS. A folder without it (the published InstaFlow) is read from its class name.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from edgeflow.errors import CheckpointError, UnknownNameError
from edgeflow.spec import FIRST_TIMESTEP, GenerationSpec

SCHEMA = 1
FACTS = "edgeflow.json"
#: What a checkpoint can be: it draws in one step; its ODE is integrated in a few; it is a many-step teacher;
#: it is an autoencoder alone.
KINDS = ("one-step", "rectified-flow", "diffusion", "autoencoder")
PARTS = ("text_encoder", "unet", "vae", "tokenizer")
MODELS = Path(__file__).parent / "models"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DEFAULT_PROMPTS = ("a photograph of an astronaut riding a horse", "a red bicycle leaning on a brick wall")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose parts are all there and whose safetensors files are whole."""

    root: Path
    name: str
    facts: dict[str, Any]

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open ``model``: a built-in name, a folder, or a hub id (``owner/name``).

        Raises UnknownNameError for a name that is none of these, CheckpointError for a folder that lacks a
        part, holds pickles instead of safetensors, or has a truncated file.
        """
        root, name = resolve(str(model))
        index = _read_json(root / "model_index.json", "checkpoint")
        facts = _facts(root, index)
        checkpoint = cls(root, name, facts)
        for part in facts["parts"]:
            checkpoint._check_part(part)
        return checkpoint

    def _check_part(self, part: str) -> None:
        folder = self.root / part
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint: {self.root}: part {part!r} is missing; expected: {', '.join(self.facts['parts'])}")
        if part == "tokenizer":
            return
        _read_json(folder / "config.json", "checkpoint")
        if not self.weight_files(part):
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
            got = f"the pickle {pickles[0]!r}, which is refused" if pickles else "none"
            raise CheckpointError(f"checkpoint: {folder}: expected weights in safetensors, got {got}")
        for path in self.weight_files(part):
            read_safetensors_header(path)

    def weight_files(self, part: str) -> list[Path]:
        return sorted((self.root / part).glob("*.safetensors"))

    def config(self, part: str) -> dict[str, Any]:
        return _read_json(self.root / part / "config.json", "checkpoint")

    def num_parameters(self, part: str) -> int:
        """Number of weights of a part, from the safetensors headers alone."""
        total = 0
        for path in self.weight_files(part):
            for tensor in read_safetensors_header(path).values():
                count = 1
                for n in tensor["shape"]:
                    count *= n
                total += count
        return total

    @cached_property
    def hash(self) -> str:
        """sha256 over the name and content of every config, weight and tokenizer file."""
        digest = sha256()
        parts = [p for part in self.facts["parts"] for p in sorted((self.root / part).rglob("*")) if p.is_file()]
        for path in parts:
            with path.open("rb") as file:
                digest.update(f"{path.relative_to(self.root).as_posix()}\0".encode())
                digest.update(file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def kind(self) -> str:
        return self.facts["kind"]

    @property
    def latent_scale(self) -> float:
        return float(self.config("vae")["scaling_factor"])

    @property
    def generation(self) -> GenerationSpec:
        """What drawing a picture needs. The picture is 2^(levels−1) times the latent's side."""
        unet, vae = self.config("unet"), self.config("vae")
        side = int(unet["sample_size"])
        levels = len(vae.get("block_out_channels") or vae["decoder_block_out_channels"])
        if vae["_class_name"] == "AutoencoderTiny":
            levels = len(vae["decoder_block_out_channels"])
        return GenerationSpec(
            name=self.name,
            checkpoint_hash=self.hash,
            licence=self.facts["licence"],
            tokenizer_dir=self.root / "tokenizer",
            max_tokens=int(self.config("text_encoder")["max_position_embeddings"]),
            latent_shape=(int(unet["in_channels"]), side, side),
            latent_scale=self.latent_scale,
            picture_size=side * 2 ** (levels - 1),
            steps=int(self.facts["steps"]),
            timestep=FIRST_TIMESTEP,
            prompts=tuple(self.facts["prompts"]),
        )


def builtin_models() -> list[str]:
    """Names of the checkpoints shipped in the package."""
    return sorted(p.parent.name for p in MODELS.glob("*/model_index.json"))


def resolve(model: str) -> tuple[Path, str]:
    """The folder and display name of a built-in name, a path, or a hub id already in (or fetched to) the cache."""
    if model in builtin_models():
        return MODELS / model, model
    path = Path(model)
    if path.is_dir():
        return path, path.resolve().name
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.exists():
        return _from_hub(model), model
    raise UnknownNameError("model", model, [*builtin_models(), "a checkpoint folder", "a hub id (owner/name)"])


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        from edgeflow.errors import BackendMissing

        raise BackendMissing("huggingface_hub", "export") from error
    patterns = ["*.json", "*.txt", "*.safetensors"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"model: {model}: no folder of that name, and the hub could not give it: {reason}"
        ) from error


def _facts(root: Path, index: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        "licence": "unknown",
        "origin": str(index.get("_name_or_path") or root.name),
        "prompts": list(_DEFAULT_PROMPTS),
        "guidance": 0.0,
        "parts": list(PARTS),
    }
    path = root / FACTS
    if path.is_file():
        facts = {**defaults, **_read_json(path, "checkpoint")}
        if facts.get("schema") != SCHEMA:
            raise CheckpointError(f"checkpoint: {path}: expected schema {SCHEMA}, got {facts.get('schema')!r}")
        if facts.get("kind") not in KINDS:
            raise CheckpointError(f"checkpoint: {path}: kind {facts.get('kind')!r} is not known; known: {', '.join(KINDS)}")
        if facts["kind"] == "autoencoder":
            facts["parts"] = ["vae"]
        return facts
    if index.get("_class_name") in ("RectifiedFlowPipeline", "InstaFlowPipeline"):
        return {**defaults, "schema": SCHEMA, "kind": "one-step", "steps": 1}
    return {**defaults, "schema": SCHEMA, "kind": "diffusion", "steps": 25}


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{what}: {path.parent}: expected the file {path.name}, found none") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{what}: {path}: expected JSON, got: {error}") from error


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name → {dtype, shape, data_offsets}, and a check that no byte of the file is missing.

    The format: a little-endian u64 header length, that many bytes of JSON, then the data.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"weights: {path}: the safetensors file is truncated or not one ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"weights: {path}: expected a safetensors header, got: {error}") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    if end != size:
        raise CheckpointError(f"weights: {path}: the safetensors file is truncated: expected {end} bytes, got {size}")
    return header
