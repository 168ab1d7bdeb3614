"""A checkpoint or a bundle onto the hub: the files that go up, with a card, and the upload. Torch-free.

Only files that make up the model go up, never a folder as it lies there. Everything but ``upload`` is local.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeflow.bundle import MANIFEST, Bundle
from edgeflow.checkpoint import Checkpoint
from edgeflow.errors import EdgeflowError, UsageError, needs
from edgeflow.facts import FACTS
from edgeflow.model_card import model_card
from edgeflow.parity_report import ParityReport
from edgeflow.staging import staged_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
#: What the hub itself puts into a repository: no file of a model.
_HUBS_OWN = (".gitattributes",)


class PushError(EdgeflowError):
    """The hub could not be reached, or would not take the upload."""


@dataclass(frozen=True)
class Upload:
    """What a repository is to hold: path in it → a file on this machine, or its text."""

    repo_id: str
    revision: str | None
    files: dict[str, Path | str]

    def sizes(self) -> dict[str, int]:
        """Bytes by path."""
        return {
            name: len(content.encode()) if isinstance(content, str) else content.stat().st_size
            for name, content in self.files.items()
        }

    def write(self, out: Path, *, force: bool) -> None:
        """The folder that would be uploaded. Raises as edgeflow.staging.staged_folder does."""
        with staged_folder(out, force=force) as stage:
            for name, content in self.files.items():
                path = stage / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, str):
                    path.write_bytes(content.encode())
                else:
                    shutil.copyfile(content, path)


def prepare(
    model: Bundle | Checkpoint,
    repo_id: str,
    *,
    revision: str | None = None,
    base_model: str | None = None,
    parity: ParityReport | None = None,
) -> Upload:
    """The files of ``model`` and its card. Raises UsageError for ids that no repository can have."""
    check_repo_id(repo_id)
    if base_model is not None:
        check_repo_id(base_model, "--base-model")
    if revision is not None and not re.fullmatch(r"[\w.][\w./-]*", revision):
        raise UsageError(f"--revision: {revision!r}: expected the name of a branch")
    card = model_card(model, repo_id, revision=revision, base_model=base_model, parity=parity)
    files: dict[str, Path | str] = {CARD: card}
    if isinstance(model, Checkpoint):
        files[FACTS] = _facts(model)
    names = _bundle_files(model) if isinstance(model, Bundle) else _checkpoint_files(model)
    return Upload(repo_id, revision, {**files, **{name: model.root / name for name in names}})


def check_repo_id(repo_id: str, what: str = "REPO_ID") -> None:
    """Raises UsageError for what is not the id of a repository, owner/name."""
    with needs("export"):
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"{what}: {repo_id}: expected owner/name, got what the hub refuses: {error}"
        ) from error
    if repo_id.count("/") != 1:
        raise UsageError(f"{what}: {repo_id}: expected owner/name, got no owner")


def _bundle_files(bundle: Bundle) -> list[str]:
    return [MANIFEST, *sorted(bundle.manifest.files)]


def _checkpoint_files(checkpoint: Checkpoint) -> list[str]:
    """What opening and every library's from_pretrained read, the licence beside it, and no pickle."""
    root = checkpoint.root
    top = [root / name for name in ("model_index.json", "scheduler/scheduler_config.json")]
    top += sorted(path for path in root.glob("LICEN[CS]E*"))
    parts = [path for part in checkpoint.parts for path in checkpoint.files(part)]
    weighted = [part for part in checkpoint.parts if part != "tokenizer"]
    shards = [checkpoint.weight_names(part, checkpoint.variant_of(part))[1] for part in weighted]
    found = [path for path in (*top, *parts, *shards) if path.is_file()]
    return [path.relative_to(root).as_posix() for path in found]


def _facts(checkpoint: Checkpoint) -> str:
    """edgeflow.json, also of a folder that has none: what its name or its old card said would be lost."""
    facts = {key: value for key, value in checkpoint.facts.items() if key != "parts"}
    return json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def upload(prepared: Upload, *, private: bool = True, force: bool = False) -> str:
    """Make the repository (and branch) where there is none, commit all files at once; the commit's address.

    A new repository is private unless ``private`` is off; an existing one stays what it is. With ``force``
    the commit also deletes the files that the repository held and the upload lacks.

    Raises PushError where the hub is not reached, refuses, or knows no token; UsageError for a repository
    that holds files where ``force`` is off.
    """
    with needs("export"):
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
    where = f"push: {prepared.repo_id}"
    if get_token() is None:
        raise PushError(f"{where}: no token: expected one from hf auth login, or in HF_TOKEN")
    try:
        return _commit(HfApi(), prepared, private, force)
    except OfflineModeIsEnabled as error:
        raise PushError(f"{where}: the hub is not asked while HF_HUB_OFFLINE is set") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = "the token may not write there" if status in (401, 403) else _first_line(error)
        raise PushError(f"{where}: the hub refused ({status}): {reason}") from error
    except (HTTPError, OSError) as error:
        raise PushError(f"{where}: the hub cannot be reached: {_first_line(error)}") from error


def _commit(api: HfApi, prepared: Upload, private: bool, force: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id, revision = prepared.repo_id, prepared.revision
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not api.revision_exists(repo_id, revision):
        api.create_branch(repo_id, branch=revision)
        force = True  # it begins as a copy of main, of which nothing is lost
    held = set(api.list_repo_files(repo_id, revision=revision)) - set(_HUBS_OWN)
    if held and not force:
        raise UsageError(f"push: {repo_id}: the repository holds files already; --force replaces them")
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content.encode() if isinstance(content, str) else str(content))
        for name, content in prepared.files.items()
    ]
    operations += [CommitOperationDelete(name) for name in sorted(held - set(prepared.files))]
    info = api.create_commit(repo_id, operations, commit_message="Upload by edgeflow", revision=revision)
    return str(info.commit_url)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
