"""A checkpoint changed before anything else happens to it: grafted, with LoRAs fused, with another decoder.

The result is a checkpoint folder like any other, so hashing, exporting, parity and drawing need not know of
it. Weights pass through a tensor at a time, in fp32; parts that stay as they are become links.

- graft (InstaFlow, arXiv 2309.06380; the authors' rf_lora.py): UNet + (fine-tune's UNet − base's UNet), with
  the fine-tune's text encoder, tokenizer and autoencoder.
- LoRA: W + scale·(alpha/rank)·B·A for the UNet and the text encoder (edgeflow.lora).
- decoder: another autoencoder of known class, with its own latent scale.

What does not match by name or shape is returned by name, never passed over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeflow.checkpoint import Checkpoint, from_hub_autoencoder, is_hub_id
from edgeflow.errors import CheckpointError, UsageError
from edgeflow.facts import FACTS, SCHEMA, read_json
from edgeflow.lora import Change, Lora, fuse, read_lora
from edgeflow.weights import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes of one written shard, and so about what a part needs in memory.
SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Changes:
    """What is to be done to a checkpoint, in this order: graft, LoRAs, decoder."""

    graft: str | None = None
    base: str | None = None
    loras: tuple[Lora, ...] = ()
    decoder: str | None = None

    def __post_init__(self) -> None:
        if (self.graft is None) != (self.base is None):
            raise UsageError(
                "--graft: expected --graft FINETUNED together with --base SD, what it was fine-tuned from"
            )

    def __bool__(self) -> bool:
        return bool(self.graft or self.loras or self.decoder)


@dataclass
class Derived:
    """A changed checkpoint, and what did not match: one line each."""

    checkpoint: Checkpoint
    unmatched: list[str] = field(default_factory=list)


@contextmanager
def derived(checkpoint: Checkpoint, changes: Changes) -> Iterator[Derived]:
    """The changed checkpoint in a temporary folder that is gone afterwards; the same one for no changes.

    Raises what ``derive`` raises.
    """
    if not changes:
        yield Derived(checkpoint)
        return
    with TemporaryDirectory(prefix="edgeflow-") as folder:
        yield derive(checkpoint, changes, Path(folder) / "checkpoint")


def derive(checkpoint: Checkpoint, changes: Changes, out: Path) -> Derived:
    """Write the changed checkpoint to ``out``, which must not exist; unchanged files are links.

    Raises UsageError for a graft or a LoRA on quantized weights, CheckpointError for a LoRA of which nothing
    matches, for a graft of UNets that share no tensor, and
    for a decoder of an unknown class or whose latents are of another shape.
    """
    if checkpoint.quantization is not None and (changes.graft or changes.loras):
        raise UsageError(
            f"{'--graft' if changes.graft else '--lora'}: {checkpoint.name}: expected float weights, got "
            "quantized ones; change the model first, then edgeflow quantize it"
        )
    unmatched: list[str] = []
    donor = Checkpoint.open(changes.graft) if changes.graft else checkpoint
    loras = [(lora, read_lora(lora)) for lora in changes.loras]
    out.mkdir(parents=True)
    graft = _graft(checkpoint, donor, Checkpoint.open(changes.base), unmatched) if changes.base else None
    for part in checkpoint.parts:
        source = checkpoint if part == "unet" else donor
        steps = [graft] if graft and part == "unet" else []
        steps += [
            fuse(lora, deltas[part], part, source, unmatched) for lora, deltas in loras if part in deltas
        ]
        if part == "vae" and changes.decoder:
            _link(_decoder_files(changes.decoder), out / "vae")
        elif steps:
            _write_part(source, part, out / part, steps)
        else:
            index = [] if part == "tokenizer" else [source.weight_names(part, source.variant_of(part))[1]]
            _link([*source.files(part), *index], out / part)
    _link([checkpoint.root / "scheduler"], out)
    _write_facts(checkpoint, donor, changes, out)
    made = replace(Checkpoint.open(out), name=checkpoint.name)
    _ = made.generation if made.kind != "autoencoder" else None  # do the parts still fit together?
    return Derived(made, unmatched)


# --- graft ----------------------------------------------------------------------------------------------


def _graft(checkpoint: Checkpoint, tuned: Checkpoint, base: Checkpoint, unmatched: list[str]) -> Change:
    """Adds tuned − base to every tensor that all three UNets have in one shape."""
    shapes = [{k: t.shape for k, t in c.stored_tensors("unet").items()} for c in (checkpoint, tuned, base)]
    names = sorted(set().union(*shapes))
    odd = {name for name in names if len({s.get(name) for s in shapes}) > 1}
    for name in sorted(odd):
        found = (
            f"{who} {s.get(name, 'none')}"
            for who, s in zip(("the model", "graft", "base"), shapes, strict=True)
        )
        unmatched.append(f"graft: unet.{name}: {', '.join(found)}")
    if len(odd) == len(names):
        raise CheckpointError(
            f"graft: {tuned.name}: expected a UNet of {checkpoint.name}'s tensors, none fits"
        )
    plus, minus = _reader(tuned, "unet"), _reader(base, "unet")

    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor if name in odd else tensor + (plus(name) - minus(name))

    return change


def _reader(checkpoint: Checkpoint, part: str) -> Callable[[str], Tensor]:
    """Name → fp32 tensor, each read when it is asked for."""
    from safetensors import safe_open

    files = [safe_open(path, "pt") for path in checkpoint.weight_files(part)]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
    return lambda name: where[name].get_tensor(name).float()


# --- decoder --------------------------------------------------------------------------------------------


def _decoder_files(decoder: str) -> list[Path]:
    """config.json and weights of an autoencoder: its own folder, or the vae of a checkpoint or hub id."""
    root = Path(decoder)
    if not root.is_dir():
        if not is_hub_id(decoder):
            raise UsageError(
                f"--decoder: {decoder}: expected the folder of an autoencoder or a hub id, found none"
            )
        root = from_hub_autoencoder(decoder)
    folder = root / "vae" if (root / "vae" / "config.json").is_file() else root
    name = read_json(folder / "config.json").get("_class_name")
    if name not in ("AutoencoderTiny", "AutoencoderKL"):
        raise CheckpointError(
            f"decoder: {folder}: class {name!r} is not known; known: AutoencoderKL, AutoencoderTiny"
        )
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    for path in (folder / name for name in names):
        if path.is_file():
            read_safetensors_header(path)
            return [folder / "config.json", path]
    raise CheckpointError(f"decoder: {folder}: expected weights in {names[0]}, got none")


# --- writing --------------------------------------------------------------------------------------------


def _write_part(source: Checkpoint, part: str, out: Path, steps: list[Change]) -> None:
    """Every tensor of the part through all steps, in fp32, in shards with an index."""
    from safetensors.torch import save_file

    out.mkdir()
    shutil.copyfile(source.root / part / "config.json", out / "config.json")
    read, stem = _reader(source, part), source.weight_stem(part)
    weight_map: dict[str, str] = {}
    shard: dict[str, Any] = {}

    def flush() -> None:
        name = f"{stem}-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, stored in sorted(source.stored_tensors(part).items()):
        tensor = read(name) if stored.dtype in ("F16", "BF16", "F32", "F64") else None
        if tensor is None:  # position_ids and other whole numbers, which nothing reads
            continue
        for step in steps:
            tensor = step(name, tensor)
        shard[name] = tensor.contiguous()
        if sum(t.numel() * 4 for t in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (out / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _link(files: list[Path], folder: Path) -> None:
    """Links to those of the files that exist."""
    folder.mkdir(exist_ok=True)
    for file in files:
        if file.exists():
            (folder / file.name).symlink_to(file.resolve())


def _quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """The recipe of a quantized checkpoint, whose decoder alone can have changed, without the decoder's."""
    if checkpoint.quantization is None:
        return {}
    recipe = checkpoint.quantization["recipe"]
    rules = [rule for rule in recipe["rules"] if rule["component"] != "decoder"]
    if not rules:
        return {}
    return {"quantization": {**checkpoint.quantization, "recipe": {**recipe, "rules": rules}}}


def _write_facts(checkpoint: Checkpoint, donor: Checkpoint, changes: Changes, out: Path) -> None:
    """model_index.json and edgeflow.json: whose work this is, and what was done."""
    index = read_json(checkpoint.root / "model_index.json")
    done = [f"grafted with {donor.name} over {changes.base}"] if changes.graft else []
    done += [f"LoRA {lora.path.name} at {lora.scale:g}" for lora in changes.loras]
    done += [f"decoder {Path(changes.decoder).name}"] if changes.decoder else []
    licences = dict.fromkeys([checkpoint.facts["licence"], donor.facts["licence"]])
    keep = ("kind", "steps", "guidance", "prompts")
    facts = {
        "schema": SCHEMA,
        **{key: checkpoint.facts[key] for key in keep},
        "licence": " and ".join(licences),
        "origin": ", ".join([str(checkpoint.facts["origin"]), *done]),
        **_quantization(checkpoint),
    }
    for name, value in (("model_index.json", index), (FACTS, facts)):
        text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
        (out / name).write_text(text + "\n", encoding="utf-8")
