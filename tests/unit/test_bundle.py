"""Bundles: what opening refuses, and that what is written reads back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeflow.bundle import MANIFEST, Bundle, FileEntry, Manifest, entry_of, inside, write_reference
from edgeflow.errors import BundleError

Make = Callable[..., Path]


def change(root: Path, **values: Any) -> None:
    """Change top-level values of the manifest."""
    path = root / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_whole_bundle_opens(make_bundle: Make) -> None:
    bundle = Bundle.open(make_bundle(layout="components"))
    assert [g.name for g in bundle.manifest.graphs] == ["text_encoder", "unet", "decoder"]
    assert bundle.graph("unet").inputs[1].name == "timestep"
    spec = bundle.generation
    assert spec.latent_shape == (4, 8, 8) and spec.timestep == 1000.0
    assert spec.tokenizer_dir == bundle.root / "tokenizer"
    with pytest.raises(ValueError, match="text_encoder"):
        bundle.graph("vae")


def test_a_manifest_reads_back(make_bundle: Make) -> None:
    manifest = Bundle.open(make_bundle()).manifest
    again = Manifest.from_json(manifest.to_json(), Path("x"))
    assert again == manifest
    assert again.to_json() == manifest.to_json()


def test_the_manifest_has_every_file_but_itself(make_bundle: Make) -> None:
    root = make_bundle()
    files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert set(Bundle.open(root).manifest.files) == files - {MANIFEST}


def test_one_flipped_bit_in_any_file_is_found(make_bundle: Make) -> None:
    root = make_bundle()
    for name in Bundle.open(root).manifest.files:
        path = root / name
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(BundleError, match=f"{name}' was changed: expected sha256 .* got sha256"):
            Bundle.open(root)
        path.write_bytes(content)
    Bundle.open(root)


def test_a_cut_or_lost_file_is_named(make_bundle: Make) -> None:
    root = make_bundle()
    graph = root / "pipeline.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"pipeline\.onnx' was changed"):
        Bundle.open(root)
    graph.unlink()
    with pytest.raises(BundleError, match=r"pipeline\.onnx' is in the manifest but missing"):
        Bundle.open(root)


def test_what_runs_meanwhile_sees_the_manifest_and_cannot_hide_a_changed_file(make_bundle: Make) -> None:
    root = make_bundle()
    seen: list[Manifest] = []
    assert Bundle.open(root, seen.append).manifest == seen[0]
    (root / "pipeline.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"pipeline\.onnx' was changed"):
        Bundle.open(root, seen.append)
    assert len(seen) == 2


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 24])
def test_a_file_of_any_size_has_the_hash_of_its_bytes(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeflow.bundle._READ", 8)
    content = bytes(range(size))
    (tmp_path / "file").write_bytes(content)
    assert entry_of(tmp_path / "file") == FileEntry(hashlib.sha256(content).hexdigest(), size)


def test_a_graph_nobody_hashed_is_refused(make_bundle: Make) -> None:
    root = make_bundle()
    raw = json.loads((root / MANIFEST).read_text())
    shutil.copy(root / "pipeline.onnx", root / "other.onnx")
    raw["graphs"][0]["file"] = "other.onnx"
    change(root, graphs=raw["graphs"])
    with pytest.raises(BundleError, match=r"other\.onnx' has no hash"):
        Bundle.open(root)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..", "a\\..\\b", "nul\0byte"])
@pytest.mark.parametrize("where", ["files", "graphs"])
def test_a_path_that_climbs_out_is_refused(name: str, where: str, make_bundle: Make) -> None:
    root = make_bundle()
    (root.parent / "secret").write_text("x")
    raw = json.loads((root / MANIFEST).read_text())
    if where == "files":
        raw["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    else:
        raw["graphs"][0]["file"] = name
    change(root, **{where: raw[where]})
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        Bundle.open(root)


def test_a_link_that_leads_out_is_refused(make_bundle: Make) -> None:
    root = make_bundle()
    outside = root.parent / "outside.onnx"
    (root / "pipeline.onnx").rename(outside)
    (root / "pipeline.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        Bundle.open(root)
    (root / "pipeline.onnx").unlink()
    (root / "pipeline.onnx").symlink_to(root / "pipeline.onnx")
    with pytest.raises(BundleError, match=r"pipeline\.onnx"):
        Bundle.open(root)


def test_a_bundle_that_is_itself_a_link_opens(make_bundle: Make) -> None:
    root = make_bundle()
    (root.parent / "link").symlink_to(root)
    Bundle.open(root.parent / "link")
    assert inside(root.parent / "link", "pipeline.onnx").is_file()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schema": 1}',
        b'{"schema": 99}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_manifest_is_one_sentence(text: bytes, make_bundle: Make) -> None:
    root = make_bundle()
    (root / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest: .*expected .*schema 1, got"):
        Bundle.open(root)


@pytest.mark.parametrize("key", ["latent_shape", "prompts", "checkpoint_hash", "timestep"])
def test_a_manifest_that_lacks_a_fact_is_refused(key: str, make_bundle: Make) -> None:
    root = make_bundle()
    model = json.loads((root / MANIFEST).read_text())["model"]
    del model[key]
    change(root, model=model)
    with pytest.raises(BundleError, match=key):
        Bundle.open(root)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleError, match=r"expected a folder with manifest\.json"):
            Bundle.open(path)


def test_a_reference_is_the_same_bytes_and_values(tmp_path: Path) -> None:
    arrays = {"b/x": np.arange(6, dtype=np.float32).reshape(2, 3), "a/y": np.array([1, 2], np.int64)}
    write_reference(tmp_path / "one.npz", arrays)
    write_reference(tmp_path / "two.npz", dict(reversed(arrays.items())))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as read:
        assert {k: (read[k].dtype, read[k].tolist()) for k in read.files} == {
            k: (v.dtype, v.tolist()) for k, v in arrays.items()
        }


def test_graph_bytes_count_neither_tokenizer_nor_reference(make_bundle: Make) -> None:
    bundle = Bundle.open(make_bundle())
    assert bundle.graph_bytes() == (bundle.root / "pipeline.onnx").stat().st_size
    files = {**bundle.manifest.files, "reference.npz": FileEntry("0", 10**9)}
    more = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files=files))
    assert more.graph_bytes() == bundle.graph_bytes()
