"""Pushing: the very files that go up, a card that the hub's client reads, and one sentence for what fails.

Preparing is real; the hub is replaced at the boundary of its client, HfApi.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from edgeflow.bundle import Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.cli import main
from edgeflow.errors import UsageError
from edgeflow.export import export_model
from edgeflow.model_card import LICENCES, model_card
from edgeflow.parity import measure
from edgeflow.push import PushError, Upload, prepare, upload
from edgeflow.quantization.apply import quantize_checkpoint
from edgeflow.quantization.recipe import read_recipe

for _package in ("torch", "onnxruntime"):
    pytest.importorskip(_package)


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` with a card, a licence and things that are no part of it; ``w8``; ``bundle`` of ``w8``."""
    folder = tmp_path_factory.mktemp("push")
    shutil.copytree(tiny_checkpoint, folder / "model")
    (folder / "model" / "README.md").write_text(
        "---\nlicense: mit\n---\n# Mine\n\n```sh\n# run\n```\n## Data\n"
    )
    (folder / "model" / "LICENSE").write_text("all of it")
    (folder / "model" / "notes.txt").write_text("private")
    (folder / "model" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle beside the weights")
    quantize_checkpoint(Checkpoint.open(folder / "model"), read_recipe("w8"), folder / "w8")
    (path,) = export_model(
        Checkpoint.open(folder / "w8"), backends=["onnx"], precisions=["fp32"], layouts=["pipeline"],
        out=folder / "bundles",
    )  # fmt: skip
    path.rename(folder / "bundle")
    (folder / "bundle" / "notes.txt").write_text("private")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The hub in place of HfApi: ``calls`` in order, ``held`` files of main, ``error`` to raise."""
    state = SimpleNamespace(calls=[], held=[".gitattributes"], error=None, branches={"main"})

    class Api:
        def create_repo(self, repo_id: str, **given: Any) -> None:
            state.calls.append(("create_repo", repo_id, given))
            if state.error is not None:
                raise state.error

        def revision_exists(self, repo_id: str, revision: str) -> bool:
            return revision in state.branches

        def create_branch(self, repo_id: str, **given: Any) -> None:
            state.calls.append(("create_branch", repo_id, given))

        def list_repo_files(self, repo_id: str, *, revision: str | None) -> list[str]:
            return state.held

        def create_commit(self, repo_id: str, operations: list[Any], **given: Any) -> SimpleNamespace:
            state.calls.append(("create_commit", repo_id, given))
            state.added = {
                op.path_in_repo: op.path_or_fileobj
                if isinstance(op.path_or_fileobj, bytes)
                else Path(op.path_or_fileobj).read_bytes()
                for op in operations
                if isinstance(op, CommitOperationAdd)
            }
            state.deleted = [op.path_in_repo for op in operations if isinstance(op, CommitOperationDelete)]
            return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return state


def response(status: int) -> Any:
    class Error(HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, f"{status} says the hub\nRequest ID: 1")
            self.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]

    return Error()


# --- what goes up ---------------------------------------------------------------------------------------


def test_a_bundles_folder_opens_and_holds_what_the_manifest_names_and_a_card(
    folders: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(folders / "bundle")
    prepared = prepare(bundle, "me/tiny-onnx")
    prepared.write(tmp_path / "out", force=False)
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"README.md", "manifest.json", *bundle.manifest.files} == set(prepared.files)
    assert Bundle.open(tmp_path / "out").manifest == bundle.manifest


def test_a_checkpoints_folder_is_the_same_model_without_what_is_no_part_of_it(
    folders: Path, tmp_path: Path
) -> None:
    model = Checkpoint.open(folders / "model")
    prepare(model, "me/tiny").write(tmp_path / "out", force=False)
    assert Checkpoint.open(tmp_path / "out").hash == model.hash
    assert json.loads((tmp_path / "out" / "edgeflow.json").read_text()) == json.loads(
        (folders / "model" / "edgeflow.json").read_text()
    )
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "LICENSE" in names and not names & {"notes.txt", "diffusion_pytorch_model.bin"}


def test_the_commit_adds_exactly_the_prepared_files(folders: Path, tmp_path: Path, hub: Any) -> None:
    prepared = prepare(Bundle.open(folders / "bundle"), "me/tiny-onnx")
    assert upload(prepared) == "https://huggingface.co/me/tiny-onnx/commit/1"
    assert [call[0] for call in hub.calls] == ["create_repo", "create_commit"]
    assert hub.calls[0][2] == {"private": True, "exist_ok": True} and hub.calls[1][2]["revision"] is None
    prepared.write(tmp_path / "out", force=False)
    assert hub.added == {name: (tmp_path / "out" / name).read_bytes() for name in prepared.files}
    assert hub.deleted == []


def test_a_full_repository_is_replaced_with_force_alone(folders: Path, hub: Any) -> None:
    hub.held = [".gitattributes", "README.md", "old.onnx"]
    prepared = prepare(Bundle.open(folders / "bundle"), "me/tiny-onnx")
    with pytest.raises(UsageError, match="holds files already; --force replaces them"):
        upload(prepared)
    assert [call[0] for call in hub.calls] == ["create_repo"]
    upload(prepared, private=False, force=True)
    assert hub.deleted == ["old.onnx"] and hub.calls[1][2]["private"] is False


def test_a_new_branch_needs_no_force(folders: Path, hub: Any) -> None:
    hub.held = ["old.onnx"]
    prepared = prepare(Bundle.open(folders / "bundle"), "me/tiny-onnx", revision="fp32")
    upload(prepared)
    assert [call[0] for call in hub.calls] == ["create_repo", "create_branch", "create_commit"]
    assert hub.calls[1][2] == {"branch": "fp32"} and hub.calls[2][2]["revision"] == "fp32"
    assert "--revision fp32 --local-dir tiny-onnx" in str(prepared.files["README.md"])


# --- the card -------------------------------------------------------------------------------------------


def test_a_bundles_card_says_what_the_manifest_and_the_report_say(folders: Path) -> None:
    bundle = Bundle.open(folders / "bundle")
    report = measure([bundle], num_prompts=2)
    card = ModelCard(model_card(bundle, "me/tiny-onnx", base_model="me/tiny", parity=report))
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "edgeflow",
        "pipeline_tag": "text-to-image",
        "base_model": "me/tiny",
        "base_model_relation": "quantized",
        "tags": ["text-to-image", "edgeflow", "one-step", "rectified-flow", "onnx", "w8"],
    }
    text = card.text
    for said in ("ONNX", "w8 fp32", "32 × 32 pixels", "edgeflow tests, random weights"):
        assert said in text, said
    assert f"`{bundle.manifest.graphs[0].file}`" in text
    assert bundle.manifest.model["checkpoint_hash"][:16] in text
    assert "hf download me/tiny-onnx --local-dir tiny-onnx" in text
    (end,) = (m for m in report.measurements if m.gap == "end_to_end" and m.values)
    (row,) = (line for line in text.splitlines() if line.startswith("| end to end |"))
    assert f"| {end.worst:.1f} dB | {end.median:.1f} dB |" in row


def test_a_checkpoints_card_keeps_its_own_card_below(folders: Path) -> None:
    text = model_card(Checkpoint.open(folders / "model"), "me/tiny")
    card = ModelCard(text)
    assert card.data.library_name == "diffusers" and card.data.base_model is None
    assert "### Mine" in text and "#### Data" in text and "\n# run\n" in text and "license: mit" not in text
    quantized = ModelCard(model_card(Checkpoint.open(folders / "w8"), "me/tiny-w8", base_model="me/tiny"))
    assert quantized.data.library_name == "edgeflow" and quantized.data.base_model_relation == "quantized"
    assert "Recipe `w8`" in quantized.text


@pytest.mark.parametrize(
    "licence, expected",
    [("CC-BY-NC-4.0", ("cc-by-nc-4.0", None)), ("My own licence", ("other", "my-own-licence"))],
)
def test_licences_are_the_hubs_own_words_or_other(
    licence: str, expected: tuple[str, str | None], folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "model", tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "edgeflow.json").read_text())
    (tmp_path / "model" / "edgeflow.json").write_text(json.dumps({**facts, "licence": licence}))
    data = ModelCard(model_card(Checkpoint.open(tmp_path / "model"), "me/tiny")).data
    assert (data.license, data.license_name) == expected
    assert data.license in (*LICENCES, "other") and f"**licence** | {licence} |" in model_card(
        Checkpoint.open(tmp_path / "model"), "me/tiny"
    )


def test_a_text_from_a_manifest_cannot_break_the_table(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "model", tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "edgeflow.json").read_text())
    (tmp_path / "model" / "edgeflow.json").write_text(json.dumps({**facts, "origin": "a | b\n# c"}))
    text = model_card(Checkpoint.open(tmp_path / "model"), "me/tiny")
    assert "| **origin** | a \\| b # c |" in text


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["tiny", "me/ti ny", "me/tiny/x", "me/--tiny", ""])
def test_bad_repository_ids_are_usage_errors(repo_id: str, folders: Path, capsys: Any, hub: Any) -> None:
    assert main(["push", str(folders / "model"), repo_id]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: REPO_ID: .*expected owner/name[^\n]*\n", error) and hub.calls == []


def test_bad_branches_and_base_models_are_usage_errors(folders: Path) -> None:
    model = Checkpoint.open(folders / "model")
    with pytest.raises(UsageError, match="--revision: 'a b': expected the name of a branch"):
        prepare(model, "me/tiny", revision="a b")
    with pytest.raises(UsageError, match="--base-model: tiny: expected owner/name"):
        prepare(model, "me/tiny", base_model="tiny")


def test_without_a_token_nothing_is_asked(
    folders: Path, hub: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(folders / "model"), "me/tiny"]) == 1
    assert capsys.readouterr().err == (
        "error: push: me/tiny: no token: expected one from hf auth login, or in HF_TOKEN\n"
    )
    assert hub.calls == []


@pytest.mark.parametrize(
    "error, sentence",
    [
        (lambda: ConnectionError("no route to host\nmore"), "the hub cannot be reached: no route to host"),
        (lambda: OfflineModeIsEnabled("…"), "the hub is not asked while HF_HUB_OFFLINE is set"),
        (lambda: response(403), r"the hub refused \(403\): the token may not write there"),
        (lambda: response(500), r"the hub refused \(500\): 500 says the hub"),
    ],
)
def test_what_the_hub_says_is_one_sentence(
    error: Callable[[], Exception], sentence: str, folders: Path, hub: Any
) -> None:
    hub.error = error()
    with pytest.raises(PushError, match=f"^push: me/tiny: {sentence}$"):
        upload(Upload("me/tiny", None, {"README.md": "a card"}))


def test_an_address_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself, against a port that nobody listens on."""
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    api = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="a token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    with pytest.raises(PushError, match=r"^push: me/tiny: the hub cannot be reached: "):
        upload(Upload("me/tiny", None, {"README.md": "a card"}))


# --- the verb -------------------------------------------------------------------------------------------


def test_a_dry_run_writes_the_folder_and_asks_nobody(
    folders: Path, tmp_path: Path, hub: Any, capsys: Any
) -> None:
    out = tmp_path / "upload"
    asked = ["push", str(folders / "bundle"), "me/tiny-onnx", "--dry-run", "-o", str(out), "--json"]
    assert main(asked) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["url"] is None and hub.calls == []
    assert {f["path"]: f["bytes"] for f in facts["files"]} == {
        path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*.*")
    }
    assert "| lowering | pipeline |" in (out / "README.md").read_text(encoding="utf-8")
    assert main(asked) == 2 and "already exists" in capsys.readouterr().err


def test_what_fails_parity_does_not_go_up(folders: Path, tmp_path: Path, hub: Any, capsys: Any) -> None:
    """An error planted in the reference that the bundle carries; without parity the bundle may go up."""
    import numpy as np

    from edgeflow.bundle import REFERENCE

    shutil.copytree(folders / "bundle", tmp_path / "bundle")
    arrays = dict(np.load(tmp_path / "bundle" / REFERENCE))
    arrays["prompt0/pipeline/image"] = 1 - arrays["prompt0/pipeline/image"]
    np.savez(tmp_path / "bundle" / REFERENCE, **arrays)
    from hashlib import sha256

    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    content = (tmp_path / "bundle" / REFERENCE).read_bytes()
    manifest["files"][REFERENCE] = {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["push", str(tmp_path / "bundle"), "me/tiny-onnx"]) == 3 and hub.calls == []
    assert main(["push", str(tmp_path / "bundle"), "me/tiny-onnx", "--no-parity"]) == 0
    assert "PyTorch\n" not in hub.added["README.md"].decode()
    assert capsys.readouterr().out.endswith("/commit/1\n")


def test_what_is_neither_bundle_nor_checkpoint_is_one_sentence(tmp_path: Path, capsys: Any) -> None:
    assert main(["push", str(tmp_path), "me/tiny"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
