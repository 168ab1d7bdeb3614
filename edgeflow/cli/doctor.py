"""``edgeflow doctor``: what stands in the way, each with its remedy."""

from __future__ import annotations

from dataclasses import asdict

import click

from edgeflow.cli import options


@click.command(context_settings=options.CONTEXT, epilog=options.example("edgeflow doctor"))
@options.json_option
@options.verbosity
def command(as_json: bool) -> None:
    """Check versions known to break, backends, memory, disk and GPU; say the remedy of each.

    Imports no backend. Notes and warnings leave the exit code at 0.

    Exit codes: 0 nothing stands in the way, 1 an error was found, 2 usage.
    """
    from edgeflow.doctor import ERROR, diagnose
    from edgeflow.errors import EdgeflowError

    findings = diagnose()
    if as_json:
        options.print_json({"findings": [asdict(f) for f in findings]})
    else:
        for f in findings:
            click.echo(f"{f.status:8} {f.subject}: {f.found}{f' — {f.remedy}' if f.remedy else ''}")
    errors = [f for f in findings if f.status == ERROR]
    if errors:
        raise EdgeflowError("doctor: " + "; ".join(f"{f.subject}: {f.found}" for f in errors))
