"""One safetensors file that holds a whole Stable Diffusion (LDM names) → a checkpoint folder, by diffusers.

Such a file has weights but neither configs nor a vocabulary. They come from ``config``: a diffusers folder or
a hub id; without one, from the repository that diffusers takes the file to be of. What kind of model it is
(one step or many) is what the config's pipeline says.

Unpacking is done once: the folder is kept under $EDGEFLOW_CACHE, or $XDG_CACHE_HOME/edgeflow, or
~/.cache/edgeflow, named by the file, and made anew when the file or the config has changed.
"""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgeflow import facts as model_facts
from edgeflow.errors import BackendMissing, CheckpointError, UnknownNameError
from edgeflow.staging import staged_folder
from edgeflow.weights import read_safetensors_header

_CONFIGS = ("model_index.json", "edgeflow.json", "README.md", "scheduler", "tokenizer")
_PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
#: How each part's tensors begin in such a file.
_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.",),
}


def cache_folder() -> Path:
    """Where unpacked files are kept."""
    own, shared = os.environ.get("EDGEFLOW_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return (Path(shared) if shared else Path.home() / ".cache") / "edgeflow"


def unpack(path: Path, config: str | Path | None = None) -> Path:
    """The checkpoint folder of the file at ``path``, converted unless that was done before.

    Raises CheckpointError for a file that is truncated or lacks a part, for configs that do not fit it or
    cannot be had, BackendMissing without diffusers.
    """
    names = read_safetensors_header(path)
    for part, prefixes in _PREFIXES.items():
        if not any(name.startswith(prefixes) for name in names):
            raise CheckpointError(
                f"checkpoint: {path}: expected a whole Stable Diffusion in one file, got none of its {part} "
                f"(no tensor begins with {prefixes[0]})"
            )
    root = _config_root(path, config)
    index = model_facts.read_json(root / "model_index.json")
    model_facts.read_facts(root, path.stem, index)  # refuses a family that is not ours before any work
    folder = cache_folder() / "single-file" / f"{path.stem}-{_key(path, root)}"
    if not folder.is_dir():
        from edgeflow.loading import quiet_libraries

        with quiet_libraries(), staged_folder(folder, force=True) as stage:
            _convert(path, root, stage, half=all(t.dtype == "F16" for t in names.values()))
    return folder


def _config_root(path: Path, config: str | Path | None) -> Path:
    from edgeflow.checkpoint import from_hub_configs, is_hub_id

    if config is None:
        config = _guess(path)
    if Path(config).is_dir():
        return Path(config)
    if not is_hub_id(str(config)):
        raise UnknownNameError("--config", str(config), ["the path of a diffusers folder", "a hub id"])
    try:
        return from_hub_configs(str(config))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; {path.name} has neither configs nor a vocabulary of its own: give a diffusers folder "
            "that has them with --config"
        ) from error


def _guess(path: Path) -> str:
    """The repository whose shapes the file has, as diffusers tells from its tensors."""
    try:
        from diffusers.loaders.single_file_utils import fetch_diffusers_config
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise BackendMissing(str(error.name), "export") from error
    return str(fetch_diffusers_config(load_file(path))["pretrained_model_name_or_path"])


def _key(path: Path, root: Path) -> str:
    """Changes when the file is another, or any config is."""
    stat = path.stat()
    digest = sha256(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    for file in sorted(f for f in root.rglob("*") if f.suffix in (".json", ".txt")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _convert(path: Path, root: Path, stage: Path, *, half: bool) -> None:
    for name in _CONFIGS:
        if (root / name).is_dir():
            shutil.copytree(root / name, stage / name)
        elif (root / name).is_file():
            shutil.copyfile(root / name, stage / name)
    for part in _PARTS:
        model = _load(part, path, root, half)
        absent = sorted(name for name, p in model.named_parameters() if p.is_meta)
        if absent:
            raise CheckpointError(
                f"checkpoint: {path}: expected every tensor of the {part} that {root} describes, "
                f"{len(absent)} are missing, the first {absent[0]}"
            )
        model.save_pretrained(stage / part)


def _load(part: str, path: Path, root: Path, half: bool) -> Any:
    """One part by diffusers' own single-file loader. Raises CheckpointError for what it cannot take."""
    try:
        import diffusers
        import torch
        import transformers
        from diffusers.loaders import single_file_utils as loaders
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise BackendMissing(str(error.name), "export") from error
    dtype = torch.float16 if half else torch.float32
    try:
        if part == "text_encoder":
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(_PREFIXES[part])]  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in names}
            return loaders.create_diffusers_clip_model_from_ldm(
                transformers.CLIPTextModel,
                tensors,
                subfolder=part,
                config=str(root),
                torch_dtype=dtype,
                local_files_only=True,
            )
        cls = getattr(diffusers, _PARTS[part])
        return cls.from_single_file(
            str(path), config=str(root), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint: {path}: its {part} cannot be read by the config of {root}: {reason}"
        ) from error
