"""The bundle: one folder that a device can open, trust and check itself with, without torch.

Layout::

    manifest.json      schema, versions, checkpoint hash and licence, graphs, sha256 and bytes of every file
    tokenizer/         vocab.json, merges.txt, tokenizer_config.json
    reference.npz      seeded inputs and fp32 outputs per graph (see ``Bundle.reference``)
    <graphs>           as the backend and the layout want them

Equal inputs give equal bytes: no timestamps, sorted keys. A bundle is written into a temporary folder
beside its place and renamed (edgeflow.staging), so an interrupted export leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from edgeflow.errors import BundleError
from edgeflow.spec import GenerationSpec, GraphSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
REFERENCE = "reference.npz"
#: Bytes hashed at a time: a thread that imports meanwhile holds the interpreter for 5 ms after each.
_READ = 2**24


@dataclass(frozen=True)
class FileEntry:
    """What opening verifies of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself; ``to_json``/``from_json`` are its only form on disk."""

    backend: str  # exporter's name: onnx, openvino, coreml
    precision: str  # fp32, fp16
    layout: str  # pipeline, components
    model: dict[str, Any]  # GenerationSpec's fields less tokenizer_dir, and origin
    recipe: dict[str, Any] | None  # the quantization recipe, verbatim
    graphs: tuple[GraphSpec, ...]
    files: dict[str, FileEntry]  # every file but the manifest, by POSIX path relative to the root
    versions: dict[str, str]  # edgeflow and the tools that made it
    fp32_ops: dict[str, tuple[str, ...]] = field(default_factory=dict)  # graph → float32 in an fp16 bundle
    settings: dict[str, Any] = field(default_factory=dict)  # the backend's own: see edgeflow.apple
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> Manifest:
        """Raises BundleError for anything that is not a manifest of this schema."""
        try:
            raw = json.loads(text)
            if raw.get("schema") != SCHEMA:
                raise BundleError(f"manifest: {where}: expected schema {SCHEMA}, got {raw.get('schema')!r}")
            _generation(raw["model"], where)
            return cls(
                backend=raw["backend"],
                precision=raw["precision"],
                layout=raw["layout"],
                model=raw["model"],
                recipe=raw["recipe"],
                graphs=tuple(_graph(g) for g in raw["graphs"]),
                files={name: FileEntry(**entry) for name, entry in raw["files"].items()},
                versions=raw["versions"],
                fp32_ops={graph: tuple(ops) for graph, ops in raw.get("fp32_ops", {}).items()},
                settings=dict(raw.get("settings", {})),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise BundleError(
                f"manifest: {where}: expected a manifest of schema {SCHEMA}, got: {reason}"
            ) from error


def _generation(model: dict[str, Any], tokenizer_dir: Path) -> GenerationSpec:
    """The model's facts as a spec; TypeError or KeyError when one is missing or unknown."""
    facts = {k: v for k, v in model.items() if k != "origin"}
    for key in ("latent_shape", "prompts"):
        facts[key] = tuple(facts[key])
    return GenerationSpec(tokenizer_dir=tokenizer_dir, **facts)


def _graph(raw: dict[str, Any]) -> GraphSpec:
    def tensors(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"], t["key"]) for t in items)

    files = (str(raw["file"]), tuple(map(str, raw.get("chunks", ()))))
    return GraphSpec(raw["name"], files[0], tensors(raw["inputs"]), tensors(raw["outputs"]), files[1])


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose every byte has been verified."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, meanwhile: Callable[[Manifest], object] | None = None) -> Bundle:
        """Open and verify. Raises BundleError naming the file that is missing, changed or out of place.

        ``meanwhile`` is called with the manifest while another thread reads and hashes the files.
        """
        root = Path(path)
        manifest_path = root / MANIFEST
        if not manifest_path.is_file():
            raise BundleError(f"bundle: {root}: expected a folder with {MANIFEST}, found none")
        manifest = Manifest.from_json(manifest_path.read_bytes(), manifest_path)
        with ThreadPoolExecutor(1) as pool:
            verified = pool.submit(_verify, root, manifest)
            if meanwhile is not None:
                meanwhile(manifest)
            verified.result()
        for graph in manifest.graphs:
            for file in (graph.file, *graph.chunks):
                inside(root, file)
                if not any(n == file or n.startswith(file + "/") for n in manifest.files):
                    raise BundleError(f"bundle: {root}: graph file {file!r} has no hash in the manifest")
        return cls(root, manifest)

    @property
    def generation(self) -> GenerationSpec:
        """What drawing a picture needs."""
        return _generation(self.manifest.model, self.root / TOKENIZER)

    def graph(self, name: str) -> GraphSpec:
        for graph in self.manifest.graphs:
            if graph.name == name:
                return graph
        raise ValueError(
            f"graph {name!r} is not in the bundle; known: {[g.name for g in self.manifest.graphs]}"
        )

    def only(self, name: str) -> Bundle:
        """The same with one graph, as a runtime is to load it. Raises ValueError as ``graph`` does."""
        manifest = dataclasses.replace(self.manifest, graphs=(self.graph(name),))
        return dataclasses.replace(self, manifest=manifest)

    def reference(self) -> dict[str, NDArray[Any]]:
        """The seeded inputs and fp32 outputs the bundle carries, by ``prompt{i}/{graph}/{tensor}``."""
        import numpy as np

        with np.load(self.root / REFERENCE, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def graph_bytes(self) -> int:
        """Bytes of the graphs and weights alone: what a device downloads less tokenizer and reference."""
        return sum(
            e.bytes
            for n, e in self.manifest.files.items()
            if n != REFERENCE and not n.startswith(TOKENIZER + "/")
        )


def inside(root: Path, name: str) -> Path:
    """``root/name``, or BundleError when that leaves the folder (``..``, absolute, or through a link)."""
    if not _stays(root, name):
        raise BundleError(f"bundle: {root}: file {name!r} leaves the bundle's folder")
    return root / name


def _stays(root: Path, name: str) -> bool:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        return False
    try:
        return (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False


def _verify(root: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        path = inside(root, name)
        if not path.is_file():
            raise BundleError(f"bundle: {root}: file {name!r} is in the manifest but missing")
        actual = entry_of(path)
        if actual != entry:
            raise BundleError(
                f"bundle: {root}: file {name!r} was changed: expected {_show(entry)}, got {_show(actual)}"
            )


def _show(entry: FileEntry) -> str:
    return f"sha256 {str(entry.sha256)[:12]}… and {entry.bytes} bytes"


def entry_of(path: Path) -> FileEntry:
    digest, size = sha256(), path.stat().st_size
    buffer = memoryview(bytearray(max(1, min(size, _READ))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return FileEntry(digest.hexdigest(), size)


def write_bundle_files(root: Path, manifest: Manifest) -> None:
    """Fill in ``files`` from what lies under ``root`` and write the manifest. The last act of an export."""
    files = {p.relative_to(root).as_posix(): entry_of(p) for p in sorted(root.rglob("*")) if p.is_file()}
    (root / MANIFEST).write_text(dataclasses.replace(manifest, files=files).to_json(), encoding="utf-8")


def write_reference(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write ``reference.npz``; NumPy's zip members carry a fixed date, so equal arrays give equal bytes."""
    import numpy as np

    np.savez_compressed(path, **dict(sorted(arrays.items())))  # type: ignore[arg-type]
