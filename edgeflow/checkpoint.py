"""Checkpoints: diffusers folders that also say what the model is. Torch-free.

``edgeflow.json`` beside ``model_index.json`` records what diffusers has no place for::

    {"schema": 1, "kind": "one-step", "steps": 1, "guidance": 0.0, "licence": "…", "origin": "…",
     "picture_size": 128, "prompts": ["…"], "training": {…},
     "quantization": {"recipe": {…}, "source": {"name": "…", "hash": "…"}}}

``quantization`` is there where weights are integers (edgeflow.quantization). ``kind`` is one of KINDS.
A folder without it (the published InstaFlow) is read from its pipeline's class.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from edgeflow import facts as model_facts
from edgeflow.errors import CheckpointError, UnknownNameError, UsageError
from edgeflow.facts import FACTS, KINDS, PARTS, SCHEMA, read_json
from edgeflow.quantization.stored import ENDS, StoredLayer, quantized_layers
from edgeflow.spec import FIRST_TIMESTEP, GenerationSpec
from edgeflow.weights import StoredTensor, read_safetensors_header

__all__ = ["FACTS", "KINDS", "PARTS", "SCHEMA", "Checkpoint", "builtin_models", "resolve"]

MODELS = Path(__file__).parent / "models"
#: The file a part's weights are in, less its ending: what from_pretrained of each library looks for.
_WEIGHTS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
#: diffusers' scaling_factor where a config leaves it out, as Stable Diffusion 1.x does.
_LATENT_SCALES = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX = "model_index.json"
#: Which weights of a part can be read, in the order of preference.
VARIANTS = (None, "fp16")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose parts are all there and whose safetensors files are whole.

    ``facts`` is edgeflow.json with every default filled in: kind, steps, guidance, licence, origin, prompts
    and ``parts``, the names of the folders this kind consists of. Of a part that has both full-precision and
    half-precision (``*.fp16.*``) weights the full ones are read, unless ``variant`` is "fp16"; of a part that
    has one of them, that one.
    """

    root: Path
    name: str
    facts: dict[str, Any]
    variant: str | None = None

    @classmethod
    def open(
        cls, model: str | Path, *, variant: str | None = None, config: str | Path | None = None
    ) -> Checkpoint:
        """Open ``model``: a built-in name, a folder, a hub id (``owner/name``), or one safetensors file.

        ``variant`` "fp16" prefers half-precision weights where there are both. ``config`` is the folder or
        hub id from which a single file takes configs and tokenizer (see edgeflow.single_file).

        Raises UnknownNameError for a name that is none of these, CheckpointError for a folder that lacks a
        part, holds pickles instead of safetensors, has a truncated file, or parts that do not fit together.
        """
        if variant not in VARIANTS:
            raise UnknownNameError("variant", str(variant), [v for v in VARIANTS if v])
        root, name = resolve(str(model), variant=variant, config=config)
        if not (root / _INDEX).is_file() and (root / "manifest.json").is_file():
            raise CheckpointError(f"checkpoint: {root}: expected a checkpoint, got a bundle (manifest.json)")
        index = read_json(root / _INDEX)
        checkpoint = cls(root, name, model_facts.read_facts(root, name, index), variant)
        for part in checkpoint.parts:
            checkpoint._check_part(part)
        checkpoint._check_quantization()
        return checkpoint

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.facts["kind"]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the part folders: all of PARTS, or the vae alone for an autoencoder."""
        return tuple(self.facts["parts"])

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The recipe, verbatim, and the float checkpoint's name and hash; None where weights are float."""
        return self.facts.get("quantization")

    def quantized_layers(self, part: str) -> dict[str, StoredLayer]:
        """Layer → how its integers are stored. Raises CheckpointError where they do not fit together."""
        return quantized_layers(self.stored_tensors(part), self.root / part)

    def _check_quantization(self) -> None:
        weighted = [part for part in self.parts if part != "tokenizer"]
        count = sum(len(self.quantized_layers(part)) for part in weighted)
        if (self.quantization is not None) != bool(count):
            expected = "a recipe for" if count else "layers quantized by the recipe, got"
            raise CheckpointError(
                f"checkpoint: {self.root / FACTS}: quantization: expected {expected} {count} quantized layers"
            )

    def _check_part(self, part: str) -> None:
        folder = self.root / part
        if not folder.is_dir():
            raise CheckpointError(
                f"checkpoint: {self.root}: part {part!r} is missing; expected: {', '.join(self.parts)}"
            )
        if part == "tokenizer":
            _check_tokenizer(folder)
            return
        found = self.class_name(part)
        if part in _CLASSES and found not in _CLASSES[part]:
            raise CheckpointError(
                f"checkpoint: {folder}: class {found!r} is not known; known: {', '.join(_CLASSES[part])}"
            )
        if not self.stored_tensors(part):
            raise CheckpointError(f"checkpoint: {folder}: expected weights, got a file without a tensor")

    def config(self, part: str) -> dict[str, Any]:
        """``config.json`` of a part that has weights."""
        return read_json(self.root / part / "config.json")

    def class_name(self, part: str) -> str:
        """The Python class of a part: diffusers' ``_class_name`` or transformers' first architecture."""
        if part == "tokenizer":
            return str(read_json(self.root / part / "tokenizer_config.json").get("tokenizer_class"))
        config = self.config(part)
        architectures = config.get("architectures") or [config.get("model_type")]
        return str(config.get("_class_name") or architectures[0])

    def weight_stem(self, part: str) -> str:
        """The name that from_pretrained looks for, less its ending."""
        return _WEIGHTS[part]

    def weight_files(self, part: str) -> list[Path]:
        """The safetensors files that make up a part, exactly those that from_pretrained would load.

        Raises CheckpointError where there are none (naming a pickle that lies in their place) or where a
        sharded part's index names a file that is not there.
        """
        folder, stem = self.root / part, _WEIGHTS[part]
        single, index = self.weight_names(part, self.variant_of(part))
        if single.is_file() and index.is_file():
            raise CheckpointError(f"checkpoint: {folder}: expected {single.name} or {index.name}, got both")
        if single.is_file():
            return [single]
        if index.is_file():
            return [folder / name for name in sorted(set(_weight_map(index).values()))]
        others = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        got = ", ".join(others) or (f"the pickle {pickles[0]}, which is refused" if pickles else "none")
        raise CheckpointError(f"checkpoint: {folder}: expected weights in {stem}.safetensors, got {got}")

    def variant_of(self, part: str) -> str | None:
        """Which of a part's weights are read: None for full precision, "fp16" (see the class)."""
        first: list[str | None] = [self.variant, None] if self.variant else list(VARIANTS)
        for variant in first:
            if any(path.is_file() for path in self.weight_names(part, variant)):
                return variant
        return None

    def weight_names(self, part: str, variant: str | None) -> tuple[Path, Path]:
        """The one file, or the index of several, as diffusers and transformers name them."""
        folder, stem, end = self.root / part, _WEIGHTS[part], f".{variant}" if variant else ""
        return folder / f"{stem}{end}.safetensors", folder / f"{stem}.safetensors.index{end}.json"

    def stored_tensors(self, part: str) -> dict[str, StoredTensor]:
        """Tensor name → how it is stored, over all files of a part; every file is checked to be whole."""
        folder = self.root / part
        by_file = {path: read_safetensors_header(path) for path in self.weight_files(part)}
        _, index = self.weight_names(part, self.variant_of(part))
        for tensor, name in _weight_map(index).items() if index.is_file() else ():
            if tensor not in by_file[folder / name]:
                raise CheckpointError(f"weights: {index}: tensor {tensor!r} is not in {name}")
        return {name: tensor for header in by_file.values() for name, tensor in header.items()}

    def num_parameters(self, part: str) -> int:
        """Number of weights of a part, from the safetensors headers alone; scales are none."""
        floats = sum(t.numel for name, t in self.stored_tensors(part).items() if not name.endswith(ENDS))
        return floats + sum(layer.numel for layer in self.quantized_layers(part).values())

    def files(self, part: str) -> list[Path]:
        """The files of a part that decide what it computes."""
        folder = self.root / part
        if part == "tokenizer":
            return [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
        return [folder / "config.json", *self.weight_files(part)]

    @cached_property
    def hash(self) -> str:
        """sha256 over all that decides the picture.

        That is: kind, steps, guidance; the name and content of every config, weight and tokenizer file; a
        many-step model's scheduler; a quantized one's recipe. Files that nothing reads do not count, nor do
        licence and origin.
        """
        digest = sha256()
        facts = {key: self.facts[key] for key in ("kind", "steps", "guidance")}
        if self.quantization is not None:
            facts["recipe"] = self.quantization["recipe"]
        digest.update(json.dumps(facts, sort_keys=True).encode())
        paths = [path for part in self.parts for path in self.files(part)]
        scheduler = self.root / "scheduler" / "scheduler_config.json"
        if self.kind == "diffusion" and scheduler.is_file():
            paths.append(scheduler)
        for path in paths:
            with path.open("rb") as file:
                digest.update(f"\0{path.relative_to(self.root).as_posix()}\0".encode())
                digest.update(file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def latent_scale(self) -> float:
        """UNet latents = autoencoder latents × latent scale."""
        return float(self.config("vae").get("scaling_factor") or _LATENT_SCALES[self.class_name("vae")])

    @property
    def upscale(self) -> int:
        """Pixels per latent position along one side: 2 per level of the autoencoder after the first."""
        vae = self.config("vae")
        if self.class_name("vae") == "AutoencoderTiny":
            levels, factor = vae.get("decoder_block_out_channels"), vae.get("upsampling_scaling_factor", 2)
        else:
            levels, factor = vae.get("block_out_channels"), 2
        if not isinstance(levels, list) or not levels or not isinstance(factor, int):
            raise CheckpointError(f"checkpoint: {self.root / 'vae'}: config.json does not list its levels")
        return factor ** (len(levels) - 1)

    @property
    def generation(self) -> GenerationSpec:
        """What drawing a picture needs.

        Raises CheckpointError for an autoencoder alone, and for parts that do not fit together.
        """
        if self.kind == "autoencoder":
            raise CheckpointError(
                f"checkpoint: {self.root}: expected a model that draws, got an autoencoder alone"
            )
        channels, side = self._latent_shape()
        return GenerationSpec(
            name=self.name,
            checkpoint_hash=self.hash,
            licence=self.facts["licence"],
            tokenizer_dir=self.root / "tokenizer",
            max_tokens=self._max_tokens(),
            latent_shape=(channels, side, side),
            latent_scale=self.latent_scale,
            picture_size=self._picture_size(side),
            steps=int(self.facts["steps"]),
            timestep=FIRST_TIMESTEP,
            prompts=tuple(self.facts["prompts"]),
        )

    def _latent_shape(self) -> tuple[int, int]:
        """Channels and side of the latent, on which UNet and autoencoder must agree."""
        unet = self.config("unet")
        channels = self._integer("unet", "in_channels")
        for part, key in (("unet", "out_channels"), ("vae", "latent_channels")):
            if self._integer(part, key) != channels:
                raise CheckpointError(
                    f"checkpoint: {self.root / part}: {key}: expected the UNet's in_channels {channels}, "
                    f"got {self._integer(part, key)}"
                )
        width, text = unet.get("cross_attention_dim"), self.config("text_encoder").get("hidden_size")
        if width != text:
            raise CheckpointError(
                f"checkpoint: {self.root / 'unet'}: cross_attention_dim: "
                f"expected the text encoder's hidden_size {text}, got {width}"
            )
        return channels, self._integer("unet", "sample_size")

    def _picture_size(self, side: int) -> int:
        size = side * self.upscale
        declared = self.facts.get("picture_size", size)
        if declared != size:
            raise CheckpointError(
                f"checkpoint: {self.root / FACTS}: picture_size: "
                f"expected {size} (latent side {side} × {self.upscale}), got {declared!r}"
            )
        return size

    def _max_tokens(self) -> int:
        """The length the tokenizer pads to, which is the number of positions the text encoder knows."""
        where = self.root / "tokenizer" / "tokenizer_config.json"
        length = read_json(where).get("model_max_length")
        positions = self._integer("text_encoder", "max_position_embeddings")
        if length != positions:
            raise CheckpointError(
                f"checkpoint: {where}: model_max_length: expected the text encoder's "
                f"max_position_embeddings {positions}, got {length!r}"
            )
        return positions

    def _integer(self, part: str, key: str) -> int:
        value = self.config(part).get(key)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"checkpoint: {self.root / part / 'config.json'}: {key}: "
                f"expected a positive integer, got {value!r}"
            )
        return value


def _check_tokenizer(folder: Path) -> None:
    read_json(folder / "tokenizer_config.json")
    pair = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if pair and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"checkpoint: {folder}: expected vocab.json and merges.txt, found no {pair[0]}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → shard of a sharded part; every shard is a file beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"weights: {index}: expected a weight_map of tensor names to file names")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"weights: {index}: expected names of safetensors files, got {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"weights: {index}: expected the file {name}, found none")
    return weight_map


def builtin_models() -> list[str]:
    """Names of the checkpoints shipped in the package."""
    return sorted(p.parent.name for p in MODELS.glob(f"*/{_INDEX}"))


def resolve(model: str, *, variant: str | None = None, config: str | Path | None = None) -> tuple[Path, str]:
    """Folder and display name of a built-in name, a path, or a hub id in (or fetched to) the cache.

    A built-in name comes before a folder of the same name; say ``./name`` for the folder. A safetensors file
    is unpacked into a folder first (edgeflow.single_file). Raises UsageError for a useless ``config``.
    """
    path = Path(model)
    single = path.is_file() and path.suffix == ".safetensors"
    if config is not None and not single:
        raise UsageError(f"--config: {config}: expected a single safetensors file to go with it, got {model}")
    if model in builtin_models():
        return MODELS / model, model
    if path.is_dir():
        return path, Path(os.path.abspath(path)).name  # noqa: PTH100 - a link keeps the name it is called by
    if single:
        from edgeflow.single_file import unpack

        return unpack(path, config), path.stem
    if path.exists():
        what = "a pickle, which is refused" if path.suffix in _PICKLES else "a single file"
        raise CheckpointError(f"checkpoint: {path}: expected a diffusers folder, got {what}")
    if is_hub_id(model):
        return from_hub(model, variant), model
    raise UnknownNameError(
        "model", model, [*builtin_models(), "the path of a checkpoint or bundle", "a hub id (owner/name)"]
    )


def is_hub_id(model: str) -> bool:
    """Whether ``model`` has the form owner/name and cannot be a mistyped path."""
    owner = model.partition("/")[0]
    return model.count("/") == 1 and owner not in ("", ".", "..", "~") and not Path(owner).is_dir()


def from_hub(model: str, variant: str | None = None) -> Path:
    """The cached snapshot of a hub id, fetched first where the hub can be reached; only the files we read.

    Half-precision weights are fetched where ``variant`` asks for them or a part has no others. Raises
    CheckpointError when the hub cannot give it (HF_HUB_OFFLINE is honoured), UsageError without its client.
    """
    configs = [_INDEX, FACTS, "README.md", *(f"{part}/*{end}" for part in PARTS for end in (".json", ".txt"))]
    full = [f"{part}/*.safetensors" for part in PARTS]
    half = [f"{part}/*.fp16*.safetensors" for part in PARTS]
    wanted = [*configs, "scheduler/*.json", *(half if variant else full)]
    root = _snapshot(model, wanted, ["*.non_ema.*"] if variant else ["*.fp16*", "*.non_ema.*"])
    bare = [p for p in _WEIGHTS if (root / p).is_dir() and not any((root / p).glob("*.safetensors"))]
    if bare:  # the weights that there are, in the other precision
        root = _snapshot(
            model, [f"{part}/*{end}" for part in bare for end in (".json", ".safetensors")], ["*.non_ema.*"]
        )
    return root


def from_hub_autoencoder(model: str) -> Path:
    """As ``from_hub``, an autoencoder at the root of a repository or in its folder vae."""
    names = ("config.json", "diffusion_pytorch_model*.safetensors")
    return _snapshot(model, [*names, *(f"vae/{name}" for name in names)], [])


def from_hub_configs(model: str) -> Path:
    """As ``from_hub``, configs, scheduler and tokenizer alone."""
    ends = ("*.json", "*.txt")
    return _snapshot(
        model, [_INDEX, FACTS, "README.md", *(f"{p}/{e}" for p in (*PARTS, "scheduler") for e in ends)], []
    )


def _snapshot(model: str, wanted: list[str], unwanted: list[str]) -> Path:
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise UsageError(
            f"model: {model}: no folder of that name, and the hub cannot be asked without huggingface_hub; "
            "install it with: pip install 'edgeflow[export]'"
        ) from error
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if constants.HF_HUB_OFFLINE and not isinstance(error, HFValidationError):
            raise CheckpointError(
                f"model: {model}: no folder of that name, not in the hub's cache on this machine, and the "
                f"hub is not asked while HF_HUB_OFFLINE is set; fetch it once with: hf download {model}"
            ) from error
        reason = str(error).splitlines()[0].removeprefix("Got: ") if str(error) else type(error).__name__
        raise CheckpointError(
            f"model: {model}: no folder of that name, and the hub could not give it: {reason}"
        ) from error
