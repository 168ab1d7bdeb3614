"""``edgeflow push``: a bundle or a checkpoint onto the Hugging Face hub, with a card."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeflow import terminal
from edgeflow.cli import options

if TYPE_CHECKING:
    from edgeflow.bundle import Bundle
    from edgeflow.checkpoint import Checkpoint
    from edgeflow.parity_report import ParityReport
    from edgeflow.push import Upload


@click.command(
    context_settings=options.CONTEXT,
    epilog=options.example(
        "edgeflow push bundles/onnx-pipeline-fp16 me/emoji-onnx --dry-run -o upload",
        "edgeflow push ./emoji-w8 me/emoji-w8 --public --base-model me/emoji",
    ),
)
@click.argument("source", metavar="BUNDLE_OR_MODEL")
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private/--public", default=True, help="Who may see a new repository.  [default: private]")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to; made where there is none.")
@click.option(
    "--base-model",
    metavar="ID",
    help="Hub id of what this was made from, for the card.  [default: the model's own name, if it is one]",
)
@click.option(
    "--parity/--no-parity", default=True, help="Measure a bundle against PyTorch first, for the card."
)
@click.option("--dry-run", is_flag=True, help="Upload nothing: print what would go up.")
@options.out_option("Folder to write what goes up into, also with --dry-run.", required=False)
@options.force_option
@options.json_option
@options.verbosity
def command(
    source: str,
    repo_id: str,
    private: bool,
    revision: str | None,
    base_model: str | None,
    parity: bool,
    dry_run: bool,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Upload BUNDLE_OR_MODEL to the repository REPO_ID (owner/name) of the Hugging Face hub.

    Only the files that make up the model go up, in one commit, and a card generated from them: model,
    precision, backend, licence, base model, how to run it, and for a bundle the parity table, measured here
    and now; if a gate fails nothing is uploaded. The token is the one of hf auth login, or HF_TOKEN.

    --force also replaces what the repository holds: files that the upload lacks are deleted from the branch.

    Exit codes: 0 done, 1 failed, 2 usage, 3 a parity gate failed, 4 a package is not installed.
    """
    from edgeflow.generate import open_model
    from edgeflow.push import check_repo_id, prepare, upload

    check_repo_id(repo_id)
    model = open_model(source)
    report = _measured(model) if parity else None
    prepared = prepare(model, repo_id, revision=revision, base_model=base_model, parity=report)
    if out is not None:
        prepared.write(out, force=force)
    address = None if dry_run else upload(prepared, private=private, force=force)
    _print(prepared, address, as_json)


def _measured(model: Bundle | Checkpoint) -> ParityReport | None:
    """A bundle's parity; None for a checkpoint. Raises GateFailed."""
    from edgeflow.bundle import Bundle
    from edgeflow.parity import measure

    if not isinstance(model, Bundle):
        return None
    with ExitStack() as stack:
        report = measure([model], progress=options.spinner(stack))
    report.check()
    return report


def _print(prepared: Upload, address: str | None, as_json: bool) -> None:
    sizes = prepared.sizes()
    if as_json:
        files = [{"path": name, "bytes": count} for name, count in sizes.items()]
        facts = {"repo_id": prepared.repo_id, "revision": prepared.revision, "url": address, "files": files}
        options.print_json(facts)
    elif address is not None:
        click.echo(address)
    else:
        table = terminal.table(["file"], ["bytes"])
        for name, count in sizes.items():
            table.add_row(name, f"{count:,}")
        terminal.show([table, f"{len(sizes)} files, {sum(sizes.values()):,} bytes; nothing was uploaded"])
